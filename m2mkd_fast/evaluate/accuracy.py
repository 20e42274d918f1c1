"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m2mkd_fast.data import Split
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate.predictions import predict


def evaluate_accuracy(
    model: nn.Module,
    split: Split,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    class_mask: Tensor | Sequence[bool] | Sequence[int] | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Percentage of images whose largest logit is that of their label.

    The model is evaluated in evaluation mode without gradients, and each of its submodules gets its mode back.
    `class_mask`, bool [C] or class indices, restricts the choice to those classes (for test sets with fewer classes
    than the model, such as ImageNet-R; `split.class_mask` is the mask of a split's own classes).

    Several processes share the work with `shard` = (rank, world): each takes whole batches, and `total` adds up their
    counts, so all of them get the number that one alone would.
    """
    return evaluate_topk(model, split, (1,), batch_size, device, class_mask, num_workers, shard, total)[1]


def evaluate_topk(
    model: nn.Module,
    split: Split,
    k: Sequence[int] = (1, 5),
    batch_size: int = 256,
    device: torch.device | str | None = None,
    class_mask: Tensor | Sequence[bool] | Sequence[int] | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[int, float]:
    """For each k the percentage of images whose label is among the k largest logits; else as `evaluate_accuracy`."""
    if not k or min(k) < 1:
        raise M2MKDError(f"k={tuple(k)}: give at least one number, each at least 1")
    counts = torch.zeros(len(k) + 1, dtype=torch.int64)  # right ones for each k, and images
    for logits, labels in predict(
        model, split, batch_size=batch_size, device=device, class_mask=class_mask, num_workers=num_workers, shard=shard
    ):
        if max(k) > logits.shape[-1]:
            raise M2MKDError(f"k={max(k)}: the model has only {logits.shape[-1]} logits")
        ranked = logits.topk(max(k), dim=-1).indices == labels[:, None]
        counts[:-1] += torch.stack([ranked[:, :limit].any(-1).sum() for limit in k]).cpu()
        counts[-1] += len(labels)
    *correct, images = (counts if total is None else total(counts)).tolist()
    return {limit: 100 * hits / images for limit, hits in zip(k, correct, strict=True)}
