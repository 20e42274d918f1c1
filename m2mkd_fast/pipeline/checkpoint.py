"""Checkpoints inside a phase: weights, optimiser and average in one safetensors file, the rest as its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError

NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a phase has come and what it has cost. Losses and gradient shares are those last logged."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    flops_per_step: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer, average: ModelEmaV3 | None
) -> None:
    """Replace the folder's checkpoint in one step."""
    tensors, scalars = _state(model, optimizer, average)
    # Some optimisers count their steps in the parameter groups, as a number or as a tensor.
    groups = [
        {name: value for name, value in group.items() if isinstance(value, bool | int | float)}
        for group in optimizer.param_groups
    ]
    for index, group in enumerate(optimizer.param_groups):
        tensors |= {f"group.{index}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
    metadata = {
        "progress": json.dumps(asdict(progress)),
        "scalars": json.dumps(scalars),
        "groups": json.dumps(groups),
    }
    write_atomically(folder / NAME, lambda path: save_file(tensors, path, metadata))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, average: ModelEmaV3 | None) -> Progress:
    """Restore the folder's checkpoint in place; a fresh :class:`Progress` where there is none."""
    path = folder / NAME
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        progress = Progress(**json.loads(metadata["progress"]))
        scalars, groups = json.loads(metadata["scalars"]), json.loads(metadata["groups"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise M2MKDError(
            f"{path} is truncated or no checkpoint of this package ({error}); delete it to start this step from its "
            "beginning, the other steps are kept"
        ) from error
    modules = {"model": model, "average": average.module if average is not None else None}
    for prefix, module in modules.items():
        if module is None:
            continue
        start = f"{prefix}."
        state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        names = _own_tensors(module)
        fits = state.keys() == names.keys() and all(state[name].shape == names[name].shape for name in names)
        if not fits or len(groups) != len(optimizer.param_groups):
            raise M2MKDError(
                f"{path} holds a checkpoint of another model or optimiser; delete it to start this step from its "
                "beginning"
            )
        with torch.no_grad():
            for name, tensor in names.items():
                tensor.copy_(state[name])
    _restore_optimizer(optimizer, tensors, scalars, groups)
    return progress


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each once: a model may carry one tensor under two names."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def _state(
    model: nn.Module, optimizer: Optimizer, average: ModelEmaV3 | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"model.{name}": tensor for name, tensor in _own_tensors(model).items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in _own_tensors(average.module).items()}
    scalars = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scalars


def _restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            index, name = key.removeprefix("optimizer.").split(".", 1)
            state.setdefault(int(index), {})[name] = value
    for key, value in scalars.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    merged = [now | kept for now, kept in zip(optimizer.state_dict()["param_groups"], groups, strict=True)]
    for key, value in tensors.items():
        if key.startswith("group."):
            _, index, name = key.split(".", 2)
            merged[int(index)][name] = value
    optimizer.load_state_dict({"state": state, "param_groups": merged})
