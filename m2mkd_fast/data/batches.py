"""Batches as pure functions of (seed, t): any batch can be made at any time, in any process, bit for bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from m2mkd_fast.data.augmentation import Rows, TimmTransform, create_augmentation
from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.loader import load_in_workers
from m2mkd_fast.data.seeds import derive_seed, derived_generator, seeded_globals
from m2mkd_fast.errors import M2MKDError

Batch = tuple[Tensor, Tensor]


# Two entries: a batch may cross from one epoch to the next.
@functools.lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int, repeats: int) -> Tensor:
    order = torch.randperm(size, generator=derived_generator(seed, "order", epoch))
    return order if repeats == 1 else order[: math.ceil(size / repeats)].repeat_interleave(repeats)[:size]


def batch_indices(size: int, *, batch_size: int, seed: int, t: int, repeats: int = 1) -> Tensor:
    """Image indices int64 [batch_size] of batch `t` from `size` images.

    The epochs' permutations, each of all `size` images, stand one after another; batch `t` is the stretch
    [t * batch_size, (t + 1) * batch_size) of it. No image is dropped, and a batch may cross epochs.

    With `repeats` > 1 (repeated augmentation, E. Hoffer et al., arXiv 1901.09335) an epoch still has `size` places, but
    each image of its permutation takes `repeats` places in succession, and the images that find no place are left out:
    a batch shows about batch_size / repeats images, each augmented so many times. The global batches are those of
    DeiT's `RASampler`, whose R processes take places k, k + R, …, and which cuts an epoch to a multiple of 256 images
    and the last partial batch off; here epochs are whole and batches may cross them.
    """
    first, end = t * batch_size, (t + 1) * batch_size
    return torch.cat(
        [
            _epoch_order(size, seed, epoch, repeats)[max(first - epoch * size, 0) : end - epoch * size]
            for epoch in range(first // size, (end - 1) // size + 1)
        ]
    )


def shard_rows(batch_size: int, shard: tuple[int, int], *, mirrored: bool = False, micro_batches: int = 1) -> Tensor:
    """Positions int64 [batch_size / world] in a batch that belong to `shard` = (rank, world), ascending.

    They are a contiguous stretch, so that images that routers group together stay together. With `mirrored` they are
    two, [a, b) and [B - b, B - a): a row and its mirror image `B - 1 - row` are on one rank, as mixing needs that
    pairs a batch with its flip (`timm.data.Mixup`). Mixing the rows of a rank is then taking those rows of the mixed
    batch. Of a batch that is trained on in `micro_batches`, one after another, every rank gets its part of each.

    Raises M2MKDError for a rank outside the world, and where the batch does not divide.
    """
    rank, world = _check_shard(shard)
    mirrored = mirrored and world > 1
    stretches = micro_batches * world * (2 if mirrored else 1)
    if batch_size % stretches:
        factors = [f"{micro_batches} micro-batches"] * (micro_batches > 1) + [f"{world} processes"] * (world > 1)
        factors += ["2, since mixing pairs a batch with its flip"] * mirrored
        raise M2MKDError(
            f"batch_size={batch_size} does not divide into {stretches} equal parts ({' times '.join(factors)}); make "
            f"it a multiple of {stretches}"
        )
    size = batch_size // micro_batches
    own = torch.arange(rank * (batch_size // stretches), (rank + 1) * (batch_size // stretches))
    if mirrored:
        own = torch.cat([own, size - 1 - own.flip(0)])
    return (torch.arange(0, batch_size, size)[:, None] + own).flatten()


class TrainBatchSource(Dataset):
    """Random access to training batches: `source[t]` depends on the arguments and `t` alone."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augmentation: str | Mapping[str, Any] = "none",
        repeats: int = 1,
        shard: tuple[int, int] = (0, 1),
        mirrored: bool = False,
        micro_batches: int = 1,
    ) -> None:
        _check_batch(split, batch_size)
        if repeats < 1:
            raise M2MKDError(f"repeats={repeats}: each image is shown at least once")
        self.split, self.batch_size, self.seed, self.repeats = split, batch_size, seed, repeats
        self.rows = shard_rows(batch_size, shard, mirrored=mirrored, micro_batches=micro_batches)
        self.augmentation = create_augmentation(augmentation)
        if isinstance(self.augmentation, TimmTransform):
            self._transform = self.augmentation.bind(split.image_shape, split.mean, split.std)

    def __getitem__(self, t: int) -> Batch:
        indices = batch_indices(len(self.split), batch_size=self.batch_size, seed=self.seed, t=t, repeats=self.repeats)
        indices = indices[self.rows]
        if isinstance(self.augmentation, TimmTransform):
            return self._transformed(t, indices)
        images, labels = self.split.load(indices, replace_unreadable=True)
        generator = derived_generator(self.seed, "augmentation", t)
        return self.augmentation(images, generator, Rows(self.batch_size, self.rows)), labels

    def _transformed(self, t: int, indices: Tensor) -> Batch:
        images, labels = [], []
        for position, index in zip(self.rows.tolist(), indices.tolist(), strict=True):
            picture, label = self.split.picture(index)
            with seeded_globals(derive_seed(self.seed, "augmentation", t, position)):
                images.append(self._transform(picture))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


class _EvalBatchSource(Dataset):
    def __init__(self, split: Split, batch_size: int) -> None:
        _check_batch(split, batch_size)
        self.split, self.batch_size = split, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __getitem__(self, t: int) -> Batch:
        first = t * self.batch_size
        return self.split.load(torch.arange(first, min(first + self.batch_size, len(self.split))))


def _check_batch(split: Split, batch_size: int) -> None:
    if batch_size < 1:
        raise M2MKDError(f"batch_size={batch_size}: it must be at least 1")
    if not len(split):
        raise M2MKDError(f"split {split.name!r} has no images; batches need at least one")


def _iterate(source: Dataset, steps: range, num_workers: int) -> Iterator[Batch]:
    if num_workers == 0:
        return (source[t] for t in steps)
    return load_in_workers(source, steps, num_workers)


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int,
    augmentation: str | Mapping[str, Any] = "none",
    repeats: int = 1,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    mirrored: bool = False,
    micro_batches: int = 1,
) -> Iterator[Batch]:
    """Training batches t = start … stop - 1: images float32 [batch_size, C, H, W], labels int64 [batch_size].

    Batch t is a function of (split, batch_size, seed, augmentation, repeats, t), bit for bit, whatever `start`, the
    number of worker processes or the global random states, which stay untouched. Every epoch shows each image once;
    batches may cross epochs. Batches before `start` cost nothing.

    `augmentation` is a preset's name or a mapping with "name" and options: see `create_augmentation`. With `repeats`
    each image appears so many times in succession, augmented anew: see `batch_indices`.

    With `shard` = (rank, world) only that rank's rows of every batch are made, bit for bit those of the whole batch:
    batch_size / world of them, which ones, and what `mirrored` and `micro_batches` are for, says
    `shard_rows`.

    Raises M2MKDError for an empty split or impossible numbers, at the call and not at the first batch.
    """
    if not 0 <= start <= stop:
        raise M2MKDError(f"start={start}, stop={stop}: batches need 0 <= start <= stop")
    _check_workers(num_workers)
    source = TrainBatchSource(
        split,
        batch_size=batch_size,
        seed=seed,
        augmentation=augmentation,
        repeats=repeats,
        shard=shard,
        mirrored=mirrored,
        micro_batches=micro_batches,
    )
    return _iterate(source, range(start, stop), num_workers)


def eval_batches(
    split: Split, batch_size: int, *, num_workers: int = 0, shard: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """All images of `split` once, in order, unaugmented, in batches of which the last may be smaller.

    With `shard` = (rank, world) only batches rank, rank + world, rank + 2 world, …: whole ones, so that images meet the
    same others in a batch, however many processes share the work. Images that cannot be decoded are left out.
    """
    _check_workers(num_workers)
    _check_shard(shard)
    source = _EvalBatchSource(split, batch_size)
    batches = _iterate(source, range(shard[0], len(source), shard[1]), num_workers)
    return (batch for batch in batches if len(batch[1]))


def _check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    rank, world = shard
    if not 0 <= rank < world:
        raise M2MKDError(f"shard=({rank}, {world}): a rank is from 0 to {world - 1}")
    return shard


def _check_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise M2MKDError(f"num_workers={num_workers}: 0 (this process) or more")
