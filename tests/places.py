"""Paths of the project's files that tests use."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "infra" / "demo" / "images"
"""24 photos of two classes with their masks, in the layout of MVTec AD."""
SHARED = ROOT.parent / "shared"
"""Real photos with masks that are not part of the project; tests that need them are skipped where they are missing."""
