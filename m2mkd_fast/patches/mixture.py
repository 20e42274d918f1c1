"""A mixture of experts in the place of an MLP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.router import Router
from m2mkd_fast.nn.upcycle import upcycle
from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.patches.replacement import Replacement


def mixture(
    num_experts: int = 8, top_k: int = 2, *, upcycled: bool = True, noise: float = 0.0, **router: Any
) -> Mixture:
    """For :func:`m2mkd_fast.apply`: a :class:`~m2mkd_fast.nn.vision_moe.VisionMoE` in the place of an MLP.

    >>> m2mkd_fast.apply(vit, {"blocks.[13579].mlp": mixture(num_experts=8, top_k=2)})

    Upcycled experts start as copies of the MLP, fresh ones as new linear layers of its sizes; see
    :func:`m2mkd_fast.upcycle` for the MLPs that are known and what the layer then computes. The router is new and
    trains; the experts train where the MLP did. Its parameters are new ones: make the optimizer afterwards, and add
    :func:`m2mkd_fast.auxiliary_losses` to the loss where the router has any.

    Saving the patched model gives the mixture's names (``mlp.gate.gate.weight``, ``mlp.experts.htoh4.weight``, ...) and
    loading takes them. Loading also takes the dense model's state dict, strictly: every expert becomes a copy of the
    MLP in it, exactly, and the router stays as it is.

    Args:
        num_experts: E.
        top_k: experts a token chooses.
        upcycled: whether experts start from the MLP.
        noise: of upcycled experts; see :func:`m2mkd_fast.upcycle`.
        router: arguments of :class:`~m2mkd_fast.nn.router.Router`; its gate is ``"top_k_softmax"`` if not given.

    Raises:
        UnknownNameError: there is no such argument of the router.
        M2MKDError: noise for fresh experts.
    """
    options = inspect.signature(Router).parameters.values()
    known = {option.name for option in options if option.kind is option.KEYWORD_ONLY} - {"device", "dtype"}
    for name in router:
        if name not in known:
            raise UnknownNameError("option of the router", name, known)
    if noise and not upcycled:
        raise M2MKDError(f"noise is {noise}, but fresh experts differ anyway: leave it out, or say upcycled=True")
    return Mixture(num_experts, top_k, upcycled, noise, router)


@dataclass(frozen=True)
class Mixture(Replacement):
    """See :func:`mixture`."""

    num_experts: int
    top_k: int
    upcycled: bool
    noise: float
    router: Mapping[str, Any]

    shares_tensors = False

    def knows(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, "fc2", None), nn.Linear)

    def make(self, module: nn.Module) -> VisionMoE:
        moe = upcycle(module, self.num_experts, self.noise, top_k=self.top_k, **self.router)
        dense = _Dense.of(module)
        for name, layers in dense.layers.items():
            stacked = getattr(moe.experts, name)
            if not self.upcycled:
                stacked.reset_parameters()
            for key, parameter in stacked.named_parameters():
                sources = [getattr(module.get_submodule(layer), key) for layer in layers]
                parameter.requires_grad_(any(source.requires_grad for source in sources))
        moe.register_load_state_dict_pre_hook(partial(_upcycle_state, dense=dense))
        return moe


@dataclass(frozen=True)
class _Dense:
    """How the experts' tensors are made of those of an MLP."""

    layers: Mapping[str, tuple[str, ...]]
    """Of each layer of an expert, those of the MLP whose rows it has."""
    gates_first: bool
    """Whether the first layer's rows make gates, then values; the experts have them the other way round."""
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, mlp: nn.Module) -> _Dense:
        up = ("fc1_x", "fc1_g") if hasattr(mlp, "fc1_g") else ("fc1",)
        gated = up == ("fc1",) and mlp.fc1.out_features == 2 * mlp.fc2.in_features
        shapes = {name: tuple(tensor.shape) for name, tensor in mlp.state_dict().items()}
        return cls({"htoh4": up, "h4toh": ("fc2",)}, gated and not getattr(mlp, "gate_last", True), shapes)


def _upcycle_state(
    moe: VisionMoE,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
    *,
    dense: _Dense,
) -> None:
    """Make the state of a mixture of the state of the MLP in whose place it is.

    A state with some of the MLP's tensors only stays as it is; PyTorch names what is missing and what is too much.
    """
    if any(prefix + name not in state for name in dense.shapes):
        return
    wrong = {name: shape for name, shape in dense.shapes.items() if state[prefix + name].shape != shape}
    errors += [
        f"size mismatch for {prefix}{name}: copying a param with shape {tuple(state[prefix + name].shape)} from "
        f"checkpoint, the shape of the MLP that this mixture replaced is {shape}."
        for name, shape in wrong.items()
    ]
    if wrong:
        return
    mlp = {name: state.pop(prefix + name) for name in dense.shapes}
    for name, layers in dense.layers.items():
        for key, parameter in getattr(moe.experts, name).named_parameters():
            rows = torch.cat([mlp[f"{layer}.{key}"] for layer in layers])
            if name == "htoh4" and dense.gates_first:
                rows = torch.cat(rows.chunk(2)[::-1])
            # Memory of its own: with assign=True these become the parameters.
            state[f"{prefix}experts.{name}.{key}"] = rows.expand(parameter.shape[0], *rows.shape).clone()
    for key, parameter in moe.gate.named_parameters():
        state[f"{prefix}gate.{key}"] = parameter.detach()
