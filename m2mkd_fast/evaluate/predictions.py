"""Logits of a model over a split, batch by batch, leaving the model as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m2mkd_fast.data import Split, eval_batches
from m2mkd_fast.errors import M2MKDError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it each submodule has the mode it had, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def class_mask_tensor(class_mask: Tensor | Sequence[bool] | Sequence[int], num_logits: int) -> Tensor:
    """bool [num_logits] from such a mask or from a list of class indices.

    Raises M2MKDError when the mask has another length, an index is out of range or no class is left.
    """
    given = torch.as_tensor(class_mask).cpu()
    if given.dtype == torch.bool:
        if given.shape != (num_logits,):
            raise M2MKDError(f"class_mask has shape {tuple(given.shape)} and the model has {num_logits} logits")
        mask = given
    else:
        wrong = given[(given < 0) | (given >= num_logits)]
        if len(wrong):
            raise M2MKDError(f"class_mask names class {int(wrong[0])} and the model has classes 0 to {num_logits - 1}")
        mask = torch.zeros(num_logits, dtype=torch.bool)
        mask[given.to(torch.int64)] = True
    if not mask.any():
        raise M2MKDError("class_mask leaves no class to choose from")
    return mask


def predict(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    class_mask: Tensor | Sequence[bool] | Sequence[int] | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, C] and labels [B] of every batch of `split`, both on `device`, by default that of the parameters.

    With `shard` = (rank, world) of every world-th batch from number `rank` on.

    With `class_mask` the logits of the other classes are minus infinity; labels stay in the model's numbering.

    Raises M2MKDError for labels that the model or the mask has no class for, and for logits that are not a number:
    an accuracy computed from those would look like chance and mean nothing.
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    mask = None
    # no_grad, not inference_mode: tensors that a model keeps from here must stay usable in training.
    with evaluation_mode(model), torch.no_grad():
        for images, labels in eval_batches(split, batch_size, num_workers=num_workers, shard=shard):
            logits = model(images.to(device))
            if mask is None:
                mask = _checked_mask(class_mask, split, logits.shape[-1])
            if logits.isnan().any():
                raise M2MKDError(
                    f"the model's logits on split {split.name!r} are not numbers (NaN); the training diverged or the "
                    "weights are damaged"
                )
            yield logits.masked_fill(~mask.to(logits.device), -torch.inf), labels.to(logits.device)


def _checked_mask(class_mask: Tensor | Sequence[bool] | Sequence[int] | None, split: Split, num_logits: int) -> Tensor:
    mask = torch.ones(num_logits, dtype=torch.bool) if class_mask is None else class_mask_tensor(class_mask, num_logits)
    largest = int(split.labels.max())
    if largest >= num_logits:
        raise M2MKDError(f"split {split.name!r} has label {largest} and the model has only {num_logits} logits")
    outside = split.labels[~mask[split.labels]]
    if len(outside):
        raise M2MKDError(f"split {split.name!r} has images of class {int(outside[0])}, which class_mask leaves out")
    return mask
