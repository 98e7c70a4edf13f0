"""Finished runs side by side: tables for the terminal and one self-contained HTML page."""

from .page import write_report
from .results import format_text
from .runs import load_runs, parse_runs

__all__ = ["format_text", "load_runs", "parse_runs", "write_report"]
