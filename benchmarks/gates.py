"""Limits that a change may not break: speed-ups, dispatched operators, graph breaks, the cost of importing.

A speed-up fails only where even the good end of its confidence interval misses the limit, in two measurements.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import bench_route
import torch
from _paired import Ratio
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd_fast.ops.route import route

THREADS = 2
# Measured on two threads of a quiet 2-core machine: 5.1, 4.8 and 8.2; the limits leave room for other processors.
SPEEDUPS: list[tuple[float, Callable[[], Ratio]]] = [
    (4.0, partial(bench_route.measure, "dropless, one group", "cpu", backward=False, pairs=40)),
    (3.0, partial(bench_route.measure, "dropless, one group", "cpu", backward=True, pairs=40)),
    (5.0, partial(bench_route.measure, "batch priority 1.05, 16 groups", "cpu", backward=False, pairs=40)),
]
IMPORT_SECONDS = 0.2
ROUTE_OPERATORS = 1
HEAVY_MODULES = ("triton", "torchvision", "timm", "m2mkd_fast.cli")


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def check_speedup(limit: float, measure: Callable[[], Ratio]) -> bool:
    for attempt in (1, 2):
        ratio = measure()
        passed = ratio.high >= limit
        print(f"{'ok  ' if passed else 'FAIL'} {ratio}  limit {limit}x{'' if attempt == 1 else ', second try'}")
        if passed:
            return True
    return False


def check_operators() -> bool:
    """Dispatched operators of one routing call: on a GPU each is at least a launch."""
    logits = torch.randn(1, 64, 8)
    route(logits, top_k=2)
    with CountOperators() as counted:
        route(logits, top_k=2)
    passed = len(counted.names) <= ROUTE_OPERATORS
    print(f"{'ok  ' if passed else 'FAIL'} route dispatches {counted.names}, limit {ROUTE_OPERATORS}")
    return passed


def check_graph_breaks() -> bool:
    breaks = torch._dynamo.explain(lambda logits: route(2 * logits, top_k=2).weight.sum())(
        torch.randn(1, 64, 8, requires_grad=True)
    ).graph_break_count
    print(f"{'ok  ' if breaks == 0 else 'FAIL'} route has {breaks} graph breaks, limit 0")
    return breaks == 0


def check_import() -> bool:
    code = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import m2mkd_fast;"
        "print(time.perf_counter() - start, torch.cuda.is_initialized(), *(set(sys.modules) - before))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    seconds = statistics.median(float(output[0]) for output in outputs)
    heavy = [name for name in outputs[0][2:] if name in HEAVY_MODULES]
    started_cuda = outputs[0][1] == "True"
    passed = seconds < IMPORT_SECONDS and not heavy and not started_cuda
    print(
        f"{'ok  ' if passed else 'FAIL'} import m2mkd_fast adds {seconds:.3f} s to torch, limit {IMPORT_SECONDS};"
        f" heavy modules: {heavy or 'none'}; CUDA started: {started_cuda}"
    )
    return passed


def main() -> int:
    torch.set_num_threads(THREADS)
    passed = [check_import(), check_operators(), check_graph_breaks()]
    passed += [check_speedup(limit, measure) for limit, measure in SPEEDUPS]
    print(f"{sum(passed)} of {len(passed)} limits hold")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
