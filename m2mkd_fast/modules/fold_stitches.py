"""The stitches at each cut of a chain as one, of the student's own width."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.stitches import stitch_owner
from m2mkd_fast.nn.folded_stitch import FoldedStitch, joined_cuts
from m2mkd_fast.nn.stitch import LinearStitch, Stitch


def fold_stitches(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Independent copies of modules 0 ... L-1 that give the same logits in a chain, with one stitch at each cut.

    At each cut the stitch to the teacher's width and the one back become one module: two `Stitch` a
    :class:`~m2mkd_fast.nn.folded_stitch.FoldedStitch`, two `LinearStitch` of a circuit one `LinearStitch`. It takes the
    place of the first, `post_stitch` of module i; module i+1 has no `pre_stitch` any more. In exact arithmetic nothing
    changes: results differ from the kept stitches' by rounding alone. Folded modules fit each other and no longer a
    meta model.

    A folded stitch goes no further, into its neighbours' weights, because none of them is linear on that side. Before
    it a block adds a branch to what it was given (the stitch would have to pass through that residual path, and with
    it through all blocks before) or ends in an activation; behind it a block, a mediator of a circuit too, adds to its
    input. A circuit's read-out has no such path for its senders, but normalises them before its keys and values.

    Raises:
        M2MKDError: a module has a stitch at a cut where its neighbour has none, two stitches of other kinds or widths.
    """
    folded = [copy.deepcopy(module) for module in modules]
    for cut in range(len(folded) - 1):
        before, after = stitch_owner(folded[cut], "post"), stitch_owner(folded[cut + 1], "pre")
        if before is None and after is None:
            continue
        if before is None or after is None:
            having, lacking = (cut, cut + 1) if after is None else (cut + 1, cut)
            raise M2MKDError(
                f"module {having} has a stitch at the cut between modules {cut} and {cut + 1}, module {lacking} has "
                "none; fold modules that `student_modules` made, all of them with stitches"
            )
        try:
            before.post_stitch = _folded(before.post_stitch, after.pre_stitch)
        except M2MKDError as error:
            raise M2MKDError(f"the cut between modules {cut} and {cut + 1}: {error}") from error
        after.pre_stitch = None
    return folded


def _folded(first: nn.Module, second: nn.Module) -> nn.Module:
    if isinstance(first, Stitch) and isinstance(second, Stitch):
        return FoldedStitch.of(first, second)
    if isinstance(first, LinearStitch) and isinstance(second, LinearStitch):
        return _product(first, second)
    raise M2MKDError(
        f"no way is known to fold a {type(first).__name__} and a {type(second).__name__} into one; keep the stitches"
    )


@torch.no_grad()
def _product(first: LinearStitch, second: LinearStitch) -> LinearStitch:
    """`second(first(x))` as one linear map, computed in float64."""
    cuts = joined_cuts(first, second)
    if None not in cuts:
        places = [(cut.grid, cut.prefix) for cut in cuts]
        if places[1] not in (places[0], places[2]):
            raise M2MKDError(
                f"features are resampled twice, from {cuts[0]} to {cuts[1]} and on to {cuts[2]}, and one stitch "
                "resamples once; keep the stitches"
            )
    weight = second.weight.double() @ first.weight.double()
    bias = second.weight.double() @ first.bias.double() + second.bias.double()
    product = LinearStitch(first.in_features, second.out_features, cuts[0], cuts[2])
    product = product.to(first.weight.device, first.weight.dtype)
    product.weight.copy_(weight)
    product.bias.copy_(bias)
    return product.train(first.training)
