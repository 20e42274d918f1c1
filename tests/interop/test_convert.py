from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from m2mkd_fast.cli import main
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.interop.convert import convert
from m2mkd_fast.models.pretrained import save_pretrained
from m2mkd_fast.models.published import published_checkpoint
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.state import read_state, weights_hash
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A V-MoE as m2mKD's trainer saves it."""
    torch.manual_seed(0)
    model = create_model("vmoe_micro.m2mkd", divided_depths=[1, 2])
    stages = [stage.state_dict() for stage in model.stages]
    tree = {"model": model.state_dict(), "model_stages": stages, "optimizer": {"state": {}}, "epoch": 12}
    torch.save(tree, tmp_path / "vmoe.pth")
    return tmp_path / "vmoe.pth"


def test_to_a_folder_and_back(released: Path, tmp_path: Path) -> None:
    conversion = convert(released, tmp_path / "ours")
    assert conversion.published.options == {"depth": 3, "divided_depths": [1, 2]}
    model = create_model(f"local-dir:{tmp_path / 'ours'}")
    original = torch.load(released)["model"]
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "published")
    theirs = published_checkpoint(tmp_path / "theirs.safetensors")
    assert theirs.keys() == {"model", "model_stages"}
    assert theirs["model"].keys() == original.keys() and len(theirs["model_stages"]) == 2
    assert all(torch.equal(tensor, original[name]) for name, tensor in theirs["model"].items())
    convert(tmp_path / "theirs.safetensors", tmp_path / "again")
    assert weights_hash(create_model(f"local-dir:{tmp_path / 'again'}")) == weights_hash(model)


def test_options_of_a_folder_of_ours(tmp_path: Path) -> None:
    save_pretrained(create_model("vit_micro", depth=3), tmp_path / "ours")
    with pytest.raises(M2MKDError, match="divided_depths"):
        convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "published")
    with pytest.raises(M2MKDError, match="widht"):
        convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "published", {"widht": 3})
    convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "published", {"divided_depths": [1, 2]})
    assert len(published_checkpoint(tmp_path / "theirs.safetensors")["model_stages"]) == 2


def test_to_a_file_and_back(released: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "ours.safetensors")
    state, metadata = read_state(tmp_path / "ours.safetensors")
    assert metadata["published"]["model"] == "vmoe_micro.m2mkd"
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "published")
    theirs = published_checkpoint(tmp_path / "theirs.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs["model"].items())


def test_a_circuit_keeps_its_graphs_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("nac_micro.erdos", fit_signatures=False)
    torch.save({"model": model.state_dict()}, tmp_path / "nac.pth")
    convert(tmp_path / "nac.pth", tmp_path / "ours.safetensors", options={"model": "nac_micro.erdos"})
    conversion = convert(tmp_path / "ours.safetensors", tmp_path / "ours")
    assert conversion.published.model == "nac_micro.erdos"
    convert(tmp_path / "ours", tmp_path / "copy")
    again = create_model(f"local-dir:{tmp_path / 'ours'}")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "published")
    assert published_checkpoint(tmp_path / "theirs.safetensors")["model"].keys() == model.state_dict().keys()


def test_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("nac_micro.ring", fit_signatures=False)
    module = student_modules(model, None, (24, 24, 24))[1]
    kept = {name: tensor for name, tensor in module.state_dict().items() if name != "codes"}
    torch.save({"model": kept, "model_stages": []}, tmp_path / "MediatorStudent_1.pth")
    with pytest.raises(M2MKDError, match="ends in .safetensors$"):
        convert(tmp_path / "MediatorStudent_1.pth", tmp_path / "folder")
    conversion = convert(tmp_path / "MediatorStudent_1.pth", tmp_path / "ours.safetensors", options={"slot": 1})
    assert any("middle module" in line for line in conversion.lines())
    back = convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "published")
    assert back.published.facts == {"slot": 1} and back.not_written == ("codes",)
    theirs = published_checkpoint(tmp_path / "theirs.safetensors")["model"]
    assert theirs.keys() == kept.keys() and all(torch.equal(theirs[name], kept[name]) for name in kept)


def test_a_folder_of_teacher_modules_becomes_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vit_micro", depth=4).eval()
    (tmp_path / "FT").mkdir()
    for index, stage in enumerate(split(model, [1, 2, 1])):
        facts = {"model_name": "vit_micro", "block_index": index, "divided_depths": [1, 2, 1]}
        torch.save({**facts, "block_state_dict": stage.state_dict()}, tmp_path / "FT" / f"vit_{index}.pth")
    convert(tmp_path / "FT", tmp_path / "teacher")
    teacher = create_model(f"local-dir:{tmp_path / 'teacher'}")
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(teacher(images), model(images))


def test_the_command(released: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(released), str(tmp_path / "ours"), "--option", "top_k=1", "drop_path_rate=0.1"]) == 0
    out = capsys.readouterr().out
    assert "vmoe" in out and "vmoe_micro.m2mkd with" in out and "epoch=12" in out
    assert "assumed: num_heads=4" in out and "left out: optimizer" in out and f"wrote {tmp_path / 'ours'}" in out
    assert create_model(f"local-dir:{tmp_path / 'ours'}").blocks[0].moe.gate.top_k == 1
    target = str(tmp_path / "theirs.safetensors")
    assert main(["convert", str(tmp_path / "ours"), target, "--to", "published"]) == 0
    assert main(["convert", target, str(tmp_path / "vmoe.npz"), "--to", "published"]) == 2
    assert "no place for" in capsys.readouterr().err


def test_the_commands_errors(released: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "ours")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["convert", str(released), str(tmp_path / "ours"), "--option", "num_heads"]) == 2
    assert "no key=value" in capsys.readouterr().err
    assert main(["convert", str(released), str(tmp_path / "ours"), "--option", "widht=3"]) == 2
    assert "widht" in capsys.readouterr().err
    assert main(["convert", str(released), str(released)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(released), str(tmp_path / "ours.pth")]) == 2
    assert "ends in .safetensors, or into a folder" in capsys.readouterr().err
    assert main(["convert", str(released), str(tmp_path / "ours.pth"), "--to", "published"]) == 2
    assert "would be a pickle" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vmoe.pth"]


def test_an_official_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vmoe_micro.every2")
    convert_source = tmp_path / "ours.safetensors"
    torch.save({"model": model.state_dict()}, tmp_path / "vmoe.pth")
    convert(tmp_path / "vmoe.pth", convert_source)
    convert(convert_source, tmp_path / "vmoe.npz", "published")
    with np.load(tmp_path / "vmoe.npz", allow_pickle=False) as arrays:
        assert arrays["Encoder/encoderblock_1/Moe/Router/dense/kernel"].shape == (64, 4)
    convert(tmp_path / "vmoe.npz", tmp_path / "again")
    again = create_model(f"local-dir:{tmp_path / 'again'}")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
