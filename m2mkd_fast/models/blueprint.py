"""What a model can be built from again: its name and its options."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from m2mkd_fast.errors import M2MKDError

# An underscore keeps it out of the stages that are cut from a model: they take over a model's public settings.
_ATTRIBUTE = "_blueprint"


@dataclass(frozen=True)
class Blueprint:
    """`create_model(name, **options)` builds the model again, with fresh weights.

    Attributes:
        weights: where its first weights came from (`hf-hub:owner/name@commit`), None for fresh ones.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


def remember(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    """Note on a model, and thereby on its copies, what it was built from; the result is the model."""
    setattr(model, _ATTRIBUTE, copy.deepcopy(blueprint))
    return model


def blueprint_of(model: nn.Module) -> Blueprint | None:
    """What a model was built from, None where nobody has noted it. The model may have been changed since then."""
    return getattr(model, _ATTRIBUTE, None)


def as_json(blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint as a JSON object `{"name", "options"}`; M2MKDError names an option that JSON cannot hold."""
    options = {}
    for key, value in blueprint.options.items():
        try:
            text = json.dumps(as_json(value) if isinstance(value, Blueprint) else value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise M2MKDError(
                f"option {key}={value!r} of model {blueprint.name!r} cannot be written as JSON ({error}); give it as a "
                "string or a number where the model takes one (act_layer='gelu_tanh'), or register a builder that sets "
                "it with m2mkd_fast.register_model and create the model by that name"
            ) from error
        options[key] = json.loads(text)
    return {"name": blueprint.name, "options": options}


def from_json(value: Any, source: str) -> Blueprint:
    """The blueprint that a JSON object describes; M2MKDError, naming the source, where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise M2MKDError(f'{source}: "model" should be an object with "name" and "options", found {value!r}')
    options = value.get("options", {})
    if not isinstance(options, dict):
        raise M2MKDError(f'{source}: "options" of the model should be an object, found {options!r}')
    return Blueprint(value["name"], options)


def differences(model: nn.Module, other: nn.Module) -> list[str]:
    """In what layers, settings of layers, names and shapes of tensors two models differ; empty where in nothing."""
    ours, theirs = _structure(model), _structure(other)
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            found.append(f"{name} is {ours.get(name, 'missing')}, not {theirs.get(name, 'there')}")
    return found


def _structure(model: nn.Module) -> dict[str, str]:
    layers = {
        name or "the model": f"{type(module).__qualname__}({module.extra_repr()})"
        for name, module in model.named_modules(remove_duplicate=False)
    }
    return layers | {f"tensor {name}": str(list(tensor.shape)) for name, tensor in model.state_dict().items()}
