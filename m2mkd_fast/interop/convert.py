"""Released checkpoints to files of ours, and back: what the command ``m2mkd convert`` does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.blueprint import blueprint_of
from m2mkd_fast.models.nac import NeuralAttentiveCircuit
from m2mkd_fast.models.pretrained import CONFIG, from_pretrained, save_pretrained
from m2mkd_fast.models.published import Published, read_published, write_published
from m2mkd_fast.models.published.layouts import unpack
from m2mkd_fast.models.state import save_module
from m2mkd_fast.models.vmoe import VMoE


@dataclass(frozen=True)
class Conversion:
    """What was read, where it was written, and the names of tensors that the target's layout has no place for."""

    published: Published
    source: Path
    target: Path
    not_written: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A report for people."""
        found = self.published
        part = "" if found.part is None else f", its {found.part} module"
        numbers = sum(tensor.numel() for tensor in found.state.values())
        options = ", ".join(f"{key}={value!r}" for key, value in found.options.items())
        lines = [
            f"read {self.source}: {found.kind}, {len(found.state)} tensors, {numbers:,} numbers",
            f"model: {found.model}" + (f" with {options}" if options else "") + part,
        ]
        if found.facts:
            lines.append("the file says: " + ", ".join(f"{key}={value}" for key, value in found.facts.items()))
        lines += [f"assumed: {text}" for text in found.assumed]
        lines += [f"left out: {text}" for text in (*found.left_out, *self.not_written)]
        return [*lines, f"wrote {self.target}"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Literal["ours", "published"] = "ours",
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Read a checkpoint and write it in the other layout.

    Args:
        source: what :func:`~m2mkd_fast.models.published.read_published` reads (a folder of teacher modules, too), or a
            folder of `save_pretrained`.
        target: to ours: a folder for `create_model("local-dir:...")`, or a file that ends in `.safetensors` (the only
            way for a module, a part of a model). To published: see
            :func:`~m2mkd_fast.models.published.write_published`.
        to: the layout to write.
        options: see :func:`~m2mkd_fast.models.published.read_published`.

    Raises:
        M2MKDError: as those two do; a module that is to become a folder; a target that is there already.
    """
    source, target = Path(source), Path(target)
    if target.is_file() or (target / CONFIG).exists():
        raise M2MKDError(f"{target} is there already; remove it, or name another target")
    if (source / CONFIG).is_file():
        overrides = dict(options or {})
        facts = {"divided_depths": overrides.pop("divided_depths")} if "divided_depths" in overrides else {}
        published = _of_model(from_pretrained(source, **overrides), facts, source)
    else:
        published = read_published(source, options)
    if to == "published":
        return Conversion(published, source, target, write_published(target, published))
    model = published.build()
    if target.suffix == ".safetensors":
        save_module(target, model, {"published": published.metadata()})
    elif published.part is None and not target.suffix:
        save_pretrained(model, target, provenance={"converted_from": source.name, **published.facts})
    else:
        raise M2MKDError(
            f"{target}: a {published.kind} is written to a file that ends in .safetensors"
            + ("" if published.part else ", or into a folder, which has a name without a dot")
        )
    return Conversion(published, source, target)


def _of_model(model: nn.Module, facts: Mapping[str, Any], source: Path) -> Published:
    """A model of ours that knows its name, as if it had been read from a published checkpoint."""
    kinds = {NeuralAttentiveCircuit: "circuit", VMoE: "vmoe", VisionTransformer: "vit"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(model, cls)), None)
    blueprint = blueprint_of(model)
    if kind is None or blueprint is None:
        raise M2MKDError(
            f"{source} holds a {type(model).__name__}, which has no published layout; there is one for circuits, V-MoE "
            "and Vision Transformers, and for single modules of theirs in files of save_module"
        )
    unpacked = unpack(model.state_dict(), source)
    return Published(kind, blueprint.name, dict(blueprint.options), unpacked.state, facts=unpacked.facts | dict(facts))
