"""Routers of vision mixtures: V-MoE's, m2mKD's, and experts that choose their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.autocast import without_autocast
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.philox import draw_seed
from m2mkd_fast.ops.route import LOSSES, Assignment, Gate, capacity_of, route

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

    Everything is computed in float32 at least, also under autocast. The noise comes from PyTorch's generator on the
    device of the tokens. In evaluation there is no noise and there are no losses; :func:`inference_routing` changes
    k, capacity and priority there.

    Args:
        dim: width D of the tokens.
        num_experts: E.
        top_k: experts a token chooses.
        gate: ``"softmax_top_k"``, ``"top_k_softmax"``, ``"sigmoid"`` (the chosen experts' weights are the sigmoids of
            their logits, not renormalised) or ``"experts_choose"``.
        gate_bias: whether the logits have a bias.
        noise_std: times ``1 / E``, the standard deviation of the noise in training.
        capacity_factor: in training; None, or ``math.inf``, drops nothing (``experts_choose`` needs a factor; top_k
            counts as 1 there).
        eval_capacity_factor: in evaluation; the one of training if not given.
        batch_priority: fill an expert's slots in the order of falling first-choice weight.
        group_size: images routed together; None for the whole batch. A smaller batch is one group.
        importance_loss_weight, load_loss_weight, gshard_loss_weight, z_loss_weight: see
            :mod:`m2mkd_fast.ops.routing_losses`; a loss of weight zero is not computed. The importance loss takes the
            softmax (or sigmoid) without noise, the GShard loss the one with noise, the load loss needs noise.

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
        # In evaluation; None is as in training. `inference_routing` sets them for a while.
        self.eval_capacity_factor = eval_capacity_factor
        self.eval_top_k: int | None = None
        self.eval_batch_priority: bool | None = None
        self.eval_group_size: int | None = None
        self.loss_weights = {
            "importance": importance_loss_weight,
            "load": load_loss_weight,
            "gshard": gshard_loss_weight,
            "z": z_loss_weight,
        }
        self._check_arguments()
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        """Route ``[B, ..., D]`` images of tokens (``[B, N, D]``, ``[B, H, W, D]``), or ``[T, D]`` tokens as one group.

        ``noise [G, S, E]``, standard normal, replaces the draw of training (and works in evaluation too).
        """
        groups = self._groups(x)
        logits = self._logits(x).view(groups, -1, self.num_experts)
        noise_std, seed = self.noise_std / self.num_experts, None
        if noise is not None:
            noise = noise * noise_std
        elif self.training and noise_std > 0:
            # A seed rather than the noise: the operator draws it where it is used.
            seed = draw_seed(logits.device)
        wanted = [name for name in LOSSES if self.training and self.loss_weights[name]]
        assignment = route(
            logits,
            noise,
            top_k=self._in_force("top_k"),
            gate=self.kind,
            capacity=self._capacity(logits.shape[1]),
            batch_priority=self._in_force("batch_priority"),
            noise_std=0.0 if noise is None and seed is None else noise_std,
            seed=seed,
            losses=wanted,
        )
        means = dict(zip(LOSSES, assignment.losses.mean(dim=1).unbind(), strict=True)) if wanted else {}
        return Routing(assignment, {name: means[name] for name in wanted}, logits)

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
        if x.dim() < 2 or x.shape[-1] != self.gate.in_features:
            width = self.gate.in_features
            raise M2MKDError(
                f"x has shape {tuple(x.shape)}; this router takes [images, tokens, {width}] (or several dimensions of "
                f"tokens), or [tokens, {width}]"
            )
        size = self._in_force("group_size")
        # Only the slots and the losses see groups; where neither matters one group is the same, and any batch will do.
        losses_matter = self.training and any(self.loss_weights.values())
        if x.dim() == 2 or size is None or (self.drops_nothing and not losses_matter) or x.shape[0] <= size:
            return 1
        factor, tokens = self._in_force("capacity_factor"), size * x.shape[1:-1].numel()
        slots_matter = factor is not None and not self._never_full(tokens)
        if not slots_matter and not losses_matter:
            return 1
        if x.shape[0] % size == 0:
            return x.shape[0] // size
        remedy = "build the router with group_size=None"
        if not self.training:
            remedy += f", or evaluate inside inference_routing(model, group_size={x.shape[0]})"
        raise M2MKDError(
            f"a batch of {x.shape[0]} images does not split into groups of {size}: make the batch a multiple of "
            f"group_size, drop the last partial batch, or {remedy}"
        )

    def _in_force(self, option: str) -> Any:
        """The value of an option that may differ between training and evaluation."""
        changed = None if self.training else getattr(self, f"eval_{option}")
        return getattr(self, option) if changed is None else changed

    @property
    def drops_nothing(self) -> bool:
        """Whether experts have a slot for every token of any batch, as the router stands (training or evaluation)."""
        factor = self._in_force("capacity_factor")
        return self.kind != "experts_choose" and (
            factor is None or self._in_force("top_k") * factor >= self.num_experts
        )

    def _never_full(self, tokens: int) -> bool:
        """Whether an expert has a slot for every token of a group."""
        # First what holds for any number: asked for one, `torch.export` would tie the program to it.
        return self.drops_nothing or (self.kind != "experts_choose" and self._slots(tokens) >= tokens)

    def _slots(self, tokens: int) -> int:
        factor = self._in_force("capacity_factor")
        if math.isinf(factor):
            return tokens
        top_k = 1 if self.kind == "experts_choose" else self._in_force("top_k")
        return capacity_of(tokens, top_k, self.num_experts, factor)

    def _capacity(self, tokens: int) -> int | None:
        if self._in_force("capacity_factor") is None or tokens == 0:
            return None
        if self.kind == "experts_choose":
            return min(self._slots(tokens), tokens)
        return None if self._never_full(tokens) else self._slots(tokens)

    def _check_arguments(self) -> None:
        if self.kind not in get_args(Gate):
            raise UnknownNameError("gate", self.kind, get_args(Gate))
        if self.num_experts < 1:
            raise M2MKDError(f"num_experts is {self.num_experts}; a router needs at least one")
        _check_top_k(self.top_k, self.num_experts)
        _check_factor("capacity_factor", self.capacity_factor)
        _check_factor("eval_capacity_factor", self.eval_capacity_factor)
        if self.kind == "experts_choose" and self.capacity_factor is None:
            raise M2MKDError("gate='experts_choose' needs a capacity_factor: how many tokens an expert takes")
        if self.kind == "experts_choose" and self.batch_priority:
            raise M2MKDError(_NO_MEANING.format("batch_priority"))
        _check_group_size(self.group_size)
        if self.noise_std < 0:
            raise M2MKDError(f"noise_std is {self.noise_std}; it must not be negative")
        if self.loss_weights["load"] and (self.noise_std == 0 or self.kind == "experts_choose"):
            raise M2MKDError(
                f"load_loss_weight is {self.loss_weights['load']}, but the load loss is defined only for noisy routers "
                "whose tokens choose: set noise_std above 0 and another gate, or load_loss_weight=0"
            )

    def extra_repr(self) -> str:
        factors = f"{self.capacity_factor}"
        if self.eval_capacity_factor is not None:
            factors += f" ({self.eval_capacity_factor} in evaluation)"
        return f"gate={self.kind}, top_k={self.top_k}, noise_std={self.noise_std}, capacity_factor={factors}"


@contextmanager
def inference_routing(
    model: nn.Module,
    *,
    top_k: int | None = None,
    capacity_factor: float | None = None,
    batch_priority: bool | None = None,
    group_size: int | None = None,
) -> Iterator[None]:
    """Inside a ``with`` block, route with other numbers than the model was trained with; in evaluation mode only.

    This is how V-MoE trades quality against compute after training: fewer experts a token (or more), and, with batch
    priority, a capacity so small that only the most important tokens are processed. It holds for every
    :class:`Router` of the model while it is in evaluation mode, and is undone at the end. What is None stays as it is.
    A captured CUDA graph keeps the routing it was captured with; ``torch.compile`` compiles again.

    >>> with inference_routing(model.eval(), top_k=1, capacity_factor=0.5, batch_priority=True):
    ...     logits = model(images)

    Args:
        model: contains at least one :class:`Router`, for instance in a :class:`~m2mkd_fast.nn.vision_moe.VisionMoE`.
        top_k: experts a token chooses.
        capacity_factor: slots of each expert as a multiple of an even share of all choices (which ``top_k`` changes
            too); ``math.inf`` drops nothing.
        batch_priority: whether important tokens come first where slots run out.
        group_size: images that share slots; a batch of no more than that is one group, whatever its size.

    Raises:
        M2MKDError: there is no router, or one of them cannot do what is asked for. Nothing has been changed then.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", section 4.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if not routers:
        raise M2MKDError(
            f"inference_routing found no Router in this {type(model).__name__}; give it a model with VisionMoE layers"
        )
    options = {
        "top_k": top_k,
        "capacity_factor": capacity_factor,
        "batch_priority": batch_priority,
        "group_size": group_size,
    }
    given = {f"eval_{name}": value for name, value in options.items() if value is not None}
    _check_factor("capacity_factor", capacity_factor)
    _check_group_size(group_size)
    for name, router in routers.items():
        if top_k is not None:
            _check_top_k(top_k, router.num_experts, f" in {name}" if name else "")
        for option in ("top_k", "batch_priority"):
            if router.kind == "experts_choose" and options[option]:
                raise M2MKDError(_NO_MEANING.format(option) + (f" ({name})" if name else ""))
    before = [(router, {name: getattr(router, name) for name in given}) for router in routers.values()]
    try:
        for router in routers.values():
            vars(router).update(given)
        yield
    finally:
        for router, own in before:
            vars(router).update(own)


_NO_MEANING = "{} has no meaning with gate='experts_choose': leave it out"


def _check_top_k(top_k: int, experts: int, where: str = "") -> None:
    if not 1 <= top_k <= experts:
        raise M2MKDError(f"top_k is {top_k}; with {experts} experts{where} it must be within 1 to {experts}")


def _check_factor(name: str, factor: float | None) -> None:
    if factor is not None and not factor > 0:
        raise M2MKDError(f"{name} is {factor}; it must be positive, or math.inf to drop nothing")


def _check_group_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise M2MKDError(f"group_size is {size}; it must be at least 1 (the number of images for one group)")
