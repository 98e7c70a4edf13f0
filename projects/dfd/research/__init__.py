"""Finished runs side by side: tables for the terminal and one self-contained HTML page."""

from .compare import format_text
from .report import write_report
from .run_folder import load_runs, parse_runs

__all__ = ["format_text", "load_runs", "parse_runs", "write_report"]
