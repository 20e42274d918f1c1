"""What a training run changes as it goes: weights, optimiser, average, loss scale; as tensors by name, and back."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from m2mkd_fast.errors import M2MKDError


class TrainingState:
    """Everything that a run needs to go on with the same bits, beside (seed, step): both ways, strictly.

    The learning rate, the order of batches and every random draw are functions of the seed and the step.

    Args:
        model: the trainable module.
        optimizer: of its parameters.
        average: moving average of the model, or None.
        scaler: scale of fp16's losses, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: ModelEmaV3 | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.modules = {"model": model} | ({} if average is None else {"average": average.module})

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name (``model.*``, ``average.*``, ``optimizer.*``, ``group.*``; not copied), and facts as JSON
        holds them."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in _own_tensors(module).items()
        }
        scalars: dict[str, Any] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars[f"{index}.{name}"] = value
        # Some optimisers count their steps in the parameter groups, as a number or as a tensor.
        groups = []
        for index, group in enumerate(self.optimizer.param_groups):
            groups.append({name: value for name, value in group.items() if isinstance(value, bool | int | float)})
            tensors |= {f"group.{index}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        facts = {"scalars": scalars, "groups": groups}
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Put captured tensors and facts back in place.

        Raises:
            M2MKDError: they are of another model, optimiser or precision; then nothing has been changed.
        """
        states = {prefix: _inside(prefix, tensors) for prefix in self.modules}
        for prefix, module in self.modules.items():
            _check_fit(prefix, _own_tensors(module), states[prefix])
        groups = facts["groups"]
        if len(groups) != len(self.optimizer.param_groups) or ("scaler" in facts) != (self.scaler is not None):
            raise M2MKDError(
                f"the checkpoint holds an optimiser with {len(groups)} parameter groups and "
                f"{'a' if 'scaler' in facts else 'no'} loss scale, this run has {len(self.optimizer.param_groups)} and "
                f"{'one' if self.scaler is not None else 'none'}: it is a checkpoint of another optimiser"
            )
        with torch.no_grad():
            for prefix, module in self.modules.items():
                for name, tensor in _own_tensors(module).items():
                    tensor.copy_(states[prefix][name])
        self._restore_optimizer(tensors, facts["scalars"], groups)
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])

    def _restore_optimizer(
        self, tensors: dict[str, Tensor], scalars: dict[str, Any], groups: list[dict[str, Any]]
    ) -> None:
        state: dict[int, dict[str, Any]] = {}
        for key, value in (_inside("optimizer", tensors) | scalars).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer = self.optimizer
        merged = [now | kept for now, kept in zip(optimizer.state_dict()["param_groups"], groups, strict=True)]
        for key, value in _inside("group", tensors).items():
            index, name = key.split(".", 1)
            merged[int(index)][name] = value
        optimizer.load_state_dict({"state": state, "param_groups": merged})


def _inside(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def _check_fit(prefix: str, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for name in dict.fromkeys([*own, *given]):
        here = list(own[name].shape) if name in own else "missing"
        there = list(given[name].shape) if name in given else "missing"
        if here != there:
            raise M2MKDError(
                f"the checkpoint holds another model: {prefix}.{name} is {there} in it and {here} in this run"
            )


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each once: a model may carry one tensor under two names."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())
