"""Statistics of a batch whose rows several processes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_shared = False


@contextmanager
def batch_shared_by_all() -> Iterator[None]:
    """Inside the block, batches are parts of equal size of one whole batch, a part in each process of the group."""
    global _shared
    before, _shared = _shared, True
    try:
        yield
    finally:
        _shared = before


def batch_variance(values: Tensor) -> Tensor:
    """Unbiased variance of all elements of the whole batch: ``values.var()``, or that of all processes' rows together.

    Without gradient where the batch is shared: it scales losses, and targets get none.
    """
    return _variance_over_processes(values) if _shared else values.var()


@torch.compiler.disable
def _variance_over_processes(values: Tensor) -> Tensor:
    values = values.detach()
    precision = torch.promote_types(values.dtype, torch.float32)
    count = values.numel() * dist.get_world_size()
    mean = _sum(values.sum(dtype=precision)) / count
    # Around the common mean: a difference of large squares would lose what is left of it.
    return (_sum((values.to(precision) - mean).square().sum()) / (count - 1)).to(values.dtype)


def _sum(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value
