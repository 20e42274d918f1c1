"""Run a configuration: check it, plan it, do its steps side by side, and go on where an earlier start was stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import RunConfig, make_config
from m2mkd_fast.pipeline.environment import environment
from m2mkd_fast.pipeline.files import exclusive, read_json, write_json
from m2mkd_fast.pipeline.plan import Step, closure, plan
from m2mkd_fast.pipeline.preflight import preflight
from m2mkd_fast.pipeline.progress import Progress, ProgressDisplay, QueueProgress
from m2mkd_fast.pipeline.steps import check_hybrids, run_step
from m2mkd_fast.pipeline.workbench import Workbench

# Keys that may differ between two starts of one run: they say where it computes, not what.
_MAY_CHANGE = ("output", "device", "threads", "data.num_workers")


def run(
    config: RunConfig,
    *,
    jobs: int = 1,
    only: Callable[[Step], bool] | None = None,
    command: str | None = None,
) -> Path:
    """Do all steps of a configuration that are not done yet; return the run folder.

    Args:
        config: what to run; see :func:`m2mkd_fast.pipeline.config.load_config`.
        jobs: steps at a time. Each beyond one is a process of its own.
        only: which steps are wanted; what they need is done as well. All by default.
        command: the command line to write down in the run folder.

    Raises:
        M2MKDError: something does not fit (found before any training), the folder belongs to another configuration or
            another process, or a step failed. What the folder holds stays as it is, and the next start goes on from it.
    """
    if jobs < 1:
        raise M2MKDError(f"jobs must be at least 1, got {jobs}")
    folder = config.folder
    threads = config.threads or max(1, (os.cpu_count() or 1) // jobs)
    with exclusive(folder):
        bench = Workbench(config, folder)
        _check_same_configuration(config, folder)
        with _threads(threads):
            steps = plan(config, preflight(bench))
            wanted = closure(steps, _chosen(steps, only))
            _check_same_data(bench)
            _check_provenance(bench, steps)
            _open_run_folder(bench, command)
            with ProgressDisplay() as display:
                alone = jobs == 1
                workers = nullcontext(_InProcess(bench, display)) if alone else _Workers(config, jobs, threads, display)
                with workers as runner:
                    _schedule(bench, wanted, runner, jobs, display)
    return folder


def _chosen(steps: list[Step], only: Callable[[Step], bool] | None) -> list[Step]:
    chosen = [step for step in steps if only is None or only(step)]
    if not chosen:
        raise M2MKDError(
            f"none of this configuration's steps was asked for; it has {', '.join(step.name for step in steps)} "
            "(arms=[...] and the number of modules decide which)"
        )
    return chosen


def _schedule(bench: Workbench, steps: list[Step], runner: Any, jobs: int, display: ProgressDisplay) -> None:
    done = {step.name for step in steps if bench.result(step.name) is not None}
    if done:
        display.message(f"{len(done)} of {len(steps)} steps were done before")
    if "hybrids" in done:
        check_hybrids(bench.result("hybrids"), bench.config.meta.max_hybrid_drop)
    running: dict[Future, Step] = {}
    while len(done) < len(steps):
        started = {step.name for step in running.values()}
        for step in steps:
            ready = step.name not in done | started and all(need in done for need in step.needs)
            if ready and len(running) < jobs:
                running[runner.submit(step)] = step
                started.add(step.name)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            step = running.pop(future)
            result = _outcome(future, step)
            done.add(step.name)
            if step.phase == "hybrids":
                check_hybrids(result, bench.config.meta.max_hybrid_drop)


def _outcome(future: Future, step: Step) -> dict[str, Any]:
    try:
        return future.result()
    except M2MKDError as error:
        raise M2MKDError(f"step {step.name}: {error}") from error
    except BrokenProcessPool as error:
        raise M2MKDError(
            f"a worker process died during step {step.name} (killed, or out of memory?); start the same command again, "
            "it goes on from the last checkpoint, with fewer jobs if memory is short"
        ) from error


class _InProcess:
    """One step after another in this process."""

    def __init__(self, bench: Workbench, display: ProgressDisplay) -> None:
        self.bench, self.display = bench, display

    def submit(self, step: Step) -> Future:
        future: Future = Future()
        try:
            future.set_result(run_step(self.bench, step, self.display))
        except M2MKDError as error:
            future.set_exception(error)
        return future


class _Workers:
    """Steps in processes that live as long as the run, and no longer."""

    def __init__(self, config: RunConfig, jobs: int, threads: int, display: ProgressDisplay) -> None:
        # spawn: a forked child of a process that has used OpenMP or CUDA may hang.
        context = multiprocessing.get_context("spawn")
        events = context.Queue()
        arguments = (config.to_dict(), threads, events, os.getpid())
        self.pool = ProcessPoolExecutor(jobs, context, _start_worker, arguments)
        self.listening = display.listen(events)

    def __enter__(self) -> _Workers:
        self.listening.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        self.listening.__exit__(None, None, None)

    def submit(self, step: Step) -> Future:
        return self.pool.submit(_work, step)


_worker: tuple[Workbench, Progress] | None = None


def _start_worker(config: dict[str, Any], threads: int, events: Any, parent: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    config = make_config([config])
    _worker = Workbench(config, config.folder), QueueProgress(events)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed must not go on writing into a folder that a new start takes over."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(step: Step) -> dict[str, Any]:
    bench, progress = _worker
    return run_step(bench, step, progress)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_same_configuration(config: RunConfig, folder: Path) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        return
    here, there = (_flat(value) for value in (config.to_dict(), OmegaConf.to_container(OmegaConf.load(path))))
    differing = [
        f"{key} (there {there.get(key)!r}, now {here.get(key)!r})"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in _MAY_CHANGE
    ]
    if differing:
        raise M2MKDError(
            f"{folder} was made with another configuration: {'; '.join(differing)}. Give this one a folder of its own "
            f"with output=FOLDER, or delete {folder}"
        )


def _check_same_data(bench: Workbench) -> None:
    path = bench.folder / "run.json"
    if path.exists() and read_json(path)["data"]["content_hash"] != bench.dataset.describe()["content_hash"]:
        raise M2MKDError(
            f"the images of {bench.config.data.spec!r} are not those that {bench.folder} was begun with; bring them "
            "back, or give this run a folder of its own with output=FOLDER"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.")
    return flat


def _check_provenance(bench: Workbench, steps: list[Step]) -> None:
    """Every finished step must have been made from what its folder's neighbours hold now."""
    for step in steps:
        result = bench.result(step.name)
        for need, digest in (result or {}).get("made_from", {}).items():
            source = bench.result(need)
            if source is None or source["weights_hash"] != digest:
                raise M2MKDError(
                    f"step {step.name} was made from another {need} than the one that is there now; delete "
                    f"{bench.step_folder(step.name)} to make it again, or put the old {need} back"
                )


def _open_run_folder(bench: Workbench, command: str | None) -> None:
    folder = bench.folder
    if (folder / "config.yaml").exists():
        return
    typed = command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_json(folder / "run.json", environment() | {"command": typed, "data": bench.dataset.describe()})
    write_text_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(bench.config.to_dict())))
