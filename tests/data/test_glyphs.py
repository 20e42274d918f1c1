from __future__ import annotations

import pytest
import torch
from matplotlib.ft2font import FT2Font

from m2mkd_fast.data import create_dataset
from m2mkd_fast.data.glyph_fonts import CHARACTERS, OOD_FONTS, TRAIN_FONTS, draw_masters, font_path, fonts_for
from m2mkd_fast.errors import M2MKDError, UnknownNameError


@pytest.fixture(scope="module")
def glyphs():
    return create_dataset("glyphs", num_classes=12, images_per_class=16, test_images_per_class=8)


def test_sizes_and_labels(glyphs):
    assert glyphs.image_shape == (1, 32, 32)
    assert glyphs.class_names == list("0123456789AB")
    for name, count in (("train", 16), ("test", 8), ("ood", 8)):
        assert glyphs.splits[name].pixels.dtype == torch.uint8
        assert torch.bincount(glyphs.splits[name].labels).tolist() == [count] * 12
    images, _ = glyphs.splits["train"].load(torch.arange(192))
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-2


def test_images_depend_on_the_arguments_alone(glyphs):
    torch.manual_seed(99)
    options = {"images_per_class": 16, "test_images_per_class": 8}
    again = create_dataset("glyphs", num_classes=12, **options)
    assert again.describe() == glyphs.describe()
    more_classes = create_dataset("glyphs", num_classes=14, **options)
    assert torch.equal(more_classes.splits["ood"].pixels[:96], glyphs.splits["ood"].pixels)
    other_seed = create_dataset("glyphs", num_classes=12, seed=1, **options)
    assert (other_seed.splits["train"].pixels != glyphs.splits["train"].pixels).float().mean() > 0.5


def test_no_image_occurs_twice(glyphs):
    seen = [image.numpy().tobytes() for split in glyphs.splits.values() for image in split.pixels]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("count", [12, 200])
def test_every_font_has_every_character_and_held_out_fonts_are_others(count):
    train, ood = fonts_for(CHARACTERS[:count])
    assert len(train) == 12
    assert len(ood) == (9 if count == 12 else 4)
    assert not set(train) & set(ood)
    assert not {FT2Font(str(font_path(f))).family_name for f in train} & {
        FT2Font(str(font_path(f))).family_name for f in ood
    }
    for font in train + ood:
        has = FT2Font(str(font_path(font))).get_charmap()
        assert all(ord(character) in has for character in CHARACTERS[:count])


def test_characters_look_different_in_every_font():
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 200
    for font in (*TRAIN_FONTS[::5], *OOD_FONTS[::3]):
        drawn = torch.stack([draw_masters([font], character, 48)[0].flatten() for character in CHARACTERS])
        distance = torch.cdist(drawn, drawn) / drawn.norm(dim=1).mean()
        distance.fill_diagonal_(1)
        closest = divmod(int(distance.argmin()), len(CHARACTERS))
        assert distance.min() > 0.15, f"{font}: {CHARACTERS[closest[0]]} and {CHARACTERS[closest[1]]}"


def test_characters_are_whole_and_centred():
    for character in ("W", "‰", "┘", "Ő", "@"):
        masters = draw_masters(TRAIN_FONTS, character, 64)[:, 0]
        ink = masters > 0
        for rows_or_columns in (ink.any(2), ink.any(1)):
            for occupied in rows_or_columns:
                places = occupied.nonzero()
                assert places.min() >= 8
                assert places.max() <= 55
                assert abs(places.min() + places.max() - 63) <= 2


def test_classes_can_be_told_apart_and_ood_is_harder():
    """A nearest-mean classifier: far above chance on test images, and worse on the unseen renditions."""
    dataset = create_dataset("glyphs", images_per_class=40, test_images_per_class=16)
    train = dataset.splits["train"]
    means = torch.stack([train.normalise(train.pixels[train.labels == c]).mean(0).flatten() for c in range(20)])
    accuracy = {}
    for name in ("test", "ood"):
        images, labels = dataset.splits[name].load(torch.arange(320))
        accuracy[name] = (torch.cdist(images.flatten(1), means).argmin(1) == labels).float().mean().item()
    assert accuracy["test"] > 0.5
    assert accuracy["ood"] < accuracy["test"] - 0.1


def test_renditions(glyphs):
    """Paper is what the corners show: dark in training and test, light in the inverted quarter of ood."""
    for name in ("train", "test"):
        pixels = glyphs.splits[name].pixels.float()
        assert (pixels[:, 0, :3, :3].mean((1, 2)) < 110).all()
    ood = glyphs.splits["ood"].pixels.float().view(12, 2, 4, 32, 32)
    corner = ood[..., :3, :3].mean((-1, -2))
    assert (corner[:, :, 2] > 150).all()
    assert (corner[:, :, :2] < 110).all()
    border = torch.cat([ood[..., 0, :], ood[..., -1, :], ood[..., :, 0], ood[..., :, -1]], -1)
    spread = border.std(-1).mean((0, 1))
    assert spread[3] > 2 * spread[:3].max()


def test_colour_and_size():
    dataset = create_dataset("glyphs", num_classes=3, images_per_class=4, image_size=64, in_chans=3)
    pixels = dataset.splits["train"].pixels
    assert pixels.shape == (12, 3, 64, 64)
    assert (pixels[:, 0] != pixels[:, 1]).float().mean() > 0.5
    assert len(dataset.splits["train"].mean) == 3


def test_cache_is_used_and_keyed_by_the_arguments(tmp_path):
    options = {"num_classes": 3, "images_per_class": 4, "cache_dir": tmp_path / "new"}
    made = create_dataset("glyphs", **options)
    (stored,) = (tmp_path / "new").iterdir()
    kept = stored.read_bytes()
    assert create_dataset("glyphs", **options).describe() == made.describe()
    create_dataset("glyphs", seed=1, **options)
    assert len(list((tmp_path / "new").glob("glyphs-*.safetensors"))) == 2
    assert not list((tmp_path / "new").glob("*.partial"))
    position = len(kept) - 1
    stored.write_bytes(kept[:position] + bytes([kept[position] ^ 1]))
    assert create_dataset("glyphs", **options).describe() != made.describe()
    stored.write_bytes(kept[:100])
    with pytest.raises(M2MKDError, match=rf"{stored.name} cannot be read .* delete that file"):
        create_dataset("glyphs", **options)
    (tmp_path / "file").touch()
    with pytest.raises(M2MKDError, match=r"cannot write .*file.*make the folder writable"):
        create_dataset("glyphs", **{**options, "cache_dir": tmp_path / "file"})


def test_errors():
    with pytest.raises(M2MKDError, match=r"num_classes=1000 for dataset 'glyphs': choose from 2 to 200"):
        create_dataset("glyphs", num_classes=1000)
    with pytest.raises(M2MKDError, match=r"num_classes=0"):
        create_dataset("glyphs", num_classes=0)
    with pytest.raises(M2MKDError, match=r"in_chans=2"):
        create_dataset("glyphs", in_chans=2)
    with pytest.raises(M2MKDError, match=r"image_size=8"):
        create_dataset("glyphs", image_size=8)
    with pytest.raises(M2MKDError, match=r"images_per_class=0"):
        create_dataset("glyphs", images_per_class=0)
    with pytest.raises(UnknownNameError, match=r"'test_images_pr_class'; did you mean 'test_images_per_class'"):
        create_dataset("glyphs", test_images_pr_class=3)
    with pytest.raises(M2MKDError, match=r"no character '漢'"):
        fonts_for(["漢"])
