"""The training loop: one task, one configuration, resumable at any checkpoint with the same result to the last bit."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_fast.data.batches import train_batches
from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.seeds import derive_seed
from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.files import MetricsFile
from m2mkd_fast.pipeline.progress import Progress as ProgressReport

LOG_EVERY = 10
_FUSED = ("adam", "adamw", "sgd")  # optimisers of torch that update all parameters in one call

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Execution:
    """Where and how a step computes: what does not belong to the result's meaning."""

    device: str = "auto"
    precision: str = "auto"

    @property
    def accelerator(self) -> Accelerator:
        return _accelerator(self.device)

    def autocast(self) -> torch.autocast:
        """bf16 where it was asked for, or where ``auto`` finds a GPU that computes in it natively."""
        device = self.accelerator.device.type
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = self.precision == "bf16" or (self.precision == "auto" and native)
        return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


@functools.cache
def _accelerator(device: str) -> Accelerator:
    cuda = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu") and not cuda:
        raise M2MKDError(f"device {device!r} was asked for, but torch sees no CUDA device; set device=cpu or auto")
    return Accelerator(cpu=not cuda)


@dataclass
class FitResult:
    """What a training run cost and where it ended."""

    steps: int
    images: int
    seconds: float
    flops: float
    terms: dict[str, float] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)


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

    Raises:
        M2MKDError: the loss is not finite, the disk is full, or the checkpoint in ``folder`` is damaged or foreign.
    """
    run = _Run(task, split, config, seed, data or DataConfig(augmentation="none"), execution or Execution(), folder)
    return run.train(evaluate, progress, name)


class _Run:
    def __init__(
        self,
        task: Task,
        split: Split,
        config: TrainingConfig,
        seed: int,
        data: DataConfig,
        execution: Execution,
        folder: Path | None,
    ) -> None:
        self.split, self.config, self.seed, self.data, self.folder = split, config, seed, data, folder
        self.execution, self.accelerator = execution, execution.accelerator
        fused = {"fused": True} if config.optimizer in _FUSED else {}
        optimizer = create_optimizer_v2(
            task.trainable, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay, **fused
        )
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(config.steps, 1),
            warmup_t=round(config.warmup * config.steps),
            warmup_lr_init=config.learning_rate / 100,
            t_in_epochs=False,
        )
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.average = ModelEmaV3(task.trainable, decay=config.ema_decay) if config.ema_decay else None
        self.mixup = (
            Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=split.num_classes)
            if config.mixup or config.cutmix
            else None
        )
        self.progress = Progress()
        if folder is not None:
            self.progress = load_checkpoint(folder, task.trainable, optimizer, self.average)
            self.metrics = MetricsFile(folder / "metrics.jsonl", keep_until=self.progress.step)
        self.losses: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    @property
    def trainable(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.task).trainable

    def train(self, evaluate: Evaluate | None, display: ProgressReport | None, name: str) -> FitResult:
        config, progress = self.config, self.progress
        if display is not None:
            display.start(name, config.steps, progress.step)
        if progress.step == 0 and evaluate is not None:
            self._evaluate(evaluate)
        batches = train_batches(
            self.split,
            batch_size=config.batch_size,
            seed=self.seed,
            start=progress.step,
            stop=config.steps,
            augmentation=self.data.augmentation,
            num_workers=self.data.num_workers,
        )
        for t, (images, labels) in zip(itertools.count(progress.step), batches, strict=False):
            started = time.perf_counter()
            shares = (t + 1) % config.evaluate_every == 0
            self._step(t, images.to(self.accelerator.device), labels.to(self.accelerator.device), shares)
            progress.step = t + 1
            progress.images += len(images)
            progress.flops += progress.flops_per_step
            progress.seconds += time.perf_counter() - started
            evaluates = evaluate is not None and self._due(config.evaluate_every)
            saves = self.folder is not None and self._due(config.checkpoint_every)
            if evaluates or saves or self._due(LOG_EVERY):
                self._log(display, name)  # first, since it stops the run before a loss that is not finite does harm
            if evaluates:
                self._evaluate(evaluate)
            if saves:
                save_checkpoint(self.folder, progress, self.trainable, self.optimizer.optimizer, self.average)
        if self.average is not None:
            self.trainable.load_state_dict(self.average.module.state_dict())
        return FitResult(
            progress.step, progress.images, progress.seconds, progress.flops, progress.terms, progress.gradient_share
        )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _step(self, t: int, images: Tensor, labels: Tensor, shares: bool) -> None:
        step_seed = derive_seed(self.seed, "step", t)
        torch.manual_seed(step_seed)
        np.random.seed(step_seed)
        random.seed(step_seed)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        self.scheduler.step_update(t)
        self.task.train()
        if self.progress.flops_per_step:
            loss = self._backward(images, labels, shares)
        else:
            with FlopCounterMode(display=False) as counter:
                loss = self._backward(images, labels, False)
            self.progress.flops_per_step = float(counter.get_total_flops())
        if self.config.clip_grad:
            self.accelerator.clip_grad_norm_(self.trainable.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.trainable, step=t)
        self.losses.append((t, loss.total.detach(), {name: term.detach() for name, term in loss.terms.items()}))

    def _backward(self, images: Tensor, labels: Tensor, shares: bool) -> PairLoss:
        self.optimizer.zero_grad()
        with self.execution.autocast():
            loss = self.task(images, labels)
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
            self.metrics.append(entry)
        if display is not None:
            display.update(name, progress.step, entry["loss"], entry["terms"], entry["images_per_second"])

    def _evaluate(self, evaluate: Evaluate) -> None:
        model = self.trainable if self.average is None or self.progress.step == 0 else self.average.module
        values = evaluate(model)
        if self.folder is not None and values:
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
