"""Watch a run from outside: any terminal, any machine that sees the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.board import BoardReader
from m2mkd_fast.pipeline.board_table import BoardTable, line_of, summary


def watch(
    folder: str | Path,
    *,
    once: bool = False,
    interval: float = 2.0,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run's board until all its steps are finished, or until Ctrl-C; the folder is only read.

    On a terminal it is one table that changes. Elsewhere each look prints a line for every step whose state changed.

    Args:
        folder: of the run; one that does not exist yet is waited for.
        once: look once.
        interval: seconds between looks.
        console: where to show; standard output by default.
        sleep: waits.

    Raises:
        M2MKDError: ``folder`` is a file, or the interval is not positive.
    """
    if not interval > 0:
        raise M2MKDError(f"--interval is in seconds between two looks and must be positive, got {interval:g}")
    if Path(folder).is_file():
        raise M2MKDError(f"{folder} is a file; give the folder of a run, as m2mkd run CONFIG prints it")
    console, reader = console or Console(), BoardReader(folder)
    try:
        if console.is_terminal and not once:
            _live(reader, console, interval, sleep)
        elif console.is_terminal:
            console.print(BoardTable(reader.read()))
        else:
            _lines(reader, console, once, interval, sleep)
    except KeyboardInterrupt:
        return  # the run goes on without its watcher


def _live(reader: BoardReader, console: Console, interval: float, sleep: Callable[[float], None]) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            board = reader.read()
            live.update(BoardTable(board), refresh=True)
            if board.finished:
                return
            sleep(interval)


def _lines(reader: BoardReader, console: Console, once: bool, interval: float, sleep: Callable[[float], None]) -> None:
    states: dict[str, str] | None = None
    while True:
        board = reader.read()
        now = {row.name: row.state for row in board.rows}
        if now != states:
            changed = [row for row in board.rows if (states or {}).get(row.name) != row.state]
            for text in (*map(line_of, changed), summary(board)):
                console.print(Text(text), soft_wrap=True)
        states = now
        if once or board.finished:
            return
        sleep(interval)
