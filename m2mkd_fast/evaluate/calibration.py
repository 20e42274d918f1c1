"""How far a classifier's confidence is from its accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2mkd_fast.data import Split
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate.predictions import predict


def expected_calibration_error(
    model: nn.Module,
    split: Split,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    class_mask: Tensor | Sequence[bool] | Sequence[int] | None = None,
    num_bins: int = 15,
) -> float:
    """Expected calibration error in percent: sum over bins b of (n_b / n) |accuracy_b - confidence_b|.

    The confidence is the largest softmax probability; the `num_bins` bins divide (0, 1] evenly, each with its upper
    edge. Source: C. Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    if num_bins < 1:
        raise M2MKDError(f"num_bins={num_bins}: at least 1")
    surplus, count = torch.zeros(num_bins, dtype=torch.float64), 0
    for logits, labels in predict(model, split, batch_size=batch_size, device=device, class_mask=class_mask):
        confidence, predicted = logits.double().softmax(-1).max(-1)
        bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1).cpu()
        surplus.index_add_(0, bins, ((predicted == labels).double() - confidence).cpu())
        count += len(labels)
    return 100 * surplus.abs().sum().item() / count
