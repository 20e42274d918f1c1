"""Seeds for independent random streams, and a guard that keeps the caller's random state as it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *words: int | str) -> int:
    """A seed in [0, 2**32) that depends on `seed` and every one of `words`, the same on every machine.

    Distinct words give unrelated streams; sums such as `seed + t` would let neighbouring seeds share batches.
    """
    digest = hashlib.blake2b("/".join(repr(word) for word in (int(seed), *words)).encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


def derived_generator(seed: int, *words: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive_seed(seed, *words)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *words))


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global CPU states of `random`, NumPy and PyTorch inside the block and restore them after it.

    For code that draws from the global states and takes no generator. `torch.manual_seed` is avoided: it would reseed
    the accelerators as well, which a data loader has no business with.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
