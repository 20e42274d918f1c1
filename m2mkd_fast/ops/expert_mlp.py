"""Two-layer perceptrons of many experts, each applied to the tokens assigned to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from m2mkd_fast._extension import load, why_missing
from m2mkd_fast.autocast import autocast_dtype, without_autocast
from m2mkd_fast.backend import device_reason, select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.philox import check_seed, draw_seed, philox_keep
from m2mkd_fast.ops.route import Assignment

Activation = Literal["gelu", "gelu_tanh", "geglu", "swiglu"]
GATED = ("geglu", "swiglu")
"""Activations for which the first layer makes values and gates."""

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Read once: torch.compile cannot trace a look at the processor.
_PROCESSOR = load("_host")[0].cpu_facts() if load("_host")[0] is not None else {}
# The C++ kernel is written for AVX2; the libraries' products know wider vectors, and what other processors have.
_KERNEL_OUTDOES_LIBRARIES = bool(_PROCESSOR.get("avx2") and _PROCESSOR.get("fma") and not _PROCESSOR.get("avx512f"))


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
    seed: Tensor | None = None,
) -> Tensor:
    r"""Weighted sum, for every token, of what its experts make of it.

    .. math::
        y_t = \sum_{n:\, \mathrm{token}_n = t} \mathrm{weight}_n\, m^{out}_n \left(
            W^{down}_{e_n}\, m^{hidden}_n\, \phi(W^{up}_{e_n} x_t + b^{up}_{e_n}) + b^{down}_{e_n} \right)

    over the rows n of the assignment, with dropout masks m. A token without rows (all its choices were dropped) gets
    zero. Every product runs in the dtype of ``x``, or under autocast in the autocast dtype (unless ``x`` is float64),
    with sums in float32 at least; the weighted sum is rounded once at the end. For the backward pass x, what the first
    layer makes and the small tensors are kept; the hidden units are made again.

    With the seed's 64 bits as key, dropout keeps hidden unit j of row n where word j mod 4 of philox4x32-10 at counter
    n ceil(H/4) + j div 4 is at least :math:`p_0 2^{32}`; output j of row n likewise with :math:`p_1`, at counter N
    ceil(H/4) + n ceil(O/4) + j div 4. All devices and backends drop the same, and nothing is kept of it.

    Args:
        x: ``[T, D]`` tokens.
        assignment: of these T tokens to the E experts in N rows, see :func:`m2mkd_fast.ops.route.route`.
        up_weight: ``[E, H, D]``; with a gated activation ``[E, 2 H, D]``, values and then gates.
        up_bias: ``[E, H]``, or ``[E, 2 H]``, or ``None``.
        down_weight: ``[E, O, H]``.
        down_bias: ``[E, O]`` or ``None``.
        activation: ``"gelu"`` (with the error function), ``"gelu_tanh"``, or values times the ``"geglu"`` (error
            function) or ``"swiglu"`` (SiLU) of their gates.
        dropout: probabilities after the activation and after the second layer; pass zeros in evaluation.
        seed: of dropout, an int64 tensor of one number on the device of ``x``. By default it is drawn from PyTorch's
            generator, without waiting for the device.

    Returns:
        ``[T, O]``, differentiable once with respect to ``x``, ``assignment.weight``, weights and biases.

    Raises:
        M2MKDError: shapes, dtypes, devices or numbers do not fit each other.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", eq. 1; Shazeer 2020, "GLU Variants
    Improve Transformer"; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (philox).
    """
    _check(x, assignment, up_weight, up_bias, down_weight, down_bias, activation, dropout, seed)
    parameters, precision = (up_weight, up_bias, down_weight, down_bias), autocast_dtype(x)
    if precision is not None:
        x, parameters = x.to(precision), tuple(None if p is None else p.to(precision) for p in parameters)
    if seed is None and any(dropout):
        seed = draw_seed(x.device)
    backend = select_backend("expert_mlp", _reasons(x, assignment, parameters, activation))
    with without_autocast(x):
        if backend in ("reference", "torch"):
            compute = expert_mlp_reference if backend == "reference" else expert_mlp_torch
            return compute(x, assignment, *parameters, activation=activation, dropout=dropout, seed=seed)
        return _apply(backend, x, assignment, parameters, activation, dropout, seed if any(dropout) else None)


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
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`expert_mlp` in plain PyTorch, without its checks and its autocast: every expert on every row.

    That is E times the work, but nothing is read back from the device, in any dtype.
    """

    def product(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        out = rows.new_zeros(rows.shape[0], matrices.shape[1])
        for expert in range(matrices.shape[0]):
            mine = (_used(assignment) & (assignment.expert == expert)).unsqueeze(1)
            # `where`, unlike a product with zero, stops a NaN of another expert's row in both directions.
            made = F.linear(torch.where(mine, rows, 0.0), matrices[expert], None if bias is None else bias[expert])
            out = torch.where(mine, made, out)
        return out

    parameters = (up_weight, up_bias, down_weight, down_bias)
    return _by_rows(x, assignment, parameters, activation, dropout, seed, product)


def expert_mlp_torch(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: Activation = "gelu",
    dropout: tuple[float, float] = (0.0, 0.0),
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`expert_mlp` by the products of PyTorch's libraries, without its checks and its autocast.

    On GPUs and under ``torch.compile`` bfloat16 takes grouped products where the widths are multiples of 8. Otherwise
    in eager mode each expert gets a contiguous slice of the sorted rows; that reads the E offsets back from the device.
    What is left under ``torch.compile`` is the reference.
    """
    parameters = (up_weight, up_bias, down_weight, down_bias)
    if _grouped_products_fit(x, up_weight, down_weight):
        stops = assignment.offsets[1:].to(torch.int32)
        used = _used(assignment).unsqueeze(1)

        def product(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
            # A grouped product leaves the rows of the tail uninitialised, and their gradients too. `where`, unlike a
            # product with zero, stops a NaN in both directions.
            out = F.grouped_mm(rows, matrices.transpose(1, 2), offs=stops)
            return torch.where(used, out if bias is None else out + bias.index_select(0, assignment.expert), 0.0)

        return _by_rows(x, assignment, parameters, activation, dropout, seed, product)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return expert_mlp_reference(x, assignment, *parameters, activation=activation, dropout=dropout, seed=seed)
    return _by_slices(x, assignment, parameters, activation, dropout, seed)


def _by_rows(
    x: Tensor,
    assignment: Assignment,
    parameters: tuple[Tensor | None, ...],
    activation: Activation,
    dropout: tuple[float, float],
    seed: Tensor | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """All rows at once: ``product`` multiplies each with the matrix of its expert, and the tail with zero."""
    up_weight, up_bias, down_weight, down_bias = parameters
    token, place = assignment.token, assignment.place
    keep_hidden, keep_out = _masks(assignment, down_weight, dropout, seed)
    hidden = _activate(product(_Gather.apply(x, token, place, True), up_weight, up_bias), activation)
    out = _drop(product(_drop(hidden, keep_hidden, dropout[0]), down_weight, down_bias), keep_out, dropout[1])
    weighted = out * torch.where(_used(assignment), assignment.weight, 0.0).unsqueeze(1)
    return _Combine.apply(weighted, token, place, True).to(x.dtype)


def _by_slices(
    x: Tensor,
    assignment: Assignment,
    parameters: tuple[Tensor | None, ...],
    activation: Activation,
    dropout: tuple[float, float],
    seed: Tensor | None,
) -> Tensor:
    up_weight, up_bias, down_weight, down_bias = parameters
    experts, rows = up_weight.shape[0], assignment.token.shape[0]
    offsets = [0, *assignment.offsets[1:].tolist()]
    used = offsets[-1]
    sizes = [stop - start for start, stop in itertools.pairwise(offsets)]
    dropped = True
    if torch.compiler.is_exporting():
        # What is exported knows no numbers but that they are sizes. It keeps the tail of dropped choices, as zeros, so
        # that all shapes but those of the slices follow from the input's.
        sizes.append(rows - used)
        for size in sizes:
            torch._check(size >= 0)
        used = rows
    else:
        # The tail is cut off: `place` never points there.
        dropped = used < assignment.place.numel()  # else every place is a row
    keep_hidden, keep_out = (
        [None] * experts if mask is None else mask[:used].split(sizes)
        for mask in _masks(assignment, down_weight, dropout, seed)
    )
    token, weight = assignment.token[:used], assignment.weight[:used]
    slices = _Gather.apply(x, token, assignment.place, dropped).split(sizes)
    outputs = []
    for expert in range(experts):
        biases = [None if bias is None else bias[expert] for bias in (up_bias, down_bias)]
        hidden = _activate(F.linear(slices[expert], up_weight[expert], biases[0]), activation)
        out = F.linear(_drop(hidden, keep_hidden[expert], dropout[0]), down_weight[expert], biases[1])
        outputs.append(_drop(out, keep_out[expert], dropout[1]))
    outputs += [outputs[0].new_zeros(tail.shape[0], down_weight.shape[1]) for tail in slices[experts:]]
    weighted = torch.cat(outputs) * weight.unsqueeze(1)
    return _Combine.apply(weighted, token, assignment.place, dropped).to(x.dtype)


def _used(assignment: Assignment) -> Tensor:
    """[N] bool: the rows before the tail of dropped choices, which must neither give nor get anything."""
    return torch.arange(assignment.token.shape[0], device=assignment.token.device) < assignment.offsets[-1]


def _activate(made: Tensor, activation: Activation) -> Tensor:
    if activation in GATED:
        values, gates = made.chunk(2, dim=-1)
        return values * (F.gelu(gates) if activation == "geglu" else F.silu(gates))
    return F.gelu(made, approximate="tanh" if activation == "gelu_tanh" else "none")


def _masks(
    assignment: Assignment, down_weight: Tensor, dropout: tuple[float, float], seed: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What dropout keeps of hidden units [N, H] and of outputs [N, O]; None keeps all."""
    rows, (out, hidden) = assignment.token.shape[0], down_weight.shape[1:]
    first = rows * ((hidden + 3) // 4)
    return (
        philox_keep(seed, rows, hidden, dropout[0]) if dropout[0] else None,
        philox_keep(seed, rows, out, dropout[1], first) if dropout[1] else None,
    )


def _drop(values: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    return values if keep is None else torch.where(keep, values * (1.0 / (1.0 - probability)), 0.0)


def _grouped_products_fit(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> bool:
    """Compiled, `F.grouped_mm` of PyTorch 2.11 takes bfloat16 alone, and rows that start at a multiple of 16 bytes."""
    widths = (*up_weight.shape[1:], *down_weight.shape[1:])
    wanted = torch.compiler.is_compiling() or x.device.type == "cuda"
    return wanted and x.dtype == torch.bfloat16 and x.shape[0] > 0 and all(width % 8 == 0 for width in widths)


class _Gather(torch.autograd.Function):
    """Rows of tokens. By hand, because the derived gradient scatters row by row: slow, and on a GPU in any order."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor, dropped: bool) -> Tensor:
        ctx.save_for_backward(place)
        ctx.dropped = dropped
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_rows(grad_rows, place, ctx.dropped), None, None, None


class _Combine(torch.autograd.Function):
    """Sum of the rows of every token: the transpose of :class:`_Gather`."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, token: Tensor, place: Tensor, dropped: bool) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_rows(rows, place, dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad_out.index_select(0, token), None, None, None


def _sum_rows(rows: Tensor, place: Tensor, dropped: bool) -> Tensor:
    """[T, width]: the sum of each token's rows, in the order of its places; ``dropped`` where some of them are -1."""
    total = rows.new_zeros(place.shape[0], rows.shape[1])
    if rows.shape[0] == 0:
        return total
    # One choice at a time: where experts chose there are as many places as experts, most of them -1.
    for row in place.unbind(1):
        some = rows.index_select(0, row.clamp(min=0) if dropped else row)
        total = total + (torch.where((row >= 0).unsqueeze(1), some, 0.0) if dropped else some)
    return total


def _check(
    x: Tensor,
    assignment: Assignment,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    dropout: tuple[float, float],
    seed: Tensor | None,
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
    experts, made, width = up_weight.shape
    gated = activation in GATED
    if gated and made % 2:
        raise M2MKDError(
            f"up_weight has shape {tuple(up_weight.shape)}; with activation={activation!r} its rows are values and as "
            f"many gates, an even number, not {made}"
        )
    hidden, out = made // 2 if gated else made, down_weight.shape[1] if down_weight.dim() == 3 else -1
    expected = {
        "x": (x, (x.shape[0], width)),
        "down_weight": (down_weight, (experts, out, hidden)),
        "up_bias": (up_bias, (experts, made)),
        "down_bias": (down_bias, (experts, out)),
        "assignment.offsets": (assignment.offsets, (experts + 1,)),
        "assignment.place": (assignment.place, (x.shape[0], assignment.place.shape[1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise M2MKDError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}, up_weight "
                f"{tuple(up_weight.shape)} [experts, {'2 * hidden' if gated else 'hidden'}, width] and "
                f"activation={activation!r}"
            )
    parameters = {"up_weight": up_weight, "up_bias": up_bias, "down_weight": down_weight, "down_bias": down_bias}
    converted = autocast_dtype(x) is not None
    for name, tensor in {**parameters, "assignment.weight": assignment.weight}.items():
        if tensor is not None and tensor.device != x.device:
            raise M2MKDError(f"{name} is on {tensor.device}, x on {x.device}; move one of them")
        if tensor is not None and name in parameters and tensor.dtype != x.dtype and not converted:
            raise M2MKDError(
                f"{name} is {tensor.dtype} but x is {x.dtype}; convert one of them, or run under torch.autocast"
            )
    if seed is not None:
        check_seed(seed, x.device)


def _reasons(
    x: Tensor, assignment: Assignment, parameters: tuple[Tensor | None, ...], activation: Activation
) -> dict[str, str | None]:
    """Where there are values PyTorch's products can run, so that nothing falls back on the reference."""
    up_weight, _, down_weight, _ = parameters
    why_not_torch = "the input is on meta, where there are no offsets to read" if x.is_meta else None
    reasons = {"triton": _why_not_triton(x), "cpu": _why_not_cpu(x), "torch": why_not_torch}
    grouped_or_sliced = not torch.compiler.is_compiling() or _grouped_products_fit(x, up_weight, down_weight)
    if x.device.type == "cpu":
        torch_first = not _KERNEL_OUTDOES_LIBRARIES and grouped_or_sliced
    else:
        torch_first = reasons["triton"] is None and _measured_faster_than_triton(x, assignment, down_weight, activation)
    return dict(reversed(reasons.items())) if torch_first else reasons


def _measured_faster_than_triton(
    x: Tensor, assignment: Assignment, down_weight: Tensor, activation: Activation
) -> bool:
    # Neither a tracer nor a fake tensor, of a GPU that may not be there, can ask for the GPU's architecture.
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    from m2mkd_fast.kernels.expert_mlp import prefers_torch  # here, because it imports Triton

    experts, outputs, hidden = down_weight.shape
    return prefers_torch(x, assignment.token.shape[0], hidden, outputs, experts, activation in GATED)


def _why_not_cpu(x: Tensor) -> str | None:
    reason = device_reason(x, "cpu") or why_missing("_C")
    if reason is None and x.dtype not in _CPU_DTYPES:
        reason = f"the kernel knows float32, float64, bfloat16 and float16, not {x.dtype}"
    return reason


def _why_not_triton(x: Tensor) -> str | None:
    reason = triton_reason(x)
    if reason is None and x.dtype not in _TRITON_DTYPES:
        reason = f"the kernels know float32, bfloat16 and float16, not {x.dtype}"
    return reason


_OPS = {"cpu": "_expert_mlp", "triton": "_expert_mlp_triton"}


def _apply(
    backend: str,
    x: Tensor,
    assignment: Assignment,
    parameters: tuple[Tensor | None, ...],
    activation: Activation,
    dropout: tuple[float, float],
    seed: Tensor | None,
) -> Tensor:
    token, expert, weight, offsets, place = assignment[:5]
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.to(torch.float32)
    op = _OPS[backend]
    indices, options = (token, expert, offsets, place), (activation, *dropout, seed)
    differentiable = (x, weight, *parameters)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return _ExpertMLP.apply(op, *differentiable, *indices, *options)
    forward = getattr(torch.ops.m2mkd_fast, f"{op}_forward")
    return forward(x, token, expert, weight, offsets, place, *parameters, *options, False)[0]


class _ExpertMLP(torch.autograd.Function):
    """The kernels, with their gradient."""

    @staticmethod
    def forward(ctx, op, x, weight, up_weight, up_bias, down_weight, down_bias, *rest):
        token, expert, offsets, place, *options = rest
        forward = getattr(torch.ops.m2mkd_fast, f"{op}_forward")
        indices, parameters = (token, expert, weight, offsets, place), (up_weight, up_bias, down_weight, down_bias)
        out, preactivation = forward(x, *indices, *parameters, *options, True)
        ctx.save_for_backward(preactivation, x, *indices, *parameters, options[-1])
        ctx.op, ctx.options = op, options[:-1]
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *saved, seed = ctx.saved_tensors
        needed = ctx.needs_input_grad
        backward = getattr(torch.ops.m2mkd_fast, f"{ctx.op}_backward")
        gradients = backward(grad_out, *saved, *ctx.options, seed, needed[1], any(needed[3:7]))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Not `once_differentiable`: it lets a gradient pass as a constant where grad_out needs no gradient itself.
            gradients = [_NotTwice.apply(gradient, grad_out, *saved) for gradient in gradients]
        gradients = (gradient if need else None for gradient, need in zip(gradients, needed[1:7], strict=True))
        return None, *gradients, *(None,) * 8


class _NotTwice(torch.autograd.Function):
    """A gradient of which none can be taken. ``inputs`` are what it depends on."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad):
        raise M2MKDError(
            "expert_mlp is differentiable once; for gradients of gradients write the loop over experts in plain PyTorch"
        )


_FORWARD = (
    "(Tensor x, Tensor token, Tensor expert, Tensor weight, Tensor offsets, Tensor place, Tensor up_weight,"
    " Tensor? up_bias, Tensor down_weight, Tensor? down_bias, str activation, float hidden_dropout,"
    " float output_dropout, Tensor? seed, bool keep_preactivation) -> (Tensor out, Tensor preactivation)"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor preactivation, Tensor x, Tensor token, Tensor expert, Tensor weight, Tensor offsets,"
    " Tensor place, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, str activation,"
    " float hidden_dropout, float output_dropout, Tensor? seed, bool need_x, bool need_parameters)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_up_weight, Tensor grad_up_bias, Tensor grad_down_weight,"
    " Tensor grad_down_bias)"
)
torch.library.define("m2mkd_fast::_expert_mlp_triton_forward", _FORWARD)
torch.library.define("m2mkd_fast::_expert_mlp_triton_backward", _BACKWARD)


@torch.library.impl("m2mkd_fast::_expert_mlp_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from m2mkd_fast.kernels import expert_mlp as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_expert_mlp_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from m2mkd_fast.kernels import expert_mlp as kernels

    return kernels.backward(*args)


def _triton_forward_fake(x, token, expert, weight, offsets, place, up_weight, up_bias, down_weight, *options):
    kept = (token.shape[0], up_weight.shape[1]) if options[-1] else (0,)
    return x.new_empty(x.shape[0], down_weight.shape[1]), x.new_empty(kept)


def _cpu_forward_fake(x, token, expert, weight, offsets, place, up_weight, up_bias, down_weight, *options):
    # Panels of 16 rows, or 8 in float64, those of an expert side by side; the last one of each may not be full.
    panel = 8 if x.dtype == torch.float64 else 16
    panels = token.shape[0] // panel + up_weight.shape[0]
    kept = (panels, up_weight.shape[1], panel) if options[-1] else (0,)
    return x.new_empty(x.shape[0], down_weight.shape[1]), x.new_empty(kept)


def _backward_fake(
    grad_out, preactivation, x, token, expert, weight, offsets, place, up_weight, up_bias, down_weight, down_bias,
    activation, hidden_dropout, output_dropout, seed, need_x, need_parameters,
):  # fmt: skip
    def gradient(tensor: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else (0,))

    parameters = (gradient(tensor, need_parameters) for tensor in (up_weight, up_bias, down_weight, down_bias))
    return gradient(x, need_x), weight.new_empty(weight.shape), *parameters


torch.library.register_fake("m2mkd_fast::_expert_mlp_triton_forward", _triton_forward_fake)
torch.library.register_fake("m2mkd_fast::_expert_mlp_triton_backward", _backward_fake)
if why_missing("_C") is None:
    torch.library.register_fake("m2mkd_fast::_expert_mlp_forward", _cpu_forward_fake)
    torch.library.register_fake("m2mkd_fast::_expert_mlp_backward", _backward_fake)
