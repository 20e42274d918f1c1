"""One step of an opened run folder, by this process or this process group: what every launcher comes down to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.lease import Lease, LeaseObserver
from m2mkd_fast.pipeline.opening import opened, planned_step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.steps import check_hybrids, run_step
from m2mkd_fast.pipeline.stopping import Stopped, stop_requested
from m2mkd_fast.pipeline.workbench import Workbench

_POLL = 0.5  # seconds between two looks at a step that another process does


def run_one_step(folder: Path, name: str, overrides: Sequence[str], progress: Progress) -> None:
    """Do a step, or wait until another process has done it.

    In a process group (torchrun) every process calls this; the first holds the lease and writes.

    Args:
        folder: of a run that :func:`m2mkd_fast.pipeline.run.run` has opened.
        name: of the step.
        overrides: ``key=value`` for keys that may differ between two starts, for example ``device=cpu``.
        progress: told how far it is.

    Raises:
        M2MKDError: there is no such run or step, something that it needs is not finished, or it failed.
        Stopped: on request; it is saved.
    """
    config = opened(folder, list(overrides))
    step = planned_step(folder, name)
    bench = Workbench(config, folder)
    missing = [need for need in step.needs if bench.result(need) is None]
    if missing:
        raise M2MKDError(
            f"step {name} needs {', '.join(missing)} first; do that with m2mkd step {folder} {missing[0]}, or all with "
            "m2mkd run"
        )
    if "hybrids" in step.needs:
        check_hybrids(bench.result("hybrids"), config.meta.max_hybrid_drop)
    torch.set_num_threads(config.threads or _share_of_threads())
    group = bench.execution
    observer = LeaseObserver(bench.step_folder(name) / "lease")
    told = False
    while True:
        lease, verdict = None, "wait"
        if group.is_main:
            lease, verdict = _decide(bench, name, observer)
        verdict = group.broadcast(verdict)
        if verdict == "finished":
            return
        if verdict == "stop":
            raise Stopped(f"step {name} had not begun here")
        if verdict == "go":
            break
        if not told and group.is_main and (holder := observer.holder()) is not None:
            progress.message(f"{name}: runs elsewhere ({holder.host}, process {holder.pid}); waiting")
            told = True
        time.sleep(_POLL)
    with lease or nullcontext():
        run_step(bench, step, progress, lease)
        group.barrier()


def _decide(bench: Workbench, name: str, observer: LeaseObserver) -> tuple[Lease | None, str]:
    if bench.result(name) is not None:
        return None, "finished"
    if stop_requested():
        return None, "stop"
    lease = observer.acquire()
    return lease, "wait" if lease is None else "go"


def _share_of_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
