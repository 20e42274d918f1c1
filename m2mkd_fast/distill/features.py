"""What the frozen modules of all pairs make of a batch: made once, it stands for them in every pair and every arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from m2mkd_fast.modules.chain import ModuleChain

Read = Literal["inputs", "target", "teacher_logits"]


@dataclass(frozen=True)
class PairFeatures:
    """Names of the features of a batch that the pairs of all slots read, and how they are made.

    The pairs share one order of batches, so that one pass through the teacher serves them all, and what one pair
    compares with is what the next one reads: with the teacher's prefix :math:`h_{i+1} = T_i(h_i)` is both.

    Attributes:
        slots: L.
        prefix: whose modules make a pair's input, the "teacher"'s or the "meta" model's.
        targets: whether features are compared.
        logits: whether logits are compared.
    """

    slots: int
    prefix: str
    targets: bool
    logits: bool

    def name(self, slot: int, read: Read) -> str:
        """The feature that the pair of a slot reads as its inputs, target or teacher's logits."""
        if read == "teacher_logits":
            return f"logits{slot}"
        if read == "target":
            return f"cut{slot + 1}" if self.prefix == "teacher" else f"target{slot + 1}"
        return f"cut{slot}" if slot else "images"

    @torch.no_grad()
    def make(self, images: Tensor, teacher: ModuleChain, meta: ModuleChain) -> dict[str, Tensor]:
        """All features of a batch by name: what reaches each cut, and the logits of each of the teacher's modules.

        Args:
            images: ``[B, C, H, W]``.
            teacher, meta: in evaluation mode.
        """
        made = {"images": images}
        inputs, last = images, self.slots - 1
        follows_teacher = self.prefix == "teacher"
        for slot in range(self.slots):
            compared = self.logits or (self.targets and slot < last)
            taught = teacher[slot](inputs) if compared or (follows_teacher and slot < last) else None
            if self.logits:
                made[f"logits{slot}"] = meta.run(taught, slot + 1)
            if slot < last:
                if self.targets:
                    made[self.name(slot, "target")] = taught
                inputs = taught if follows_teacher else meta[slot](inputs)
                made[self.name(slot + 1, "inputs")] = inputs
        return made
