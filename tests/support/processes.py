"""Checks that need several processes: started once, with a process group between them, reported one by one."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Within a process group an operation that waits longer fails, instead of hanging.
PATIENCE = timedelta(seconds=60)


def run_checks(file: str, names: Sequence[str], processes: int, folder: Path, timeout: float) -> dict[str, str]:
    """Call the functions of a Python file, in turn, in each of as many processes as asked for.

    The processes share a gloo process group and, as working directory, the folder, which must be empty. After a failure
    they cannot go on together: what comes after it did not run.

    Returns:
        For every name what went wrong, empty where nothing did.
    """
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, processes, file, list(names), folder) for rank in range(processes)]
    workers = [context.Process(target=_work, args=own, daemon=True) for own in arguments]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + timeout
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
        worker.join()
    reports = [_read(folder, rank) for rank in range(processes)]
    outcomes: dict[str, str] = {}
    for name in names:
        failed = next((earlier for earlier, error in outcomes.items() if error), None)
        errors = [f"rank {rank}:\n{report[name]}" for rank, report in enumerate(reports) if report.get(name)]
        missing = [rank for rank, report in enumerate(reports) if name not in report]
        if failed is not None:
            errors = [f"did not run, because of {failed}"]
        elif missing and not errors:
            errors = [f"did not come to its end on ranks {missing}; after {timeout} s ranks {late} were killed"]
        outcomes[name] = "\n".join(errors)
    return outcomes


def _work(rank: int, processes: int, file: str, names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # by its name the machine may not be reachable
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spec = importlib.util.spec_from_file_location("checks", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = module
    spec.loader.exec_module(module)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=PATIENCE)
    os.chdir(folder)
    for name in names:
        error = ""
        try:
            torch.manual_seed(0)
            getattr(module, name)()
        except Exception:
            error = traceback.format_exc()
        with _report(folder, rank).open("a") as report:
            report.write(json.dumps([name, error]) + "\n")
        if error:
            os._exit(1)  # an orderly end would wait for the others, who wait for this one
    dist.destroy_process_group()


def _report(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.jsonl"


def _read(folder: Path, rank: int) -> dict[str, str]:
    path = _report(folder, rank)
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}
