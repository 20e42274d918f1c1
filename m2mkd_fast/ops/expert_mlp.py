"""Two-layer perceptrons of many experts, each applied to the tokens assigned to it."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from m2mkd_fast.autocast import autocast_dtype, without_autocast
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.route import Assignment

Activation = Literal["gelu", "gelu_tanh"]


def expert_mlp(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: Activation = "gelu",
    dropout: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    r"""Weighted sum, for every token, of what its experts make of it.

    .. math::
        y_t = \sum_{n:\, \mathrm{token}_n = t} \mathrm{weight}_n \left(
            W^{down}_{e_n}\, \phi(W^{up}_{e_n} x_t + b^{up}_{e_n}) + b^{down}_{e_n} \right)

    over the rows n of the assignment. A token without rows (all its choices were dropped) gets zero. Every product
    runs in the dtype of ``x``, or under autocast in the autocast dtype (unless ``x`` is float64); the weighted sum in
    the wider of that and the dtype of ``assignment.weight``, rounded once at the end.

    Args:
        x: ``[T, D]`` tokens.
        assignment: of these T tokens to the E experts, see :func:`m2mkd_fast.ops.route.route`.
        up_weight: ``[E, H, D]``.
        up_bias: ``[E, H]`` or ``None``.
        down_weight: ``[E, O, H]``.
        down_bias: ``[E, O]`` or ``None``.
        activation: ``"gelu"`` (with the error function) or ``"gelu_tanh"``.
        dropout: probabilities after the activation and after the second layer; pass zeros in evaluation.

    Returns:
        ``[T, O]``, differentiable once with respect to ``x``, ``assignment.weight``, weights and biases.

    Raises:
        M2MKDError: shapes, dtypes or numbers do not fit each other.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", eq. 1.
    """
    _check(x, assignment, up_weight, up_bias, down_weight, down_bias, activation, dropout)
    parameters, precision = (up_weight, up_bias, down_weight, down_bias), autocast_dtype(x)
    if precision is not None:
        x, parameters = x.to(precision), tuple(None if p is None else p.to(precision) for p in parameters)
    with without_autocast(x):
        return expert_mlp_reference(x, assignment, *parameters, activation=activation, dropout=dropout)


def expert_mlp_reference(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: Activation = "gelu",
    dropout: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """:func:`expert_mlp` in plain PyTorch, without its checks and its autocast.

    In eager mode each expert gets a contiguous slice of the sorted rows; that reads the E offsets back from the device.
    Under ``torch.compile`` nothing is read back: bfloat16 takes grouped products where the widths are multiples of 8,
    anything else every expert on every token, which is ``E / top_k`` times the work.
    """
    args = (x, assignment, up_weight, up_bias, down_weight, down_bias, activation, dropout)
    if not torch.compiler.is_compiling():
        return _by_slices(*args)
    return _by_grouped_products(*args) if _grouped_products_fit(x, up_weight, down_weight) else _by_masking(*args)


def _by_slices(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: Activation,
    dropout: tuple[float, float],
) -> Tensor:
    experts = up_weight.shape[0]
    offsets = assignment.offsets.tolist()
    used, dropped = offsets[-1], offsets[-1] < assignment.token.shape[0]
    # The tail of dropped choices is cut off: `place` never points there.
    token, weight = assignment.token[:used], assignment.weight[:used]
    rows = _Gather.apply(x, token, assignment.place, dropped)
    outputs = [
        _mlp(expert_rows, up, up_b, down, down_b, activation, dropout)
        for expert_rows, up, up_b, down, down_b in zip(
            rows.split([stop - start for start, stop in itertools.pairwise(offsets)]),
            up_weight.unbind(),
            up_bias.unbind() if up_bias is not None else [None] * experts,
            down_weight.unbind(),
            down_bias.unbind() if down_bias is not None else [None] * experts,
            strict=True,
        )
    ]
    weighted = torch.cat(outputs) * weight.unsqueeze(1)
    return _Combine.apply(weighted, token, assignment.place, x.shape[0], dropped).to(x.dtype)


def _by_grouped_products(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: Activation,
    dropout: tuple[float, float],
) -> Tensor:
    token, expert, weight, offsets, place, _ = assignment
    stops = offsets[1:].to(torch.int32)
    used = _used(assignment).unsqueeze(1)

    def product(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        # A grouped product leaves the rows of the tail uninitialised, and their gradients too. `where`, unlike a
        # product with zero, stops a NaN in both directions; above the first product, `place` never points at the tail.
        out = F.grouped_mm(rows, matrices.transpose(1, 2), offs=stops)
        return torch.where(used, out if bias is None else out + bias.index_select(0, expert), 0.0)

    hidden = F.dropout(
        _activate(product(_Gather.apply(x, token, place, True), up_weight, up_bias), activation), dropout[0]
    )
    weighted = F.dropout(product(hidden, down_weight, down_bias), dropout[1]) * weight.unsqueeze(1)
    return _Combine.apply(weighted, token, place, x.shape[0], True).to(x.dtype)


def _by_masking(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: Activation,
    dropout: tuple[float, float],
) -> Tensor:
    tokens, experts = x.shape[0], up_weight.shape[0]
    share = assignment.weight.new_zeros(tokens * experts).index_add(
        0, assignment.token * experts + assignment.expert, torch.where(_used(assignment), assignment.weight, 0.0)
    )
    out = share.new_zeros(tokens, down_weight.shape[1])
    for expert in range(experts):
        biases = [None if bias is None else bias[expert] for bias in (up_bias, down_bias)]
        output = _mlp(x, up_weight[expert], biases[0], down_weight[expert], biases[1], activation, dropout)
        out = out + output * share.view(tokens, experts)[:, expert : expert + 1]
    return out.to(x.dtype)


def _used(assignment: Assignment) -> Tensor:
    """[N] bool: the rows before the tail of dropped choices, which must neither give nor get anything."""
    return torch.arange(assignment.token.shape[0], device=assignment.token.device) < assignment.offsets[-1]


def _mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: Activation,
    dropout: tuple[float, float],
) -> Tensor:
    hidden = _activate(F.linear(x, up_weight, up_bias), activation)
    hidden = F.dropout(hidden, dropout[0]) if dropout[0] else hidden
    out = F.linear(hidden, down_weight, down_bias)
    return F.dropout(out, dropout[1]) if dropout[1] else out


def _activate(hidden: Tensor, activation: Activation) -> Tensor:
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _grouped_products_fit(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> bool:
    """Compiled, `F.grouped_mm` of PyTorch 2.11 takes bfloat16 alone, and rows that start at a multiple of 16 bytes."""
    widths = (x.shape[1], up_weight.shape[1], down_weight.shape[1])
    return x.dtype == torch.bfloat16 and x.shape[0] > 0 and all(width % 8 == 0 for width in widths)


class _Gather(torch.autograd.Function):
    """Rows of tokens. By hand, because the derived gradient scatters row by row: slow, and on a GPU in any order."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor, dropped: bool) -> Tensor:
        ctx.save_for_backward(token, place)
        ctx.tokens, ctx.dropped = x.shape[0], dropped
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        token, place = ctx.saved_tensors
        return _sum_rows(grad_rows, token, place, ctx.tokens, ctx.dropped), None, None, None


class _Combine(torch.autograd.Function):
    """Sum of the rows of every token: the transpose of :class:`_Gather`."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, token: Tensor, place: Tensor, tokens: int, dropped: bool) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_rows(rows, token, place, tokens, dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad_out.index_select(0, token), None, None, None, None


def _sum_rows(rows: Tensor, token: Tensor, place: Tensor, tokens: int, dropped: bool) -> Tensor:
    """[tokens, width]: by the places of each token's choices where tokens chose, by scattering where experts did."""
    if place.shape[1] == 0:
        return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token, rows)
    if rows.shape[0] == 0:
        return rows.new_zeros(tokens, rows.shape[1])
    gathered = rows.index_select(0, place.clamp(min=0).flatten() if dropped else place.flatten())
    gathered = gathered.view(tokens, place.shape[1], rows.shape[1])
    return (torch.where((place >= 0).unsqueeze(2), gathered, 0.0) if dropped else gathered).sum(dim=1)


def _check(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    dropout: tuple[float, float],
) -> None:
    if activation not in get_args(Activation):
        raise UnknownNameError("activation", activation, get_args(Activation))
    if not all(0.0 <= probability < 1.0 for probability in dropout):
        raise M2MKDError(f"dropout is {dropout}; both probabilities must be at least 0 and below 1")
    if x.dim() != 2 or up_weight.dim() != 3:
        raise M2MKDError(
            f"x has shape {tuple(x.shape)} and up_weight {tuple(up_weight.shape)}; expected [tokens, width] and "
            "[experts, hidden, width]: flatten the batch first"
        )
    experts, hidden, width = up_weight.shape
    expected = {
        "x": (x, (x.shape[0], width)),
        "down_weight": (down_weight, (experts, down_weight.shape[1] if down_weight.dim() == 3 else -1, hidden)),
        "up_bias": (up_bias, (experts, hidden)),
        "down_bias": (down_bias, (experts, down_weight.shape[1] if down_weight.dim() == 3 else -1)),
        "assignment.offsets": (assignment.offsets, (experts + 1,)),
        "assignment.place": (assignment.place, (x.shape[0], assignment.place.shape[1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise M2MKDError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)} and up_weight "
                f"{tuple(up_weight.shape)} [experts, hidden, width]"
            )
    parameters = {"up_weight": up_weight, "up_bias": up_bias, "down_weight": down_weight, "down_bias": down_bias}
    if autocast_dtype(x) is None:
        for name, tensor in parameters.items():
            if tensor is not None and tensor.dtype != x.dtype:
                raise M2MKDError(
                    f"{name} is {tensor.dtype} but x is {x.dtype}; convert one of them, or run under torch.autocast"
                )
