"""Checks that read values back from the device, which only debugging can afford: `m2mkd_fast.debug`.

The environment variable ``M2MKD_DEBUG=1`` switches them on from outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

# Process-wide, not per thread: a data-parallel or autograd thread has to see what the main thread switched on.
_debugging: bool | None = None


def _current() -> bool:
    global _debugging
    if _debugging is None:
        setting = os.environ.get("M2MKD_DEBUG", "").strip().lower()
        if setting not in (*_ON, *_OFF):
            raise M2MKDError(f"M2MKD_DEBUG is {setting!r}; set it to 1 for checks of values, or to 0 (or not at all)")
        _debugging = setting in _ON
    return _debugging


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check values inside a ``with`` block (or a decorated function), for all threads of the process.

    Operators then raise :class:`~m2mkd_fast.errors.M2MKDError` where a number is not finite, say how many and where the
    first is, and what to do. Each check waits for the device. Outside, values are never read back, and a NaN takes the
    documented way through an operator.

    Nothing is checked in a graph that ``torch.compile`` traced or that a CUDA graph replays: run the model itself.
    ``debug(False)`` undoes an outer ``debug()`` and ``M2MKD_DEBUG=1``.

    >>> with m2mkd_fast.debug():
    ...     model(images)
    """
    global _debugging
    before = _current()
    _debugging = enabled
    try:
        yield
    finally:
        _debugging = before


def is_debugging() -> bool:
    """Whether values are to be checked here: inside :func:`debug`, and not while a graph is traced or captured."""
    if torch.compiler.is_compiling() or not _current():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def require_finite(tensor: Tensor, what: str, remedy: str) -> None:
    """Inside :func:`debug`, raise M2MKDError if a value of ``tensor`` is NaN or infinite; elsewhere do nothing.

    Args:
        tensor: any shape and dtype; tensors without values (on the meta device) are not looked at.
        what: what the values are, for the message: ``"routing scores"``.
        remedy: what to do about it, for the message.
    """
    if not is_debugging() or tensor.is_meta:
        return
    finite = tensor.detach().isfinite()
    if finite.all():
        return
    places = (~finite).nonzero()
    first = places[0].tolist()
    nan = int(tensor.detach().isnan().sum())
    raise M2MKDError(
        f"{len(places)} of {tensor.numel()} {what} of shape {list(tensor.shape)} are not finite ({nan} NaN, "
        f"{len(places) - nan} infinite); the first is {tensor.detach()[tuple(first)].item()} at index {first}. {remedy}"
    )
