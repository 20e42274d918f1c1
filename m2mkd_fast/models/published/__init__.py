"""Released checkpoints under our names, and ours under theirs.

Read: Neural Attentive Circuits and their student modules, V-MoE and its student modules, Deep Incubation's Vision
Transformers, meta models and teacher modules, and the official V-MoE's flax parameters. What a file is, its tensors'
names and shapes say, never its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.published import circuits, transformers
from m2mkd_fast.models.published.files import Contents, published_checkpoint, read_file, write_tree
from m2mkd_fast.models.published.flax import from_flax, is_flax, to_flax
from m2mkd_fast.models.published.layouts import pack, unpack
from m2mkd_fast.models.published.names import check_names, grouped
from m2mkd_fast.models.published.record import Published

__all__ = ["Published", "identify", "published_checkpoint", "read_published", "write_published"]

SUFFIXES = (".pth", ".pt", ".bin", ".npz", ".safetensors")
_INDEX = (lambda value: isinstance(value, int) and value >= 0, "a number from 0")
# Options that say something about the file, and not about the model to build: what fits, in code and in words.
FACTS = {
    "block_index": _INDEX,
    "slot": _INDEX,
    "model_name": (lambda value: isinstance(value, str), "a name"),
    "divided_depths": (
        lambda value: isinstance(value, list) and all(isinstance(depth, int) and depth > 0 for depth in value),
        "a list of numbers of blocks, such as [3,3,3,3],",
    ),
}


def read_published(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Published:
    """Read a released checkpoint: a `.pth` of m2mKD, Deep Incubation or NAC, or an `.npz` of the official V-MoE.

    Nothing is unpickled but tensors and plain values. Optimizer states and the like are left out, and named in the
    result.

    Args:
        path: the file; also one that `write_published` or `save_module` wrote. Of a folder, the one file in it, or
            all its teacher modules (`FT_huge`) as the teacher.
        options: what weights do not show: `num_heads`, `top_k`, any other override of the model; `model` (its name:
            circuits of four graphs have the same tensors); `weights` (the entry of the file, such as `model_ema`);
            `slot`, `model_name`, `block_index`, `divided_depths`, as facts of the result; `tokens` (latents of a
            circuit's read-in).

    Raises:
        M2MKDError: no file, a damaged one, one that needs pickle, one with foreign, missing or misshapen names (all of
            them, with the nearest of ours), one that contradicts itself, or an option that is needed.

    Example:
        >>> published = read_published("vmoe_base.pth")
        >>> published.kind, published.model
        ('vmoe', 'vmoe_base.m2mkd')
        >>> model = published.build()
    """
    options = dict(options or {})
    weights = options.pop("weights", None)
    contents = read_file(path) if not Path(path).is_dir() else _read_folder(Path(path))
    if is_flax(contents.tree):
        if weights is not None:
            raise M2MKDError(f"weights={weights}: the parameters in {path} are told by their names; leave it out")
        state, heads, left_out = from_flax(contents.tree)
        options.setdefault("num_heads", heads)
        facts: dict[str, Any] = {}
    else:
        state, facts, left_out = unpack(contents.tree, path, weights)
    recorded = contents.metadata.get("published", {})
    facts |= recorded.get("facts", {})
    known = {"model": recorded["model"], **recorded["options"]} if recorded else {}
    published = identify(state, {**known, **options}, path, facts)
    return replace(published, left_out=tuple(left_out))


def _read_folder(folder: Path) -> Contents:
    """The one checkpoint in a folder, or the teacher modules in it as one model."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return read_file(files[0])
    modules = {}
    for file in files:
        unpacked = unpack(read_file(file).tree, file)
        index = unpacked.facts.get("block_index")
        if index is None or index in modules:
            reason = "does not say which (block_index)" if index is None else f"is module {index} once more"
            raise M2MKDError(
                f"{folder} has {len(files)} checkpoints; they make one model where each is a teacher module of another "
                f"place, but {file.name} {reason}. Read the files one by one"
            )
        modules[index] = unpacked
    absent = sorted(set(range(max(modules, default=0) + 1)) - modules.keys())
    if absent:
        raise M2MKDError(
            f"{folder} lacks the checkpoint" + (f" of teacher module {', '.join(map(str, absent))}" if modules else "")
        )
    facts = {key: value for key, value in modules[0].facts.items() if key not in ("block_index", "divided_depths")}
    return Contents({**facts, "model_stages": [modules[index].state for index in range(len(modules))]}, "torch")


def identify(
    state: Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] = "the state",
    facts: Mapping[str, Any] | None = None,
) -> Published:
    """What a state is whose names are ours: which model, or module of one, with which options.

    Args:
        state: tensors by name, a V-MoE's without their second names `stages.<i>.*`.
        options: as in :func:`read_published`.
        source: where the state comes from, for error messages.
        facts: plain values to keep with it.

    Raises:
        M2MKDError: foreign, missing or misshapen names; an option that is needed.
    """
    options = dict(options or {})
    facts = dict(facts or {}) | {name: options.pop(name) for name in FACTS if name in options}
    for name, (fits, expected) in FACTS.items():
        if name in facts and not fits(facts[name]):
            raise M2MKDError(f"{name} is {facts[name]!r}; {expected} is expected, correct --option {name}=...")
    state = dict(state)
    if circuits.is_circuit(state):
        published = circuits.identify(state, options, facts)
    elif transformers.is_transformer(state):
        published = transformers.identify(state, options, facts)
    else:
        raise M2MKDError(
            f"{os.fspath(source)} is neither a circuit, nor a Vision Transformer, a V-MoE or a module of one; its "
            f"{len(state)} names are "
            + "; ".join(grouped(state))
            + ". Ours begin with latent_graphs, read_in, latent_attention or blocks.<i>; weights of another model of "
            "timm's are loaded by timm.create_model(..., checkpoint_path=...)"
        )
    part = "" if published.part is None else f"the {published.part} module of "
    check_names(published.state, published.expected(), source, f"{part}{published.model} with {published.options}")
    return published


def write_published(path: str | os.PathLike[str], published: Published) -> tuple[str, ...]:
    """Write a checkpoint in the published layout; the result names tensors of ours that it has no place for.

    A path that ends in `.npz` gets the official V-MoE's flax parameters; any other one gets what the published PyTorch
    code saves, as safetensors with the structure in JSON: :func:`published_checkpoint` gives the dict again, which
    `torch.save` makes a `.pth` of. `read_published` reads both.

    Raises:
        M2MKDError: the layout cannot hold the model or needs a fact that is missing; a path that asks for a pickle.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin", ".pkl"):
        raise M2MKDError(
            f"{path.name} would be a pickle, and none is written here; write {path.stem}.safetensors, then "
            f'`torch.save(published_checkpoint("{path.stem}.safetensors"), "{path.name}")` where the published code '
            "needs it"
        )
    if path.suffix != ".npz":
        tree, left_out = pack(published)
        write_tree(path, tree)
        return tuple(left_out)
    if published.kind != "vmoe":
        raise M2MKDError(f"a {published.kind} has no layout as .npz; give a file name that ends in .safetensors")
    write_atomically(path, lambda temporary: _save_npz(temporary, _flax_arrays(published)))
    return ()


def _flax_arrays(published: Published) -> dict[str, Tensor]:
    import torch

    with torch.device("meta"):
        heads = published.fresh().blocks[0].attn.num_heads
    return to_flax(published.state, heads)


def _save_npz(path: Path, arrays: Mapping[str, Tensor]) -> None:
    import numpy as np
    import torch

    plain = {
        # NumPy has no bfloat16; two opaque bytes are what it makes of JAX's.
        name: tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
        for name, tensor in arrays.items()
    }
    with open(path, "wb") as file:
        np.savez(file, **plain)
