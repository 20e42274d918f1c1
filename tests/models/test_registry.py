from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models import registry
from m2mkd_fast.models.registry import create_model, list_models, register_model


def test_builds_our_models_and_timms() -> None:
    assert len(create_model("vit_micro", depth=3).blocks) == 3
    model = create_model("vit_tiny_patch16_224", embed_dim=16, num_heads=2, depth=2, img_size=32, num_classes=7)
    assert isinstance(model, VisionTransformer)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_unknown_name_lists_near_ones_of_both_lists() -> None:
    with pytest.raises(UnknownNameError) as error:
        create_model("vit_micra")
    assert "vit_micro" in error.value.near
    with pytest.raises(UnknownNameError, match="'vit_large_patch16_224'"):
        create_model("vit_large_patch16_225")
    with pytest.raises(UnknownNameError):
        create_model("")


@pytest.mark.parametrize("name", ["vit_micro", "vit_tiny_patch16_224"])
def test_unknown_override_is_named(name: str) -> None:
    with pytest.raises(M2MKDError, match="widht") as error:
        create_model(name, widht=3)
    assert name in str(error.value)


def test_a_builders_own_type_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))

    @register_model("test_registry.broken")
    def broken(**overrides: object) -> nn.Module:
        return nn.Linear(3, "four")

    with pytest.raises(TypeError):
        create_model("test_registry.broken")


def test_importing_it_loads_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys, m2mkd_fast.models, m2mkd_fast.modules; print({'timm', 'torchvision', 'triton'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_timms_tags_are_names_too() -> None:
    model = create_model("vit_tiny_patch16_224.augreg_in21k", embed_dim=16, num_heads=2, depth=1, img_size=32)
    assert model.embed_dim == 16
    with pytest.raises(UnknownNameError, match=r"vit_tiny_patch16_224\.augreg_in21k'"):
        create_model("vit_tiny_patch16_224.augreg_in20k")


def test_registered_model_is_listed_and_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))

    @register_model("test_registry.linear")
    def linear(width: int = 3) -> nn.Module:
        return nn.Linear(width, 2)

    assert list_models("test_registry.*") == ["test_registry.linear"]
    assert create_model("test_registry.linear", width=5).in_features == 5
    with pytest.raises(ValueError, match="twice"):
        register_model("test_registry.linear")(linear)


def test_lists_the_published_variants_before_timms() -> None:
    names = list_models()
    priors = ("scale_free", "planted", "ring", "erdos")
    published = {f"nac_{size}.{prior}" for size in ("tiny", "imagenet", "micro") for prior in priors}
    published |= {f"vmoe_{size}.{kind}" for size in ("base", "micro") for kind in ("m2mkd", "every2", "last2")}
    published |= {"vit_micro"}
    assert published <= set(names)
    assert names.index("vit_base_patch16_224") > max(names.index(name) for name in published)
    assert len(names) == len(set(names))


def test_golden_names_of_published_models_exist(golden_manifest) -> None:
    """Every whole model of the manifest can be made by its name in the registry."""
    priors = {"scale": "scale_free", "planted": "planted", "ring": "ring", "erdos": "erdos"}
    names = set(list_models())
    for published in golden_manifest:
        if published.startswith("vit_"):
            assert published in names
        elif published.startswith("nac_") and not published.startswith(("nac_student", "nac_scale_fewshot")):
            _, prior, data = published.split("_")
            assert f"nac_{ {'imnet': 'imagenet', 'tinyimnet': 'tiny'}[data] }.{priors[prior]}" in names
