"""Attention from latents to inputs where every latent has key and value projections of its own."""

from __future__ import annotations

import math
from itertools import repeat

import torch
from torch import Tensor

from m2mkd_fast.autocast import autocast_dtype, without_autocast
from m2mkd_fast.backend import select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_CHANNELS = 512  # what fits into the registers of a program
_TRITON_BATCH = 2**16 - 1  # CUDA's limit for the second axis of a grid
_SCORES = 1 << 21  # that a CPU computes at a time: they bound the memory of inference, and stay in its last cache


def read_in_attention(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    r"""Read V inputs into U latents, latent u through the projections :math:`W \operatorname{diag}(s_u)`.

    .. math::
        k_{uvh} = W^K_h (s^K_u \circ x_v) + b^K_h, \quad v_{uvh} = W^V_h (s^V_u \circ x_v) + b^V_h, \quad
        o_{uh} = \sum_v \mathrm{softmax}_v\Big(\frac{q_{uh} \cdot k_{uvh}}{\sqrt D}\Big)\, v_{uvh}

    Keys and values of all pairs would be ``[B, H, U, V, D]``. They never exist: the projections move to the other side
    of both products, which is exact,

    .. math::
        \tilde q_{uh} = s^K_u \circ (W^K_h)^\top q_{uh} / \sqrt D, \quad
        P = \mathrm{softmax}_v(\tilde q_{uh} \cdot x_v), \quad
        z_{uh} = \sum_v P_{uhv}\, x_v, \quad
        o_{uh} = W^V_h (s^V_u \circ z_{uh}) + b^V_h

    and needs a number of operations that is smaller by about the size of a head: all latents and heads attend to the
    inputs themselves, which are key and value at once. The key bias adds the same to all scores of a row, which the
    softmax does not see: its gradient is zero.

    Backends: ``triton``, ``torch`` (batched products, on any device) and ``reference``, which makes all keys and
    values and is therefore never chosen unless it is forced.

    Args:
        query: q ``[B, H, U, D]``.
        inputs: x ``[B, V, C]``, already normalised.
        key_weight: ``[H * D, C]``, rows ordered by head.
        key_scale: ``[U, C]``, or ``[1, C]`` for one scale for all latents.
        value_weight: ``[H * D, C]``.
        value_scale: ``[U, C]`` or ``[1, C]``.
        key_bias: ``[H * D]``.
        value_bias: ``[H * D]``.

    Returns:
        o ``[B, H, U, D]``, a transposed view of memory ordered ``[B, U, H, D]``, in the widest dtype of the arguments;
        under autocast in its dtype, unless the widest is float64.

    Raises:
        M2MKDError: shapes, dtypes or devices are not as described above.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2 (read-in).
    """
    tensors = (query, inputs, key_weight, key_scale, value_weight, value_scale, key_bias, value_bias)
    _check(*tensors)
    dtype = _result_dtype(tensors)
    backend = select_backend("read_in_attention", _reasons(query, inputs, dtype))
    if backend == "reference":
        return read_in_attention_reference(*tensors)
    if query.numel() == 0 or inputs.numel() == 0:  # nothing is summed, and of nothing all keys and values are few
        return read_in_attention_reference(*(None if tensor is None else tensor.to(dtype) for tensor in tensors))
    halved = torch.finfo(dtype).bits < 32
    # Products in half precision are slow and rough on most CPUs; the scales are small, and stay in float32 anywhere.
    product_dtype = torch.float32 if halved and backend == "torch" and inputs.device.type == "cpu" else dtype
    scale_dtype = torch.float32 if halved else dtype
    dtypes = (*repeat(product_dtype, 3), scale_dtype, product_dtype, scale_dtype, product_dtype, product_dtype)
    tensors = tuple(None if tensor is None else tensor.to(to) for tensor, to in zip(tensors, dtypes, strict=True))
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _ReadInAttention.apply(backend, keep, *tensors).to(dtype)


def read_in_attention_reference(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    """The definition with all keys and values, plain PyTorch, any dtype. Memory grows with B x U x V x H x D."""
    keys = torch.nn.functional.linear(inputs.unsqueeze(1) * key_scale.unsqueeze(1), key_weight, key_bias)
    values = torch.nn.functional.linear(inputs.unsqueeze(1) * value_scale.unsqueeze(1), value_weight, value_bias)
    return attend_to_own_keys(query, keys, values)


def attend_to_own_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of queries ``[B, H, U, D]`` to keys and values ``[B, U or 1, V, H * D]`` of their own."""
    heads, dim = query.shape[1], query.shape[-1]
    keys, values = (tensor.unflatten(-1, (heads, dim)).permute(0, 3, 1, 2, 4) for tensor in (keys, values))
    scores = (query.unsqueeze(-2) * keys).sum(dim=-1) / math.sqrt(dim)
    return (scores.softmax(dim=-1).unsqueeze(-1) * values).sum(dim=-2)


def _rearranged(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
) -> Tensor:
    """The rearranged formula in plain PyTorch: what gradients of gradients are taken of."""
    heads, dim = query.shape[1], query.shape[-1]
    query = query / math.sqrt(dim)
    absorbed = torch.einsum("bhud,hdc->bhuc", query, key_weight.unflatten(0, (heads, dim))) * key_scale
    scores = torch.einsum("bhuc,bvc->bhuv", absorbed.to(inputs.dtype), inputs)
    if key_bias is not None:
        scores = scores + torch.einsum("bhud,hd->bhu", query, key_bias.unflatten(0, (heads, dim))).unsqueeze(-1)
    gathered = torch.einsum("bhuv,bvc->bhuc", scores.softmax(dim=-1), inputs) * value_scale
    messages = torch.einsum("bhuc,hdc->bhud", gathered.to(inputs.dtype), value_weight.unflatten(0, (heads, dim)))
    if value_bias is not None:
        messages = messages + value_bias.unflatten(0, (heads, 1, dim))
    return messages


def _check(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
) -> None:
    if query.dim() != 4 or query.shape[1] == 0 or query.shape[3] == 0:
        raise M2MKDError(
            f"query has shape {tuple(query.shape)}; expected [batch, heads, latents, head size] with at least one head "
            "of at least one number"
        )
    batch, heads, latents, dim = query.shape
    if inputs.dim() != 3 or inputs.shape[0] != batch or inputs.shape[2] == 0:
        raise M2MKDError(
            f"inputs has shape {tuple(inputs.shape)}; for a query {tuple(query.shape)} expected "
            f"[{batch}, inputs, channels] with at least one channel"
        )
    inner, channels = heads * dim, inputs.shape[2]
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "key_weight": (key_weight, [(inner, channels)]),
        "key_scale": (key_scale, [(latents, channels), (1, channels)]),
        "value_weight": (value_weight, [(inner, channels)]),
        "value_scale": (value_scale, [(latents, channels), (1, channels)]),
        "key_bias": (key_bias, [(inner,)]),
        "value_bias": (value_bias, [(inner,)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is not None and tensor.shape not in allowed:
            raise M2MKDError(
                f"{name} has shape {tuple(tensor.shape)}; for a query {tuple(query.shape)} and inputs "
                f"{tuple(inputs.shape)} expected {' or '.join(str(shape) for shape in allowed)}"
            )
    named = {"query": query, "inputs": inputs, **{name: tensor for name, (tensor, _) in shapes.items()}}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
        if tensor.device != inputs.device:
            raise M2MKDError(f"{name} is on {tensor.device}, inputs on {inputs.device}; move one of them")


def _result_dtype(tensors: tuple[Tensor | None, ...]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest if widest == torch.float64 else autocast_dtype(tensors[0]) or widest


def _reasons(query: Tensor, inputs: Tensor, dtype: torch.dtype) -> dict[str, str | None]:
    """Batched products can always run, so nothing falls back on the reference and its memory."""
    reasons = {"triton": _why_not_triton(query, inputs, dtype), "torch": None}
    # Without the matrix units, which do not multiply float32 exactly, cuBLAS outdoes a kernel that holds rows of
    # hundreds of channels; and the products follow the user's choice about TF32.
    return dict(reversed(reasons.items())) if dtype == torch.float32 else reasons


def _why_not_triton(query: Tensor, inputs: Tensor, dtype: torch.dtype) -> str | None:
    reason = triton_reason(inputs)
    if reason is not None:
        return reason
    if dtype not in _TRITON_DTYPES:
        return f"the kernel knows float32, bfloat16 and float16, not {dtype}"
    _, heads, latents, _ = query.shape
    batch, tokens, channels = inputs.shape
    if channels > _TRITON_CHANNELS:
        return f"the kernel takes up to {_TRITON_CHANNELS} channels, not {channels}"
    if max(heads * latents, tokens) * channels >= 2**31:
        return f"the kernel counts with 32 bits: {heads * latents} rows or {tokens} inputs of {channels} are too many"
    if batch > _TRITON_BATCH:
        return f"the kernel takes up to {_TRITON_BATCH} images, not {batch}"
    return None


class _ReadInAttention(torch.autograd.Function):
    """Forward and backward of the rearranged formula, by batched products or with the Triton kernels in the middle."""

    @staticmethod
    def forward(
        ctx, backend, keep, query, inputs, key_weight, key_scale, value_weight, value_scale, key_bias, value_bias
    ):
        ops = torch.ops.m2mkd_fast
        run = ops._read_in_attention_triton_forward if backend == "triton" else ops._read_in_attention_forward
        messages, *saved = run(query, inputs, key_weight, key_scale, value_weight, value_scale, value_bias, keep)
        tensors = (query, inputs, key_weight, key_scale, value_weight, value_scale, key_bias, value_bias)
        ctx.save_for_backward(*tensors, *saved)
        ctx.backend = backend
        return messages.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_messages):
        *tensors, absorbed, gathered, statistic = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the ops have none.
            needs = ctx.needs_input_grad[2:]
            needed = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(_rearranged(*tensors), needed, grad_messages, create_graph=True))
            return None, None, *(next(found) if need else None for need in needs)
        *tensors, key_bias, value_bias = tensors
        ops = torch.ops.m2mkd_fast
        run = ops._read_in_attention_triton_backward if ctx.backend == "triton" else ops._read_in_attention_backward
        grad_messages = grad_messages.transpose(1, 2)
        gradients = run(grad_messages, *tensors, absorbed, gathered, statistic)
        grad_key_bias = None if key_bias is None else torch.zeros_like(key_bias)
        grad_value_bias = None if value_bias is None else grad_messages.sum((0, 1)).flatten()
        return None, None, *gradients, grad_key_bias, grad_value_bias


# Memory is ordered [B, U, H, ...] throughout. As R = U * H rows it is what each image's products with the inputs
# take, as [H, B * U, ...] with strides what the heads' products with the weights take, and neither needs a copy.


def _by_head(rows: Tensor) -> Tensor:
    """``[B, U, H, N]`` -> ``[H, B * U, N]``, the same memory."""
    return rows.flatten(0, 1).transpose(0, 1)


def _absorb(query: Tensor, key_weight: Tensor) -> Tensor:
    """Multiply every head's queries ``[B, H, U, D]`` with its key weights: ``[B, U, H, C]``."""
    batch, heads, latents, dim = query.shape
    absorbed = query.new_empty((batch, latents, heads, key_weight.shape[1]))
    torch.bmm(_by_head(query.transpose(1, 2)), key_weight.unflatten(0, (heads, dim)), out=_by_head(absorbed))
    return absorbed


def _absorb_backward(grad_absorbed: Tensor, query: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the query and the key weights."""
    batch, heads, latents, dim = query.shape
    grad = _by_head(grad_absorbed)
    grad_query = query.new_empty((batch, latents, heads, dim))
    torch.bmm(grad, key_weight.unflatten(0, (heads, dim)).transpose(1, 2), out=_by_head(grad_query))
    grad_weight = torch.bmm(_by_head(query.transpose(1, 2)).transpose(1, 2), grad).flatten(0, 1)
    return grad_query.transpose(1, 2), grad_weight


def _project(rows: Tensor, value_weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply every head's rows ``[B, U, H, C]`` with its value weights: ``[B, U, H, D]``."""
    heads = rows.shape[2]
    weight = value_weight.unflatten(0, (heads, -1))
    messages = rows.new_empty((*rows.shape[:3], weight.shape[1]))
    torch.bmm(_by_head(rows), weight.transpose(1, 2), out=_by_head(messages))
    return messages if bias is None else messages.add_(bias.unflatten(0, (heads, -1)))


def _project_backward(grad_messages: Tensor, rows: Tensor, value_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the value weights."""
    grad = _by_head(grad_messages)
    grad_rows = torch.empty_like(rows)
    torch.bmm(grad, value_weight.unflatten(0, (rows.shape[2], -1)), out=_by_head(grad_rows))
    return grad_rows, torch.bmm(grad.transpose(1, 2), _by_head(rows)).flatten(0, 1)


def _sum_to_scale(products: Tensor, scale: Tensor) -> Tensor:
    """Gradient of the scale of rows ``[B, U, H, C]`` from the products of the rows with their gradients.

    One axis at a time: a sum over two axes that are not neighbours takes ten times as long on a CPU.
    """
    return products.sum(2, dtype=scale.dtype).sum(0).sum_to_size(scale.shape)


def _scaled(rows: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows ``[B, U, H, C]`` times ``[U or 1, C]``, in the dtype of the rows whatever that of the scale is."""
    return torch.mul(rows, scale.unsqueeze(1), out=torch.empty_like(rows) if out is None else out)


class _Chunk:
    """Images and latents that are computed at a time: a part of one image, or one or several whole images."""

    def __init__(self, images: slice, latents: slice) -> None:
        self.images, self.latents = images, latents

    def rows(self, tensor: Tensor) -> Tensor:
        """``[B, U, H, N]`` -> ``[b, u * H, N]``, the same memory."""
        return tensor[self.images, self.latents].flatten(1, 2)

    def scaled(self, rows: Tensor, scale: Tensor, buffer: Tensor) -> Tensor:
        """The chunk's rows times the scale of each latent, in a part of the buffer."""
        rows = rows[self.images, self.latents]
        return _scaled(rows, scale if scale.shape[0] == 1 else scale[self.latents], _part(buffer, rows)).flatten(1, 2)


def _chunks(rows: Tensor, tokens: int) -> list[_Chunk]:
    """Chunks of rows ``[B, U, H, C]``, the first one the largest."""
    batch, latents, heads = rows.shape[:3]
    at_once = max(_SCORES // (heads * tokens), 1) if rows.device.type == "cpu" else batch * latents
    images, part = max(at_once // latents, 1), min(at_once, latents)
    return [
        _Chunk(slice(image, min(image + images, batch)), slice(latent, min(latent + part, latents)))
        for image in range(0, batch, images)
        for latent in range(0, latents, part)
    ]


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer of one axis in the shape of another tensor."""
    return buffer[: like.numel()].view(like.shape)


def _forward(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    value_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The messages ``[B, U, H, D]``, and if asked to keep them W^T q and z ``[B, U, H, C]`` and P ``[B, U, H, V]``."""
    with without_autocast(inputs):
        tokens, key_scale = inputs.shape[1], key_scale / math.sqrt(query.shape[-1])
        absorbed = _absorb(query, key_weight)
        gathered = torch.empty_like(absorbed)
        chunks = _chunks(absorbed, tokens)
        largest = chunks[0].rows(absorbed)
        buffer = absorbed.new_empty(largest.numel())
        rows_at_once = largest.shape[0] * largest.shape[1]
        weights = absorbed.new_empty((*absorbed.shape[:3], tokens) if keep else rows_at_once * tokens)
        for chunk in chunks:
            rows, keys = chunk.scaled(absorbed, key_scale, buffer), inputs[chunk.images]
            some = chunk.rows(weights) if keep else weights[: rows.shape[0] * rows.shape[1] * tokens]
            some = some.view(*rows.shape[:2], tokens)
            torch.bmm(rows, keys.transpose(1, 2), out=some)
            torch.softmax(some, dim=-1, out=some)
            torch.bmm(some, keys, out=chunk.rows(gathered))
        if keep:
            messages = _project(_scaled(gathered, value_scale), value_weight, value_bias)
            return messages, absorbed, gathered, weights
        messages = _project(_scaled(gathered, value_scale, gathered), value_weight, value_bias)
        return messages, *_nothing(inputs)


def _backward(
    grad_messages: Tensor,
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    absorbed: Tensor,
    gathered: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors, from that of the messages ``[B, U, H, D]``.

    With dz given, dP = dz x^T, dS = P (dP - sum_v P dP), where sum_v P dP = dz z, dq~ = dS x, and, as an input is key
    and value at once, dx = P^T dz + dS^T q~.
    """
    with without_autocast(inputs):
        key_scale = key_scale / math.sqrt(query.shape[-1])
        spare = _scaled(gathered, value_scale)
        grad_gathered, grad_value_weight = _project_backward(grad_messages, spare, value_weight)
        grad_value_scale = _sum_to_scale(torch.mul(grad_gathered, gathered, out=spare), value_scale)
        _scaled(grad_gathered, value_scale, grad_gathered)
        correction = torch.mul(grad_gathered, gathered, out=spare).sum(-1, keepdim=True)
        grad_rows = spare
        grad_inputs = torch.zeros_like(inputs, memory_format=torch.contiguous_format)
        chunks = _chunks(absorbed, inputs.shape[1])
        buffer = absorbed.new_empty(chunks[0].rows(absorbed).numel())
        scores_buffer = absorbed.new_empty(chunks[0].rows(weights).numel())
        for chunk in chunks:
            keys, some, grad = inputs[chunk.images], chunk.rows(weights), chunk.rows(grad_gathered)
            grad_scores = _part(scores_buffer, some)
            torch.bmm(grad, keys.transpose(1, 2), out=grad_scores)
            grad_scores.sub_(chunk.rows(correction)).mul_(some)
            torch.bmm(grad_scores, keys, out=chunk.rows(grad_rows))
            grad_keys = grad_inputs[chunk.images]
            grad_keys.baddbmm_(some.transpose(1, 2), grad)
            grad_keys.baddbmm_(grad_scores.transpose(1, 2), chunk.scaled(absorbed, key_scale, buffer))
        products = torch.mul(grad_rows, absorbed, out=grad_gathered)
        grad_key_scale = _sum_to_scale(products, key_scale).div_(math.sqrt(query.shape[-1]))
        grad_absorbed = _scaled(grad_rows, key_scale, grad_rows)
        grad_query, grad_key_weight = _absorb_backward(grad_absorbed, query, key_weight)
        return grad_query, grad_inputs, grad_key_weight, grad_key_scale, grad_value_weight, grad_value_scale


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of what would be kept for the backward."""
    return like.new_empty(0), like.new_empty(0), like.new_empty(0)


def _triton_forward(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    value_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_forward`, with the logarithms of the sums ``[B, U, H]`` in place of P."""
    from m2mkd_fast.kernels import read_in_attention as kernels  # here, because it imports Triton

    with without_autocast(inputs):
        absorbed = _absorb(query, key_weight)
        key_scale = key_scale / math.sqrt(query.shape[-1])
        scaled, gathered, logsumexp = kernels.forward(absorbed, inputs, key_scale, value_scale, keep)
        messages = _project(scaled, value_weight, value_bias)
        return (messages, absorbed, gathered, logsumexp) if keep else (messages, *_nothing(inputs))


def _triton_backward(
    grad_messages: Tensor,
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    absorbed: Tensor,
    gathered: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_backward`."""
    from m2mkd_fast.kernels import read_in_attention as kernels

    with without_autocast(inputs):
        key_scale = key_scale / math.sqrt(query.shape[-1])
        grad_scaled, grad_value_weight = _project_backward(grad_messages, _scaled(gathered, value_scale), value_weight)
        grad_absorbed, grad_inputs, key_products, value_products = kernels.backward(
            grad_scaled, absorbed, inputs, key_scale, value_scale, gathered, logsumexp
        )
        grad_query, grad_key_weight = _absorb_backward(grad_absorbed, query, key_weight)
        grad_key_scale = _sum_to_scale(key_products, key_scale).div_(math.sqrt(query.shape[-1]))
        grad_value_scale = _sum_to_scale(value_products, value_scale)
        return grad_query, grad_inputs, grad_key_weight, grad_key_scale, grad_value_weight, grad_value_scale


_FORWARD = (
    "(Tensor query, Tensor inputs, Tensor key_weight, Tensor key_scale, Tensor value_weight, Tensor value_scale,"
    " Tensor? value_bias, bool keep) -> (Tensor messages, Tensor absorbed, Tensor gathered, Tensor statistic)"
)
_BACKWARD = (
    "(Tensor grad_messages, Tensor query, Tensor inputs, Tensor key_weight, Tensor key_scale, Tensor value_weight,"
    " Tensor value_scale, Tensor absorbed, Tensor gathered, Tensor statistic) -> (Tensor grad_query, Tensor"
    " grad_inputs, Tensor grad_key_weight, Tensor grad_key_scale, Tensor grad_value_weight, Tensor grad_value_scale)"
)
for _name, _schema, _devices, _implementation in (
    ("_read_in_attention_forward", _FORWARD, "CompositeExplicitAutograd", _forward),
    ("_read_in_attention_backward", _BACKWARD, "CompositeExplicitAutograd", _backward),
    ("_read_in_attention_triton_forward", _FORWARD, ("cuda", "cpu"), _triton_forward),
    ("_read_in_attention_triton_backward", _BACKWARD, ("cuda", "cpu"), _triton_backward),
):
    torch.library.define(f"m2mkd_fast::{_name}", _schema)
    torch.library.impl(f"m2mkd_fast::{_name}", _devices, _implementation)


@torch.library.register_fake("m2mkd_fast::_read_in_attention_forward")
def _forward_fake(query, inputs, key_weight, key_scale, value_weight, value_scale, value_bias, keep):
    return _fake_results(query, inputs, query.new_empty((*_by_latent(query), inputs.shape[1])), keep)


@torch.library.register_fake("m2mkd_fast::_read_in_attention_triton_forward")
def _triton_forward_fake(query, inputs, key_weight, key_scale, value_weight, value_scale, value_bias, keep):
    return _fake_results(query, inputs, query.new_empty(_by_latent(query), dtype=torch.float32), keep)


def _by_latent(query: Tensor) -> tuple[int, int, int]:
    batch, heads, latents, _ = query.shape
    return batch, latents, heads


def _fake_results(query: Tensor, inputs: Tensor, statistic: Tensor, keep: bool) -> tuple[Tensor, ...]:
    messages = query.new_empty((*_by_latent(query), query.shape[-1]))
    rows = query.new_empty((*_by_latent(query), inputs.shape[2]))
    return (messages, rows, torch.empty_like(rows), statistic) if keep else (messages, *_nothing(query))


@torch.library.register_fake("m2mkd_fast::_read_in_attention_backward")
@torch.library.register_fake("m2mkd_fast::_read_in_attention_triton_backward")
def _backward_fake(
    grad_messages,
    query,
    inputs,
    key_weight,
    key_scale,
    value_weight,
    value_scale,
    absorbed,
    gathered,
    statistic,
):
    grad_query = query.new_empty((*_by_latent(query), query.shape[-1])).transpose(1, 2)
    others = (inputs, key_weight, key_scale, value_weight, value_scale)
    return grad_query, *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in others)
