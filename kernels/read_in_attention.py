r"""Triton kernels in the middle of :func:`m2mkd_fast.ops.read_in_attention.read_in_attention`.

An image's R = U * H rows :math:`\tilde q_r = s^K_{u(r)} \circ a_r` all attend to its inputs x, which are key and value
at once. With :math:`S = \tilde q x^\top` the forward kernel computes, without ever storing S,

.. math::
    L_r = \log \sum_v e^{S_{rv}}, \quad P = e^{S - L}, \quad z = P x, \quad y_r = s^V_{u(r)} \circ z_r

and the backward kernels, from :math:`\partial y`, with :math:`\partial z_r = s^V_{u(r)} \circ \partial y_r` and
:math:`\delta_r = \partial z_r \cdot z_r`,

.. math::
    \partial S = P \circ (\partial z\, x^\top - \delta), \quad \partial \tilde q = \partial S\, x, \quad
    \partial x = \partial S^\top \tilde q + P^\top \partial z

A tile of x is loaded once and serves both products. Channels come in pieces of at most 64 that are held side by side,
so that their number need not be a power of two. One program owns each row, another each input: no sum is shared, and
results repeat bit for bit. Scores, sums and products accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, total):
    """``left @ right + total`` in float32: exact products, no TF32."""
    if _INTERPRETED:  # it would take the bits of bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _load(base, row, channels, number, inside, PIECE: tl.constexpr):
    """Piece ``number`` of some rows ``[ROWS, PIECE]``, zero beyond the last row and channel."""
    channel = number * PIECE + tl.arange(0, PIECE)
    at = base + row[:, None] * channels + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def _store(base, row, channels, number, inside, values, PIECE: tl.constexpr):
    channel = number * PIECE + tl.arange(0, PIECE)
    at = base + row[:, None] * channels + channel[None, :]
    tl.store(at, values, mask=inside[:, None] & (channel < channels)[None, :])


@triton.jit
def forward_kernel(
    absorbed,  # a [batch, rows, channels]
    inputs,  # x [batch, tokens, channels]
    key_scale,  # [latents or 1, channels], float32
    value_scale,  # [latents or 1, channels], float32
    gathered,  # z [batch, rows, channels]
    scaled,  # y [batch, rows, channels]
    logsumexp,  # L [batch, rows], float32, to base 2
    rows,
    tokens,
    channels,
    heads,
    KEY_SCALES: tl.constexpr,  # whether every latent has a scale of its own
    VALUE_SCALES: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    latent = row // heads
    absorbed += image * rows * channels
    inputs += image * tokens * channels
    query = ()
    gather = ()
    for number in tl.static_range(PIECES):
        a = _load(absorbed, row, channels, number, inside, PIECE)
        scale = _load(key_scale, latent if KEY_SCALES else latent * 0, channels, number, inside, PIECE)
        query += ((a.to(tl.float32) * scale).to(inputs.dtype.element_ty),)
        gather += (tl.zeros([ROWS, PIECE], dtype=tl.float32),)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(STEPS):
        token = step * TOKENS + tl.arange(0, TOKENS)
        x = ()
        scores = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        for number in tl.static_range(PIECES):
            piece = _load(inputs, token, channels, number, token < tokens, PIECE)
            scores = _dot(query[number], tl.trans(piece), scores)
            x += (piece,)
        scores = tl.where((token < tokens)[None, :], scores * _LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(inputs.dtype.element_ty)
        sums = ()
        for number in tl.static_range(PIECES):
            sums += (_dot(weights, x[number], gather[number] * shrink[:, None]),)
        gather = sums
    logsumexp += image * rows
    tl.store(logsumexp + row, top + tl.log2(total), mask=inside)
    inverse = 1.0 / total
    gathered += image * rows * channels
    scaled += image * rows * channels
    for number in tl.static_range(PIECES):
        z = gather[number] * inverse[:, None]
        scale = _load(value_scale, latent if VALUE_SCALES else latent * 0, channels, number, inside, PIECE)
        if KEEP:
            _store(gathered, row, channels, number, inside, z, PIECE)
        _store(scaled, row, channels, number, inside, z * scale, PIECE)
        tl.debug_barrier()  # one piece after the other: what all load at once does not fit into the registers


@triton.jit
def prepare_backward_kernel(
    grad_scaled,  # dy [batch * rows, channels]; becomes dz
    absorbed,  # a [batch * rows, channels]
    key_scale,  # [latents or 1, channels], float32
    value_scale,  # [latents or 1, channels], float32
    gathered,  # z [batch * rows, channels]
    query,  # q~ [batch * rows, channels]
    correction,  # delta [batch * rows], float32
    value_products,  # dy times z [batch * rows, channels]
    all_rows,
    rows,
    channels,
    heads,
    KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < all_rows
    latent = row % rows // heads
    delta = tl.zeros([ROWS], dtype=tl.float32)
    for number in tl.static_range(PIECES):
        a = _load(absorbed, row, channels, number, inside, PIECE).to(tl.float32)
        scale = _load(key_scale, latent if KEY_SCALES else latent * 0, channels, number, inside, PIECE)
        _store(query, row, channels, number, inside, a * scale, PIECE)
        grad = _load(grad_scaled, row, channels, number, inside, PIECE).to(tl.float32)
        z = _load(gathered, row, channels, number, inside, PIECE).to(tl.float32)
        scale = _load(value_scale, latent if VALUE_SCALES else latent * 0, channels, number, inside, PIECE)
        _store(value_products, row, channels, number, inside, grad * z, PIECE)
        grad = (grad * scale).to(absorbed.dtype.element_ty)
        _store(grad_scaled, row, channels, number, inside, grad, PIECE)
        # Of the rounded dz, as dz x is: the two are close, and what their difference loses is lost for good.
        delta += tl.sum(grad.to(tl.float32) * z, axis=1)
    tl.store(correction + row, delta, mask=inside)


@triton.jit
def rows_backward_kernel(
    query,  # q~ [batch, rows, channels]
    inputs,  # x [batch, tokens, channels]
    grad_gathered,  # dz [batch, rows, channels]
    absorbed,  # a [batch, rows, channels]
    key_scale,  # [latents or 1, channels], float32
    logsumexp,  # [batch, rows], float32
    correction,  # delta [batch, rows], float32
    grad_absorbed,  # da = dq~ times scale [batch, rows, channels]
    key_products,  # dq~ times a [batch, rows, channels]
    rows,
    tokens,
    channels,
    heads,
    KEY_SCALES: tl.constexpr,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    latent = row // heads
    inputs += image * tokens * channels
    first = image * rows
    q = ()
    dz = ()
    dq = ()
    for number in tl.static_range(PIECES):
        q += (_load(query + first * channels, row, channels, number, inside, PIECE),)
        dz += (_load(grad_gathered + first * channels, row, channels, number, inside, PIECE),)
        dq += (tl.zeros([ROWS, PIECE], dtype=tl.float32),)
    delta = tl.load(correction + first + row, mask=inside, other=0.0)
    log_total = tl.load(logsumexp + first + row, mask=inside, other=0.0)
    for step in range(STEPS):
        token = step * TOKENS + tl.arange(0, TOKENS)
        x = ()
        scores = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        grad_weights = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        for number in tl.static_range(PIECES):
            piece = _load(inputs, token, channels, number, token < tokens, PIECE)
            scores = _dot(q[number], tl.trans(piece), scores)
            grad_weights = _dot(dz[number], tl.trans(piece), grad_weights)
            x += (piece,)
        # Beyond the last token a weight is not zero, and may be infinite: x is zero there, but 0 * inf is not.
        weights = tl.where((token < tokens)[None, :], tl.exp2(scores * _LOG2_E - log_total[:, None]), 0.0)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(inputs.dtype.element_ty)
        sums = ()
        for number in tl.static_range(PIECES):
            sums += (_dot(grad_scores, x[number], dq[number]),)
        dq = sums
    for number in tl.static_range(PIECES):
        a = _load(absorbed + first * channels, row, channels, number, inside, PIECE).to(tl.float32)
        scale = _load(key_scale, latent if KEY_SCALES else latent * 0, channels, number, inside, PIECE)
        _store(key_products + first * channels, row, channels, number, inside, dq[number] * a, PIECE)
        _store(grad_absorbed + first * channels, row, channels, number, inside, dq[number] * scale, PIECE)
        tl.debug_barrier()  # as in forward_kernel


@triton.jit
def inputs_backward_kernel(
    query,  # q~ [batch, rows, channels]
    inputs,  # x [batch, tokens, channels]
    grad_gathered,  # dz [batch, rows, channels]
    logsumexp,  # [batch, rows], float32
    correction,  # delta [batch, rows], float32
    grad_inputs,  # dx [batch, tokens, channels]
    rows,
    tokens,
    channels,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    inputs += image * tokens * channels
    query += image * rows * channels
    grad_gathered += image * rows * channels
    logsumexp += image * rows
    correction += image * rows
    x = ()
    dx = ()
    for number in tl.static_range(PIECES):
        x += (_load(inputs, token, channels, number, inside, PIECE),)
        dx += (tl.zeros([TOKENS, PIECE], dtype=tl.float32),)
    for step in range(STEPS):
        row = step * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        q = ()
        dz = ()
        scores = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
        grad_weights = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
        for number in tl.static_range(PIECES):
            piece = _load(query, row, channels, number, valid, PIECE)
            scores = _dot(x[number], tl.trans(piece), scores)
            q += (piece,)
            piece = _load(grad_gathered, row, channels, number, valid, PIECE)
            grad_weights = _dot(x[number], tl.trans(piece), grad_weights)
            dz += (piece,)
        # Beyond the last row q~ and dz are zero, scores are too and weights 1: nothing is added.
        log_total = tl.load(logsumexp + row, mask=valid, other=0.0)
        delta = tl.load(correction + row, mask=valid, other=0.0)
        weights = tl.exp2(scores * _LOG2_E - log_total[None, :])
        grad_scores = (weights * (grad_weights - delta[None, :])).to(inputs.dtype.element_ty)
        weights = weights.to(inputs.dtype.element_ty)
        sums = ()
        for number in tl.static_range(PIECES):
            total = _dot(weights, dz[number], dx[number])
            sums += (_dot(grad_scores, q[number], total),)
        dx = sums
    grad_inputs += image * tokens * channels
    for number in tl.static_range(PIECES):
        _store(grad_inputs, token, channels, number, inside, dx[number], PIECE)


def blocks_of(kernel: triton.JITFunction, channels: int, dtype: torch.dtype, hopper: bool) -> dict[str, int]:
    """How much a program of the kernel takes at a time, and with how many warps.

    The largest tiles that stay in the registers (see dev/kernels/read_in_attention.md); Hopper's matrix instruction
    takes its operands from shared memory, and wants 64 rows.
    """
    piece = min(max(triton.next_power_of_2(channels), 16), 64)
    pieces = triton.cdiv(channels, piece)
    if kernel is prepare_backward_kernel:
        return {"PIECE": piece, "PIECES": pieces, "ROWS": 32, "num_warps": 4}
    table = _HOPPER if hopper else _AMPERE
    if dtype == torch.float32:
        table = _FLOAT32
    rows, tokens, warps, stages = next(blocks for most, blocks in table[kernel.__name__] if pieces <= most)
    return {"PIECE": piece, "PIECES": pieces, "ROWS": rows, "TOKENS": tokens, "num_warps": warps, "num_stages": stages}


# For up to so many pieces of channels: rows, tokens, warps, stages.
_HOPPER = {
    "forward_kernel": ((4, (128, 64, 8, 2)), (8, (64, 64, 8, 2))),
    "rows_backward_kernel": ((5, (64, 32, 8, 2)), (8, (32, 32, 8, 2))),
    "inputs_backward_kernel": ((5, (32, 64, 8, 2)), (8, (32, 32, 8, 2))),
}
_AMPERE = {
    "forward_kernel": ((2, (64, 32, 4, 2)), (5, (32, 32, 4, 2)), (8, (32, 32, 8, 2))),
    "rows_backward_kernel": ((5, (32, 32, 4, 2)), (8, (32, 32, 8, 2))),
    "inputs_backward_kernel": ((5, (32, 32, 4, 2)), (8, (16, 32, 8, 2))),
}
_FLOAT32 = {
    "forward_kernel": ((4, (16, 16, 8, 1)), (8, (32, 16, 8, 1))),
    "rows_backward_kernel": ((4, (32, 16, 8, 1)), (8, (16, 16, 8, 1))),
    "inputs_backward_kernel": ((8, (16, 16, 8, 1)),),
}


def _launch(kernel: triton.JITFunction, inputs: Tensor, rows: int, *arguments: Tensor | int, **constants: int) -> None:
    """Start as many programs as it takes; ``rows`` are those of one image."""
    batch, tokens, channels = inputs.shape
    # Consumers' Blackwells (12.0) have the shared memory of an Ampere.
    hopper = inputs.is_cuda and 9 <= torch.cuda.get_device_capability(inputs.device)[0] < 12
    blocks = blocks_of(kernel, channels, inputs.dtype, hopper)
    if kernel is prepare_backward_kernel:
        grid = (triton.cdiv(batch * rows, blocks["ROWS"]),)
    elif kernel is inputs_backward_kernel:
        grid = (triton.cdiv(tokens, blocks["TOKENS"]), batch)
        constants["STEPS"] = triton.cdiv(rows, blocks["ROWS"])
    else:
        grid = (triton.cdiv(rows, blocks["ROWS"]), batch)
        constants["STEPS"] = triton.cdiv(tokens, blocks["TOKENS"])
    with torch.cuda.device_of(inputs):
        kernel[grid](*arguments, **constants, **blocks)


def forward(
    absorbed: Tensor, inputs: Tensor, key_scale: Tensor, value_scale: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y and, where it is kept, z, as ``[B, U, H, C]``; the logarithms (to base 2) of the sums, ``[B, U, H]``.

    Args:
        absorbed: ``[B, U, H, C]``, contiguous.
        inputs: ``[B, V, C]``.
        key_scale: float32 ``[U or 1, C]``, with the factor of the softmax.
        value_scale: float32 ``[U or 1, C]``.
    """
    _, latents, heads, channels = absorbed.shape
    gathered = torch.empty_like(absorbed) if keep else absorbed.new_empty(0)
    scaled = torch.empty_like(absorbed)
    logsumexp = absorbed.new_empty(absorbed.shape[:3], dtype=torch.float32)
    _launch(
        forward_kernel,
        inputs,
        latents * heads,
        absorbed,
        inputs.contiguous(),
        key_scale.contiguous(),
        value_scale.contiguous(),
        gathered,
        scaled,
        logsumexp,
        latents * heads,
        inputs.shape[1],
        channels,
        heads,
        KEY_SCALES=key_scale.shape[0] > 1,
        VALUE_SCALES=value_scale.shape[0] > 1,
        KEEP=keep,
    )
    return scaled, gathered, logsumexp


def backward(
    grad_scaled: Tensor,
    absorbed: Tensor,
    inputs: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    gathered: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``absorbed`` and ``inputs``; the products of a and dq~, and of z and dy. Overwrites dy.

    The sums of the products over batch and heads are the gradients of the scales. Arguments as for :func:`forward`.
    """
    _, latents, heads, channels = absorbed.shape
    rows, tokens = latents * heads, inputs.shape[1]
    inputs, key_scale, value_scale = inputs.contiguous(), key_scale.contiguous(), value_scale.contiguous()
    query, value_products, grad_absorbed, key_products = (torch.empty_like(absorbed) for _ in range(4))
    correction, grad_inputs = torch.empty_like(logsumexp), torch.empty_like(inputs)
    own_key_scales, own_value_scales = key_scale.shape[0] > 1, value_scale.shape[0] > 1
    _launch(
        prepare_backward_kernel,
        inputs,
        rows,
        grad_scaled,
        absorbed,
        key_scale,
        value_scale,
        gathered,
        query,
        correction,
        value_products,
        logsumexp.numel(),
        rows,
        channels,
        heads,
        KEY_SCALES=own_key_scales,
        VALUE_SCALES=own_value_scales,
    )
    _launch(
        rows_backward_kernel,
        inputs,
        rows,
        query,
        inputs,
        grad_scaled,
        absorbed,
        key_scale,
        logsumexp,
        correction,
        grad_absorbed,
        key_products,
        rows,
        tokens,
        channels,
        heads,
        KEY_SCALES=own_key_scales,
    )
    _launch(
        inputs_backward_kernel,
        inputs,
        rows,
        query,
        inputs,
        grad_scaled,
        logsumexp,
        correction,
        grad_inputs,
        rows,
        tokens,
        channels,
    )
    return grad_absorbed, grad_inputs, key_products, value_products
