"""What depends on parameters alone is computed once in evaluation, not in every forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_PLAIN = (Tensor, nn.Parameter)


class EvaluationCache:
    """Remembers one value while the tensors it was computed from are unchanged.

    It works only where gradients are off (``torch.no_grad``, ``torch.inference_mode``) and nothing is being compiled;
    everywhere else every call computes. A change of a source is told by its memory, its version (which PyTorch counts
    up at every write in place: an optimizer's step, ``load_state_dict``, ``copy_``), shape, strides, dtype and device;
    a change of autocast counts as one of a source.

    What it cannot see are writes that PyTorch does not count: ``parameter.data.add_(...)``, the fused optimizers
    (``AdamW(fused=True)``), NumPy, the replay of a captured training step. A forward with gradients, ``train()`` and
    ``eval()`` make it forget, so that training comes to no harm. Only where such a write falls between two forwards
    without gradients, with none of the three in between, call :meth:`clear`, or ``eval()`` on the model.

    A copy (``copy.deepcopy``, pickle) starts empty. Whoever captures a CUDA graph has to keep the remembered values
    alive as long as the graph: it reads them at the place where they were.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple, list[Tensor], Any] | None = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], T], settings: Hashable = ()) -> T:
        """``compute()``, or what it returned for the same sources.

        Args:
            sources: all tensors that the value depends on. Subclasses, inference tensors, tensors without memory (meta,
                ``vmap``) are not followed: with one of them every call computes.
            compute: a function of the sources and settings alone that returns a tensor, or a tuple or list of tensors.
                The value is handed out again and again: nobody may write to it.
            settings: what else the value depends on and may be changed between two calls, such as a layer's options.
        """
        if torch.compiler.is_compiling():
            return compute()
        if torch.is_grad_enabled():
            self.clear()  # before an optimizer that writes unseen
            return compute()
        key = _key(sources)
        if key is None:
            return compute()
        key = (key, settings)
        entry = self._entry  # read once: other threads may replace it
        if entry is not None and entry[0] == key:
            return entry[2]
        with torch.inference_mode(False), torch.no_grad():  # a value that later calls can use outside inference mode
            value = compute()
        if all(type(tensor) is Tensor and not tensor.requires_grad for tensor in _tensors(value)):
            # Held, so that their memory is not given to other tensors, which would look like them. Detached, because a
            # parameter itself lets its memory go where `.data` is assigned.
            held = [source.detach() for source in sources]
            self._entry = key, held, value
        return value

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None

    def __deepcopy__(self, memo: dict) -> EvaluationCache:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class CachesInEvaluation(nn.Module):
    """A module whose :class:`EvaluationCache` attributes forget when it is moved, or set to training or evaluation."""

    def clear_caches(self) -> None:
        """Forget what was computed for evaluation."""
        for value in vars(self).values():
            if isinstance(value, EvaluationCache):
                value.clear()

    def train(self, mode: bool = True):
        self.clear_caches()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.clear_caches()
        return super()._apply(fn, recurse)


def _key(sources: Sequence[Tensor]) -> tuple | None:
    """What tells these tensors, as they are now, from all others; None where that cannot be told."""
    parts: list[Any] = []
    for source in sources:
        if type(source) not in _PLAIN or source.is_inference() or source.is_meta:
            return None
        try:
            memory = source.data_ptr()
        except RuntimeError:  # a tensor inside vmap has none
            return None
        parts += (memory, source._version, source.shape, source.stride(), source.dtype, source.device)
    for device in {source.device.type for source in sources}:
        parts += (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    return tuple(parts)


def _tensors(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]
