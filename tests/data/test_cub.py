from __future__ import annotations

import pytest
from pictures import reds, write_picture

from m2mkd_fast.data import create_dataset, eval_batches
from m2mkd_fast.errors import M2MKDError

CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@pytest.fixture
def cub(tmp_path):
    """Images 1 to 8 of two classes in turn; every fourth is for testing."""
    root = tmp_path / "CUB_200_2011"
    images, labels, parts = [], [], []
    for number in range(1, 9):
        label = (number - 1) % 2
        name = f"{CLASSES[label]}/Bird_{number:04d}.jpg"
        write_picture(root / "images" / name, 20 * number)
        images.append(f"{number} {name}\n")
        labels.append(f"{number} {label + 1}\n")
        parts.append(f"{number} {int(number <= 4)}\n")
    tables = {"images": images, "image_class_labels": labels, "train_test_split": parts}
    tables["classes"] = [f"{label} {name}\n" for label, name in enumerate(CLASSES, start=1)]
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def test_published_layout(cub):
    dataset = create_dataset(f"cub:{cub}", image_size=4, mean=(0,) * 3, std=(1,) * 3)
    assert dataset.class_names == list(CLASSES)
    for split, numbers in (("train", (1, 2, 3, 4)), ("test", (5, 6, 7, 8))):
        images, labels = next(eval_batches(dataset.splits[split], 8))
        assert labels.tolist() == [(number - 1) % 2 for number in numbers]
        assert reds(images) == pytest.approx([20 * number for number in numbers], abs=3)


def test_few_shot_tests_on_other_pictures(cub):
    dataset = create_dataset(f"cub:{cub}", few_shot={"ways": 2, "shots": 2, "queries": 1}, seed=3)
    files = {split: set(dataset.splits[split].pictures.paths) for split in ("train", "test")}
    assert (len(files["train"]), len(files["test"])) == (4, 2)
    assert not files["train"] & files["test"]


def test_tables_that_do_not_fit(cub):
    labels = cub / "image_class_labels.txt"
    whole = labels.read_text()
    for wrong, message in (("3 bird\n", r"image 3 has class 'bird'"), ("3 7\n", r"image 3 is of class 7; .* has 2")):
        labels.write_text(whole.replace("3 1\n", wrong))
        with pytest.raises(M2MKDError, match=message):
            create_dataset(f"cub:{cub}")
    labels.write_text(whole)
    (cub / "images" / CLASSES[0] / "Bird_0001.jpg").unlink()
    with pytest.raises(M2MKDError, match=r"images.txt names .*Bird_0001.jpg, which does not exist"):
        create_dataset(f"cub:{cub}")
    parts = cub / "train_test_split.txt"
    parts.write_text(parts.read_text().replace("3 1\n", ""))
    with pytest.raises(M2MKDError, match=r"images.txt has image 3 and train_test_split.txt does not; unpack"):
        create_dataset(f"cub:{cub}")
    parts.write_text("1\n")
    with pytest.raises(M2MKDError, match=r"train_test_split.txt line 1: expected two words, got '1'"):
        create_dataset(f"cub:{cub}")
    parts.unlink()
    with pytest.raises(M2MKDError, match=r"train_test_split.txt does not exist; expected CUB_200_2011 as published"):
        create_dataset(f"cub:{cub}")
