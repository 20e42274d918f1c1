"""Where each sample of a tar file lies, so that samples can be read in any order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError

VERSION = 1  # of the index


class UnkeptIndexWarning(UserWarning):
    """The index of a shard cannot be written anywhere, so every start has to read the whole shard's headers again."""


@dataclass(frozen=True)
class ShardIndex:
    """The N samples of one tar file: `offsets` and `sizes` of their images in bytes, `labels`, int64 [N]; `keys`."""

    path: str
    offsets: Tensor
    sizes: Tensor
    labels: Tensor
    keys: list[str]


def index_shard(path: Path, *, image: str | None, label: str, cache_dir: Path | None) -> ShardIndex:
    """The index of a tar file, read from the file kept for it or made by going through its headers once.

    What is kept lies beside the tar, or in `cache_dir`, with the tar's size and time of change; where these or the
    options differ it is made anew. `image` is the extension of the images (None: whichever is an image's), `label` that
    of the labels, "cls", or for a value in a JSON file its extension and key, "json.label".

    Raises M2MKDError for a tar that is truncated, compressed or none, or a sample without an image or label.
    """
    facts = {"version": VERSION, "bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    facts |= {"image": image, "label": label}
    kept = _index_file(path, cache_dir)
    found = _read(kept, path, facts) if kept.is_file() else None
    if found is not None:
        return found
    made = _make(path, image, label)
    if os.access(_existing(kept.parent), os.W_OK):
        _write(kept, made, facts)
    else:
        warnings.warn(
            f"the index of shards cannot be kept in {kept.parent}, which is read-only: it is made anew at every start; "
            "give cache_dir=, a folder to keep it in",
            UnkeptIndexWarning,
            stacklevel=2,
        )
    return made


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def _index_file(path: Path, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return path.with_name(f"{path.name}.index.safetensors")
    key = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return cache_dir / f"{path.stem}-{key}.index.safetensors"


def _read(kept: Path, path: Path, facts: dict[str, Any]) -> ShardIndex | None:
    """What is kept, or None where it is of another tar, of other options or damaged: it costs little to make anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(kept, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("facts", "null")) != facts:
                return None
            tensors = {name: file.get_tensor(name) for name in ("offsets", "sizes", "labels", "keys")}
    except (OSError, SafetensorError):
        return None
    keys = bytes(tensors.pop("keys").numpy()).decode().split("\n")
    return ShardIndex(str(path), **tensors, keys=keys)


def _write(kept: Path, index: ShardIndex, facts: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    keys = torch.from_numpy(np.frombuffer("\n".join(index.keys).encode(), dtype=np.uint8).copy())
    tensors = {"offsets": index.offsets, "sizes": index.sizes, "labels": index.labels, "keys": keys}
    metadata = {"format": "m2mkd_fast shard index", "facts": json.dumps(facts)}
    write_atomically(kept, lambda temporary: save_file(tensors, temporary, metadata))


def _make(path: Path, image: str | None, label: str) -> ShardIndex:
    extension, _, key = label.partition(".")
    offsets, sizes, labels, keys = [], [], [], []
    with open(path, "rb") as file:
        for name, members in _samples(path):
            picture = _image_of(members, image)
            if picture is None or extension not in members:
                lacking = f"image (.{image or 'jpg, .png, .webp, …'})" if picture is None else f"label (.{extension})"
                raise M2MKDError(
                    f"{path}: sample {name!r} has no {lacking}; it has {', '.join(f'.{found}' for found in members)}. "
                    "Name the extensions with image= and label=, such as image='png', label='cls' or label='json.label'"
                )
            offsets.append(members[picture].offset_data)
            sizes.append(members[picture].size)
            file.seek(members[extension].offset_data)
            labels.append(_label(path, name, file.read(members[extension].size), extension, key))
            keys.append(name)
    if not keys:
        raise M2MKDError(f"{path} has no sample; expected pairs of files such as 000.jpg and 000.cls")
    table = (torch.tensor(values, dtype=torch.int64) for values in (offsets, sizes, labels))
    return ShardIndex(str(path), *table, keys)


def _samples(path: Path) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each key with its members by extension: neighbouring files of one name, as webdataset groups them."""
    from webdataset.tariterators import base_plus_ext

    samples: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # webdataset leaves out what is no file and what has a name like __meta__.
                if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                name, extension = base_plus_ext(member.name)
                if name is None:
                    continue
                if not samples or samples[-1][0] != name:
                    samples.append((name, {}))
                if extension.lower() in samples[-1][1]:
                    raise M2MKDError(f"{path}: sample {name!r} has two files .{extension.lower()}")
                samples[-1][1][extension.lower()] = member
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise M2MKDError(
            f"{path} is truncated, compressed or no tar file ({error}); copy it again, or write it uncompressed"
        ) from error
    with open(path, "rb") as file:
        file.seek(end)
        # tarfile takes any header that it cannot read for the end, which is blocks of zeros.
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise M2MKDError(
                f"{path} is truncated or damaged: after {len(samples)} samples, at byte {end}, there is neither a "
                "member nor the blocks of zeros that end a tar file; copy it again"
            )
    return samples


def _image_of(members: dict[str, tarfile.TarInfo], image: str | None) -> str | None:
    from webdataset.autodecode import IMAGE_EXTENSIONS

    if image is not None:
        return image if image in members else None
    return next((extension for extension in members if extension.rpartition(".")[2] in IMAGE_EXTENSIONS), None)


def _label(path: Path, name: str, content: bytes, extension: str, key: str) -> int:
    try:
        value = json.loads(content) if key else content.decode().strip()
        for part in key.split(".") if key else ():
            value = value[part]
        number = int(value)
    except (ValueError, KeyError, TypeError) as error:
        raise M2MKDError(
            f"{path}: the label of sample {name!r}, .{extension}{f' at {key}' if key else ''}, is no number "
            f"({type(error).__name__}: {error}); it is {content[:80]!r}"
        ) from error
    if number < 0:
        raise M2MKDError(f"{path}: the label of sample {name!r} is {number}; labels count from 0")
    return number
