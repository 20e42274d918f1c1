"""Processes of this machine that do one step after another, as long as the run lives and no longer."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.attempt import Report, attempt
from m2mkd_fast.pipeline.config import RunConfig, make_config
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import ProgressDisplay, QueueProgress
from m2mkd_fast.pipeline.stopping import EXIT_REQUEUE, handle_stop_signals
from m2mkd_fast.pipeline.workbench import Workbench

_PATIENCE = 60.0  # seconds for a worker to save when the run ends with an error
_PREPARE = (None, 0)  # an order to make, while there is nothing to do, what most steps need
_STILLBORN = 3  # workers that may die before their first word; then something is wrong with all of them


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    step: str | None = None
    prepared: bool = False
    spoke: bool = False
    last_words: str = ""


class Workers:
    """The launcher of ``--jobs N``: N processes, each with its share of the CPU's threads and one GPU.

    Args:
        config: the run's.
        jobs: how many.
        threads: CPU threads of each.
        gpus: names of the visible GPUs as in CUDA_VISIBLE_DEVICES; worker k gets number k modulo their count.
        display: told what the workers tell.
    """

    def __init__(
        self, config: RunConfig, jobs: int, threads: int, gpus: Sequence[str], display: ProgressDisplay
    ) -> None:
        # A forked child of a process that has used OpenMP or CUDA may hang, so workers are never forked from this one.
        # Without GPUs they are forked from a process that has imported everything once and computed nothing: a worker
        # is there in a moment. To import may itself ask the CUDA driver something, which no child could do again.
        self._context = multiprocessing.get_context("spawn" if gpus else "forkserver")
        if not gpus:
            self._context.set_forkserver_preload([__name__])
        self._config, self._threads, self._gpus, self._display = config.to_dict(), threads, gpus, display
        self._jobs, self._workers = jobs, []
        self._ending, self._stillborn = False, 0

    def __enter__(self) -> Workers:
        self._workers = [self._start(number) for number in range(self._jobs)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()
        interrupted = kind is not None and not issubclass(kind, Exception)
        for worker in self._workers:
            if interrupted or (kind is not None and worker.step is None):
                worker.process.kill()
            else:
                self._say(worker, None)
        deadline = time.monotonic() + _PATIENCE
        while self._workers and time.monotonic() < deadline:
            self.reports(0.1)  # a full pipe would hold a worker up
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()

    def room(self) -> int:
        return self._jobs - len(self.running())

    def running(self) -> Sequence[str]:
        return [worker.step for worker in self._workers if worker.step is not None]

    def begin(self, steps: Sequence[tuple[Step, int]]) -> None:
        idle = (worker for worker in self._workers if worker.step is None)
        for (step, after), worker in zip(steps, idle, strict=False):
            worker.step = step.name
            self._say(worker, (step, after))
        for worker in idle:
            if not worker.prepared:
                self._say(worker, _PREPARE)
                worker.prepared = True

    def reports(self, seconds: float) -> Sequence[Report]:
        found: list[Report] = []
        ready = wait([worker.pipe for worker in self._workers], seconds)
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            try:
                while worker.pipe.poll():
                    self._hear(worker, worker.pipe.recv(), found)
            except (EOFError, OSError):
                self._bury(worker, found)
        return found

    def stop(self) -> None:
        self._ending = True
        for worker in self._workers:
            if worker.step is not None and worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGTERM)

    def _start(self, number: int) -> _Worker:
        here, there = self._context.Pipe()
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        arguments = (there, self._config, self._threads, environment)
        process = self._context.Process(target=_work, args=arguments, name=f"worker {number}")
        process.start()
        there.close()  # so that the end of the worker is the end of the pipe
        return _Worker(process, here)

    def _say(self, worker: _Worker, order: tuple[Step | None, int] | None) -> None:
        try:
            worker.pipe.send(order)
        except OSError:
            return  # it has died; reading from it says so

    def _hear(self, worker: _Worker, told: Any, found: list[Report]) -> None:
        worker.spoke = True
        if not isinstance(told, Report):
            self._display.event(told)
        elif told.kind == "died" or (told.kind == "stopped" and not self._ending):
            worker.last_words = told.message  # it ends now
        else:
            worker.step = None
            found.append(told)

    def _bury(self, worker: _Worker, found: list[Report]) -> None:
        """Report the death of a worker in the middle of a step, and put another one in its place."""
        worker.process.join()
        cause = worker.last_words or _cause(worker.process.exitcode)
        if worker.step is not None:
            found.append(Report(worker.step, "died", cause))
        number = self._workers.index(worker)
        if self._ending:
            del self._workers[number]
            return
        self._stillborn += not worker.spoke
        if self._stillborn > _STILLBORN:
            raise M2MKDError(
                f"{self._stillborn} worker processes ended before they began to work, the last because {cause}; what "
                "they wrote stands above. Try --jobs 1, which works in this process"
            )
        self._workers[number] = self._start(number)


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name} (out of memory?)"
    return f"its process ended with exit code {exit_code}"


class _PipeProgress:
    """What :class:`QueueProgress` puts events into."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def put(self, event: dict[str, Any]) -> None:
        self._pipe.send(event)


def _work(pipe: Connection, config: dict[str, Any], threads: int, environment: Mapping[str, str]) -> None:
    os.environ.clear()  # what this was forked from has an older one
    os.environ.update(environment)  # before CUDA starts
    handle_stop_signals()
    torch.set_num_threads(threads)
    orders: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    run = make_config([config])
    bench, progress = Workbench(run, run.folder), QueueProgress(_PipeProgress(pipe))
    while (order := orders.get()) is not None:
        step, after = order
        if step is None:
            bench.slots  # noqa: B018 (the teacher is cut now, without memory for its parameters)
            continue
        try:
            report = attempt(bench, step, progress, after)
        except KeyboardInterrupt:
            os._exit(130)
        except Exception:
            # Not an error that a user can mend: the state of the process is unknown, and another one tries again.
            pipe.send(Report(step.name, "died", f"its process ended with an error\n{traceback.format_exc()}"))
            raise
        pipe.send(report)
        if report.kind == "stopped":
            raise SystemExit(EXIT_REQUEUE)


def _listen(pipe: Connection, orders: queue.SimpleQueue) -> None:
    """Pass orders on; a worker whose launcher was killed ends at once, and a new start takes its step over."""
    while True:
        try:
            orders.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
