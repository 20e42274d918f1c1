"""What a published checkpoint turned out to be, and the model or module that it belongs into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.blueprint import Blueprint, remember
from m2mkd_fast.models.state import load_strict

Kind = Literal["circuit", "circuit module", "vmoe", "vmoe module", "vit", "vit module"]


@dataclass(frozen=True)
class Published:
    """A checkpoint in our names: ``create_model(model, **options)`` builds what it belongs into.

    A *module* is a part of such a model between two cuts, with its stitches: a student module, or one of a teacher.

    Attributes:
        kind: what it is.
        model: name for :func:`~m2mkd_fast.models.create_model`.
        options: overrides for it; JSON. Of a module, those of the model it is a part of, but for its depth.
        state: tensors by our names, each once (not under ``stages.<i>.`` again).
        part: of a module, where it stands: ``"first"``, ``"middle"`` or ``"last"``.
        facts: plain values of the file: ``epoch``, ``divided_depths``, ``block_index``, ...
        assumed: what neither the file nor its shapes say and the published models have; change it with options.
        left_out: what the file holds beside the weights, such as the optimizer's state.
    """

    kind: Kind
    model: str
    options: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    part: Literal["first", "middle", "last"] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model or module with these weights, in their dtype if they have one in common, in evaluation mode."""
        module = self.fresh()
        dtypes = {tensor.dtype for tensor in self.state.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            module = module.to(*dtypes)
        load_strict(module, self.state, f"the {self.kind} for {self.model}")
        return module.eval()

    def fresh(self) -> nn.Module:
        """The model or module with other weights."""
        from m2mkd_fast.models.published import circuits, transformers

        module = (circuits if self.kind.startswith("circuit") else transformers).build(self)
        return module if self.part else remember(module, Blueprint(self.model, self.options))

    def expected(self) -> dict[str, torch.Size]:
        """Names and shapes that :meth:`build` fills; nothing is allocated.

        Raises:
            M2MKDError: the options make no model.
        """
        try:
            with torch.device("meta"):
                state = self.fresh().state_dict()
        except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:  # how timm and torch say it
            raise M2MKDError(
                f"{self.model} cannot be built with {self.options}, as the weights' shapes and the given options say: "
                f"{error}; correct the options, or look for tensors of a wrong shape"
            ) from error
        return {name: tensor.shape for name, tensor in state.items() if not name.startswith("stages.")}

    def metadata(self) -> dict[str, Any]:
        """What reading the tensors again needs beside them, as JSON; our files carry it."""
        return {"kind": self.kind, "model": self.model, "options": self.options, "facts": self.facts}


def differences(found: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the first description that the second one has otherwise."""
    return {key: value for key, value in found.items() if named.get(key) != value}
