from __future__ import annotations

import pytest
import torch
from pictures import encoded, reds, write_picture

from m2mkd_fast.data import create_dataset, eval_batches, train_batches
from m2mkd_fast.errors import M2MKDError, UnknownNameError

datasets = pytest.importorskip("datasets")
PLAIN = {"image_size": 4, "mean": (0,) * 3, "std": (1,) * 3}


def table(values):
    content = {"picture": [{"bytes": encoded(value), "path": f"{value}.png"} for value in values]}
    content["species"] = [value % 2 for value in values]
    content["weight"] = [float(value) for value in values]
    kinds = {"picture": datasets.Image(), "species": datasets.ClassLabel(names=["cat", "dog"])}
    return datasets.Dataset.from_dict(
        content, features=datasets.Features(kinds | {"weight": datasets.Value("float32")})
    )


@pytest.fixture
def saved(tmp_path):
    parts = {"train": table(range(10)), "validation": table(range(100, 104)), "sketch": table([201, 203])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "pets")
    return tmp_path / "pets"


def test_saved_dataset(saved):
    dataset = create_dataset(f"huggingface:{saved}", ood="sketch", **PLAIN)
    assert dataset.class_names == ["cat", "dog"]
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 10, "test": 4, "ood": 2}
    images, labels = next(eval_batches(dataset.splits["test"], 8))
    assert reds(images) == [100, 101, 102, 103]
    assert labels.tolist() == [0, 1, 0, 1]
    assert dataset.splits["ood"].class_mask.tolist() == [False, True]
    few = create_dataset(f"huggingface:{saved}", images_per_class=2, **PLAIN).splits["train"]
    images, labels = next(eval_batches(few, 8))
    assert len(labels) == 4 and [red % 2 for red in reds(images)] == labels.tolist()


def test_training_goes_on_in_mid_epoch(saved):
    split = create_dataset(f"huggingface:{saved}", **PLAIN).splits["train"]
    options = {"batch_size": 4, "seed": 0, "stop": 5, "augmentation": {"name": "timm", "hflip": 0.5}}
    whole, late = list(train_batches(split, **options)), list(train_batches(split, start=3, num_workers=1, **options))
    for (images, labels), (other_images, other_labels) in zip(whole[3:], late, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_content_hash_sees_images_of_another_size_without_reading_them(saved, tmp_path):
    before = create_dataset(f"huggingface:{saved}").describe()["content_hash"]
    assert create_dataset(f"huggingface:{saved}").describe()["content_hash"] == before
    changed = datasets.DatasetDict({"train": table([*range(9), 77]), "validation": table(range(100, 104))})
    changed.save_to_disk(tmp_path / "other")
    assert create_dataset(f"huggingface:{tmp_path / 'other'}").describe()["content_hash"] != before
    split = create_dataset(f"huggingface:{saved}").splits["train"]
    sizes = [f"{value}.png/{len(encoded(value))}" for value in range(10)]
    assert list(split.pictures.identities()) == sizes
    assert list(split.pictures.subset(torch.tensor([7, 2])).identities()) == [sizes[7], sizes[2]]


def test_folder_of_images(tmp_path):
    """What `load_dataset` makes of a folder of images, whose rows name files instead of holding them."""
    for part, offset in (("train", 0), ("test", 100)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(2):
                write_picture(tmp_path / "insects" / part / name / f"{i}.png", offset + 20 * label + i)
    dataset = create_dataset(f"huggingface:{tmp_path / 'insects'}", cache_dir=tmp_path / "cache", **PLAIN)
    assert any((tmp_path / "cache").iterdir())
    assert dataset.class_names == ["ant", "bee"]
    images, labels = next(eval_batches(dataset.splits["test"], 8))
    assert labels.tolist() == [0, 0, 1, 1]
    assert sorted(reds(images)) == [100, 101, 120, 121]
    identities = list(dataset.splits["train"].pictures.identities())
    assert identities[0] == f"0.png/{(tmp_path / 'insects/train/ant/0.png').stat().st_size}"


def test_columns_and_splits_are_named(saved, tmp_path):
    with pytest.raises(UnknownNameError, match=r"split of dataset .*'sketches'; did you mean 'sketch'"):
        create_dataset(f"huggingface:{saved}", ood="sketches")
    with pytest.raises(UnknownNameError, match=r"column of dataset .*'specis'; did you mean 'species'"):
        create_dataset(f"huggingface:{saved}", label="specis")
    with pytest.raises(M2MKDError, match=r"column 'weight' of split 'train' has 0.0; labels are numbers from 0 on"):
        create_dataset(f"huggingface:{saved}", label="weight")
    with pytest.raises(M2MKDError, match=r"cannot be loaded .*expected a folder that save_to_disk wrote"):
        create_dataset(f"huggingface:{tmp_path / 'nothing'}")
    two = table([1, 2]).add_column("mask", [{"bytes": encoded(1), "path": None}] * 2, feature=datasets.Image())
    datasets.DatasetDict({"train": two, "test": two}).save_to_disk(tmp_path / "two")
    with pytest.raises(M2MKDError, match=r"has 2 columns of images among picture, species, weight, mask; name one"):
        create_dataset(f"huggingface:{tmp_path / 'two'}")
    assert len(create_dataset(f"huggingface:{tmp_path / 'two'}", image="mask", image_size=4).splits["train"]) == 2
    two.save_to_disk(tmp_path / "single")
    with pytest.raises(M2MKDError, match=r"is a single split; save a DatasetDict"):
        create_dataset(f"huggingface:{tmp_path / 'single'}")
    numbers = table([1, 2]).cast_column("species", datasets.Value("int64")).rename_column("species", "label")
    datasets.DatasetDict({"train": numbers, "dev": numbers}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UnknownNameError, match=r"split of the dataset for test= 'validation'"):
        create_dataset(f"huggingface:{tmp_path / 'numbers'}")
    assert create_dataset(f"huggingface:{tmp_path / 'numbers'}", test="dev").class_names == ["0", "1"]
