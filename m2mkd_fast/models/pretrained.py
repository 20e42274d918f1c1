"""Models with their weights: saved in a folder, read from a folder or from the Hugging Face Hub, strictly."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import m2mkd_fast
from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.blueprint import Blueprint, as_json, blueprint_of, differences, from_json, remember
from m2mkd_fast.models.download import PICKLES, download, weights_among
from m2mkd_fast.models.model_card import model_card
from m2mkd_fast.models.registry import SAVED, create_model
from m2mkd_fast.models.state import load_strict, read_state, save_module

FORMAT = "m2mkd_fast.model/1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_log = logging.getLogger("m2mkd_fast")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model into a folder that `create_model("local-dir:FOLDER")` makes it from again.

    The folder gets `model.safetensors`, `config.json` (the model's name and options, the hash of its weights, its
    provenance) and `README.md` (a model card); files of these names are replaced, others stay. No pickle is written.

    The model is one that `create_model` made, or the chain that `assemble(..., stitches="kept")` made of such a
    student's modules: these know their names and options. They are not believed blindly: a model is built from them
    (on the meta device, so this costs little), and where its layers or tensors are not this model's, saving is refused.

    Args:
        model: any device, any dtypes, which are kept.
        folder: is made where it is missing.
        name: the model's name, where it was not made by `create_model`; then all its options are needed too.
        options: options that have changed since the model was made (`{"num_classes": 5}` after `reset_classifier`).
        provenance: JSON-able facts for `config.json` and the model card: `data` (what it was trained on), `results`
            (`{metric: number}`), `config` (of the run), `commit`, and any others.

    Returns:
        The folder.

    Raises:
        M2MKDError: a model without a name, or one that its name and options do not build; options or provenance that
            are no JSON; a folder that cannot be written.

    Example:
        >>> model = m2mkd_fast.create_model("vmoe_micro.m2mkd", num_classes=10)
        >>> save_pretrained(model, "digits_vmoe", provenance={"data": "digits", "results": {"test_accuracy": 99.0}})
    """
    folder = Path(folder)
    known = blueprint_of(model)
    if name is None and known is None:
        raise M2MKDError(
            f"this {type(model).__name__} does not know what it was built from: make it with m2mkd_fast.create_model "
            "(a student's modules too, before m2mkd_fast.assemble), or give its name and options to save_pretrained; a "
            "layout of your own gets a name by m2mkd_fast.register_model"
        )
    # A folder of this machine says nothing to others, and its name is nobody's business.
    started_from = known.weights if known and (known.weights or "").startswith("hf-hub:") else None
    blueprint = Blueprint(name, options or {}) if name else Blueprint(known.name, {**known.options, **(options or {})})
    description = as_json(blueprint)
    _require_rebuildable(model, from_json(description, "the model"))
    config: dict[str, Any] = {
        "format": FORMAT,
        "library_name": "m2mkd_fast",
        "library_version": m2mkd_fast.__version__,
        "model": description,
        "started_from": started_from,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "provenance": dict(provenance or {}),
    }
    try:
        json.dumps(config["provenance"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise M2MKDError(f"the provenance is not JSON ({error}); give numbers, strings, lists and dicts") from error
    config["weights_hash"] = save_module(folder / WEIGHTS, model, {"model": description})
    write_text_atomically(folder / CARD, model_card(config))
    # Last, for a folder with a configuration is complete; one of an earlier model would not fit the weights' hash.
    write_text_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def from_pretrained(source: str | os.PathLike[str], **overrides: object) -> nn.Module:
    """A saved model with its weights, in evaluation mode; every tensor is loaded, or it is an error that names it.

    Understood are folders and repositories that `save_pretrained` and `push_to_hub` wrote, those of timm, and those
    that hold a released checkpoint and no `config.json` (see :func:`m2mkd_fast.models.published.read_published`). No
    code is run: of a pickle nothing but tensors and plain values are read, and timm's must be safetensors.

    Args:
        source: a folder, a released file, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, `hf-hub:OWNER/NAME@REVISION` or
            `OWNER/NAME`; a folder comes before a repository of the same name. Of a repository with several models a
            file or a folder is named: `hf-hub:OWNER/NAME/FILE@REVISION`. A folder of teacher modules is the teacher.
            Without a network the cached copy of a repository is taken, with a warning that says its commit.
        overrides: options that replace recorded ones, such as `drop_path_rate=0.1`. The weights must still fit; for
            another number of classes use the model's `reset_classifier`. (timm's models take `num_classes`, and then
            start with a fresh classifier, about which a warning is logged.)

    Raises:
        M2MKDError: there is nothing to read, it is damaged, or the weights do not fit.

    Example:
        >>> model = from_pretrained("digits_vmoe")
        >>> teacher = from_pretrained("hf-hub:timm/resnet18.a1_in1k@main")
        >>> student = from_pretrained("hf-hub:kamanphoebe/m2mKD/vmoe_base.pth")
    """
    source = os.fspath(source)
    if not source.startswith(SAVED):
        source = ("local-dir:" if Path(source).exists() or source.count("/") != 1 else "hf-hub:") + source
    kind, _, place = source.partition(":")
    if kind == "hf-hub":
        path, _, revision = place.partition("@")
        repository, inside = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        folder, commit = download(repository, revision or None, inside)
        folder, origin = folder / inside, f"hf-hub:{path}@{commit}"
        _log.info("%s: commit %s", source, commit)
    else:
        folder, origin = Path(place), source
        if not folder.exists():
            raise M2MKDError(
                f"there is no folder or file {place!r} to read a model from; give one that save_pretrained wrote, or "
                "hf-hub:owner/name. A name of list_models() has no weights: build it with create_model"
            )
    model, blueprint = _read(folder, origin, overrides)
    return remember(model, Blueprint(blueprint.name, blueprint.options, origin)).eval()


def _read(folder: Path, origin: str, overrides: Mapping[str, Any]) -> tuple[nn.Module, Blueprint]:
    path = folder / CONFIG
    if folder.is_file():
        return _read_published(folder, origin, overrides)
    if not path.is_file():
        weights = weights_among([file.name for file in folder.iterdir()], origin)
        return _read_published(folder / weights[0] if len(weights) == 1 else folder, origin, overrides)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise M2MKDError(f"{path} is damaged ({error}); save or download the model again") from error
    if isinstance(config, dict) and str(config.get("format", "")).startswith("m2mkd_fast.model/"):
        return _read_ours(folder, config, overrides)
    if isinstance(config, dict) and "architecture" in config:
        return _read_timm(folder, origin, config, overrides)
    raise M2MKDError(
        f"{path} is of another program; understood are the folders of m2mkd_fast (with a format) and of timm (with an "
        "architecture)"
    )


def _read_ours(folder: Path, config: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[nn.Module, Blueprint]:
    if config["format"] != FORMAT:
        raise M2MKDError(
            f"{folder / CONFIG} has the format {config['format']}, this version reads {FORMAT}; upgrade m2mkd_fast"
        )
    blueprint = from_json(config.get("model"), str(folder / CONFIG))
    if blueprint.name.startswith(SAVED):
        raise M2MKDError(f"{folder / CONFIG} names {blueprint.name!r}, which is no model to build; save it again")
    path = folder / WEIGHTS
    if not path.is_file():
        raise M2MKDError(f"{folder} has a {CONFIG} but no {WEIGHTS}; save or download the model again")
    state, metadata = read_state(path)
    if metadata["weights_hash"] != config.get("weights_hash"):
        raise M2MKDError(f"{path} does not belong to the {CONFIG} beside it (another hash); save the model again")
    blueprint = Blueprint(blueprint.name, {**blueprint.options, **overrides})
    # The fresh weights are drawn for nothing; fitting a circuit's signatures would take half a minute more.
    unfitted = {"fit_signatures": False} if blueprint.name.startswith("nac_") else {}
    with torch.random.fork_rng(devices=[]):
        model = create_model(blueprint.name, **{**blueprint.options, **unfitted})
    _take_dtypes(model, state)
    load_strict(model, state, path)
    return model, blueprint


def _read_timm(
    folder: Path, origin: str, config: dict[str, Any], overrides: Mapping[str, Any]
) -> tuple[nn.Module, Blueprint]:
    import timm

    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise UnknownNameError("timm architecture", architecture, timm.list_models(), f"It is {origin}'s.")
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)) or "none at all"
        raise M2MKDError(f"{origin} has no weights as safetensors (pickles, which are not opened: {pickles})")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **overrides)
    except (RuntimeError, TypeError) as error:
        raise M2MKDError(f"{origin}: the weights do not fit timm's {architecture}: {error}") from error
    recorded = config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes"))
    if recorded not in (None, model.num_classes):
        _log.warning(
            "%s: the classifier of %s classes is left out; the model starts with a fresh one of %s",
            origin,
            recorded,
            model.num_classes,
        )
    options = {**config.get("model_args", {}), "num_classes": model.num_classes, **overrides}
    return model, Blueprint(architecture, options)


def _read_published(path: Path, origin: str, overrides: Mapping[str, Any]) -> tuple[nn.Module, Blueprint]:
    from m2mkd_fast.models.published import read_published

    published = read_published(path, overrides)
    if published.part is not None:
        raise M2MKDError(
            f"{origin} is a {published.kind}, a part of {published.model} and no model that maps images to logits; "
            "m2mkd_fast.models.published.read_published(FILE).build() gives the module"
        )
    for assumption in published.assumed:
        _log.info("%s: assumed %s", origin, assumption)
    return published.build(), Blueprint(published.model, published.options)


def _take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the model's tensors the dtypes of the saved ones, so that loading converts nothing."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _require_rebuildable(model: nn.Module, blueprint: Blueprint) -> None:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built = create_model(blueprint.name, **blueprint.options)
    found = differences(model, built)
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise M2MKDError(
            f"create_model({blueprint.name!r}, ...) with the options {dict(blueprint.options)} does not build this "
            f"{type(model).__name__}: {shown}. It was changed after it was made: give the changed options to "
            "save_pretrained, undo the change (handle.revert() of m2mkd_fast.apply), pass the bare model rather than "
            "a wrapper, or register a builder that makes the change with m2mkd_fast.register_model"
        )
