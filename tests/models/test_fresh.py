from __future__ import annotations

import copy
import functools

import pytest
import torch
from small_models import small
from timm.layers import DropPath
from timm.models.resnet import Bottleneck
from torch import nn

from m2mkd_fast.models.fresh import remove_dropout
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import weights_hash

SHAPE = (1, 16, 16)
IMAGES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


@functools.cache
def unchanged(name: str, *parts: int) -> ModuleChain:
    """A teacher's chain, for tests that leave it as it is."""
    return split(small(name), list(parts), SHAPE)


@pytest.mark.parametrize(
    ("name", "parts", "left"),
    [
        ("convnext", [3, 3, 2], [1, 1, 1]),
        ("swin", [4, 2], [1, 1]),
        ("resnet", [3, 2, 2], [2, 2, 2]),  # blocks that change the resolution or the width stay beside the one
    ],
)
def test_meta_models_of_hierarchical_teachers(name: str, parts: list[int], left: list[int]) -> None:
    chain = unchanged(name, *parts)
    before = weights_hash(chain)
    torch.manual_seed(1)
    meta = meta_model(chain)
    assert [stage.depth for stage in meta] == left
    assert [(stage.slot, stage.start, stage.stop) for stage in meta] == [
        (slot, sum(left[:slot]), sum(left[: slot + 1])) for slot in range(len(left))
    ]
    assert meta.cuts == chain.cuts
    assert meta.num_classes == chain.num_classes
    assert meta.training
    assert all(parameter.requires_grad for parameter in meta.parameters())
    meta(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in meta.parameters())
    assert all(parameter.grad is None for parameter in chain.parameters())
    assert meta.state_dict().keys() < chain.state_dict().keys()
    assert weights_hash(chain) == before


def test_what_stays_of_a_resolution_is_evenly_spaced() -> None:
    chain = unchanged("swin", 4, 2)
    assert meta_model(chain, 2)[0].unit_names == (("layers.0.blocks.0",), ("layers.0.blocks.2",))
    assert meta_model(chain, 9)[0].unit_names == chain[0].unit_names, "no more than there are"
    whole = unchanged("convnext", 8)
    assert [unit[0] for unit in meta_model(whole)[0].unit_names] == [f"stages.{i}.blocks.0" for i in range(3)]


def test_layers_start_fresh_and_what_belongs_to_none_is_kept() -> None:
    chain = copy.deepcopy(unchanged("convnext", 3, 3, 2))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(3.0)
    torch.manual_seed(1)
    one = meta_model(chain)
    torch.manual_seed(1)
    two = meta_model(chain)
    torch.manual_seed(2)
    three = meta_model(chain)
    assert weights_hash(one) == weights_hash(two) != weights_hash(three)
    for name, parameter in one.named_parameters():
        theirs = chain.get_parameter(name)
        assert torch.equal(parameter, theirs) == name.endswith("gamma"), name
        assert parameter is not theirs


def test_statistics_of_batch_normalisation_start_fresh() -> None:
    chain = copy.deepcopy(unchanged("resnet", 3, 2, 2))
    chain(IMAGES)
    meta = meta_model(chain)
    moved = [module.running_mean.abs().sum() > 0 for module in chain.modules() if isinstance(module, nn.BatchNorm2d)]
    fresh = [module.running_mean.abs().sum() == 0 for module in meta.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(moved)
    assert all(fresh)
    assert len(fresh) < len(moved)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("resnet", {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.5, "block": Bottleneck}),
        ("convnext", {"drop_rate": 0.5, "drop_path_rate": 0.5}),
        ("swin", {"drop_rate": 0.5, "drop_path_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}),
    ],
)
def test_draws_nothing_in_train_mode(name: str, rates: dict[str, object]) -> None:
    chain = split(small(name, **rates), 2, SHAPE)
    meta = meta_model(chain).train()
    state = torch.get_rng_state()
    meta(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    chain.train()(IMAGES)
    assert not torch.equal(torch.get_rng_state(), state), "the teacher does draw"


def test_dropout_of_any_sort_is_removed() -> None:
    from torchvision.ops import StochasticDepth

    kinds = [nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5), StochasticDepth(0.5, "row")]
    model = nn.Sequential(*kinds, nn.Sequential(nn.AlphaDropout(0.5))).train()
    remove_dropout(model)
    assert torch.equal(model(IMAGES), IMAGES)


def test_compiles_without_a_break() -> None:
    meta = meta_model(unchanged("convnext", 3, 3, 2)).eval()
    compiled = torch.compile(meta, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES), meta(IMAGES))
