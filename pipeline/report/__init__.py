"""A published night as one HTML page for people, and what changed between two nights (drift).

In: a commit and its run folder. Out: index.html, changed verdicts, drift by class.
May import: lake, images, storage, schemas.
"""

from pipeline.report import drift
from pipeline.report.drift import ClassDrift
from pipeline.report.loading import ReportError, gather
from pipeline.report.rendering import render, write_report

__all__ = [
    "ClassDrift",
    "ReportError",
    "drift",
    "gather",
    "render",
    "write_report",
]
