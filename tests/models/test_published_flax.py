"""The official V-MoE's parameters, against its maths written down in NumPy under its own names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.published import identify, read_published, write_published
from m2mkd_fast.models.published.flax import from_flax, is_flax, to_flax
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.vmoe import VMoE
from m2mkd_fast.modules.split import split, verify_split
from m2mkd_fast.nn.router import inference_routing

Arrays = dict[str, np.ndarray]
WIDTH, HEADS, SIZE, HIDDEN, EXPERTS, PATCH, CHANNELS, CLASSES, BLOCKS, TOP_K = 16, 2, 8, 24, 4, 4, 3, 5, 4, 2


def layer_norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}/scale": (WIDTH,), f"{name}/bias": (WIDTH,)}


def dense(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}/kernel": before + after, f"{name}/bias": after}


def shapes(token: bool = True, representation: int | None = None, mixtures: tuple[int, ...] = (1, 3)) -> dict:
    """Every parameter of the official VisionTransformerMoe."""
    found = dense("embedding", (PATCH, PATCH, CHANNELS), (WIDTH,))
    if token:
        found["cls"] = (1, 1, WIDTH)
    found["Encoder/posembed_input/pos_embedding"] = (1, 9 + token, WIDTH)
    for block in range(BLOCKS):
        at = f"Encoder/encoderblock_{block}"
        found |= layer_norm(f"{at}/LayerNorm_0") | layer_norm(f"{at}/LayerNorm_1")
        for which in ("query", "key", "value"):
            found |= dense(f"{at}/SelfAttention/{which}", (WIDTH,), (HEADS, SIZE))
        found |= dense(f"{at}/SelfAttention/out", (HEADS, SIZE), (WIDTH,))
        if block in mixtures:
            found[f"{at}/Moe/Router/dense/kernel"] = (WIDTH, EXPERTS)
            for layer, (before, after) in enumerate(((WIDTH, HIDDEN), (HIDDEN, WIDTH))):
                found[f"{at}/Moe/Mlp/Dense_{layer}/kernel"] = (EXPERTS, before, after)
                found[f"{at}/Moe/Mlp/Dense_{layer}/bias"] = (EXPERTS, after)
        else:
            found |= dense(f"{at}/Mlp/Dense_0", (WIDTH,), (HIDDEN,)) | dense(f"{at}/Mlp/Dense_1", (HIDDEN,), (WIDTH,))
    found |= layer_norm("Encoder/encoder_norm")
    if representation:
        found |= dense("pre_logits", (WIDTH,), (representation,))
    return found | dense("head", (representation or WIDTH,), (CLASSES,))


def parameters(**options) -> Arrays:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape) * 0.3 for name, shape in shapes(**options).items()}


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def normalised(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def attention(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    query, key, value = (
        np.einsum("bnd,dhc->bnhc", x, p[f"{name}/{which}/kernel"]) + p[f"{name}/{which}/bias"]
        for which in ("query", "key", "value")
    )
    weights = softmax(np.einsum("bnhc,bmhc->bhnm", query, key) / math.sqrt(SIZE))
    mixed = np.einsum("bhnm,bmhc->bnhc", weights, value)
    return np.einsum("bnhc,hcd->bnd", mixed, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def feed_forward(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    if f"{name}/Mlp/Dense_0/kernel" in p:
        hidden = gelu(x @ p[f"{name}/Mlp/Dense_0/kernel"] + p[f"{name}/Mlp/Dense_0/bias"])
        return hidden @ p[f"{name}/Mlp/Dense_1/kernel"] + p[f"{name}/Mlp/Dense_1/bias"]
    gates = softmax(x @ p[f"{name}/Moe/Router/dense/kernel"])
    gates = np.where(gates >= np.sort(gates, -1)[..., -TOP_K, None], gates, 0.0)
    at = f"{name}/Moe/Mlp/Dense"
    hidden = gelu(np.einsum("bnd,edh->bneh", x, p[f"{at}_0/kernel"]) + p[f"{at}_0/bias"])
    outputs = np.einsum("bneh,ehd->bned", hidden, p[f"{at}_1/kernel"]) + p[f"{at}_1/bias"]
    return np.einsum("bne,bned->bnd", gates, outputs)


def forward(p: Arrays, images: np.ndarray) -> np.ndarray:
    """Images [B, channels, H, W] to logits."""
    count, _, height, width = images.shape
    patches = images.reshape(count, CHANNELS, height // PATCH, PATCH, width // PATCH, PATCH)
    x = np.einsum("bcipjq,pqcd->bijd", patches, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(count, -1, WIDTH)
    if "cls" in p:
        x = np.concatenate([np.broadcast_to(p["cls"], (count, 1, WIDTH)), x], 1)
    x = x + p["Encoder/posembed_input/pos_embedding"]
    for block in range(BLOCKS):
        at = f"Encoder/encoderblock_{block}"
        x = x + attention(p, f"{at}/SelfAttention", normalised(p, f"{at}/LayerNorm_0", x))
        x = x + feed_forward(p, at, normalised(p, f"{at}/LayerNorm_1", x))
    x = normalised(p, "Encoder/encoder_norm", x)
    x = x[:, 0] if "cls" in p else x.mean(1)
    if "pre_logits/kernel" in p:
        x = np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    return x @ p["head/kernel"] + p["head/bias"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES = [{}, {"representation": 12}, {"token": False}, {"mixtures": (3,)}, {"mixtures": (0, 2, 3)}]


@pytest.mark.parametrize("case", CASES)
def test_a_read_model_computes_what_the_official_one_does(tmp_path, images, case) -> None:
    arrays = parameters(**case)
    np.savez(tmp_path / "vmoe.npz", **arrays)
    published = read_published(tmp_path / "vmoe.npz", {"top_k": TOP_K})
    assert (published.kind, published.left_out) == ("vmoe", ())
    assert published.options["num_heads"] == HEADS  # the shapes of the kernels say
    model = published.build()
    assert isinstance(model, VMoE) and model.pos_embed.dtype == torch.float64
    with inference_routing(model, capacity_factor=EXPERTS):
        logits = model(images)
    torch.testing.assert_close(logits, torch.from_numpy(forward(arrays, images.numpy())), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_parameters_come_back_bit_for_bit(tmp_path, case) -> None:
    arrays = parameters(**case)
    np.savez(tmp_path / "vmoe.npz", **arrays)
    published = read_published(tmp_path / "vmoe.npz")
    assert write_published(tmp_path / "again.npz", published) == ()
    with np.load(tmp_path / "again.npz", allow_pickle=False) as again:
        assert set(again.files) == set(arrays)
        for name, array in arrays.items():
            assert again[name].dtype == array.dtype and np.array_equal(again[name], array), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_model_comes_back(tmp_path, dtype) -> None:
    torch.manual_seed(0)
    model = create_model("vmoe_micro.last2", representation_size=20).to(dtype)
    write_published(tmp_path / "vmoe.npz", identify(model.state_dict()))
    again = read_published(tmp_path / "vmoe.npz")
    assert (again.model, again.options) == ("vmoe_micro.last2", {"representation_size": 20})
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in model.state_dict().items())
    assert again.state.keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in again.state.values()} == {dtype}


@pytest.mark.parametrize("root", ["params/", "target/", "opt/target/"])
def test_a_training_state_around_the_parameters_is_left_out(root: str) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in parameters().items()}
    tree = {f"{root}{name}": array for name, array in arrays.items()}
    tree |= {f"opt_state/0/mu/{name}": torch.zeros_like(array) for name, array in arrays.items()}
    tree |= {"step": torch.tensor(3)}
    state, heads, left_out = from_flax(tree)
    plain, _, nothing = from_flax(arrays)
    assert heads == HEADS and nothing == []
    assert all(torch.equal(state[name], plain[name]) for name in plain) and state.keys() == plain.keys()
    assert set(left_out) == {"step", *(f"opt_state/0/mu/{name}" for name in arrays)}


def test_names_without_a_meaning_are_listed(tmp_path) -> None:
    arrays = parameters() | {"Encoder/encoderblock_2/LayerNorm_7/scale": np.ones(WIDTH)}
    np.savez(tmp_path / "vmoe.npz", **arrays)
    with pytest.raises(M2MKDError, match="1 foreign names: Encoder/encoderblock_2/LayerNorm_7/scale"):
        read_published(tmp_path / "vmoe.npz")


def test_half_an_attention_is_named() -> None:
    arrays = {name: torch.from_numpy(array) for name, array in parameters().items()}
    del arrays["Encoder/encoderblock_1/SelfAttention/value/bias"]
    with pytest.raises(M2MKDError, match="encoderblock_1/SelfAttention: value/bias is missing"):
        from_flax(arrays)


def test_what_the_official_model_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(M2MKDError, match=r"no place for blocks\.0\.moe\.gate\.gate\.bias.*\.safetensors"):
        write_published(tmp_path / "vmoe.npz", identify(create_model("vmoe_micro.m2mkd").state_dict()))
    assert not list(tmp_path.iterdir())


def test_recognition() -> None:
    assert is_flax({"Encoder/encoderblock_0/LayerNorm_0/scale": 0})
    assert is_flax({"params/Encoder/encoderblock_11/Moe/Router/dense/kernel": 0})
    assert not is_flax({"blocks.0.norm1.weight": 0, "Transformer/encoderblock_0/LayerNorm_0/scale": 0})


def test_published_sizes_have_published_names() -> None:
    with torch.device("meta"):
        model = create_model("vmoe_base.every2", representation_size=768, num_classes=21841)
        arrays = to_flax(model.state_dict(), 12)
    assert arrays["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"].shape == (8, 768, 3072)
    assert arrays["Encoder/encoderblock_0/SelfAttention/out/kernel"].shape == (12, 64, 768)
    assert arrays["pre_logits/kernel"].shape == (768, 768) and arrays["head/kernel"].shape == (768, 21841)
    state, heads, _ = from_flax(arrays)
    published = identify(state, {"num_heads": heads})
    assert published.model == "vmoe_base.every2"
    assert published.options == {"representation_size": 768, "num_classes": 21841}


def test_the_layer_before_the_classifier_is_split_and_reset_with_it() -> None:
    torch.manual_seed(0)
    model = create_model("vmoe_micro.last2", depth=4, representation_size=20).eval()
    images = torch.randn(2, 1, 16, 16)
    assert model.head.pre_logits.weight.std().item() == pytest.approx(0.02, rel=0.1)
    verify_split(model, split(model, 2), images)
    hidden = torch.tanh(model.head.pre_logits(model.forward_head(model.forward_features(images), pre_logits=True)))
    assert torch.equal(model(images), model.head.logits(hidden))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and isinstance(model.head, torch.nn.Linear)
