from __future__ import annotations

import copy
import functools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import m2mkd_fast
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models import registry
from m2mkd_fast.models.blueprint import Blueprint, blueprint_of
from m2mkd_fast.models.nac.pruning import prune_latents
from m2mkd_fast.models.pretrained import from_pretrained, save_pretrained
from m2mkd_fast.models.registry import create_model, register_model
from m2mkd_fast.models.state import weights_hash
from m2mkd_fast.modules import assemble, split, student_modules

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2}
IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@functools.cache
def saved_vit() -> nn.Module:
    return create_model("vit_micro", **SMALL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_micro", SMALL),
        ("vmoe_micro.every2", SMALL | {"num_experts": 3, "divided_depths": (1, 1)}),
        ("vmoe_micro.m2mkd", SMALL | {"moe_blocks": (1,), "router_options": {"capacity_factor": 1.5}}),
        ("nac_micro.ring", {"num_classes": 3}),
        ("test_resnet", {"num_classes": 3, "in_chans": 1}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    ],
)
def test_round_trip_is_exact(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    model = create_model(name, **options).eval()
    folder = save_pretrained(model, tmp_path / "model")
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    before = torch.get_rng_state()
    back = create_model(f"local-dir:{folder}")
    assert torch.equal(before, torch.get_rng_state())
    assert not back.training
    assert weights_hash(back) == weights_hash(model)
    assert list(back.state_dict()) == list(model.state_dict())
    assert blueprint_of(back).name == name and blueprint_of(back).weights == f"local-dir:{folder}"
    assert repr(back) == repr(model)
    size = (1, 3, 224, 224) if name.startswith("swin") else (2, 1, 16, 16)
    x = torch.randn(size)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert weights_hash(from_pretrained(folder)) == weights_hash(from_pretrained(str(folder))) == weights_hash(model)


@pytest.mark.parametrize(
    ("student", "parts"), [("vmoe_micro.m2mkd", [1, 1]), ("vit_micro", 2), ("nac_micro.ring", None)]
)
@pytest.mark.parametrize("stitches", ["kept", "folded"])
def test_chain_with_its_stitches(tmp_path: Path, student: str, parts: object, stitches: str) -> None:
    options = {"fit_signatures": False} if parts is None else SMALL
    cuts = [24, 24, 24] if parts is None else [24]
    modules = student_modules(create_model(student, **options), parts, cuts, tokens=4 if parts is None else 1)
    chain = assemble(copy.deepcopy(modules), stitches=stitches).model.eval()
    back = create_model(f"local-dir:{save_pretrained(chain, tmp_path)}")
    assert weights_hash(back) == weights_hash(chain)
    assert back.cuts == chain.cuts
    with torch.no_grad():
        assert torch.equal(back(IMAGES), chain(IMAGES))
    again = create_model(f"local-dir:{save_pretrained(back, tmp_path / 'again')}")
    assert json.loads(_config(tmp_path / "again"))["started_from"] is None  # a path of this machine
    assert weights_hash(again) == weights_hash(chain)


def test_chain_between_cuts_with_a_layout(tmp_path: Path) -> None:
    from m2mkd_fast.nn.cut import Cut

    cut = Cut(24, "channels_first", (2, 2))
    chain = assemble(student_modules(create_model("vit_micro", **SMALL), 2, [cut]), stitches="kept").model.eval()
    back = create_model(f"local-dir:{save_pretrained(chain, tmp_path)}")
    assert back.cuts == chain.cuts == (cut,)
    with torch.no_grad():
        assert torch.equal(back(IMAGES), chain(IMAGES))


def test_chain_of_modules_that_were_not_made_together_has_no_name(tmp_path: Path) -> None:
    modules = [student_modules(create_model("vit_micro", **SMALL, num_classes=n), 2, [24]) for n in (10, 5)]
    chain = assemble([modules[0][0], modules[1][1]], stitches="kept").model
    assert blueprint_of(chain) is None
    with pytest.raises(M2MKDError, match="does not know what it was built from"):
        save_pretrained(chain, tmp_path)
    with pytest.raises(M2MKDError, match="a student's modules with their stitches"):
        create_model("chain.kept")


def test_model_with_dropped_stitches(tmp_path: Path) -> None:
    student = create_model("vmoe_micro.m2mkd", **SMALL)
    modules = student_modules(create_model("vmoe_micro.m2mkd", **SMALL), 2, [24])
    model = assemble(modules, into=student).model
    assert weights_hash(create_model(f"local-dir:{save_pretrained(model, tmp_path)}")) == weights_hash(model)


def test_dtypes_are_kept(tmp_path: Path) -> None:
    model = create_model("vmoe_micro.m2mkd", **SMALL).to(torch.bfloat16)
    model.head.double()
    back = from_pretrained(save_pretrained(model, tmp_path))
    assert back.head.weight.dtype == torch.float64 and back.norm.weight.dtype == torch.bfloat16
    assert weights_hash(back) == weights_hash(model)


def test_saving_says_where_model_and_record_differ(tmp_path: Path) -> None:
    model = create_model("vit_micro", **SMALL)
    model.reset_classifier(5)
    with pytest.raises(M2MKDError, match=r"head is Linear\(in_features=16, out_features=5.* out_features=10"):
        save_pretrained(model, tmp_path)
    assert not os.listdir(tmp_path)
    assert create_model(f"local-dir:{save_pretrained(model, tmp_path, options={'num_classes': 5})}").num_classes == 5
    for change in (
        lambda model: setattr(model.blocks[0], "mlp", nn.Identity()),
        lambda model: setattr(model.blocks[0].mlp.drop1, "p", 0.5),
        lambda model: model.register_buffer("more", torch.zeros(1)),
    ):
        model = create_model("vit_micro", **SMALL)
        change(model)
        with pytest.raises(M2MKDError, match="does not build this VisionTransformer"):
            save_pretrained(model, tmp_path / "changed")
    with pytest.raises(M2MKDError, match="does not know what it was built from"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(M2MKDError, match="does not know"):  # a part of a model is not the model
        save_pretrained(split(create_model("vit_micro", **SMALL), 2)[0], tmp_path)


def test_record_of_a_copy_is_its_own_and_of_the_arguments_a_copy() -> None:
    router = {"capacity_factor": 2.0}
    model = create_model("vmoe_micro.m2mkd", **SMALL, router_options=router)
    router["capacity_factor"] = 3.0
    copied = copy.deepcopy(model)
    assert blueprint_of(copied) == blueprint_of(model)
    assert blueprint_of(model).options["router_options"] == {"capacity_factor": 2.0}


def test_pruned_circuit_is_saved_with_its_new_options(tmp_path: Path) -> None:
    pruned = prune_latents(create_model("nac_micro.ring", fit_signatures=False), 6)
    with pytest.raises(M2MKDError, match=r"signatures_ is \[6, 16\], not \[16, 16\]"):
        save_pretrained(pruned, tmp_path)
    options = {"latent_graph_kwargs": {"num_mediator_latents": 6}}
    back = create_model(f"local-dir:{save_pretrained(pruned, tmp_path, options=options)}")
    with torch.no_grad():
        assert torch.equal(back(IMAGES), pruned.eval()(IMAGES))


def test_models_of_others_are_saved_by_name_and_options(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=3)
    save_pretrained(model, tmp_path, name="test_resnet", options={"num_classes": 3})
    assert weights_hash(from_pretrained(tmp_path)) == weights_hash(model)


def test_registered_builder_serves_layouts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))

    @register_model("test_pretrained.wide")
    def wide(width: int = 3) -> nn.Module:
        return nn.Linear(width, 2)

    model = create_model("test_pretrained.wide", width=5)
    assert weights_hash(from_pretrained(save_pretrained(model, tmp_path))) == weights_hash(model)
    monkeypatch.setattr(registry, "_builders", {})
    with pytest.raises(M2MKDError, match=r"unknown model 'test_pretrained.wide'"):
        from_pretrained(tmp_path)


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    model = create_model("vit_micro", **SMALL, act_layer=nn.GELU)
    with pytest.raises(M2MKDError, match=r"option act_layer=<class .*GELU"):
        save_pretrained(model, tmp_path)
    with pytest.raises(M2MKDError, match="provenance is not JSON"):
        save_pretrained(saved_vit(), tmp_path, provenance={"data": object()})
    with pytest.raises(M2MKDError, match="provenance is not JSON"):
        save_pretrained(saved_vit(), tmp_path, provenance={"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    folder = save_pretrained(saved_vit(), tmp_path)
    model = from_pretrained(folder, proj_drop_rate=0.25)
    assert model.blocks[0].mlp.drop1.p == 0.25
    assert blueprint_of(model).options["proj_drop_rate"] == 0.25
    with pytest.raises(M2MKDError, match=r"misshapen head.weight \[10, 16\], the module has \[3, 16\]"):
        from_pretrained(folder, num_classes=3)
    with pytest.raises(M2MKDError, match="widht"):
        from_pretrained(folder, widht=3)


def test_no_weights_there(tmp_path: Path) -> None:
    with pytest.raises(M2MKDError, match="no folder or file 'vit_micro'"):
        from_pretrained("vit_micro")
    with pytest.raises(M2MKDError, match="has no weights; it holds no files"):
        from_pretrained(tmp_path)
    folder = save_pretrained(saved_vit(), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(M2MKDError, match=r"no model\.safetensors"):
        from_pretrained(folder)


def test_config_and_weights_belong_together(tmp_path: Path) -> None:
    a, b = (save_pretrained(create_model("vit_micro", **SMALL), tmp_path / name) for name in "ab")
    os.replace(a / "model.safetensors", b / "model.safetensors")
    with pytest.raises(M2MKDError, match="does not belong to the config.json"):
        from_pretrained(b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "m2mkd_fast.model/2"}, "upgrade m2mkd_fast"),
        ({"format": "else"}, "of another program"),
        ({"model": {"name": "local-dir:x"}}, "no model to build"),
        ({"model": {"name": "vit_micra", "options": {}}}, "unknown model 'vit_micra'; did you mean 'vit_micro'"),
        ({"model": {"name": "vit_micro", "options": 3}}, '"options" of the model should be an object'),
        ({"model": None}, '"model" should be an object'),
        ({"model": {"name": "vit_micro", "options": {"depth": 3}}}, "does not fit VisionTransformer"),
    ],
)
def test_damaged_configuration(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = save_pretrained(saved_vit(), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(M2MKDError, match=message):
        from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(M2MKDError, match="damaged"):
        from_pretrained(tmp_path)


@given(data=st.binary(max_size=64), cut=st.integers(0, 300))
@settings(max_examples=25)
def test_fuzz_altered_weights_are_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    path = folder / "model.safetensors"
    if not (folder / "whole").exists():
        (save_pretrained(saved_vit(), folder) / "whole").write_bytes(path.read_bytes())
    whole = (folder / "whole").read_bytes()
    altered = whole[: len(whole) - cut] + data
    if altered == whole:
        return
    path.write_bytes(altered)
    with pytest.raises(M2MKDError):
        from_pretrained(folder)


def test_released_files(tmp_path: Path) -> None:
    model = create_model("vmoe_micro.m2mkd", **SMALL, num_experts=2).eval()
    path = tmp_path / "vmoe_tiny.pth"
    torch.save({"model": model.state_dict()}, path)
    for source in (f"local-dir:{path}", f"local-dir:{tmp_path}", str(path)):
        back = from_pretrained(source, num_heads=2)
        assert weights_hash(back) == weights_hash(model)
    assert weights_hash(from_pretrained(save_pretrained(back, tmp_path / "ours"))) == weights_hash(model)
    module = student_modules(model, 2, [24])[0]
    torch.save(module.state_dict(), tmp_path / "module.pth")
    with pytest.raises(M2MKDError, match="has 2 checkpoints; they make one model where each is a teacher module"):
        from_pretrained(tmp_path)
    with pytest.raises(M2MKDError, match="a vmoe module, a part of vmoe"):
        from_pretrained(tmp_path / "module.pth", num_heads=2)


class Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("surprise",)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"model": Surprise()}))
    with pytest.raises(M2MKDError):
        from_pretrained(tmp_path / "model.pth")
    torch.save({"model": Surprise()}, tmp_path / "model.pth")
    with pytest.raises(M2MKDError):
        from_pretrained(tmp_path)
    assert not (tmp_path / "surprise").exists()


def test_model_card(tmp_path: Path) -> None:
    facts = {
        "title": "Digits",
        "data": "digits, 3,823 images",
        "results": {"test_accuracy": 98.123, "steps": 100},
        "config": {"seed": 1},
        "commit": "abc123",
        "note": "by hand",
    }
    folder = save_pretrained(create_model("vit_micro", **SMALL), tmp_path, provenance=facts)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: m2mkd_fast\n")
    for text in ("# Digits", "digits, 3,823 images", "| test accuracy | 98.12 |", "| steps | `100` |", "`abc123`"):
        assert text in card
    for text in ('"seed": 1', '"name": "vit_micro"', "- note: by hand", json.loads(_config(folder))["weights_hash"]):
        assert text in card
    assert json.loads(_config(folder))["provenance"] == facts


def test_public_names() -> None:
    assert m2mkd_fast.save_pretrained is save_pretrained and m2mkd_fast.from_pretrained is from_pretrained
    assert blueprint_of(create_model("vit_micro", **SMALL)) == Blueprint("vit_micro", SMALL)


def _config(folder: Path) -> str:
    return (folder / "config.json").read_text()
