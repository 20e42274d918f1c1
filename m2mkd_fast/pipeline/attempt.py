"""One attempt at a step by this process: take its lease, do it, say how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.lease import LeaseLost, take
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.steps import run_step
from m2mkd_fast.pipeline.stopping import Stopped
from m2mkd_fast.pipeline.workbench import Workbench


@dataclass(frozen=True)
class Report:
    """How an attempt at a step ended.

    Attributes:
        step: its name.
        kind: "finished"; "failed", for good; "died", its process ended without an answer; "stopped" on request, and
            saved; "elsewhere", another process has its lease.
        message: what is to be said about it.
        error: of a step that failed or was stopped.
    """

    step: str
    kind: Literal["finished", "failed", "died", "stopped", "elsewhere"]
    message: str = ""
    error: M2MKDError | None = None


def attempt(bench: Workbench, step: Step, progress: Progress, after: int) -> Report:
    """Do a step whose lease ``after`` was found free, in this process."""
    try:
        lease = take(bench.step_folder(step.name) / "lease", after)
        if lease is None:
            return Report(step.name, "elsewhere")
        with lease:
            run_step(bench, step, progress, lease)
    except Stopped as stop:
        return Report(step.name, "stopped", "its process was asked to stop, and saved", stop)
    except LeaseLost as lost:
        return Report(step.name, "elsewhere", str(lost))
    except M2MKDError as error:
        return Report(step.name, "failed", error=error)
    return Report(step.name, "finished")
