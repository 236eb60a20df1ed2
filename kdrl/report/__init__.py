"""Static reports of runs: one page per run, a table and a plot for several. No torch, no network."""

from __future__ import annotations

from kdrl.report.compare import report_runs
from kdrl.report.page import report_run

__all__ = ["report_run", "report_runs"]
