"""This package's mixture in the place of fastmoe's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache
from m2mkd_fast.nn.expert_mlp import ExpertMLP, activation_name
from m2mkd_fast.nn.router import Router
from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.ops.expert_mlp import Activation, expert_mlp
from m2mkd_fast.ops.route import Assignment
from m2mkd_fast.patches.replacement import Replacement, is_from, share_tensors


def fastmoe_mlp() -> FastMoE:
    """For :func:`m2mkd_fast.apply`: :class:`~m2mkd_fast.nn.vision_moe.VisionMoE` for fastmoe's ``FMoETransformerMLP``.

    >>> m2mkd_fast.apply(vmoe, {"blocks.*.moe": fastmoe_mlp()})

    The layer has the very parameters, under the same names (those of fastmoe to 1.0.0, which stacks its experts, and
    since 1.0.1, which keeps a list of them), and computes the same: biased logits, top-k, softmax over the k, nothing
    dropped. The router works in float32 at least, also where the stock one would round its logits to half precision;
    a token whose k-th and next expert differ by less than that may get the other one.
    ``layer.gate.get_loss()`` answers with zero, as that of the stock gate does. Experts in a list are stacked in every
    training step, and once in evaluation, which keeps a second copy of them.

    Gates other than ``NaiveGate``, gate hooks, masks, activations other than GELU, and layers on several devices or
    workers (``world_size``, ``slice_group``) are refused. For other gates build the model with VisionMoE, whose router
    has capacities, noise and losses.
    """
    return FastMoE()


class FastMoE(Replacement):
    """See :func:`fastmoe_mlp`."""

    def knows(self, module: nn.Module) -> bool:
        return is_from(module, "fmoe", "FMoETransformerMLP")

    def make(self, module: nn.Module) -> VisionMoE:
        if not self.knows(module):
            raise M2MKDError(f"fastmoe_mlp() replaces fastmoe's FMoETransformerMLP, not a {type(module).__name__}")
        _check(module)
        listed = isinstance(module.experts, nn.ModuleList)
        experts = list(module.experts) if listed else [module.experts]
        bias = module.gate.gate.bias is not None
        weight = experts[0].htoh4.weight
        try:
            activation = activation_name(lambda: experts[0].activation)
        except M2MKDError as error:
            raise M2MKDError(f"cannot replace this FMoETransformerMLP: {error}") from error
        sizes = {"num_experts": module.num_expert, "top_k": module.top_k, "device": "meta"}
        layer = VisionMoE(module.d_model, weight.shape[1], act_layer=activation, **sizes)
        if listed:
            layer.experts = ExpertList(module.num_expert, module.d_model, weight.shape[1], activation)
        # The state dict of fastmoe's layer has the experts first.
        del layer.gate
        layer.gate = NaiveRouter(module.d_model, gate="top_k_softmax", gate_bias=bias, **sizes)
        share_tensors(module, layer.train(module.training))
        return layer


class NaiveRouter(Router):
    """The router that computes what ``NaiveGate`` does, and answers, as that does, that its loss is zero."""

    has_loss = True

    def get_loss(self, clear: bool = True) -> Tensor:
        """``[1]``, zero."""
        return self.gate.weight.new_zeros(1)


class ExpertList(CachesInEvaluation):
    """Experts whose parameters are not stacked: a list of single ones, as fastmoe's since 1.0.1.

    State names: ``<i>.htoh4.weight [1, H, D]``, ``<i>.htoh4.bias [1, H]``, ``<i>.h4toh.weight [1, D, H]``,
    ``<i>.h4toh.bias [1, D]``.
    """

    def __init__(self, num_experts: int, in_features: int, hidden_features: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        for index in range(num_experts):
            self.add_module(str(index), ExpertMLP(1, in_features, hidden_features, act_layer=activation, device="meta"))
        self._cache = EvaluationCache()

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """``[T, D]`` tokens and their assignment to ``[T, O]``."""
        single = list(self.children())
        names = [name for name, _ in single[0].named_parameters()]
        stacked = self._cache.get(
            list(self.parameters()),
            lambda: [torch.cat([expert.get_parameter(name) for expert in single]) for name in names],
        )
        return expert_mlp(x, assignment, *stacked, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def _check(layer: nn.Module) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise M2MKDError(f"cannot replace this FMoETransformerMLP: {what}; {remedy}")

    if type(layer.gate).__name__ != "NaiveGate":
        refuse(
            f"its gate is a {type(layer.gate).__name__}, not a NaiveGate",
            "build the model with VisionMoE, whose router has capacities, noise and losses of its own",
        )
    # Not every version of fastmoe has all of these.
    if getattr(layer, "gate_hook", None) is not None:
        refuse("it has a gate_hook, which would not be called", "build it without one; expert_load tells the load")
    if getattr(layer, "mask", None) is not None or getattr(layer, "mask_dict", None) is not None:
        refuse("it has a mask of tokens", "leave the layer out")
    slices = getattr(layer, "slice_size", getattr(layer, "mp_size", 1))
    if layer.world_size != 1 or slices != 1:
        refuse(
            f"world_size is {layer.world_size} and slice_size {slices}",
            "gather the experts into a model with world_size=1, and share them out with shard_experts",
        )
    experts = list(layer.experts) if isinstance(layer.experts, nn.ModuleList) else [layer.experts]
    activations = {str(getattr(expert, "activation", None)) for expert in experts}
    if len(activations) > 1:
        refuse(f"its experts have different activations ({', '.join(sorted(activations))})", "leave the layer out")
