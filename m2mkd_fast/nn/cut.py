"""What passes between two modules of a chain, and how features of one layout become features of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError, UnknownNameError

Layout = Literal["tokens", "channels_last", "channels_first"]


@dataclass(frozen=True)
class Cut:
    """What passes between two modules: features of one width in one layout.

    Attributes:
        width: D, features of a position.
        layout: "tokens" `[B, N, D]`, "channels_last" `[B, H, W, D]` or "channels_first" `[B, D, H, W]`.
        grid: (H, W). Of tokens N = prefix + H*W, row by row behind the prefix. None: tokens that are no grid, or a
            number of positions that varies.
        prefix: class, register and distillation tokens before those of the grid (tokens only).
    """

    width: int
    layout: Layout = "tokens"
    grid: tuple[int, int] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise UnknownNameError("layout", self.layout, get_args(Layout))
        if self.width < 1 or self.prefix < 0 or (self.grid is not None and min(self.grid) < 1):
            raise M2MKDError(
                f"no cut of width {self.width}, grid {self.grid} and {self.prefix} prefix tokens; width and grid are "
                "at least 1, the prefix at least 0"
            )
        if self.prefix and self.layout != "tokens":
            raise M2MKDError(f"{self.prefix} prefix tokens in the layout {self.layout!r}; only 'tokens' have a prefix")

    @property
    def tokens(self) -> int | None:
        """Positions in all, None where they are not known."""
        return None if self.grid is None else self.prefix + self.grid[0] * self.grid[1]

    def agrees_with(self, other: Cut) -> bool:
        """Whether what one side gives can be read by the other as it is: same width and layout, same grid if known."""
        if (self.width, self.layout) != (other.width, other.layout):
            return False
        unknown = self.grid is None or other.grid is None
        return unknown or (self.grid, self.prefix) == (other.grid, other.prefix)

    def __str__(self) -> str:
        described = {"tokens": "tokens", "channels_last": "channels-last maps", "channels_first": "channels-first maps"}
        text = f"{described[self.layout]} of width {self.width}"
        if self.grid is not None:
            text += f" on a grid of {self.grid[0]}x{self.grid[1]}"
        if self.prefix:
            text += f" behind {self.prefix} prefix token{'s' if self.prefix > 1 else ''}"
        return text


def as_cut(cut: Cut | int) -> Cut:
    """The cut itself; of a number, tokens of that width whose number and grid are taken as they come."""
    return cut if isinstance(cut, Cut) else Cut(cut)


def rearrange(x: Tensor, source: Cut, target: Cut) -> Tensor:
    """Lay features out as `target` says, without parameters; x itself where nothing differs. The width stays.

    * Grid: each axis alone, by a fixed matrix; a longer axis by linear interpolation between the centres of the cells
      (as `torch.nn.functional.interpolate`, "bilinear", without aligned corners), a shorter one by averages over the
      area that a new cell covers. A constant stays constant, and a shorter axis keeps the mean.
    * Prefix tokens: the source's first ones pass; those that the target has beyond them are the mean of the source's
      grid; those that the target has not are left out.
    * Tokens without a known grid on either side pass as they are. They fill a map only where their number is the map's.

    The result is a function of x alone, differentiable, and made of operations that `torch.compile` and `torch.export`
    take.

    Shapes: x in the source's layout, the result in the target's, both with a leading batch axis and width D.

    Raises:
        M2MKDError: x has not the source's shape, or tokens without a grid do not fill the target's.
    """
    if source.layout == "tokens" and target.layout == "tokens" and (source.grid is None or target.grid is None):
        return x
    if (source.layout, source.grid, source.prefix) == (target.layout, target.grid, target.prefix):
        return x
    _check(x, source)
    prefix, cells = _prefix_and_cells(x, source, target)
    mean = cells.mean(dim=(1, 2)).unsqueeze(1) if target.prefix > prefix.shape[1] else None
    if target.grid is not None:
        cells = _resampled(cells, target.grid)
    if target.layout == "channels_last":
        return cells
    if target.layout == "channels_first":
        return cells.permute(0, 3, 1, 2)
    tokens = [prefix[:, : target.prefix], cells.flatten(1, 2)]
    if mean is not None:
        tokens.insert(1, mean.expand(-1, target.prefix - prefix.shape[1], -1))
    return torch.cat(tokens, dim=1) if target.prefix else tokens[-1]


def _check(x: Tensor, source: Cut) -> None:
    if source.layout == "tokens":
        fits = x.ndim == 3 and (source.tokens is None or x.shape[1] == source.tokens)
    else:
        grid = x.shape[2:] if source.layout == "channels_first" else x.shape[1:-1]
        fits = x.ndim == 4 and (source.grid is None or tuple(grid) == source.grid)
    if not fits or x.shape[1 if source.layout == "channels_first" else -1] != source.width:
        raise M2MKDError(f"features of shape {list(x.shape)} given where {source} are read")


def _prefix_and_cells(x: Tensor, source: Cut, target: Cut) -> tuple[Tensor, Tensor]:
    """Prefix tokens `[B, P, D]` and the grid `[B, H, W, D]`."""
    if source.layout == "channels_first":
        x = x.permute(0, 2, 3, 1)
    if source.layout != "tokens":
        return x.new_empty(x.shape[0], 0, source.width), x
    grid = source.grid
    if grid is None:
        # The target is a map here: tokens to tokens have been dealt with.
        grid = target.grid
        if grid is None or x.shape[1] != source.prefix + grid[0] * grid[1]:
            raise M2MKDError(
                f"{x.shape[1]} tokens without a known grid cannot become {target}; say the tokens' grid, or give as "
                "many as the map has positions"
            )
    return x[:, : source.prefix], x[:, source.prefix :].unflatten(1, grid)


def _resampled(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = grid
    if cells.shape[2] != width:
        cells = _axis_matrix(cells.shape[2], width, cells) @ cells
    if cells.shape[1] != height:
        matrix = _axis_matrix(cells.shape[1], height, cells)
        cells = (matrix @ cells.flatten(2, 3)).unflatten(2, (width, -1))
    return cells


def _axis_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """The fixed map `[target, source]` of one axis; in whole numbers until the last division, so rows sum to 1."""
    old = torch.arange(source, device=like.device)
    new = torch.arange(target, device=like.device).unsqueeze(1)
    if target < source:
        # Overlap of the old cell [i, i+1] with the new one [j S/T, (j+1) S/T], times T.
        overlap = torch.minimum((old + 1) * target, (new + 1) * source) - torch.maximum(old * target, new * source)
        return overlap.clamp(min=0).to(like.dtype) / source
    # The new cell's centre among the old ones is (j + 1/2) S/T - 1/2; all times 2T.
    centre = ((2 * new + 1) * source - target).clamp(0, 2 * target * (source - 1))
    return (2 * target - (centre - 2 * target * old).abs()).clamp(min=0).to(like.dtype) / (2 * target)
