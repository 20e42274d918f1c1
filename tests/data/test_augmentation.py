from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from m2mkd_fast.data.augmentation import RECIPES, Affine, CropFlip, TimmTransform, Unchanged, create_augmentation
from m2mkd_fast.data.seeds import seeded_globals
from m2mkd_fast.errors import M2MKDError, UnknownNameError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(64, 3, 17, 12, generator=generator(9))


def test_zero_ranges_change_nothing(images):
    assert torch.equal(Unchanged()(images, generator()), images)
    torch.testing.assert_close(Affine(0, 0, 0)(images, generator()), images, atol=1e-5, rtol=0)
    assert torch.equal(CropFlip(0, 0)(images, generator()), images)


def test_certain_flip_is_a_mirror(images):
    assert torch.equal(CropFlip(padding=0, flip=1)(images, generator()), images.flip(-1))


def test_crops_are_shifts_with_repeated_borders(images):
    margin = 2
    padded = torch.nn.functional.pad(images, (margin,) * 4, mode="replicate")
    results = CropFlip(padding=0.14, flip=0.5)(images, generator())
    seen = set()
    for image, result in zip(padded, results, strict=True):
        matches = [
            (top, left, flipped)
            for top in range(2 * margin + 1)
            for left in range(2 * margin + 1)
            for flipped in (False, True)
            if torch.equal(
                image[:, top : top + 17, left : left + 12].flip(-1)
                if flipped
                else image[:, top : top + 17, left : left + 12],
                result,
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == set(range(5)) == {left for _, left, _ in seen}
    assert {flipped for _, _, flipped in seen} == {False, True}


@pytest.mark.parametrize(("option", "limit"), [("rotation", 0.25), ("scale", 0.15), ("shift", 0.15)])
def test_affine_stays_in_its_range_and_fills_it(option, limit):
    """A ramp along x and one along y show the map that was applied: read it off by least squares."""
    size = 33
    axis = (2 * torch.arange(size) + 1) / size - 1
    ramps = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)])
    augment = Affine(**{"rotation": 0, "scale": 0, "shift": 0, option: limit})
    result = augment(ramps.repeat(400, 1, 1, 1), generator())
    inner = slice(10, 23)
    grid = torch.stack([ramps[0, inner, inner].flatten(), ramps[1, inner, inner].flatten(), torch.ones(13 * 13)], 1)
    fitted = torch.linalg.pinv(grid) @ result[:, :, inner, inner].flatten(2).mT
    angle = torch.atan2(fitted[:, 0, 1], fitted[:, 0, 0])
    scale = (fitted[:, 0, 0] ** 2 + fitted[:, 0, 1] ** 2).sqrt() - 1
    measured = {"rotation": angle, "scale": scale, "shift": fitted[:, 2, :].flatten()}
    for name, values in measured.items():
        largest = values.abs().max().item()
        if name == option:
            assert 0.97 * limit < largest <= limit + 1e-4
            assert values.mean().abs() < limit / 8
            assert math.isclose(values.std().item(), limit / math.sqrt(3), rel_tol=0.1)
        else:
            assert largest < 1e-4


def test_images_of_one_batch_are_changed_independently(images):
    same = images[:1].expand(64, -1, -1, -1)
    results = Affine()(same, generator())
    assert len({result.numpy().tobytes() for result in results}) == 64
    assert results.shape == same.shape


@pytest.mark.parametrize("auto_augment", ["rand-m10-mstd0.5-inc1", "rand-m0", "original", "augmix-m5-w3"])
def test_timm_policies_survive_their_extremes(auto_augment):
    """timm posterises to 0 bits at the strong end, which Pillow 13 refuses."""
    transform = TimmTransform(auto_augment=auto_augment).bind((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    for seed in range(120):
        with seeded_globals(seed):
            assert transform(picture).shape == (3, 16, 16)


def test_posterising_to_no_bits_is_black():
    transform = TimmTransform(auto_augment="rand-m10-inc1-n1").bind((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    (random_augment,) = [step for step in transform.transforms if hasattr(step, "ops")]
    (posterize,) = [operation for operation in random_augment.ops if operation.name == "PosterizeIncreasing"]
    picture = Image.new("RGB", (8, 8), (255, 128, 200))
    posterize.prob = 1.0
    assert np.array(posterize(picture)).max() == 0
    posterize.magnitude = 7.5
    assert np.array(posterize(picture))[0, 0].tolist() == [128, 128, 128]
    posterize.magnitude = 5
    assert np.array(posterize(picture))[0, 0].tolist() == [192, 128, 192]


def steps(spec, size=64):
    transform = create_augmentation(spec).bind((3, size, size), (0.5,) * 3, (0.5,) * 3)
    return {type(step).__name__: step for step in transform.transforms}


def test_deit_is_what_the_published_trainers_use():
    """The options of m2mKD's and NAC's `create_transform`: rand-m9-mstd0.5-inc1, reprob 0.25, remode pixel, bicubic."""
    named = steps("deit")
    policy = "rand-m9-mstd0.5-inc1"
    options = {"auto_augment": policy, "color_jitter": 0.4, "interpolation": "bicubic", "re_prob": 0.25}
    direct = create_transform(64, is_training=True, mean=(0.5,) * 3, std=(0.5,) * 3, re_mode="pixel", **options)
    assert [str(step) for step in named.values()] == [str(step) for step in direct.transforms]
    assert "ColorJitter" not in named and named["RandomErasing"].probability == 0.25
    assert named["RandomResizedCropAndInterpolation"].scale == (0.08, 1.0)
    assert "RandomErasing" not in steps({"name": "deit", "re_prob": 0.0})
    assert create_augmentation("deit").options["re_prob"] == 0.25  # the preset itself is left alone


def test_deit3_changes_each_picture_in_one_of_three_ways():
    named = steps("deit3")
    names = {operation.name for (operation,) in named["AutoAugment"].policy}
    assert names == {"Solarize", "Desaturate", "GaussianBlurRand"}
    assert named["ColorJitter"].brightness == pytest.approx([0.7, 1.3])
    assert "RandomErasing" not in named


def test_imagenet_is_a_crop_and_a_flip():
    kinds = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    assert list(steps("imagenet")) == kinds
    with pytest.raises(UnknownNameError, match=r"'deit4'; did you mean 'deit' or 'deit3'"):
        create_augmentation("deit4")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_give_images_of_the_asked_size(recipe):
    transform = create_augmentation(recipe).bind((3, 24, 24), (0.5,) * 3, (0.5,) * 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    with seeded_globals(0):
        images = [transform(picture) for _ in range(8)]
    assert {image.shape for image in images} == {(3, 24, 24)}
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_options_are_checked():
    assert create_augmentation({"name": "crop_flip", "flip": 0.0}) == CropFlip(flip=0.0)
    with pytest.raises(UnknownNameError, match=r"unknown augmentation 'None'"):
        create_augmentation({"rotation": 0.1})
    with pytest.raises(UnknownNameError, match=r"'rotatoin'; did you mean 'rotation'"):
        create_augmentation({"name": "affine", "rotatoin": 0.1})
    with pytest.raises(M2MKDError, match=r"scale=1.5 must be a number from 0 to 1"):
        create_augmentation({"name": "affine", "scale": 1.5})
    with pytest.raises(M2MKDError, match=r"flip='yes'"):
        create_augmentation({"name": "crop_flip", "flip": "yes"})
    with pytest.raises(M2MKDError, match=r"mean come\(s\) from the dataset"):
        create_augmentation({"name": "timm", "mean": (0.5,)})
    with pytest.raises(M2MKDError, match=r"no_such_option"):
        TimmTransform(no_such_option=1).bind((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
