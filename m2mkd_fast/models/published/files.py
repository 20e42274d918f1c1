"""Files that hold a checkpoint, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.state import FORMAT as OURS
from m2mkd_fast.models.state import own_memory, read_state

FORMAT = "m2mkd_fast.published/1"
_TENSOR = "$tensor"  # marks, in the JSON of the structure, the place of a tensor


class Contents(NamedTuple):
    """What a file holds before anyone knows what it means: nested dicts and lists of tensors and plain values.

    `form` is ``"ours"`` for a file of `save_module`; `metadata` is what was written with it.
    """

    tree: Mapping[str, Any]
    form: Literal["torch", "npz", "safetensors", "ours"]
    metadata: Mapping[str, Any] = {}


def read_file(path: str | os.PathLike[str]) -> Contents:
    """Read a file of PyTorch, NumPy (`.npz`) or safetensors; its first bytes say which it is, not its name.

    Tensors come on the CPU; those of a PyTorch file stay on the disk until they are used.

    Raises:
        M2MKDError: there is no such file, it is damaged, of another kind, or it needs pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise M2MKDError(f"there is no file {path}; give the path of a checkpoint")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except zipfile.BadZipFile as error:
            raise M2MKDError(f"{path} is damaged or was not downloaded whole: {error}; download it again") from error
        if all(member.endswith(".npy") for member in members):
            return Contents(_read_npz(path), "npz")
        return Contents(_read_torch(path, mmap=True), "torch")
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return _read_safetensors(path)
    if head[:1] == b"\x80":  # torch.save before PyTorch 1.6
        return Contents(_read_torch(path, mmap=False), "torch")
    raise M2MKDError(
        f"{path} is no checkpoint: its first bytes are those of neither PyTorch, NumPy (.npz) nor safetensors; "
        "download it again, or correct the path"
    )


def write_tree(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain values as safetensors with the structure as JSON beside them.

    :func:`published_checkpoint` gives the same tree back. A tensor in several places is stored once.

    Raises:
        M2MKDError: the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def outline(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(_identity(value), place)
            stored.setdefault(name, value.detach())
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {key: outline(item, f"{place}/{key}" if place else key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [outline(item, f"{place}/{index}") for index, item in enumerate(value)]
        return value

    header = {"format": FORMAT, "structure": json.dumps(outline(tree, ""))}
    write_atomically(Path(path), lambda temporary: save_file(own_memory(stored), temporary, metadata=header))


def published_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `torch.load` gives for a published checkpoint, from a file that `write_published` wrote.

    Nothing of ours writes a pickle, and a `.pth` is one; whoever needs it for the published code writes it:

        torch.save(published_checkpoint("vmoe_base.safetensors"), "vmoe_base.pth")

    Raises:
        M2MKDError: the file is missing, damaged, or of another kind.
    """
    contents = read_file(path)
    if contents.form != "safetensors":
        raise M2MKDError(f"{path} was not written by `write_published`; read it with `read_published`")
    return dict(contents.tree)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # A tensor without memory (on the meta device, or without elements) is itself alone.
    pointer = tensor.data_ptr()
    return (pointer, tensor.shape, tensor.stride(), tensor.dtype) if pointer else (id(tensor),)


def _read_torch(path: Path, mmap: bool) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        raise M2MKDError(
            f"{path} holds more than tensors and plain values, so that reading it would run code ({reason}). Where you "
            "trust its source, take the weights out yourself: "
            f"`torch.save({{'model': torch.load({str(path)!r}, weights_only=False)['model']}}, 'weights.pth')`, "
            "then read weights.pth"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise M2MKDError(f"{path} is damaged or was not downloaded whole: {error}; download it again") from error
    if not isinstance(tree, Mapping):
        raise M2MKDError(f"{path} holds a {type(tree).__name__}; a checkpoint is a dict with names")
    return tree


def _numpy_numbers() -> list[Any]:
    """What a pickled number of NumPy's (an accuracy, say) is made of: a constructor and types, which run nothing."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType]
    places = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*places, np.dtype, *kinds]


def _read_npz(path: Path) -> Mapping[str, Tensor]:
    import numpy as np

    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how NumPy stores JAX's bfloat16
                    tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
                else:
                    tensors[name] = torch.from_numpy(array)
    except TypeError as error:
        raise M2MKDError(f"{path} holds an array that PyTorch has no type for: {error}") from error
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise M2MKDError(
                f"{path} holds pickled objects, so that reading it would run code; write it anew with plain arrays: "
                "`numpy.savez(path, **flax.traverse_util.flatten_dict(params, sep='/'))`"
            ) from error
        raise M2MKDError(f"{path} is damaged or was not downloaded whole: {error}; download it again") from error
    return tensors


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") == OURS:
                state, metadata = read_state(path)
                return Contents(state, "ours", metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise M2MKDError(f"{path} is damaged or was not downloaded whole: {error}; download it again") from error
    if header.get("format") != FORMAT:
        return Contents(tensors, "safetensors")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_TENSOR]] if set(value) == {_TENSOR} else {k: fill(item) for k, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return Contents(fill(json.loads(header["structure"])), "safetensors")
