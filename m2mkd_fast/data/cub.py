"""Caltech-UCSD Birds-200-2011 as it is published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset, require_file, require_folder
from m2mkd_fast.data.picture_split import ImageFiles
from m2mkd_fast.errors import M2MKDError

LAYOUT = (
    "expected CUB_200_2011 as published: images/<class>/*.jpg, images.txt, image_class_labels.txt, "
    "train_test_split.txt and classes.txt"
)


def create_cub(path: str, options: PictureOptions) -> ImageDataset:
    """200 species of birds in 11,788 pictures, divided as published into 5,994 for training and 5,794 for testing.

    `path` is the folder CUB_200_2011. Tasks of few classes and pictures: `few_shot={"ways": 8, "shots": 5}`.

    Raises M2MKDError when a file is missing, or one names an image that another or the folder does not.

    Source: C. Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001.
    """
    root = Path(path).expanduser()
    require_folder(root, "the folder of CUB-200-2011", LAYOUT)
    names = [name for _, name in _pairs(root / "classes.txt")]
    labels = _labels(root / "image_class_labels.txt")
    training = {image: flag == "1" for image, flag in _pairs(root / "train_test_split.txt")}
    files: dict[str, list[Path]] = {"train": [], "test": []}
    classes: dict[str, list[int]] = {"train": [], "test": []}
    for image, file in _pairs(root / "images.txt"):
        for table, content in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
            if image not in content:
                raise M2MKDError(
                    f"{root / 'images.txt'} has image {image} and {table} does not; unpack the archive anew"
                )
        if not 0 <= labels[image] < len(names):
            raise M2MKDError(f"image {image} is of class {labels[image] + 1}; {root / 'classes.txt'} has {len(names)}")
        split = "train" if training[image] else "test"
        files[split].append(root / "images" / file)
        classes[split].append(labels[image])
    for split, paths in files.items():
        missing = next((file for file in paths if not file.is_file()), None)
        if missing is not None:
            raise M2MKDError(f"{root / 'images.txt'} names {missing}, which does not exist; unpack the archive anew")
        if not paths:
            raise M2MKDError(f"{root / 'train_test_split.txt'} leaves no image to the split {split!r}; {LAYOUT}")
    pictures = {split: (ImageFiles(files[split]), torch.tensor(classes[split], dtype=torch.int64)) for split in files}
    return make_picture_dataset(f"cub:{path}", names, pictures, options)


def _labels(path: Path) -> dict[str, int]:
    """Each image's class, from 0 on."""
    labels = {}
    for image, label in _pairs(path):
        if not label.isdecimal():
            raise M2MKDError(f"{path}: image {image} has class {label!r}; expected a number from 1 on")
        labels[image] = int(label) - 1
    return labels


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The two words of each line."""
    for number, line in enumerate(require_file(path, LAYOUT).read_text().splitlines(), start=1):
        words = line.split()
        if len(words) != 2:
            raise M2MKDError(f"{path} line {number}: expected two words, got {line!r}")
        yield words[0], words[1]
