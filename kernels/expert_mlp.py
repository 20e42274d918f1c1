r"""Triton kernels of :func:`m2mkd_fast.ops.expert_mlp.expert_mlp`.

For row n of the assignment, with token t, expert e and weight w, dropout masks :math:`m_1, m_2` (zeros and 1/(1-p)) and

.. math::
    z_n = W^{up}_e x_t + b^{up}_e, \qquad a_n = m_1 \circ \phi(z_n), \qquad
    y_n = m_2 \circ (W^{down}_e a_n + b^{down}_e), \qquad out_t = \sum_{n: t} w_n y_n

the forward writes z (kept for the backward), a and y, and sums the rows of every token. With
:math:`g_n = m_2 \circ \partial L / \partial out_t` and :math:`h_n = m_1 \circ W^{down\top}_e g_n`, the backward takes

.. math::
    \partial w_n &= \langle h_n, \phi(z_n) \rangle + \langle g_n, b^{down}_e \rangle &
    \partial z_n &= w_n\, h_n \circ \phi'(z_n) \\
    \partial W^{down}_e &= \sum_n g_n (w_n a_n)^\top & \partial b^{down}_e &= \sum_n w_n g_n \\
    \partial W^{up}_e &= \sum_n \partial z_n\, x_t^\top & \partial b^{up}_e &= \sum_n \partial z_n \\
    \partial x_t &= \sum_{n: t} W^{up\top}_e \partial z_n

without y: the gradient of the weight falls out of the first product's epilogue, which also makes a again from z. Gated
activations have values and gates in z, :math:`\phi(z) = v\, \phi(g)`.

Matrix products are in :mod:`m2mkd_fast.kernels.expert_mlp_products`, sums in :mod:`m2mkd_fast.kernels.expert_mlp_rows`.
Rows from ``offsets[-1]`` on are neither read nor written, but for the zeros in the gradient of their weights. Which
rows an expert has is read on the device only: a CUDA graph replays with any routing. The sizes of the tiles come from a
table, see :func:`tiles_of`; they and all orders of summation are the same for every device of one architecture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m2mkd_fast.kernels.expert_mlp_products import (
    grad_hidden_kernel,
    grad_matrix_kernel,
    product_kernel,
    up_kernel,
)
from m2mkd_fast.kernels.expert_mlp_rows import (
    combine_kernel,
    gradient_rows_kernel,
    row_weight_kernel,
    sum_pieces_kernel,
    sum_tiles_kernel,
)

TABLE = Path(__file__).with_name("expert_mlp_tiles.json")

# Constants, not properties of the device: with them go the orders of summation, and so the last bits.
_ROWS_BLOCK, _ROWS_COLUMNS = 32, 128
_COMBINE_TOKENS, _COMBINE_WIDTH = 16, 256
_WEIGHT_ROWS = 256
_SUM_TILES, _SUM_COLUMNS = 16, 64
_SUM_BLOCK = 1024
# Where an expert has more than two shares of the rows, the sum over them is cut into pieces of two shares, or of the
# shortest piece if that is more. There are as many shares as experts, but not fewer than these.
_FEWEST_SHARES = 8
_SHORTEST_PIECE = 1024

_MULTIPROCESSORS_OF_THE_INTERPRETER = 3


class Tile(NamedTuple):
    """What a program of a kernel does at a time, and with how much of a multiprocessor."""

    rows: int
    columns: int
    step: int
    """Numbers of the inner dimension at a time."""
    group: int
    """Row tiles whose programs follow each other."""
    slices: int
    """Of columns, in which what follows a product is done one after the other: fewer registers. 1, 2 or 4."""
    warps: int
    stages: int
    programs: int
    """On a multiprocessor at a time; the grid of persistent kernels is as large."""


KERNELS = (
    "up",
    "up_gated",
    "down",
    "grad_hidden",
    "grad_hidden_dropout",
    "grad_hidden_gated",
    "grad_rows",
    "grad_matrix",
)
"""Names of the table; the kernel of the hidden units' gradients needs registers for its masks, and for the gates."""


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@cache
def tiles_of(architecture: int, half: bool) -> dict[str, Tile]:
    """The tiles of every kernel for float16 and bfloat16, or for float32.

    Args:
        architecture: 80 or 90 as the compiler counts it; others take the largest one in the table that is not larger.
        half: whether tensors are of a half precision.
    """
    entries = [entry for entry in _table()["tiles"] if entry["half"] == half]
    known = {entry["architecture"] for entry in entries}
    nearest = max((number for number in known if number <= architecture), default=min(known))
    return {
        entry["kernel"]: Tile(**{field: entry[field] for field in Tile._fields})
        for entry in entries
        if entry["architecture"] == nearest
    }


def prefers_torch(x: Tensor, rows: int, hidden: int, outputs: int, experts: int, gated: bool) -> bool:
    """Whether grouped products of PyTorch were measured to be faster than these kernels where this comes closest.

    The table holds times of both, of forward and backward together, for shapes measured on a GPU; one of the same
    architecture, precision and kind of activation decides, by the distance of the logarithms of its sizes. Without one
    the answer is no.

    Args:
        x: ``[T, D]`` tokens.
        rows: of the assignment.
        hidden: width of what enters the second product.
        outputs: width of the result.
        experts: their number.
        gated: whether the activation has gates.
    """
    architecture, half = _architecture(x), x.dtype != torch.float32
    measured = [
        entry
        for entry in _table()["comparisons"]
        if (entry["architecture"], entry["half"], entry["gated"]) == (architecture, half, gated)
    ]
    if not measured or min(rows, hidden, outputs, x.shape[1]) == 0:
        return False

    def distance(entry: Mapping[str, Any]) -> float:
        sizes = {
            "rows_per_expert": max(rows / experts, 1.0),
            "width": x.shape[1],
            "hidden": hidden,
            "outputs": outputs,
        }
        return sum(abs(math.log(size / entry[name])) for name, size in sizes.items())

    closest = min(measured, key=distance)
    return closest["torch_ms"] < closest["triton_ms"]


def forward(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    offsets: Tensor,
    place: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    hidden_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
    keep_preactivation: bool,
    *,
    tiles: Mapping[str, Tile] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[T, O]`` and preactivations ``[N, H]``, or ``[N, 2H]`` with values first; both in the dtype of ``x``.

    Preactivations that are not to be kept for a backward are empty. ``tiles`` is for measuring other tiles than those
    of the table.
    """
    call = _Call(x, token, weight, offsets, place, up_weight, down_weight, activation, seed, tiles)
    rows = call.rows
    preactivation = x.new_empty((rows, up_weight.shape[1]) if keep_preactivation else 0)
    hidden, outputs = x.new_empty((rows, call.hidden)), x.new_empty((rows, call.outputs))
    with torch.cuda.device_of(x):
        kernel = "up_gated" if call.gated else "up"
        _launch(
            up_kernel,
            call.persistent(kernel, call.hidden),
            call.x,
            call.token,
            call.offsets,
            call.up_weight,
            _or(up_bias, x),
            preactivation,
            hidden,
            call.seed,
            call.x.stride(0),
            *_threshold_and_scale(hidden_dropout),
            WIDTH=x.shape[1],
            HIDDEN=call.hidden,
            ACTIVATION=activation,
            GATED=call.gated,
            HAS_BIAS=up_bias is not None,
            DROPOUT=hidden_dropout > 0,
            KEPT=keep_preactivation,
            **call.sizes(kernel),
        )
        _launch(
            product_kernel,
            call.persistent("down", call.outputs),
            hidden,
            call.offsets,
            call.down_weight,
            _or(down_bias, x),
            outputs,
            call.seed,
            call.counter_of_outputs,
            *_threshold_and_scale(output_dropout),
            INNER=call.hidden,
            WIDTH=call.outputs,
            TURNED=False,
            HAS_BIAS=down_bias is not None,
            DROPOUT=output_dropout > 0,
            **call.sizes("down"),
        )
        return call.combine(outputs, weighted=True), preactivation


def backward(
    grad_out: Tensor,
    preactivation: Tensor,
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    offsets: Tensor,
    place: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    hidden_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
    need_x: bool,
    need_parameters: bool,
    *,
    tiles: Mapping[str, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the rows' weights, and of weight and bias of both layers; those not needed are empty.

    ``tiles`` has to be what the forward had only for the same last bits, not for the same result.
    """
    call = _Call(x, token, weight, offsets, place, up_weight, down_weight, activation, seed, tiles)
    rows, total = call.rows, up_weight.shape[1]
    grad_out, gathered = _rows(grad_out), output_dropout == 0
    grad_weight = weight.new_empty(weight.shape)
    need_up_bias = need_parameters and up_bias is not None
    need_down_bias = need_parameters and down_bias is not None
    hidden, grad_preactivation = x.new_empty((rows, call.hidden)), x.new_empty((rows, total))
    with torch.cuda.device_of(x):
        grad_rows, along, grad_down_bias = call.gradient_rows(grad_out, down_bias, output_dropout, need_down_bias)
        kernel = "grad_hidden_gated" if call.gated else "grad_hidden_dropout" if hidden_dropout else "grad_hidden"
        tile = call.tiles[kernel]
        column_tiles = triton.cdiv(call.hidden, tile.columns)
        weight_parts = x.new_empty((column_tiles, rows), dtype=torch.float32)
        bias_parts = x.new_empty((call.row_tiles(tile.rows) if need_up_bias else 0, total), dtype=torch.float32)
        _launch(
            grad_hidden_kernel,
            call.persistent(kernel, call.hidden),
            grad_out if gathered else grad_rows,
            preactivation,
            call.token,
            call.weight,
            call.offsets,
            call.down_weight,
            hidden,
            grad_preactivation,
            weight_parts,
            bias_parts,
            call.seed,
            grad_out.stride(0),
            rows,
            *_threshold_and_scale(hidden_dropout),
            OUTPUTS=call.outputs,
            HIDDEN=call.hidden,
            ACTIVATION=activation,
            GATED=call.gated,
            GATHERED=gathered,
            SUM_BIAS=need_up_bias,
            DROPOUT=hidden_dropout > 0,
            **call.sizes(kernel),
        )
        _launch(
            row_weight_kernel,
            (triton.cdiv(rows, _WEIGHT_ROWS),),
            weight_parts,
            along,
            call.offsets,
            grad_weight,
            rows,
            EXPERTS=offsets.shape[0] - 1,
            PARTS=column_tiles,
            HAS_BIAS=down_bias is not None,
            ROWS=_WEIGHT_ROWS,
        )
        grad_x, grad_up_weight, grad_up_bias, grad_down_weight = (x.new_empty(0) for _ in range(4))
        if need_parameters:
            grad_down_weight = call.grad_matrix(grad_out if gathered else grad_rows, hidden, gathered, True)
            del hidden
            grad_up_weight = call.grad_matrix(grad_preactivation, call.x, True, False)
        if need_up_bias:
            grad_up_bias = call.sum_tiles(bias_parts, tile.rows)
        if need_x:
            grad_inputs = x.new_empty((rows, x.shape[1]))
            _launch(
                product_kernel,
                call.persistent("grad_rows", x.shape[1]),
                grad_preactivation,
                call.offsets,
                call.up_weight,
                x,
                grad_inputs,
                call.seed,
                0,
                *_threshold_and_scale(0.0),
                INNER=total,
                WIDTH=x.shape[1],
                TURNED=True,
                HAS_BIAS=False,
                DROPOUT=False,
                **call.sizes("grad_rows"),
            )
            grad_x = call.combine(grad_inputs, weighted=False)
    return grad_x, grad_weight, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias


class _Call:
    """What forward and backward share: sizes, the tensors as the kernels take them, and some launches."""

    def __init__(
        self,
        x: Tensor,
        token: Tensor,
        weight: Tensor,
        offsets: Tensor,
        place: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        activation: str,
        seed: Tensor | None,
        tiles: Mapping[str, Tile] | None,
    ) -> None:
        self.x, self.token, self.weight = _rows(x), token.contiguous(), weight.contiguous()
        self.offsets, self.place = offsets.contiguous(), place.contiguous()
        self.up_weight, self.down_weight = up_weight.contiguous(), down_weight.contiguous()
        self.seed = _or(seed, offsets)
        self.rows, self.outputs, self.hidden = token.shape[0], *down_weight.shape[1:]
        self.gated = activation in ("geglu", "swiglu")
        self.counter_of_outputs = self.rows * ((self.hidden + 3) // 4)
        count = offsets.shape[0] - 1
        self.experts = {"EXPERTS": count, "EXPERTS_BLOCK": max(triton.next_power_of_2(count), 32)}
        self.tiles = {**tiles_of(_architecture(x), x.dtype != torch.float32), **(tiles or {})}

    def row_tiles(self, rows: int) -> int:
        """An upper bound, from shapes alone: every expert may end in a tile that is not full."""
        return self.rows // rows + min(self.experts["EXPERTS"], self.rows)

    def persistent(self, kernel: str, columns: int) -> tuple[int]:
        """The grid of a kernel that walks through tiles of rows and so many columns."""
        tile = self.tiles[kernel]
        count = self.row_tiles(tile.rows) * triton.cdiv(columns, tile.columns)
        return (min(count, _multiprocessors(self.x) * tile.programs),)

    def sizes(self, kernel: str) -> dict[str, int]:
        """The compile-time sizes of such a kernel, and what the compiler is told beside them."""
        tile = self.tiles[kernel]
        return {**self.experts, **_sizes(tile), "SLICES": tile.slices}

    def combine(self, rows: Tensor, weighted: bool) -> Tensor:
        """The sum of each token's rows ``[T, width]``."""
        tokens, width = self.x.shape[0], rows.shape[1]
        outputs = rows.new_empty((tokens, width))
        _launch(
            combine_kernel,
            (triton.cdiv(tokens, _COMBINE_TOKENS), triton.cdiv(width, _COMBINE_WIDTH)),
            rows,
            self.weight,
            self.place,
            outputs,
            tokens,
            WIDTH=width,
            CHOICES=self.place.shape[1],
            WEIGHTED=weighted,
            TOKENS_BLOCK=_COMBINE_TOKENS,
            WIDTH_BLOCK=_COMBINE_WIDTH,
        )
        return outputs

    def gradient_rows(
        self, grad_out: Tensor, bias: Tensor | None, dropout: float, need_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' gradients where there is dropout; the bias' part of their weights' gradient; its own gradient."""
        none = grad_out.new_empty(0)
        if not dropout and bias is None:
            return none, none, none
        tiles = self.row_tiles(_ROWS_BLOCK)
        dropped = grad_out.new_empty((self.rows, self.outputs)) if dropout else none
        along = grad_out.new_empty(self.rows, dtype=torch.float32)
        parts = grad_out.new_empty((tiles if bias is not None else 0, self.outputs), dtype=torch.float32)
        _launch(
            gradient_rows_kernel,
            (tiles,),
            grad_out,
            self.token,
            self.weight,
            self.offsets,
            _or(bias, grad_out),
            dropped,
            along,
            parts,
            self.seed,
            grad_out.stride(0),
            self.counter_of_outputs,
            *_threshold_and_scale(dropout),
            WIDTH=self.outputs,
            HAS_BIAS=bias is not None,
            DROPOUT=dropout > 0,
            ROWS=_ROWS_BLOCK,
            COLUMNS=_ROWS_COLUMNS,
            **self.experts,
        )
        return dropped, along, self.sum_tiles(parts, _ROWS_BLOCK) if need_bias else none

    def sum_tiles(self, parts: Tensor, rows: int) -> Tensor:
        """``[E, width]``: the sums of the experts' tiles, of so many rows each."""
        width = parts.shape[1]
        sums = self.x.new_empty((self.experts["EXPERTS"], width))
        _launch(
            sum_tiles_kernel,
            (sums.shape[0], triton.cdiv(width, _SUM_COLUMNS)),
            parts,
            self.offsets,
            sums,
            width,
            ROWS=rows,
            TILES=_SUM_TILES,
            COLUMNS=_SUM_COLUMNS,
            **self.experts,
        )
        return sums

    def grad_matrix(self, left: Tensor, right: Tensor, gather: bool, gather_left: bool) -> Tensor:
        """``[E, height, width]``: for every expert the sum over its rows of left times right.

        With ``gather`` the rows on one side are those of the tokens.
        """
        experts, tile = self.experts["EXPERTS"], self.tiles["grad_matrix"]
        height, width = left.shape[1], right.shape[1]
        piece, slots, pieces = self.pieces(tile)
        grad = self.x.new_empty((experts, height, width))
        parts = self.x.new_empty((slots, height, width), dtype=torch.float32)
        count = pieces * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
        _launch(
            grad_matrix_kernel,
            (count,),
            left,
            right,
            self.token,
            self.offsets,
            grad,
            parts,
            left.stride(0),
            right.stride(0),
            HEIGHT=height,
            WIDTH=width,
            GATHER_LEFT=gather and gather_left,
            GATHER_RIGHT=gather and not gather_left,
            PIECE=piece,
            SPLIT=slots > 0,
            **self.experts,
            **_sizes(tile),
        )
        if slots:
            _launch(
                sum_pieces_kernel,
                (triton.cdiv(height * width, _SUM_BLOCK), experts),
                parts,
                self.offsets,
                grad,
                height * width,
                PIECE=piece,
                BLOCK=_SUM_BLOCK,
                **self.experts,
            )
        return grad

    def pieces(self, tile: Tile) -> tuple[int, int, int]:
        """Most rows of an expert that one program sums up, and upper bounds of how many pieces that makes.

        First of the pieces of experts that have several, which are more than half full on average; then of all.
        """
        share = triton.cdiv(2 * self.rows, max(self.experts["EXPERTS"], _FEWEST_SHARES))
        piece = triton.cdiv(max(share, _SHORTEST_PIECE), tile.step) * tile.step
        slots = 2 * self.rows // piece if self.rows > piece else 0
        return piece, slots, self.rows // piece + self.experts["EXPERTS"]


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    if all(grid):
        kernel[grid](*arguments, **sizes)


def _sizes(tile: Tile) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STEP": tile.step,
        "GROUP": tile.group,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _threshold_and_scale(dropout: float) -> tuple[int, float]:
    return round(dropout * 2**32), 1.0 / (1.0 - dropout)


def _architecture(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 80  # the interpreter does not care
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def _multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return _MULTIPROCESSORS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last one's."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Any tensor where there is none: it is not read."""
    return instead if tensor is None else tensor.contiguous()
