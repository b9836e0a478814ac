"""Exports a published night in the formats of annotation and dataset tools. Rows are streamed."""

from pipeline.lake.exports.rows import ExportError, find_night, read_rows
from pipeline.lake.exports.writers import FORMATS, ExportCount, export_rows

__all__ = ["FORMATS", "ExportCount", "ExportError", "export_rows", "find_night", "read_rows"]
