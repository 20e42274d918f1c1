"""The matrix products of :mod:`m2mkd_fast.kernels.expert_mlp`: rows sorted by expert, a matrix for each expert.

The kernels over rows are persistent: a program walks through the tiles of all experts with the stride of the grid.
Which tiles there are it counts from the offsets, so the host never waits for the device, and an expert with many rows
costs as much as many experts with few. Neighbouring programs take the row tiles of one group, then its next column, so
that rows and matrices are still in the cache. Gathering rows by their tokens is part of the load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m2mkd_fast.kernels.modulated_geglu import normal_distribution

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ROOT_OF_2_BY_PI = tl.constexpr(0.7978845608028654)
_ROOT_OF_1_BY_2_PI = tl.constexpr(0.3989422804014327)

if _INTERPRETED.value:

    def bound(number: tl.tensor) -> int:
        """Of a loop. Python's `range` takes no array of one element, which is what the interpreter's numbers are."""
        return number.handle.data.item() if isinstance(number, tl.tensor) else number

else:

    @triton.jit
    def bound(number):
        return number


@triton.jit
def dot(left, right, total):
    """``left @ right + total`` in float32: exact products, no TF32."""
    if _INTERPRETED:  # it would take the bits of bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def load_tile(at, row_exists, column_exists, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A matrix from the pointers ``at``, zero where its row or its column does not exist."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(at, mask=row_exists[:, None] & column_exists[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(at, mask=row_exists[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(at, mask=column_exists[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def counts_of(offsets, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr):
    """[EXPERTS_BLOCK] rows of every expert."""
    expert = tl.arange(0, EXPERTS_BLOCK)
    start = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    return tl.load(offsets + 1 + expert, mask=expert < EXPERTS, other=0) - start


@triton.jit
def tile_ends(offsets, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """[EXPERTS_BLOCK] tiles of ROWS rows that the experts up to each have together; a tile holds one expert's rows."""
    return tl.cumsum(tl.cdiv(counts_of(offsets, EXPERTS, EXPERTS_BLOCK), ROWS).to(tl.int32), 0)


@triton.jit
def find_tile(offsets, ends, tile, ROWS: tl.constexpr):
    """Expert and first row of a tile, in 64 bits, and how many rows it has."""
    before = ends <= tile
    expert = tl.sum(before.to(tl.int32), 0).to(tl.int64)
    start, stop = tl.load(offsets + expert), tl.load(offsets + 1 + expert)
    first = start + (tile - tl.max(tl.where(before, ends, 0), 0)).to(tl.int64) * ROWS
    return expert, first, tl.minimum(stop - first, ROWS).to(tl.int32)


@triton.jit
def in_groups(number, rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the tile that comes as this number: GROUP rows, column by column, then the next ones."""
    first = number // (GROUP * COLUMNS) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = number % (GROUP * COLUMNS)
    return first + within % height, within // height


@triton.jit
def kept(seed, row, start, first, threshold, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask of what dropout keeps of COLUMNS units from ``first``, a multiple of 4, on: see philox_keep."""
    counter = start + row.to(tl.int64) * ((WIDTH + 3) // 4) + first // 4
    words = tl.randint4x(tl.load(seed), counter[:, None] + tl.arange(0, COLUMNS // 4)[None, :])
    threshold = tl.cast(threshold, tl.int64)  # may need 33 bits
    # As bytes, not words: the mask changes the threads that hold it by way of shared memory.
    k0, k1 = (words[0].to(tl.int64) >= threshold).to(tl.int8), (words[1].to(tl.int64) >= threshold).to(tl.int8)
    k2, k3 = (words[2].to(tl.int64) >= threshold).to(tl.int8), (words[3].to(tl.int64) >= threshold).to(tl.int8)
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [row.shape[0], COLUMNS]) != 0


@triton.jit
def halves(values):
    """The left and the right half of a matrix's columns."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    return tl.split(tl.permute(tl.reshape(values, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def slices(values, SLICES: tl.constexpr):
    """The columns of a matrix in one, two or four slices.

    What is done with a product slice by slice needs fewer registers than what is done with all of it at once.
    """
    parts = (values,)
    if SLICES > 1:
        parts = halves(values)
    if SLICES > 2:
        parts = halves(parts[0]) + halves(parts[1])
    return parts


@triton.jit
def inside(line, height, column, columns, MASK_COLUMNS: tl.constexpr):
    """Mask of the part of a tile that there is."""
    if MASK_COLUMNS:
        return (line < height)[:, None] & (column < columns)[None, :]
    else:
        return (line < height)[:, None] & (column >= 0)[None, :]


@triton.jit
def add_bias(values, bias, column, columns):
    return values + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation, or that of the gates, and its derivative."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        cdf, e = normal_distribution(z)
        return z * cdf, cdf + z * (_ROOT_OF_1_BY_2_PI * e)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the logistic function of 2 u
        square = z * z
        share = 1.0 / (1.0 + tl.exp(-2.0 * _ROOT_OF_2_BY_PI * z * (1.0 + 0.044715 * square)))
        slope = 2.0 * _ROOT_OF_2_BY_PI * (1.0 + 3.0 * 0.044715 * square)
        return z * share, share + z * share * (1.0 - share) * slope
    else:
        share = 1.0 / (1.0 + tl.exp(-z))
        return z * share, share * (1.0 + z * (1.0 - share))


@triton.jit
def multiply(
    rows,  # [ROWS] pointers to their first numbers
    matrix,  # pointer to its first number
    columns,  # of the matrix that there are
    INNER: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows times a matrix [INNER, COLUMNS]."""
    inner, column = tl.arange(0, STEP), tl.arange(0, COLUMNS)
    total = tl.zeros([rows.shape[0], COLUMNS], dtype=tl.float32)
    for first in range(0, INNER, STEP):
        exists = first + inner < INNER
        left = load_tile(rows[:, None] + (first + inner)[None, :], exists, exists, False, INNER % STEP != 0)
        at = matrix + inner[:, None] * INNER_STRIDE + column[None, :] * COLUMN_STRIDE
        right = load_tile(at, exists, column < columns, INNER % STEP != 0, MASK_COLUMNS)
        total = dot(left, right, total)
        matrix += STEP * INNER_STRIDE  # not an offset: that could pass 32 bits
    return total


@triton.jit
def multiply_twice(
    rows,
    matrix,
    second,  # pointer to the first number of a second matrix
    columns,
    INNER: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows times two matrices whose columns are contiguous."""
    inner, column = tl.arange(0, STEP), tl.arange(0, COLUMNS)
    total = tl.zeros([rows.shape[0], COLUMNS], dtype=tl.float32)
    second_total = tl.zeros([rows.shape[0], COLUMNS], dtype=tl.float32)
    for first in range(0, INNER, STEP):
        exists = first + inner < INNER
        left = load_tile(rows[:, None] + (first + inner)[None, :], exists, exists, False, INNER % STEP != 0)
        offset = (first + inner)[:, None] + column[None, :] * COLUMN_STRIDE
        right = load_tile(matrix + offset, exists, column < columns, INNER % STEP != 0, MASK_COLUMNS)
        total = dot(left, right, total)
        right = load_tile(second + offset, exists, column < columns, INNER % STEP != 0, MASK_COLUMNS)
        second_total = dot(left, right, second_total)
    return total, second_total


@triton.jit
def up_kernel(
    x,  # [tokens, WIDTH], of any stride but the last
    token,  # [rows]
    offsets,  # [EXPERTS + 1]
    weight,  # [EXPERTS, HIDDEN or 2 HIDDEN, WIDTH]
    bias,  # [EXPERTS, HIDDEN or 2 HIDDEN]
    preactivation,  # [rows, HIDDEN or 2 HIDDEN], where it is KEPT
    hidden,  # [rows, HIDDEN]
    seed,
    x_row,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    x_row = tl.cast(x_row, tl.int64)
    TOTAL: tl.constexpr = 2 * HIDDEN if GATED else HIDDEN
    COLUMN_TILES: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    MASK: tl.constexpr = HIDDEN % COLUMNS != 0
    ends = tile_ends(offsets, EXPERTS, EXPERTS_BLOCK, ROWS)
    row_tiles = tl.max(ends, 0)
    for number in range(bound(tl.program_id(0)), bound(row_tiles * COLUMN_TILES), bound(tl.num_programs(0))):
        tile, column_tile = in_groups(number, row_tiles, COLUMN_TILES, GROUP)
        expert, first, height = find_tile(offsets, ends, tile, ROWS)
        start, line = column_tile * COLUMNS, tl.arange(0, ROWS)
        # Beyond the last row the last row once more: no mask in the loop, and it is not stored.
        rows = x + tl.load(token + first + tl.minimum(line, height - 1)) * x_row
        matrix = weight + (expert * TOTAL + start) * WIDTH
        columns = HIDDEN - start
        if GATED:
            product, gates = multiply_twice(
                rows, matrix, matrix + HIDDEN * WIDTH, columns, WIDTH, WIDTH, MASK, COLUMNS, STEP
            )
            gates = slices(gates, SLICES)
        else:
            product = multiply(rows, matrix, columns, WIDTH, 1, WIDTH, MASK, COLUMNS, STEP)
        values = slices(product, SLICES)
        column = tl.arange(0, COLUMNS // SLICES)
        for number_of_slice in tl.static_range(SLICES):
            stored = inside(line, height, column, columns, MASK)
            to = preactivation + first * TOTAL + start + line[:, None] * TOTAL + column[None, :]
            z = values[number_of_slice]
            if HAS_BIAS:
                z = add_bias(z, bias + expert * TOTAL + start, column, columns)
            if KEPT:
                tl.store(to, z, mask=stored)
            if GATED:
                gate = gates[number_of_slice]
                if HAS_BIAS:
                    gate = add_bias(gate, bias + expert * TOTAL + HIDDEN + start, column, columns)
                if KEPT:
                    tl.store(to + HIDDEN, gate, mask=stored)
                a, _ = activate(gate, ACTIVATION)
                a *= z
            else:
                a, _ = activate(z, ACTIVATION)
            if DROPOUT:
                keep = kept(seed, first + line, 0, start, threshold, HIDDEN, COLUMNS // SLICES)
                a = tl.where(keep, a * scale, 0.0)
            tl.store(hidden + first * HIDDEN + start + line[:, None] * HIDDEN + column[None, :], a, mask=stored)
            start += COLUMNS // SLICES
            columns -= COLUMNS // SLICES


@triton.jit
def product_kernel(
    inputs,  # [rows, INNER]
    offsets,  # [EXPERTS + 1]
    weight,  # [EXPERTS, WIDTH, INNER], or TURNED: [EXPERTS, INNER, WIDTH]
    bias,  # [EXPERTS, WIDTH]
    outputs,  # [rows, WIDTH]
    seed,
    counter,  # of philox at the first row
    threshold,
    scale,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    INNER_STRIDE: tl.constexpr = WIDTH if TURNED else 1
    COLUMN_STRIDE: tl.constexpr = 1 if TURNED else INNER
    MASK: tl.constexpr = WIDTH % COLUMNS != 0
    ends = tile_ends(offsets, EXPERTS, EXPERTS_BLOCK, ROWS)
    row_tiles = tl.max(ends, 0)
    for number in range(bound(tl.program_id(0)), bound(row_tiles * COLUMN_TILES), bound(tl.num_programs(0))):
        tile, column_tile = in_groups(number, row_tiles, COLUMN_TILES, GROUP)
        expert, first, height = find_tile(offsets, ends, tile, ROWS)
        start, line = column_tile * COLUMNS, tl.arange(0, ROWS)
        rows = inputs + first * INNER + tl.minimum(line, height - 1) * INNER
        matrix = weight + expert * INNER * WIDTH + start * COLUMN_STRIDE
        columns = WIDTH - start
        product = multiply(rows, matrix, columns, INNER, INNER_STRIDE, COLUMN_STRIDE, MASK, COLUMNS, STEP)
        values = slices(product, SLICES)
        column = tl.arange(0, COLUMNS // SLICES)
        for number_of_slice in tl.static_range(SLICES):
            y = values[number_of_slice]
            if HAS_BIAS:
                y = add_bias(y, bias + expert * WIDTH + start, column, columns)
            if DROPOUT:
                keep = kept(seed, first + line, counter, start, threshold, WIDTH, COLUMNS // SLICES)
                y = tl.where(keep, y * scale, 0.0)
            to = outputs + first * WIDTH + start + line[:, None] * WIDTH + column[None, :]
            tl.store(to, y, mask=inside(line, height, column, columns, MASK))
            start += COLUMNS // SLICES
            columns -= COLUMNS // SLICES


@triton.jit
def grad_hidden_kernel(
    grad_out,  # GATHERED: [tokens, OUTPUTS], of any stride but the last; else [rows, OUTPUTS]
    preactivation,  # [rows, HIDDEN or 2 HIDDEN]
    token,  # [rows]
    row_weight,  # [rows]
    offsets,  # [EXPERTS + 1]
    weight,  # [EXPERTS, OUTPUTS, HIDDEN]
    hidden,  # [rows, HIDDEN]: times the weight of its row, for the gradient of the weights
    grad_preactivation,  # [rows, HIDDEN or 2 HIDDEN]
    grad_row_weight,  # [column tiles, rows], float32: sums of a part of the columns
    grad_bias,  # [row tiles, HIDDEN or 2 HIDDEN], float32: sums of a part of the rows
    seed,
    grad_out_row,
    row_count,
    threshold,
    scale,
    OUTPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GATHERED: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    grad_out_row, row_count = tl.cast(grad_out_row, tl.int64), tl.cast(row_count, tl.int64)
    TOTAL: tl.constexpr = 2 * HIDDEN if GATED else HIDDEN
    COLUMN_TILES: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    MASK: tl.constexpr = HIDDEN % COLUMNS != 0
    ends = tile_ends(offsets, EXPERTS, EXPERTS_BLOCK, ROWS)
    row_tiles = tl.max(ends, 0)
    for number in range(bound(tl.program_id(0)), bound(row_tiles * COLUMN_TILES), bound(tl.num_programs(0))):
        tile, column_tile = in_groups(number, row_tiles, COLUMN_TILES, GROUP)
        expert, first, height = find_tile(offsets, ends, tile, ROWS)
        start, line = column_tile * COLUMNS, tl.arange(0, ROWS)
        row = first + tl.minimum(line, height - 1)
        rows = grad_out + row * OUTPUTS
        if GATHERED:
            rows = grad_out + tl.load(token + row) * grad_out_row
        columns = HIDDEN - start
        matrix = weight + expert * OUTPUTS * HIDDEN + start
        product = multiply(rows, matrix, columns, OUTPUTS, HIDDEN, 1, MASK, COLUMNS, STEP)
        share = tl.load(row_weight + first + line, mask=line < height, other=0.0).to(tl.float32)[:, None]
        along = tl.zeros([ROWS], dtype=tl.float32)
        grads = slices(product, SLICES)
        column = tl.arange(0, COLUMNS // SLICES)
        for number_of_slice in tl.static_range(SLICES):
            grad = grads[number_of_slice]
            stored = inside(line, height, column, columns, MASK)
            at = first * TOTAL + start + line[:, None] * TOTAL + column[None, :]
            sums = grad_bias + tile.to(tl.int64) * TOTAL + start + column
            z = tl.load(preactivation + at, mask=stored, other=0.0).to(tl.float32)
            if DROPOUT:
                keep = kept(seed, first + line, 0, start, threshold, HIDDEN, COLUMNS // SLICES)
                grad = tl.where(keep, grad * scale, 0.0)
            if GATED:
                gate = tl.load(preactivation + at + HIDDEN, mask=stored, other=0.0).to(tl.float32)
                phi, slope = activate(gate, ACTIVATION)
                a = z * phi
                grad_gate = share * grad * z * slope
                tl.store(grad_preactivation + at + HIDDEN, grad_gate, mask=stored)
                if SUM_BIAS:
                    tl.store(sums + HIDDEN, tl.sum(tl.where(stored, grad_gate, 0.0), 0), mask=column < columns)
                grad_z = share * grad * phi
            else:
                a, slope = activate(z, ACTIVATION)
                grad_z = share * grad * slope
            tl.store(grad_preactivation + at, grad_z, mask=stored)
            if SUM_BIAS:
                tl.store(sums, tl.sum(tl.where(stored, grad_z, 0.0), 0), mask=column < columns)
            along += tl.sum(tl.where(stored, grad * a, 0.0), 1)
            if DROPOUT:
                a = tl.where(keep, a * scale, 0.0)
            to = hidden + first * HIDDEN + start + line[:, None] * HIDDEN + column[None, :]
            tl.store(to, share * a, mask=stored)
            start += COLUMNS // SLICES
            columns -= COLUMNS // SLICES
        tl.store(grad_row_weight + column_tile * row_count + first + line, along, mask=line < height)


@triton.jit
def pieces_of(counts, PIECE: tl.constexpr):
    """Into how many pieces of at most PIECE rows the rows of an expert are divided: one at least."""
    return tl.maximum(tl.cdiv(counts, PIECE), 1).to(tl.int32)


@triton.jit
def grad_matrix_kernel(
    left,  # [rows or tokens, HEIGHT], of any stride but the last
    right,  # [rows or tokens, WIDTH], the same
    token,  # [rows]
    offsets,  # [EXPERTS + 1]
    grad,  # [EXPERTS, HEIGHT, WIDTH]: sums over an expert's rows of the products of a left and a right row
    parts,  # [slots, HEIGHT, WIDTH], float32: those of the pieces of experts that have several, in their order
    left_row,
    right_row,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    GATHER_LEFT: tl.constexpr,  # its rows are those of the tokens
    GATHER_RIGHT: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,  # whether an expert can have several pieces
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One tile a program, and no more: the hardware deals out tiles of uneven length better than a fixed stride does.
    left_row, right_row = tl.cast(left_row, tl.int64), tl.cast(right_row, tl.int64)
    ROW_TILES: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    piece = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    pieces = pieces_of(counts_of(offsets, EXPERTS, EXPERTS_BLOCK), PIECE)
    pieces = tl.where(tl.arange(0, EXPERTS_BLOCK) < EXPERTS, pieces, 0)
    ends = tl.cumsum(pieces, 0)
    if piece < tl.max(ends, 0):
        before = ends <= piece
        expert = tl.sum(before.to(tl.int32), 0).to(tl.int64)
        place = piece - tl.max(tl.where(before, ends, 0), 0)
        start = tl.load(offsets + expert) + place.to(tl.int64) * PIECE
        count = tl.minimum(tl.load(offsets + 1 + expert) - start, PIECE).to(tl.int32)
        row_tile, column_tile = in_groups(tl.program_id(0) % (ROW_TILES * COLUMN_TILES), ROW_TILES, COLUMN_TILES, GROUP)
        top, side = row_tile * ROWS, column_tile * COLUMNS
        line, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, bound(count), STEP):
            exists = first + inner < count
            row = start + first + inner
            left_at, right_at = row, row
            if GATHER_LEFT:
                left_at = tl.load(token + row, mask=exists, other=0)
            if GATHER_RIGHT:
                right_at = tl.load(token + row, mask=exists, other=0)
            # Transposed in the load: threads that follow each other still read numbers that do.
            at = left + top + (left_at * left_row)[None, :] + line[:, None]
            a = load_tile(at, top + line < HEIGHT, exists, HEIGHT % ROWS != 0, True)
            at = right + side + (right_at * right_row)[:, None] + column[None, :]
            b = load_tile(at, exists, side + column < WIDTH, True, WIDTH % COLUMNS != 0)
            total = dot(a, b, total)
        stored = (top + line < HEIGHT)[:, None] & (side + column < WIDTH)[None, :]
        at = (top + line)[:, None].to(tl.int64) * WIDTH + (side + column)[None, :]
        several = tl.sum(tl.where(tl.arange(0, EXPERTS_BLOCK) == expert, pieces, 0), 0) > 1
        if SPLIT and several:
            slot = tl.sum(tl.where(before & (pieces > 1), pieces, 0), 0) + place
            tl.store(parts + slot.to(tl.int64) * HEIGHT * WIDTH + at, total, mask=stored)
        else:
            tl.store(grad + expert * HEIGHT * WIDTH + at, total, mask=stored)
