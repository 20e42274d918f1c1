"""Several processes that share a step: the losses and weights of one process that has the whole batch."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_run import tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m2mkd_fast import create_model
from m2mkd_fast.data import Split, create_dataset
from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.distill.tasks import DistillationSettings, MetaFromTeacher, PairTask, SupervisedTask, Task
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.evaluate import evaluate_accuracy
from m2mkd_fast.evaluate.predictions import evaluation_mode
from m2mkd_fast.modules.meta import hybrid, meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.pipeline.batch_source import AugmentedBatches
from m2mkd_fast.pipeline.config import DataConfig, ParallelConfig, TrainingConfig, make_config
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.run import run
from m2mkd_fast.pipeline.training import fit

# --- what every process runs: checks named check_..., collected below ---

SIZE, CLASSES = 8, 10
ROUTER = {"capacity_factor": 0.75, "noise_std": 0.0, "load_loss_weight": 0.0, "group_size": 4}


class Alone(Execution):
    """One process's own execution, beside the group that it belongs to."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def world(self) -> int:
        return 1


def together(strategy: str = "ddp", experts: int = 1, kind: type[Execution] = Execution) -> Execution:
    world, rank = str(dist.get_world_size()), str(dist.get_rank())
    # As torchrun sets them, before the first look at them.
    os.environ |= {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    execution = kind("cpu", "float32", ParallelConfig(strategy, experts))
    assert execution.accelerator.num_processes == dist.get_world_size()
    return execution


def by_itself() -> Execution:
    return together(kind=Alone)


def images() -> Split:
    return create_dataset("digits", image_size=SIZE, images_per_class=6).splits["train"]


def mixture(**options: Any) -> nn.Module:
    """Drops tokens, has balance losses of groups of images, and every tensor under two names."""
    torch.manual_seed(1)
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_experts": 4, "moe_blocks": "all", **options}
    return create_model(
        "vmoe_micro.m2mkd",
        img_size=SIZE,
        in_chans=1,
        num_classes=CLASSES,
        router="vmoe",
        router_options=ROUTER,
        **options,
    )


def supervised() -> Task:
    return SupervisedTask(mixture().double(), 0.1)


def pair(slot: int = 0) -> Task:
    """A student's mixture in the teacher's place: frozen modules before and behind it, a feature loss."""
    teacher, meta, students = modules()
    settings = DistillationSettings(alpha=0.5, feature_weight=3.0)
    return PairTask(students[slot], slot, teacher, meta, teacher, settings).double()


def from_teacher() -> Task:
    teacher, meta, _ = modules()
    return MetaFromTeacher(meta, teacher).double()


def modules() -> tuple:
    torch.manual_seed(2)
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": SIZE, "in_chans": 1, "num_classes": CLASSES}
    teacher = split(create_model("vit_micro", **options), 2, (1, SIZE, SIZE))
    meta = meta_model(teacher, 1)
    students = student_modules(mixture(), 2, teacher.cuts, tokens=teacher.tokens[0], image_shape=(1, SIZE, SIZE))
    return teacher, meta, students


class DoubleBatches:
    """A source's batches in float64, so that what differs but by rounding differs by little."""

    def __init__(self, source: AugmentedBatches) -> None:
        self.source = source

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self.source.batches(start, stop):
            yield pixels.double(), labels.double() if labels.is_floating_point() else labels


def config(**changes: Any) -> TrainingConfig:
    settings = {"steps": 4, "batch_size": 16, "learning_rate": 0.01, "clip_grad": 0.2, "evaluate_every": 2}
    return TrainingConfig(**{**settings, "checkpoint_every": 2, "label_smoothing": 0.1, **changes})


def train(
    make: Callable[[], Task], execution: Execution, folder: str, until: int | None = None, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and metrics after a few steps in float64."""
    task, split, training = make(), images(), config(**changes)
    data = DataConfig(augmentation="affine")
    source = DoubleBatches(AugmentedBatches(split, training, 3, data, "cpu", execution.shard))
    meta = modules()[1].double()

    def evaluate(model: nn.Module) -> dict[str, float]:
        whole = hybrid(meta, task.index, model) if isinstance(task, PairTask) else model
        pixels, labels = split.load(torch.arange(len(split)))
        with evaluation_mode(whole), torch.no_grad():
            loss = F.cross_entropy(whole(pixels.double()), labels)
        return {"test_loss": float(loss)}

    fitted = fit(
        task,
        split,
        training,
        seed=3,
        execution=execution,
        folder=Path(folder),
        evaluate=evaluate,
        source=source,
        until=until,
    )
    assert fitted.images == fitted.steps * training.batch_size
    dist.barrier()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    assert not any(isinstance(tensor, DTensor) for tensor in task.state_dict().values())
    return task.trainable.state_dict(), [json.loads(line) for line in lines]


def alone(make: Callable[[], Task], folder: str, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    return train(make, by_itself(), f"{folder}-alone{dist.get_rank()}", **changes)


def assert_same(actual: tuple, expected: tuple, *, tolerance: float = 1e-9, shares: bool = True) -> None:
    """To rounding in float64. Adam divides by roots of tiny gradients, so weights differ more than losses do."""
    keys = {"step", "loss", "terms", "test_loss", "learning_rate"} | ({"gradient_share"} if shares else set())
    for entry, wanted in zip(actual[1], expected[1], strict=True):
        for key in keys & wanted.keys():
            assert entry[key] == pytest.approx(wanted[key], rel=tolerance), (key, entry[key], wanted[key])
    for name, tensor in expected[0].items():
        error = (actual[0][name] - tensor).abs().max().item()
        assert error <= tolerance * max(tensor.abs().max().item(), 1e-3), f"{name}: off by {error:.2e}"


def compare(name: str, make: Callable[[], Task], *executions: Execution, **changes: Any) -> None:
    expected = alone(make, name, **changes)
    start = make().trainable.state_dict()
    assert any(not torch.allclose(tensor, start[key]) for key, tensor in expected[0].items()), "nothing was trained"
    for number, execution in enumerate(executions):
        actual = train(make, execution, f"{name}-{number}", **changes)
        within_fsdp = execution.parallel.strategy == "fsdp" or execution.parallel.experts not in (1, execution.world)
        assert_same(actual, expected, shares=not within_fsdp)


MIXING = {"mixup": 0.8, "cutmix": 1.0}


def check_mixtures_with_mixing_and_an_average() -> None:
    """Clipped gradients, dropped tokens, balance losses; FSDP2 and shared-out experts."""
    compare("mixture", supervised, together(), together("fsdp"), together(experts=2), ema_decay=0.9, **MIXING)


def check_a_pair_with_its_frozen_teacher() -> None:
    compare("pair", pair, together(), together("fsdp"))


def check_any_number_of_processes_goes_on() -> None:
    """From what two processes saved one goes on, from what one saved two do, and with another strategy."""
    changes = {**MIXING, "ema_decay": 0.9}
    expected = alone(supervised, "whole", **changes)
    one, two, sharded = by_itself(), together(), together("fsdp", experts=2)
    for number, (first, then) in enumerate([(two, one), (one, sharded), (sharded, two)]):
        # Of processes that each go their own way, the first alone works in the common folder.
        own = dist.get_rank() > 0 and one in (first, then)
        for execution, until in ((first, 2), (then, None)):
            folder = f"goes-on{number}" + ("-own" if own and execution is one else "")
            actual = train(supervised, execution, folder, until, **changes)
        if not (own and then is one):
            assert_same(actual, expected, shares=False)


def check_a_foreign_checkpoint_is_refused_everywhere() -> None:
    execution = together("fsdp")
    train(supervised, execution, "foreign", 2)
    with pytest.raises(M2MKDError, match=r"foreign.checkpoints: the checkpoint holds another model: .*delete it"):
        train(pair, execution, "foreign")


def check_what_processes_tell_one_another() -> None:
    execution, rank, world = together(), dist.get_rank(), dist.get_world_size()
    assert (execution.shard, execution.is_main) == ((rank, world), rank == 0)
    counts = torch.tensor([rank, 2])
    assert execution.sum(counts).tolist() == [world * (world - 1) // 2, 2 * world]
    assert counts.tolist() == [rank, 2], "changed in place"
    assert execution.mean(torch.tensor(float(rank))).item() == (world - 1) / 2
    assert execution.any_process(torch.tensor([rank == 1, False])).tolist() == [True, False]
    assert execution.agreed(rank == 1) and not execution.agreed(False)
    assert execution.broadcast({"rank": rank}) == {"rank": 0}
    model, split = mixture().eval(), images()
    shared = evaluate_accuracy(model, split, batch_size=8, shard=execution.shard, total=execution.sum)
    assert shared == evaluate_accuracy(model, split, batch_size=8)


def check_ranks_draw_their_own_dropout() -> None:
    seen = []

    class Watching(SupervisedTask):
        def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
            seen.append(torch.rand(()))
            return super().forward(images, labels)

    network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES))
    for execution in (by_itself(), together()):
        fit(Watching(copy.deepcopy(network)), images(), config(steps=1), seed=0, execution=execution)
    alone, own = seen
    assert torch.equal(alone, own) == (dist.get_rank() == 0)


def check_a_loss_that_is_not_finite_in_one_process_counts_in_all() -> None:
    class Diverging(SupervisedTask):
        def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
            loss = super().forward(images, labels)
            calls.append(0)
            bad = len(calls) == 2 and dist.get_rank() == 1
            return loss._replace(total=loss.total * (float("nan") if bad else 1.0))

    network, calls = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES)), []
    fitted = fit(Diverging(network), images(), config(steps=3), seed=0, execution=together())
    weights = network[1].weight.detach()
    assert fitted.skipped == 1 and weights.isfinite().all()
    others = torch.stack([torch.empty_like(weights) for _ in range(dist.get_world_size())])
    dist.all_gather(list(others.unbind()), weights)
    assert all(torch.equal(weights, other) for other in others)


def check_micro_batches() -> None:
    every = together(), together("fsdp"), together(experts=2)
    compare("micro", pair, *every, accumulate=2, batch_size=32, **MIXING)


def check_the_meta_models_own_path() -> None:
    compare("meta", from_teacher, together(), together("fsdp"))


def check_experts_within_fsdp() -> None:
    """On four processes the experts of a pair of them are sharded, or replicated, over the two pairs."""
    every = together("fsdp", experts=2), together("ddp", experts=2)
    compare("within", supervised, *every, batch_size=32, ema_decay=0.9, **MIXING)


def check_experts_that_do_not_divide_are_named() -> None:
    with pytest.raises(M2MKDError, match=r"parallel.experts=3 does not divide the \d processes"):
        together(experts=3).prepare(supervised())


FAST = [
    "check_mixtures_with_mixing_and_an_average",
    "check_a_pair_with_its_frozen_teacher",
    "check_what_processes_tell_one_another",
    "check_ranks_draw_their_own_dropout",
    "check_a_loss_that_is_not_finite_in_one_process_counts_in_all",
    "check_experts_that_do_not_divide_are_named",
]
SLOW = [
    "check_any_number_of_processes_goes_on",
    "check_a_foreign_checkpoint_is_refused_everywhere",
    "check_micro_batches",
    "check_the_meta_models_own_path",
    "check_experts_within_fsdp",
]
FOUR = ["check_experts_within_fsdp"]


@pytest.mark.timeout(300)  # the first one waits for all
@pytest.mark.parametrize("name", FAST)
def test_on_two_processes(name: str, outcomes: Callable) -> None:
    if error := outcomes(2, FAST)[name]:
        pytest.fail(error, pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SLOW)
def test_more_on_two_processes(name: str, outcomes: Callable) -> None:
    if error := outcomes(2, SLOW)[name]:
        pytest.fail(error, pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOUR)
def test_on_four_processes(name: str, outcomes: Callable) -> None:
    if error := outcomes(4, FOUR)[name]:
        pytest.fail(error, pytrace=False)


# --- without processes ---


def test_one_process_needs_no_group() -> None:
    execution = Execution("cpu", "float32", ParallelConfig("fsdp", experts=8))
    task = supervised()
    prepared = execution.prepare(task)
    assert (execution.shard, execution.agreed(True), execution.broadcast("x")) == ((0, 1), True, "x")
    assert prepared.task is task and prepared.call is task
    with prepared.whole(prepared.trainable) as model:
        assert model is task.trainable


def test_the_strategy_is_one_of_two() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown parallel.strategy 'fsdp2'; did you mean 'fsdp'"):
        make_config([{"parallel": {"strategy": "fsdp2"}}])
    with pytest.raises(M2MKDError, match="parallel.experts must be at least 1, got 0"):
        make_config([{"parallel": {"experts": 0}}])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_under_torchrun_is_that_of_one_process(tmp_path: Path) -> None:
    """In float32, where Adam makes steps of gradients that are rounding: weights to a thousandth."""
    common = {"arms": ["m2mkd"], "teacher__parts": 2, "student__parts": 2, "precision": "float32"}
    run(make_config([tiny(output=str(tmp_path / "one"), **common)]), jobs=1)
    shared = {"parallel__strategy": "fsdp", **common}
    run(make_config([tiny(output=str(tmp_path / "two"), **shared)]), jobs=1, launcher="torchrun", processes=2)
    for step in ("teacher", "meta", "m2mkd/pair0", "m2mkd/pair1", "m2mkd/e2e"):
        folders = [tmp_path / name / "steps" / step for name in ("one", "two")]
        one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
        assert (two["steps"], two["images"]) == (one["steps"], one["images"])
        assert two["flops"] == pytest.approx(one["flops"])
        assert two["terms"] == pytest.approx(one["terms"], rel=1e-3)
        alone, shared = (load_file(folder / "weights.safetensors") for folder in folders)
        assert alone.keys() == shared.keys()
        for name, tensor in alone.items():
            assert (shared[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max().clamp(min=1e-2), f"{step}: {name}"
