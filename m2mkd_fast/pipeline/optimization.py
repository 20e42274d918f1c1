"""How weights move: optimiser and learning rate over the steps."""

from __future__ import annotations

from collections.abc import Callable

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from m2mkd_fast.pipeline.config import TrainingConfig

_FUSED = ("adam", "adamw", "sgd")  # optimisers of torch that update all parameters in one call

LearningRateFactor = Callable[[int], float]


def create_optimizer(trainable: nn.Module, config: TrainingConfig) -> Optimizer:
    """timm's optimiser of that name; no weight decay on norms, biases and what the model excepts itself.

    With ``layer_decay`` d < 1 layer j of n learns at the rate times :math:`d^{n-1-j}`; the model's ``group_matcher``
    says what its layers are, from the stem to the head.
    """
    fused = {"fused": True} if config.optimizer in _FUSED else {}
    return create_optimizer_v2(
        trainable,
        opt=config.optimizer,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay if config.layer_decay < 1.0 else None,
        **fused,
    )


class LearningRate:
    r"""The learning rate of step t, a function of t alone: nothing of it need be saved.

    Args:
        optimizer: whose parameter groups get it, each times its ``lr_scale`` where it has one.
        config: its ``learning_rate`` :math:`\eta`, ``steps`` and ``warmup``.
        factor: :math:`f(t)`, the rate is then :math:`\eta f(t)`; None for timm's cosine to 0 after a linear warm-up
            from :math:`\eta / 100`.
    """

    def __init__(self, optimizer: Optimizer, config: TrainingConfig, factor: LearningRateFactor | None = None) -> None:
        self.optimizer, self.peak, self.factor = optimizer, config.learning_rate, factor
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=max(config.steps, 1),
            warmup_t=round(config.warmup * config.steps),
            warmup_lr_init=config.learning_rate / 100,
            t_in_epochs=False,
        )

    def set(self, t: int) -> None:
        """Give all groups the rate of step t."""
        if self.factor is None:
            self.cosine.step_update(t)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * self.factor(t) * group.get("lr_scale", 1.0)

    @property
    def value(self) -> float:
        """The rate that is set now, of parameters without a scale of their own."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)
