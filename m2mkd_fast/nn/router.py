"""Routers of vision mixtures: V-MoE's, m2mKD's, and experts that choose their tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.autocast import without_autocast
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.route import Assignment, Gate, capacity_of, route
from m2mkd_fast.ops.routing_losses import gshard_loss, importance_loss, load_loss, router_z_loss

# What the published models set, as keyword arguments of `Router` and `VisionMoE`.
ROUTERS: dict[str, dict[str, Any]] = {
    "m2mkd": {"gate": "top_k_softmax", "gate_bias": True},
    "vmoe": {
        "gate": "softmax_top_k",
        "noise_std": 1.0,
        "capacity_factor": 1.05,
        "eval_capacity_factor": 4.0,
        "group_size": 8,
        "importance_loss_weight": 0.005,
        "load_loss_weight": 0.005,
    },
}


class Routing(NamedTuple):
    """What a router decides for one batch."""

    assignment: Assignment
    """Of the batch's T tokens, in their order, to the experts."""
    losses: dict[str, Tensor]
    """Unweighted auxiliary losses (scalars, mean over groups) whose weight is not zero; empty in evaluation."""
    logits: Tensor
    """[G, S, E] without noise, in float32 or float64."""


class Router(nn.Module):
    r"""Linear router: ``logits = W x (+ b)``, then one of the gates of :func:`m2mkd_fast.ops.route.route`.

    V-MoE's router, ``Router(dim, E, **ROUTERS["vmoe"])``: softmax over all experts, then top-k, and the k gates as
    weights, not renormalised. In training, normal noise of standard deviation ``noise_std / E`` is added to the
    logits, for the choice and for the weights. Every group of ``group_size`` images is routed on its own, each expert
    offering it ``ceil(S k factor / E)`` slots, rounded up to a multiple of 4, for its S tokens.

    m2mKD's router, ``Router(dim, E, **ROUTERS["m2mkd"])``: biased logits, top-k, softmax over the k; nothing is
    dropped.

    Everything is computed in float32 at least, also under autocast. In evaluation there is no noise and there are no
    losses.

    Args:
        dim: width D of the tokens.
        num_experts: E.
        top_k: experts a token chooses.
        gate: ``"softmax_top_k"``, ``"top_k_softmax"`` or ``"experts_choose"``.
        gate_bias: whether the logits have a bias.
        noise_std: times ``1 / E``, the standard deviation of the noise in training.
        capacity_factor: in training; None drops nothing (``experts_choose`` needs a factor; top_k counts as 1 there).
        eval_capacity_factor: in evaluation; the one of training if not given.
        batch_priority: fill an expert's slots in the order of falling first-choice weight.
        group_size: images routed together; None for the whole batch. A smaller batch is one group.
        importance_loss_weight, load_loss_weight, gshard_loss_weight, z_loss_weight: see
            :mod:`m2mkd_fast.ops.routing_losses`; a loss of weight zero is not computed. The importance loss takes the
            softmax without noise, the GShard loss the one with noise, the load loss needs noise.

    State names: ``gate.weight [E, D]`` and, with a bias, ``gate.bias [E]``.

    Raises:
        M2MKDError: arguments that do not go together; in ``forward``, a batch that does not split into groups.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts"; Zhou et al. 2022,
    "Mixture-of-Experts with Expert Choice Routing"; Lo et al. 2024, "m2mKD".
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        gate: Gate = "softmax_top_k",
        gate_bias: bool = False,
        noise_std: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        batch_priority: bool = False,
        group_size: int | None = None,
        importance_loss_weight: float = 0.0,
        load_loss_weight: float = 0.0,
        gshard_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.kind, self.noise_std, self.batch_priority, self.group_size = gate, noise_std, batch_priority, group_size
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.loss_weights = {
            "importance": importance_loss_weight,
            "load": load_loss_weight,
            "gshard": gshard_loss_weight,
            "z": z_loss_weight,
        }
        self._check_arguments()
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        """Route ``[B, N, D]`` images of N tokens, or ``[T, D]`` tokens as one group.

        ``noise [G, S, E]``, standard normal, replaces the draw of training (and works in evaluation too).
        """
        groups = self._groups(x)
        logits = self._logits(x).view(groups, -1, self.num_experts)
        noise_std = self.noise_std / self.num_experts
        if noise is None and self.training and noise_std > 0:
            noise = torch.randn_like(logits)
        if noise is not None:
            noise = noise * noise_std
        assignment = route(
            logits,
            noise,
            top_k=self.top_k,
            gate=self.kind,
            capacity=self._capacity(logits.shape[1]),
            batch_priority=self.batch_priority,
        )
        return Routing(assignment, self._losses(logits, noise) if self.training else {}, logits)

    def auxiliary_loss(self, losses: dict[str, Tensor]) -> Tensor | None:
        """Weighted sum of the losses of a forward pass, None where there are none."""
        weighted = [self.loss_weights[name] * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum() if weighted else None

    def _logits(self, x: Tensor) -> Tensor:
        precision = torch.promote_types(torch.promote_types(x.dtype, self.gate.weight.dtype), torch.float32)
        with without_autocast(x):
            bias = None if self.gate.bias is None else self.gate.bias.to(precision)
            return F.linear(x.to(precision), self.gate.weight.to(precision), bias)

    def _groups(self, x: Tensor) -> int:
        if x.dim() not in (2, 3):
            raise M2MKDError(f"x has shape {tuple(x.shape)}; a router takes [images, tokens, width] or [tokens, width]")
        if x.dim() == 2 or self.group_size is None or x.shape[0] <= self.group_size:
            return 1
        # Only the slots and the losses see groups; where neither matters one group is the same, and any batch will do.
        slots_matter = self._factor() is not None and not self._never_full(self.group_size * x.shape[1])
        if not slots_matter and not (self.training and any(self.loss_weights.values())):
            return 1
        if x.shape[0] % self.group_size == 0:
            return x.shape[0] // self.group_size
        raise M2MKDError(
            f"a batch of {x.shape[0]} images does not split into groups of {self.group_size}: make the batch a "
            "multiple of group_size, drop the last partial batch, or build the router with group_size=None"
        )

    def _factor(self) -> float | None:
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def _never_full(self, tokens: int) -> bool:
        """Whether an expert has a slot for every token of a group."""
        return self.kind != "experts_choose" and self._slots(tokens) >= tokens

    def _slots(self, tokens: int) -> int:
        top_k = 1 if self.kind == "experts_choose" else self.top_k
        return capacity_of(tokens, top_k, self.num_experts, self._factor())

    def _capacity(self, tokens: int) -> int | None:
        if self._factor() is None or tokens == 0:
            return None
        if self.kind == "experts_choose":
            return min(self._slots(tokens), tokens)
        return None if self._never_full(tokens) else self._slots(tokens)

    def _losses(self, logits: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        losses = {}
        if self.loss_weights["importance"]:
            losses["importance"] = importance_loss(logits.softmax(dim=-1)).mean()
        if self.loss_weights["load"]:
            losses["load"] = load_loss(
                logits, noise, top_k=self.top_k, noise_std=self.noise_std / self.num_experts
            ).mean()
        if self.loss_weights["gshard"]:
            scores = logits if noise is None else logits + noise
            losses["gshard"] = gshard_loss(scores.softmax(dim=-1)).mean()
        if self.loss_weights["z"]:
            losses["z"] = router_z_loss(logits).mean()
        return losses

    def _check_arguments(self) -> None:
        if self.kind not in get_args(Gate):
            raise UnknownNameError("gate", self.kind, get_args(Gate))
        if self.num_experts < 1:
            raise M2MKDError(f"num_experts is {self.num_experts}; a router needs at least one")
        if not 1 <= self.top_k <= self.num_experts:
            raise M2MKDError(
                f"top_k is {self.top_k}; with {self.num_experts} experts it must be within 1 to {self.num_experts}"
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not factor > 0:
                raise M2MKDError(f"{name} is {factor}; it must be positive, or None to drop nothing")
        if self.kind == "experts_choose" and self.capacity_factor is None:
            raise M2MKDError("gate='experts_choose' needs a capacity_factor: how many tokens an expert takes")
        if self.kind == "experts_choose" and self.batch_priority:
            raise M2MKDError("batch_priority has no meaning with gate='experts_choose': leave it out")
        if self.group_size is not None and self.group_size < 1:
            raise M2MKDError(f"group_size is {self.group_size}; it must be at least 1, or None for the whole batch")
        if self.noise_std < 0:
            raise M2MKDError(f"noise_std is {self.noise_std}; it must not be negative")
        if self.loss_weights["load"] and (self.noise_std == 0 or self.kind == "experts_choose"):
            raise M2MKDError(
                f"load_loss_weight is {self.loss_weights['load']}, but the load loss is defined only for noisy routers "
                "whose tokens choose: set noise_std above 0 and another gate, or load_loss_weight=0"
            )

    def extra_repr(self) -> str:
        factors = f"{self.capacity_factor}, {self.eval_capacity_factor} in evaluation"
        return f"gate={self.kind}, top_k={self.top_k}, noise_std={self.noise_std}, capacity_factor={factors}"
