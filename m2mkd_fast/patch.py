"""Put layers of this package into an existing model, by module path, and take them out again."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType

from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.patches.accelerate import Accelerate
from m2mkd_fast.patches.replacement import Replacement, check_same_tensors, share_tensors

logger = logging.getLogger("m2mkd_fast")

# The layers that are in models now, so that nobody replaces one of them, or something around or inside it, again.
_INSTALLED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_state_dict_hooks": "a state_dict hook",
    "_load_state_dict_pre_hooks": "a load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "a load_state_dict post-hook",
}


def apply(model: nn.Module, rules: Mapping[str, Replacement] | Accelerate) -> Handle:
    """Replace modules of a model, in place, by layers of this package.

    >>> handle = m2mkd_fast.apply(vit, {"blocks.*.mlp": m2mkd_fast.mixture(num_experts=8)})
    >>> print(handle.report)
    >>> handle.revert()

    A rule is a pattern of module paths, as ``model.named_modules()`` names them, and what to put in the places of the
    modules that it matches:

    - :func:`~m2mkd_fast.patches.mixture.mixture`: a mixture of experts for an MLP, upcycled or fresh;
    - :func:`~m2mkd_fast.patches.fastmoe.fastmoe_mlp`: for fastmoe's ``FMoETransformerMLP``;
    - :func:`~m2mkd_fast.patches.nac.nac_layer`: for the attention, read-in and feed-forward layers of the published
      Neural Attentive Circuits;
    - :func:`~m2mkd_fast.patches.biased_attention.biased_attention`: for timm's attention with a relative position bias.

    In a pattern, ``*``, ``?`` and ``[...]`` stay within one component of a path, ``**`` stands for any number of them:
    ``blocks.*.mlp``, ``stages.[23].**.attn``. In place of rules, ``accelerate()`` replaces all that the last three
    recognise.

    Modules of this model alone are replaced: no class and no function of PyTorch or of another package changes. A
    module that the model holds in several places is replaced in all of them. A new layer keeps device, dtype, training
    mode and ``requires_grad``. Every replacement is logged (logger ``m2mkd_fast``). All checks come before the first
    replacement: after an error the model is as it was.

    Args:
        model: any model; the root itself cannot be replaced.
        rules: see above.

    Returns:
        What takes the layers out again: :class:`Handle`.

    Raises:
        UnknownNameError: a pattern matches no module.
        M2MKDError: there are no rules; a module is matched by two of them, or inside another one that is matched; it is
            part of an earlier replacement; it has hooks, which the new layer would not call; a replacement does not
            know it; or there is nothing that ``accelerate()`` recognises.
    """
    if isinstance(rules, Accelerate):
        rules = {"**": rules}
    if not isinstance(rules, Mapping) or not rules:
        given = "empty" if isinstance(rules, Mapping) else f"a {type(rules).__name__}"
        raise M2MKDError(f"rules is {given}; expected {{pattern: replacement}}, as {{'blocks.*.mlp': mixture()}}")
    for pattern, replacement in rules.items():
        if not isinstance(replacement, Replacement):
            raise M2MKDError(
                f"the rule for {pattern!r} is a {type(replacement).__name__}; expected mixture(), fastmoe_mlp(), "
                "nac_layer(), biased_attention() or accelerate()"
            )
    changes = []
    for stock, (paths, replacement) in _select(model, rules).items():
        if replacement.knows(stock):
            _check_hooks(paths[0], stock, replacement)
        try:
            layer = replacement.make(stock)
        except M2MKDError as error:
            raise M2MKDError(f"{paths[0]}: {error}") from error
        changes.append(_Change(tuple(paths), stock, layer, replacement.shares_tensors, stock.training))
    for change in changes:
        _put(model, change.paths, change.layer)
        _INSTALLED.add(change.layer)
    handle = Handle(model, changes)
    for row in handle.report:
        logger.info("replaced %s", row)
    logger.info("replaced %d modules of %s", len(changes), type(model).__name__)
    return handle


@dataclass(frozen=True)
class _Change:
    paths: tuple[str, ...]
    stock: nn.Module
    layer: nn.Module
    shares_tensors: bool
    training: bool


@dataclass(frozen=True)
class Replaced:
    """One replacement: where, what by what, and how many parameters there were and are."""

    paths: tuple[str, ...]
    before: str
    after: str
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"{', '.join(self.paths)}: {self.before} -> {self.after}, {counts}"


class Report(tuple[Replaced, ...]):
    """The replacements in the order of the model's modules; printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("path", "from", "to", "parameters before", "after")]
        rows += [
            (", ".join(row.paths), row.before, row.after, f"{row.parameters_before:,}", f"{row.parameters_after:,}")
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column > 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


class Handle:
    """What :func:`apply` did to a model, and the way back; also a context manager that reverts at its end.

    Attributes:
        model: the model.
        report: the :class:`Replaced` modules; ``print(handle.report)`` shows a table.
    """

    def __init__(self, model: nn.Module, changes: list[_Change]) -> None:
        self.model = model
        self._changes: list[_Change] | None = changes
        self.report = Report(
            Replaced(
                change.paths,
                type(change.stock).__name__,
                type(change.layer).__name__,
                _count(change.stock),
                _count(change.layer),
            )
            for change in changes
        )

    def revert(self) -> None:
        """Put the very modules back that were there.

        Layers that share their parameters with the replaced modules (all but mixtures) leave what was trained in them.
        A mixture takes its experts with it: the MLP comes back with the parameters it had, on the device and in the
        dtype that the mixture has now. The modules get the training mode that their replacements have now, where that
        changed.

        Raises:
            M2MKDError: it has been reverted before; or something else is in the place of a layer now, or it has other
                tensors, and nothing has been changed.
        """
        if self._changes is None:
            raise M2MKDError("these replacements have been reverted before; call apply again to put them back")
        for change in self._changes:
            for path in change.paths:
                found = _find(self.model, path)
                if found is not change.layer:
                    what = "nothing" if found is None else f"a {type(found).__name__}"
                    raise M2MKDError(
                        f"cannot revert: there is {what} at {path} now, not the {type(change.layer).__name__} that "
                        "was put there; put it back, or revert what replaced it first"
                    )
            if change.shares_tensors:
                check_same_tensors(change.layer, change.stock)
        for change in self._changes:
            _restore(change)
            _put(self.model, change.paths, change.stock)
            _INSTALLED.discard(change.layer)
        self._changes = None
        logger.info("put %d modules of %s back", len(self.report), type(self.model).__name__)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._changes is not None:
            self.revert()


def _select(model: nn.Module, rules: Mapping[str, Replacement]) -> dict[nn.Module, tuple[list[str], Replacement]]:
    """The modules to replace, in the model's order, with all their paths."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    chosen: dict[nn.Module, tuple[str, Replacement]] = {}
    for pattern, replacement in rules.items():
        parts = pattern.split(".")
        matched = [m for m, paths in places.items() if any(_matches(parts, path.split(".")) for path in paths)]
        if not matched:
            general = {re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for paths in places.values() for path in paths}
            raise UnknownNameError("module path or pattern", pattern, general - {""})
        if isinstance(replacement, Accelerate):
            matched = [module for module in matched if replacement.knows(module)]
            if not matched:
                raise M2MKDError(
                    f"accelerate() recognises nothing in this {type(model).__name__}: {replacement.expected}"
                )
        for module in matched:
            if module is model:
                raise M2MKDError(f"{pattern!r} matches the model itself, which has no place to put a new layer into")
            if module in chosen:
                raise M2MKDError(f"two rules match {places[module][0]}: {chosen[module][0]!r} and {pattern!r}")
            chosen[module] = (pattern, replacement)
    _check_nesting(places, chosen)
    return {module: (places[module], chosen[module][1]) for module in places if module in chosen}


def _check_nesting(places: Mapping[nn.Module, list[str]], chosen: Mapping[nn.Module, tuple[str, Replacement]]) -> None:
    for module, (pattern, _) in chosen.items():
        for inner in module.modules():
            path = places[inner][0]
            if inner in _INSTALLED:
                raise M2MKDError(
                    f"{pattern!r} would replace {places[module][0]}, but {path} is the {type(inner).__name__} of an "
                    "earlier call of apply; revert that first"
                )
            if inner is not module and inner in chosen:
                raise M2MKDError(
                    f"{pattern!r} replaces {places[module][0]}, and {chosen[inner][0]!r} replaces {path} inside it; "
                    "write patterns that match one of the two"
                )
    for outer in places:
        if outer in _INSTALLED:
            for inner in outer.modules():
                if inner in chosen:
                    raise M2MKDError(
                        f"{chosen[inner][0]!r} would replace {places[inner][0]}, inside the {type(outer).__name__} "
                        f"that an earlier call of apply put at {places[outer][0]}; revert that first"
                    )


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], path) or _matches(pattern, path[1:])
    return fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])


def _check_hooks(path: str, stock: nn.Module, replacement: Replacement) -> None:
    for name, module in stock.named_modules(prefix=path):
        found = [
            f"{what} ({_name_of(next(iter(getattr(module, hooks).values())))})"
            for hooks, what in _HOOKS.items()
            if getattr(module, hooks)
        ]
        found += ["a forward of its own"] if "forward" in vars(module) else []
        if not replacement.shares_tensors:
            found += [
                f"a hook on its {key}"
                for key, parameter in module.named_parameters(recurse=False)
                if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            ]
        if found:
            raise M2MKDError(
                f"{name} has {' and '.join(found)}, which a new layer would not call: remove it before and put it on "
                "the new layer, or leave the module out"
            )


def _name_of(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _put(model: nn.Module, paths: tuple[str, ...], module: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _restore(change: _Change) -> None:
    """Bring a replaced module to where the model has been taken since."""
    if change.shares_tensors:
        # A move may have put new tensors into the layer.
        share_tensors(change.layer, change.stock)
    else:
        now = next(change.layer.parameters())
        change.stock.to(device=now.device, dtype=now.dtype)
    if change.layer.training != change.training:
        change.stock.train(change.layer.training)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
