"""Ratio of two functions' times, measured in pairs: both run in one process, in turns; a busy machine slows both.

The median of per-pair ratios varies by about one per cent where absolute times vary by half. A limit fails only where
the whole confidence interval misses it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``candidate`` is than ``baseline``: median of the pairs, and its 95 % interval."""

    name: str
    speedup: float
    low: float
    high: float
    baseline_ms: float
    candidate_ms: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.name:<60} {self.speedup:6.2f}x  [{self.low:.2f}, {self.high:.2f}]"
            f"  {self.baseline_ms:9.3f} ms -> {self.candidate_ms:9.3f} ms"
        )


def paired_ratio(
    name: str,
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    pairs: int = 60,
    warm_up: int = 5,
    synchronize: Callable[[], None] | None = None,
) -> Ratio:
    """Time both functions in turns; on a GPU pass ``torch.cuda.synchronize``."""
    return paired_ratios({name: baseline}, candidate, pairs=pairs, warm_up=warm_up, synchronize=synchronize)[0]


def paired_ratios(
    baselines: Mapping[str, Callable[[], object]],
    candidate: Callable[[], object],
    *,
    pairs: int = 60,
    warm_up: int = 5,
    synchronize: Callable[[], None] | None = None,
) -> list[Ratio]:
    """Time many functions in turns; one ratio for each baseline, whose name it bears."""
    functions = [*baselines.values(), candidate]
    times: list[list[float]] = [[] for _ in functions]
    for number in range(warm_up + pairs):
        order = list(zip(functions, times, strict=True))
        for function, its_times in order if number % 2 == 0 else reversed(order):
            seconds = _seconds(function, synchronize)
            if number >= warm_up:
                its_times.append(seconds)
    return [_ratio(name, before, times[-1]) for name, before in zip(baselines, times[:-1], strict=True)]


def _ratio(name: str, baseline_times: list[float], candidate_times: list[float]) -> Ratio:
    ratios = [before / after for before, after in zip(baseline_times, candidate_times, strict=True)]
    low, high = bootstrap_interval(ratios)
    return Ratio(
        name,
        statistics.median(ratios),
        low,
        high,
        1e3 * statistics.median(baseline_times),
        1e3 * statistics.median(candidate_times),
        len(ratios),
    )


def bootstrap_interval(values: list[float], draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the median; the same draws every time."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


class Results:
    """Prints every result and, where there is a path, rewrites the file: what was measured outlives an interruption."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.results: list[Any] = []
        self.notes: list[str] = []

    def add(self, result: Any) -> None:
        """A dataclass of figures, or a line of text about what could not be measured."""
        print(result, flush=True)
        (self.notes if isinstance(result, str) else self.results).append(result)
        if self.path is not None:
            write_json(self.path, self.results, self.notes)


def write_json(path: Path, results: Sequence[Any], notes: Sequence[str] = ()) -> None:
    """The results with what is needed to compare them with others: machine, versions, threads, commit, command."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "commit": commit or None,
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    content = {"facts": facts, "results": [asdict(result) for result in results], "notes": list(notes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def measure_against_reference(
    name: str,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    tensors: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    *,
    baseline: str,
    backward: bool,
    pairs: int,
    device: str,
) -> Ratio:
    """A kernel against its reference, ``"eager"`` or ``"compiled"``, on the same tensors."""

    def call_of(function: Callable[..., Any]) -> Callable[[], object]:
        def call() -> object:
            outputs = function(*tensors)
            return torch.autograd.grad(outputs, tensors, grads) if backward else outputs

        return call

    if baseline == "compiled":
        torch._dynamo.reset()  # each size gets code of its own
    return paired_ratio(
        f"{name}, {'forward and backward' if backward else 'forward'}, against {baseline}",
        call_of(torch.compile(reference, dynamic=False) if baseline == "compiled" else reference),
        call_of(kernel),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def main_of_elementwise(
    description: str,
    measure: Callable[..., Ratio],
    cpu_cases: Iterable[str],
    cases: Iterable[str],
    precisions: Iterable[str],
) -> None:
    """The command line of an operator's benchmark: all its cases against its reference, eager and compiled."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    baselines, passes = ("eager", "compiled"), (False, True)
    runs = [*itertools.product(cpu_cases, ["float32"], baselines, passes, ["cpu"])]
    if torch.cuda.is_available():
        runs += itertools.product(cases, precisions, baselines, passes, ["cuda"])
    results = Results(options.json)
    for case, precision, baseline, backward, device in runs:
        results.add(measure(case, precision, baseline, backward, options.pairs, device))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(function: Callable[[], object], synchronize: Callable[[], None] | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    function()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start
