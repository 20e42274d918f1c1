"""What a training run changes as it goes: weights, optimiser, average, loss scale; as tensors by name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.sharded_tensors import fill, own_tensors, part_like, whole_tensor

State = tuple[dict[str, Tensor], dict[str, Any]]


class TrainingState:
    """Everything that a run needs to go on with the same bits, beside (seed, step): both ways, strictly.

    The learning rate, the order of batches and every random draw are functions of the seed and the step.

    Where several processes share a step, tensors are gathered to process 0 and handed out from there. They are whole
    and go by the parameters' names, the optimiser's too, so any number of processes, with any strategy, goes on from
    what any other captured. (``torch.distributed.checkpoint.state_dict`` has no part in this: it makes a step of a new
    optimiser to learn its state, and not every optimiser of timm's stands that.)

    Args:
        model: the trainable module.
        optimizer: of its parameters.
        average: moving average of the model, or None.
        scaler: scale of fp16's losses, or None.
        execution: which processes share the step; one without.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: ModelEmaV3 | None = None,
        scaler: torch.amp.GradScaler | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.optimizer, self.scaler, self.execution = optimizer, scaler, execution
        self.modules = {"model": model} | ({} if average is None else {"average": average.module})

    @property
    def _alone(self) -> bool:
        return self.execution is None or self.execution.world == 1

    @property
    def _reads_and_writes(self) -> bool:
        return self.execution is None or self.execution.is_main

    def save(self, checkpoints: Checkpoints, step: int, facts: dict[str, Any]) -> None:
        """Write a checkpoint with these facts beside the state: process 0 does, and all have to call."""
        tensors, own = self.capture()
        if self._reads_and_writes:
            checkpoints.save(step, tensors, {**own, **facts})

    def load(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint and return its facts; None where there is none.

        Raises:
            M2MKDError: it is of another model, optimiser or precision.
        """
        content = checkpoints.load() if self._reads_and_writes else None
        facts = None if content is None else content[1]
        if not self._alone:
            facts = self.execution.broadcast(facts)
        if facts is None:
            return None
        try:
            self.restore({} if content is None else content[0], facts)
        except M2MKDError as error:
            raise M2MKDError(
                f"{checkpoints.folder}: {error}; delete it to start this step from its beginning, the other steps are "
                "kept"
            ) from error
        return facts

    def capture(self) -> State:
        """The tensors by name (``model.*``, ``average.*``, ``optimizer.*``, ``group.*``), and facts as JSON holds them.

        In one process the tensors are not copied. Of several, all have to call, and process 0 alone gets the tensors.
        """
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in own_tensors(module).items()
        }
        names, scalars = self._parameter_names(), {}
        state = self.optimizer.state_dict()
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{names[index]}.{key}"] = value
                else:
                    scalars[f"{names[index]}.{key}"] = value
        # Some optimisers count their steps in the parameter groups, as a number or as a tensor.
        groups = []
        for index, group in enumerate(state["param_groups"]):
            plain = {key: value for key, value in group.items() if isinstance(value, bool | int | float)}
            groups.append({"parameters": [names[i] for i in group["params"]], "values": plain})
            tensors |= {f"group.{index}.{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        facts = {"scalars": scalars, "groups": groups}
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        return self._gathered(tensors), facts

    def restore(self, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Put captured tensors and facts back in place. What processes other than 0 pass does not count.

        Raises:
            M2MKDError: they are of another model, optimiser or precision; then nothing has been changed.
        """
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if not self._alone:
            shapes, facts = self.execution.broadcast((shapes, facts))
        for prefix, module in self.modules.items():
            _check_fit(prefix, own_tensors(module), shapes)
        matching = self._matching_groups(facts)
        places = {
            f"{prefix}.{name}": place
            for prefix, module in self.modules.items()
            for name, place in own_tensors(module).items()
        }
        optimizer: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            whole = tensors[name] if self._alone else self._from_main(tensors.get(name), shape, dtype)
            if name in places:
                fill(places[name], whole)
            else:
                optimizer[name] = self._part(name, whole, places)
        self._restore_optimizer(optimizer, facts, matching)
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._alone:
            return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        gathered = {}
        for name, tensor in tensors.items():
            whole = whole_tensor(tensor)
            if self.execution.is_main:
                gathered[name] = whole.to("cpu", copy=True).contiguous()
        return gathered

    def _from_main(self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One tensor at a time: no process but 0 holds the whole state."""
        device = self.execution.accelerator.device
        whole = tensor.to(device) if self.execution.is_main else torch.empty(shape, dtype=dtype, device=device)
        whole = whole.contiguous()
        dist.broadcast(whole, src=0)
        return whole

    def _parameter_names(self) -> list[str]:
        """Names in the order in which the optimiser counts its parameters."""
        names = {id(tensor): name for name, tensor in own_tensors(self.modules["model"]).items()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    @staticmethod
    def _part(name: str, whole: Tensor, places: Mapping[str, Tensor]) -> Tensor:
        """An optimiser's tensor, sharded as the parameter is that it belongs to."""
        kind, _, rest = name.partition(".")
        return part_like(whole, places[f"model.{rest.rpartition('.')[0]}"]) if kind == "optimizer" else whole

    def _matching_groups(self, facts: dict[str, Any]) -> list[int]:
        """For each of the optimiser's groups a captured one with its values.

        A group is split by device meshes, so one may be in several parts here or there; parts have the same values.
        """
        names = self._parameter_names()
        captured = {name: index for index, group in enumerate(facts["groups"]) for name in group["parameters"]}
        same_scaler = ("scaler" in facts) == (self.scaler is not None)
        fits = captured.keys() == set(names) and same_scaler
        matching = []
        for group in self.optimizer.state_dict()["param_groups"] if fits else []:
            found = sorted({captured[names[index]] for index in group["params"]})
            values = [facts["groups"][index]["values"] for index in found]
            fits = fits and all(other == values[0] for other in values)
            matching.append(found[0] if found else 0)  # one without parameters takes any
        if not fits:
            raise M2MKDError(
                f"the checkpoint holds an optimiser of {len(captured)} parameters in {len(facts['groups'])} groups and "
                f"{'a' if 'scaler' in facts else 'no'} loss scale, this run has {len(names)} in "
                f"{len(self.optimizer.param_groups)} and {'one' if self.scaler is not None else 'none'}: it is a "
                "checkpoint of another optimiser"
            )
        return matching

    def _restore_optimizer(self, tensors: dict[str, Tensor], facts: dict[str, Any], matching: list[int]) -> None:
        index_of = {name: index for index, name in enumerate(self._parameter_names())}
        state: dict[int, dict[str, Any]] = {}
        for name, value in (_inside("optimizer", tensors) | facts["scalars"]).items():
            parameter, _, key = name.rpartition(".")
            state.setdefault(index_of[parameter], {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        for group, index in zip(groups, matching, strict=True):
            group |= facts["groups"][index]["values"] | _inside(f"group.{index}", tensors)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _inside(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _check_fit(prefix: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    given = _inside(prefix, shapes)
    for name in dict.fromkeys([*own, *given]):
        here = list(own[name].shape) if name in own else "missing"
        there = list(given[name][0]) if name in given else "missing"
        if here != there:
            raise M2MKDError(
                f"the checkpoint holds another model: {prefix}.{name} is {there} in it and {here} in this run"
            )
