"""A pair's step with its frozen part from the cache, against the same step that computes it; slot by slot.

    python benchmarks/bench_pair_cache.py --json benchmarks/results/pair_cache.json

Both are steps of the training loop itself (batch, forward, backward, clipping, optimiser, logging), taken in turns in
one process. The cached ones read their files, which the operating system holds in memory after the first time.

What should move: a step without a cache computes the i modules before slot i, the teacher's module, and the meta
model's later modules twice; with it the student's module, and the later modules once, forward and backward. The
student's module and the way back through the meta model stay. `flops_ratio` is what that gives if time went with FLOPs.
A small model spends part of it on calls instead; augmentation, which falls away too, has no FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _paired import Ratio, Results, paired_ratio

from m2mkd_fast.distill.tasks import CachedPairTask, PairTask, Task
from m2mkd_fast.modules.state import save_module
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.pipeline.batch_source import AugmentedBatches, BatchSource
from m2mkd_fast.pipeline.caching import cached_batches, make_cache
from m2mkd_fast.pipeline.config import load_config
from m2mkd_fast.pipeline.execution import cpu_threads
from m2mkd_fast.pipeline.files import write_json
from m2mkd_fast.pipeline.training import fit
from m2mkd_fast.pipeline.workbench import Workbench

WARM_UP = 10
CONFIG = Path(__file__).parent.parent / "configs" / "digits_vmoe.yaml"


@dataclass(frozen=True)
class SlotRatio(Ratio):
    """A :class:`Ratio` beside the ratio of the steps' FLOPs."""

    flops_ratio: float

    def __str__(self) -> str:
        return f"{super().__str__()}  (FLOPs {self.flops_ratio:.2f}x)"


@dataclass(frozen=True)
class Cost:
    """What the cache takes for each image, of all slots together."""

    name: str
    bytes_per_image: float
    seconds_per_1000_images: float


class Steps:
    """A training loop that does one step whenever it is asked to, in a thread of its own."""

    def __init__(self, bench: Workbench, task: Task, source: BatchSource, count: int) -> None:
        self.source, self.ask, self.done = source, threading.Semaphore(0), threading.Semaphore(0)
        training = replace(bench.config.pair.train, steps=count)
        arguments = (task, bench.train_split, training)
        options = {"seed": 0, "execution": bench.execution, "source": self}
        self.thread = threading.Thread(target=self._work, args=(arguments, options), daemon=True)
        self.thread.start()
        self.done.acquire()  # models and optimiser are there, and the loop waits for its first batch

    def __call__(self) -> None:
        self.ask.release()
        self.done.acquire()

    def batches(self, start: int, stop: int) -> Iterator[tuple[Any, torch.Tensor]]:
        self.done.release()
        self.ask.acquire()
        for batch in self.source.batches(start, stop):
            yield batch
            self.done.release()
            self.ask.acquire()

    def _work(self, arguments: tuple, options: dict[str, Any]) -> None:
        try:
            fit(*arguments, **options)
        finally:
            self.done.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(options.config, [*options.overrides, f"pair.cache_batches={WARM_UP + options.pairs}"], folder)
        made = make_cache(bench, "cache", print, lambda: None)
        ratios = [measure_slot(bench, slot, options.pairs) for slot in range(bench.slots)]
        for ratio in [*ratios, mean_of(ratios)]:
            results.add(ratio)
        images = made["images"]
        results.add(Cost("the cache", made["cache"]["bytes"] / images, 1000 * made["seconds"] / images))


def measure(pairs: int) -> Ratio:
    """The mean over all slots, in the demo's configuration, on one thread as it has."""
    with tempfile.TemporaryDirectory() as folder, cpu_threads(1):
        bench = prepared(CONFIG, [f"pair.cache_batches={WARM_UP + pairs}"], folder)
        make_cache(bench, "cache", print, lambda: None)
        return mean_of([measure_slot(bench, slot, pairs) for slot in range(bench.slots)])


def measure_slot(bench: Workbench, slot: int, pairs: int) -> SlotRatio:
    loops = [Steps(bench, *pair_of(bench, slot, cached), WARM_UP + pairs) for cached in (False, True)]
    flops = [step_flops(bench, slot, cached) for cached in (False, True)]
    ratio = paired_ratio(f"slot {slot}, from the cache", *loops, pairs=pairs, warm_up=WARM_UP)
    for loop in loops:
        loop.thread.join()
    return SlotRatio(**vars(ratio), flops_ratio=flops[0] / flops[1])


def mean_of(ratios: list[SlotRatio]) -> SlotRatio:
    """The slots' mean ratio. Its interval is the mean of theirs, which is wider than that of a mean."""
    values = [tuple(vars(ratio).values())[1:] for ratio in ratios]
    return SlotRatio(f"mean over {len(ratios)} slots", *map(statistics.mean, zip(*values, strict=True)))


def prepared(config: Path, overrides: list[str], folder: str) -> Workbench:
    """A run folder whose teacher and meta model are there, untrained: their values take no time."""
    bench = Workbench(load_config(config, ["pair.cache=true", *overrides]), Path(folder))
    teacher = bench.teacher_chain()
    for name, model in {bench.teacher_step: teacher, "meta": bench.meta(teacher)}.items():
        digest = save_module(bench.step_folder(name) / "weights.safetensors", model, {})
        write_json(bench.step_folder(name) / "result.json", {"weights_hash": digest})
    return bench


def pair_of(bench: Workbench, slot: int, cached: bool) -> tuple[Task, BatchSource]:
    training, student = bench.config.pair.train, bench.student_modules()[slot]
    settings, meta = bench.settings("m2mkd", training.label_smoothing), bench.trained_meta()
    if cached:
        task = CachedPairTask(student, slot, meta, settings)
        return task, cached_batches(bench, task, print)
    teacher, device = bench.trained_teacher(), bench.execution.accelerator.device
    prefix = teacher if bench.config.pair.prefix == "teacher" else meta
    source = AugmentedBatches(bench.train_split, training, 0, bench.config.data, device)
    return PairTask(student, slot, teacher, meta, prefix, settings), source


def step_flops(bench: Workbench, slot: int, cached: bool) -> int:
    task, source = pair_of(bench, slot, cached)
    task.to(bench.execution.accelerator.device)
    with flop_counter() as counter:
        task(*next(iter(source.batches(0, 1)))).total.backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
