"""The report: what a night's commit and its run folder say, as one page for people."""

from pipeline.report.gathering import ReportError, gather
from pipeline.report.rendering import render, write_report

__all__ = ["ReportError", "gather", "render", "write_report"]
