"""A pair under a bandit's budget: what each of its steps is given, how its state goes on, and what it reports."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.state import weights_hash
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.pipeline.batch_source import AugmentedBatches, BatchSource
from m2mkd_fast.pipeline.budget import (
    Slice,
    allocate,
    annealing_steps,
    learning_rate_factor,
    proportional_shares,
    round_sizes,
)
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import TrainingConfig
from m2mkd_fast.pipeline.plan import Step, round_name
from m2mkd_fast.pipeline.training import Evaluate
from m2mkd_fast.pipeline.training_progress import FitResult
from m2mkd_fast.pipeline.workbench import Workbench

if TYPE_CHECKING:
    from m2mkd_fast.pipeline.steps import _Work

_TOTALS = ("steps", "images", "seconds", "flops", "skipped")
_LOSS_BATCHES = 2  # the same ones before and after, so few are enough to tell by how much a loss fell


@dataclass
class TeachingPair:
    """A pair before it learns: what is trained, on what, how it is judged, and what making it has cost.

    ``source`` is None for the training images, augmented.
    """

    student: nn.Module
    task: Task
    source: BatchSource | None
    evaluate: Evaluate
    stitch_fit: dict[str, float]
    flops: float


def train_round(work: _Work, make_pair: Callable[[bool], TeachingPair]) -> dict[str, Any]:
    """Go on with a pair for as many steps as this round gives it, and report by how much its loss fell.

    Args:
        work: the step's tools.
        make_pair: builds the pair; told whether it starts fresh, or gets its weights from a checkpoint.

    Returns:
        The step's result: costs of this round alone, ``slice`` (:class:`~m2mkd_fast.pipeline.budget.Slice`) and
        ``totals``, the running totals of the pair's training.
    """
    share = _begin(work)
    if share.begin and share.end == share.begin:
        last, part = share.earlier[-1], Slice(0, share.loss_before, share.loss_before)
        return {"metrics": {}, "slice": asdict(part), "totals": last["totals"], "weights_hash": last["weights_hash"]}
    pair = make_pair(not share.begin)
    fitted, part, flops = _train(work, pair, share)
    return asdict(replace(share.own(fitted), flops=flops)) | {
        "metrics": {},
        "slice": asdict(part),
        "totals": {name: getattr(fitted, name) for name in _TOTALS},
        "stitch_fit": pair.stitch_fit,
        "weights_hash": weights_hash(pair.student),
    }


def finish_rounds(work: _Work, make_pair: Callable[[bool], TeachingPair]) -> dict[str, Any]:
    """Let a pair's learning rate fall and write its weights; the result is that of the whole pair, rounds included.

    It holds what the equal budget's has, and ``budget.slices``: the pair's slice of every round and of the end.
    """
    share = _begin(work)
    pair = make_pair(not share.begin)
    fitted, part, flops = _train(work, pair, share, pair.evaluate)
    fitted = replace(fitted, flops=flops + sum(result["flops"] for result in share.earlier))
    slices = [*(result["slice"] for result in share.earlier), asdict(part)]
    stitch_fit = next((result["stitch_fit"] for result in share.earlier if result.get("stitch_fit")), pair.stitch_fit)
    metrics = pair.evaluate(pair.student)
    return work.finish(pair.student, fitted, metrics, stitch_fit=stitch_fit, budget={"slices": slices})


@dataclass(frozen=True)
class _Share:
    """What a pair is given in one step: a round, or its annealing after the last.

    Attributes:
        begin, end: optimiser steps of the pair before and after it.
        annealing: those of them over which the learning rate falls to zero, up to ``end``.
        earlier: results of the pair's rounds before, in order.
    """

    begin: int
    end: int
    annealing: int
    earlier: list[dict[str, Any]]

    @property
    def loss_before(self) -> float | None:
        """The pair's loss after its rounds before; None before the first."""
        return self.earlier[-1]["slice"]["loss_after"] if self.earlier else None

    def learning_rate(self, training: TrainingConfig) -> Callable[[int], float]:
        """Factor on the learning rate; the warm-up is as long as under an equal budget."""
        warmup = round(training.warmup * training.steps)
        return lambda t: learning_rate_factor(t, warmup=warmup, end=self.end, annealing=self.annealing)

    def own(self, fitted: FitResult) -> FitResult:
        """The costs of this step alone, out of the pair's running totals that a resumed training run gives."""
        before = self.earlier[-1]["totals"] if self.earlier else dict.fromkeys(_TOTALS, 0)
        return replace(fitted, **{name: getattr(fitted, name) - before[name] for name in _TOTALS})


def _begin(work: _Work) -> _Share:
    share = _share_of(work.bench, work.step)
    if share.begin and work.writes:
        _take_over(work)
    work.bench.execution.barrier()
    return share


def _share_of(bench: Workbench, step: Step) -> _Share:
    """Work out from the results of the rounds before what a step of a pair is given."""
    pair, budget = bench.config.pair, bench.config.pair.budget
    slots = len(bench.result("hybrids")["metrics"]["hybrid_accuracy"])
    rounds = budget.rounds if step.round is None else step.round
    results = [[bench.result(round_name(step.arm, index, i)) for i in range(slots)] for index in range(rounds)]
    history = [[Slice(**result["slice"]) for result in row] for row in results]
    taken = [sum(done[i].steps for done in history) for i in range(slots)]
    if step.round is None:
        annealing = proportional_shares(annealing_steps(pair, slots), taken)[step.slot]
        given = annealing
    else:
        annealing = 0
        given = allocate(
            history,
            slots=slots,
            steps=round_sizes(pair, slots)[step.round],
            slice_steps=budget.slice_steps,
            discount=budget.discount,
            seed=bench.seed("budget", step.arm),
        )[step.slot]
    begin = taken[step.slot]
    return _Share(begin, begin + given, annealing, [row[step.slot] for row in results])


def _take_over(work: _Work) -> None:
    """Put the state in which a pair's last round ended where this step begins, unless this one has begun already.

    A round's state stays until the next but one begins, so each step can be made again from the one before it. Where
    its newest checkpoint is damaged, the steps since the one before are trained again here, with the same batches.

    Raises:
        M2MKDError: the round before has no intact state any more.
    """
    bench, step, say = work.bench, work.step, work.progress.message
    last = (bench.config.pair.budget.rounds if step.round is None else step.round) - 1
    folder = bench.step_folder(step.name)
    before = bench.step_folder(round_name(step.arm, last, step.slot))
    own = Checkpoints(folder / "checkpoints", keep=2, say=say)
    if own.load() is None:
        content = Checkpoints(before / "checkpoints", keep=2, say=say).load()
        if content is None:
            pairs = bench.folder / "steps" / step.arm / "round*" / f"pair{step.slot}"
            raise M2MKDError(
                f"{before} holds no intact state from which {step.name} could go on; delete {pairs} to make the rounds "
                "of this pair again"
            )
        tensors, facts = content
        work.guard()
        shutil.copyfile(before / "metrics.jsonl", folder / "metrics.jsonl")
        own.save(facts["progress"]["step"], tensors, facts)
    if last > 0:
        work.guard()
        outdated = bench.step_folder(round_name(step.arm, last - 1, step.slot))
        Checkpoints(outdated / "checkpoints").clear()


def _train(
    work: _Work, pair: TeachingPair, share: _Share, evaluate: Evaluate | None = None
) -> tuple[FitResult, Slice, float]:
    """Train a pair's share: the running totals of its training, the slice, and all FLOPs of this step."""
    training = work.config.pair.train
    with flop_counter() as counter:
        before = share.loss_before
        if before is None:
            before = _loss(work, pair)
    flops = counter.get_total_flops()
    fitted = work.fit(
        pair.task,
        replace(training, steps=share.end),
        evaluate,
        source=pair.source,
        learning_rate=share.learning_rate(training),
    )
    with flop_counter() as counter:
        after = _loss(work, pair)
    flops += counter.get_total_flops()
    return fitted, Slice(share.end - share.begin, before, after), share.own(fitted).flops + pair.flops + flops


def _loss(work: _Work, pair: TeachingPair) -> float:
    """A pair's mean loss on its first training batches, in evaluation mode."""
    bench, execution = work.bench, work.bench.execution
    device = execution.accelerator.device
    data = replace(work.config.data, num_workers=0)  # starting workers would take longer than these batches
    source = pair.source or AugmentedBatches(bench.train_split, work.config.pair.train, work.seed, data, device)
    pair.task.to(device).eval()
    losses = []
    with torch.no_grad(), execution.autocast():
        for inputs, labels in source.batches(0, _LOSS_BATCHES):
            losses.append(pair.task(*send_to_device((inputs, labels), device)).total)
    loss = execution.mean(torch.stack(losses).double().mean()).item()
    if not math.isfinite(loss):
        raise M2MKDError(
            f"the pair's loss on its first {_LOSS_BATCHES} batches is {loss}, so nothing can be said about how it "
            "falls; lower pair.train.learning_rate"
        )
    return loss
