from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.interop.export import LIMITS, export, load_exported
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules import assemble, student_modules
from m2mkd_fast.nn.router import inference_routing

MISSING = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install m2mkd_fast[onnx]"
)
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def mixture(**options: object) -> nn.Module:
    """A V-MoE of one block, one of whose experts gets no token and another one most of them."""
    torch.manual_seed(0)
    model = create_model("vmoe_micro.m2mkd", **{**SMALL, "num_experts": 3, **options})
    with torch.no_grad():
        model.blocks[0].moe.gate.gate.bias.copy_(torch.tensor([20.0, 0.0, -20.0]))
    return model


def limited() -> nn.Module:
    """A V-MoE whose experts have fewer slots than there are tokens."""
    torch.manual_seed(0)
    router = {"eval_capacity_factor": 1.0, "batch_priority": True, "group_size": 1}
    return create_model("vmoe_micro.every2", **{**SMALL, "depth": 2}, num_experts=4, router_options=router)


def chain(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("nac"):
        model = create_model(name, fit_signatures=False)
        return assemble(student_modules(model, None, [24] * 3, tokens=4), stitches="kept").model
    model = create_model(name, **{**SMALL, "depth": 2}, num_experts=2)
    return assemble(student_modules(model, 2, [24]), stitches="kept").model


def check(model: nn.Module, path: Path, **options: object) -> None:
    """Export, which runs the file on other batch sizes; the model stays as it was."""
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export(model, path, IMAGES, **options)
    assert report.max_error <= LIMITS[report.format]
    assert list(report.errors) == ([1, 4] if report.dynamic_batch else [2])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model(IMAGES).sum().backward()  # nothing of the export's tracing is left in it


def test_program_with_our_operators(tmp_path: Path) -> None:
    model = mixture()
    check(model, tmp_path / "student.pt2")
    program = load_exported(tmp_path / "student.pt2")
    images = torch.randn(7, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(program(images), model.eval()(images))
    assert program(images).grad_fn is None  # the raw operators have no gradient to lose


@pytest.mark.slow
def test_program_with_torchs_operators_alone(tmp_path: Path) -> None:
    with use_backend("reference", expert_mlp="torch"):
        report = export(mixture(), tmp_path / "student.pt2", IMAGES)
    assert report.operators == ()
    with torch.no_grad():
        made = torch.export.load(tmp_path / "student.pt2").module()(IMAGES)
        torch.testing.assert_close(made, mixture().eval()(IMAGES))


def test_program_holds_no_pickle(tmp_path: Path) -> None:
    export(create_model("vit_micro", **SMALL), tmp_path / "vit.pt2", IMAGES)
    with zipfile.ZipFile(tmp_path / "vit.pt2") as archive:
        assert not [name for name in archive.namelist() if name.endswith(".pkl")]
        for name in archive.namelist():
            data = archive.read(name)
            assert not data if name.endswith(".pt") else not data.startswith((b"PK", b"\x80\x02"))


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])])
def test_limited_slots_are_tied_to_a_batch(tmp_path: Path, format: str) -> None:
    model = limited()
    with pytest.raises(M2MKDError, match=r"experts of blocks\.1\.moe\.gate have a limited number of slots"):
        export(model, tmp_path / f"student.{format}", IMAGES)
    check(model, tmp_path / f"student.{format}", dynamic_batch=False)


@pytest.mark.slow
def test_limits_can_be_lifted_for_a_file_of_any_batch(tmp_path: Path) -> None:
    model = limited()
    with inference_routing(model, capacity_factor=math.inf):
        assert export(model, tmp_path / "student.pt2", IMAGES).dynamic_batch


@needs_onnx
def test_onnx_of_a_mixture(tmp_path: Path) -> None:
    check(mixture(), tmp_path / "student.onnx")


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: create_model("vit_micro", **SMALL),
        lambda: create_model("vmoe_micro.every2", **{**SMALL, "depth": 2}, num_experts=8),
        lambda: create_model("nac_micro.ring", fit_signatures=False),
        lambda: chain("vmoe_micro.m2mkd"),
        lambda: chain("nac_micro.ring"),
    ],
    ids=["vit", "vmoe_every2", "circuit", "vmoe_chain", "circuit_chain"],
)
def test_onnx_of_every_kind_of_student(tmp_path: Path, make) -> None:
    check(make(), tmp_path / "student.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: chain("vmoe_micro.m2mkd"), lambda: chain("nac_micro.ring")])
def test_programs_of_chains(tmp_path: Path, make) -> None:
    check(make(), tmp_path / "student.pt2")


@pytest.mark.slow
def test_program_of_a_circuit_runs_in_a_new_process(tmp_path: Path) -> None:
    model = create_model("nac_micro.ring", fit_signatures=False)
    report = export(model, tmp_path / "student.pt2", IMAGES)
    assert report.operators or report.max_error == 0.0
    torch.save({"images": IMAGES, "logits": model.eval()(IMAGES).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, m2mkd_fast; folder = sys.argv[1]; "
        "e = torch.load(folder + '/expected.pt', weights_only=True); "
        "print(torch.equal(m2mkd_fast.load_exported(folder + '/student.pt2')(e['images']), e['logits']))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("name", [pytest.param("chain", marks=pytest.mark.slow), "vit_micro"])
def test_students_compile_to_one_graph(name: str) -> None:
    # Whole V-MoE, circuits and stages: tests/models/test_vmoe.py, test_nac_circuit.py, test_transformer_stage.py.
    model = (chain("vmoe_micro.m2mkd") if name == "chain" else create_model(name, **SMALL)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class TiedToTwo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


class Forgetful(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape[0], 3)


class Unusual(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lu_factor(x[:, 0])[0].flatten(1)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(M2MKDError, match=r"(?s)cannot follow this Branches: .*data-dependent"):
        export(Branches(), path, IMAGES)
    with pytest.raises(M2MKDError, match=r"(?s)cannot follow this TiedToTwo: .*dynamic_batch=False"):
        export(TiedToTwo(), path, IMAGES)
    assert export(TiedToTwo(), tmp_path / "two.pt2", IMAGES, dynamic_batch=False).max_error == 0.0
    with pytest.raises(M2MKDError, match=r"(?s)computes something else .*Nothing was written"):
        export(Forgetful(), path, IMAGES)
    with pytest.raises(UnknownNameError, match="format=..., or a path that ends in .onnx or .pt2"):
        export(TiedToTwo(), tmp_path / "model.onx", IMAGES)
    with pytest.raises(M2MKDError, match=r"images have shape \[1, 16, 16\]"):
        export(TiedToTwo(), path, IMAGES[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(M2MKDError, match="cannot write"):
        export(TiedToTwo(), tmp_path / "file" / "model.pt2", IMAGES, dynamic_batch=False)
    with pytest.raises(M2MKDError, match="no file"):
        load_exported(path)
    with pytest.raises(M2MKDError, match="no program of torch.export"):
        load_exported(tmp_path / "file")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "two.pt2"]


@needs_onnx
def test_what_has_no_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(M2MKDError, match=r"no ONNX form: .*linalg_lu_factor"):
        export(Unusual(), tmp_path / "model.onnx", IMAGES, dynamic_batch=False)
    with pytest.raises(M2MKDError, match=r"not torch.float64; call model.float\(\)"):
        export(TiedToTwo(), tmp_path / "model.onnx", IMAGES.double())
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_fast.interop.export._ONNX_PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(M2MKDError, match=r"needs onnx_that_is_not_there; pip install m2mkd_fast\[onnx\]"):
        export(TiedToTwo(), tmp_path / "model.onnx", IMAGES)
