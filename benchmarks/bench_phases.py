"""One training step of every phase of a whole run, at published sizes: seconds, operations, parameters.

`benchmarks/scaling.py` makes docs/scaling.md of the file that this writes. Forward and backward passes are proportional
to the images, the optimiser's update is not, so they are timed apart. On a GPU the products run in bf16 under autocast.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from _paired import Results
from torch import Tensor, nn

from m2mkd_fast.distill.tasks import DistillationSettings, MetaFromTeacher, PairTask, SupervisedTask, Task
from m2mkd_fast.models import create_model
from m2mkd_fast.modules import meta_model, split, student_modules
from m2mkd_fast.nn.expert_mlp import ExpertMLP
from m2mkd_fast.ops.flops import flop_counter

LABELS = DistillationSettings(alpha=0.0, label_smoothing=0.1)
PUBLISHED = DistillationSettings(label_smoothing=0.1)
COMPOSABLE = DistillationSettings(feature_weight=3.0, label_smoothing=0.1)


@dataclass(frozen=True)
class Case:
    """A teacher, its depths, and a student, cut into ``student_parts`` (None: a circuit, whose parts are given)."""

    teacher: str
    parts: list[int]
    student: str
    student_parts: int | None


CASES = {
    "V-MoE-B from ViT-L/16": Case("vit_large_patch16_224", [6, 6, 6, 6], "vmoe_base.m2mkd", 4),
    "NAC from ViT-H/14": Case("vit_huge_patch14_224", [4, 3, 3, 3, 3, 3, 3, 3, 3, 4], "nac_imagenet.scale_free", None),
}


@dataclass(frozen=True)
class PhaseStep:
    """What one phase, or one slot of it, costs.

    Attributes:
        image_seconds: forward and backward pass, for one image of a batch of ``batch_size``.
        update_seconds: AdamW's update of all that is trained.
        image_flops: operations of forward and backward pass for one image.
        parameters: trained ones, the experts' included.
        expert_parameters: trained ones of experts alone.
    """

    case: str
    phase: str
    slot: int | None
    batch_size: int
    image_seconds: float
    update_seconds: float
    image_flops: float
    parameters: int
    expert_parameters: int

    def __str__(self) -> str:
        slot = "" if self.slot is None else f" {self.slot}"
        return (
            f"{self.case}, {self.phase}{slot}: {1e3 * self.image_seconds:,.0f} ms an image, "
            f"{1e3 * self.update_seconds:,.0f} ms an update, {self.image_flops / 1e9:,.0f} GFLOP an image, "
            f"{self.parameters / 1e6:,.1f} M parameters"
        )


def tasks(case: Case, device: str) -> Iterator[tuple[str, int | None, Task]]:
    """Every phase's task, made when it is its turn: (phase, slot, task)."""
    torch.manual_seed(0)
    teacher = split(timm.create_model(case.teacher, num_classes=1000).to(device), case.parts, (3, 224, 224))
    meta = meta_model(teacher).to(device)
    yield "PT", None, SupervisedTask(meta, 0.1)
    yield "meta from teacher", None, MetaFromTeacher(meta, teacher)
    for slot in range(len(meta)):
        yield "MT", slot, PairTask(teacher[slot], slot, None, meta, meta, LABELS)
    yield "FT", None, SupervisedTask(teacher, 0.1)
    student = create_model(case.student).to(device)
    modules = student_modules(
        student, case.student_parts, teacher.cuts, tokens=teacher.tokens[0], image_shape=(3, 224, 224)
    )
    for slot, module in enumerate(modules):
        yield "pair, published", slot, PairTask(module, slot, teacher, meta, meta, PUBLISHED)
        yield "pair, composable", slot, PairTask(module, slot, teacher, meta, teacher, COMPOSABLE)
    del teacher, meta, modules
    yield "E2E", None, SupervisedTask(student, 0.1)


def measure(
    name: str, phase: str, slot: int | None, task: Task, batch_size: int, rounds: int, device: str
) -> PhaseStep:
    task.trainable.requires_grad_(True)  # an earlier task may have frozen it
    task.to(device).train()
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    labels = torch.randint(1000, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss: Tensor = task(images, labels).total
        loss.backward()

    with flop_counter() as counter:
        step()
    image_seconds = statistics.median(seconds(step, device) for _ in range(rounds)) / batch_size
    optimizer = torch.optim.AdamW(task.trainable.parameters(), lr=1e-5, fused=True)
    optimizer.step()  # makes the moments
    update_seconds = statistics.median(seconds(optimizer.step, device) for _ in range(rounds))
    optimizer.zero_grad()
    return PhaseStep(
        name,
        phase,
        slot,
        batch_size,
        image_seconds,
        update_seconds,
        counter.get_total_flops() / batch_size,
        count(task.trainable),
        sum(count(module) for module in task.trainable.modules() if isinstance(module, ExpertMLP)),
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seconds(call: Callable[[], object], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="default: 2, on a GPU 32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = options.batch_size or (32 if device == "cuda" else 2)
    results = Results(options.json)
    for name in options.case or CASES:
        for phase, slot, task in tasks(CASES[name], device):
            results.add(measure(name, phase, slot, task, batch_size, options.rounds, device))
            gc.collect()


if __name__ == "__main__":
    main()
