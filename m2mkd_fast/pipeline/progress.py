"""Progress of running steps: one table on a terminal, plain lines elsewhere.

The process that owns the terminal holds one `ProgressDisplay`. Worker processes report through a `QueueProgress`, which
has the same methods and hands them on as picklable dictionaries, for `ProgressDisplay.event` in the owner.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.board import FAILED, FINISHED, RUNNING, Board, BoardReader, Row
from m2mkd_fast.pipeline.board_table import BoardTable, duration

_LOOK_EVERY = 1.0  # seconds between looks into the run folder, for what others do
EVENT_KINDS = ("start", "update", "finish", "message")


class Progress(Protocol):
    """What a training loop reports to: a `ProgressDisplay` in its own process, or a `QueueProgress` to another's."""

    def start(self, step: str, total: int, done: int = 0) -> None: ...

    def update(
        self,
        step: str,
        done: int,
        loss: float | None = None,
        terms: Mapping[str, float] | None = None,
        images_per_second: float | None = None,
    ) -> None: ...

    def finish(self, step: str, message: str = "") -> None: ...

    def message(self, text: str) -> None: ...


class _Events:
    """The four reports as dictionaries handed to `event`."""

    def event(self, event: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def start(self, step: str, total: int, done: int = 0) -> None:
        """Step `step` begins with `done` of `total` training steps already there (a resumed step)."""
        self.event({"kind": "start", "step": step, "total": total, "done": done})

    def update(
        self,
        step: str,
        done: int,
        loss: float | None = None,
        terms: Mapping[str, float] | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """`done` training steps of a started step are over; loss and terms are Python numbers."""
        self.event(
            {
                "kind": "update",
                "step": step,
                "done": done,
                "loss": loss,
                "terms": dict(terms or {}),
                "images_per_second": images_per_second,
            }
        )

    def finish(self, step: str, message: str = "") -> None:
        """The started step is over; `message` stands on its last line, e.g. its accuracy."""
        self.event({"kind": "finish", "step": step, "message": message})

    def message(self, text: str) -> None:
        """A line of its own, above the bars."""
        self.event({"kind": "message", "message": text})


class QueueProgress(_Events):
    """Reports of a worker process, put into anything that has ``put``: a queue, a pipe's end.

    Updates come at most every `interval` seconds per step: a queue that fills faster than it is read grows without
    bound.
    """

    def __init__(self, queue: Any, interval: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._interval, self._clock = queue, interval, clock
        self._last: dict[str, float] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "update":
            now = self._clock()
            if now - self._last.get(event["step"], -math.inf) < self._interval:
                return
            self._last[event["step"]] = now
        self._queue.put(dict(event))


@dataclass
class _Running:
    total: int
    first: int  # training steps that were done before this process began: they took none of its time
    done: int
    began: float
    printed: float
    loss: float | None = None
    images_per_second: float | None = None


class ProgressDisplay(_Events):
    """Shows the steps that run; every method may be called from any thread.

    On a terminal they stand in one table, with all other steps of the run where its folder is given: those that wait,
    are finished, or run elsewhere. Off a terminal a step has a plain line at its start and its end, and between them at
    most one every `interval` seconds.

    Args:
        console: where to show; standard error by default, so that piped output stays clean.
        interval: seconds between plain lines of one step.
        clock: seconds that only go up.
        folder: of the run.
    """

    def __init__(
        self,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        folder: Path | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._interval, self._clock = interval, clock
        self._lock = threading.RLock()
        self._running: dict[str, _Running] = {}
        self._live: Live | None = None
        self._reader = None if folder is None else BoardReader(folder)
        self._board, self._looked = Board(folder or Path()), -math.inf

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._table, refresh_per_second=4, transient=self._reader is None
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            for name in list(self._running):
                running = self._running.pop(name)
                self._print(f"{name}: stopped at {running.done:,}/{running.total:,}")
            live, self._live, self._looked = self._live, None, -math.inf
        if live is not None:
            live.stop()

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the steps that were started and not finished, in the order of their starts."""
        with self._lock:
            return tuple(self._running)

    def event(self, event: Mapping[str, Any]) -> None:
        """Shows one event: `{"kind": "start"|"update"|"finish"|"message", ...}` with that method's arguments.

        Raises:
            UnknownNameError: the kind is none of the four, or the step of an update or finish was not started.
            M2MKDError: an argument is missing.
        """
        kind = event.get("kind")
        if kind not in EVENT_KINDS:
            raise UnknownNameError("kind of progress event", str(kind), EVENT_KINDS)
        try:
            with self._lock:
                getattr(self, f"_on_{kind}")(event)
        except KeyError as error:
            raise M2MKDError(f"progress event {dict(event)!r} lacks {error.args[0]!r}; send it along") from error

    def _on_start(self, event: Mapping[str, Any]) -> None:
        name, total, done = event["step"], int(event["total"]), int(event.get("done", 0))
        now = self._clock()
        self._running.pop(name, None)
        self._running[name] = _Running(total, done, done, began=now, printed=now)
        if self._live is None:
            self._print(f"{name}: {f'continues at {done:,}/{total:,}' if done else f'starts, {total:,} steps'}")

    def _on_update(self, event: Mapping[str, Any]) -> None:
        running, now = self._of(event["step"]), self._clock()
        running.done = int(event["done"])
        running.loss, running.images_per_second = event.get("loss"), event.get("images_per_second")
        if self._live is None and now - running.printed >= self._interval:
            running.printed = now
            percent = f" ({100 * running.done / running.total:.0f} %)" if running.total else ""
            count = f"{event['step']}: {running.done:,}/{running.total:,}{percent}"
            pace = _pace(running, now)
            left = [] if pace is None else [f"{duration(pace * max(0, running.total - running.done))} left"]
            self._print(", ".join([count, *_facts(event), *left]))

    def _on_finish(self, event: Mapping[str, Any]) -> None:
        running = self._of(event["step"])
        del self._running[event["step"]]
        self._looked = -math.inf  # its result is in the folder
        seconds = self._clock() - running.began
        message = event.get("message")
        self._print(f"{event['step']}: finished in {duration(seconds)}" + (f", {message}" if message else ""))

    def _on_message(self, event: Mapping[str, Any]) -> None:
        self._print(str(event["message"]))

    def _table(self) -> BoardTable:
        """The run's steps as its folder shows them, and for those that run here what they have reported since.

        Takes no lock: the thread that draws has the screen's, for which a thread that prints waits with ours.
        """
        now = self._clock()
        if self._reader is not None and now - self._looked >= _LOOK_EVERY:
            self._looked, self._board = now, self._reader.read()
        rows = {row.name: row for row in self._board.rows}
        for name, running in list(self._running.items()):
            known, pace = rows.get(name, Row(name)), _pace(running, now)
            if known.state in (FAILED, FINISHED):
                continue  # its worker here has died, and others went on
            rows[name] = replace(
                known,
                state=RUNNING,
                done=running.done,
                total=running.total,
                loss=running.loss,
                images_per_second=running.images_per_second,
                pace=pace,
                seconds_left=None if pace is None else pace * max(0, running.total - running.done),
                host="",
            )
        framed = self._reader is not None and bool(rows)  # there are none yet while the run is being opened
        return BoardTable(Board(self._board.folder, tuple(rows.values())), framed)

    def _of(self, step: str) -> _Running:
        if step not in self._running:
            raise UnknownNameError("running step", step, self._running, remedy="Report its start first.")
        return self._running[step]

    def _print(self, line: str) -> None:
        # Text, not str: brackets in a message are no markup, and a line is not cut into the width of a file.
        self._console.print(Text(line), soft_wrap=True)


def _facts(event: Mapping[str, Any]) -> list[str]:
    facts = []
    if event.get("loss") is not None:
        terms = " + ".join(f"{name} {value:.3g}" for name, value in (event.get("terms") or {}).items())
        facts.append(f"loss {event['loss']:.4g}" + (f" ({terms})" if terms else ""))
    if event.get("images_per_second") is not None:
        facts.append(f"{event['images_per_second']:,.0f} images/s")
    return facts


def _pace(running: _Running, now: float) -> float | None:
    """Seconds of a training step, on the mean since the start; None before there is a pace."""
    done, elapsed = running.done - running.first, now - running.began
    return elapsed / done if done > 0 and elapsed > 0 else None
