"""What a replacement is, and how a new layer takes over the tensors of the module in whose place it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from m2mkd_fast.errors import M2MKDError


class Replacement(ABC):
    """Makes a layer for the place of a module."""

    shares_tensors: bool = True
    """Whether the layer has the module's very parameters, under the same names."""

    @abstractmethod
    def make(self, module: nn.Module) -> nn.Module:
        """The new layer; the module stays as it is.

        Raises:
            M2MKDError: the module is not of the kind that is replaced, or does something the layer does not.
        """

    @abstractmethod
    def knows(self, module: nn.Module) -> bool:
        """Whether the module is of the kind that is replaced, at first sight."""


def is_from(module: nn.Module, package: str, *names: str) -> bool:
    """Whether the module's class is one of these of a package, which need not be installed or imported for it."""
    kind = type(module)
    return kind.__name__ in names and package in kind.__module__.split(".")


def share_tensors(source: nn.Module, target: nn.Module) -> None:
    """Give a module the very parameters and buffers that another has under the same names, and their modes.

    Raises:
        M2MKDError: there are others, or they have other shapes. Nothing has been changed then.
    """
    check_same_tensors(source, target)
    for name, module in target.named_modules():
        # Layers without tensors may have other places: activations in wrappers, dropout.
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensors:
            counterpart = source.get_submodule(name)
            module.training = counterpart.training
            for key, _ in tensors:
                setattr(module, key, getattr(counterpart, key))


def check_same_tensors(source: nn.Module, target: nn.Module) -> None:
    """Raise unless both have parameters and buffers of the same names and shapes; the error lists the others."""
    theirs, ours = _shapes(source), _shapes(target)
    if theirs != ours:
        different = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        listed = ", ".join(f"{name} ({theirs.get(name, 'none')}, not {ours.get(name, 'none')})" for name in different)
        raise M2MKDError(
            f"this {type(source).__name__} has other tensors than the {type(target).__name__} in its place: {listed}"
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}
