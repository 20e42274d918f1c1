"""Two stitches in a row as one module of the student's own width."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut, rearrange
from m2mkd_fast.nn.stitch import LinearStitch, Stitch


class FoldedStitch(nn.Module):
    r"""A :class:`~m2mkd_fast.nn.stitch.Stitch` to the teacher's width and the one back, without the teacher's width.

    With :math:`\hat x = (x - \bar x)/\sqrt{\mathrm{var}(x) + \epsilon_1}` of :math:`S` features, the first stitch gives
    :math:`y = W_1(\gamma_1 \odot \hat x + \beta_1) + c_1` of :math:`T` features and the second one
    :math:`z = W_2(\gamma_2 \odot \hat y + \beta_2) + c_2`. The mean that the second norm takes away is linear in
    :math:`y`, so with :math:`C = I - 11^\top/T`

    .. math::
        y - \bar y = A\hat x + a, \quad A = C W_1 \mathrm{diag}(\gamma_1), \quad a = C(W_1\beta_1 + c_1).

    The features of :math:`\hat x` sum to zero, so that :math:`\hat x + v` with :math:`v = 1/\sqrt S` holds the constant
    in the one direction that :math:`\hat x` leaves free: :math:`A\hat x + a = B(\hat x + v)` with
    :math:`B = A(I - vv^\top) + av^\top`. A QR decomposition :math:`B = QR` keeps lengths, so the second norm's
    variance, :math:`\lVert A\hat x + a\rVert^2/T`, is that of :math:`k = \min(S, T)` numbers:

    .. math::
        u = \sqrt{k/T}\,R(\hat x + v), \quad
        z = \sqrt{T/k}\,W_2\,\mathrm{diag}(\gamma_2)\,Q\,\frac{u}{\sqrt{\lVert u\rVert^2/k + \epsilon_2}}
            + W_2\beta_2 + c_2.

    That is a normalisation, a linear map `inner` S → k, a root-mean-square normalisation and a linear map `outer`
    k → S': both stitches exactly, but for rounding. It costs k(S + S') multiplications a position instead of T(S + S'):
    less where the teacher is wider, as much where it is not.

    A rearrangement between the two stitches (another grid, other prefix tokens) is a weighted mean over positions with
    weights that sum to one. It passes through linear maps with their biases and through the features' sum of zero, but
    not through a norm, so it is done between the first norm and `inner`.

    Shapes: `x [..., in_features]` to `[..., out_features]`; with cuts x is in the layout of `source` and the result in
    that of `target`. State names: `inner.*`, `outer.*`.

    Args:
        in_features: S.
        rank: k.
        out_features: S'.
        inner_eps, outer_eps: epsilons of the first and of the second norm.
        source, middle, target: what the first stitch reads, what passes between the two, and what the second one gives;
            all None where nothing is rearranged.
    """

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        inner_eps: float = 1e-5,
        outer_eps: float = 1e-5,
        source: Cut | None = None,
        middle: Cut | None = None,
        target: Cut | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.inner_eps, self.outer_eps = inner_eps, outer_eps
        self.source, self.middle, self.target = source, middle, target
        if source is not None:  # norms and maps run over the last axis
            self._normalised = _features_last(replace(middle, width=in_features))
            self._mapped = _features_last(target)
        self.inner = nn.Linear(in_features, rank)
        self.outer = nn.Linear(rank, out_features)

    @classmethod
    @torch.no_grad()
    def of(cls, first: Stitch, second: Stitch) -> FoldedStitch:
        """The two stitches as one, computed in float64; with device, dtype and mode of the first.

        Raises:
            M2MKDError: the second does not read what the first gives.
        """
        cuts = joined_cuts(first, second)
        dtype, device = first.fc.weight.dtype, first.fc.weight.device
        scale, shift = first.ln.weight.double(), first.ln.bias.double()
        weight, bias = first.fc.weight.double() * scale, first.fc.weight.double() @ shift + first.fc.bias.double()
        weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
        width, features = weight.shape
        # B of the docstring: the constant takes the direction that the normalised features leave free.
        joined = weight - weight.mean(dim=1, keepdim=True) + bias.unsqueeze(1) / math.sqrt(features)
        q, r = torch.linalg.qr(joined)
        rank = len(r)
        inner = r * math.sqrt(rank / width)
        last = second.fc.weight.double()
        outer = (last * second.ln.weight.double()) @ q * math.sqrt(width / rank)

        folded = cls(features, rank, second.out_features, first.ln.eps, second.ln.eps, *cuts).to(device, dtype)
        folded.inner.weight.copy_(inner)
        folded.inner.bias.copy_(inner.sum(dim=1) / math.sqrt(features))
        folded.outer.weight.copy_(outer)
        folded.outer.bias.copy_(last @ second.ln.bias.double() + second.fc.bias.double())
        return folded.train(first.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.source is not None:
            x = rearrange(x, self.source, self._normalised)
        x = F.layer_norm(x, (self.in_features,), eps=self.inner_eps)
        if self.source is not None:
            x = rearrange(x, self._normalised, self._mapped)
        x = self.outer(F.rms_norm(self.inner(x), (self.rank,), eps=self.outer_eps))
        if self.target is not None and self.target.layout == "channels_first":
            x = x.permute(0, 3, 1, 2)
        return x

    def extra_repr(self) -> str:
        return f"{self.source or self.in_features} -> {self.rank} -> {self.target or self.out_features}"


def joined_cuts(
    first: Stitch | LinearStitch, second: Stitch | LinearStitch
) -> tuple[Cut | None, Cut | None, Cut | None]:
    """(source, middle, target) of two stitches in a row, all None where neither knows its cuts.

    Raises:
        M2MKDError: the second stitch does not read what the first one gives.
    """
    given, read = first.target or first.out_features, second.source or second.in_features
    if given == read:
        return first.source, first.target, second.target
    cuts = isinstance(given, Cut) and isinstance(read, Cut)
    # Where one side does not know the grid, a second stitch that rearranges nothing hands on whatever positions come.
    if cuts and given.agrees_with(read) and second.target == replace(read, width=second.out_features):
        return first.source, given, replace(given, width=second.out_features)
    raise M2MKDError(f"a stitch that gives {given} and one that reads {read} cannot be folded into one")


def _features_last(cut: Cut) -> Cut:
    return replace(cut, layout="channels_last") if cut.layout == "channels_first" else cut
