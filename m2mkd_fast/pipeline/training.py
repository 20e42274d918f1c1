"""The training loop: one task, one configuration, resumable at any checkpoint with the same result to the last bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.seeds import derive_seed
from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.batch_source import AugmentedBatches, BatchSource
from m2mkd_fast.pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.files import MetricsFile
from m2mkd_fast.pipeline.optimization import LearningRate, LearningRateFactor, create_optimizer, moving_average
from m2mkd_fast.pipeline.progress import Progress as ProgressReport
from m2mkd_fast.pipeline.training_progress import FitResult

LOG_EVERY = 10

Evaluate = Callable[[nn.Module], dict[str, float]]
Guard = Callable[[], None]


def fit(
    task: Task,
    split: Split,
    config: TrainingConfig,
    *,
    seed: int,
    data: DataConfig | None = None,
    execution: Execution | None = None,
    folder: Path | None = None,
    evaluate: Evaluate | None = None,
    progress: ProgressReport | None = None,
    name: str = "training",
    source: BatchSource | None = None,
    until: int | None = None,
    learning_rate: LearningRateFactor | None = None,
    guard: Guard = lambda: None,
) -> FitResult:
    """Train ``task.trainable`` in place for ``config.steps`` updates.

    Step t draws its batch, augmentation, mixing and dropout from (seed, t) alone. A run that was killed and is started
    again with the same ``folder`` goes on from its last checkpoint and ends with the same bits as an undisturbed one.

    Args:
        task: what is trained, and its loss.
        split: training images.
        config: the phase's settings.
        seed: of everything random in this phase.
        data: augmentation and workers; none by default.
        execution: device and precision.
        folder: where checkpoints and ``metrics.jsonl`` go; None keeps nothing.
        evaluate: called on the (averaged) model every ``config.evaluate_every`` steps and at the end.
        progress: told every few steps how far it is, for a progress display.
        name: what the display calls this phase.
        source: of the batches; by default those of ``split``, augmented and mixed as ``data`` and ``config`` say.
        until: stop after so many of the steps, with a checkpoint from which a later call goes on; None for all.
        learning_rate: factor on ``config.learning_rate`` at step t; None for a cosine after a linear warm-up.
        guard: called before anything is written; raises where this process may no longer write into ``folder``.

    Raises:
        M2MKDError: the loss is not finite, the disk is full, or the checkpoint in ``folder`` is damaged or foreign.
    """
    execution = execution or Execution()
    if source is None:
        data = data or DataConfig(augmentation="none")
        source = AugmentedBatches(split, config, seed, data, execution.accelerator.device)
    run = _Run(task, source, config, seed, execution, folder, learning_rate, guard)
    return run.train(evaluate, progress, name, config.steps if until is None else min(until, config.steps))


class _Run:
    def __init__(
        self,
        task: Task,
        source: BatchSource,
        config: TrainingConfig,
        seed: int,
        execution: Execution,
        folder: Path | None,
        learning_rate: LearningRateFactor | None,
        guard: Guard,
    ) -> None:
        self.source, self.config, self.seed, self.folder, self.guard = source, config, seed, folder, guard
        self.execution, self.accelerator = execution, execution.accelerator
        optimizer = create_optimizer(task.trainable, config)
        self.learning_rate = LearningRate(optimizer, config, learning_rate)
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.average = moving_average(task.trainable, config)
        self.progress = Progress()
        if folder is not None:
            self.progress = load_checkpoint(folder, task.trainable, optimizer, self.average)
            guard()
            self.metrics = MetricsFile(folder / "metrics.jsonl", keep_until=self.progress.step)
        self.losses: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    @property
    def trainable(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.task).trainable

    def train(self, evaluate: Evaluate | None, display: ProgressReport | None, name: str, stop: int) -> FitResult:
        config, progress = self.config, self.progress
        if display is not None:
            display.start(name, config.steps, progress.step)
        if progress.step == 0 and evaluate is not None:
            self._evaluate(evaluate)
        first = progress.step
        for t, (inputs, labels) in zip(range(first, stop), self.source.batches(first, max(first, stop)), strict=False):
            started = time.perf_counter()
            shares = (t + 1) % config.evaluate_every == 0
            self._step(t, self._to_device(inputs), self._to_device(labels), shares)
            progress.step = t + 1
            progress.images += len(labels)
            progress.flops += progress.flops_per_step
            progress.seconds += time.perf_counter() - started
            ends = progress.step == stop
            evaluates = evaluate is not None and (ends or progress.step % config.evaluate_every == 0)
            saves = self.folder is not None and (ends or progress.step % config.checkpoint_every == 0)
            if evaluates or saves or ends or progress.step % LOG_EVERY == 0:
                self._log(display, name)  # first, since it stops the run before a loss that is not finite does harm
            if evaluates:
                self._evaluate(evaluate)
            if saves:
                self.guard()
                save_checkpoint(self.folder, progress, self.trainable, self.optimizer.optimizer, self.average)
        if self.average is not None:
            self.trainable.load_state_dict(self.average.module.state_dict())
        return FitResult(
            progress.step,
            progress.images,
            progress.seconds,
            progress.flops,
            terms=progress.terms,
            gradient_share=progress.gradient_share,
        )

    def _to_device(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return given.to(self.accelerator.device)
        return tuple(tensor.to(self.accelerator.device) for tensor in given)

    def _step(self, t: int, inputs: Any, labels: Tensor, shares: bool) -> None:
        step_seed = derive_seed(self.seed, "step", t)
        torch.manual_seed(step_seed)
        np.random.seed(step_seed)
        random.seed(step_seed)
        self.learning_rate.set(t)
        self.task.train()
        if self.progress.flops_per_step:
            loss = self._backward(inputs, labels, shares)
        else:
            with FlopCounterMode(display=False) as counter:
                loss = self._backward(inputs, labels, False)
            self.progress.flops_per_step = float(counter.get_total_flops())
        if self.config.clip_grad:
            self.accelerator.clip_grad_norm_(self.trainable.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.trainable, step=t)
        self.losses.append((t, loss.total.detach(), {name: term.detach() for name, term in loss.terms.items()}))

    def _backward(self, inputs: Any, labels: Tensor, shares: bool) -> PairLoss:
        self.optimizer.zero_grad()
        with self.execution.autocast():
            loss = self.task(inputs, labels)
        if shares and len(loss.terms) > 1:
            self.progress.gradient_share = _gradient_share(loss, list(self.trainable.parameters()))
        self.accelerator.backward(loss.total)
        return loss

    def _log(self, display: ProgressReport | None, name: str) -> None:
        """Look at the losses since the last look (the only time the host waits for the device) and write them down."""
        totals = torch.stack([total for _, total, _ in self.losses]).double().cpu()
        if not totals.isfinite().all():
            first = self.losses[int((~totals.isfinite()).nonzero()[0])]
            terms = {name: float(term) for name, term in first[2].items()}
            kept = "its last checkpoint is kept" if self.folder is not None else "nothing was written"
            raise M2MKDError(
                f"the loss at step {first[0]} is not finite (terms: {terms}); {kept}. Lower the learning rate (now "
                f"{self.config.learning_rate:g}), clip gradients more tightly (clip_grad, now "
                f"{self.config.clip_grad:g}), or use precision=float32"
            )
        progress = self.progress
        parts = self.losses[-1][2]
        progress.terms = {
            part: torch.stack([terms[part] for _, _, terms in self.losses]).double().mean().item() for part in parts
        }
        self.losses.clear()
        entry = {
            "step": progress.step,
            "loss": totals.mean().item(),
            "terms": progress.terms,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "flops": progress.flops,
        }
        if progress.gradient_share:
            entry["gradient_share"] = progress.gradient_share
        if self.folder is not None:
            self.guard()
            self.metrics.append(entry)
        if display is not None:
            display.update(name, progress.step, entry["loss"], entry["terms"], entry["images_per_second"])

    def _evaluate(self, evaluate: Evaluate) -> None:
        model = self.trainable if self.average is None or self.progress.step == 0 else self.average.module
        values = evaluate(model)
        if self.folder is not None and values:
            self.guard()
            cost = {"seconds": self.progress.seconds, "flops": self.progress.flops}
            self.metrics.append({"step": self.progress.step, **values, **cost})


def _gradient_share(loss: PairLoss, parameters: list[nn.Parameter]) -> dict[str, float]:
    """Norm of each term's own gradient over the sum of these norms: who pulls how hard, whatever the values are."""
    norms = {}
    for name, term in loss.terms.items():
        if not term.requires_grad:
            norms[name] = 0.0
            continue
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[name] = float(torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt())
    whole = sum(norms.values())
    return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}
