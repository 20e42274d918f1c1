"""Which implementation an operator runs: chosen for each call, or forced by the user.

Backends are ``reference`` (plain PyTorch, any device and dtype), ``cpu`` (C++), ``cuda`` (CUDA C++) and ``triton``.
Where PyTorch's operators can do better than the definition there is ``torch`` too, for any device and dtype.
Left alone (``auto``), an operator takes the fastest one that can run its input, and falls back on the reference with
one warning. A forced backend that cannot run the input raises an error with the reason.

The environment variable ``M2MKD_BACKEND`` forces from outside: ``M2MKD_BACKEND=reference``, or for single operators
``M2MKD_BACKEND=route=cpu,latent_attention=triton``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError

BACKENDS = ("reference", "torch", "cpu", "cuda", "triton")


class BackendFallbackWarning(UserWarning):
    """An operator runs its plain PyTorch reference because its compiled backend cannot run."""


def _checked(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise UnknownNameError("backend", name, (*BACKENDS, "auto"))
    return name


def _parse(setting: str) -> dict[str, str]:
    """``"cpu"`` -> {"": "cpu"}; ``"route=cpu,..."`` -> {"route": "cpu", ...}. The key "" stands for every operator."""
    wishes = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        op, _, name = part.rpartition("=")
        wishes[op.strip()] = _checked(name.strip())
    return wishes


# Process-wide, not per thread: a data-parallel or autograd thread has to see what the main thread forced.
_wishes: dict[str, str] | None = None
_said: set[tuple[str, str]] = set()


def _current() -> dict[str, str]:
    global _wishes
    if _wishes is None:
        _wishes = _parse(os.environ.get("M2MKD_BACKEND", ""))
    return _wishes


@contextmanager
def use_backend(backend: str | None = None, /, **per_operator: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for every operator or for single ones; it holds for all threads.

    >>> with use_backend("reference"):
    ...     model(images)
    >>> with use_backend(route="cpu"):
    ...     model(images)

    Args:
        backend: ``reference``, ``torch``, ``cpu``, ``cuda``, ``triton``, or ``auto`` to undo an outer force.
        **per_operator: the same for an operator by name; goes before ``backend``.

    Raises:
        UnknownNameError: there is no such backend.
        M2MKDError: (from the operator called inside) the backend cannot run; the message says why.
    """
    global _wishes
    before = _current()
    wishes = {op: _checked(name) for op, name in per_operator.items()}
    _wishes = {**before, **wishes} if backend is None else {"": _checked(backend), **wishes}
    try:
        yield
    finally:
        _wishes = before


def select_backend(op: str, reasons: Mapping[str, str | None]) -> str:
    """The backend to run ``op`` with.

    Args:
        op: the operator's name.
        reasons: for each compiled backend of the operator, fastest first, None where it can run this input, else why
            not. A backend for another kind of device does not belong in it unless it is forced: see
            :func:`device_reason`.

    Raises:
        M2MKDError: a forced backend cannot run.
    """
    wishes = _current()
    wish = wishes.get(op, wishes.get("", "auto"))
    if wish == "reference":
        return wish
    if wish != "auto":
        reason = reasons.get(wish, f"it has none; there are: {', '.join(('reference', *reasons))}")
        if reason is not None:
            raise M2MKDError(
                f"backend {wish!r} is forced, but cannot run {op}: {reason}. "
                f"Choose another one for it: use_backend({op}='auto') or M2MKD_BACKEND={op}=auto"
            )
        return wish
    for name, reason in reasons.items():
        if reason is None:
            return name
    if not torch.compiler.is_compiling():
        _say_once(op, reasons)
    return "reference"


def _say_once(op: str, reasons: Mapping[str, str | None]) -> None:
    why = "; ".join(
        f"{name}: {reason}" for name, reason in reasons.items() if not str(reason).startswith(_OTHER_DEVICE)
    )
    if why and (op, why) not in _said:
        _said.add((op, why))
        warnings.warn(f"{op} runs its plain PyTorch reference ({why})", BackendFallbackWarning, stacklevel=4)


_OTHER_DEVICE = "the input is on "


def device_reason(tensor: torch.Tensor, device_type: str) -> str | None:
    """Why a backend for ``device_type`` cannot take ``tensor``; no cause for a warning where it falls back."""
    if tensor.device.type == device_type:
        return None
    return f"{_OTHER_DEVICE}{tensor.device.type}, not on {device_type}"


# Read once, as Triton itself does when its kernels load; torch.compile cannot trace a search for a module either.
_HAS_TRITON = find_spec("triton") is not None
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_reason(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot take ``tensor``: it needs a GPU, or its interpreter, which runs on any device to debug."""
    if not _HAS_TRITON:
        return "triton is not installed; pip install triton"
    if _TRITON_INTERPRETS or tensor.device.type == "cuda":
        return None
    return f"{device_reason(tensor, 'cuda')} (TRITON_INTERPRET=1, set before Python starts, runs Triton there, slowly)"
