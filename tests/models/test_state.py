from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models import state as state_module
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.state import is_stitch, load_module, load_strict, read_state, save_module, weights_hash
from m2mkd_fast.modules.split import split


class Twice(nn.Module):
    """A layer under two names, a buffer, and tensors of unusual kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(3, 2)
        self.stage = self.flat
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("brain", torch.randn(4, 3).to(torch.bfloat16).t())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 3))
        whole = torch.arange(6.0)
        self.register_buffer("left", whole[:4])
        self.register_buffer("right", whole[2:])


def zeroed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    return module


def test_stitch_names() -> None:
    assert is_stitch("pre_stitch.weight")
    assert is_stitch("blocks.2.post_stitch.fc.bias")
    assert not is_stitch("blocks.2.pre_stitches.fc.bias")


def test_file_holds_the_module_and_its_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Twice()
    path = tmp_path / "new folder" / "weights.safetensors"
    metadata = {"config": {"name": "twice", "sizes": [3, 2]}, "slot": 1, "note": None}
    digest = save_module(path, module, metadata)
    other = zeroed(Twice())
    assert load_module(path, other) == metadata | {"weights_hash": digest}
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert weights_hash(module) == weights_hash(other) == digest
    assert os.listdir(path.parent) == ["weights.safetensors"]


def test_shared_tensors_are_stored_once_and_restored_under_all_names(tmp_path: Path) -> None:
    model = create_model("vmoe_micro.m2mkd", embed_dim=16, divided_depths=[4, 4])
    path = tmp_path / "model.safetensors"
    save_module(path, model, {})
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert size < path.stat().st_size < 1.5 * size
    state, _ = read_state(path)
    assert state.keys() == model.state_dict().keys()
    assert any(name.startswith("stages.1.") for name in state)
    fresh = create_model("vmoe_micro.m2mkd", embed_dim=16, divided_depths=[4, 4])
    load_module(path, fresh)
    assert weights_hash(fresh) == weights_hash(model)


def test_hash_depends_on_names_dtypes_shapes_and_bytes_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 3)
    same = nn.Linear(2, 3)
    same.load_state_dict(layer.state_dict())
    same.weight = nn.Parameter(same.weight.detach().t().contiguous().t())  # another memory layout
    assert weights_hash(same) == weights_hash(layer)
    assert len(weights_hash(layer)) == 64
    changes = [nn.Sequential(layer), nn.Linear(2, 3), layer.double()]
    reshaped = nn.Linear(3, 2)
    with torch.no_grad():
        reshaped.weight.copy_(layer.weight.reshape(2, 3))
    hashes = {weights_hash(module) for module in [same, reshaped, *changes]}
    assert len(hashes) == 5


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    layer = nn.Linear(2, 3)
    digest = save_module(path, layer, {"step": 1})

    def full_disk(tensors: dict, temporary: Path, metadata: dict) -> None:
        temporary.write_bytes(b"half of i")
        raise OSError("No space left on device")

    monkeypatch.setattr(state_module, "save_file", full_disk)
    with pytest.raises(M2MKDError, match=r"No space left on device.*make room"):
        save_module(path, nn.Linear(2, 3), {"step": 2})
    assert read_state(path)[1] == {"step": 1, "weights_hash": digest}
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(M2MKDError, match="not JSON"):
        save_module(tmp_path / "x.safetensors", nn.Linear(1, 1), {"tensor": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_broken_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_module(path, nn.Linear(40, 30), {})
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(M2MKDError, match="truncated"):
            read_state(path)
    changed = bytearray(whole)
    changed[-5] ^= 1
    path.write_bytes(changed)
    with pytest.raises(M2MKDError, match="hash differs"):
        read_state(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(M2MKDError, match="truncated or no safetensors"):
        read_state(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(M2MKDError, match="another program"):
        read_state(path)
    with pytest.raises(M2MKDError, match="no file"):
        read_state(tmp_path / "absent.safetensors")
    with pytest.raises(M2MKDError, match="no file"):
        read_state(tmp_path)


def test_everything_that_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = weights_hash(module)
    state = {
        "0.weight": torch.zeros(3, 2),
        "0.bias": torch.zeros(5),
        "1.weight": torch.zeros(4, 3),
        "2.weight": torch.zeros(1),
    }
    with pytest.raises(M2MKDError) as error:
        load_strict(module, state, "FILE", origins={"0.bias": "slot 3"})
    message = str(error.value)
    assert message.startswith("FILE does not fit Sequential, 3 problems")
    assert "missing 1.bias [4]" in message
    assert "unexpected 2.weight [1]" in message
    assert "misshapen 0.bias [5] from slot 3, the module has [3]" in message
    assert weights_hash(module) == before
    with pytest.raises(M2MKDError, match="1 problems: misshapen"):
        load_strict(module, state, "FILE", allow_missing=["*"], allow_unexpected=["*"])


def test_what_is_listed_may_be_left_out() -> None:
    module = zeroed(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "head.weight": torch.ones(1)}
    loaded = load_strict(module, state, "FILE", allow_missing=["1.*"], allow_unexpected=["head.*"])
    assert loaded.missing == ("1.weight", "1.bias")
    assert loaded.unexpected == ("head.weight",)
    assert module[0].weight.eq(1).all()
    assert module[1].weight.eq(0).all()
    with pytest.raises(M2MKDError, match=r"1 problems: missing 1\.bias"):
        load_strict(module, state, "FILE", allow_missing=["1.weight"], allow_unexpected=["head.*"])


def test_a_module_without_memory_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(M2MKDError, match=r"meta device.*real device"):
        load_strict(module, nn.Linear(2, 3).state_dict(), "FILE")


def test_a_diverged_module_is_saved_and_loaded_all_the_same(tmp_path: Path) -> None:
    module = Twice()
    with torch.no_grad():
        module.flat.weight[0, 0] = float("nan")
    save_module(tmp_path / "x.safetensors", module, {})
    other = Twice()
    load_module(tmp_path / "x.safetensors", other)
    assert other.stage.weight[0, 0].isnan()


def test_one_name_of_a_shared_tensor_is_enough_and_two_must_agree() -> None:
    module = Twice()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flat = {name: torch.zeros_like(tensor) for name, tensor in state.items() if not name.startswith("stage.")}
    load_strict(module, flat, "FILE")
    assert module.stage.weight.eq(0).all()
    load_strict(module, state, "FILE")
    assert torch.equal(module.stage.weight, state["flat.weight"])
    state["stage.weight"] = state["flat.weight"] + 1
    with pytest.raises(M2MKDError, match=r"contradictory flat\.weight and stage\.weight"):
        load_strict(module, state, "FILE")


@pytest.mark.golden_case("m2mkd_vmoe_idx*_soft.safetensors")
def test_golden_published_stages_pass_through_a_file(golden_case, read_golden, tmp_path: Path) -> None:
    metadata, tensors = read_golden(golden_case)
    config = metadata["config"]
    model = create_model("vit_micro", in_chans=3, depth=sum(config["teacher_depths"]), **config["vit"]).double()
    chain = split(model, config["teacher_depths"])
    state = {name.removeprefix("teacher/"): tensor for name, tensor in tensors.items() if name.startswith("teacher/")}
    load_strict(chain, state, golden_case)
    save_module(tmp_path / "teacher.safetensors", chain, {"config": config})
    read, read_metadata = read_state(tmp_path / "teacher.safetensors")
    assert read_metadata["config"] == json.loads(json.dumps(config))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
