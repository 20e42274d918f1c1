"""Image classification data: `create_dataset`, and batches that depend on (seed, t) alone."""

from __future__ import annotations

from m2mkd_fast.data.batches import eval_batches, train_batches
from m2mkd_fast.data.image_dataset import ImageDataset, Split, TensorSplit
from m2mkd_fast.data.registry import create_dataset, list_datasets

__all__ = [
    "ImageDataset",
    "Split",
    "TensorSplit",
    "create_dataset",
    "eval_batches",
    "list_datasets",
    "train_batches",
]
