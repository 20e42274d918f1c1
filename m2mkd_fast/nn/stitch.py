"""The trainable adapters between two widths, used where a student module meets the teacher-wide meta model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut, rearrange


class Stitch(nn.Module):
    """Layer normalisation, then a linear map: `y = W · LayerNorm(x) + b`.

    Shapes: `x [..., in_features]` to `y [..., out_features]`. With `source` and `target` x is in the source's layout
    and y in the target's: `rearrange` first, then norm and map along the features.

    The layer norm's epsilon is 1e-5 and the linear map starts from a truncated normal of standard deviation 0.02 with a
    zero bias, as in the published V-MoE students of m2mKD (arXiv 2402.16918). State names: `ln.*`, `fc.*`.

    Raises:
        M2MKDError: one of the two cuts alone, or cuts of other widths.
    """

    def __init__(
        self, in_features: int, out_features: int, source: Cut | None = None, target: Cut | None = None
    ) -> None:
        super().__init__()
        _check_cuts(in_features, out_features, source, target)
        self.in_features = in_features
        self.out_features = out_features
        self.source = source
        self.target = target
        self.ln = nn.LayerNorm(in_features)
        self.fc = nn.Linear(in_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.ln.reset_parameters()
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _along_features(lambda x: self.fc(self.ln(x)), x, self.source, self.target)

    def extra_repr(self) -> str:
        return f"{self.source or self.in_features} -> {self.target or self.out_features}"


class LinearStitch(nn.Linear):
    """A linear map alone: `y = W · x + b`, as in the published Neural Attentive Circuit students.

    Shapes, cuts and errors as of `Stitch`; initialisation and state names (`weight`, `bias`) of nn.Linear.
    """

    def __init__(
        self, in_features: int, out_features: int, source: Cut | None = None, target: Cut | None = None
    ) -> None:
        _check_cuts(in_features, out_features, source, target)
        super().__init__(in_features, out_features)
        self.source = source
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return _along_features(super().forward, x, self.source, self.target)

    def extra_repr(self) -> str:
        return f"{self.source or self.in_features} -> {self.target or self.out_features}"


def _check_cuts(in_features: int, out_features: int, source: Cut | None, target: Cut | None) -> None:
    if (source is None) != (target is None):
        raise M2MKDError(f"a stitch from {source} to {target}: give both cuts, or neither")
    if source is not None and (source.width, target.width) != (in_features, out_features):
        raise M2MKDError(f"a stitch of widths {in_features} -> {out_features} between {source} and {target}")


def _along_features(function: Callable[[Tensor], Tensor], x: Tensor, source: Cut | None, target: Cut | None) -> Tensor:
    """Apply a function of the last axis to x, laid out as the target says."""
    if source is None:
        return function(x)
    x = rearrange(x, source, target)
    if target.layout == "channels_first":
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)
