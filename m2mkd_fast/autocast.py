"""What autocast means for operators that run as one: the dtype of their products, and a region without it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast rounds this tensor to for a product; None where it does not.

    That is never so for float64, nor for tensors on the meta device, whose autocast PyTorch cannot be asked about.
    """
    if tensor.dtype == torch.float64 or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A region in which products of this tensor's device keep their dtype."""
    # The meta device has no autocast to switch off.
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
