r"""Triton kernels of :func:`m2mkd_fast.ops.latent_attention.latent_attention`.

With :math:`S = q k^\top / \sqrt D + a`, the forward kernel walks through the senders in tiles, keeps the largest score
and the sum of the exponentials of every receiver (online softmax), and writes :math:`o = \mathrm{softmax}(S)\, v` and
:math:`\ell_u = \log \sum_v e^{S_{uv}}`. The backward kernels compute :math:`P = e^{S - \ell}` anew, tile by tile. With
:math:`g = \partial L / \partial o` and :math:`\delta_u = \sum_d g_{ud} o_{ud}`,

.. math::
    \partial S &= P \circ (g v^\top - \delta) &
    \partial q &= \partial S\, k / \sqrt D & \partial k &= \partial S^\top q / \sqrt D &
    \partial v &= P^\top g & \partial a &= \sum_h \partial S_h

One kernel per side of the graph sums over the other side without leaving its program, and one per tile of the graph
sums over the heads (and over a few images, where they share the affinities). Nothing is added atomically: every sum is
taken in one fixed order, and results repeat bit for bit. Scores, sums and gradients of affinities are float32.

The affinities are the same for all heads: a program of the forward and of the receivers' kernel does two heads where
their number is even, and reads a tile of affinities once for both: four bytes a number, these tiles are most of what
moves between the cache and the multiprocessors.

Source: Dao, FlashAttention-2, arXiv 2307.08691, for the division of labour.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_WIDTH = 128  # of a head

_LOG2_E = tl.constexpr(math.log2(math.e))  # the hardware knows powers of two

# How many programs the gradient of affinities is divided into at least, where images that share them allow it. A
# constant, not a property of the device: the order of summation, and with it the last bit, is the same everywhere.
_PROGRAMS = 1024


class Tile(NamedTuple):
    """What a program of a kernel does at a time, and with how much of a multiprocessor."""

    receivers: int
    senders: int
    heads: int
    warps: int
    stages: int


# By kernel; a row is (Hopper, half precision, heads of more than 64). Chosen by registers, shared memory and counted
# instructions, see dev/kernels/latent_attention_triton.md. Not tuned at run time: the order of summation would vary.
_TILES = {
    (True, True, False): {
        "forward": Tile(128, 64, 2, 8, 2),
        "receivers": Tile(128, 64, 2, 8, 2),
        "senders": Tile(64, 64, 1, 4, 2),
        "affinity": Tile(128, 64, 1, 8, 2),
    },
    (True, True, True): {
        "forward": Tile(128, 64, 1, 8, 2),
        "receivers": Tile(64, 64, 1, 4, 2),
        "senders": Tile(64, 64, 1, 8, 2),
        "affinity": Tile(64, 64, 1, 8, 2),
    },
    (False, True, False): {
        "forward": Tile(128, 64, 1, 8, 2),
        "receivers": Tile(128, 32, 1, 8, 2),
        "senders": Tile(64, 32, 1, 4, 2),
        "affinity": Tile(128, 32, 1, 8, 2),
    },
    (False, True, True): {
        "forward": Tile(128, 32, 1, 8, 2),
        "receivers": Tile(64, 64, 1, 4, 2),
        "senders": Tile(32, 32, 1, 4, 2),
        "affinity": Tile(64, 32, 1, 4, 2),
    },
    (True, False, False): {
        "forward": Tile(32, 32, 1, 8, 2),
        "receivers": Tile(32, 32, 1, 8, 2),
        "senders": Tile(32, 32, 1, 8, 2),
        "affinity": Tile(64, 32, 1, 8, 2),
    },
    (True, False, True): {
        "forward": Tile(32, 32, 1, 8, 2),
        "receivers": Tile(32, 32, 1, 8, 2),
        "senders": Tile(16, 32, 1, 8, 1),
        "affinity": Tile(32, 32, 1, 8, 2),
    },
}
_TILES[False, False, False], _TILES[False, False, True] = _TILES[True, False, False], _TILES[True, False, True]


@triton.jit
def left(count, first, BLOCK: tl.constexpr):
    """How many of a block's numbers exist, in 32 bits: so the masks need no wider ones."""
    return tl.minimum(count - first, BLOCK).to(tl.int32)


@triton.jit
def load_rows(matrix, stride, first, count, WIDTH: tl.constexpr, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """The rows from ``first`` on of a matrix with ``count`` rows of WIDTH numbers; zeros outside of it."""
    row, channel = tl.arange(0, ROWS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None, :]
    mask = row < left(count, first, ROWS_BLOCK)
    if WIDTH != WIDTH_BLOCK:
        mask = mask & (channel < WIDTH)
    return tl.load(matrix + first * stride + row * stride.to(tl.int32) + channel, mask=mask, other=0.0)


@triton.jit
def store_rows(
    matrix, stride, first, count, rows, WIDTH: tl.constexpr, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr
):
    row, channel = tl.arange(0, ROWS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None, :]
    mask = (row < left(count, first, ROWS_BLOCK)) & (channel < WIDTH)
    tl.store(matrix + first * stride + row * stride.to(tl.int32) + channel, rows, mask=mask)


@triton.jit
def load_affinities(
    affinity,
    stride,
    first,
    start,
    receivers,
    senders,
    HAS_AFFINITY: tl.constexpr,
    EVEN: tl.constexpr,
    RECEIVER_BLOCK: tl.constexpr,
    SENDER_BLOCK: tl.constexpr,
):
    """A tile of log affinities, -inf beyond the last sender. Zeros where there are none: then a single row."""
    row, column = tl.arange(0, RECEIVER_BLOCK)[:, None], tl.arange(0, SENDER_BLOCK)[None, :]
    exists = column < left(senders, start, SENDER_BLOCK)
    if HAS_AFFINITY:
        at = affinity + first * stride + start + row * stride.to(tl.int32) + column
        inside = row < left(receivers, first, RECEIVER_BLOCK)
        if EVEN:  # no sender to leave out, and so no choice per number
            return tl.load(at, mask=inside, other=0.0).to(tl.float32)
        else:
            return tl.load(at, mask=inside & exists, other=float("-inf")).to(tl.float32)
    else:
        return tl.where(exists, 0.0, float("-inf"))


@triton.jit
def load_statistics(logsumexp, delta, first, count, ROWS_BLOCK: tl.constexpr):
    """log2 of the sum of exponentials, and delta, of the receivers from ``first`` on.

    Where a receiver has no edge, log2 is 0, so that its exponentials are those of -inf, zeros; beyond the last receiver
    it is +inf, with the same effect.
    """
    row = tl.arange(0, ROWS_BLOCK)
    inside = row < left(count, first, ROWS_BLOCK)
    total = tl.load(logsumexp + first + row, mask=inside, other=float("inf"))
    along = tl.load(delta + first + row, mask=inside, other=0.0)
    return tl.where(total == float("-inf"), 0.0, total) * _LOG2_E, along


@triton.jit
def forward_kernel(
    query,  # [batch, heads, receivers, width], as key and value of any strides but the last
    key,  # [batch, heads, senders, width]
    value,  # [batch, heads, senders, width]
    affinity,  # [batch or shared, receivers, senders]
    out,  # [batch, receivers, heads, width]
    logsumexp,  # [batch, heads, receivers]
    query_image,
    query_head,
    query_row,
    key_image,
    key_head,
    key_row,
    value_image,
    value_head,
    value_row,
    affinity_image,
    affinity_row,
    heads,
    receivers,
    senders,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    RECEIVER_BLOCK: tl.constexpr,
    SENDER_BLOCK: tl.constexpr,
    SENDER_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_AFFINITY: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
):
    # Products of sizes pass 32 bits; within a tile they do not.
    heads, receivers, senders = tl.cast(heads, tl.int64), tl.cast(receivers, tl.int64), tl.cast(senders, tl.int64)
    query_row, key_row = tl.cast(query_row, tl.int64), tl.cast(key_row, tl.int64)
    value_row, affinity_row = tl.cast(value_row, tl.int64), tl.cast(affinity_row, tl.int64)
    groups, blocks = heads // HEADS, tl.cdiv(receivers, RECEIVER_BLOCK)
    program = tl.program_id(0)
    image, block, head = program // groups // blocks, program // groups % blocks, program % groups * HEADS
    first = block * RECEIVER_BLOCK
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    affinity += image * affinity_image
    queries, peaks, sums, messages = (), (), (), ()
    for h in tl.static_range(HEADS):
        queries += (load_rows(query + h * query_head, query_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK),)
        peaks += (tl.full([RECEIVER_BLOCK], float("-inf"), dtype=tl.float32),)
        sums += (tl.zeros([RECEIVER_BLOCK], dtype=tl.float32),)
        messages += (tl.zeros([RECEIVER_BLOCK, WIDTH_BLOCK], dtype=tl.float32),)
    for tile in range(SENDER_TILES):
        start = tile * SENDER_BLOCK
        a = load_affinities(
            affinity,
            affinity_row,
            first,
            start,
            receivers,
            senders,
            HAS_AFFINITY,
            EVEN,
            RECEIVER_BLOCK,
            SENDER_BLOCK,
        )
        # Not the largest number: that of NaN and -inf is -inf.
        if not SKIP or tl.max((a != float("-inf")).to(tl.int32)) != 0:
            new_peaks, new_sums, new_messages = (), (), ()
            for h in tl.static_range(HEADS):
                k = load_rows(key + h * key_head, key_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
                v = load_rows(value + h * value_head, value_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
                s = tl.dot(queries[h], k.T, input_precision="ieee") * scale + a
                peak = tl.maximum(peaks[h], tl.max(s, axis=1))
                # A receiver without an edge so far has no peak; any finite number makes its exponentials zeros.
                base = tl.where(peak == float("-inf"), 0.0, peak) * _LOG2_E
                p = tl.exp2(s * _LOG2_E - base[:, None])
                shrink = tl.exp2(peaks[h] * _LOG2_E - base)
                grown = messages[h] * shrink[:, None]
                new_messages += (tl.dot(p.to(v.dtype), v, grown, input_precision="ieee"),)
                new_sums += (sums[h] * shrink + tl.sum(p, axis=1),)
                new_peaks += (peak,)
            peaks, sums, messages = new_peaks, new_sums, new_messages
    row = first + tl.arange(0, RECEIVER_BLOCK)
    for h in tl.static_range(HEADS):
        total = tl.where(sums[h] == 0.0, 1.0, sums[h])
        to = out + (image * receivers * heads + head + h) * WIDTH
        store_rows(
            to,
            heads * WIDTH,
            first,
            receivers,
            messages[h] / total[:, None],
            WIDTH,
            RECEIVER_BLOCK,
            WIDTH_BLOCK,
        )
        at = logsumexp + (image * heads + head + h) * receivers + row
        tl.store(at, peaks[h] + tl.log(total), mask=row < receivers)


@triton.jit
def receivers_kernel(
    grad_out,  # [batch, heads, receivers, width], as the next four of any strides but the last
    query,  # [batch, heads, receivers, width]
    key,  # [batch, heads, senders, width]
    value,  # [batch, heads, senders, width]
    out,  # [batch, heads, receivers, width]
    affinity,  # [batch or shared, receivers, senders]
    logsumexp,  # [batch, heads, receivers]
    delta,  # [batch, heads, receivers], written here for the other two kernels
    grad_query,  # [batch, receivers, heads, width]
    grad_out_image,
    grad_out_head,
    grad_out_row,
    query_image,
    query_head,
    query_row,
    key_image,
    key_head,
    key_row,
    value_image,
    value_head,
    value_row,
    out_image,
    out_head,
    out_row,
    affinity_image,
    affinity_row,
    heads,
    receivers,
    senders,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    RECEIVER_BLOCK: tl.constexpr,
    SENDER_BLOCK: tl.constexpr,
    SENDER_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_AFFINITY: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
):
    heads, receivers, senders = tl.cast(heads, tl.int64), tl.cast(receivers, tl.int64), tl.cast(senders, tl.int64)
    grad_out_row, out_row = tl.cast(grad_out_row, tl.int64), tl.cast(out_row, tl.int64)
    query_row, key_row = tl.cast(query_row, tl.int64), tl.cast(key_row, tl.int64)
    value_row, affinity_row = tl.cast(value_row, tl.int64), tl.cast(affinity_row, tl.int64)
    groups, blocks = heads // HEADS, tl.cdiv(receivers, RECEIVER_BLOCK)
    program = tl.program_id(0)
    image, block, head = program // groups // blocks, program // groups % blocks, program % groups * HEADS
    first = block * RECEIVER_BLOCK
    grad_out += image * grad_out_image + head * grad_out_head
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    out += image * out_image + head * out_head
    affinity += image * affinity_image
    queries, grads, logs, deltas, grad_queries = (), (), (), (), ()
    row = first + tl.arange(0, RECEIVER_BLOCK)
    for h in tl.static_range(HEADS):
        q = load_rows(query + h * query_head, query_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)
        g = load_rows(grad_out + h * grad_out_head, grad_out_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)
        o = load_rows(out + h * out_head, out_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)
        along = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        statistics = (image * heads + head + h) * receivers
        tl.store(delta + statistics + row, along, mask=row < receivers)
        total = tl.load(logsumexp + statistics + row, mask=row < receivers, other=float("inf"))
        queries += (q,)
        grads += (g,)
        logs += (tl.where(total == float("-inf"), 0.0, total) * _LOG2_E,)
        deltas += (along,)
        grad_queries += (tl.zeros([RECEIVER_BLOCK, WIDTH_BLOCK], dtype=tl.float32),)
    for tile in range(SENDER_TILES):
        start = tile * SENDER_BLOCK
        a = load_affinities(
            affinity,
            affinity_row,
            first,
            start,
            receivers,
            senders,
            HAS_AFFINITY,
            EVEN,
            RECEIVER_BLOCK,
            SENDER_BLOCK,
        )
        if not SKIP or tl.max((a != float("-inf")).to(tl.int32)) != 0:
            new_grad_queries = ()
            for h in tl.static_range(HEADS):
                k = load_rows(key + h * key_head, key_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
                v = load_rows(value + h * value_head, value_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
                s = tl.dot(queries[h], k.T, input_precision="ieee") * scale + a
                p = tl.exp2(s * _LOG2_E - logs[h][:, None])
                grad_p = tl.dot(grads[h], v.T, input_precision="ieee")
                grad_s = p * (grad_p - deltas[h][:, None])
                new_grad_queries += (tl.dot(grad_s.to(k.dtype), k, grad_queries[h], input_precision="ieee"),)
            grad_queries = new_grad_queries
    for h in tl.static_range(HEADS):
        to = grad_query + (image * receivers * heads + head + h) * WIDTH
        store_rows(to, heads * WIDTH, first, receivers, grad_queries[h] * scale, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)


@triton.jit
def senders_kernel(
    grad_out,  # [batch, heads, receivers, width], as the next three of any strides but the last
    query,  # [batch, heads, receivers, width]
    key,  # [batch, heads, senders, width]
    value,  # [batch, heads, senders, width]
    affinity,  # [batch or shared, receivers, senders]
    logsumexp,  # [batch, heads, receivers]
    delta,  # [batch, heads, receivers]
    grad_key,  # [batch, senders, heads, width]
    grad_value,  # [batch, senders, heads, width]
    grad_out_image,
    grad_out_head,
    grad_out_row,
    query_image,
    query_head,
    query_row,
    key_image,
    key_head,
    key_row,
    value_image,
    value_head,
    value_row,
    affinity_image,
    affinity_row,
    heads,
    receivers,
    senders,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    RECEIVER_BLOCK: tl.constexpr,
    SENDER_BLOCK: tl.constexpr,
    RECEIVER_TILES: tl.constexpr,
    HAS_AFFINITY: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
):
    heads, receivers, senders = tl.cast(heads, tl.int64), tl.cast(receivers, tl.int64), tl.cast(senders, tl.int64)
    grad_out_row, query_row = tl.cast(grad_out_row, tl.int64), tl.cast(query_row, tl.int64)
    key_row, value_row = tl.cast(key_row, tl.int64), tl.cast(value_row, tl.int64)
    affinity_row = tl.cast(affinity_row, tl.int64)
    blocks = tl.cdiv(senders, SENDER_BLOCK)
    program = tl.program_id(0)
    image, block, head = program // heads // blocks, program // heads % blocks, program % heads
    start = block * SENDER_BLOCK
    grad_out += image * grad_out_image + head * grad_out_head
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    affinity += image * affinity_image
    statistics = (image * heads + head) * receivers
    k = load_rows(key, key_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
    v = load_rows(value, value_row, start, senders, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
    grad_k = tl.zeros([SENDER_BLOCK, WIDTH_BLOCK], dtype=tl.float32)
    grad_v = tl.zeros([SENDER_BLOCK, WIDTH_BLOCK], dtype=tl.float32)
    for tile in range(RECEIVER_TILES):
        first = tile * RECEIVER_BLOCK
        a = load_affinities(
            affinity,
            affinity_row,
            first,
            start,
            receivers,
            senders,
            HAS_AFFINITY,
            EVEN,
            RECEIVER_BLOCK,
            SENDER_BLOCK,
        )
        if not SKIP or tl.max((a != float("-inf")).to(tl.int32)) != 0:
            q = load_rows(query, query_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)
            g = load_rows(grad_out, grad_out_row, first, receivers, WIDTH, RECEIVER_BLOCK, WIDTH_BLOCK)
            log, along = load_statistics(logsumexp + statistics, delta + statistics, first, receivers, RECEIVER_BLOCK)
            s = tl.dot(q, k.T, input_precision="ieee") * scale + a
            p = tl.exp2(s * _LOG2_E - log[:, None])
            grad_v = tl.dot(p.to(g.dtype).T, g, grad_v, input_precision="ieee")
            grad_p = tl.dot(g, v.T, input_precision="ieee")
            grad_s = p * (grad_p - along[:, None])
            grad_k = tl.dot(grad_s.to(q.dtype).T, q, grad_k, input_precision="ieee")
    at = (image * senders * heads + head) * WIDTH
    store_rows(grad_key + at, heads * WIDTH, start, senders, grad_k * scale, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)
    store_rows(grad_value + at, heads * WIDTH, start, senders, grad_v, WIDTH, SENDER_BLOCK, WIDTH_BLOCK)


@triton.jit
def affinity_kernel(
    grad_out,  # [batch, heads, receivers, width], as the next three of any strides but the last
    query,  # [batch, heads, receivers, width]
    key,  # [batch, heads, senders, width]
    value,  # [batch, heads, senders, width]
    affinity,  # [slices or shared, receivers, senders]
    logsumexp,  # [batch, heads, receivers]
    delta,  # [batch, heads, receivers]
    grad_affinity,  # [slices of IMAGES images, receivers, senders]
    grad_out_image,
    grad_out_head,
    grad_out_row,
    query_image,
    query_head,
    query_row,
    key_image,
    key_head,
    key_row,
    value_image,
    value_head,
    value_row,
    affinity_image,
    affinity_row,
    batch,
    receivers,
    senders,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    RECEIVER_BLOCK: tl.constexpr,
    SENDER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
):
    receivers, senders = tl.cast(receivers, tl.int64), tl.cast(senders, tl.int64)
    grad_out_head, query_head = tl.cast(grad_out_head, tl.int64), tl.cast(query_head, tl.int64)
    key_head, value_head = tl.cast(key_head, tl.int64), tl.cast(value_head, tl.int64)
    grad_out_row, query_row = tl.cast(grad_out_row, tl.int64), tl.cast(query_row, tl.int64)
    key_row, value_row = tl.cast(key_row, tl.int64), tl.cast(value_row, tl.int64)
    affinity_row = tl.cast(affinity_row, tl.int64)
    blocks, tiles = tl.cdiv(receivers, RECEIVER_BLOCK), tl.cdiv(senders, SENDER_BLOCK)
    program = tl.program_id(0)
    piece, block, tile = program // tiles // blocks, program // tiles % blocks, program % tiles
    first, start = block * RECEIVER_BLOCK, tile * SENDER_BLOCK
    affinity += piece * affinity_image
    a = load_affinities(
        affinity, affinity_row, first, start, receivers, senders, True, EVEN, RECEIVER_BLOCK, SENDER_BLOCK
    )
    grad_a = tl.zeros([RECEIVER_BLOCK, SENDER_BLOCK], dtype=tl.float32)
    if not SKIP or tl.max((a != float("-inf")).to(tl.int32)) != 0:
        a *= _LOG2_E
        for step in range(IMAGES * HEADS):
            image, head, some, others = piece, step, receivers, senders
            if IMAGES > 1:
                image, head = piece * IMAGES + step // HEADS, step % HEADS
                # Beyond the batch there is nothing to read, and nothing to add.
                some, others = tl.where(image < batch, receivers, 0), tl.where(image < batch, senders, 0)
            q = load_rows(
                query + image * query_image + head * query_head,
                query_row,
                first,
                some,
                WIDTH,
                RECEIVER_BLOCK,
                WIDTH_BLOCK,
            )
            g = load_rows(
                grad_out + image * grad_out_image + head * grad_out_head,
                grad_out_row,
                first,
                some,
                WIDTH,
                RECEIVER_BLOCK,
                WIDTH_BLOCK,
            )
            k = load_rows(
                key + image * key_image + head * key_head,
                key_row,
                start,
                others,
                WIDTH,
                SENDER_BLOCK,
                WIDTH_BLOCK,
            )
            v = load_rows(
                value + image * value_image + head * value_head,
                value_row,
                start,
                others,
                WIDTH,
                SENDER_BLOCK,
                WIDTH_BLOCK,
            )
            statistics = (image * HEADS + head) * receivers
            log, along = load_statistics(logsumexp + statistics, delta + statistics, first, some, RECEIVER_BLOCK)
            s = tl.dot(q, k.T, input_precision="ieee") * (scale * _LOG2_E) + a
            p = tl.exp2(s - log[:, None])
            grad_a += p * (tl.dot(g, v.T, input_precision="ieee") - along[:, None])
    row, column = tl.arange(0, RECEIVER_BLOCK)[:, None], tl.arange(0, SENDER_BLOCK)[None, :]
    to = grad_affinity + (piece * receivers + first) * senders + start + row * senders.to(tl.int32) + column
    mask = (row < left(receivers, first, RECEIVER_BLOCK)) & (column < left(senders, start, SENDER_BLOCK))
    tl.store(to, grad_a, mask=mask)


def tiles_of(dtype: torch.dtype, width: int, hopper: bool, receivers: int, heads: int) -> dict[str, Tile]:
    """The tiles of all kernels. No more receivers at a time than there are, where that halves the block."""
    tiles = dict(_TILES[hopper, dtype != torch.float32, width > 64])
    for name, tile in tiles.items():
        while tile.receivers > 64 and receivers <= tile.receivers // 2:
            tile = tile._replace(receivers=tile.receivers // 2, warps=max(tile.warps // 2, 4))
        if heads % tile.heads:
            tile = tile._replace(heads=1)
        tiles[name] = tile
    return tiles


def images_of(batch: int, receivers: int, senders: int, tile: Tile) -> int:
    """Images whose gradients a program adds up where they share the affinities: a power of two, to compile few."""
    per_image = triton.cdiv(receivers, tile.receivers) * triton.cdiv(senders, tile.senders)
    return triton.next_power_of_2(max(batch * per_image // _PROGRAMS, 1))


def forward(
    query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor | None, skip_empty_tiles: bool
) -> tuple[Tensor, Tensor]:
    """Messages ``[B, H, U, D]`` of the values' dtype, in memory ``[B, U, H, D]``; logsumexp ``[B, H, U]``, float32."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    (batch, heads, receivers, width), senders = query.shape, key.shape[2]
    out, logsumexp = _empty(query), query.new_empty((batch, heads, receivers), dtype=torch.float32)
    if out.numel() == 0 or senders == 0:
        return out.zero_(), logsumexp.fill_(-math.inf)
    affinity = _affinities(log_affinity, query)
    tile = tiles_of(query.dtype, width, _is_hopper(query), receivers, heads)["forward"]
    with torch.cuda.device_of(query):
        forward_kernel[(batch * (heads // tile.heads) * triton.cdiv(receivers, tile.receivers),)](
            query,
            key,
            value,
            affinity,
            out,
            logsumexp,
            *_strides(query, key, value),
            *affinity.stride()[:2],
            heads,
            receivers,
            senders,
            width**-0.5,
            SENDER_TILES=triton.cdiv(senders, tile.senders),
            HEADS=tile.heads,
            HAS_AFFINITY=log_affinity is not None,
            **_sizes(width, tile, senders, skip_empty_tiles and log_affinity is not None),
        )
    return out, logsumexp


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_affinity: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    need_affinity: bool,
    skip_empty_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, laid out as the messages are; of ``log_affinity``, in its shape and dtype.

    The last one is empty where it is not needed, or where there are no affinities.
    """
    need_affinity = need_affinity and log_affinity is not None
    grad_query, grad_key, grad_value = _empty(query), _empty(key), _empty(value)
    (batch, heads, receivers, width), senders = query.shape, key.shape[2]
    if grad_query.numel() == 0 or grad_key.numel() == 0:
        grad_affinity = log_affinity.new_zeros(log_affinity.shape) if need_affinity else query.new_empty(0)
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_affinity
    grad_out, query, key, value, out = (_rows(tensor) for tensor in (grad_out, query, key, value, out))
    affinity = _affinities(log_affinity, query)
    logsumexp = logsumexp.contiguous()
    delta = torch.empty_like(logsumexp)
    tiles = tiles_of(query.dtype, width, _is_hopper(query), receivers, heads)
    skip = skip_empty_tiles and log_affinity is not None
    strides = (*_strides(grad_out, query, key, value), *affinity.stride()[:2])
    grad_affinity = query.new_empty(0)
    with torch.cuda.device_of(query):
        tile = tiles["receivers"]
        receivers_kernel[(batch * (heads // tile.heads) * triton.cdiv(receivers, tile.receivers),)](
            grad_out,
            query,
            key,
            value,
            out,
            affinity,
            logsumexp,
            delta,
            grad_query,
            *_strides(grad_out, query, key, value, out),
            *affinity.stride()[:2],
            heads,
            receivers,
            senders,
            width**-0.5,
            SENDER_TILES=triton.cdiv(senders, tile.senders),
            HEADS=tile.heads,
            HAS_AFFINITY=log_affinity is not None,
            **_sizes(width, tile, senders, skip),
        )
        tile = tiles["senders"]
        senders_kernel[(batch * heads * triton.cdiv(senders, tile.senders),)](
            grad_out,
            query,
            key,
            value,
            affinity,
            logsumexp,
            delta,
            grad_key,
            grad_value,
            *strides,
            heads,
            receivers,
            senders,
            width**-0.5,
            RECEIVER_TILES=triton.cdiv(receivers, tile.receivers),
            HAS_AFFINITY=log_affinity is not None,
            **_sizes(width, tile, senders, skip),
        )
        if need_affinity:
            tile = tiles["affinity"]
            images = images_of(batch, receivers, senders, tile) if log_affinity.dim() == 2 else 1
            slices = triton.cdiv(batch, images)
            parts = query.new_empty((slices, receivers, senders), dtype=torch.float32)
            affinity_kernel[(slices * triton.cdiv(receivers, tile.receivers) * triton.cdiv(senders, tile.senders),)](
                grad_out,
                query,
                key,
                value,
                affinity,
                logsumexp,
                delta,
                parts,
                *strides,
                batch,
                receivers,
                senders,
                width**-0.5,
                HEADS=heads,
                IMAGES=images,
                **_sizes(width, tile, senders, skip),
            )
            grad_affinity = (parts if log_affinity.dim() == 3 else parts.sum(0)).to(log_affinity.dtype)
    return grad_query, grad_key, grad_value, grad_affinity


def _is_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last one's."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty(tensor: Tensor) -> Tensor:
    """Shaped ``[B, H, N, D]`` as ``tensor``, in memory ``[B, N, H, D]``: the next projection reads it as it is."""
    batch, heads, latents, width = tensor.shape
    return tensor.new_empty((batch, latents, heads, width)).transpose(1, 2)


def _affinities(log_affinity: Tensor | None, instead: Tensor) -> Tensor:
    """``[B, U, V]``, of stride 0 where images share them; any tensor where there are none: it is not read."""
    if log_affinity is None:
        return instead
    return _rows(log_affinity).expand(instead.shape[0], -1, -1)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(width: int, tile: Tile, senders: int, skip: bool) -> dict[str, int | bool]:
    """The compile-time constants that all kernels have, and what the compiler is told beside them."""
    return {
        "WIDTH": width,
        "WIDTH_BLOCK": max(triton.next_power_of_2(width), 16),
        "RECEIVER_BLOCK": tile.receivers,
        "SENDER_BLOCK": tile.senders,
        "EVEN": senders % tile.senders == 0,
        "SKIP": skip,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
