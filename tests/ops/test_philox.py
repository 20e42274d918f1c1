"""Counter-based random numbers: known answers, and what is made of them."""

from __future__ import annotations

import math

import pytest
import torch

from m2mkd_fast.ops.philox import philox4x32, philox_keep, philox_normal, philox_uniform, philox_words


def test_noise_is_philox() -> None:
    """The known answers of Random123, philox4x32-10."""
    answers = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            0xD16CFE09,
            0x94FDCCEB,
            0x5001E420,
            0x24126EA1,
        ),
    }
    for (*counter, key0, key1), words in answers.items():
        found = philox4x32((torch.tensor(key0), torch.tensor(key1)), tuple(map(torch.tensor, counter)))
        assert tuple(word.item() for word in found) == words
    expected = torch.tensor([(word >> 8) * 2.0**-24 + 2.0**-25 for word in answers[(0,) * 6]], dtype=torch.float64)
    assert torch.equal(philox_uniform(torch.tensor(0), (2, 2, 3), torch.float64).flatten()[:4], expected)


def test_counters_may_start_anywhere() -> None:
    seed = torch.tensor(-7)
    assert torch.equal(philox_words(seed, 5, first=3), philox_words(seed, 8)[3:])
    # beyond 32 bits the counter goes on in the next word
    assert philox_words(seed, 2, first=2**32 - 1).unique(dim=0).shape == (2, 4)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_normal_numbers_follow_box_and_muller(count: int) -> None:
    seed = torch.tensor(11)
    u = philox_uniform(seed, (8,), torch.float64).tolist()
    expected = []
    for i in range(0, 8, 2):
        radius = math.sqrt(-2.0 * math.log(u[i]))
        expected += [radius * math.cos(2 * math.pi * u[i + 1]), radius * math.sin(2 * math.pi * u[i + 1])]
    torch.testing.assert_close(
        philox_normal(seed, (count,), torch.float64), torch.tensor(expected[:count], dtype=torch.float64)
    )


def test_normal_numbers_are_normal() -> None:
    sample = philox_normal(torch.tensor(5), (4, 50_000), torch.float32).flatten().double()
    assert abs(sample.mean()) < 0.01
    assert abs(sample.std() - 1.0) < 0.01
    below = (sample < torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(-1, 1)).double().mean(dim=1)
    torch.testing.assert_close(below, torch.special.ndtr(torch.arange(-2.0, 3.0)).double(), atol=0.005, rtol=0)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_keep_mask_is_of_the_words(width: int) -> None:
    seed, per_row = torch.tensor(3), (width + 3) // 4
    mask = philox_keep(seed, 5, width, 0.3, first=10)
    words = philox_words(seed, 5 * per_row, first=10).view(5, -1)[:, :width]
    assert torch.equal(mask, words >= round(0.3 * 2**32))
    assert philox_keep(seed, 5, width, 0.0).all()
    assert abs(philox_keep(seed, 4000, width, 0.3).double().mean() - 0.7) < 0.03
