"""The run on one terminal screen."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from m2mkd_fast.report.markdown import main_table
from m2mkd_fast.report.results import collect_results
from m2mkd_fast.report.run_folder import read_run

_MOST_MISSING = 3


def summary_table(run_folder: str | Path) -> Table:
    """The arms' table of the report, for `rich.print`; below it the steps that are missing.

    Raises:
        M2MKDError: as `read_run`.
    """
    results = collect_results([read_run(run_folder)])
    heads, rows = main_table(results)
    table = Table(
        title=f"Run {results['runs'][0]['folder']}", title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    for index, head in enumerate(heads):
        short = head.removeprefix("training ").replace(" accuracy", "").replace(", stitches", ",")
        table.add_column(short, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shortened(cell)) for cell in row), style="bold" if row[0] == "m2mkd" else None)
    missing = results["runs"][0]["missing"]
    if missing:
        left = len(missing) - _MOST_MISSING
        table.caption = "; ".join(missing[:_MOST_MISSING]) + (f"; and {left} more" if left > 0 else "")
        table.caption_justify = "left"
    return table


def _shortened(cell: str) -> str:
    return cell.strip("*").replace(" (not charged)", "").replace(" end to end)", " E2E)")
