"""What the training loop costs beside the training: its steps against those of a bare loop, ten by ten in turns.

The bare loop does forward pass, backward pass, clipping and the optimiser's step on the same batches with the same task
and optimiser, and nothing else: no seeds, no learning rate, no look at the loss, no log, no checkpoint. Evaluation is
in neither. Each pair of blocks is ten steps and their log; a checkpoint falls into every tenth block, and its cost is
a line of its own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _paired import Ratio, Results, bootstrap_interval
from torch import Tensor

from m2mkd_fast.distill.tasks import PairTask, SupervisedTask, Task
from m2mkd_fast.models import create_model
from m2mkd_fast.pipeline.batch_source import AugmentedBatches
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import TrainingConfig, load_config
from m2mkd_fast.pipeline.execution import Execution, cpu_threads
from m2mkd_fast.pipeline.optimization import create_optimizer
from m2mkd_fast.pipeline.training import LOG_EVERY, fit
from m2mkd_fast.pipeline.workbench import Workbench

DEMO = Path(__file__).parents[1] / "configs" / "digits_vmoe.yaml"
Batches = Iterator[tuple[Any, Tensor]]


class OneBatch:
    """The same random images again and again: nothing is loaded."""

    def __init__(self, batch_size: int, size: int, classes: int, device: torch.device) -> None:
        self.images = torch.randn(batch_size, 3, size, size, device=device)
        self.labels = torch.randint(classes, (batch_size,), device=device)

    def batches(self, start: int, stop: int) -> Batches:
        for _ in range(start, stop):
            yield self.images, self.labels


class InTurns:
    """Hands a loop its batches and, after every ten, lets the bare loop do as many; times both."""

    def __init__(self, source: Any, bare: Callable[[Any, Tensor], None], execution: Execution) -> None:
        self.source, self.bare = source, bare
        self.cuda = execution.accelerator.device.type == "cuda"
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def batches(self, start: int, stop: int) -> Batches:
        loop, bare = self.source.batches(start, stop), self.source.batches(start, stop)
        for _ in range(start, stop, LOG_EVERY):
            began = self._now()
            for _ in range(LOG_EVERY):
                yield next(loop)
            middle = self._now()
            for _ in range(LOG_EVERY):
                self.bare(*next(bare))
            self.loop_seconds.append(middle - began)
            self.bare_seconds.append(self._now() - middle)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def bare_step(task: Task, config: TrainingConfig, execution: Execution) -> Callable[[Any, Tensor], None]:
    """One step of the loop that anybody would write."""
    task.to(execution.accelerator.device)
    optimizer = create_optimizer(task.trainable, config)
    parameters = list(task.trainable.parameters())

    def step(inputs: Any, labels: Tensor) -> None:
        with execution.autocast():
            loss = task(inputs, labels)
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        optimizer.step()

    return step


def measure(phase: str, blocks: int) -> Ratio:
    """A phase of the demo on the processor, on one thread as it has."""
    name, task, source, training = next(each for each in demo_tasks() if each[0] == f"demo, {phase}")
    with cpu_threads(1):
        return against_bare(name, task, source, training, Execution("cpu", "float32"), blocks)


def against_bare(
    name: str, task: Task, source: Any, config: TrainingConfig, execution: Execution, blocks: int
) -> Ratio:
    """The bare loop's time over the loop's, median of blocks of ten steps without the first three."""
    warm_up = 3  # FLOPs are counted in the first step
    config = copy.copy(config)
    config.steps = (blocks + warm_up) * LOG_EVERY + 1  # a block is over when the next batch is asked for
    config.evaluate_every = config.steps + 1
    turns = InTurns(source, bare_step(copy.deepcopy(task), config, execution), execution)
    with tempfile.TemporaryDirectory() as folder:
        fit(task, None, config, seed=0, execution=execution, folder=Path(folder), source=turns)
    bare, loop = turns.bare_seconds[warm_up:], turns.loop_seconds[warm_up:]
    ratios = [before / after for before, after in zip(bare, loop, strict=True)]
    low, high = bootstrap_interval(ratios)
    milliseconds = [1e3 * statistics.median(seconds) / LOG_EVERY for seconds in (bare, loop)]
    return Ratio(f"training loop, {name}", statistics.median(ratios), low, high, *milliseconds, len(ratios))


def checkpoint_cost(name: str, task: Task, every: int) -> str:
    """Writing a checkpoint of an optimiser with two moments, and that for each step."""
    tensors = {f"{i}.{n}": p for i in range(3) for n, p in task.trainable.named_parameters()}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(10):
            began = time.perf_counter()
            Checkpoints(Path(folder)).save(step, tensors, {})
            seconds.append(time.perf_counter() - began)
    millions = sum(p.numel() for p in task.trainable.parameters()) / 1e6
    cost = 1e3 * statistics.median(seconds)
    return (
        f"{name}: a checkpoint of {millions:.2f} million parameters takes {cost:.1f} ms, {cost / every:.3f} ms a step"
    )


def demo_tasks() -> Iterator[tuple[str, Task, Any, TrainingConfig]]:
    """Tasks of the demo's phases with fresh weights."""
    config = load_config(DEMO)
    bench = Workbench(config, Path("unused"))
    teacher, meta = bench.teacher_chain(), bench.meta()
    settings = bench.settings("m2mkd", config.pair.train.label_smoothing)
    phases = [("teacher", SupervisedTask(teacher, 0.1), config.teacher.train)]
    for slot, student in enumerate(bench.student_modules()):
        pair = PairTask(student, slot, copy.deepcopy(teacher), copy.deepcopy(meta), copy.deepcopy(teacher), settings)
        phases.append((f"pair {slot}", pair, config.pair.train))
    phases.append(("end to end", SupervisedTask(bench.student_model(), 0.1), config.e2e))
    for name, task, training in phases:
        yield f"demo, {name}", task, AugmentedBatches(bench.train_split, training, 0, config.data), training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=1, help="as the demo's")
    parser.add_argument("--blocks", type=int, default=20, help="of ten steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    for name, task, source, training in demo_tasks():
        cpu = Execution("cpu", "float32")
        results.add(against_bare(name, task, source, training, cpu, options.blocks))
        results.add(checkpoint_cost(name, task, training.checkpoint_every))
    if not torch.cuda.is_available():
        results.add("V-MoE-S on a GPU: not measured, there is none")
        return
    execution, training = Execution("cuda", "auto"), TrainingConfig(batch_size=128)
    task = SupervisedTask(create_model("vmoe_small32.every2"))
    source = OneBatch(training.batch_size, 224, 1000, execution.accelerator.device)
    results.add(against_bare("V-MoE-S/32, batch 128", task, source, training, execution, options.blocks))


if __name__ == "__main__":
    main()
