"""Which tokens go to which experts: from router logits to one expert-sorted list of (token, expert, weight)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import device_reason, select_backend
from m2mkd_fast.checks import is_debugging, require_finite
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.philox import check_seed, philox_normal
from m2mkd_fast.ops.routing_losses import gshard_loss, importance_loss, load_loss, router_z_loss

Gate = Literal["softmax_top_k", "top_k_softmax", "sigmoid", "experts_choose"]
LOSSES = ("importance", "load", "gshard", "z")
_IMPORTANCE, _LOAD, _GSHARD = 1, 2, 4  # bits of the private ops' `losses`: 1 << place in LOSSES


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
    """[T, K] int64, row of each of a token's choices, -1 where it was dropped. For experts_choose [T, E]: the row that
    each expert gave the token, -1 where it did not take it."""
    gates: Tensor
    """[G, S, E], what the weights were taken from; differentiable."""
    losses: Tensor
    """[4, G], a value per group in the order of :data:`LOSSES`, zero where not asked for; differentiable."""


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
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    losses: Collection[str] = (),
) -> Assignment:
    """Assign tokens to experts, group by group, and sort the assignment by expert.

    With scores ``h = logits + noise``:

    - ``softmax_top_k`` (V-MoE): ``gates = softmax_e(h)``; a token takes the ``top_k`` experts with the largest score,
      and their gates as weights, not renormalised.
    - ``top_k_softmax`` (m2mKD): a token takes the ``top_k`` experts with the largest score; weights are the softmax
      over these scores. ``gates`` holds them, and zero for the other experts.
    - ``sigmoid``: ``gates = sigmoid(h)``; a token takes the ``top_k`` experts with the largest score, and their gates
      as weights, not renormalised.
    - ``experts_choose``: ``gates = softmax_e(h)``; within each group every expert takes the ``capacity`` tokens with
      the largest gate for it. ``top_k`` is not used.

    Where tokens choose, an expert fills its slots with all first choices before any second one, in token order, or,
    with ``batch_priority``, in the order of falling first-choice weight. Choices beyond ``capacity`` slots are dropped;
    the other weights stay as they are. Ties go to the lower index; NaN counts as the largest value.

    The losses are those of :mod:`m2mkd_fast.ops.routing_losses`, one value per group: ``importance`` of the gates
    without noise, ``load`` (needs noise), ``gshard`` of the gates with noise, where the first choice is that of the
    largest score, and ``z`` of the logits without noise. Gates are ``softmax_e``, or ``sigmoid``, of logits or scores.

    Noise from a ``seed`` is normal, of philox4x32-10 (:func:`m2mkd_fast.ops.philox.philox_normal`): the same numbers,
    to the last digits, on every device and backend.

    Args:
        logits: [G, S, E], or [S, E] for one group. Half precisions are computed in float32.
        noise: same shape, added as it is: scale it first (V-MoE in training: standard normal times ``1 / E``).
        top_k: choices a token makes, 1 to E.
        gate: see above.
        capacity: slots each expert has for one group; ``None`` drops nothing. Needed for ``experts_choose``, at most S
            there.
        batch_priority: fill slots by importance of the token rather than by its position.
        noise_std: standard deviation of the noise that is drawn from ``seed``, or, for the load loss, of ``noise``.
        seed: an int64 tensor of one number on the device of ``logits``; draws the noise instead of ``noise``.
        losses: names from :data:`LOSSES`.

    Returns:
        The assignment; ``weight``, ``gates`` and ``losses`` are differentiable with respect to ``logits`` and
        ``noise``.

    Raises:
        M2MKDError: a shape, dtype or number is not as described above; inside :func:`m2mkd_fast.debug`, a score is not
            finite. Elsewhere such a token is routed by the rules above, and leaves the others alone but for the losses.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", eq. 2, section 4 (batch priority) and
    appendix A (noise and losses); Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing"; Lo et al. 2024,
    "m2mKD"; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (philox).
    """
    _check(logits, noise, top_k, gate, capacity, batch_priority)
    _check_noise_and_losses(logits, noise, gate, noise_std, seed, losses)
    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(precision)
    noise = None if noise is None else noise.to(precision)
    if logits.dim() == 2:
        logits, noise = logits.unsqueeze(0), None if noise is None else noise.unsqueeze(0)
    if is_debugging():
        remedy = "Look at what the router gets, lower the learning rate, or clip gradients"
        require_finite(logits if noise is None else logits + noise, "routing scores", remedy)
    if gate == "experts_choose":
        top_k = 0
    backend = select_backend("route", {"cpu": _why_not_cpu(logits), "cuda": _why_not_cuda(logits, top_k)})
    if backend == "reference":
        return route_reference(
            logits,
            noise,
            top_k=top_k,
            gate=gate,
            capacity=capacity,
            batch_priority=batch_priority,
            noise_std=noise_std,
            seed=seed,
            losses=losses,
        )
    wanted = sum(1 << number for number, name in enumerate(LOSSES) if name in losses)
    arguments = (logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, wanted)
    if torch.is_grad_enabled() and (logits.requires_grad or (noise is not None and noise.requires_grad)):
        return Assignment(*_Route.apply(*arguments))
    return Assignment(*torch.ops.m2mkd_fast._route_forward(*arguments)[: len(Assignment._fields)])


def route_reference(
    logits: Tensor,
    noise: Tensor | None = None,
    *,
    top_k: int,
    gate: Gate = "softmax_top_k",
    capacity: int | None = None,
    batch_priority: bool = False,
    noise_std: float = 0.0,
    seed: Tensor | None = None,
    losses: Collection[str] = (),
) -> Assignment:
    """:func:`route` in plain PyTorch, for checked float logits [G, S, E]. No host synchronisation."""
    groups, tokens, experts = logits.shape
    if seed is not None:
        noise = noise_std * philox_normal(seed, tuple(logits.shape), logits.dtype)
    scores = logits if noise is None else logits + noise
    if gate == "experts_choose":
        gates = scores.softmax(dim=-1)
        order = gates.detach().transpose(1, 2).sort(dim=-1, descending=True, stable=True).indices  # [G, E, S]
        first_token = torch.arange(groups, device=logits.device).view(-1, 1, 1) * tokens
        rows_per_expert = groups * capacity
        token = (order[..., :capacity] + first_token).transpose(0, 1).flatten()
        expert = torch.arange(experts, device=logits.device).repeat_interleave(rows_per_expert)
        row = torch.arange(experts * rows_per_expert, device=logits.device)
        place = row.new_full((groups * tokens * experts,), -1).scatter(0, token * experts + expert, row)
        return Assignment(
            token=token,
            expert=expert,
            weight=gates.flatten().gather(0, token * experts + expert),
            offsets=torch.arange(experts + 1, device=logits.device) * rows_per_expert,
            place=place.view(groups * tokens, experts),
            gates=gates,
            losses=_losses(logits, noise, top_k, gate, noise_std, losses),
        )

    # Chosen by score: softmax keeps the order, and its rounding, other in every backend, can then make no ties.
    choice = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]  # [G, S, K]
    gates, choice_weight = _gates_and_choice_weights(scores, choice, gate)

    # Positions in filling order: [G, K, S], all first choices of a group before its second ones.
    token = torch.arange(tokens, device=logits.device).expand(groups, tokens)
    if batch_priority:
        token = choice_weight.detach()[..., 0].sort(dim=-1, descending=True, stable=True).indices
    in_order = token.unsqueeze(-1).expand(-1, -1, top_k)
    expert = choice.gather(1, in_order).transpose(1, 2)
    if capacity is not None:
        wanted = torch.nn.functional.one_hot(expert.flatten(1), experts)
        slot = (wanted.cumsum(dim=1) * wanted).sum(dim=-1) - 1
        expert = torch.where(slot.view_as(expert) < capacity, expert, experts)

    expert_sorted, row_of = expert.flatten().sort(stable=True)  # dropped choices, as expert number E, come last
    kept = expert_sorted < experts
    global_token = (
        (token + torch.arange(groups, device=logits.device).unsqueeze(-1) * tokens).unsqueeze(1).expand_as(expert)
    )
    choice_number = torch.arange(top_k, device=logits.device).view(1, -1, 1).expand_as(expert)
    flat_choice = (global_token * top_k + choice_number).flatten()[row_of]
    row = torch.arange(flat_choice.numel(), device=logits.device)
    place = torch.empty_like(row).scatter(0, flat_choice, torch.where(kept, row, -1))
    return Assignment(
        token=torch.where(kept, flat_choice // top_k, 0),
        expert=expert_sorted.clamp(max=experts - 1),
        weight=torch.where(kept, choice_weight.flatten().gather(0, flat_choice), 0.0),
        offsets=torch.searchsorted(expert_sorted, torch.arange(experts + 1, device=logits.device)),
        place=place.view(groups * tokens, top_k),
        gates=gates,
        losses=_losses(logits, noise, top_k, gate, noise_std, losses),
    )


def route_backward_reference(
    grad_weight: Tensor | None,
    grad_gates: Tensor | None,
    grad_losses: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    assignment: Assignment,
    choice: Tensor,
    *,
    top_k: int,
    gate: Gate,
    noise_std: float,
    losses: Collection[str],
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and scores' noise [G, S, E] in plain PyTorch, differentiable where gradients are enabled.

    Of an assignment that is made already, so that no rounding can turn it into another one. ``choice`` [T, K] holds
    each token's experts; it is not looked at where experts choose.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not logits.requires_grad:
            logits = logits.detach().requires_grad_()
        noise = torch.zeros_like(logits) if noise is None else noise
        if not noise.requires_grad:
            noise = noise.detach().requires_grad_()
        scores = logits + noise
        gates = scores.softmax(dim=-1)
        if gate != "experts_choose":
            gates, _ = _gates_and_choice_weights(scores, choice.long().view(*logits.shape[:2], top_k), gate)
        in_use = torch.arange(assignment.token.numel(), device=logits.device) < assignment.offsets[-1]
        weight = gates.flatten().gather(0, assignment.token * logits.shape[-1] + assignment.expert)
        values = {
            "weight": (torch.where(in_use, weight, 0.0), grad_weight),
            "gates": (gates, grad_gates),
            "losses": (_losses(logits, noise, top_k, gate, noise_std, losses), grad_losses),
        }
        # Losses that were not asked for are constant zeros.
        used = [pair for pair in values.values() if pair[1] is not None and pair[0].requires_grad]
        # Plus zero times both inputs, since the values may not depend on one of them.
        outputs = [*(value for value, _ in used), 0.0 * scores]
        gradients = [*(gradient for _, gradient in used), torch.zeros_like(scores)]
        return torch.autograd.grad(outputs, (logits, noise), gradients, create_graph=create_graph)


def _gates_and_choice_weights(scores: Tensor, choice: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """gates [G, S, E], and those of each token's choices [G, S, K]."""
    if gate == "top_k_softmax":
        choice_weight = scores.gather(-1, choice).softmax(dim=-1)
        return torch.zeros_like(scores).scatter(-1, choice, choice_weight), choice_weight
    gates = _dense_gates(scores, gate)
    return gates, gates.gather(-1, choice)


def _dense_gates(scores: Tensor, gate: Gate) -> Tensor:
    # A sigmoid of strided numbers is rounded differently.
    return scores.contiguous().sigmoid() if gate == "sigmoid" else scores.softmax(dim=-1)


def _losses(
    logits: Tensor, noise: Tensor | None, top_k: int, gate: Gate, noise_std: float, losses: Collection[str]
) -> Tensor:
    """[4, G], zero where not asked for."""
    found = {}
    if "importance" in losses:
        found["importance"] = importance_loss(_dense_gates(logits, gate))
    if "load" in losses:
        found["load"] = load_loss(logits, noise, top_k=top_k, noise_std=noise_std)
    if "gshard" in losses:
        scores = logits if noise is None else logits + noise
        found["gshard"] = gshard_loss(_dense_gates(scores, gate), first=scores.detach().argmax(dim=-1))
    if "z" in losses:
        found["z"] = router_z_loss(logits)
    none = logits.new_zeros(logits.shape[0])
    return torch.stack([found.get(name, none) for name in LOSSES])


def _check(
    logits: Tensor, noise: Tensor | None, top_k: int, gate: str, capacity: int | None, batch_priority: bool
) -> None:
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


def _check_noise_and_losses(
    logits: Tensor,
    noise: Tensor | None,
    gate: str,
    noise_std: float,
    seed: Tensor | None,
    losses: Collection[str],
) -> None:
    if not 0 <= noise_std < math.inf:
        raise M2MKDError(f"noise_std is {noise_std}; it must be a finite number, at least 0")
    if noise is not None and (not noise.is_floating_point() or noise.device != logits.device):
        raise M2MKDError(f"noise is {noise.dtype} on {noise.device}; expected a floating dtype on {logits.device}")
    if seed is not None:
        if noise is not None:
            raise M2MKDError("noise and seed are two sources of noise; give one of them")
        check_seed(seed, logits.device)
        if noise_std == 0:
            raise M2MKDError("noise_std is 0, so seed would draw no noise: set noise_std above 0, or leave seed out")
    elif noise is None and noise_std > 0:
        raise M2MKDError(
            f"noise_std is {noise_std}, but there is no noise: give a seed to draw it from, or leave noise_std out"
        )
    for name in losses:
        if name not in LOSSES:
            raise UnknownNameError("loss", name, LOSSES)
    if "load" in losses:
        if gate == "experts_choose":
            raise M2MKDError("the load loss is defined where tokens choose: leave it out, or take another gate")
        if noise_std == 0:
            raise M2MKDError("the load loss needs noise and its noise_std: set both, or leave the loss out")


class _Route(torch.autograd.Function):
    """The compiled forward and backward; which of them, CPU or CUDA, the dispatcher tells from the tensors."""

    @staticmethod
    def forward(ctx, logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, wanted):
        outputs = torch.ops.m2mkd_fast._route_forward(
            logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, wanted
        )
        assignment = Assignment(*outputs[: len(Assignment._fields)])
        ctx.save_for_backward(logits, noise, seed, *outputs)
        ctx.noise_std, ctx.top_k, ctx.gate, ctx.wanted = noise_std, top_k, gate, wanted
        ctx.mark_non_differentiable(assignment.token, assignment.expert, assignment.offsets, assignment.place)
        ctx.set_materialize_grads(False)
        return tuple(assignment)

    @staticmethod
    def backward(ctx, grad_token, grad_expert, grad_weight, grad_offsets, grad_place, grad_gates, grad_losses):
        if grad_weight is None and grad_gates is None and grad_losses is None:
            return (None,) * 9
        logits, noise, seed, *outputs = ctx.saved_tensors
        assignment = Assignment(*outputs[: len(Assignment._fields)])
        choice, threshold, slopes, softmax = outputs[len(Assignment._fields) :]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the compiled op has none.
            if seed is not None:
                noise = ctx.noise_std * philox_normal(seed, tuple(logits.shape), logits.dtype)
            grad_logits, grad_noise = route_backward_reference(
                grad_weight,
                grad_gates,
                grad_losses,
                logits,
                noise,
                assignment,
                choice,
                top_k=ctx.top_k,
                gate=ctx.gate,
                noise_std=ctx.noise_std,
                losses=[name for number, name in enumerate(LOSSES) if ctx.wanted >> number & 1],
            )
        else:
            grad_logits, grad_noise = torch.ops.m2mkd_fast._route_backward(
                grad_weight,
                grad_gates,
                grad_losses,
                logits,
                assignment.gates,
                assignment.place,
                choice,
                threshold,
                slopes,
                softmax,
                ctx.noise_std,
                ctx.gate,
                ctx.wanted,
                ctx.needs_input_grad[1],
            )
        return grad_logits, grad_noise if ctx.needs_input_grad[1] else None, *(None,) * 7


def _why_not_cpu(logits: Tensor) -> str | None:
    return device_reason(logits, "cpu") or why_missing("_C")


def _why_not_cuda(logits: Tensor, top_k: int) -> str | None:
    reason = device_reason(logits, "cuda") or why_missing("_C_cuda")
    if reason is None and (logits.shape[-1] > 256 or top_k > 8):
        reason = f"the kernel holds up to 256 experts and top_k 8, not {logits.shape[-1]} and {top_k}"
    return reason


if why_missing("_C") is None:

    @torch.library.register_fake("m2mkd_fast::_route_forward")
    def _route_forward_fake(logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, losses):
        groups, tokens, experts = logits.shape
        by_experts = gate == "experts_choose"
        rows = groups * experts * capacity if by_experts else groups * tokens * top_k
        index = {"dtype": torch.int64, "device": logits.device}
        return (
            torch.empty(rows, **index),
            torch.empty(rows, **index),
            logits.new_empty(rows),
            torch.empty(experts + 1, **index),
            torch.empty(groups * tokens, experts if by_experts else top_k, **index),
            torch.empty_like(logits, memory_format=torch.contiguous_format),
            logits.new_empty(len(LOSSES), groups),
            torch.empty(groups * tokens, 0 if by_experts else top_k, dtype=torch.int32, device=logits.device),
            logits.new_empty(groups * tokens if losses & _LOAD else 0),
            logits.new_empty(3 if losses & (_IMPORTANCE | _LOAD | _GSHARD) else 0, groups, experts),
            logits.new_empty(logits.shape if losses & _GSHARD and gate == "top_k_softmax" else 0),
        )

    @torch.library.register_fake("m2mkd_fast::_route_backward")
    def _route_backward_fake(
        grad_weight,
        grad_gates,
        grad_losses,
        logits,
        gates,
        place,
        choice,
        threshold,
        slopes,
        softmax,
        noise_std,
        gate,
        losses,
        need_noise,
    ):
        return torch.empty_like(gates), torch.empty_like(gates) if need_noise else gates.new_empty(0)
