"""ImageNet and Tiny-ImageNet as they are published, with the renditions of ImageNet-R as out-of-distribution split."""

from __future__ import annotations

import csv
from pathlib import Path

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.image_folder import Files, check_same_classes, class_files, flatten, tiny_imagenet_files
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset, require_file, require_folder
from m2mkd_fast.errors import M2MKDError

LAYOUT = "expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or val/*.JPEG with its ground truth"
TRUTH = (
    "meta.bin (torchvision), LOC_val_solution.csv (Kaggle) or ILSVRC2012_devkit_t12/data (meta.mat and "
    "ILSVRC2012_validation_ground_truth.txt)"
)
TINY_LAYOUT = "expected train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"
RENDITIONS_LAYOUT = "expected <wnid>/* as ImageNet-R and Tiny-ImageNet-R are published"


def create_imagenet(
    path: str,
    options: PictureOptions,
    *,
    val_truth: str | Path | None = None,
    imagenet_r: str | Path | None = None,
) -> ImageDataset:
    """ImageNet-1k, ILSVRC 2012: train/<wnid>/* and val/<wnid>/*, classes numbered in the order of their wnids.

    A flat folder val/*.JPEG is taken with one of the published files that say of which class its images are: they are
    looked for in `path`. Folders of fewer of the 1000 classes (ImageNet-100, say) do as well.

    Args:
        path: the folder that has train and val.
        options: see `PictureOptions`; images are 224 x 224.
        val_truth: the file or folder with the classes of a flat val: meta.bin, LOC_val_solution.csv or the devkit's
            folder data.
        imagenet_r: the folder of ImageNet-R, <wnid>/*; becomes the split "ood". Its 200 classes keep their numbers
            among the 1000; `split.class_mask` is the mask of the logits to choose from, as published.

    Raises M2MKDError when a folder is missing or laid out otherwise, or is not of ImageNet's classes.

    Sources: O. Russakovsky et al., arXiv 1409.0575; D. Hendrycks et al., arXiv 2006.16241.
    """
    root = Path(path).expanduser()
    require_folder(root, "ImageNet's folder", LAYOUT)
    for name in ("train", "val"):
        require_folder(root / name, "ImageNet's folder", LAYOUT)
    train = class_files(root / "train", LAYOUT)
    foreign = sorted(set(train) - _wnids("imagenet"))
    if foreign:
        raise M2MKDError(
            f"{root / 'train'} has {len(foreign)} folder(s) that are no class of ImageNet-1k: "
            f"{', '.join(foreign[:5])}; expected wnids such as n01440764; for other classes use 'folder:{path}'"
        )
    flat = not any(entry.is_dir() for entry in (root / "val").iterdir())
    test = _flat_validation(root, val_truth) if flat else class_files(root / "val", LAYOUT)
    return _dataset(f"imagenet:{path}", root, {"train": train, "test": test}, imagenet_r, options, 224, 0.875)


def create_tiny_imagenet(path: str, options: PictureOptions, *, imagenet_r: str | Path | None = None) -> ImageDataset:
    """Tiny-ImageNet: train/<wnid>/images/*, val/images/* and val/val_annotations.txt, 200 classes of 64 x 64 pixels.

    Args:
        path: the folder tiny-imagenet-200.
        options: see `PictureOptions`. Evaluation takes whole images; the published trainer enlarges them to 73 pixels
            and crops 64, which is `crop_fraction=0.875`.
        imagenet_r: the folder of Tiny-ImageNet-R or of ImageNet-R, <wnid>/*; becomes the split "ood" of the 62 classes
            that the two have in common, which `split.class_mask` marks.

    Raises M2MKDError when a folder is missing or laid out otherwise.

    Sources: Y. Le and X. Yang, Tiny ImageNet Visual Recognition Challenge, 2015; Tiny-ImageNet-R: M. Weiss et al.,
    arXiv 2210.08031.
    """
    root = Path(path).expanduser()
    require_folder(root, "Tiny-ImageNet's folder", TINY_LAYOUT)
    require_file(root / "val" / "val_annotations.txt", TINY_LAYOUT)
    files = tiny_imagenet_files(root, TINY_LAYOUT)
    return _dataset(f"tiny-imagenet:{path}", root, files, imagenet_r, options, 64, 1.0)


def _dataset(
    name: str,
    root: Path,
    files: dict[str, Files],
    imagenet_r: str | Path | None,
    options: PictureOptions,
    image_size: int,
    crop_fraction: float,
) -> ImageDataset:
    check_same_classes(files, root)
    names = sorted(files["train"])
    facts = {}
    if imagenet_r is not None:
        files["ood"] = _renditions(Path(imagenet_r).expanduser(), names)
        facts["ood_classes"] = len(files["ood"])
    return make_picture_dataset(
        name,
        names,
        {split: flatten(classes, names) for split, classes in files.items()},
        options,
        image_size=image_size,
        crop_fraction=crop_fraction,
        facts=facts,
    )


def _wnids(name: str) -> set[str]:
    """The published classes of "imagenet" or "imagenet_r", from the lists that timm comes with."""
    import timm.data

    return set((Path(timm.data.__file__).parent / "_info" / f"{name}_synsets.txt").read_text().split())


def _renditions(root: Path, names: list[str]) -> Files:
    """The images of ImageNet-R of the classes in `names`: all classes that the two have in common must be there."""
    require_folder(root, "the folder of ImageNet-R", RENDITIONS_LAYOUT)
    files, published = class_files(root, RENDITIONS_LAYOUT), _wnids("imagenet_r")
    foreign = sorted(set(files) - published)
    if foreign:
        raise M2MKDError(
            f"{root} has {len(foreign)} folder(s) that are no class of ImageNet-R: {', '.join(foreign[:5])}; "
            f"{RENDITIONS_LAYOUT}"
        )
    common = published & set(names)
    if not common:
        raise M2MKDError(f"none of the {len(names)} classes trained on is among the {len(published)} of ImageNet-R")
    missing = sorted(common - set(files))
    if missing:
        raise M2MKDError(
            f"{root} lacks {len(missing)} of the {len(common)} classes that ImageNet-R shares with the training "
            f"images: {', '.join(missing[:5])}; unpack the whole archive"
        )
    return {wnid: files[wnid] for wnid in sorted(common)}


def _flat_validation(root: Path, truth: str | Path | None) -> Files:
    """The images val/ILSVRC2012_val_<number>.JPEG by class."""
    images = sorted(entry for entry in (root / "val").iterdir() if entry.suffix.lower() in (".jpeg", ".jpg"))
    if not images:
        raise M2MKDError(f"{root / 'val'} has neither class folders nor images; {LAYOUT}")
    wnids = _read_truth(root, truth)
    if isinstance(wnids, list):
        if len(wnids) != len(images):
            raise M2MKDError(f"the ground truth names {len(wnids)} images and {root / 'val'} has {len(images)}")
        wnids = {image.stem: wnid for image, wnid in zip(images, wnids, strict=True)}
    files: Files = {}
    for image in images:
        if image.stem not in wnids:
            raise M2MKDError(f"the ground truth does not name {image.name}, which is in {root / 'val'}")
        files.setdefault(wnids[image.stem], []).append(str(image))
    return files


def _read_truth(root: Path, truth: str | Path | None) -> list[str] | dict[str, str]:
    """The wnids of the validation images, in the order of their names or by name."""
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    known = [root / "meta.bin", root / "LOC_val_solution.csv", devkit]
    path = next((place for place in known if place.exists()), None) if truth is None else Path(truth).expanduser()
    if path is None:
        raise M2MKDError(
            f"{root / 'val'} has no class folders, and the file that says of which class its images are is not in "
            f"{root}: {TRUTH}. Put one there, name it with val_truth=, or sort the images into val/<wnid>/"
        )
    read = _read_devkit if path.is_dir() else _read_solution if path.suffix == ".csv" else _read_meta
    try:
        return read(path if path.is_dir() else require_file(path, f"expected {TRUTH}"))
    except M2MKDError:
        raise
    except Exception as error:  # the readers of three formats raise nearly anything for what is not theirs
        reason = f"{type(error).__name__}: {str(error).partition('.')[0]}"
        raise M2MKDError(f"{path} is not as published ({reason}); expected {TRUTH}") from error


def _read_meta(path: Path) -> list[str]:
    import torch

    _, wnids = torch.load(path, weights_only=True)
    return list(wnids)


def _read_solution(path: Path) -> dict[str, str]:
    with open(path, newline="") as file:
        # PredictionString: the wnid, then the corners of a box, as often as there are objects, all of one class.
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}


def _read_devkit(folder: Path) -> list[str]:
    from scipy.io import loadmat

    layout = f"expected {TRUTH}"
    synsets = loadmat(require_file(folder / "meta.mat", layout), squeeze_me=True)["synsets"]
    # The inner nodes of WordNet are listed behind the 1000 classes; they have children.
    leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    lines = require_file(folder / "ILSVRC2012_validation_ground_truth.txt", layout).read_text().split()
    return [leaves[int(line)] for line in lines]
