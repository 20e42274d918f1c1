"""Draws a board: one table on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m2mkd_fast.pipeline.board import FAILED, FINISHED, READY, RUNNING, STALE, WAITING, Board, Row

# What to leave out first where a terminal has not enough lines.
_IMPORTANCE = {FAILED: 0, STALE: 0, RUNNING: 1, READY: 2, WAITING: 3, FINISHED: 4}
_STYLES = {FAILED: "bold red", STALE: "yellow", RUNNING: "green", READY: "cyan", WAITING: "dim", FINISHED: "dim"}
_HEADS = ("step", "state", "done", "loss", "images/s", "left")
_LINES_AROUND = 7  # title, head with its rule, a line for what is left out, summary of up to two lines, cursor
_BAR, _GAP, _LEAST_REMARK = 10, 2, 24  # characters


class BoardTable:
    """A board as something that rich draws; on a low terminal the least telling rows are left out.

    Args:
        board: what to draw.
        framed: with the run's folder above and the summary below.

    Example:
        >>> rich.print(BoardTable(BoardReader("runs/digits_vmoe").read()))
    """

    def __init__(self, board: Board, framed: bool = True) -> None:
        self.board, self.framed = board, framed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.board.rows:
            yield Text(summary(self.board) if self.framed else "")
            return
        rows = most_telling(self.board.rows, max(options.max_height - _LINES_AROUND, 1))
        cells = [_cells(row) for row in rows]
        widths = [max([len(head), *(len(own[index]) for own in cells)]) for index, head in enumerate(_HEADS)]
        left = options.max_width - sum(widths) - _GAP * len(widths)
        with_bars = left >= _BAR + _GAP + _LEAST_REMARK
        left -= (_BAR + _GAP) * with_bars
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for index, (head, width) in enumerate(zip(_HEADS, widths, strict=True)):
            table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True, min_width=width)
            if index == 1 and with_bars:
                table.add_column("", width=_BAR)
        table.add_column("", no_wrap=True)
        for row, (name, state, *numbers) in zip(rows, cells, strict=True):
            bar = ProgressBar(total=row.total, completed=row.done, width=_BAR) if row.total else ""
            remark = Text(", ".join(part for part in ("" if row.state == FINISHED else row.host, row.remark) if part))
            remark.truncate(max(left, 1), overflow="ellipsis")
            first = [Text(name, "bold" if row.state == RUNNING else ""), Text(state, _STYLES[row.state])]
            quiet = "dim" if row.state in (WAITING, FINISHED) else None
            table.add_row(*first, *([bar] if with_bars else []), *map(Text, numbers), remark, style=quiet)
        if self.framed:
            yield Text(f"Run {self.board.folder}", "bold")
        yield table
        if len(rows) < len(self.board.rows):
            yield Text(f"and {len(self.board.rows) - len(rows)} more", "dim")
        if self.framed:
            yield Text(summary(self.board))


def most_telling(rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
    """At most so many rows, in their order: what failed or runs before what waits, that before what is finished."""
    if len(rows) <= count:
        return rows
    ranked = sorted(range(len(rows)), key=lambda index: (_IMPORTANCE[rows[index].state], index))
    return tuple(rows[index] for index in sorted(ranked[: max(count - 1, 1)]))


def line_of(row: Row) -> str:
    """`m2mkd/pair0: running on node7, 120/300 (40 %), loss 0.531, 1,234 images/s, 0:32 left`."""
    where = f" on {row.host}" if row.host and row.state in (RUNNING, STALE, FAILED) else ""
    parts = [f"{row.name}: {row.state}{where}"]
    if row.done or (row.total and row.state == RUNNING):
        percent = f" ({100 * row.done / row.total:.0f} %)" if row.total and row.state != FINISHED else ""
        parts.append(f"{_done(row)}{percent}")
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4g}")
    if row.images_per_second is not None:
        parts.append(f"{row.images_per_second:,.0f} images/s")
    if row.seconds_left is not None and row.state == RUNNING:
        parts.append(f"{duration(row.seconds_left)} left")
    return ", ".join([*parts, *([row.remark] if row.remark else [])])


def summary(board: Board) -> str:
    """How many steps are in which state, and how long the rest takes: with a worker a step, and with those there are.

    The second is left out where nobody works or the two are the same.
    """
    if not board.rows:
        return f"no run has begun in {board.folder}"
    states = Counter(row.state for row in board.rows)
    counts = [f"{states[state]} {state}" for state in (RUNNING, STALE, FAILED, READY, WAITING) if states[state]]
    text = ", ".join([f"{states[FINISHED]} of {len(board.rows)} steps finished", *counts])
    shortest = board.seconds_left()
    if board.finished or shortest is None:
        return text
    text += f"; about {duration(shortest)} left on the critical path"
    if board.workers:
        longer = duration(board.seconds_left(board.workers))
        if longer != duration(shortest):
            text += f", {longer} with {board.workers} {'worker' if board.workers == 1 else 'workers'}"
    return text


def duration(seconds: float) -> str:
    """`8 s`, `3:07` (minutes and seconds) or `2:03:07` (with hours)."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _cells(row: Row) -> list[str]:
    """What stands under ``_HEADS``."""
    done = _done(row) if row.total or row.done else ""
    loss = "" if row.loss is None else f"{row.loss:.4g}"
    pace = "" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
    left = duration(row.seconds_left) if row.state == RUNNING and row.seconds_left is not None else ""
    return [row.name, row.state, done, loss, pace, left]


def _done(row: Row) -> str:
    return f"{row.done:,}" if row.total is None else f"{row.done:,}/{row.total:,}"
