"""Where a training loop's batches come from: any batch at any time, a function of its number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from timm.data import Mixup
from torch import Tensor

from m2mkd_fast.data.batches import train_batches
from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.seeds import derive_seed, seeded_globals
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig


class BatchSource(Protocol):
    """Batch t is a function of t alone, so a run that goes on at batch t needs none before it."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[Any, Tensor]]:
        """Batches start ... stop - 1: what the task's forward pass takes first, and the labels.

        The first is a tensor or a tuple of tensors, the labels class indices ``[B]`` or soft targets ``[B, classes]``;
        the first dimension of all of them counts images.
        """
        ...


class AugmentedBatches:
    """Training images, augmented and mixed (mixup, CutMix); batch t is drawn from (seed, t) alone.

    Args:
        split: training images.
        config: batch size, mixing and label smoothing.
        seed: of order, augmentation and mixing.
        data: augmentation and loader processes.
        device: where mixing computes, and where the batches are given.
        shard: rank and number of the processes that share out each batch; this one gets its rows of it.
    """

    def __init__(
        self,
        split: Split,
        config: TrainingConfig,
        seed: int,
        data: DataConfig,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.split, self.config, self.seed, self.data = split, config, seed, data
        self.device, self.shard = device, shard
        self.mixup = (
            Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=split.num_classes)
            if config.mixup or config.cutmix
            else None
        )

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = train_batches(
            self.split,
            batch_size=self.config.batch_size,
            seed=self.seed,
            start=start,
            stop=stop,
            augmentation=self.data.augmentation,
            repeats=self.data.repeats,
            num_workers=self.data.num_workers,
            shard=self.shard,
            mirrored=self.mixup is not None,
            micro_batches=self.config.accumulate,
        )
        for t, (images, labels) in zip(itertools.count(start), batches, strict=False):
            images, labels = images.to(self.device), labels.to(self.device)
            if self.mixup is not None:
                with seeded_globals(derive_seed(self.seed, "step", t)):
                    images, labels = self.mixup(images, labels)
            yield images, labels
