"""Report on a run: reads the run folder alone, writes report.md, results.json and plots, draws a terminal table.

matplotlib is imported only when a report is written, rich only when a table is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m2mkd_fast.report.frontier import write_frontier
    from m2mkd_fast.report.results import collect_results
    from m2mkd_fast.report.run_folder import read_run
    from m2mkd_fast.report.terminal import summary_table
    from m2mkd_fast.report.write import write_report

_HOME = {
    "collect_results": "m2mkd_fast.report.results",
    "read_run": "m2mkd_fast.report.run_folder",
    "summary_table": "m2mkd_fast.report.terminal",
    "write_frontier": "m2mkd_fast.report.frontier",
    "write_report": "m2mkd_fast.report.write",
}

__all__ = ["collect_results", "read_run", "summary_table", "write_frontier", "write_report"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
