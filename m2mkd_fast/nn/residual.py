"""The end of a residual branch: its last product, layer scale and path drop, as in timm, without importing timm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_fast.autocast import autocast_dtype
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.modulated_linear import ModulatedLinear


class LayerScale(nn.Module):
    """Per-channel learned scale; ``initial_value=None`` leaves the input alone."""

    def __init__(self, dim: int, initial_value: float | None = 1e-6) -> None:
        super().__init__()
        self.gamma = None if initial_value is None else nn.Parameter(torch.full((dim,), float(initial_value)))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if self.gamma is None else self.gamma * inputs


class DropPath(nn.Module):
    """Drop the branch of a whole image with some probability while training, and scale up those that are kept."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise M2MKDError(f"a path drop probability must be at least 0 and below 1, got {probability}")
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.draw(branch) if self.drops else branch

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.probability > 0.0 and self.training

    def draw(self, branch: Tensor) -> Tensor:
        """What each image's branch is multiplied with while training, ``[B, 1, ..., 1]``: zero, or 1 / (1 - p)."""
        keep = 1.0 - self.probability
        return branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def add_branch(
    states: Tensor | None,
    scaled: Tensor,
    layer: ModulatedLinear,
    layer_scale: LayerScale,
    drop_path: DropPath | None = None,
) -> Tensor:
    r"""``states + drop_path(layer_scale(layer.project(scaled)))`` in few passes over memory.

    .. math::
        y_b = x_b + d_b\, \gamma \circ (W z_b + b) = x_b + d_b \big((\gamma W) z_b + \gamma b\big)

    Layer scale is multiplied into the weight, which is smaller than the states of a batch: no pass over the branch, nor
    over its gradient, and the branch is not kept for the gradient of gamma. In half precision that is exact to the same
    rounding as before; float16 alone, whose range :math:`\gamma W` could leave, keeps gamma apart.

    Args:
        states: x ``[B, N, out_features]``, or None for the branch alone.
        scaled: z ``[B, N, in_features]``, the input of ``layer`` times its scale.
        layer: W and b.
        layer_scale: gamma.
        drop_path: d, for every image; None where no branch is ever dropped.
    """
    gamma = layer_scale.gamma
    drops = drop_path is not None and drop_path.drops
    apart = gamma is not None and torch.float16 in (autocast_dtype(scaled), scaled.dtype)
    if states is not None and not apart and not drops and _adds_in_place(states, scaled, layer):
        weight, bias = layer.weight_and_bias(gamma)
        rows = states.flatten(0, 1)
        rows = rows.clone() if bias is None else rows + bias
        return rows.addmm_(layer.normalized(scaled).flatten(0, 1), weight.t()).view_as(states)
    branch = layer.project(scaled, None if apart else gamma)
    if states is None:
        branch = gamma * branch if apart else branch
        return drop_path(branch) if drops else branch
    factor = gamma if apart else None
    if drops:
        drawn = drop_path.draw(states)
        factor = drawn if factor is None else drawn * factor
    return states + branch if factor is None else torch.addcmul(states, branch, factor)


def _adds_in_place(states: Tensor, scaled: Tensor, layer: ModulatedLinear) -> bool:
    """Whether the product may add to the states by itself: on the CPU, in one precision, and nothing is to be kept."""
    return (
        not torch.is_grad_enabled()
        and states.device.type == "cpu"
        and states.dim() == 3
        and states.dtype == scaled.dtype == layer.native_weight.dtype
        and autocast_dtype(scaled) is None
    )
