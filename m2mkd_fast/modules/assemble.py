"""Put taught student modules together, with their stitches or without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.fold_stitches import fold_stitches
from m2mkd_fast.modules.origin import remember_chain
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import is_stitch, load_strict


@dataclass(frozen=True)
class Assembly:
    """An assembled model, and where each of its tensors comes from.

    Attributes:
        model: the assembled model.
        origins: for every name in the model's state dict `"slot <i>: <name in module i>"`, or `"initial"` for a tensor
            that no module filled and that therefore is what it was in `into`.
    """

    model: nn.Module
    origins: dict[str, str]

    @property
    def initial(self) -> tuple[str, ...]:
        """Names of the tensors that no module filled."""
        return tuple(name for name, origin in self.origins.items() if origin == "initial")


def assemble(
    modules: Sequence[nn.Module],
    into: nn.Module | None = None,
    stitches: Literal["kept", "folded", "dropped"] = "dropped",
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Assembly:
    """Put modules 0 ... L-1 together into one model.

    Args:
        modules: the modules in order, as `student_modules` made them.
        into: with stitches dropped, the full model that receives the modules' tensors; it is changed in place.
        stitches: "kept": the model is the chain of the modules as they are, teacher-wide between them. "folded": the
            chain of copies of them with one stitch at each cut in place of two, equal to the kept one but for rounding
            (`fold_stitches`). "dropped": all tensors but the stitches are copied into `into`, as published.
        strict: whether a tensor of `into` that no module fills and a tensor of a module that has no place in `into` are
            errors. A misshapen one is always an error. Of a Neural Attentive Circuit the graph (signatures, codes,
            kernels, initial states) is never in a module, so these stay what they are in `into` without being listed.
        allow_missing: shell patterns of names in `into` that no module needs to fill.
        allow_unexpected: shell patterns of names in a module that need no place in `into`.

    Raises:
        M2MKDError: modules out of order; missing, unexpected or misshapen tensors, each named with its slot; a tensor
            of `into` that several modules hold with different values; `into` missing or given in the wrong place.
    """
    if stitches not in ("kept", "folded", "dropped"):
        raise M2MKDError(f"stitches are {stitches!r}; say 'kept', 'folded' or 'dropped'")
    for i, module in enumerate(modules):
        slot = getattr(module, "slot", None)
        if slot is not None and slot != i:
            raise M2MKDError(f"module {i} of the list was made for slot {slot}; give the modules in the order of slots")
    if stitches != "dropped":
        if into is not None:
            raise M2MKDError(f"{stitches} stitches make a chain of the modules; leave `into` out, or drop stitches")
        chain = ModuleChain(modules if stitches == "kept" else fold_stitches(modules))
        remember_chain(chain, modules, stitches)
        origins = {name: _chain_origin(name) for name in chain.state_dict()}
        return Assembly(chain, origins)
    if into is None:
        raise M2MKDError("dropped stitches need the full model that receives the modules' tensors; give `into`")
    if not strict:
        allow_missing = allow_unexpected = ("*",)
    if hasattr(into, "module_key"):
        return _into_circuit(modules, into, tuple(allow_missing), tuple(allow_unexpected))
    return _into_stages(modules, into, tuple(allow_missing), tuple(allow_unexpected))


def _into_stages(
    modules: Sequence[nn.Module], into: nn.Module, allow_missing: tuple[str, ...], allow_unexpected: tuple[str, ...]
) -> Assembly:
    for i, module in enumerate(modules):
        if not hasattr(module, "depth"):
            raise M2MKDError(
                f"module {i} is a {type(module).__name__}, which has no blocks for a {type(into).__name__}"
            )
    chain = split(into, [module.depth for module in modules], getattr(modules[0], "image_shape", None))
    full = into.state_dict(keep_vars=True)
    full_names: dict[int, list[str]] = {}
    for name, tensor in full.items():
        full_names.setdefault(id(tensor), []).append(name)
    moved: dict[str, Tensor] = {}
    origins = dict.fromkeys(full, "initial")
    unexpected: list[tuple[str, Tensor]] = []
    disagreeing: list[str] = []
    for i, (module, view) in enumerate(zip(modules, chain, strict=True)):
        places = view.state_dict(keep_vars=True)
        for key, tensor in module.state_dict().items():
            if is_stitch(key):
                continue
            if key not in places:
                unexpected.append((f"slot {i}: {key}", tensor))
                continue
            for name in full_names[id(places[key])]:
                if name in moved and not torch.equal(moved[name], tensor):
                    disagreeing.append(f"{name} ({origins[name]} and slot {i}: {key})")
                moved[name] = tensor
                origins[name] = f"slot {i}: {key}"
    if disagreeing:
        raise M2MKDError(
            f"several slots hold one tensor of the {type(into).__name__}, with different values: "
            + "; ".join(disagreeing)
            + ". Taught apart, they have grown apart: keep the stitches (a chain holds each slot's own), freeze these "
            "tensors while the modules are taught, or cut the model where no tensor is shared"
        )
    return _loaded(into, moved, origins, unexpected, allow_missing, allow_unexpected)


def _into_circuit(
    modules: Sequence[nn.Module], into: nn.Module, allow_missing: tuple[str, ...], allow_unexpected: tuple[str, ...]
) -> Assembly:
    """The circuit knows the place of a module's tensor: `module_key(index, key, num_modules)`, None for none.

    Modules that the circuit itself makes say which tensors a module has, and thereby which tensors of the circuit are
    to be filled; all others (signatures, codes, kernels, initial states) are the circuit's own.
    """
    from m2mkd_fast.models.nac.student import student_modules

    with torch.random.fork_rng(devices=[]):  # the examples draw codes and states
        examples = student_modules(into, [1] * (len(modules) - 1))
    full = into.state_dict(keep_vars=True)
    origins = dict.fromkeys(full, "initial")
    own = set(full)
    moved: dict[str, Tensor] = {}
    unexpected: list[tuple[str, Tensor]] = []
    for i, (module, example) in enumerate(zip(modules, examples, strict=True)):
        state = module.state_dict()
        known = example.state_dict().keys()
        unexpected += [(f"slot {i}: {key}", tensor) for key, tensor in state.items() if key not in known]
        for key in known:
            name = into.module_key(i, key, len(modules))
            if name is None:
                continue
            own.discard(name)
            if key in state:
                moved[name] = state[key]
                origins[name] = f"slot {i}: {key}"
    return _loaded(into, moved, origins, unexpected, (*allow_missing, *own), allow_unexpected)


def _loaded(
    into: nn.Module,
    moved: dict[str, Tensor],
    origins: dict[str, str],
    unexpected: list[tuple[str, Tensor]],
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> Assembly:
    # An unexpected tensor travels under the name of its slot, so that the one error of load_strict lists it as well.
    patterns = tuple(f"slot *: {pattern}" for pattern in allow_unexpected)
    filled = {name: origin for name, origin in origins.items() if origin != "initial"}
    load_strict(into, moved | dict(unexpected), "the list of student modules", allow_missing, patterns, filled)
    return Assembly(into, origins)


def _chain_origin(name: str) -> str:
    _, slot, key = name.split(".", 2)
    return f"slot {slot}: {key}"
