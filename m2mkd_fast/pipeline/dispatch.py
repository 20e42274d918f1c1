"""Does a plan's steps in an order that their needs allow, side by side with other launchers on the same folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.attempt import Report
from m2mkd_fast.pipeline.files import Failure
from m2mkd_fast.pipeline.lease import LeaseObserver
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.steps import check_hybrids, pieces, tidy
from m2mkd_fast.pipeline.stopping import Stopped, stop_requested
from m2mkd_fast.pipeline.workbench import Workbench

_WAIT = 0.2  # seconds until a request to stop is noticed
_LOOK = 1.0  # seconds between two looks at what other launchers have done


class Launcher(Protocol):
    """Does steps somewhere. As a context manager it has what it needs for that, and nothing of it afterwards."""

    def room(self) -> int:
        """How many more steps may be begun now."""
        ...

    def running(self) -> Sequence[str]:
        """Steps that were begun here and about which no report has come yet."""
        ...

    def begin(self, steps: Sequence[tuple[Step, int]]) -> None:
        """Begin steps, each with the number of the lease after which its own is to come."""
        ...

    def reports(self, seconds: float) -> Sequence[Report]:
        """How steps ended; waits at most so long for the first."""
        ...

    def stop(self) -> None:
        """Let what runs here save and stop; reports say when it has. A cluster's jobs go on by themselves."""
        ...


def dispatch(bench: Workbench, steps: Sequence[Step], launcher: Launcher, display: Progress, retries: int) -> None:
    """Do all steps that are not done yet, or wait for those that other launchers are doing.

    Args:
        bench: the run's tools.
        steps: in the plan's order; all that they need is among them.
        launcher: does them.
        display: told what happens.
        retries: how often a step whose process died is begun again.

    Raises:
        M2MKDError: a step failed for good, or its process died too often. What runs elsewhere goes on.
        Stopped: on request; what was running here is saved.
    """
    _Dispatch(bench, steps, launcher, display, retries).run()


class _Dispatch:
    def __init__(
        self, bench: Workbench, steps: Sequence[Step], launcher: Launcher, display: Progress, retries: int
    ) -> None:
        self.bench, self.steps, self.launcher, self.display, self.retries = bench, steps, launcher, display, retries
        self.done: set[str] = set()
        self.deaths: dict[str, int] = {}
        self.failures = {step.name: Failure(bench.step_folder(step.name)) for step in steps}
        self.leases = {step.name: LeaseObserver(bench.step_folder(step.name) / "lease") for step in steps}
        self.told: set[tuple[str, str]] = set()

    def run(self) -> None:
        self._look()
        self._tidy()
        if self.done:
            self.display.message(f"{len(self.done)} of {len(self.steps)} steps were done before")
        looked = time.monotonic()
        while len(self.done) < len(self.steps):
            if stop_requested():
                self._stop()
            free = self._free()
            if free:
                self.launcher.begin(free)
            reports = self.launcher.reports(_WAIT)
            for report in reports:
                self._take_in(report)
            if reports or time.monotonic() - looked >= _LOOK:
                self._look()
                looked = time.monotonic()

    def _look(self) -> None:
        """Find the results that are there, whoever made them."""
        for step in self.steps:
            if step.name in self.done or step.name in self.launcher.running():
                continue
            result = self.bench.result(step.name)
            if result is not None:
                self.done.add(step.name)
                if step.phase == "hybrids":
                    check_hybrids(result, self.bench.config.meta.max_hybrid_drop)

    def _tidy(self) -> None:
        """A process that was killed after its result was written has left its checkpoints behind, or half a lease."""
        for step in self.steps:
            folder = self.bench.step_folder(step.name)
            left = pieces(folder) or (step.phase != "round" and (folder / "checkpoints").exists())
            left = left or any((folder / "lease").glob(".*.partial"))  # goes when the lease is taken
            if step.name in self.done and left and (lease := self.leases[step.name].acquire()) is not None:
                with lease:
                    tidy(self.bench, step)

    def _free(self) -> list[tuple[Step, int]]:
        """Steps that can be begun here: their needs are done, nobody works on them, and there is room."""
        free: list[tuple[Step, int]] = []
        room, running = self.launcher.room(), set(self.launcher.running())
        for step in self.steps:
            if len(free) == room:
                break
            if step.name in self.done | running or not self.done.issuperset(step.needs):
                continue
            observer = self.leases[step.name]
            holder = observer.holder()
            if holder is None and self.bench.result(step.name) is None:
                free.append((step, observer.number))
            elif holder is not None and (step.name, holder.owner) not in self.told:
                self.told.add((step.name, holder.owner))
                self.display.message(f"{step.name}: runs elsewhere ({holder.host}, process {holder.pid}); waiting")
        return free

    def _take_in(self, report: Report) -> None:
        if report.kind == "failed":
            raise M2MKDError(f"step {report.step}: {report.error}") from report.error
        if report.kind == "stopped":
            raise Stopped(str(report.error)) from report.error
        if report.kind == "elsewhere" and report.message:
            self.display.message(f"{report.step}: {report.message}")
        if report.kind == "died":
            self._again(report)

    def _again(self, report: Report) -> None:
        deaths = self.deaths[report.step] = self.deaths.get(report.step, 0) + 1
        failure = self.failures[report.step]
        if failure.read() is None:  # else the process could still say itself what was wrong
            failure.record(report.message, False, self.display.message)
        if deaths > self.retries:
            raise M2MKDError(
                f"step {report.step}: {report.message}; that was attempt {deaths}. Start the same command again, it "
                "goes on from the last checkpoint, with fewer jobs if memory is short"
            )
        self.display.message(
            f"{report.step}: {report.message}; goes on from its last checkpoint (retry {deaths} of {self.retries})"
        )

    def _stop(self) -> None:
        """Wait until what runs here is saved."""
        self.launcher.stop()
        while self.launcher.running():
            for report in self.launcher.reports(_WAIT):
                if report.kind == "failed":
                    self._take_in(report)
        self._look()
        raise Stopped(f"{len(self.done)} of {len(self.steps)} steps are done")
