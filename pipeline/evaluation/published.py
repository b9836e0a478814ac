"""Published zero-shot results to hold ours against: percent, means over all classes of a data set (method.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Benchmark = Literal["mvtec", "visa"]

TITLES: dict[Benchmark, str] = {"mvtec": "MVTec AD, 15 classes", "visa": "VisA, 12 classes"}


@dataclass(frozen=True)
class Published:
    """A row of a paper, in percent; None where the paper has no such number."""

    method: str
    image_auroc: float
    image_aupr: float
    image_f1_max: float
    pixel_auroc: float
    pixel_pro: float | None
    pixel_f1_max: float | None
    note: str
    pixel_aupr: float | None = None


_UNVERIFIED = "recalled, unverified"
_WINCLIP = "paper, ViT-B-16-plus-240"
_REIMPLEMENTED = "best reimplementation"
_FEW = "paper"

PUBLISHED: dict[Benchmark, tuple[Published, ...]] = {
    "mvtec": (
        Published("ALFA", 93.2, 97.3, 93.9, 90.6, 78.9, 36.6, _UNVERIFIED),
        Published("WinCLIP", 91.8, 96.5, 92.9, 85.1, 64.6, 31.7, _WINCLIP),
        Published("WinCLIP", 90.4, 95.6, 92.7, 82.3, 61.9, 24.8, _REIMPLEMENTED),
        Published("WinCLIP+ 4-shot", 95.2, 97.3, 94.7, 96.2, None, None, _FEW),
    ),
    "visa": (
        Published("ALFA", 81.2, 84.6, 81.9, 85.9, 63.8, 15.9, _UNVERIFIED),
        Published("WinCLIP", 78.1, 81.2, 79.0, 79.6, 56.8, 14.8, _WINCLIP),
        Published("WinCLIP", 75.5, 78.7, 78.2, 73.2, 51.0, 9.0, _REIMPLEMENTED),
        Published("WinCLIP+ 4-shot", 87.3, 88.8, 84.2, 97.2, 87.6, 47.0, _FEW),
    ),
}
