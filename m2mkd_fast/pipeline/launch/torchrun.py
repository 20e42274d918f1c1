"""Each step as a process group of this machine, started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.attempt import Report
from m2mkd_fast.pipeline.config import RunConfig
from m2mkd_fast.pipeline.files import Failure
from m2mkd_fast.pipeline.opening import own_settings
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.stopping import Stopped

_PATIENCE = 60.0  # seconds for a group to save when the run ends with an error


def command(folder: Path, name: str, settings: Sequence[str], *torchrun: str) -> list[str]:
    """The command line that does a step in a process group.

    Args:
        folder: the run's.
        name: of the step.
        settings: ``key=value`` in which this start differs from the run folder's configuration.
        torchrun: options of torch.distributed.run.
    """
    step = ["-m", "m2mkd_fast", "step", str(folder), name, *settings]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, *step]


@dataclass
class _Group:
    step: str
    process: subprocess.Popen
    place: int
    attempts: int


class Torchrun:
    """The launcher ``torchrun``.

    Args:
        config: the run's.
        jobs: process groups at a time.
        processes: of a group.
        threads: CPU threads of each process.
        gpus: names of the visible GPUs; each group gets as many as it has processes, where there are enough.
    """

    def __init__(self, config: RunConfig, jobs: int, processes: int, threads: int, gpus: Sequence[str]) -> None:
        self._config = replace(config, threads=threads)
        self._folder, self._jobs, self._processes, self._gpus = config.folder, jobs, processes, gpus
        self._groups: list[_Group] = []
        self._stopping = False

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()
        deadline = time.monotonic() + _PATIENCE
        for group in self._groups:
            try:
                group.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(group.process.pid, signal.SIGKILL)
                group.process.wait()

    def room(self) -> int:
        return self._jobs - len(self._groups)

    def running(self) -> Sequence[str]:
        return [group.step for group in self._groups]

    def begin(self, steps: Sequence[tuple[Step, int]]) -> None:
        for step, _ in steps:
            taken = {group.place for group in self._groups}
            place = next(place for place in range(self._jobs) if place not in taken)
            environment = dict(os.environ)
            gpus = self._gpus[place * self._processes : (place + 1) * self._processes]
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            settings = own_settings(self._config, self._folder)
            options = ("--standalone", "--nproc-per-node", str(self._processes))
            words = command(self._folder, step.name, settings, *options)
            # A session of its own: an interrupt from the terminal comes to the launcher, which passes it on once.
            attempts = failed_attempts(self._folder, step.name)
            process = subprocess.Popen(words, env=environment, start_new_session=True)
            self._groups.append(_Group(step.name, process, place, attempts))

    def reports(self, seconds: float) -> Sequence[Report]:
        deadline = time.monotonic() + seconds
        while True:
            over = [group for group in self._groups if group.process.poll() is not None]
            if over or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        self._groups = [group for group in self._groups if group not in over]
        return [self._report(group) for group in over]

    def stop(self) -> None:
        self._stopping = True
        for group in self._groups:
            if group.process.poll() is None:
                group.process.send_signal(signal.SIGTERM)

    def _report(self, group: _Group) -> Report:
        cause = f"its process group ended with exit code {group.process.returncode}"
        report = ended(self._folder, group.step, group.attempts, lambda: cause)
        if report.kind == "died" and self._stopping:
            return Report(group.step, "stopped", error=Stopped(f"step {group.step} was stopped"))
        return report


def ended(folder: Path, name: str, attempts: int, cause: Callable[[], str]) -> Report:
    """How a step's processes ended, as its folder tells.

    Args:
        folder: the run's.
        name: of the step.
        attempts: how many had failed before these processes began.
        cause: says why they ended where the folder does not.
    """
    path = folder / "steps" / name
    if (path / "result.json").exists():
        return Report(name, "finished")
    failure = Failure(path).read()
    if failure is not None and failure["attempts"] > attempts and failure["final"]:
        return Report(name, "failed", error=M2MKDError(failure["error"]))
    return Report(name, "died", cause())


def failed_attempts(folder: Path, name: str) -> int:
    """How many attempts at a step have failed so far."""
    return (Failure(folder / "steps" / name).read() or {"attempts": 0})["attempts"]
