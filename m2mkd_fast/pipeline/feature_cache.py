"""Features of batches on disk: written once in shards with checksums, read by memory map."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.data.batches import shard_rows
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.files import read_json, sha256_of_file, write_json

FORMAT = "m2mkd_fast.features/1"
LABELS = "labels"
SHARD_BYTES = 64 * 2**20  # of the largest feature in a shard; one batch at least
_LARGEST_HALF = torch.finfo(torch.float16).max

Make = Callable[[int, int], Iterator[Mapping[str, Tensor]]]


class FeatureCache:
    """Batches 0 ... N-1 of named features and their labels in a folder.

    Shard n holds batches nK ... (n+1)K - 1, each feature in a file of its own (``<feature>-<n>.safetensors``), so that
    a pair reads its own and no others. ``shard-<n>.json`` is written after a shard's files and holds their checksums,
    ``index.json`` after the last shard. Floating-point features are float16, or float32 in a shard where values exceed
    its range (65504); labels stay as they are. A file's checksum is compared when the file is first opened.

    Args:
        folder: of this cache alone.
        make: gives batches ``start ... stop - 1`` as mappings of features, and of "labels", to tensors ``[B, ...]``.
            Called to write, and again where a file is damaged.
        say: is told what was damaged, and what did not fit into float16.
    """

    def __init__(self, folder: Path, make: Make, say: Callable[[str], None] = lambda message: None) -> None:
        self.folder, self.make, self.say = folder, make, say
        self._index: dict[str, Any] | None = None
        self._opened: dict[str, tuple[int, Any]] = {}
        self._intact: set[Path] = set()

    @property
    def index(self) -> dict[str, Any]:
        """What :meth:`write` wrote down: facts, number of batches, batches of a shard, images of a batch.

        Raises:
            M2MKDError: the cache was never finished, or the index is damaged or of another format.
        """
        if self._index is None:
            path = self.folder / "index.json"
            if not path.is_file():
                raise M2MKDError(f"{self.folder} holds no finished cache; the step `cache` makes it")
            index = read_json(path)
            if index.get("format") != FORMAT:
                raise M2MKDError(f"{path} has the format {index.get('format')!r}, {FORMAT!r} is expected; delete it")
            self._index = index
        return self._index

    def write(
        self,
        batches: int,
        facts: Mapping[str, Any],
        after_shard: Callable[[int], None] = lambda done: None,
        processes: tuple[int, int] = (0, 1),
    ) -> dict[str, Any] | None:
        """Make what is not there yet, shard by shard, then the index.

        Args:
            batches: N.
            facts: JSON-able, what the features were made from.
            after_shard: told the number of batches that are there; what it raises stops the work between two shards.
            processes: rank and number of those that share out the shards. With several, `after_shard` has to wait for
                all of them; each calls it as often.

        Returns:
            The index, on rank 0; None on the others.

        Raises:
            M2MKDError: features that are not finite, or a disk that is full. What was written stays and is not made
                again.
        """
        first = next(iter(self.make(0, 1)))
        largest = max(feature.numel() for feature in first.values()) * 2
        each = min(batches, max(1, SHARD_BYTES // largest))
        index = {
            "format": FORMAT,
            "facts": dict(facts),
            "batches": batches,
            "batches_per_shard": each,
            "images_per_batch": len(first[LABELS]),
        }
        self._index = index
        (rank, world), shards = processes, range(math.ceil(batches / each))
        for begin in shards[::world]:
            shard = begin + rank
            if shard in shards and not self._complete(shard):
                self._write_shard(shard)
            after_shard(min(batches, (begin + world) * each))
        if rank > 0:
            return None
        described = [self._facts_of(shard) for shard in shards]
        index["bytes"] = sum(file["bytes"] for shard in described for file in shard["files"].values())
        index["seconds"] = sum(shard["seconds"] for shard in described)
        write_json(self.folder / "index.json", index)
        return index

    def read(self, feature: str, t: int) -> Tensor:
        """A feature of batch ``t`` (of batch t mod N beyond the last), as a view of the mapped file.

        A file that is damaged or missing is made again, which is said.
        """
        index = self.index
        shard, place = divmod(t % index["batches"], index["batches_per_shard"])
        if self._opened.get(feature, (None, None))[0] != shard:
            self._opened[feature] = shard, self._open(feature, shard)
        images = index["images_per_batch"]
        return self._opened[feature][1][place * images : (place + 1) * images]

    def _open(self, feature: str, shard: int) -> Any:
        path = self._path(feature, shard)
        if path not in self._intact:
            problem = self._problem(feature, shard)
            if problem:
                self.say(f"{path} {problem}; its shard is made again")
                self._write_shard(shard)
                problem = self._problem(feature, shard)
                if problem:
                    raise M2MKDError(f"{path} {problem}, although it was written a moment ago; is the disk at fault?")
            self._intact.add(path)
        return safe_open(path, framework="pt").get_slice("values")

    def _problem(self, feature: str, shard: int) -> str:
        """What is wrong with a file, empty if nothing is."""
        path, facts = self._path(feature, shard), self._facts_of(shard)
        if not path.is_file():
            return "is missing"
        if facts is None or feature not in facts["files"]:
            return "has no checksum"
        return "" if sha256_of_file(path) == facts["files"][feature]["sha256"] else "is damaged (its checksum differs)"

    def _facts_of(self, shard: int) -> dict[str, Any] | None:
        """Checksums and sizes of a shard's files; None where they are not (intact) there."""
        try:
            facts = json.loads(self._path("shard", shard, "json").read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        return facts if isinstance(facts, dict) and "files" in facts else None

    def _complete(self, shard: int) -> bool:
        facts = self._facts_of(shard)
        if facts is None:
            return False
        paths = {self._path(name, shard): file["bytes"] for name, file in facts["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _write_shard(self, shard: int) -> None:
        started = time.perf_counter()
        start = shard * self.index["batches_per_shard"]
        stop = min(start + self.index["batches_per_shard"], self.index["batches"])
        parts: dict[str, list[Tensor]] = {}
        for t, batch in zip(range(start, stop), self.make(start, stop), strict=True):
            for name, feature in batch.items():
                parts.setdefault(name, []).append(self._stored(feature, name, t).cpu())
        files = {}
        for name, stored in parts.items():
            path, digest = self._path(name, shard), []
            values = torch.cat(stored)  # float32 where one of them is

            def write(temporary: Path, values: Tensor = values, digest: list[str] = digest) -> None:
                save_file({"values": values}, temporary)
                digest.append(sha256_of_file(temporary))

            write_atomically(path, write)
            files[name] = {"sha256": digest[0], "bytes": path.stat().st_size, "dtype": str(values.dtype)}
        write_json(self._path("shard", shard, "json"), {"files": files, "seconds": time.perf_counter() - started})

    def _stored(self, feature: Tensor, name: str, t: int) -> Tensor:
        if name == LABELS or not feature.is_floating_point():
            return feature
        largest = float(feature.abs().max())
        if not math.isfinite(largest):
            raise M2MKDError(
                f"feature {name} of batch {t} is not finite, so no pair could learn from it; look at the teacher's and "
                "the meta model's losses, or use precision=float32"
            )
        if largest > _LARGEST_HALF:
            self.say(f"feature {name} of batch {t} reaches {largest:.4g}, too much for float16: stored as float32")
        return feature.to(torch.float16 if largest <= _LARGEST_HALF else torch.float32)

    def _path(self, name: str, shard: int, ending: str = "safetensors") -> Path:
        return self.folder / f"{name}-{shard:05d}.{ending}"


class CachedBatches:
    """The batches of a pair out of a cache: a tuple of its features in the order that the task reads them, and labels.

    Beyond the last batch that the cache holds it begins again with the first, with the same augmentation.

    Args:
        cache: finished.
        features: names of those that the pair reads.
        shard: (rank, number of processes) that share out each batch.
        micro_batches: into which a batch is divided before that, see :func:`m2mkd_fast.data.batches.shard_rows`.
    """

    def __init__(
        self, cache: FeatureCache, features: Sequence[str], shard: tuple[int, int] = (0, 1), micro_batches: int = 1
    ) -> None:
        self.cache, self.features = cache, tuple(features)
        whole = shard[1] == 1
        images = cache.index["images_per_batch"]
        # A slice is a view of the mapped file; rows by number are copied.
        self.rows = slice(None) if whole else shard_rows(images, shard, micro_batches=micro_batches)

    def batches(self, start: int, stop: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for t in range(start, stop):
            features = tuple(self.cache.read(name, t)[self.rows] for name in self.features)
            yield features, self.cache.read(LABELS, t)[self.rows]
