"""What all stages of a chain have in common: what they read and give, and the stitches at their ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut, as_cut
from m2mkd_fast.nn.stitch import Stitch


class Stage:
    """Base of the modules of a chain, beside nn.Module: the stages that `split` makes, the students of a circuit.

    A subclass has the attributes `is_first`, `is_last`, `pre_stitch` and `post_stitch` (None without), says in
    `bare_in_cut` and `bare_out_cut` what its units read and give, and applies the stitches before and after the units.

    Attributes:
        stitch_class: the kind of stitches the stage has.
        bare_in_cut: what the units read; None where they read images.
        bare_out_cut: what the units give; None where they give logits.
        is_first, is_last: whether the stage reads images, and whether it gives logits.
    """

    stitch_class: type[nn.Module] = Stitch
    bare_in_cut: Cut | None
    bare_out_cut: Cut | None
    is_first: bool
    is_last: bool

    @property
    def in_cut(self) -> Cut | None:
        """What the stage reads, its stitch included; None where it reads images."""
        stitch = None if self.is_first else self._stitch_owner("pre").pre_stitch
        if stitch is None:
            return self.bare_in_cut
        return stitch.source or Cut(stitch.in_features)

    @property
    def out_cut(self) -> Cut | None:
        """What the stage gives, its stitch included; None where it gives logits."""
        stitch = None if self.is_last else self._stitch_owner("post").post_stitch
        if stitch is None:
            return self.bare_out_cut
        return stitch.target or Cut(stitch.out_features)

    @property
    def in_width(self) -> int | None:
        """Width of what the stage reads, None where it reads images."""
        return None if self.in_cut is None else self.in_cut.width

    @property
    def out_width(self) -> int | None:
        """Width of what the stage gives, None where it gives logits."""
        return None if self.out_cut is None else self.out_cut.width

    def attach_stitches(self, pre_cut: Cut | int | None, post_cut: Cut | int | None) -> None:
        """Add trainable stitches: from `pre_cut` to what the stage's units read, and from what they give to `post_cut`.

        A number is tokens of that width, whose number and grid are taken as they come; None leaves that side as it is.
        Blocks made for stitches (V-MoE's, which have the attributes `pre_stitch` and `post_stitch`) get them inside, as
        published; otherwise they belong to the stage. The stitches have the device and dtype of the stage. A block
        inside a view is the model's block, so attach stitches to an independent copy (`copy.deepcopy`) unless the model
        is meant to have them too.

        Raises:
            M2MKDError: a stitch before the first stage or after the last one, or where there is one already.
        """
        for side, cut, allowed in (("pre", pre_cut, not self.is_first), ("post", post_cut, not self.is_last)):
            if cut is None:
                continue
            cut = as_cut(cut)
            if not allowed:
                place = "first stage reads images" if side == "pre" else "last stage gives logits"
                raise M2MKDError(f"no {side}-stitch of width {cut.width} here: the {place}; pass None for that side")
            owner = self._stitch_owner(side)
            if getattr(owner, f"{side}_stitch") is not None:
                raise M2MKDError(f"the stage has a {side}-stitch already; attach stitches to a fresh stage")
            source, target = (cut, self.bare_in_cut) if side == "pre" else (self.bare_out_cut, cut)
            stitch = self.stitch_class(source.width, target.width, source, target)
            like = self._like()
            setattr(owner, f"{side}_stitch", stitch.to(like.device, like.dtype).train(self.training))

    def group_matcher(self, coarse: bool = False) -> Any:
        """Layers for timm's layer-wise learning rates: the stitch before, the units, the stitch after or the head."""
        return {"pre_stitch": r"^pre_stitch", "units": r"^(?!post_stitch|head|tokenizer)"}

    def _stitch_owner(self, side: str) -> nn.Module:
        """The module that holds and applies the stitch of a side."""
        return self

    def _like(self) -> Tensor:
        """A tensor of the stage's device and dtype."""
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
