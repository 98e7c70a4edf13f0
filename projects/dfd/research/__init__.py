"""Finished runs side by side: tables for the terminal and one self-contained HTML page."""

from ..engine.run_folder import load_runs, parse_runs
from .compare import format_text
from .report import write_report

__all__ = ["format_text", "load_runs", "parse_runs", "write_report"]
