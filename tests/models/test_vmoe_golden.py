"""V-MoE student modules in the published module-to-module loss, and the published checkpoints' names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from m2mkd_fast.distill.tasks import DistillationSettings, PairTask
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.vmoe import VMoE
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules

Check = Callable[[Tensor | None, Tensor, str], None]


def load_chain(config: dict[str, Any], depths: list[int], tensors: dict[str, Tensor], prefix: str) -> ModuleChain:
    """A frozen Vision Transformer in modules, with the recorded weights."""
    model = VisionTransformer(depth=sum(depths), **config["vit"]).double()
    chain = split(model, depths).train().requires_grad_(False)
    chain.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    return chain


def load_student(config: dict[str, Any], slot: int, tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The recorded student module, cut from a V-MoE of three such modules."""
    vit, vmoe = config["vit"], dict(config["vmoe"])
    assert vmoe.pop("gate") == "top-k of logits then softmax over the k"
    width, part = vmoe.pop("stitch_dim"), vmoe.pop("depth")
    positions = vmoe.pop("moe_blocks")
    model = VMoE(
        **{key: vit[key] for key in ("img_size", "patch_size", "num_classes", "qkv_bias")},
        **vmoe,
        depth=3 * part,
        moe_blocks=[i * part + position for i in range(3) for position in positions],
        router="m2mkd",
    ).double()
    module = student_modules(model, [part] * 3, (width, width))[slot].train()
    recorded = {key.removeprefix("student/"): value for key, value in tensors.items() if key.startswith("student/")}
    module.load_state_dict({key: value for key, value in recorded.items() if not key.startswith("stages.")})
    assert all(
        torch.equal(value, recorded[key.removeprefix("stages.0.")])
        for key, value in recorded.items()
        if key.startswith("stages.")
    )
    return module


def check_pair_file(path: Path, read: Callable, check: Check) -> None:
    """Compare the frozen prefix, both hybrids' logits, the loss and every gradient of the student with the file."""
    metadata, tensors = read(path)
    config = metadata["config"]
    slot = config["teacher_stage"]
    meta = load_chain(config, config["meta_depths"], tensors, "meta/")
    teacher = load_chain(config, config["teacher_depths"], tensors, "teacher/")
    student = load_student(config, slot, tensors)

    prefix = meta.run(tensors["in/x"], stop=slot)
    teacher_logits = meta.run(teacher[slot](prefix), start=slot + 1)
    student_logits = meta.run(student(prefix), start=slot + 1)
    settings = DistillationSettings(
        alpha=config["alpha_teacher"], tau=config["tau"], kind=config["loss"], kd_reduction="reference"
    )
    loss = PairTask(student, slot, teacher, meta, meta, settings)(tensors["in/x"], tensors["in/labels"])
    loss.total.backward()

    computed = {"out/teacher_logits": teacher_logits, "out/student_logits": student_logits, "out/loss": loss.total}
    if slot > 0:
        computed["out/meta_output"] = prefix
    for name, parameter in student.named_parameters():
        # Published names: the module's own for the class token and the positions, the stage's for everything else.
        published = name if name in ("cls_token", "pos_embed") else f"stages.0.{name}"
        computed[f"grad/{published}"] = parameter.grad
    assert computed.keys() == {key for key in tensors if key.startswith(("out/", "grad/"))}
    for name, value in computed.items():
        check(value, tensors[name], name)
    assert all(parameter.grad is None for chain in (meta, teacher) for parameter in chain.parameters())


@pytest.mark.golden_case("m2mkd_vmoe_*.safetensors")
def test_golden_pair(golden_case: Path, read_golden: Callable, assert_golden: Check) -> None:
    check_pair_file(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("m2mkd_vmoe_*.safetensors")
@pytest.mark.parametrize(
    "changed", ["out/student_logits", "out/loss", "grad/stages.0.blocks.0.moe.gate.gate.weight", "in/x"]
)
def test_golden_pair_notices_a_changed_number(
    golden_case: Path, changed: str, altered_golden: Callable, read_golden: Callable, assert_golden: Check
) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        check_pair_file(altered_golden(golden_case, changed), read_golden, assert_golden)


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def test_golden_names_of_the_published_model(golden_manifest: dict[str, Any]) -> None:
    published = golden_manifest["vmoe_base"]
    with torch.device("meta"):
        model = create_model("vmoe_base.m2mkd", **published["config"])
    assert shapes(model.state_dict()) == published["state"]
    assert [shapes(stage.state_dict()) for stage in model.stages] == published["model_stages"]
    with torch.device("meta"):
        assert shapes(create_model("vmoe_base.m2mkd").state_dict()) == published["state"], "these are the defaults"


@pytest.mark.parametrize(("name", "slot"), [("idx0", 0), ("idx1", 1), ("idx-1", 3)])
def test_golden_names_of_the_published_student_modules(golden_manifest: dict[str, Any], name: str, slot: int) -> None:
    published = golden_manifest[f"vmoe_student_base/{name}"]
    width = published["config"]["stitch_dim"]
    with torch.device("meta"):
        model = create_model("vmoe_base.m2mkd", divided_depths=None, num_experts=published["config"]["num_experts"])
        modules = student_modules(model, [3, 3, 3, 3], [width] * 3)
    assert shapes(modules[slot].state_dict()) == published["model_stages"][0]
