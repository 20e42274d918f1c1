from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub, running_hub
from omegaconf import OmegaConf
from tiny_run import tiny

from m2mkd_fast.cli import main
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.interop.hub import push_to_hub, run_provenance
from m2mkd_fast.models.blueprint import blueprint_of
from m2mkd_fast.models.pretrained import from_pretrained, save_pretrained
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules import split

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install huggingface_hub")
SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_experts": 2}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def model() -> torch.nn.Module:
    return create_model("vmoe_micro.m2mkd", **SMALL).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_pushed_model_comes_back_and_its_revision_is_noted(hub: Hub, model: torch.nn.Module) -> None:
    commit = push_to_hub(model, "me/digits", private=True, provenance={"data": "digits", "results": {"accuracy": 97.5}})
    assert hub.private == {"me/digits": True}
    assert set(hub.repositories["me/digits"][-1][1]) == {"config.json", "model.safetensors", "README.md"}
    for name in ("hf-hub:me/digits", "hf-hub:me/digits@main", f"hf-hub:me/digits@{commit}"):
        back = create_model(name)
        assert same(model, back)
        assert blueprint_of(back).weights == f"hf-hub:me/digits@{commit}"
    assert same(model, from_pretrained("me/digits"))
    assert set(hub.downloads) == {"config.json", "model.safetensors"}  # the rest of a repository stays there


def test_started_from_stands_in_what_is_saved_next(hub: Hub, model: torch.nn.Module, tmp_path: Path) -> None:
    commit = push_to_hub(model, "me/digits")
    folder = save_pretrained(create_model("hf-hub:me/digits"), tmp_path / "next")
    assert json.loads((folder / "config.json").read_text())["started_from"] == f"hf-hub:me/digits@{commit}"
    assert commit in (folder / "README.md").read_text()


def test_old_revision_stays_available(hub: Hub, model: torch.nn.Module) -> None:
    first = push_to_hub(model, "me/digits")
    other = create_model("vmoe_micro.m2mkd", **SMALL)
    push_to_hub(other, "me/digits")
    assert same(create_model(f"hf-hub:me/digits@{first}"), model)
    assert same(create_model("hf-hub:me/digits"), other)


def test_dry_run_sends_nothing(hub: Hub, model: torch.nn.Module, tmp_path: Path) -> None:
    folder = push_to_hub(model, "me/digits", dry_run=tmp_path / "dry", provenance={"data": "digits"})
    assert not hub.repositories
    assert same(create_model(f"local-dir:{folder}"), model)


def test_unknown_repository_revision_and_name(hub: Hub, model: torch.nn.Module) -> None:
    push_to_hub(model, "me/digits")
    with pytest.raises(M2MKDError, match="no such repository"):
        create_model("hf-hub:me/digit")
    with pytest.raises(M2MKDError, match="no such revision"):
        create_model("hf-hub:me/digits@v2")
    with pytest.raises(M2MKDError, match="unknown file of the repository 'model.safetensor'.* 'model.safetensors'"):
        create_model("hf-hub:me/digits/model.safetensor")
    with pytest.raises(M2MKDError, match="write hf-hub:owner/name"):
        create_model("hf-hub:me/digits?")
    with pytest.raises(M2MKDError, match="write owner/name"):
        push_to_hub(model, "me/digits/more")


def test_one_of_several_models_in_a_repository(hub: Hub, tmp_path: Path) -> None:
    """The paper's own release is one repository with all its checkpoints, the teacher's in a folder of modules."""
    models = [create_model("vmoe_micro.m2mkd", depth=2, embed_dim=16, num_heads=2) for _ in range(2)]
    teacher = create_model("vit_micro", depth=2, embed_dim=32, num_heads=2)
    files = {f"vmoe_{i}.pth": {"model": model.state_dict()} for i, model in enumerate(models)}
    for i, stage in enumerate(split(teacher, 2)):
        state = {
            "model_name": "vit",
            "block_index": i,
            "block_state_dict": stage.state_dict(),
            "divided_depths": [1, 1],
        }
        files[f"FT_tiny/{i}.pth"] = state
    for name, value in files.items():
        (tmp_path / "FT_tiny").mkdir(exist_ok=True)
        torch.save(value, tmp_path / name)
    commit = hub.add("them/m2mkd", {name: (tmp_path / name).read_bytes() for name in files})
    with pytest.raises(M2MKDError, match="several files of weights .* for example hf-hub:OWNER/NAME/FT_tiny/0.pth"):
        create_model("hf-hub:them/m2mkd")
    for revision in ("", f"@{commit}"):
        assert same(create_model(f"hf-hub:them/m2mkd/vmoe_1.pth{revision}", num_heads=2), models[1])
    assert hub.downloads == ["vmoe_1.pth"]
    assert same(create_model("hf-hub:them/m2mkd/FT_tiny", num_heads=2), teacher)
    hub.down = True
    assert same(create_model("hf-hub:them/m2mkd/vmoe_1.pth", num_heads=2), models[1])
    with pytest.raises(M2MKDError, match="cannot be reached .* and the cache has no copy"):
        create_model("hf-hub:them/m2mkd/vmoe_0.pth", num_heads=2)


@pytest.mark.parametrize("revision", ["", "@main"])
def test_outage_takes_the_cached_copy_and_says_which(
    hub: Hub, model: torch.nn.Module, caplog: pytest.LogCaptureFixture, revision: str
) -> None:
    commit = push_to_hub(model, "me/digits")
    create_model("hf-hub:me/digits")
    hub.down = True
    with caplog.at_level(logging.WARNING, logger="m2mkd_fast"):
        back = create_model(f"hf-hub:me/digits{revision}")
    assert same(back, model)
    warnings = [record.getMessage() for record in caplog.records if record.name == "m2mkd_fast"]
    assert len(warnings) == 1 and commit in warnings[0] and "cannot be reached" in warnings[0]
    assert same(create_model(f"hf-hub:me/digits@{commit}"), model)


def test_no_network_at_all_takes_the_cached_copy(
    hub: Hub, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push_to_hub(model, "me/digits")
    create_model("hf-hub:me/digits")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert same(create_model("hf-hub:me/digits"), model)


def test_outage_without_a_copy_is_an_error(hub: Hub, model: torch.nn.Module) -> None:
    hub.down = True
    with pytest.raises(M2MKDError, match=r"cannot be reached .* no copy"):
        create_model("hf-hub:me/digits")
    with pytest.raises(M2MKDError, match=r"upload to me/digits failed"):
        push_to_hub(model, "me/digits")


def test_only_pickles_are_refused(hub: Hub) -> None:
    timms = json.dumps({"architecture": "resnet18", "num_classes": 10}).encode()
    hub.add("me/pickled", {"config.json": timms, "pytorch_model.bin": b"not opened"})
    with pytest.raises(M2MKDError, match=r"pickles, which are not opened: pytorch_model.bin"):
        create_model("hf-hub:me/pickled")
    hub.add("me/empty", {"notes.txt": b""})
    with pytest.raises(M2MKDError, match=r"no weights; it holds notes.txt"):
        create_model("hf-hub:me/empty")
    hub.add("me/shards", {"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(M2MKDError, match=r"several files of weights \(a.safetensors, b.safetensors\)"):
        create_model("hf-hub:me/shards")
    assert not {"a.safetensors", "b.safetensors"} & set(hub.downloads)


def test_released_checkpoint_on_the_hub(hub: Hub, model: torch.nn.Module, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "vmoe.pth")
    commit = hub.add("me/released", {"vmoe.pth": (tmp_path / "vmoe.pth").read_bytes(), "README.md": b""})
    back = create_model("hf-hub:me/released", num_heads=2)
    assert same(back, model)
    assert blueprint_of(back).weights == f"hf-hub:me/released@{commit}"
    hub.down = True
    assert same(create_model("hf-hub:me/released", num_heads=2), model)


def test_timms_repositories(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(source, tmp_path / "timm", safe_serialization=True)
    commit = hub.add("timm/tiny", tmp_path / "timm")
    model = create_model("hf-hub:timm/tiny")
    assert same(model, source) and model.num_classes == 7
    assert blueprint_of(model).weights == f"hf-hub:timm/tiny@{commit}"
    assert same(create_model(f"local-dir:{save_pretrained(model, tmp_path / 'ours')}"), source)
    with caplog.at_level(logging.WARNING, logger="m2mkd_fast"):
        assert create_model("hf-hub:timm/tiny", num_classes=3).num_classes == 3
    assert "classifier of 7 classes is left out" in caplog.text
    hub.add("timm/odd", {**hub.repositories["timm/tiny"][0][1], "config.json": b'{"architecture": "test_resnot"}'})
    with pytest.raises(UnknownNameError, match="test_resnet"):
        create_model("hf-hub:timm/odd")


def test_weights_that_do_not_fit_timms_model_are_named(hub: Hub, tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "timm", safe_serialization="both")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    files = {path.name: path.read_bytes() for path in (tmp_path / "timm").iterdir()}
    hub.add("timm/wrong", files | {"config.json": json.dumps({**config, "architecture": "test_resnet50"}).encode()})
    with pytest.raises(M2MKDError):
        create_model("hf-hub:timm/wrong")


def test_provenance_of_a_run(tmp_path: Path) -> None:
    step = tmp_path / "steps" / "m2mkd" / "e2e"
    step.mkdir(parents=True)
    (step / "result.json").write_text(json.dumps({"metrics": {"test_accuracy": 98.0, "many": [1]}, "steps": 100}))
    (tmp_path / "config.yaml").write_text("name: digits_vmoe\nseed: 1\ndata: {spec: digits}\n")
    (tmp_path / "run.json").write_text(json.dumps({"commit": "abc", "versions": {"torch": "2"}}))
    facts = run_provenance(tmp_path, "m2mkd/e2e")
    assert facts["results"] == {"test_accuracy": 98.0}
    assert facts["commit"] == "abc" and facts["data"] == "digits" and facts["config"]["seed"] == 1
    with pytest.raises(M2MKDError, match="scratch"):
        run_provenance(tmp_path, "scratch/e2e")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(M2MKDError, match="damaged"):
        run_provenance(tmp_path, "m2mkd/e2e")


def test_commands_push_and_export_what_a_run_made(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(tiny(arms=["m2mkd"], student__stitches="kept")), config)
    run = tmp_path / "run"
    assert main(["run", str(config), f"output={run}"]) == 0
    capsys.readouterr()
    for step, folder in (("m2mkd/e2e", "student"), ("teacher", "teacher")):
        assert main(["push", str(run), "--step", step, "--repo", "me/x", "--dry-run", str(tmp_path / folder)]) == 0
        assert "written, not sent" in capsys.readouterr().out
        result = json.loads((run / "steps" / step / "result.json").read_text())
        facts = json.loads((tmp_path / folder / "config.json").read_text())["provenance"]
        assert facts["results"]["test_accuracy"] == result["metrics"]["test_accuracy"]
        assert facts["config"]["name"] == "tiny" and facts["data"] == "digits"
    assert blueprint_of(create_model(f"local-dir:{tmp_path / 'student'}")).name == "chain.kept"
    assert blueprint_of(create_model(f"local-dir:{tmp_path / 'teacher'}")).name == "vit_micro"
    assert main(["push", str(run), "--repo", "me/tiny", "--private"]) == 0
    assert "hf-hub:me/tiny@" in capsys.readouterr().out and hub.private["me/tiny"]
    assert main(["export", str(run), str(tmp_path / "teacher.pt2"), "--step", "teacher", "--batch", "3"]) == 0
    assert "batches of exactly 3" in capsys.readouterr().out and (tmp_path / "teacher.pt2").is_file()
    assert main(["push", str(run), "--step", "meta", "--repo", "me/x"]) == 2
    assert "does not know what it was built from" in capsys.readouterr().err
