"""A mixture of expert MLPs in the place of a transformer block's MLP, and what training reads from all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.expert_mlp import ExpertInit, ExpertMLP
from m2mkd_fast.nn.router import Router


class VisionMoE(nn.Module):
    """Sparse mixture of MLPs: every token goes through the experts that its router chose.

    ``y = sum over the chosen experts e of weight_e * MLP_e(x)``; a token all of whose choices were dropped gives
    zero. The first arguments are those of timm's ``Mlp``, so ``functools.partial(VisionMoE, num_experts=8)`` serves
    as a ``mlp_layer``. The others are :class:`~m2mkd_fast.nn.router.Router`'s; without any, the router is softmax,
    then top-k, without noise, dropping nothing. ``**ROUTERS["m2mkd"]`` and ``**ROUTERS["vmoe"]`` are the published
    routers. :func:`~m2mkd_fast.nn.upcycle.upcycle` makes the layer from a trained MLP, and
    :func:`~m2mkd_fast.nn.router.inference_routing` changes how a trained model routes.

    Under autocast the experts' products run in the autocast dtype and the router in float32; the result has the
    autocast dtype, like a linear layer's.

    State names are the published ones: ``gate.gate.{weight,bias}``, ``experts.{htoh4,h4toh}.{weight,bias}``; both
    kinds of FastMoE's names load, see :class:`~m2mkd_fast.nn.expert_mlp.ExpertMLP`.

    After each forward pass the layer holds, for :func:`auxiliary_losses` and :func:`expert_load`:

    - ``losses``: the router's unweighted losses by name, and ``auxiliary_loss``, their weighted sum (None where there
      is none, as in evaluation). Copies and pickles of the layer do not carry them.
    - ``rows_per_expert`` ``[E]``: kept assignments of each expert, on the layer's device.

    Args:
        in_features: D.
        hidden_features: H of each expert, D if not given.
        num_experts: E.
        top_k: experts a token chooses.
        out_features: O, D if not given.
        act_layer, bias, drop, expert_init: see :class:`~m2mkd_fast.nn.expert_mlp.ExpertMLP`.
        norm_layer: must be None; timm's ``Mlp`` has the argument, experts have no norm of their own.
        router: arguments of the router.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        norm_layer: None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        expert_init: ExpertInit = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise M2MKDError("experts have no norm between their layers: build the block without scale_mlp_norm")
        self.gate = Router(in_features, num_experts, top_k, device=device, dtype=dtype, **router)
        self.experts = ExpertMLP(
            num_experts,
            in_features,
            hidden_features,
            out_features,
            act_layer=act_layer,
            bias=bias,
            drop=drop,
            expert_init=expert_init,
            device=device,
            dtype=dtype,
        )
        self.losses: dict[str, Tensor] = {}
        self.auxiliary_loss: Tensor | None = None
        self.rows_per_expert: Tensor | None = None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[B, ..., D]`` images of tokens, or ``[T, D]``, to ``[B, ..., O]``; ``noise`` as for the router."""
        routing = self.gate(x, noise)
        self.losses = routing.losses
        self.auxiliary_loss = self.gate.auxiliary_loss(routing.losses)
        self.rows_per_expert = routing.assignment.offsets.diff()
        out = self.experts(x.reshape(-1, x.shape[-1]), routing.assignment)
        return out.view(*x.shape[:-1], out.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        # What the last batch left belongs to its autograd graph, which can be neither copied nor pickled.
        return {**self.__dict__, "losses": {}, "auxiliary_loss": None, "rows_per_expert": None}


def auxiliary_losses(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all mixture layers in the model's last forward pass, to be added to the task loss.

    Each layer's losses come weighted with its router's weights and averaged over groups. The result is a scalar,
    and zero where no layer has any: in evaluation, for m2mKD routers, and for models without mixtures.

    Example:
        >>> loss = F.cross_entropy(model(images), labels) + auxiliary_losses(model)
    """
    losses = [layer.auxiliary_loss for _, layer in _mixtures(model) if layer.auxiliary_loss is not None]
    if losses:
        return torch.stack(losses).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def expert_load(model: nn.Module) -> dict[str, list[float]]:
    """Each expert's share of the assignments that its layer kept in the last forward pass, by the name of the block.

    The shares of a block add up to 1 (all zero for a batch without tokens); even use is ``1 / E``. Reading them waits
    for the device, so do it when reporting, not in every step. Layers that have not run yet are left out.

    Example:
        >>> expert_load(model)
        {'blocks.1': [0.26, 0.24, 0.25, 0.25], 'blocks.3': [0.5, 0.5, 0.0, 0.0]}
    """
    load = {}
    for name, layer in _mixtures(model):
        if layer.rows_per_expert is not None:
            rows = layer.rows_per_expert.tolist()
            load[name.rpartition(".")[0] or name] = [count / max(sum(rows), 1) for count in rows]
    return load


def _mixtures(model: nn.Module) -> Iterator[tuple[str, VisionMoE]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, VisionMoE))
