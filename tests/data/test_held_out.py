from __future__ import annotations

import pytest
import torch

from m2mkd_fast.data import ImageDataset, TensorSplit, create_dataset
from m2mkd_fast.data.held_out import choose_few_shot, hold_out_validation
from m2mkd_fast.errors import M2MKDError, UnknownNameError


def split(name, labels, first):
    """Image n of a split has the pixel first + n."""
    pixels = torch.arange(first, first + len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    return TensorSplit(name, pixels, torch.tensor(labels), 3, (0.0,), (1.0,))


@pytest.fixture
def dataset():
    splits = {"train": split("train", [0, 1, 2] * 10, 0), "test": split("test", [2, 1, 0] * 8, 100)}
    return ImageDataset("letters", ["a", "b", "c"], splits)


def pixels(part):
    return part.pixels.flatten().tolist()


def test_validation_is_taken_from_training(dataset):
    held = hold_out_validation(dataset, 0.2, seed=1)
    assert list(held.splits) == ["train", "val", "test"]
    assert torch.bincount(held.splits["val"].labels).tolist() == [2, 2, 2]
    assert torch.bincount(held.splits["train"].labels).tolist() == [8, 8, 8]
    assert sorted(pixels(held.splits["train"]) + pixels(held.splits["val"])) == list(range(30))
    for part in ("train", "val"):
        assert [pixel % 3 for pixel in pixels(held.splits[part])] == held.splits[part].labels.tolist()
    assert held.splits["test"] is dataset.splits["test"]
    assert held.describe()["validation"] == 0.2
    again, other = (hold_out_validation(dataset, 0.2, seed=seed) for seed in (1, 2))
    assert pixels(again.splits["val"]) == pixels(held.splits["val"]) != pixels(other.splits["val"])
    with pytest.raises(M2MKDError, match=r"validation=1.5: the share"):
        hold_out_validation(dataset, 1.5, seed=0)
    dataset.splits["train"].labels[0] = 1
    for place in range(3, 30, 3):
        dataset.splits["train"].labels[place] = 0 if place == 3 else 1
    with pytest.raises(M2MKDError, match=r"class 'a' has 1 training image; at least 2"):
        hold_out_validation(dataset, 0.2, seed=0)


def test_few_shot_draws_classes_and_images_apart(dataset):
    seen = set()
    for seed in range(6):
        task = choose_few_shot(dataset, {"ways": 2, "shots": 2}, seed)
        train, test = task.splits["train"], task.splits["test"]
        seen.add(tuple(task.class_names))
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert test.labels.tolist() == [0] * 6 + [1] * 6
        # Each from its own split, and of the classes that the names say.
        assert [task.class_names[label] for label in train.labels] == ["abc"[pixel % 3] for pixel in pixels(train)]
        assert [task.class_names[label] for label in test.labels] == [
            "cba"[(pixel - 100) % 3] for pixel in pixels(test)
        ]
        assert len({*pixels(train)}) == 4 and len({*pixels(test)}) == 12
        assert task.num_classes == train.num_classes == 2
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 2}, r"lacks shots"),
        ({"ways": 4, "shots": 1}, r"ways=4; choose from 2 to 3"),
        ({"ways": 2, "shots": 0}, r"shots=0, queries=0"),
        ({"ways": 2, "shots": 3}, r"has 8 images in split 'test', fewer than 9"),
    ],
)
def test_impossible_tasks(dataset, settings, message):
    with pytest.raises(M2MKDError, match=message):
        choose_few_shot(dataset, settings, seed=0)
    with pytest.raises(UnknownNameError, match=r"'shot'; did you mean 'shots'"):
        choose_few_shot(dataset, {"ways": 2, "shot": 1}, seed=0)


def test_by_name():
    """Any dataset has them; without them nothing changes."""
    whole = create_dataset("digits")
    held = create_dataset("digits", validation=0.1)
    assert len(held.splits["train"]) + len(held.splits["val"]) == len(whole.splits["train"])
    assert held.splits["test"].content_hash() == whole.splits["test"].content_hash()
    assert list(whole.splits) == ["train", "test"]
    task = create_dataset("digits", few_shot={"ways": 5, "shots": 4}, validation=0.25)
    assert {name: len(part) for name, part in task.splits.items()} == {"train": 15, "val": 5, "test": 60}
