"""Ratio of two functions' times, measured in pairs: both run in one process, in turns; a busy machine slows both.

The median of per-pair ratios varies by about one per cent where absolute times vary by half. A limit fails only where
the whole confidence interval misses it.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


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
    baseline_times, candidate_times = [], []
    for number in range(warm_up + pairs):
        order = [(baseline, baseline_times), (candidate, candidate_times)]
        for function, times in order if number % 2 == 0 else reversed(order):
            seconds = _seconds(function, synchronize)
            if number >= warm_up:
                times.append(seconds)
    ratios = [before / after for before, after in zip(baseline_times, candidate_times, strict=True)]
    low, high = bootstrap_interval(ratios)
    return Ratio(
        name,
        statistics.median(ratios),
        low,
        high,
        1e3 * statistics.median(baseline_times),
        1e3 * statistics.median(candidate_times),
        pairs,
    )


def bootstrap_interval(values: list[float], draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the median; the same draws every time."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def write_json(path: Path, results: list[Ratio]) -> None:
    """The results with what is needed to compare them with others: machine, versions, threads, commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "commit": commit or None,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "results": [asdict(result) for result in results]}, indent=2) + "\n")


def _seconds(function: Callable[[], object], synchronize: Callable[[], None] | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    function()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start
