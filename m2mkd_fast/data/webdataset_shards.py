"""Shards in webdataset's format, read in any order."""

from __future__ import annotations

import glob
import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset
from m2mkd_fast.data.picture_split import PictureSource
from m2mkd_fast.data.shard_index import ShardIndex, index_shard
from m2mkd_fast.data.string_table import StringTable
from m2mkd_fast.errors import M2MKDError

LAYOUT = "expected tar files such as train-000.tar with neighbouring members 000.jpg and 000.cls"
_TEST_NAMES = ("val", "test")
_OPEN_FILES = 64  # in each process


def create_webdataset(
    pattern: str,
    options: PictureOptions,
    *,
    train: str | None = None,
    test: str | None = None,
    ood: str | None = None,
    image: str | None = None,
    label: str = "cls",
    class_names: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
) -> ImageDataset:
    """Tar files in webdataset's format: neighbouring members of one name are a sample, "000.jpg" and "000.cls".

    Batches are functions of (seed, t), so samples are read in random order: each shard's headers are read once and its
    samples' places kept in an index beside it (or in `cache_dir`), which is made anew when the tar changes. A training
    goes on in mid-epoch at once, and no shuffle buffer limits the shuffling. It wants shards on a disk that reads at
    random: copy them from object stores and tapes first.

    Args:
        pattern: a folder, or the training shards: a path with braces ("data/train-{000..127}.tar", as webdataset
            expands them), wildcards, or several of these divided by "::".
        options: see `PictureOptions`.
        train, test, ood: patterns of the splits' shards, relative to the folder. In a folder the default is
            "*train*.tar" and "*val*.tar" or "*test*.tar".
        image: extension of the images; by default whichever is one's (jpg, png, webp, …).
        label: extension of the labels, text with a number from 0 on; or of a JSON file with the key of the number in
            it, such as "json.label".
        class_names: of all classes; by default their numbers, as many as the labels show.
        cache_dir: where indices are kept; by default beside the shards.

    Raises M2MKDError where there are no shards, or one is truncated, compressed, or without images or labels.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise M2MKDError(f'webdataset shards need webdataset: pip install "m2mkd-fast[data]" ({error})') from error
    patterns = _patterns(pattern, train, test, ood)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    pictures = {}
    for split, shards in patterns.items():
        indices = [index_shard(path, image=image, label=label, cache_dir=cache) for path in _shards(split, shards)]
        pictures[split] = (ShardMembers(indices), torch.cat([index.labels for index in indices]))
    count = 1 + max(int(labels.max()) for _, labels in pictures.values())
    if class_names is not None and len(class_names) < count:
        raise M2MKDError(f"class_names has {len(class_names)} names and the labels go up to {count - 1}")
    names = [str(number) for number in range(count)] if class_names is None else [str(name) for name in class_names]
    facts: dict[str, Any] = {"shards": {split: len(source.shards) for split, (source, _) in pictures.items()}}
    return make_picture_dataset(f"webdataset:{pattern}", names, pictures, options, facts=facts)


class ShardMembers(PictureSource):
    """Members of tar files: image n is `sizes[n]` bytes from byte `offsets[n]` of `shards[files[n]]` on."""

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.shards = [index.path for index in indices]
        self.files = torch.arange(len(indices)).repeat_interleave(torch.tensor([len(index.keys) for index in indices]))
        self.offsets = torch.cat([index.offsets for index in indices])
        self.sizes = torch.cat([index.sizes for index in indices])
        self.keys = StringTable(itertools.chain.from_iterable(index.keys for index in indices))
        self._open_files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the latest used last

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.read(index)))

    def read(self, index: int) -> bytes:
        """The image as it is encoded."""
        size = int(self.sizes[index])
        # Reading at a place moves no position, so processes forked from this one may share its descriptors.
        content = os.pread(self._descriptor(int(self.files[index])), size, int(self.offsets[index]))
        if len(content) != size:
            raise OSError(f"the shard ends {size - len(content)} bytes too early; was it changed?")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
        else:
            self._open_files[shard] = os.open(self.shards[shard], os.O_RDONLY)
            if len(self._open_files) > _OPEN_FILES:
                os.close(self._open_files.popitem(last=False)[1])
        return self._open_files[shard]

    def name(self, index: int) -> str:
        return f"{self.keys[index]} in {self.shards[int(self.files[index])]}"

    def identities(self) -> Iterator[str]:
        return (f"{key}/{size}" for key, size in zip(self.keys, self.sizes.tolist(), strict=True))

    def subset(self, indices: Tensor) -> ShardMembers:
        part = ShardMembers([])
        part.shards, part.files = self.shards, self.files[indices]
        part.offsets, part.sizes = self.offsets[indices], self.sizes[indices]
        part.keys = self.keys.subset(indices)
        return part

    def __getstate__(self) -> dict[str, Any]:
        """Descriptors are a process's own: one started anew opens its files itself."""
        return {**self.__dict__, "_open_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open_files", {}).values():
            os.close(descriptor)


def _patterns(pattern: str, train: str | None, test: str | None, ood: str | None) -> dict[str, str]:
    """Each split's pattern, as a path."""
    folder = Path(pattern).expanduser()
    given = {"train": train, "test": test, "ood": ood}
    if folder.is_dir():
        if train is None:
            given["train"] = "*train*.tar"
        if test is None:
            given["test"] = next((f"*{name}*.tar" for name in _TEST_NAMES if any(folder.glob(f"*{name}*.tar"))), None)
        given = {
            split: "::".join(str(folder / part) for part in shards.split("::"))
            for split, shards in given.items()
            if shards is not None
        }
    else:
        if train is not None:
            raise M2MKDError(f"{pattern!r} is the training shards already; leave train= out, or give a folder")
        given = {split: shards for split, shards in {**given, "train": pattern}.items() if shards is not None}
    if "test" not in given:
        raise M2MKDError(f"webdataset {pattern!r}: no shards for testing; give test=, such as 'val-{{000..005}}.tar'")
    return {split: given[split] for split in ("train", "test", "ood") if split in given}


def _shards(split: str, pattern: str) -> list[Path]:
    """The tar files that a pattern names, in its order; those of a wildcard in the order of their names."""
    from webdataset.shardlists import expand_urls

    if "://" in pattern or pattern.startswith("pipe:"):
        raise M2MKDError(f"shards {pattern!r}: they are read in random order and must be files; download them first")
    found = []
    for path in expand_urls(pattern):
        path = os.path.expanduser(path)
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not matches or not os.path.isfile(matches[0]):
            beside = sorted(os.path.basename(other) for other in glob.glob(os.path.join(os.path.dirname(path), "*")))
            raise M2MKDError(
                f"there is no shard {path!r} for split {split!r}; {LAYOUT}; beside it: "
                f"{', '.join(beside[:8]) or 'nothing'}"
            )
        found += [Path(match) for match in matches]
    return found
