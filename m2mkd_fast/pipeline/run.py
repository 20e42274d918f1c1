"""Run a configuration: check it, plan it, do its steps side by side, and go on where an earlier start was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.config import RunConfig
from m2mkd_fast.pipeline.dispatch import Launcher, dispatch
from m2mkd_fast.pipeline.execution import cpu_threads
from m2mkd_fast.pipeline.launch.in_process import InProcess
from m2mkd_fast.pipeline.launch.torchrun import Torchrun
from m2mkd_fast.pipeline.opening import check_same_configuration, open_run_folder
from m2mkd_fast.pipeline.plan import Step, closure, plan
from m2mkd_fast.pipeline.preflight import preflight
from m2mkd_fast.pipeline.progress import ProgressDisplay
from m2mkd_fast.pipeline.trackers import check_trackers
from m2mkd_fast.pipeline.workbench import Workbench
from m2mkd_fast.pipeline.workers import Workers

LAUNCHERS = ("local", "slurm", "torchrun")


def run(
    config: RunConfig,
    *,
    jobs: int | None = None,
    launcher: str = "local",
    retries: int = 2,
    processes: int = 1,
    nodes: int = 1,
    slurm: Mapping[str, Any] | None = None,
    only: Callable[[Step], bool] | None = None,
    command: str | None = None,
) -> Path:
    """Do all steps of a configuration that are not done yet; return the run folder.

    Several calls, on one machine or several that share the folder, divide the steps among them.

    Args:
        config: what to run; see :func:`m2mkd_fast.pipeline.config.load_config`.
        jobs: steps at a time. By default one for each visible GPU (``local``) or group of GPUs (``torchrun``), one
            without GPUs, and all that are ready in a cluster.
        launcher: "local", processes of this machine; "torchrun", each step in a process group of this machine; "slurm",
            each step a job of a cluster.
        retries: how often a step whose process died is begun again.
        processes: of a step, on each node (``torchrun`` and ``slurm``).
        nodes: of a step (``slurm``).
        slurm: parameters for submitit, for example ``{"partition": "gpu", "gpus_per_node": 1}``.
        only: which steps are wanted; what they need is done as well. All by default.
        command: the command line to write down in the run folder.

    Raises:
        M2MKDError: something does not fit (found before any training), the folder belongs to another configuration,
            or a step failed. What the folder holds stays as it is, and the next start goes on from it.
        Stopped: on request; what was running is saved.
    """
    _check(launcher, jobs, retries, processes, nodes, slurm)
    folder, gpus = config.folder, visible_gpus(config)
    if jobs is None and launcher != "slurm":
        jobs = max(1, len(gpus) // processes)
    threads = config.threads or max(1, (os.cpu_count() or 1) // ((jobs or 1) * processes))
    check_same_configuration(config, folder)
    check_trackers(config.trackers)
    bench = Workbench(config, folder)
    with ProgressDisplay(folder=folder) as display, cpu_threads(threads):
        if launcher == "slurm":
            from m2mkd_fast.pipeline.launch.slurm import Slurm

            made: AbstractContextManager[Launcher] = Slurm(config, jobs, processes, nodes, slurm or {}, display)
        elif launcher == "torchrun":
            made = Torchrun(config, jobs, processes, threads, gpus)
        elif jobs == 1:
            made = InProcess(bench, display)
        else:
            made = Workers(config, jobs, threads, gpus, display)
        with made as runner:  # workers start up while this process checks
            slots = preflight(bench)
            steps = plan(config, slots)
            wanted = closure(steps, _chosen(steps, only))
            open_run_folder(bench, steps, slots, command)
            dispatch(bench, wanted, runner, display, retries)
    return folder


def visible_gpus(config: RunConfig) -> list[str]:
    """The GPUs that a run may use, as CUDA_VISIBLE_DEVICES names them; none for ``device=cpu``."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def _check(
    launcher: str, jobs: int | None, retries: int, processes: int, nodes: int, slurm: Mapping[str, Any] | None
) -> None:
    if launcher not in LAUNCHERS:
        raise UnknownNameError("launcher", launcher, LAUNCHERS)
    for name, value, least in (("jobs", jobs, 1), ("processes", processes, 1), ("nodes", nodes, 1)):
        if value is not None and value < least:
            raise M2MKDError(f"{name} must be at least {least}, got {value}")
    if retries < 0:
        raise M2MKDError(f"retries must not be negative, got {retries}")
    if launcher == "local" and processes > 1:
        raise M2MKDError(f"processes={processes}: a step in several processes needs launcher torchrun or slurm")
    if launcher != "slurm" and nodes > 1:
        raise M2MKDError(
            f"nodes={nodes}: only launcher slurm starts a step on several machines. Without it, start `torchrun "
            "--nnodes ... -m m2mkd_fast step RUN NAME` on each of them"
        )
    if launcher != "slurm" and slurm:
        raise M2MKDError(f"parameters for slurm ({', '.join(slurm)}) need launcher slurm, not {launcher}")


def _chosen(steps: list[Step], only: Callable[[Step], bool] | None) -> list[Step]:
    chosen = [step for step in steps if only is None or only(step)]
    if not chosen:
        raise M2MKDError(
            f"none of this configuration's steps was asked for; it has {', '.join(step.name for step in steps)} "
            "(arms=[...] and the number of modules decide which)"
        )
    return chosen
