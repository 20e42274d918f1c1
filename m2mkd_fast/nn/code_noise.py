"""Noise on codes while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CodeNoise(nn.Module):
    r"""Add noise uniform on :math:`\pm\alpha|c|`, element by element, while training; one draw for the whole batch.

    A code that is zero gets no noise. (The published layer raises an error on it, and waits for the device to check.)
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, codes: Tensor) -> Tensor:
        if not self.training:
            return codes
        return codes + self.alpha * codes.detach().abs() * (2.0 * torch.rand_like(codes) - 1.0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
