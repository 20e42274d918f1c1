"""Tensors of a module, whether one process has them whole or each of several a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each once: a model may carry one tensor under two names."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; every process that has a part of it has to ask."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def part_like(whole: Tensor, place: Tensor) -> Tensor:
    """What belongs where `place` is: the whole tensor itself, or the part of it that this process has of `place`."""
    if not isinstance(place, DTensor) or whole.shape != place.shape:
        return whole
    # Every process has the whole tensor, so none need send it.
    whole = whole.to(place.device_mesh.device_type)
    return distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None)


def fill(place: Tensor, whole: Tensor) -> None:
    """Copy the values of a whole tensor to where they belong."""
    with torch.no_grad():
        place.copy_(part_like(whole, place))
