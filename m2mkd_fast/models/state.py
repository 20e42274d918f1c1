"""Weights in memory and in files: loaded strictly, written atomically, known by their hash."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError

FORMAT = "m2mkd_fast.module/1"
STITCHES = frozenset({"pre_stitch", "post_stitch"})


class Loaded(NamedTuple):
    """What a load left out, all of it listed by the caller: names the source lacks, and names the module lacks."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def is_stitch(name: str) -> bool:
    """Whether a state name belongs to a stitch: one of its dotted components is `pre_stitch` or `post_stitch`."""
    return not STITCHES.isdisjoint(name.split("."))


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike[str],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    origins: Mapping[str, str] | None = None,
) -> Loaded:
    """Copy a state dict into a module, in the module's dtypes; nothing is left out unless it is listed.

    A tensor that the module holds under several names (V-MoE: `blocks.3.*` and `stages.1.blocks.0.*`) is complete with
    any one of them; where several are given they must agree.

    Args:
        module: what to load into; on an error it is unchanged.
        state: tensors by name. One on the meta device stands for one that is not wanted, in a module that has no memory
            for it either: its name and its shape are checked all the same.
        source: where they come from (a file, a slot), for the error message.
        allow_missing: shell patterns of names that the state may lack.
        allow_unexpected: shell patterns of names that the module may lack.
        origins: where single tensors of the state come from, for the error message.

    Raises:
        M2MKDError: names every missing, unexpected, misshapen and contradictory tensor, and the source; or the module
            has no memory to copy into (it is on the meta device).
    """
    target = module.state_dict(keep_vars=True)
    if any(target[name].is_meta and not tensor.is_meta for name, tensor in state.items() if name in target):
        raise M2MKDError(
            f"{os.fspath(source)} cannot be loaded into a {type(module).__name__} on the meta device, which has no "
            "memory; build the module on a real device"
        )
    origins = origins or {}

    def described(name: str, shape: torch.Size) -> str:
        return f"{name} {list(shape)}" + (f" from {origins[name]}" if name in origins else "")

    given = {id(target[name]) for name in state if name in target}
    missing = [name for name, tensor in target.items() if id(tensor) not in given]
    unexpected = [name for name in state if name not in target]
    problems = [
        f"missing {described(name, target[name].shape)}" for name in missing if not _matches(name, allow_missing)
    ]
    problems += [
        f"unexpected {described(name, state[name].shape)}"
        for name in unexpected
        if not _matches(name, allow_unexpected)
    ]
    first_name: dict[int, str] = {}
    for name in state:
        if name not in target:
            continue
        if state[name].shape != target[name].shape:
            problems.append(
                f"misshapen {described(name, state[name].shape)}, the module has {list(target[name].shape)}"
            )
            continue
        if target[name].is_meta:
            continue
        first = first_name.setdefault(id(target[name]), name)
        if state[first] is not state[name] and not torch.equal(state[first], state[name]):
            problems.append(f"contradictory {first} and {name}: one tensor of the module, two values")
    if problems:
        raise M2MKDError(
            f"{os.fspath(source)} does not fit {type(module).__name__}, {len(problems)} problems: "
            + "; ".join(problems)
            + ". Build the model with the configuration the weights were made with, or list what may be left out in "
            "allow_missing and allow_unexpected"
        )
    with torch.no_grad():
        for name in first_name.values():
            target[name].copy_(state[name])
    return Loaded(tuple(missing), tuple(unexpected))


def weights_hash(module: nn.Module) -> str:
    """SHA-256, in hex, of a module's state: names (sorted), dtypes, shapes and bytes of all tensors.

    It does not depend on the device, on memory layout, nor on which names share a tensor.
    """
    return _hash(module.state_dict())


def save_module(path: str | os.PathLike[str], module: nn.Module, metadata: Mapping[str, object]) -> str:
    """Write a module's state and JSON-able metadata to a safetensors file; the result is `weights_hash(module)`.

    The file appears complete or not at all: it is written beside its place, flushed to the disk and renamed. A tensor
    with several names is stored once.

    Raises:
        M2MKDError: the file cannot be written, or the metadata is no JSON.
    """
    path = Path(path)
    aliases: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        else:
            stored[name] = tensor.detach()
    digest = _hash(module.state_dict())
    try:
        header = {
            "format": FORMAT,
            "metadata": json.dumps(dict(metadata)),
            "aliases": json.dumps(aliases),
            "weights_hash": digest,
        }
    except TypeError as error:
        raise M2MKDError(f"metadata for {path} is not JSON: {error}; give numbers, strings, lists and dicts") from error
    write_atomically(path, lambda temporary: save_file(own_memory(stored), temporary, metadata=header))
    return digest


def read_state(
    path: str | os.PathLike[str], without: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """State (all names of a shared tensor restored) and metadata of a file written by `save_module`, on the CPU.

    The whole file is read and its hash compared, tensor by tensor; those named in `without` are then forgotten, and
    stand in the state as tensors on the meta device.

    Raises:
        M2MKDError: no such file, a truncated or altered one, or one that `save_module` has not written.
    """
    path = Path(path)
    if not path.is_file():
        raise M2MKDError(f"there is no file {path}; run the step that makes it, or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise M2MKDError(
                    f"{path} is a safetensors file of another program (its format is {header.get('format')!r}, "
                    f"{FORMAT!r} is expected); read it with safetensors and load it with `load_strict`"
                )
            tensors = _FileTensors(file, json.loads(header["aliases"]))
            intact = _hash(tensors) == header["weights_hash"]
            left_out, state = set(without), dict[str, Tensor]()
            for name, first in tensors.stored.items():
                if name in left_out:
                    state[name] = torch.empty_like(tensors[name], device="meta")
                else:
                    shared = first in state and not state[first].is_meta
                    state[name] = state[first] if shared else tensors[name]
    except (OSError, SafetensorError) as error:
        raise M2MKDError(
            f"{path} is truncated or no safetensors file: {error}; delete it and run the step that makes it again"
        ) from error
    if not intact:
        raise M2MKDError(
            f"the weights in {path} are not those that were written (their hash differs); delete it and run the step "
            "that makes it again"
        )
    return state, json.loads(header["metadata"]) | {"weights_hash": header["weights_hash"]}


def load_module(path: str | os.PathLike[str], module: nn.Module, *, partly: bool = False) -> dict[str, object]:
    """Load a file written by `save_module` into a module, strictly.

    The result is the metadata the file was written with, and its `weights_hash`. With `partly` the module's tensors on
    the meta device stay there: of the file's values for them only name, shape and hash are checked, and no memory is
    taken. Raises M2MKDError as `read_state` and `load_strict` do.
    """
    target = module.state_dict(keep_vars=True) if partly else {}
    state, metadata = read_state(path, without=(name for name, tensor in target.items() if tensor.is_meta))
    load_strict(module, state, path)
    return metadata


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose parameters are on the meta device, and whose buffers are real: not all of those are in files.

    Some models cannot be built like that: a saved one, which comes with its values, or one that makes buffers on the
    device of its parameters (timm's Swin). Those are built whole first, which takes their memory for a moment.
    """
    # What is wrong beside the missing values, the second attempt says.
    with suppress(M2MKDError, NotImplementedError, RuntimeError), _parameters_without_memory():
        model = build()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    model = build()
    _move_parameters(model, device="meta")
    return model


_register_parameter = nn.Module.register_parameter
_builders = threading.local()
_patching, _patches = threading.Lock(), 0


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """What this thread's modules register as parameters goes to the meta device; other threads build as ever.

    Accelerate's `init_empty_weights` does the same for all threads of the process.
    """
    global _patches
    with _patching:
        _patches += 1
        nn.Module.register_parameter = _register_without_memory
    _builders.active = True
    try:
        yield
    finally:
        _builders.active = False
        with _patching:
            _patches -= 1
            if _patches == 0:
                nn.Module.register_parameter = _register_parameter


def _register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    _register_parameter(module, name, parameter)
    if parameter is not None and getattr(_builders, "active", False):
        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def give_memory(*modules: nn.Module) -> None:
    """Replace parameters on the meta device by ones on the CPU whose values are whatever was there.

    A parameter that the modules share stays shared.
    """
    _move_parameters(*modules, device="cpu")


def _move_parameters(*modules: nn.Module, device: str) -> None:
    made: dict[int, nn.Parameter] = {}
    for part in (part for module in modules for part in module.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta != (device == "meta"):
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]


class _FileTensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file under all their names, each read when it is asked for."""

    def __init__(self, file: Any, aliases: Mapping[str, str]) -> None:
        self.file = file
        self.stored = {name: name for name in file.keys()} | dict(aliases)  # noqa: SIM118 (not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, and copied where two of them overlap: safetensors refuses shared memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return result


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
