from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from m2mkd_fast.data import create_dataset, eval_batches, train_batches
from m2mkd_fast.data.picture_split import UnreadableImageWarning
from m2mkd_fast.errors import M2MKDError

CLASSES = ("bird", "cat", "dog")


def write_image(path, value, size=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 10, 20)).save(path)


def make_folder(root, *, test="val", classes=CLASSES, images=4):
    for split in ("train", test):
        for label, name in enumerate(classes):
            for i in range(images):
                write_image(root / split / name / f"{i}.png", 50 * label + 5 * i + (split == test))
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pets")


def load_all(split):
    return next(eval_batches(split, len(split)))


@pytest.mark.parametrize("test", ["val", "test"])
def test_class_folders(tmp_path, test):
    dataset = create_dataset(f"folder:{make_folder(tmp_path, test=test)}", image_size=8, mean=(0,) * 3, std=(1,) * 3)
    assert dataset.class_names == list(CLASSES)
    assert dataset.image_shape == (3, 8, 8)
    assert sorted(dataset.splits) == ["test", "train"]
    images, labels = load_all(dataset.splits["test"])
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    reds = (255 * images[:, 0, 4, 4]).round().tolist()
    assert reds == [50 * label + 5 * i + 1 for label in range(3) for i in range(4)]
    facts = dataset.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["splits"]["train"] == {
        "images": 12,
        "unreadable": 0,
        "content_hash": dataset.splits["train"].content_hash(),
    }


def test_content_hash_sees_added_and_changed_files(folder):
    spec = f"folder:{folder}"
    before = create_dataset(spec).describe()["content_hash"]
    assert create_dataset(spec).describe()["content_hash"] == before
    write_image(folder / "train" / "cat" / "0.png", 55, size=(200, 140))
    changed = create_dataset(spec).describe()["content_hash"]
    write_image(folder / "train" / "cat" / "9.png", 55)
    assert len({before, changed, create_dataset(spec).describe()["content_hash"]}) == 3


def test_evaluation_crops_the_centre(tmp_path):
    """A wide picture with a dark centre square: the crop shows that square, more of it the larger the fraction."""
    root = make_folder(tmp_path, images=1)
    pixels = np.full((40, 80, 3), 255, dtype=np.uint8)
    pixels[5:35, 25:55] = 0
    for split in ("train", "val"):
        Image.fromarray(pixels).save(root / split / "cat" / "0.png")
    options = {"image_size": 40, "mean": (0,) * 3, "std": (1,) * 3}
    for fraction, dark in ((0.75, 1.0), (1.0, (30 / 40) ** 2)):
        dataset = create_dataset(f"folder:{root}", crop_fraction=fraction, **options)
        image = load_all(dataset.splits["test"])[0][1]
        assert image.shape == (3, 40, 40)
        assert 1 - image.mean().item() == pytest.approx(dark, abs=0.03)


def test_grey_and_default_sizes(folder):
    assert create_dataset(f"folder:{folder}").image_shape == (3, 224, 224)
    dataset = create_dataset(f"folder:{folder}", image_size=8, in_chans=1)
    images, _ = load_all(dataset.splits["train"])
    assert images.shape == (12, 1, 8, 8)
    assert images.std(0).min() > 0


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(("n01", "n02")):
        for i in range(3):
            write_image(root / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * label, size=(64, 64))
        write_image(root / "val" / "images" / f"val_{label}.JPEG", 100 * label, size=(64, 64))
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1")
        lines.append(f"val_{label}.JPEG\t{name}\t0\t0\t62\t57\n")
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("".join(reversed(lines)))
    dataset = create_dataset(f"folder:{root}", mean=(0,) * 3, std=(1,) * 3)
    assert dataset.image_shape == (3, 64, 64)
    assert dataset.class_names == ["n01", "n02"]
    assert len(dataset.splits["train"]) == 6
    images, labels = load_all(dataset.splits["test"])
    assert labels.tolist() == [0, 1]
    assert (255 * images[:, 0, 0, 0]).tolist() == pytest.approx([0, 100], abs=4)

    annotations.write_text("val_9.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(M2MKDError, match=r"line 1 names val_9.JPEG, which is not in .*images"):
        create_dataset(f"folder:{root}")
    annotations.write_text("val_0.JPEG n01\n")
    with pytest.raises(M2MKDError, match=r"line 1: expected a file name and a class, tab separated"):
        create_dataset(f"folder:{root}")
    annotations.write_text(lines[0])
    with pytest.raises(M2MKDError, match=r"1 only for training: n02"):
        create_dataset(f"folder:{root}")


def test_ood_folder_with_fewer_classes(folder, tmp_path):
    for i in range(2):
        write_image(tmp_path / "art" / "dog" / f"{i}.png", 7)
    ood = create_dataset(f"folder:{folder}", image_size=8, ood=tmp_path / "art").splits["ood"]
    assert ood.labels.tolist() == [2, 2]
    assert ood.class_mask.tolist() == [False, False, True]
    write_image(folder / "ood" / "cat" / "0.png", 7)
    assert create_dataset(f"folder:{folder}", image_size=8).splits["ood"].labels.tolist() == [1]
    with pytest.raises(M2MKDError, match=r"split .ood. has no image of the 2 classes kept"):
        create_dataset(f"folder:{folder}", num_classes=2, ood=tmp_path / "art")
    write_image(tmp_path / "art" / "fish" / "0.png", 7)
    with pytest.raises(M2MKDError, match=r"1 class\(es\) not trained on: fish"):
        create_dataset(f"folder:{folder}", ood=tmp_path / "art")
    with pytest.raises(
        M2MKDError, match=r"ood folder .*arts does not exist; expected <class>/<image> in it; did you mean .*art or"
    ):
        create_dataset(f"folder:{folder}", ood=tmp_path / "arts")


def test_fewer_classes_and_images(folder):
    dataset = create_dataset(f"folder:{folder}", image_size=8, num_classes=2, images_per_class=3)
    assert dataset.class_names == ["bird", "cat"]
    assert torch.bincount(dataset.splits["train"].labels).tolist() == [3, 3]
    assert torch.bincount(dataset.splits["test"].labels).tolist() == [4, 4]
    with pytest.raises(M2MKDError, match=r"choose from 2 to 3"):
        create_dataset(f"folder:{folder}", num_classes=4)
    with pytest.raises(M2MKDError, match=r"images_per_class=5 .* class 0 has 4"):
        create_dataset(f"folder:{folder}", images_per_class=5)


def test_workers_and_late_starts_change_nothing(folder):
    split = create_dataset(f"folder:{folder}", image_size=8).splits["train"]
    for augmentation in ("affine", {"name": "timm", "auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}):
        options = {"batch_size": 5, "seed": 1, "stop": 6, "augmentation": augmentation}
        expected = list(train_batches(split, **options))[2:]
        actual = list(train_batches(split, start=2, num_workers=2, **options))
        assert len(actual) == 4
        for (images, labels), (other_images, other_labels) in zip(expected, actual, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)


def truncate(path):
    """A file that opens and fails when its pixels are read."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:600])


def test_damaged_headers_are_found_counted_and_skipped(folder):
    broken = folder / "val" / "cat" / "1.png"
    broken.write_bytes(b"not an image")
    with pytest.warns(UnreadableImageWarning, match=r"cannot read image .*val.cat.1\.png .* 1 of at most 10") as caught:
        dataset = create_dataset(f"folder:{folder}", image_size=8)
    assert len(caught) == 1
    assert dataset.describe()["splits"]["test"]["unreadable"] == 1
    assert dataset.describe()["splits"]["train"]["unreadable"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(eval_batches(dataset.splits["test"], 1))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 4 + [1] * 3 + [2] * 4
    with pytest.raises(M2MKDError, match=r"1\.png .* 1 images are unreadable and max_unreadable=0. Repair"):
        create_dataset(f"folder:{folder}", max_unreadable=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_found_while_training_is_replaced_and_counted(folder, num_workers):
    truncate(folder / "train" / "bird" / "3.png")
    split = create_dataset(f"folder:{folder}", image_size=8).splits["train"]
    assert split.unreadable == 0
    for times in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = list(train_batches(split, batch_size=6, seed=0, stop=2, num_workers=num_workers))
        # The next readable image takes its place: the first cat.
        assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [3, 5, 4]
        assert all(len(labels) == 6 for _, labels in batches)
        assert split.unreadable == 1
        if num_workers == 0:
            assert len(caught) == (1 if times == 0 else 0)


def test_decoding_check_finds_truncated_images_at_once(folder):
    truncate(folder / "train" / "bird" / "3.png")
    with pytest.warns(UnreadableImageWarning, match=r"bird.3\.png"):
        split = create_dataset(f"folder:{folder}", image_size=8, check="decode").splits["train"]
    assert split.unreadable == 1


@pytest.mark.filterwarnings("ignore::m2mkd_fast.data.picture_split.UnreadableImageWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_damaged_images_stop_the_training(folder, num_workers):
    for i in range(3):
        truncate(folder / "train" / "dog" / f"{i}.png")
    split = create_dataset(f"folder:{folder}", image_size=8, max_unreadable=2).splits["train"]
    message = r"^cannot read image .*dog.*; with it 3 images are unreadable and max_unreadable=2"
    with pytest.raises(M2MKDError, match=message):
        list(train_batches(split, batch_size=6, seed=0, stop=2, num_workers=num_workers))


@pytest.mark.filterwarnings("ignore::m2mkd_fast.data.picture_split.UnreadableImageWarning")
def test_no_readable_image_at_all(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    split = create_dataset(f"folder:{folder}", image_size=8, max_unreadable=100).splits["train"]
    with pytest.raises(M2MKDError, match=r"none of its 12 images can be read"):
        next(train_batches(split, batch_size=2, seed=0, stop=1))
    assert list(eval_batches(split, 4)) == []


def test_missing_folders(folder, tmp_path):
    with pytest.raises(M2MKDError, match=r"pts does not exist; expected train/<class>/<image>.* did you mean .*pets\?"):
        create_dataset(f"folder:{tmp_path / 'pts'}")
    with pytest.raises(M2MKDError, match=rf"{tmp_path} exists\."):
        create_dataset(f"folder:{tmp_path / 'zzz' / 'qqq'}")
    (tmp_path / "pets.zip").touch()
    with pytest.raises(M2MKDError, match=r"pets.zip is a file; .* .unpack an archive first"):
        create_dataset(f"folder:{tmp_path / 'pets.zip'}")
    (folder / "val").rename(folder / "valid")
    with pytest.raises(M2MKDError, match=r"has no folder val or test; expected .*; it has: train, valid"):
        create_dataset(f"folder:{folder}")
    with pytest.raises(M2MKDError, match=r"has no folder train"):
        create_dataset(f"folder:{folder / 'train'}")


def test_wrong_class_folders(folder):
    (folder / "train" / "cow").mkdir()
    with pytest.raises(M2MKDError, match=r"1 class\(es\) in .*train without an image: cow; add images"):
        create_dataset(f"folder:{folder}")
    (folder / "train" / "cow" / "notes.txt").touch()
    with pytest.raises(M2MKDError, match=r"without an image: cow"):
        create_dataset(f"folder:{folder}")
    write_image(folder / "train" / "cow" / "0.png", 0)
    write_image(folder / "val" / "eel" / "0.png", 0)
    with pytest.raises(M2MKDError, match=r"differ, 1 only for training: cow; 1 only for testing: eel; both need"):
        create_dataset(f"folder:{folder}")


def test_flat_folders(tmp_path):
    write_image(tmp_path / "train" / "0.png", 0)
    (tmp_path / "val").mkdir()
    with pytest.raises(M2MKDError, match=r"train has no class folders; expected train/<class>/<image>"):
        create_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_chans": 4}, r"in_chans=4: .* 3 channels \(RGB\) or 1"),
        ({"image_size": -1}, r"image_size=-1"),
        ({"crop_fraction": 1.5}, r"crop_fraction=1.5"),
        ({"max_unreadable": -1}, r"max_unreadable=-1"),
        ({"check": "all"}, r"check='all': one of 'header'"),
        ({"mean": (0.5,)}, r"3 channel\(s\) but 1 mean\(s\) and 3 standard deviation\(s\)"),
    ],
)
def test_wrong_options(folder, option, message):
    with pytest.raises(M2MKDError, match=message):
        create_dataset(f"folder:{folder}", **option)
