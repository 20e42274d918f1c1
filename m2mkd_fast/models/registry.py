"""Every model has a name: ours as `family.tag`, timm's as timm calls them."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable

from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.blueprint import Blueprint, remember

Builder = Callable[..., nn.Module]

# A model file registers its names when it is imported, which happens when a name of its family is first asked for: what
# a family needs (timm, and with it torchvision) is not loaded before. A chain of student modules is a model too: it is
# named here, though the room of modules lies above this one, and looked up like the others.
FAMILIES = {
    "chain": "m2mkd_fast.modules.student_chain",
    "nac": "m2mkd_fast.models.nac",
    "vit": "m2mkd_fast.models.vit",
    "vmoe": "m2mkd_fast.models.vmoe",
}
SAVED = ("local-dir:", "hf-hub:")
_builders: dict[str, Builder] = {}


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make a builder available as `create_model(name, **overrides)`.

    The builder takes its overrides as keyword arguments and returns the model. Raises ValueError for a name that is
    taken.

    Example:
        >>> @register_model("vit_micro.wide")
        ... def vit_micro_wide(**overrides):
        ...     return VisionTransformer(**{"img_size": 16, "patch_size": 4, "embed_dim": 192, **overrides})
    """

    def register(builder: Builder) -> Builder:
        if name in _builders:
            raise ValueError(f"model {name!r} is registered twice, by {_builders[name]} and {builder}")
        _builders[name] = builder
        return builder

    return register


def create_model(name: str, **overrides: object) -> nn.Module:
    """Build a model by its name, with fresh weights, or a saved one with its weights.

    The names are those of `list_models()`: the published variants (`nac_tiny.scale_free`, `vmoe_base.m2mkd`, ...), tiny
    ones of the same families for tests and demonstrations (`vit_micro`, `vmoe_micro.m2mkd`, `nac_micro.ring`), and all
    models of timm (built with `pretrained=False`). Every model of ours takes `num_classes`, `img_size` and `in_chans`;
    the other overrides are those of its family.

    `local-dir:FOLDER` and `hf-hub:OWNER/NAME[@REVISION]` are saved models: see
    :func:`m2mkd_fast.models.pretrained.from_pretrained`, which reads them.

    Raises:
        UnknownNameError: no model has this name; the message lists near ones.
        M2MKDError: an override that this model does not have, or a saved model that cannot be had or does not fit.

    Example:
        >>> teacher = create_model("vit_base_patch16_224", num_classes=100)
        >>> student = create_model("vmoe_base.m2mkd", num_classes=100)
        >>> small = create_model("vit_micro", in_chans=3, depth=4)
        >>> trained = create_model("hf-hub:timm/resnet18.a1_in1k")
    """
    if name.startswith(SAVED):
        from m2mkd_fast.models.pretrained import from_pretrained

        return from_pretrained(name, **overrides)
    family = name.split(".")[0].split("_")[0]
    if name not in _builders and family in FAMILIES:
        importlib.import_module(FAMILIES[family])
    builder = _builders[name] if name in _builders else _timm_builder(name)
    try:
        return remember(builder(**overrides), Blueprint(name, overrides))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise M2MKDError(
            f"model {name!r} does not take one of the overrides {', '.join(sorted(overrides))}: {error}. Leave it out; "
            "num_classes, img_size and in_chans are common to all our models, the others belong to the family"
        ) from error


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern: ours first, then timm's, both sorted.

    Example:
        >>> list_models("vmoe_micro.*")
        ['vmoe_micro.every2', 'vmoe_micro.last2', 'vmoe_micro.m2mkd']
    """
    import timm

    for module in FAMILIES.values():
        importlib.import_module(module)
    ours = sorted(_builders)
    theirs = sorted(set(timm.list_models()) - set(ours))
    return fnmatch.filter(ours, pattern) + fnmatch.filter(theirs, pattern)


def _timm_builder(name: str) -> Builder:
    import timm

    if not timm.is_model(name):
        raise UnknownNameError("model", name, list_models(), remedy="`m2mkd_fast.list_models()` gives all names.")
    if "." in name:  # a tag of timm's says which weights; without weights it sets the model's default_cfg alone
        tags = timm.list_models(name.split(".")[0] + ".*", pretrained=True)
        if name not in tags:
            raise UnknownNameError("model", name, tags, remedy="The tag after the dot may be left out.")
    return lambda **overrides: timm.create_model(name, pretrained=False, **overrides)
