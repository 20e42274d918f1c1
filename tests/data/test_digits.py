from __future__ import annotations

import json

import pytest
import torch
from sklearn.datasets import load_digits

from m2mkd_fast.data import create_dataset
from m2mkd_fast.errors import M2MKDError, UnknownNameError


@pytest.fixture(scope="module")
def digits():
    return create_dataset("digits")


def test_all_digits_are_divided_once(digits):
    train, test = digits.splits["train"], digits.splits["test"]
    assert (len(train), len(test)) == (1297, 500)
    assert digits.image_shape == (1, 16, 16) == train.image_shape
    own = create_dataset("digits", image_size=8)
    together = torch.cat([own.splits["train"].pixels, own.splits["test"].pixels]).flatten(1)
    labels = torch.cat([own.splits["train"].labels, own.splits["test"].labels])
    source = load_digits()
    given = sorted((row.tobytes(), int(label)) for row, label in zip(together.numpy(), labels, strict=True))
    expected = torch.from_numpy(source.data / 16).float().numpy()
    assert given == sorted((row.tobytes(), int(label)) for row, label in zip(expected, source.target, strict=True))


def test_division_is_fixed_by_the_seed(digits):
    again = create_dataset("digits")
    assert digits.describe() == again.describe()
    other = create_dataset("digits", seed=1)
    assert other.describe()["content_hash"] != digits.describe()["content_hash"]
    # The permutation of seed 0, so that figures measured on one machine can be compared with another's.
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(digits.splits["test"].labels, torch.from_numpy(load_digits().target)[order[1297:]])


def test_description_can_be_stored_as_json(digits):
    facts = digits.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["num_classes"] == 10
    assert facts["splits"]["train"]["images"] == 1297


def test_content_hash_sees_one_pixel_and_one_label():
    first, second = create_dataset("digits").splits["test"], create_dataset("digits").splits["test"]
    assert first.content_hash() == second.content_hash()
    second.pixels[3, 0, 5, 5] += 0.25
    assert first.content_hash() != second.content_hash()
    second.pixels[3, 0, 5, 5] -= 0.25
    second.labels[0] = (second.labels[0] + 1) % 10
    assert first.content_hash() != second.content_hash()


def test_sizes_channels_and_fewer_classes():
    dataset = create_dataset("digits", image_size=24, in_chans=3, num_classes=4, images_per_class=5)
    train = dataset.splits["train"]
    assert train.pixels.shape == (20, 3, 24, 24)
    assert torch.equal(train.pixels[:, 0], train.pixels[:, 2])
    assert torch.bincount(train.labels).tolist() == [5, 5, 5, 5]
    assert dataset.splits["test"].labels.unique().tolist() == [0, 1, 2, 3]
    assert dataset.splits["test"].class_mask.tolist() == [True] * 4
    more = create_dataset("digits", image_size=24, in_chans=3, num_classes=4, images_per_class=9).splits["train"]
    kept = {image.numpy().tobytes() for image in more.pixels}
    assert all(image.numpy().tobytes() in kept for image in train.pixels)


def test_errors():
    with pytest.raises(M2MKDError, match=r"num_classes=11 .* from 2 to 10"):
        create_dataset("digits", num_classes=11)
    with pytest.raises(M2MKDError, match=r"images_per_class=1000 .* choose from 1 to 1"):
        create_dataset("digits", images_per_class=1000)
    with pytest.raises(M2MKDError, match=r"image_size=-4"):
        create_dataset("digits", image_size=-4)
    with pytest.raises(UnknownNameError, match=r"option of dataset 'digits': 'root'"):
        create_dataset("digits", root="data")
