"""Student modules: the published distillation step, published names, and the way back into the circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.distill.pair_loss import pair_loss
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NACMediator, NACReadIn, NACReadOut, NeuralAttentiveCircuit, student_modules
from m2mkd_fast.models.nac.blocks import AttentiveReadIn, Propagator, ReadOut
from m2mkd_fast.models.nac.tokenizers import ConvNeXtImageTokenizer, OutputLatentPooling
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import hybrid, meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import load_strict
from m2mkd_fast.nn.cut import Cut
from m2mkd_fast.nn.options import build

NO_KERNEL = {"kernel_type": None}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_in(shared: dict[str, Any], tokenizer: nn.Module, width: int, **options: Any) -> NACReadIn:
    options = {"include_residual_in_read_in_attention": True, "input_dim": tokenizer.output_dim, **options}
    return NACReadIn(tokenizer, build(AttentiveReadIn, "read-in", options, **shared), width)


def mediator(shared: dict[str, Any], width: int, **options: Any) -> NACMediator:
    attention = {"share_layernorm": True, **NO_KERNEL}
    return NACMediator(
        build(Propagator, "mediator", {"latent_attention_kwargs": attention, **options}, **shared), width, width
    )


def read_out(shared: dict[str, Any], tokenizer: nn.Module, width: int, **options: Any) -> NACReadOut:
    options = {"include_residual_in_latent_attention": False, "use_head": False, **options}
    return NACReadOut(
        build(ReadOut, "read-out", {"latent_attention_kwargs": NO_KERNEL, **options}, **shared), tokenizer, width
    )


def golden_student(config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    shared = dict(config["nac"])
    width, index = shared.pop("stitch_dim"), config["teacher_stage"]
    if index == 0:
        grid = {"dim": 4, "grid_size": [2, 2]}
        tokenizer = ConvNeXtImageTokenizer(3, shared["state_dim"], "nano", 2, positional_grid_kwargs=grid)
        module = read_in(shared, tokenizer, width)
    elif index == len(config["meta_depths"]) - 1:
        module = read_out(shared, OutputLatentPooling(shared["state_dim"], 5, softmax_type="vanilla"), width)
    else:
        module = mediator(shared, width)
    module = module.double().train()
    state = with_prefix(tensors, "student/") | {"codes": tensors["in/codes"]}
    if "in/states" in tensors:
        # The published code draws initial states for every image of a batch, ours for all images alike.
        module.states = torch.zeros_like(tensors["in/states"])
        state["states"] = tensors["in/states"]
    module.load_state_dict(state, strict=True)
    return module


def check_distillation(path: Path, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(path)
    config = metadata["config"]
    index = config["teacher_stage"]

    def chain(depths: list[int], prefix: str) -> nn.Module:
        model = create_model("vit_micro", in_chans=3, depth=sum(depths), **config["vit"]).double()
        stages = split(model, depths)
        load_strict(stages, with_prefix(tensors, prefix), path)
        return stages.eval()

    meta, teacher = chain(config["meta_depths"], "meta/"), chain(config["teacher_depths"], "teacher/")
    student = golden_student(config, tensors)
    images = tensors["in/x"]
    prefix = meta.run(images, 0, index)
    if index > 0:
        assert_golden(prefix, tensors["out/meta_output"], "out/meta_output")
    teacher_logits = hybrid(meta, index, teacher[index])(images)
    assert_golden(teacher_logits, tensors["out/teacher_logits"], "out/teacher_logits")
    student_logits = hybrid(meta, index, student)(images)
    assert_golden(student_logits, tensors["out/student_logits"], "out/student_logits")
    loss = pair_loss(
        student_logits,
        teacher_logits,
        tensors["in/labels"],
        alpha=config["alpha_teacher"],
        tau=config["tau"],
        kind=config["loss"],
        kd_reduction="reference",
    ).total
    assert_golden(loss, tensors["out/loss"], "out/loss")
    student.zero_grad()
    loss.backward()
    gradients = with_prefix(tensors, "grad/")
    assert gradients.keys() == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        assert_golden(parameter.grad, gradients[name], f"grad/{name}")


@pytest.mark.golden_case("m2mkd_nac_*.safetensors")
def test_golden_distillation_step(golden_case, read_golden, assert_golden) -> None:
    check_distillation(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("m2mkd_nac_*.safetensors")
@pytest.mark.parametrize("name", ["out/teacher_logits", "out/student_logits", "out/loss", "grad"])
def test_golden_distillation_check_notices_one_wrong_number(
    golden_case, name, altered_golden, read_golden, assert_golden
) -> None:
    if name == "grad":
        _, tensors = read_golden(golden_case)
        name = next(key for key in tensors if key.startswith("grad/") and key.endswith("query_compiler.native_weight"))
    with pytest.raises(AssertionError, match=name):
        check_distillation(altered_golden(golden_case, name), read_golden, assert_golden)


@pytest.mark.parametrize("size", ["imnet", "tinyimnet"])
@pytest.mark.parametrize("kind", ["readin", "mediator", "readout"])
def test_golden_names_of_published_students(golden_manifest, size: str, kind: str) -> None:
    published = golden_manifest[f"nac_student_{size}/{kind}"]
    config = published["config"]
    shared, options, width = config["share_kwargs"], dict(config[kind]), config["stitch_dim"]
    with torch.device("meta"):
        if kind == "readin":
            tokenizer_options = options.pop("tokenizer_kwargs")
            assert options.pop("tokenizer_type") == "ConvNeXtImageTokenizer"
            tokenizer = build(
                ConvNeXtImageTokenizer,
                "tokenizer_kwargs",
                tokenizer_options,
                input_dim=options.pop("input_dim"),
                repr_dim=shared["state_dim"],
            )
            module = read_in(shared, tokenizer, width, **options)
        elif kind == "mediator":
            assert options.pop("latent_attention_kwargs") == {"share_layernorm": True}
            module = mediator(shared, width, **options)
        else:
            tokenizer_options = options.pop("tokenizer_kwargs")
            assert options.pop("tokenizer_type") == "OutputLatentPooling"
            pooling = OutputLatentPooling(shared["state_dim"], options["output_dim"], **tokenizer_options)
            module = read_out(shared, pooling, width, **options)
    names = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    saved_beside = {"codes"} if kind == "mediator" else {"codes", "states"}
    assert {name: shape for name, shape in names.items() if name not in saved_beside} == published["state"]
    assert saved_beside <= names.keys()


@pytest.fixture(scope="module")
def circuit() -> NeuralAttentiveCircuit:
    torch.manual_seed(0)
    return create_model("nac_micro.ring")


def test_modules_are_chained_by_the_teachers_widths(circuit: NeuralAttentiveCircuit) -> None:
    modules = student_modules(circuit, (96, 80, 72), tokens=17)
    assert [type(module) for module in modules] == [NACReadIn, NACMediator, NACMediator, NACReadOut]
    features = torch.randn(3, 1, 16, 16)
    shapes = [tuple((features := module(features)).shape) for module in modules]
    assert shapes == [(3, 17, 96), (3, 17, 80), (3, 17, 72), (3, 10)]
    assert student_modules(circuit, (96, 80, 72))[0](torch.randn(3, 1, 16, 16)).shape == (3, 1, 96)


def test_all_tensors_of_modules_get_into_the_circuit(circuit: NeuralAttentiveCircuit) -> None:
    """What the modules do not bring stays initial, and is nothing but the graph: signatures, codes, seeder, kernels."""
    torch.manual_seed(1)
    modules = student_modules(create_model("nac_micro.ring"), (96, 96, 96))
    target = create_model("nac_micro.ring")
    initial = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    placed: dict[str, Tensor] = {}
    without_place = set()
    for index, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            key = target.module_key(index, name, len(modules))
            if key is None:
                without_place.add(name)
            else:
                assert key not in placed
                placed[key] = tensor
    assert without_place == {
        "codes",
        "states",
        *(f"{stitch}.{tensor}" for stitch in ("pre_stitch", "post_stitch") for tensor in ("weight", "bias")),
    }
    missing = initial.keys() - placed.keys()
    assert placed.keys() < initial.keys()
    assert all(
        name.endswith(("signatures_", "codes_", "kernel.bandwidth")) or ".latent_seeder." in name for name in missing
    )
    target.load_state_dict({name: initial[name] for name in missing} | placed, strict=True)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, placed.get(name, initial[name]))
    assert not torch.equal(
        placed["latent_graphs.0.propagators.1.ffn.ffn.0.native_weight"],
        initial["latent_graphs.0.propagators.1.ffn.ffn.0.native_weight"],
    )


def test_modules_are_copies(circuit: NeuralAttentiveCircuit) -> None:
    before = {name: tensor.clone() for name, tensor in circuit.state_dict().items()}
    for module in student_modules(circuit, (96, 96, 96)):
        for parameter in module.parameters():
            parameter.data.zero_()
    for name, tensor in circuit.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(propagator.latent_attention.kernel is not None for propagator in circuit.graph.propagators)


def test_stored_module_is_complete(circuit: NeuralAttentiveCircuit) -> None:
    first, second = (student_modules(circuit, (96, 96, 96)) for _ in range(2))
    images = torch.randn(2, 1, 16, 16)
    assert not torch.equal(first[0](images), second[0](images)), "codes and states are drawn for each module"
    second[0].load_state_dict(first[0].state_dict())
    assert torch.equal(first[0](images), second[0](images))


def test_wrong_number_of_widths_names_both(circuit: NeuralAttentiveCircuit) -> None:
    with pytest.raises(M2MKDError, match=r"makes 4 modules .* 2 were given"):
        student_modules(circuit, (96, 96))


@pytest.mark.parametrize("option", ["share_propagator_weights", "share_ffn_between_propagators"])
def test_shared_weights_cannot_be_taken_apart(option: str) -> None:
    shared = create_model("nac_micro.ring", latent_graph_kwargs={option: True}, fit_signatures=False)
    with pytest.raises(M2MKDError, match=f"cannot be distilled one by one.*{option}"):
        student_modules(shared, (96, 96, 96))


@pytest.mark.parametrize(("index", "count"), [(4, 4), (-1, 4), (0, 5)])
def test_slot_that_does_not_exist_is_an_error(circuit: NeuralAttentiveCircuit, index: int, count: int) -> None:
    with pytest.raises(M2MKDError, match=f"slot {index} of {count}"):
        circuit.module_key(index, "ffn.layernorm.weight", count)


def test_distilling_a_module_changes_all_its_parameters(circuit: NeuralAttentiveCircuit) -> None:
    """One step through a frozen meta model reaches every parameter of every student module."""
    torch.manual_seed(0)
    meta = meta_model(split(create_model("vit_micro", depth=4, embed_dim=32), 4))
    images = torch.randn(2, 1, 16, 16)
    for index, module in enumerate(student_modules(circuit, meta.widths)):
        hybrid(meta, index, module)(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


MAPS = (Cut(96, "channels_first", (4, 4)), Cut(80, "channels_last", (2, 3)), Cut(72, "tokens", (2, 2), 1))


def test_modules_between_maps_of_a_teacher(circuit: NeuralAttentiveCircuit) -> None:
    """Each reads the positions of the teacher's map as tokens and gives its own, resampled to the next map."""
    images = torch.randn(3, 1, 16, 16)
    for tokens in (16, 1):
        modules = student_modules(circuit, MAPS, tokens=tokens)
        assert ModuleChain(modules).cuts == MAPS
        features = images
        shapes = [tuple((features := module(features)).shape) for module in modules]
        assert shapes == [(3, 96, 4, 4), (3, 2, 3, 80), (3, 5, 72), (3, 10)]
    alone = modules[0](images)
    assert torch.equal(alone, alone[..., :1, :1].expand_as(alone)), "a single latent fills the map"
    with pytest.raises(M2MKDError, match="5 latents of the read-in do not fill channels-first maps of width 96"):
        student_modules(circuit, MAPS, tokens=5)


def test_modules_without_their_stitches_run_in_the_circuits_own_width(circuit: NeuralAttentiveCircuit) -> None:
    first, middle, _, last = modules = student_modules(circuit, (96, 96, 96), tokens=5)
    for module in modules:
        module.pre_stitch = module.post_stitch = None
    width = first.bare_out_cut.width
    assert [module.out_cut for module in modules] == [Cut(width)] * 3 + [None]
    assert last(middle(first(torch.randn(2, 1, 16, 16)))).shape == (2, 10)
