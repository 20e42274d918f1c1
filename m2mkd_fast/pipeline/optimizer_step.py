"""One step of training: a batch in micro-batches, its gradients, optimiser and average; or nothing of it at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import Optimizer

from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.pipeline.config import TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.parallel_task import ParallelTask


class Outcome(NamedTuple):
    """What a step leaves for the log: values on the device, which the host reads later."""

    total: Tensor
    terms: dict[str, Tensor]
    left_out: Tensor  # bool: the loss or its gradient was not finite, and nothing has changed
    counts: Tensor  # bool: it was left out, and not to find the scale of fp16's gradients
    gradient_share: dict[str, float]


class OptimizerStep:
    """Trains one batch.

    The batch is cut into ``config.accumulate`` equal micro-batches, whose mean loss is differentiated. Where the loss
    averages over images, gradients are those of the whole batch; what is taken over a batch as a whole (the variance
    in the feature loss, a router's balance losses, batch norms) is that of each micro-batch.

    Where the loss or the norm of the gradient is not finite, the step is left out: weights, moments, average and
    buffers are as before it. On a GPU this happens there, without the host waiting, for optimisers that can
    (PyTorch's fused ones); for others, and on the CPU, the host looks.

    Args:
        task: what is trained.
        optimizer: of its trainable parameters.
        average: moving average of the trainable module, or None.
        scaler: scale of fp16's losses, or None.
        config: its ``accumulate`` and ``clip_grad``.
        execution: precision and processes.
    """

    def __init__(
        self,
        task: ParallelTask,
        optimizer: Optimizer,
        average: ModelEmaV3 | None,
        scaler: torch.amp.GradScaler | None,
        config: TrainingConfig,
        execution: Execution,
    ) -> None:
        self.task, self.optimizer, self.average, self.scaler = task, optimizer, average, scaler
        self.execution, self.accumulate = execution, config.accumulate
        self.largest_norm = config.clip_grad or math.inf
        self.buffers = list(task.trainable.buffers())
        amp = getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch.amp.GradScaler asks
        self.host_looks = execution.accelerator.device.type == "cpu" or not amp

    def __call__(self, t: int, inputs: Any, labels: Tensor, *, shares: bool = False) -> Outcome:
        """Train on one batch.

        Args:
            t: number of the step.
            inputs: what the task's forward pass takes first: a tensor or a tuple of tensors ``[B, ...]``.
            labels: ``[B]`` or ``[B, classes]``.
            shares: measure each term's share of the gradient, on the first micro-batch.
        """
        before = [buffer.clone() for buffer in self.buffers]
        self.optimizer.zero_grad(set_to_none=True)
        losses, gradient_share = [], {}
        for number, (some_inputs, some_labels) in enumerate(_micro_batches(inputs, labels, self.accumulate)):
            last = number == self.accumulate - 1
            with nullcontext() if last else self.task.accumulating():
                with self.execution.autocast():
                    loss = self.task(some_inputs, some_labels)
                if shares and number == 0 and len(loss.terms) > 1:
                    gradient_share = self._gradient_share(loss)
                self._backward(loss.total)
            losses.append(loss)
        total, terms = _mean(losses)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.task.clip_grad_norm_(self.largest_norm)
        left_out = counts = self.execution.any_process(~(total.isfinite() & norm.isfinite()))
        if self.scaler is not None:
            # Gradients too large for fp16 are how the scaler finds its scale, unless there is none to take back.
            unscaled = self.scaler.scale(torch.ones_like(total)) <= 1.0
            counts = left_out & (self.execution.any_process(~total.isfinite()) | unscaled)
        if self.host_looks:
            if left_out:
                for buffer, kept in zip(self.buffers, before, strict=True):
                    buffer.copy_(kept)
            else:
                self.optimizer.step()
                if self.average is not None:
                    self.average.update(self.task.trainable, step=t)
        else:
            self._step_on_device(t, left_out, before)
        if self.scaler is not None:
            self.scaler.update()
        return Outcome(total, terms, left_out, counts, gradient_share)

    def _backward(self, total: Tensor) -> None:
        if self.accumulate > 1:
            total = total / self.accumulate
        (total if self.scaler is None else self.scaler.scale(total)).backward()

    def _step_on_device(self, t: int, left_out: Tensor, before: list[Tensor]) -> None:
        """As the host would do it, decided on the device; ``left_out`` stays there."""
        # The two attributes by which torch.amp.GradScaler tells a fused optimiser the same.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, left_out.float()
        self.optimizer.step()
        for buffer, kept in zip(self.buffers, before, strict=True):
            buffer.copy_(torch.where(left_out, kept, buffer))
        if self.average is not None:
            weight = (1.0 - self.average.get_decay(t)) * (~left_out).float()
            now = self.task.trainable.state_dict().values()
            with torch.no_grad():
                for average, value in zip(self.average.module.state_dict().values(), now, strict=True):
                    if average.is_floating_point():
                        average.lerp_(value, weight.to(average.dtype))
                    else:
                        average.copy_(value)  # a buffer, which is as before the step where that is left out

    def _gradient_share(self, loss: PairLoss) -> dict[str, float]:
        """Norm of each term's own gradient over the sum of these norms: who pulls how hard, whatever the values are."""
        if not self.task.measures_gradient_share:
            return {}
        parameters = list(self.task.trainable.parameters())
        norms = {}
        for name, term in loss.terms.items():
            norms[name] = 0.0
            if term.requires_grad:
                scaled = term if self.scaler is None else self.scaler.scale(term)  # fp16 loses small gradients
                gradients = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
                norms[name] = self.task.gradient_norm(gradients)
        whole = sum(norms.values())
        return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}


def _micro_batches(inputs: Any, labels: Tensor, count: int) -> Iterator[tuple[Any, Tensor]]:
    if count == 1:
        yield inputs, labels
        return
    if isinstance(inputs, Tensor):
        pieces = inputs.chunk(count)
    else:
        pieces = zip(*(part.chunk(count) for part in inputs), strict=True)
    yield from zip(pieces, labels.chunk(count), strict=True)


def _mean(losses: list[PairLoss]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and terms of the micro-batches, without their graphs."""
    if len(losses) == 1:
        return losses[0].total.detach(), {name: term.detach() for name, term in losses[0].terms.items()}
    terms = {name: torch.stack([loss.terms[name].detach() for loss in losses]).mean() for name in losses[0].terms}
    return torch.stack([loss.total.detach() for loss in losses]).mean(), terms
