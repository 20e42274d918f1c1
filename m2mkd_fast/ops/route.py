"""Which tokens go to which experts: from router logits to one expert-sorted list of (token, expert, weight)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import device_reason, select_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError

Gate = Literal["softmax_top_k", "top_k_softmax", "experts_choose"]


class Assignment(NamedTuple):
    """The expert-sorted assignment of T = G*S tokens in N rows.

    ``N = T * top_k``; for experts_choose ``N = G * E * capacity``.

    The rows of expert e are ``offsets[e] : offsets[e + 1]``, ordered by group and then by slot. Rows from
    ``offsets[-1]`` on stand for dropped choices and have fixed contents: token 0, expert E-1, weight 0 and no gradient.
    So shapes depend on the input's shape alone, and nothing has to be read back from the device.
    """

    token: Tensor
    """[N] int64, index into the T tokens (group-major)."""
    expert: Tensor
    """[N] int64."""
    weight: Tensor
    """[N], combine weight; differentiable."""
    offsets: Tensor
    """[E + 1] int64, first row of each expert, then the number of rows in use."""
    place: Tensor
    """[T, K] int64, row of each of a token's choices, -1 where it was dropped; [T, 0] for experts_choose."""
    gates: Tensor
    """[G, S, E], the softmax the weights were taken from; differentiable."""


def capacity_of(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Rows an expert offers to one group: ``ceil(tokens * top_k * factor / experts)``, rounded up to a multiple of 4.

    Args:
        tokens: tokens in a group.
        top_k: choices a token makes; 1 where experts choose.
        experts: number of experts.
        factor: capacity factor; V-MoE trains with 1.05, fine-tunes with 1.5.

    Raises:
        M2MKDError: an argument is not positive.

    Source: google-research/vmoe, ``compute_capacity``.
    """
    if tokens < 1 or top_k < 1 or experts < 1 or not factor > 0:
        raise M2MKDError(
            f"capacity_of(tokens={tokens}, top_k={top_k}, experts={experts}, factor={factor}): "
            "every argument must be positive"
        )
    return 4 * math.ceil(math.ceil(tokens * top_k * factor / experts) / 4)


def route(
    logits: Tensor,
    noise: Tensor | None = None,
    *,
    top_k: int,
    gate: Gate = "softmax_top_k",
    capacity: int | None = None,
    batch_priority: bool = False,
) -> Assignment:
    """Assign tokens to experts, group by group, and sort the assignment by expert.

    With scores ``h = logits + noise``:

    - ``softmax_top_k`` (V-MoE): ``gates = softmax_e(h)``; a token takes the ``top_k`` experts with the largest gate,
      and their gates as weights, not renormalised.
    - ``top_k_softmax`` (m2mKD): a token takes the ``top_k`` experts with the largest score; weights are the softmax
      over these scores. ``gates`` holds them, and zero for the other experts.
    - ``experts_choose``: ``gates = softmax_e(h)``; within each group every expert takes the ``capacity`` tokens with
      the largest gate for it. ``top_k`` is not used.

    Where tokens choose, an expert fills its slots with all first choices before any second one, in token order, or,
    with ``batch_priority``, in the order of falling first-choice weight. Choices beyond ``capacity`` slots are dropped;
    the other weights stay as they are. Ties go to the lower index; NaN counts as the largest value.

    Args:
        logits: [G, S, E], or [S, E] for one group. Half precisions are computed in float32.
        noise: same shape, added as it is: scale it first (V-MoE in training: standard normal times ``1 / E``).
        top_k: choices a token makes, 1 to E.
        gate: see above.
        capacity: slots each expert has for one group; ``None`` drops nothing. Needed for ``experts_choose``, at most S
            there.
        batch_priority: fill slots by importance of the token rather than by its position.

    Returns:
        The assignment; ``weight`` and ``gates`` are differentiable with respect to ``logits`` and ``noise``.

    Raises:
        M2MKDError: a shape, dtype or number is not as described above.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", eq. 2 and section 4 (batch priority);
    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing"; Lo et al. 2024, "m2mKD".
    """
    scores = _checked_scores(logits, noise, top_k, gate, capacity, batch_priority)
    if gate == "experts_choose":
        top_k = 0
    backend = select_backend("route", {"cpu": _why_not_cpu(scores), "cuda": _why_not_cuda(scores, top_k)})
    if backend != "reference":
        return Assignment(*_Route.apply(scores, top_k, gate, capacity, batch_priority))
    return route_reference(scores, top_k=top_k, gate=gate, capacity=capacity, batch_priority=batch_priority)


def route_reference(
    scores: Tensor,
    *,
    top_k: int,
    gate: Gate = "softmax_top_k",
    capacity: int | None = None,
    batch_priority: bool = False,
) -> Assignment:
    """:func:`route` in plain PyTorch, for checked float scores [G, S, E]. No host synchronisation."""
    groups, tokens, experts = scores.shape
    if gate == "experts_choose":
        gates = scores.softmax(dim=-1)
        best = (
            gates.detach().transpose(1, 2).sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
        )  # [G, E, C]
        weight = gates.transpose(1, 2).gather(-1, best)
        first_token = torch.arange(groups, device=scores.device).view(-1, 1, 1) * tokens
        rows_per_expert = groups * best.shape[-1]
        return Assignment(
            token=(best + first_token).transpose(0, 1).flatten(),
            expert=torch.arange(experts, device=scores.device).repeat_interleave(rows_per_expert),
            weight=weight.transpose(0, 1).flatten(),
            offsets=torch.arange(experts + 1, device=scores.device) * rows_per_expert,
            place=torch.empty(groups * tokens, 0, dtype=torch.int64, device=scores.device),
            gates=gates,
        )

    # Chosen by score: softmax keeps the order, and its rounding, other in every backend, can then make no ties.
    choice = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]  # [G, S, K]
    if gate == "softmax_top_k":
        gates = scores.softmax(dim=-1)
        choice_weight = gates.gather(-1, choice)
    else:
        choice_weight = scores.gather(-1, choice).softmax(dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, choice, choice_weight)

    # Positions in filling order: [G, K, S], all first choices of a group before its second ones.
    token = torch.arange(tokens, device=scores.device).expand(groups, tokens)
    if batch_priority:
        token = choice_weight.detach()[..., 0].sort(dim=-1, descending=True, stable=True).indices
    in_order = token.unsqueeze(-1).expand(-1, -1, top_k)
    expert = choice.gather(1, in_order).transpose(1, 2)
    weight = choice_weight.gather(1, in_order).transpose(1, 2)
    if capacity is not None:
        wanted = torch.nn.functional.one_hot(expert.flatten(1), experts)
        slot = (wanted.cumsum(dim=1) * wanted).sum(dim=-1) - 1
        expert = torch.where(slot.view_as(expert) < capacity, expert, experts)

    expert_sorted, row_of = expert.flatten().sort(stable=True)  # dropped choices, as expert number E, come last
    kept = expert_sorted < experts
    global_token = (
        (token + torch.arange(groups, device=scores.device).unsqueeze(-1) * tokens).unsqueeze(1).expand_as(expert)
    )
    choice_number = torch.arange(top_k, device=scores.device).view(1, -1, 1).expand_as(expert)
    flat_choice = (global_token * top_k + choice_number).flatten()[row_of]
    row = torch.arange(flat_choice.numel(), device=scores.device)
    place = torch.empty_like(row).scatter(0, flat_choice, torch.where(kept, row, -1))
    return Assignment(
        token=torch.where(kept, flat_choice // top_k, 0),
        expert=expert_sorted.clamp(max=experts - 1),
        weight=torch.where(kept, weight.flatten()[row_of], 0.0),
        offsets=torch.searchsorted(expert_sorted, torch.arange(experts + 1, device=scores.device)),
        place=place.view(groups * tokens, top_k),
        gates=gates,
    )


def route_backward_reference(
    grad_weight: Tensor | None,
    grad_gates: Tensor | None,
    gates: Tensor,
    token: Tensor,
    expert: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Gradient of the scores [G, S, E] from those of ``weight`` [N] and ``gates`` [G, S, E], in plain PyTorch.

    With ``d = grad_gates``, plus ``grad_weight`` of each row in use at its token and expert, ``gates * (d - sum_e d *
    gates)``. It holds for every kind of gate: where the softmax is over the chosen scores only, the other gates are
    zero.
    """
    grad = torch.zeros_like(gates) if grad_gates is None else grad_gates
    if grad_weight is not None:
        in_use = torch.arange(token.numel(), device=token.device) < offsets[-1]
        grad_rows = torch.where(in_use, grad_weight, 0.0)
        grad = grad.flatten().index_add(0, token * gates.shape[-1] + expert, grad_rows).view_as(gates)
    return gates * (grad - (grad * gates).sum(dim=-1, keepdim=True))


def _checked_scores(
    logits: Tensor, noise: Tensor | None, top_k: int, gate: str, capacity: int | None, batch_priority: bool
) -> Tensor:
    """The scores [G, S, E] in float32 or float64, after every argument was checked."""
    if gate not in get_args(Gate):
        raise UnknownNameError("gate", gate, get_args(Gate))
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise M2MKDError(
            f"logits has shape {tuple(logits.shape)}; "
            "expected [groups, tokens, experts] or [tokens, experts] with at least one expert"
        )
    if not logits.is_floating_point():
        raise M2MKDError(f"logits has dtype {logits.dtype}; expected a floating dtype")
    if noise is not None and noise.shape != logits.shape:
        raise M2MKDError(f"noise has shape {tuple(noise.shape)}, logits {tuple(logits.shape)}; they must be the same")
    tokens, experts = logits.shape[-2:]
    if gate == "experts_choose":
        if capacity is None or not 1 <= capacity <= tokens:
            raise M2MKDError(
                f"capacity is {capacity}; with gate='experts_choose' it must be within 1 to {tokens}, a group's tokens"
            )
        if batch_priority:
            raise M2MKDError("batch_priority has no meaning with gate='experts_choose': leave it out")
    else:
        if not 1 <= top_k <= experts:
            raise M2MKDError(f"top_k is {top_k}; with {experts} experts it must be within 1 to {experts}")
        if capacity is not None and capacity < 1:
            raise M2MKDError(f"capacity is {capacity}; it must be at least 1, or None to drop nothing")
    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.to(precision)
    if noise is not None:
        scores = scores + noise.to(precision)
    return scores.unsqueeze(0) if scores.dim() == 2 else scores


class _Route(torch.autograd.Function):
    """The compiled forward and backward; which of them, CPU or CUDA, the dispatcher tells from the tensors."""

    @staticmethod
    def forward(ctx, scores, top_k, gate, capacity, batch_priority):
        assignment = Assignment(*torch.ops.m2mkd_fast._route_forward(scores, top_k, gate, capacity, batch_priority))
        ctx.save_for_backward(assignment.gates, assignment.token, assignment.expert, assignment.offsets)
        ctx.mark_non_differentiable(assignment.token, assignment.expert, assignment.offsets, assignment.place)
        ctx.set_materialize_grads(False)
        return tuple(assignment)

    @staticmethod
    def backward(ctx, grad_token, grad_expert, grad_weight, grad_offsets, grad_place, grad_gates):
        if grad_weight is None and grad_gates is None:
            return None, None, None, None, None
        # Gradients of the gradient (create_graph=True) come from plain PyTorch: the compiled op has none.
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        compute = route_backward_reference if differentiable else torch.ops.m2mkd_fast._route_backward
        return compute(grad_weight, grad_gates, *ctx.saved_tensors), None, None, None, None


def _why_not_cpu(scores: Tensor) -> str | None:
    return device_reason(scores, "cpu") or why_missing("_C")


def _why_not_cuda(scores: Tensor, top_k: int) -> str | None:
    reason = device_reason(scores, "cuda") or why_missing("_C_cuda")
    if reason is None and (scores.shape[-1] > 256 or top_k > 8):
        reason = f"the kernel holds up to 256 experts and top_k 8, not {scores.shape[-1]} and {top_k}"
    return reason


if why_missing("_C") is None:

    @torch.library.register_fake("m2mkd_fast::_route_forward")
    def _route_forward_fake(scores, top_k, gate, capacity, batch_priority):
        groups, tokens, experts = scores.shape
        rows = groups * experts * capacity if gate == "experts_choose" else groups * tokens * top_k
        choices = 0 if gate == "experts_choose" else top_k
        index = {"dtype": torch.int64, "device": scores.device}
        return (
            torch.empty(rows, **index),
            torch.empty(rows, **index),
            scores.new_empty(rows),
            torch.empty(experts + 1, **index),
            torch.empty(groups * tokens, choices, **index),
            torch.empty_like(scores, memory_format=torch.contiguous_format),
        )

    @torch.library.register_fake("m2mkd_fast::_route_backward")
    def _route_backward_fake(grad_weight, grad_gates, gates, token, expert, offsets):
        return torch.empty_like(gates)
