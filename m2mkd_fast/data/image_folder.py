"""Images in folders: one folder per class, or Tiny-ImageNet as it is published."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_fast.data.file_split import FileSplit, UnreadableImages
from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.subset import check_num_classes, choose_images
from m2mkd_fast.errors import M2MKDError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
OOD_LAYOUT = "expected <class>/<image>"
LAYOUT = "expected train/<class>/<image> and val/<class>/<image> (or test/<class>/<image>)"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)

Files = dict[str, list[Path]]  # class name -> its image files


def create_image_folder(
    path: str,
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    images_per_class: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_fraction: float | None = None,
    max_unreadable: int = 10,
    check: str = "header",
    ood: str | Path | None = None,
) -> ImageDataset:
    """Images under `path`: train/<class>/*, and val/<class>/* or test/<class>/*, or the layout of Tiny-ImageNet
    (train/<wnid>/images/*, val/images/*, val/val_annotations.txt). Classes are numbered in the order of their names.

    Args:
        path: the folder; "~" is expanded.
        image_size: side of the square images; default 224, for Tiny-ImageNet 64.
        in_chans: 3 (default, RGB) or 1 (grey).
        seed: draws which `images_per_class` are kept.
        num_classes: keep the first so many classes.
        images_per_class: keep so many training images of each class.
        mean, std: one value per channel for pixels in [0, 1]; default ImageNet's.
        crop_fraction: share of the resized image's shorter side that is kept; default 0.875, for Tiny-ImageNet 1.
        max_unreadable: so many images that cannot be decoded are skipped, each with a warning; one more is an error.
        check: how to look for them at once: "header" opens every file, "decode" reads its pixels, "none" waits until
            an image is used.
        ood: a folder <class>/* whose classes are some of the training classes (as ImageNet-R's), or a folder "ood"
            under `path`, becomes the split "ood".

    Raises M2MKDError before any image is decoded when the folder is missing or laid out otherwise, a class has no
    image, or the classes for training and testing differ.
    """
    root = Path(path).expanduser()
    _require_folder(root, "dataset folder", LAYOUT)
    tiny = (root / "val" / "val_annotations.txt").is_file()
    size, channels = image_size or (64 if tiny else 224), in_chans or 3
    fraction = crop_fraction or (1.0 if tiny else 0.875)
    _check_options(size, channels, fraction, max_unreadable, check)

    files = _find_tiny_imagenet(root) if tiny else _find_classes(root)
    ood_root = Path(ood).expanduser() if ood is not None else root / "ood"
    if ood is not None:
        _require_folder(ood_root, "ood folder", OOD_LAYOUT)
    if ood_root.is_dir():
        files["ood"] = _class_files(ood_root, OOD_LAYOUT)
    names = sorted(files["train"])
    _check_same_classes(files, root)
    names = names[: check_num_classes(root.name, num_classes, len(names))]

    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    listed = {}
    for split, classes in files.items():
        paths, labels = _flatten(classes, names)
        if split == "train" and images_per_class is not None:
            kept = choose_images(
                root.name, labels, num_classes=len(names), images_per_class=images_per_class, seed=seed
            )
            paths, labels = [paths[i] for i in kept.tolist()], labels[kept]
        if not paths:
            raise M2MKDError(f"the {split} folder has no image of the {len(names)} classes kept; raise num_classes")
        listed[split] = (paths, labels)
    unreadable = UnreadableImages(sum(len(paths) for paths, _ in listed.values()), max_unreadable)
    splits, offset = {}, 0
    for split, (paths, labels) in listed.items():
        splits[split] = FileSplit(
            split,
            paths,
            labels,
            len(names),
            (channels, size, size),
            default_mean if mean is None else mean,
            default_std if std is None else std,
            crop_fraction=fraction,
            unreadable_images=unreadable,
            offset=offset,
        )
        offset += len(paths)
        if check != "none":
            splits[split].check(decode=check == "decode")
    facts = {"layout": "tiny-imagenet" if tiny else "class folders", "crop_fraction": fraction}
    return ImageDataset(f"folder:{path}", names, splits, facts)


def _check_options(size: int, channels: int, fraction: float, max_unreadable: int, check: str) -> None:
    if size < 1:
        raise M2MKDError(f"image_size={size}: it must be positive")
    if channels not in (1, 3):
        raise M2MKDError(f"in_chans={channels}: images in folders have 3 channels (RGB) or 1 (grey)")
    if not 0 < fraction <= 1:
        raise M2MKDError(f"crop_fraction={fraction}: more than 0, at most 1")
    if max_unreadable < 0:
        raise M2MKDError(f"max_unreadable={max_unreadable}: 0 or more")
    if check not in ("header", "decode", "none"):
        raise M2MKDError(f"check={check!r}: one of 'header', 'decode', 'none'")


def _require_folder(folder: Path, what: str, layout: str) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise M2MKDError(f"{what} {folder} is a file; {layout} in a folder (unpack an archive first)")
    parent = folder.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    here = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(folder.name, here, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(str(parent / name) for name in near)}?" if near else f"{parent} exists."
    raise M2MKDError(f"{what} {folder} does not exist; {layout} in it; {hint}")


def _images_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if entry.suffix.lower() in EXTENSIONS)


def _class_files(folder: Path, layout: str) -> Files:
    classes = {entry.name: _images_in(entry) for entry in sorted(folder.iterdir()) if entry.is_dir()}
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
    return {"train": _class_files(root / "train", LAYOUT), "test": _class_files(test, LAYOUT)}


def _find_tiny_imagenet(root: Path) -> dict[str, Files]:
    annotations = root / "val" / "val_annotations.txt"
    _require_folder(root / "train", "Tiny-ImageNet's folder", LAYOUT)
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
        test.setdefault(columns[1], []).append(image)
    return {"train": _class_files(root / "train", LAYOUT), "test": test}


def _check_same_classes(files: dict[str, Files], root: Path) -> None:
    train, test = set(files["train"]), set(files["test"])
    problems = []
    for what, names in (("only for training", train - test), ("only for testing", test - train)):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''}")
    if problems:
        raise M2MKDError(f"the classes of {root} differ, {'; '.join(problems)}; both need the same class folders")
    foreign = sorted(set(files.get("ood", ())) - train)
    if foreign:
        raise M2MKDError(f"the ood folder has {len(foreign)} class(es) not trained on: {', '.join(foreign[:5])}")


def _flatten(classes: Files, names: list[str]) -> tuple[list[Path], Tensor]:
    paths, labels = [], []
    for label, name in enumerate(names):
        images = classes.get(name, [])
        paths += images
        labels += [label] * len(images)
    return paths, torch.tensor(labels, dtype=torch.int64)
