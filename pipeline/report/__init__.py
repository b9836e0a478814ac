"""Renders a published night as one HTML page, and compares two nights (drift).

In: a commit and its run folder. Out: index.html, changed verdicts, drift by class.
May import: lake, images, storage, schemas.
"""

from pipeline.report import drift
from pipeline.report.drift import ClassDrift
from pipeline.report.loading import ReportError, load_report
from pipeline.report.rendering import render, write_report

__all__ = [
    "ClassDrift",
    "ReportError",
    "drift",
    "load_report",
    "render",
    "write_report",
]
