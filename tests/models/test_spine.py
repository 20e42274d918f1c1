from __future__ import annotations

import pytest
import torch
from backbones import IMAGE, SMALL, small, small_spine
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import resnet18, vit_b_16

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.blocks import find_blocks
from m2mkd_fast.models.spine import find_spine, image_shape_of
from m2mkd_fast.nn.cut import Cut

TOKENS = Cut(16, "tokens", (4, 4), 1)
CUTS = {
    "resnet": [Cut(8, "channels_first", (8, 8)), Cut(16, "channels_first", (4, 4))]
    + [Cut(24, "channels_first", (2, 2))] * 2,
    "convnext": [Cut(8, "channels_first", (8, 8))]
    + [Cut(12, "channels_first", (4, 4))] * 2
    + [Cut(16, "channels_first", (2, 2))],
    "swin": [Cut(8, "channels_last", (16, 16))]
    + [Cut(16, "channels_last", (8, 8))] * 2
    + [Cut(32, "channels_last", (4, 4))],
    "beit": [TOKENS] * 2,
    "eva": [TOKENS] * 2,
    "cait": [Cut(16, "tokens", (4, 4))] * 3,
    "mixer": [Cut(16, "tokens", (4, 4))] * 2,
    "pvt": [Cut(8, "channels_first", (8, 8))] + [Cut(12, "tokens", (4, 4))] * 2,
    "levit": [Cut(16, "tokens", (4, 4))] * 2,
    "densenet": [Cut(16, "channels_first", (8, 8)), Cut(16, "channels_first", (4, 4))],
}


@pytest.mark.parametrize("kind", CUTS)
def test_units_and_what_passes_between_them(kind: str) -> None:
    _, spine = small_spine(kind)
    assert list(spine.cuts) == CUTS[kind]
    assert len(spine.units) == len(CUTS[kind]) + 1
    assert spine.num_classes == 6
    assert spine.image_shape == IMAGE


def test_blocks_that_cannot_be_separated_are_one_unit_and_say_why() -> None:
    _, spine = small_spine("densenet")
    assert [len(unit) for unit in spine.units] == [2, 2, 1]
    assert [(crossing.before, crossing.after) for crossing in spine.crossings] == [
        ("features.denseblock1.denselayer1", "features.denseblock1.denselayer2"),
        ("features.denseblock2.denselayer1", "features.denseblock2.denselayer2"),
    ]
    assert "a tensor [B, 8, 8, 8] from features.pool0 and a tensor [B, 4, 8, 8] from" in str(spine.crossings[0])


@pytest.mark.parametrize("kind", SMALL)
def test_no_block_lies_within_another(kind: str) -> None:
    blocks = find_blocks(small(kind))
    assert not any(a.startswith(b + ".") for a in blocks for b in blocks)


def test_blocks_of_models_that_are_not_timms() -> None:
    with torch.device("meta"):
        assert find_blocks(resnet18()) == {f"layer{i}.{j}" for i in range(1, 5) for j in range(2)}
        assert find_blocks(vit_b_16()) == {f"encoder.layers.encoder_layer_{i}" for i in range(12)}


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(M2MKDError, match=r"no blocks found in a Sequential.*group_matcher"):
        find_spine(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))


def test_image_shapes() -> None:
    assert image_shape_of(small("swin")) == (1, 32, 32)
    assert image_shape_of(VisionTransformer(img_size=(16, 24), patch_size=8, in_chans=2, depth=1)) == (2, 16, 24)
    with pytest.raises(M2MKDError, match="ResNet does not say the shape of its images; give `image_shape"):
        find_spine(small("resnet"))


class Pieces(nn.Module):
    """Two blocks with something between them, on maps `[B, 1, 6, 6]`."""

    def __init__(self, between, outputs=lambda x: x.mean((2, 3))) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(2)))
        self.between, self.outputs = between, outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self.blocks[1](self.between(self.blocks[0](x), x)))


def test_a_skip_between_the_blocks_is_cut_behind_the_sum() -> None:
    spine = find_spine(Pieces(lambda h, x: h + x), (1, 6, 6))
    assert [place.value.name for place in spine.places[False]] == ["add"]


def test_a_skip_over_all_blocks_leaves_one_unit() -> None:
    class Skip(Pieces):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) + x

    spine = find_spine(Skip(None), (1, 6, 6))
    assert len(spine.units) == 1
    assert "there cross the images [B, 1, 6, 6] and a tensor [B, 1, 6, 6] from blocks.0" in str(spine.crossings[0])


def test_what_depends_on_the_shape_alone_does_not_cross() -> None:
    class Tabled(Pieces):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros_like(x) + x.new_full((1, 6), 2.0)
            for block in self.blocks:
                x = block(x) * table
            return x.mean((2, 3))

    assert len(find_spine(Tabled(None), (1, 6, 6)).units) == 2


def test_modules_that_give_several_tensors_are_looked_into() -> None:
    class Embed(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), torch.arange(6, device=x.device)

    class Positioned(Pieces):
        def __init__(self) -> None:
            super().__init__(None)
            self.embed = Embed(nn.Conv2d(1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x, positions = self.embed(x)
            for block in self.blocks:
                x = block(x) * positions
            return x.mean((2, 3))

    assert len(find_spine(Positioned(), (1, 6, 6)).units) == 2


def test_several_outputs_are_refused() -> None:
    with pytest.raises(M2MKDError, match="instead of one tensor of logits"):
        find_spine(Pieces(lambda h, x: h, lambda x: (x, x)), (1, 6, 6))


def test_what_has_no_layout_is_no_cut() -> None:
    class Flat(Pieces):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x).flatten(1).sum(1)
            for block in self.lines:
                x = block(x)
            return x

    model = Flat(None)
    model.lines = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(2))
    spine = find_spine(model, (1, 6, 6))
    assert [len(unit) for unit in spine.units] == [1, 2]
    assert "a tensor [B] from lines.0, which is neither tokens nor a map" in str(spine.crossings[0])
