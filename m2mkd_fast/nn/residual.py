"""The two small layers at the end of a residual branch, as in timm, without importing timm (and torchvision)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError


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
        if self.probability == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.probability
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(keep)
        return branch * (mask / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
