"""The sums of :mod:`m2mkd_fast.kernels.expert_mlp`: over a token's rows, and over what the products leave in parts.

Every sum is taken in one fixed order, nothing is added atomically: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m2mkd_fast.kernels.expert_mlp_products import bound, counts_of, find_tile, kept, pieces_of, tile_ends


@triton.jit
def combine_kernel(
    rows,  # [rows, WIDTH]
    weight,  # [rows]
    place,  # [tokens, CHOICES]
    outputs,  # [tokens, WIDTH]
    tokens,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """The sum of each token's rows, times their weights."""
    tokens = tl.cast(tokens, tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
    column = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    total = tl.zeros([TOKENS_BLOCK, WIDTH_BLOCK], dtype=tl.float32)
    for choice in range(CHOICES):
        row = tl.load(place + token * CHOICES + choice, mask=token < tokens, other=-1)
        exists = row >= 0
        inside = exists[:, None] & (column < WIDTH)[None, :]
        values = tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weight + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        total += values
    stored = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    tl.store(outputs + token[:, None] * WIDTH + column[None, :], total, mask=stored)


@triton.jit
def gradient_rows_kernel(
    grad_out,  # [tokens, WIDTH], of any stride but the last
    token,  # [rows]
    row_weight,  # [rows]
    offsets,  # [EXPERTS + 1]
    bias,  # [EXPERTS, WIDTH]
    dropped,  # [rows, WIDTH]: the gradients of the rows, before their weights, where dropout kept them
    along,  # [rows], float32: the bias' part of the gradient of the weight
    grad_bias,  # [row tiles, WIDTH], float32: sums of a part of the rows
    seed,
    grad_out_row,
    counter,  # of philox at the first row
    threshold,
    scale,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What the gradient of the outputs gives without a product of matrices; a program takes a tile of rows."""
    grad_out_row = tl.cast(grad_out_row, tl.int64)
    tile = tl.program_id(0)
    ends = tile_ends(offsets, EXPERTS, EXPERTS_BLOCK, ROWS)
    if tile < tl.max(ends, 0):
        expert, first, height = find_tile(offsets, ends, tile, ROWS)
        line = tl.arange(0, ROWS)
        exists = line < height
        rows = grad_out + tl.load(token + first + line, mask=exists, other=0) * grad_out_row
        weight = tl.load(row_weight + first + line, mask=exists, other=0.0).to(tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = exists[:, None] & (column < WIDTH)[None, :]
            grad = tl.load(rows[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                keep = kept(seed, first + line, counter, start, threshold, WIDTH, COLUMNS)
                grad = tl.where(keep, grad * scale, 0.0)
                to = dropped + first * WIDTH + line[:, None] * WIDTH + column[None, :]
                tl.store(to, grad, mask=inside)
            if HAS_BIAS:
                b = tl.load(bias + expert * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
                total += tl.sum(grad * b[None, :], 1)
                to = grad_bias + tile.to(tl.int64) * WIDTH + column
                tl.store(to, tl.sum(grad * weight[:, None], 0), mask=column < WIDTH)
        if HAS_BIAS:
            tl.store(along + first + line, total, mask=exists)


@triton.jit
def row_weight_kernel(
    parts,  # [PARTS, rows], float32
    along,  # [rows], float32
    offsets,  # [EXPERTS + 1]
    grad,  # [rows]
    rows,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of the rows' weights; zero in the tail of dropped choices."""
    rows = tl.cast(rows, tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = row < tl.load(offsets + EXPERTS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * rows + row, mask=used, other=0.0)
    if HAS_BIAS:
        total += tl.load(along + row, mask=used, other=0.0)
    tl.store(grad + row, total, mask=row < rows)


@triton.jit
def sum_tiles_kernel(
    parts,  # [row tiles, width], float32
    offsets,  # [EXPERTS + 1]
    sums,  # [EXPERTS, width]
    width,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of the tiles of each expert."""
    width = tl.cast(width, tl.int64)
    expert = tl.program_id(0)
    ends = tile_ends(offsets, EXPERTS, EXPERTS_BLOCK, ROWS)
    number = tl.arange(0, EXPERTS_BLOCK)
    first = tl.sum(tl.where(number == expert - 1, ends, 0), 0)
    stop = tl.sum(tl.where(number == expert, ends, 0), 0)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TILES, COLUMNS], dtype=tl.float32)
    for start in range(bound(first), bound(stop), TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < stop)[:, None] & (column < width)[None, :]
        total += tl.load(parts + tile[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
    tl.store(sums + expert.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit
def sum_pieces_kernel(
    parts,  # [slots, size], float32
    offsets,  # [EXPERTS + 1]
    sums,  # [EXPERTS, size]
    size,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the pieces of each expert that has several; of the others there is nothing here."""
    size = tl.cast(size, tl.int64)
    expert = tl.program_id(1)
    number = tl.arange(0, EXPERTS_BLOCK)
    pieces = pieces_of(counts_of(offsets, EXPERTS, EXPERTS_BLOCK), PIECE)
    own = tl.sum(tl.where(number == expert, pieces, 0), 0)
    if own > 1:
        slot = tl.sum(tl.where((number < expert) & (pieces > 1), pieces, 0), 0)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for piece in range(bound(slot), bound(slot + own)):
            total += tl.load(parts + tl.cast(piece, tl.int64) * size + at, mask=at < size, other=0.0)
        tl.store(sums + expert.to(tl.int64) * size + at, total, mask=at < size)
