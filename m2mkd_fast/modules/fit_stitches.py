"""Stitches in closed form from a few batches, instead of random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.stitches import Side, stitch_of, without_stitches
from m2mkd_fast.nn.cut import rearrange
from m2mkd_fast.nn.stitch import LinearStitch, Stitch


@dataclass(frozen=True)
class StitchFit:
    """How well a stitch does what it was fitted to.

    Attributes:
        slot, side: whose stitch, and which one.
        explained: share of the target's variance over the batches that the stitch explains; 1 is all of it, and 0 is
            what the target's mean alone would do.
        positions: number of (image, position) pairs it was fitted to.
    """

    slot: int
    side: Side
    explained: float
    positions: int


@torch.no_grad()
def fit_stitches(
    modules: Sequence[nn.Module],
    teacher: ModuleChain,
    batches: Iterable[Tensor],
    *,
    slots: Iterable[int] | None = None,
    sides: Sequence[Side] = ("post",),
    prefix: ModuleChain | None = None,
    ridge: float = 1e-3,
) -> list[StitchFit]:
    r"""Set the stitches of student modules to the ridge regression between both sides' features.

    With :math:`h_i` the teacher's features at cut i and :math:`g_i` those of the student without any stitch (modules
    0 ... i in a row, each at its own width), on the same images:

    * "pre": the stitch before module i maps :math:`h_{i-1}` to :math:`g_{i-1}`, so that the module reads what it would
      read in the student;
    * "post": the stitch after module i maps what the module makes of its input to :math:`h_i`.

    A student that was never trained has features that say little of an image, and a stitch fitted to them throws away
    most of what the teacher's say; the default stitch is a random projection that keeps it. So "post" alone is the
    default, and "pre" is for students that were trained before.

    Each minimises :math:`\sum\lVert W\phi + b - t\rVert^2 + \lambda n\lVert W\rVert^2` over the n positions of all
    images, in float64, with the features' covariance and with :math:`\lambda` = `ridge` times its mean diagonal.
    :math:`\phi` are the normalised features of a `Stitch`, whose norm becomes the plain one (weight 1, bias 0), and the
    features as they are of a circuit's `LinearStitch`. The result is a function of weights and images alone. Sums are
    collected batch by batch; images are held, activations are not.

    Args:
        modules: all modules of the student, 0 ... L-1, with stitches; changed in place. They run in evaluation mode and
            have their mode back afterwards.
        teacher: the chain they are to be taught by.
        batches: images `[B, C, H, W]`, each batch of any size, on the modules' device.
        slots: whose stitches to fit; by default all.
        sides: which of their stitches; that before a module is fitted first.
        prefix: the chain whose earlier modules make a module's input, if that is not the teacher: the meta model, where
            pairs are trained on its features.
        ridge: weight of the penalty relative to the features' mean variance.

    Returns:
        one :class:`StitchFit` for each stitch, in the chain's order.

    Raises:
        M2MKDError: no images, another number of modules, unknown slots or sides, a stitch of an unknown kind, different
            numbers of positions at both sides of a stitch, features that are not finite.
    """
    for side in sides:
        if side not in get_args(Side):
            raise UnknownNameError("side", side, get_args(Side))
    batches = list(batches)
    _check(modules, teacher, prefix, batches, ridge)
    prefix = teacher if prefix is None else prefix
    wanted = range(len(modules)) if slots is None else [teacher.check_index(slot) for slot in slots]
    involved = nn.ModuleList([*modules, teacher, prefix])
    modes = [(part, part.training) for part in involved.modules()]
    involved.eval()
    fits = []
    try:
        for slot in sorted(set(wanted)):
            fits += _fit_slot(modules, slot, sides, teacher, prefix, batches, ridge)
    finally:
        for part, mode in modes:
            part.training = mode
    return fits


def _fit_slot(
    modules: Sequence[nn.Module],
    slot: int,
    sides: Sequence[Side],
    teacher: ModuleChain,
    prefix: ModuleChain,
    batches: list[Tensor],
    ridge: float,
) -> list[StitchFit]:
    module, fits = modules[slot], []
    before, after = stitch_of(module, "pre"), stitch_of(module, "post")

    def own(images: Tensor) -> Tensor:
        """What the module would read in the student: g of the cut before it."""
        with without_stitches(modules[:slot]):
            for earlier in modules[:slot]:
                images = earlier(images)
        return images

    def made(images: Tensor) -> Tensor:
        """What the module makes of its input, before the stitch after it."""
        with without_stitches([module], sides=["post"]):
            return module(prefix.run(images, 0, slot))

    def taught(images: Tensor) -> Tensor:
        return teacher.run(prefix.run(images, 0, slot), slot, slot + 1)

    if before is not None and "pre" in sides:
        fits.append(_fit(before, slot, "pre", lambda images: prefix.run(images, 0, slot), own, batches, ridge))
    if after is not None and "post" in sides:
        fits.append(_fit(after, slot, "post", made, taught, batches, ridge))
    return fits


def _fit(
    stitch: nn.Module,
    slot: int,
    side: Side,
    given: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    ridge: float,
) -> StitchFit:
    where = f"the {side}-stitch of module {slot}"
    sums = None
    for images in batches:
        features, wanted = _features(stitch, given(images), where), _positions(stitch, target(images))
        if features.shape[:-1] != wanted.shape[:-1]:
            raise M2MKDError(
                f"{where} reads {list(features.shape[1:-1])} positions where {list(wanted.shape[1:-1])} are wanted, "
                "and least squares pairs them one by one; make the student's modules for the teacher's cuts "
                "(`student_modules(model, parts, teacher.cuts)`, a circuit's with the teacher's number of tokens), or "
                "start from default stitches"
            )
        features, wanted = features.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        moments = _Moments(features, wanted)
        if sums is None:
            sums = moments
        else:
            sums.add(moments)
    weight, bias, explained = sums.solve(ridge, where)
    linear = stitch
    if isinstance(stitch, Stitch):
        stitch.ln.reset_parameters()
        linear = stitch.fc
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return StitchFit(slot, side, explained, sums.count)


def _features(stitch: nn.Module, x: Tensor, where: str) -> Tensor:
    """What the stitch's linear map reads, features last; the norm in float64 and without weight and bias."""
    if not isinstance(stitch, Stitch | LinearStitch):
        raise M2MKDError(f"{where} is a {type(stitch).__name__}; least squares is for Stitch and LinearStitch")
    if stitch.source is not None:
        x = rearrange(x, stitch.source, stitch.target)
    x = _positions(stitch, x).double()
    return F.layer_norm(x, (stitch.in_features,), eps=stitch.ln.eps) if isinstance(stitch, Stitch) else x


def _positions(stitch: nn.Module, x: Tensor) -> Tensor:
    """Features of the stitch's target layout with the features last."""
    channels_first = stitch.target is not None and stitch.target.layout == "channels_first"
    return x.movedim(1, -1) if channels_first else x


class _Moments:
    """Means and sums of squares about them of features x `[n, D]` and targets y `[n, E]`, added up batch by batch.

    About the means, because sums of raw squares lose what little there is of it where the mean is large.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.count = len(x)
        self.mean_x, self.mean_y = x.mean(dim=0), y.mean(dim=0)
        x, y = x - self.mean_x, y - self.mean_y
        self.xx, self.xy, self.yy = x.T @ x, x.T @ y, y.square().sum()

    def add(self, other: _Moments) -> None:
        """Take another batch's positions in (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * other.count / count
        self.xx += other.xx + weight * torch.outer(dx, dx)
        self.xy += other.xy + weight * torch.outer(dx, dy)
        self.yy += other.yy + weight * dy.square().sum()
        self.mean_x += dx * (other.count / count)
        self.mean_y += dy * (other.count / count)
        self.count = count

    def solve(self, ridge: float, where: str) -> tuple[Tensor, Tensor, float]:
        """(weight `[E, D]`, bias `[E]`, share of the targets' variance that they explain)."""
        penalty = ridge * self.xx.diagonal().mean()
        if not (penalty + self.xy.sum() + self.yy).isfinite():
            raise M2MKDError(f"the features of {where} are not finite; least squares needs a teacher that is in order")
        if penalty == 0:  # features that never change explain nothing; the bias is all there is
            weight = torch.zeros_like(self.xy.T)
        else:
            factor = torch.linalg.cholesky(self.xx + penalty * torch.eye(len(self.xx)).to(self.xx))
            weight = torch.cholesky_solve(self.xy, factor).T
        error = self.yy - 2 * (weight * self.xy.T).sum() + (weight @ self.xx * weight).sum()
        explained = 1.0 if self.yy == 0 else 1.0 - (error / self.yy).item()
        return weight, self.mean_y - weight @ self.mean_x, explained


def _check(
    modules: Sequence[nn.Module],
    teacher: ModuleChain,
    prefix: ModuleChain | None,
    batches: list[Tensor],
    ridge: float,
) -> None:
    lengths = {len(modules), len(teacher), len(teacher if prefix is None else prefix)}
    if len(lengths) > 1:
        raise M2MKDError(
            f"{len(modules)} student modules, a teacher of {len(teacher)} and a prefix of "
            f"{len(teacher if prefix is None else prefix)} do not fit; all three are cut into the same number"
        )
    if not batches:
        raise M2MKDError("no images to fit stitches to; give at least one batch")
    if not (math.isfinite(ridge) and ridge > 0):
        raise M2MKDError(f"ridge is {ridge}; it must be positive, for example 1e-3")
