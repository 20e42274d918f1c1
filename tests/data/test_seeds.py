from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from m2mkd_fast.data.seeds import derive_seed, derived_generator, seeded_globals


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_derived_seeds_are_fixed_and_differ():
    assert derive_seed(0, "order", 0) == 2177431414
    seeds = {derive_seed(seed, word, t) for seed in range(20) for word in ("order", "augmentation") for t in range(50)}
    assert len(seeds) == 2000
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert derived_generator(4, "a").initial_seed() == derive_seed(4, "a")


def test_globals_are_seeded_inside_and_restored_after_an_error_too():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded_globals(7):
        inside = draws()
    assert draws() == expected
    with seeded_globals(7):
        assert draws() == inside
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyError), seeded_globals(8):
        raise KeyError
    assert draws() == expected
