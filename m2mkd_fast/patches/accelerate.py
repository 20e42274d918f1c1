"""All layers that are recognised, at once."""

from __future__ import annotations

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.patches.biased_attention import BiasedAttentions
from m2mkd_fast.patches.fastmoe import FastMoE
from m2mkd_fast.patches.nac import NACLayer
from m2mkd_fast.patches.replacement import Replacement


def accelerate() -> Accelerate:
    """For :func:`m2mkd_fast.apply`: every layer that ``fastmoe_mlp()``, ``nac_layer()`` or ``biased_attention()`` know.

    >>> handle = m2mkd_fast.apply(model, accelerate())

    The model computes what it did, with the same parameters under the same names. Modules of other classes are left
    alone; one of a known class whose options are not known is an error, as in a rule that names it. In a rule,
    ``{"stages.2.**": accelerate()}`` looks among the modules that match.
    """
    return Accelerate()


class Accelerate(Replacement):
    """See :func:`accelerate`."""

    expected = (
        "expected fastmoe's FMoETransformerMLP, layers of neural_compilers, or timm's attention with a position bias"
    )

    def __init__(self) -> None:
        self._replacements: list[Replacement] = [FastMoE(), NACLayer(), BiasedAttentions()]

    def knows(self, module: nn.Module) -> bool:
        return any(replacement.knows(module) for replacement in self._replacements)

    def make(self, module: nn.Module) -> nn.Module:
        for replacement in self._replacements:
            if replacement.knows(module):
                return replacement.make(module)
        raise M2MKDError(f"accelerate() does not know a {type(module).__name__}: {self.expected}")
