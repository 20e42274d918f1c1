"""How far a run is, read from its folder alone: on any machine that sees it, while others write into it.

Files may be half written, vanish between two looks, or be missing in a run that has not begun or is an old one; what
cannot be read counts as not there yet. Of files that grow only the end is read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_fast.pipeline.board_files import (
    Tail,
    accuracies,
    count,
    number,
    read_json,
    read_object,
    read_tail,
    signature,
)
from m2mkd_fast.pipeline.schedule import critical_path, finishing_time

_SILENT_INTERVALS = 6  # as many of a lease's intervals without a sign of life as let another worker take it over
_LONG_SILENCE = 60.0  # seconds, for a lease that names no interval

RUNNING, FINISHED, FAILED, STALE, READY, WAITING = "running", "finished", "failed", "stale", "ready", "waiting"


@dataclass(frozen=True)
class Row:
    """What is known of one step.

    Attributes:
        name: of the step.
        phase: as in the plan.
        needs: names of the steps that come before it.
        state: ``waiting`` (for steps that it needs), ``ready``, ``running``, ``stale`` (its worker gives no sign of
            life), ``failed`` or ``finished``.
        done: training steps that are done.
        total: training steps that it has; None where nothing says so.
        loss: of the last line.
        images_per_second: lately; None where it does not run.
        pace: seconds of a training step.
        seconds_left: of its training, at that pace.
        host: who works on it, or did when it failed.
        remark: accuracies of a finished step, the last ones of another; or what went wrong.
    """

    name: str
    phase: str = ""
    needs: tuple[str, ...] = ()
    state: str = WAITING
    done: int = 0
    total: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    pace: float | None = None
    seconds_left: float | None = None
    host: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Board:
    """All rows at one moment."""

    folder: Path
    rows: tuple[Row, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether there is a plan and all of it is done."""
        return bool(self.rows) and all(row.state == FINISHED for row in self.rows)

    @property
    def workers(self) -> int:
        """Steps that are worked on now."""
        return sum(row.state == RUNNING for row in self.rows)

    def seconds_left(self, workers: int | None = None) -> float | None:
        """Estimated time until all steps are finished; None as long as no step has a pace.

        A step that has not begun takes as long a training step as the finished and running ones of its phase, or of
        all phases where its own has none yet. Evaluations and starts are not counted.

        Args:
            workers: steps at a time; None for as many as can be: the critical path.
        """
        paces = _paces(self.rows)
        if not paces:
            return 0.0 if self.finished else None
        every = [pace for known in paces.values() for pace in known]
        left = {}
        for row in self.rows:
            known = paces.get(row.phase, every)
            pace = row.pace or sum(known) / len(known)
            steps = max(0, (row.total or 0) - row.done)
            left[row.name] = 0.0 if row.state == FINISHED else steps * pace
        needs = {row.name: row.needs for row in self.rows}
        if workers is None:
            return critical_path(left, needs)
        running = [row.name for row in self.rows if row.state == RUNNING]
        return finishing_time(left, needs, workers, running)


def _paces(rows: Sequence[Row]) -> dict[str, list[float]]:
    paces: dict[str, list[float]] = {}
    for row in rows:
        if row.pace:
            paces.setdefault(row.phase, []).append(row.pace)
    return paces


@dataclass
class _Pulse:
    heartbeat: Any
    seen: float  # by the observer's own clock that only goes up
    age: float  # seconds that the heartbeat was old when it was seen first


class BoardReader:
    """Looks at a run folder again and again; what has not changed since the last look is not read again.

    How long a worker has been silent is measured on the observer's own clock from one look to the next. Only for the
    first look the lease's time of writing is compared with this machine's clock: an estimate where clocks differ.

    Args:
        folder: of the run; may come to be later.
        clock: seconds that only go up.
        wall: seconds since 1970, as files' times are.
    """

    def __init__(
        self,
        folder: str | Path,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self._clock, self._wall = clock, wall
        self._known: dict[Path, tuple[tuple[int, int, int], Any]] = {}
        self._pulses: dict[Path, _Pulse] = {}

    def read(self) -> Board:
        """The board now. Never fails for what it finds in the folder."""
        planned = self._plan()
        results = {
            entry["name"]: self._once(self._step(entry["name"], "result.json"), read_object) for entry in planned
        }
        finished = {name for name, result in results.items() if result}
        rows = []
        for entry in planned:
            result = results[entry["name"]]
            rows.append(_finished_row(entry, result) if result else self._row(entry, finished))
        return Board(self.folder, tuple(rows))

    def _plan(self) -> list[dict[str, Any]]:
        entries = self._once(self.folder / "plan.json", read_json)
        if isinstance(entries, list):
            return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        return [{"name": name} for name in self._begun()]  # a run of before there were plans

    def _begun(self) -> list[str]:
        steps = self.folder / "steps"
        try:
            files = [path for name in ("result.json", "metrics.jsonl") for path in steps.rglob(name)]
        except OSError:  # a folder vanished
            return []
        names = {path.parent.relative_to(steps).as_posix() for path in files}
        return sorted(names, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", name))])

    def _step(self, name: str, file: str) -> Path:
        return self.folder / "steps" / name / file

    def _row(self, entry: Mapping[str, Any], finished: set[str]) -> Row:
        name, needs = entry["name"], _needs(entry)
        tail = self._once(self._step(name, "metrics.jsonl"), read_tail) or Tail()
        failure = self._once(self._step(name, "failure.json"), read_object)
        lease, silence = self._lease(name)
        state, remark = (READY if finished.issuperset(needs) else WAITING), accuracies(tail.evaluation)
        if failure:
            state, remark = FAILED, "".join(str(failure.get("error", "")).splitlines()[:1])
        elif lease.get("state") == "held":
            interval = number(lease.get("interval"))
            alive = silence < (_SILENT_INTERVALS * interval if interval else _LONG_SILENCE)
            state, remark = (RUNNING, remark) if alive else (STALE, f"no sign of life for {silence:,.0f} s")
        last, done, total = tail.training, tail.done, count(entry.get("training_steps"))
        total = None if total is None else max(total, done)  # a budget may give a step more than was planned
        recent = number(last.get("recent_images_per_second", last.get("images_per_second")))
        return Row(
            name,
            str(entry.get("phase", "")),
            needs,
            state,
            done,
            total,
            loss=number(last.get("loss")),
            images_per_second=recent if state == RUNNING else None,
            pace=tail.pace,
            seconds_left=None if tail.pace is None or total is None else tail.pace * (total - done),
            host=str((failure or lease).get("host", "")),
            remark=remark,
        )

    def _lease(self, name: str) -> tuple[dict[str, Any], float]:
        """The lease with the highest number, and for how many seconds it has been silent."""
        folder = self._step(name, "lease")
        try:
            found = [file.removesuffix(".json") for file in os.listdir(folder) if file.endswith(".json")]
        except OSError:
            return {}, 0.0
        # The highest may have vanished since, or be of a moment ago.
        for highest in sorted((int(stem) for stem in found if stem.isdecimal()), reverse=True):
            path = folder / f"{highest}.json"
            lease, written = self._once(path, read_object), signature(path)
            if lease and written:
                return lease, self._silence(path, lease.get("heartbeat"), written[1] / 1e9)
        return {}, 0.0

    def _silence(self, path: Path, heartbeat: Any, written: float) -> float:
        now, pulse = self._clock(), self._pulses.get(path)
        if pulse is None:
            pulse = self._pulses[path] = _Pulse(heartbeat, now, max(0.0, self._wall() - written))
        elif pulse.heartbeat != heartbeat:
            pulse = self._pulses[path] = _Pulse(heartbeat, now, 0.0)
        return pulse.age + now - pulse.seen

    def _once(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """What ``read`` makes of a file, from the last look where the file is still the same."""
        written = signature(path)
        if written is None:
            self._known.pop(path, None)
            return None
        known = self._known.get(path)
        if known is not None and known[0] == written:
            return known[1]
        value = read(path)
        if value:  # else it is looked at again, complete by then
            self._known[path] = (written, value)
        return value


def _finished_row(entry: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    steps, seconds = count(result.get("steps")) or 0, number(result.get("seconds"))
    return Row(
        entry["name"],
        str(entry.get("phase", result.get("phase", ""))),
        _needs(entry),
        FINISHED,
        steps,
        steps,
        pace=seconds / steps if seconds and steps else None,
        seconds_left=0.0,
        remark=accuracies(result.get("metrics")),
    )


def _needs(entry: Mapping[str, Any]) -> tuple[str, ...]:
    needs = entry.get("needs")
    return tuple(str(need) for need in needs) if isinstance(needs, list) else ()
