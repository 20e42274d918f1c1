"""Each step as a job of a cluster, submitted through submitit; steps that are ready together are one job array."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.attempt import Report
from m2mkd_fast.pipeline.config import RunConfig
from m2mkd_fast.pipeline.files import read_json, write_json
from m2mkd_fast.pipeline.launch.torchrun import command, ended, failed_attempts
from m2mkd_fast.pipeline.opening import own_settings
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import ProgressDisplay
from m2mkd_fast.pipeline.stopping import Stopped, handle_stop_signals, stop_requested

_MINUTES = 60  # of a job, where nothing is said; a job that needs longer saves and is queued again
_TIMEOUTS = 1000  # how often that may happen
_JOBS = 256  # steps at a time, where nothing is said


class StepJob:
    """What a job does: ``m2mkd step RUN NAME``, in this process or, through torchrun, in several on each node.

    Before the time limit or a preemption it saves, then it hands over to submitit, which queues it again.
    """

    def __init__(self, folder: Path, name: str, processes: int, nodes: int, settings: Sequence[str]) -> None:
        self.folder, self.name, self.processes, self.nodes = folder, name, processes, nodes
        self.settings = list(settings)

    def __call__(self) -> str:
        """How it ended: "finished", or why not."""
        import submitit

        ahead = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        queue_again = False

        def remember(number: int, frame: FrameType | None) -> None:
            nonlocal queue_again
            queue_again = True
            save(number, frame)

        with handle_stop_signals():
            save = signal.getsignal(ahead)
            signal.signal(ahead, remember)
            try:
                self._work()
                return "finished"
            except Stopped as stop:
                outcome = f"stopped: {stop}"
            except M2MKDError as error:
                outcome = f"failed: {error}"
        if queue_again and outcome.startswith("stopped"):
            signal.raise_signal(ahead)  # submitit's own handler again; it does not come back
        return outcome

    def checkpoint(self) -> Any:
        """The job that is queued again: the same, since the step goes on from its last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _work(self) -> None:
        from m2mkd_fast.pipeline.one_step import run_one_step

        if self.processes * self.nodes == 1:
            with ProgressDisplay() as progress:
                run_one_step(self.folder, self.name, self.settings, progress)
            return
        process = subprocess.Popen(
            command(self.folder, self.name, self.settings, *self._rendezvous()), start_new_session=True
        )
        asked = False
        while process.poll() is None:
            if stop_requested() and not asked:
                process.terminate()
                asked = True
            time.sleep(0.2)
        if process.returncode and asked:
            raise Stopped(f"step {self.name} was stopped")
        if process.returncode:
            raise M2MKDError(f"torchrun ended with exit code {process.returncode}; its messages are in the job's log")

    def _rendezvous(self) -> list[str]:
        options = ["--nproc-per-node", str(self.processes)]
        if self.nodes == 1:
            return [*options, "--standalone"]
        import submitit

        job = submitit.JobEnvironment()
        # Every job has a port of its own: two may share a first host.
        port = 29400 + int("".join(filter(str.isdigit, job.job_id))) % 10000
        options += ["--nnodes", str(self.nodes), "--node-rank", str(job.node)]
        return [*options, "--master-addr", job.hostnames[0], "--master-port", str(port)]


class Slurm:
    """The launcher ``slurm``.

    Jobs outlive it: another start finds them in ``RUN/slurm/jobs.json`` and waits for them.

    Args:
        config: the run's; its folder has to lie on a disk that all nodes share.
        jobs: steps at a time; None for all that are ready.
        processes: of a step, on each node.
        nodes: of a step.
        parameters: submitit's, by their names there or in sbatch, and ``cluster`` ("slurm", or "local" for processes of
            this machine).
        display: told which job does which step.

    Raises:
        M2MKDError: submitit is not installed, there is no such cluster, or a parameter is unknown.
    """

    def __init__(
        self,
        config: RunConfig,
        jobs: int | None,
        processes: int,
        nodes: int,
        parameters: Mapping[str, Any],
        display: ProgressDisplay,
    ) -> None:
        self._folder, self._jobs = config.folder.absolute(), jobs or _JOBS
        self._processes, self._nodes, self._display = processes, nodes, display
        self._config = config
        self._executor = _executor(self._folder / "slurm", self._jobs, nodes, dict(parameters))
        self._record = self._folder / "slurm" / "jobs.json"
        self._running: dict[str, tuple[Any, int]] = {}
        self._left: dict[str, tuple[Any, int]] = {}

    def __enter__(self) -> Slurm:
        import submitit

        if self._record.exists():
            for name, (job_id, tasks, attempts) in read_json(self._record).items():
                kind = submitit.SlurmJob if self._executor.cluster == "slurm" else submitit.LocalJob
                job = kind(self._folder / "slurm", job_id, tasks=tuple(range(tasks)))
                if not job.done():
                    self._running[name] = (job, attempts)
                    self._display.message(f"{name}: job {job_id} of an earlier start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        left = self._left | self._running
        if left:
            listed = ", ".join(f"{job.job_id} ({name})" for name, (job, _) in left.items())
            self._display.message(f"jobs that go on: {listed}; the same command waits for them, scancel ends them")

    def room(self) -> int:
        return self._jobs - len(self._running)

    def running(self) -> Sequence[str]:
        return list(self._running)

    def begin(self, steps: Sequence[tuple[Step, int]]) -> None:
        names = [step.name for step, _ in steps]
        settings = own_settings(self._config, self._folder)
        attempts = [failed_attempts(self._folder, name) for name in names]
        try:
            with self._executor.batch():
                jobs = [
                    self._executor.submit(StepJob(self._folder, name, self._processes, self._nodes, settings))
                    for name in names
                ]
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise M2MKDError(f"the cluster took no job for {', '.join(names)}: {error}") from error
        for name, job, failed in zip(names, jobs, attempts, strict=True):
            self._running[name] = (job, failed)
            self._display.message(f"{name}: job {job.job_id}")
        self._write()

    def reports(self, seconds: float) -> Sequence[Report]:
        deadline = time.monotonic() + seconds
        while True:
            over = [name for name, (job, _) in self._running.items() if self._is_over(name, job)]
            if over or time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        found = []
        for name in over:
            job, attempts = self._running.pop(name)
            found.append(ended(self._folder, name, attempts, partial(_cause, job)))
        if over:
            self._write()
        return found

    def stop(self) -> None:
        """Jobs go on; who starts the same command again waits for them."""
        self._left, self._running = self._running, {}

    def _is_over(self, name: str, job: Any) -> bool:
        return (self._folder / "steps" / name / "result.json").exists() or job.done()

    def _write(self) -> None:
        rows = {name: (job.job_id, job.num_tasks, attempts) for name, (job, attempts) in self._running.items()}
        write_json(self._record, rows)


def _cause(job: Any) -> str:
    """Why a job has ended without a result."""
    first = job.task(0)
    said = f"job {job.job_id} ended ({job.state})"
    if first.paths.result_pickle.exists():
        try:
            said += f": {first.result()}"
        except Exception as error:  # whatever the job raised, as submitit reports it
            said += f": {error}"
    return f"{said}; its log is {first.paths.stderr}"


def _executor(folder: Path, jobs: int, nodes: int, parameters: dict[str, Any]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise M2MKDError('launcher slurm needs submitit: pip install "m2mkd-fast[cluster]"') from error
    cluster = parameters.pop("cluster", "slurm")
    shared = submitit.AutoExecutor._typed_parameters()
    minutes = parameters.pop("time", parameters.pop("timeout_min", _MINUTES))
    if not isinstance(minutes, int) or minutes < 1:
        raise M2MKDError(f"slurm time={minutes!r}: minutes as a whole number, for example time=60")
    settings = {"name": folder.parent.name, "timeout_min": minutes, "nodes": nodes, "tasks_per_node": 1}
    settings["slurm_array_parallelism"] = jobs
    for name, value in parameters.items():
        prefixed = name.startswith(("slurm_", "local_"))
        settings[name if name in shared or prefixed else f"slurm_{name}"] = value
    try:
        executor = submitit.AutoExecutor(
            folder, cluster, slurm_max_num_timeout=_TIMEOUTS, local_max_num_timeout=_TIMEOUTS
        )
        executor.update_parameters(**settings)
    except (RuntimeError, ValueError, NameError, AssertionError) as error:
        raise M2MKDError(f"launcher slurm (cluster={cluster}): {error}") from error
    return executor
