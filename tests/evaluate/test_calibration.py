from __future__ import annotations

import pytest
import torch
from torch import nn

from m2mkd_fast.data import TensorSplit
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate import expected_calibration_error


def make_split(probabilities, labels):
    logits = torch.tensor(probabilities).log()
    return TensorSplit("test", logits[:, None, None], torch.tensor(labels), logits.shape[1], (0.0,), (1.0,))


def test_hand_worked_example():
    """Confidences .9 .9 .8 in the last of two bins, 2 of 3 correct; .5 in the first, wrong."""
    split = make_split([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.5, 0.5]], [0, 1, 1, 1])
    expected = 100 * (3 / 4 * abs(2 / 3 - 2.6 / 3) + 1 / 4 * 0.5)
    assert expected_calibration_error(nn.Flatten(), split, num_bins=2) == pytest.approx(expected, abs=1e-4)
    assert expected_calibration_error(nn.Flatten(), split, batch_size=1, num_bins=2) == pytest.approx(
        expected, abs=1e-4
    )


def test_against_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(400, 5, generator=generator).mul(2).softmax(-1)
    labels = torch.randint(5, (400,), generator=generator)
    confidence, predicted = probabilities.max(-1)
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            hits = (predicted == labels)[inside].float().mean()
            expected += 100 * inside.float().mean().item() * abs(hits - confidence[inside].mean()).item()
    split = make_split(probabilities.tolist(), labels.tolist())
    assert expected_calibration_error(nn.Flatten(), split, batch_size=64) == pytest.approx(expected, abs=1e-3)


def test_a_certain_and_right_model_has_no_error():
    split = TensorSplit("test", 1000 * torch.eye(3)[:, None, None], torch.arange(3), 3, (0.0,), (1.0,))
    assert expected_calibration_error(nn.Flatten(), split) == 0.0


def test_no_bins():
    with pytest.raises(M2MKDError, match="num_bins=0"):
        expected_calibration_error(nn.Flatten(), make_split([[0.5, 0.5]], [0]), num_bins=0)
