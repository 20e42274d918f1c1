"""Images in folders: one folder per class, or Tiny-ImageNet as it is published."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset, require_folder
from m2mkd_fast.data.picture_split import ImageFiles
from m2mkd_fast.errors import M2MKDError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
OOD_LAYOUT = "expected <class>/<image>"
LAYOUT = "expected train/<class>/<image> and val/<class>/<image> (or test/<class>/<image>)"

Files = dict[str, list[str]]  # class name -> its image files


def create_image_folder(path: str, options: PictureOptions, *, ood: str | Path | None = None) -> ImageDataset:
    """Images under `path`: train/<class>/*, and val/<class>/* or test/<class>/*, or the layout of Tiny-ImageNet
    (train/<wnid>/images/*, val/images/*, val/val_annotations.txt). Classes are numbered in the order of their names.

    Args:
        path: the folder; "~" is expanded.
        options: see `PictureOptions`.
        ood: a folder <class>/* whose classes are some of the training classes (as ImageNet-R's), or a folder "ood"
            under `path`, becomes the split "ood".

    Raises M2MKDError before any image is decoded when the folder is missing or laid out otherwise, a class has no
    image, or the classes for training and testing differ.
    """
    root = Path(path).expanduser()
    require_folder(root, "dataset folder", LAYOUT)
    tiny = (root / "val" / "val_annotations.txt").is_file()
    files = tiny_imagenet_files(root, LAYOUT) if tiny else _find_classes(root)
    ood_root = Path(ood).expanduser() if ood is not None else root / "ood"
    if ood is not None:
        require_folder(ood_root, "ood folder", OOD_LAYOUT)
    if ood_root.is_dir():
        files["ood"] = class_files(ood_root, OOD_LAYOUT)
    check_same_classes(files, root)
    foreign = sorted(set(files.get("ood", ())) - set(files["train"]))
    if foreign:
        raise M2MKDError(f"the ood folder has {len(foreign)} class(es) not trained on: {', '.join(foreign[:5])}")
    names = sorted(files["train"])
    return make_picture_dataset(
        f"folder:{path}",
        names,
        {split: flatten(classes, names) for split, classes in files.items()},
        options,
        image_size=64 if tiny else 224,
        crop_fraction=1.0 if tiny else 0.875,
        check="header",
        facts={"layout": "tiny-imagenet" if tiny else "class folders"},
    )


def images_in(folder: Path) -> list[str]:
    """The image files in `folder` and the folders in it, in the order of their names."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.join(parent, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
    return sorted(found, key=lambda path: path.split(os.sep))


def class_files(folder: Path, layout: str) -> Files:
    """The images of each class folder in `folder`; an error where there is no class, or a class without an image."""
    classes = {entry.name: images_in(entry) for entry in sorted(folder.iterdir()) if entry.is_dir()}
    if not classes:
        raise M2MKDError(f"{folder} has no class folders; {layout}")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise M2MKDError(
            f"{len(empty)} class(es) in {folder} without an image: {', '.join(empty[:5])}"
            f"{', …' if len(empty) > 5 else ''}; add images ({', '.join(sorted(EXTENSIONS))}) or remove the folder(s)"
        )
    return classes


def _find_classes(root: Path) -> dict[str, Files]:
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        missing = "train" if not (root / "train").is_dir() else "val or test"
        found = sorted(entry.name for entry in root.iterdir())[:8]
        raise M2MKDError(f"{root} has no folder {missing}; {LAYOUT}; it has: {', '.join(found) or 'nothing'}")
    return {"train": class_files(root / "train", LAYOUT), "test": class_files(test, LAYOUT)}


def tiny_imagenet_files(root: Path, layout: str) -> dict[str, Files]:
    """Tiny-ImageNet's training and validation images, the latter with the classes of val/val_annotations.txt."""
    annotations = root / "val" / "val_annotations.txt"
    require_folder(root / "train", "Tiny-ImageNet's folder", layout)
    test: Files = {}
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        columns = line.split("\t")
        if len(columns) < 2:
            raise M2MKDError(
                f"{annotations} line {number}: expected a file name and a class, tab separated, got {line!r}"
            )
        image = root / "val" / "images" / columns[0]
        if not image.is_file():
            raise M2MKDError(f"{annotations} line {number} names {columns[0]}, which is not in {image.parent}")
        test.setdefault(columns[1], []).append(str(image))
    return {"train": class_files(root / "train", layout), "test": test}


def check_same_classes(files: dict[str, Files], root: Path) -> None:
    """Raise M2MKDError where training and testing images are not of the same classes."""
    train, test = set(files["train"]), set(files["test"])
    problems = []
    for what, names in (("only for training", train - test), ("only for testing", test - train)):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''}")
    if problems:
        raise M2MKDError(f"the classes of {root} differ, {'; '.join(problems)}; both need the same class folders")


def flatten(classes: Files, names: list[str]) -> tuple[ImageFiles, Tensor]:
    """All files, class after class, and their labels int64 [N]: the classes' places in `names`."""
    paths, labels = [], []
    for label, name in enumerate(names):
        images = classes.get(name, [])
        paths += images
        labels += [label] * len(images)
    return ImageFiles(paths), torch.tensor(labels, dtype=torch.int64)
