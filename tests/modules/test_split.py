from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
import torchvision
from backbones import IMAGE, small, small_spine
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.graph_stage import GraphStage
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.split import resolve_depths, split, verify_split


def vit(depth: int = 8, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("vit_micro", **{"embed_dim": 16, "num_heads": 2, "depth": depth, **overrides})


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter different from its initial value, which is often zero or one and hides a missing layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# One name for each way in which timm's Vision Transformers differ from each other.
TIMM_NAMES = [
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_base_patch16_clip_quickgelu_224",
    "vit_medium_patch16_gap_240",  # no class token, mean pooling, norm after pooling
    "vit_base_patch16_rpn_224",  # blocks normalise after their residuals
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_base_patch16_xp_224",  # attention and MLP in parallel
    "vit_little_patch16_reg4_gap_256",  # register tokens
    "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224",  # layer scale, no position embedding on the class token
]


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_models_are_split_bit_for_bit(name: str) -> None:
    patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
    torch.manual_seed(0)
    size = {"embed_dim": 24, "num_heads": 2, "depth": 5, "img_size": 3 * patch, "num_classes": 6}
    model = randomised(create_model(name, **size))
    chain = split(model, [2, 1, 2])
    x = torch.randn(2, 3, 3 * patch, 3 * patch)
    for mode in (True, False):
        model.train(mode)
        chain.train(mode)
        assert torch.equal(model(x), chain(x))
    assert model(x).std() > 0


@pytest.mark.parametrize(
    "overrides",
    [
        {"qk_norm": True},
        {"init_values": 0.3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"pre_norm": True},
        {"pos_embed": "none"},
        {"global_pool": "max", "pool_include_prefix": True},
        {"dynamic_img_size": True},
        {"num_classes": 0},
        {"img_size": (16, 24), "patch_size": (4, 8)},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_variations_are_split_bit_for_bit(overrides: dict[str, object]) -> None:
    model = randomised(vit(4, **overrides))
    chain = split(model, 3)
    x = torch.randn(2, 1, *model.patch_embed.img_size)
    assert torch.equal(model(x), chain(x))


@pytest.mark.parametrize("kind", ["m2mkd", "every2", "last2"])
@pytest.mark.parametrize("overrides", [{}, {"divided_depths": [3, 3, 2]}], ids=["plain", "with_stages"])
def test_mixture_models_are_split_bit_for_bit(kind: str, overrides: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = randomised(create_model(f"vmoe_micro.{kind}", embed_dim=16, **overrides)).eval()
    x = torch.randn(3, 1, 16, 16)
    for parts in (3, [3, 3, 2], [1, 7]):
        verify_split(model, split(model, parts), x)


def test_dropout_draws_the_same_numbers() -> None:
    rates = {
        "pos_drop_rate": 0.2,
        "patch_drop_rate": 0.3,
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.3,
        "drop_rate": 0.2,
    }
    model = vit(6, **rates).train()
    chain = split(model, 3)
    x = torch.randn(4, 1, 16, 16)
    verify_split(model, chain, x)
    assert not torch.equal(model(x), model(x)), "there is dropout at work"


def test_gradients_arrive_in_the_model() -> None:
    model = vit(4)
    x = torch.randn(2, 1, 16, 16)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    split(model, 2)(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_verify_finds_a_difference_of_one_bit() -> None:
    model = vit(4)
    x = torch.randn(2, 1, 16, 16)
    other = vit(4)
    with torch.no_grad():
        other.head.bias[0] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
        model.head.bias[0] = 0.3
    with pytest.raises(M2MKDError, match="differ by up to"):
        verify_split(model, split(other, 2), x)
    with pytest.raises(M2MKDError, match="differ by up to"):
        verify_split(model, split(vit(4, num_classes=3), 2), x)


@pytest.mark.parametrize(
    ("parts", "depths"),
    [
        (1, (8,)),
        (3, (3, 3, 2)),
        (4, (2, 2, 2, 2)),
        (8, (1,) * 8),
        ("3", (3, 3, 2)),
        ([1, 5, 2], (1, 5, 2)),
        ((4, 4), (4, 4)),
        ("1,5,2", (1, 5, 2)),
        ("balanced:2", (4, 4)),
    ],
)
def test_parts(parts: object, depths: tuple[int, ...]) -> None:
    model = vit()
    assert resolve_depths(model, parts) == depths
    chain = split(model, parts)
    assert tuple(stage.depth for stage in chain) == depths
    assert [stage.slot for stage in chain] == list(range(len(depths)))


def test_equal_parts_are_as_equal_as_possible() -> None:
    model = vit()
    for count in range(1, 9):
        depths = resolve_depths(model, count)
        assert (len(depths), sum(depths)) == (count, 8)
        assert max(depths) - min(depths) <= 1
        assert list(depths) == sorted(depths, reverse=True)


def test_balanced_parts_have_the_least_squared_sizes() -> None:
    """Against all cuts, on models whose stem, head or mixtures outweigh a block."""
    for model in (vit(num_classes=900), vit(img_size=128), create_model("vmoe_micro.last2", embed_dim=16)):
        total = sum(parameter.numel() for parameter in model.parameters())

        def cost(depths: tuple[int, ...], model: nn.Module = model, total: int = total) -> int:
            sizes = [sum(p.numel() for p in stage.parameters()) for stage in split(model, depths)]
            assert sum(sizes) == total
            return sum(size**2 for size in sizes)

        cuts = [(0, *middle, 8) for middle in combinations(range(1, 8), 2)]
        best = min(cost(tuple(b - a for a, b in pairwise(cut))) for cut in cuts)
        chosen = resolve_depths(model, "balanced:3")
        assert cost(chosen) == best
        assert chosen != resolve_depths(model, 3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (0, "between 1 and 8"),
        (9, "8 blocks into 9 modules"),
        (-1, "between 1 and 8"),
        ([4, 3], r"7 blocks together, the model has 8"),
        ([4, 0, 4], "without blocks"),
        ([], "without blocks"),
        ("balanced:9", "8 blocks into 9"),
        ("balanced", "not understood"),
        ("four", "not understood"),
        ("balanced:0", "between 1 and 8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: object, message: str) -> None:
    with pytest.raises(M2MKDError, match=message):
        split(vit(), parts)


def test_wrappers_are_named() -> None:
    with pytest.raises(M2MKDError, match="ModuleChain.*pass the bare model"):
        split(ModuleChain(split(vit(), 2)), 2)
    with pytest.raises(M2MKDError, match="OptimizedModule"):
        split(torch.compile(vit()), 2)
    with pytest.raises(M2MKDError, match="DataParallel"):
        split(nn.DataParallel(vit()), 2)
    with pytest.raises(M2MKDError, match="TransformerStage"):
        split(split(vit(), 2)[0], 2)


@pytest.mark.parametrize("kind", ["swin", "beit", "densenet"])
def test_other_models_are_split_bit_for_bit(kind: str) -> None:
    model = small(kind)
    x = torch.randn(5, *IMAGE)
    chain = split(model, 2, IMAGE)
    verify_split(model, chain, x)
    assert [stage.slot for stage in chain] == [0, 1]
    model.train()
    chain.train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(0)
    expected = model(x)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    torch.manual_seed(0)
    assert torch.equal(chain(x), expected)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["resnet", "swin", "cait"]))
def test_fuzz_any_cut_of_any_model_is_the_model(data: st.DataObject, kind: str) -> None:
    model, spine = small_spine(kind)
    units = len(spine.units)
    inner = data.draw(st.sets(st.integers(1, units - 1)))
    bounds = [0, *sorted(inner), units]
    stages = [GraphStage(model, spine, a, b) for a, b in pairwise(bounds)]
    x = torch.randn(data.draw(st.integers(1, 4)), *IMAGE, generator=torch.Generator().manual_seed(len(inner)))
    verify_split(model, ModuleChain(stages), x)


def test_splitting_changes_nothing_of_the_model() -> None:
    model = small("resnet").train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    chain = split(model, [1, 3, 1], IMAGE)
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in chain.parameters())


def test_a_split_that_is_not_the_model_is_refused() -> None:
    class Counting(nn.Sequential):
        """Gives something else at each call, which no trace can hold."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x * Counting.calls).mean((2, 3))

    blocks = [nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(2)]
    with pytest.raises(M2MKDError, match="something else|does not compute what the model does"):
        split(Counting(*blocks), 2, (1, 4, 4))


def test_more_parts_than_can_be_separated_are_refused_with_what_crosses() -> None:
    model = small("densenet")
    message = r"4 modules; choose between 1 and 3 \(of its 5 blocks not all can be separated: between .*denselayer1 and"
    with pytest.raises(M2MKDError, match=message):
        split(model, 4, IMAGE)
    assert resolve_depths(model, 2, IMAGE) == (2, 1)


def test_image_shape_of_a_vision_transformer_is_its_own() -> None:
    with pytest.raises(M2MKDError, match=r"image_shape \(3, 9, 9\) given for a model of images \(1, 16, 16\)"):
        split(vit(), 2, (3, 9, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resnet", "swin", "beit", "eva"])
def test_models_on_a_gpu_are_split_bit_for_bit(kind: str) -> None:
    model = small(kind).cuda().eval()
    chain = split(model, 2, IMAGE)
    verify_split(model, chain, torch.randn(3, *IMAGE, device="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny", "mobilenet_v3_small", "swin_t"])
def test_torchvision_models_are_split_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(torchvision.models.get_model(name, weights=None, num_classes=6)).eval()
    chain = split(model, 4, (3, 224, 224))
    verify_split(model, chain, torch.randn(3, 3, 224, 224))
    names = {key for stage in chain for key in stage.state_dict()}
    assert names == set(model.state_dict())


@pytest.mark.parametrize(("name", "depth"), [("vit_base_patch16_224", 3), ("vit_large_patch16_224", 6)])
def test_golden_state_names_of_published_teachers(golden_manifest, name: str, depth: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, VisionTransformer)
    chain = split(model, [depth] * 4)
    published = golden_manifest[name]["model_stages"]
    assert len(published) == len(chain)
    for stage, names in zip(chain, published, strict=True):
        assert {key: list(tensor.shape) for key, tensor in stage.state_dict().items()} == names


def test_golden_state_names_of_the_published_mixture_model(golden_manifest) -> None:
    with torch.device("meta"):
        model = create_model("vmoe_base.m2mkd")
    published = golden_manifest["vmoe_base"]
    for stage, names in zip(split(model, [3, 3, 3, 3]), published["model_stages"], strict=True):
        assert {key: list(tensor.shape) for key, tensor in stage.state_dict().items()} == names
