"""Commands of ours that meet a fault at a chosen point, each a fork of one process that has imported everything.

A fault strikes at one of the file operations by which a run changes its folder: between two of them lies every state in
which a crash can leave the folder. The operations are seen by an audit hook of Python in the forked process.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FAULTS = ("kill", "kill later", "stop", "full disk", "jumping clock", "dying loader worker")


@dataclass(frozen=True)
class Fault:
    """What happens, and where: at file operation ``at`` (0 is the first) of those that ``pattern`` is found in.

    An operation is written as its audit event and the path in the run folder: ``os.rename steps/teacher/result.json``.
    ``kill``: SIGKILL. ``kill later``: SIGKILL so many ``seconds`` afterwards. ``stop``: SIGTERM. ``full disk``: from
    there on no file can be written. ``jumping clock``: from there on the wall clock goes to and fro by hours. ``dying
    loader worker``: from there on the worker that makes batch 1 dies, once.
    """

    kind: str
    pattern: str = ""
    at: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.kind in FAULTS, self.kind


@dataclass
class Ended:
    """How a command ended: exit code, or minus the signal; what it said; the files it changed, in order, with how."""

    code: int
    said: str
    operations: list[str] = field(default_factory=list)

    def matching(self, pattern: str) -> list[str]:
        return [operation for operation in self.operations if re.search(pattern, operation)]


class Harness:
    """Starts commands; a context that ends its process.

    The process is a fresh one, as a fork is only safe while there is a single thread: every fork checks that.
    """

    def __enter__(self) -> Harness:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(self, folder: Path, arguments: Sequence[str], fault: Fault | None = None) -> Ended:
        """``m2mkd`` with some arguments, to its end; ``folder`` is the run folder that faults are counted in."""
        return self.run_together(folder, [(arguments, fault)])[0]

    def run_together(self, folder: Path, commands: Sequence[tuple[Sequence[str], Fault | None]]) -> list[Ended]:
        """Several at once, until all have ended."""
        request = [[str(folder), list(arguments), fault and asdict(fault)] for arguments, fault in commands]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the harness ended with {self._process.wait()}"
        return [Ended(**ended) for ended in json.loads(answer)]


def _serve() -> None:
    sys.modules["pandas"] = None  # scikit-learn does without it; its pyarrow would start a thread
    # Here, so that no fork has to.

    import m2mkd_fast.pipeline.run
    import m2mkd_fast.report  # noqa: F401

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        started = [_start(*command) for command in json.loads(line)]
        print(json.dumps([_wait(*child) for child in started]), file=answers, flush=True)


def _start(folder: str, arguments: list[str], fault: dict[str, Any] | None) -> tuple[int, int, int]:
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [""]
    assert len(threads) == 1, f"{len(threads)} threads: a fork of this process may hang"
    said, told = os.pipe()
    seen, noted = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        os.close(noted)
        return child, said, seen
    code = 70
    try:
        os.close(said)
        os.close(seen)
        os.set_inheritable(noted, False)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stdout = sys.stderr = os.fdopen(told, "w", buffering=1)
        _watch(folder, noted, None if fault is None else Fault(**fault))
        from m2mkd_fast import cli

        code = cli.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: int, said: int, seen: int) -> dict[str, Any]:
    # Both to their ends: its own worker processes hold them as well, and are to be gone.
    texts = {said: b"", seen: b""}
    reading = set(texts)
    while reading:
        for pipe in select.select(reading, [], [])[0]:
            part = os.read(pipe, 1 << 16)
            texts[pipe] += part
            if not part:
                reading.remove(pipe)
                os.close(pipe)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": texts[said].decode(errors="replace"),
        "operations": texts[seen].decode().splitlines(),
    }


def _watch(folder: str, noted: int, fault: Fault | None) -> None:
    count, process = 0, os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        path = _changed(event, arguments)
        if path is None or os.getpid() != process or not path.startswith(folder + "/"):
            return
        operation = f"{event} {path.removeprefix(folder + '/')}"
        os.write(noted, f"{operation}\n".encode())
        if fault is None or not re.search(fault.pattern, operation):
            return
        count += 1
        if count == fault.at + 1:
            _strike(fault)

    sys.addaudithook(hook)


def _changed(event: str, arguments: tuple) -> str | None:
    """The path that an audited operation is about to change."""
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return os.fspath(path) if writes and isinstance(path, str | os.PathLike) else None
    if event in ("os.rename", "os.link"):
        return os.fspath(arguments[1])
    return os.fspath(arguments[0]) if event in ("os.remove", "os.mkdir", "os.rmdir") else None


def _strike(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "kill later":
        victim = os.getpid()
        if os.fork() == 0:
            time.sleep(fault.seconds)
            if os.getppid() == victim:
                os.kill(victim, signal.SIGKILL)
            os._exit(0)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    elif fault.kind == "jumping clock":
        now, jumps = time.time, random.Random(0)
        time.time = lambda: now() + jumps.uniform(-1e4, 1e4)
    elif fault.kind == "dying loader worker":
        _let_loader_workers_die()


def _let_loader_workers_die() -> None:
    from torch.utils.data import get_worker_info

    from m2mkd_fast.data.batches import TrainBatchSource

    make, alive = TrainBatchSource.__getitem__, os.pipe()
    os.write(alive[1], b".")

    def lethal(self: TrainBatchSource, t: int) -> Any:
        if t == 1 and get_worker_info() is not None:
            os.set_blocking(alive[0], False)
            try:
                os.read(alive[0], 1)
            except BlockingIOError:
                return make(self, t)
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, t)

    TrainBatchSource.__getitem__ = lethal


if __name__ == "__main__":
    _serve()
