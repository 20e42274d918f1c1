"""The objects of COCO, cut out by their boxes, as images to classify."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_dataset import PictureOptions, make_picture_dataset, require_file, require_folder
from m2mkd_fast.data.picture_split import PictureSource
from m2mkd_fast.errors import M2MKDError

LAYOUT = "expected annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/"


def create_coco(
    path: str, options: PictureOptions, *, year: int = 2017, min_side: int = 32, margin: float = 0.1
) -> ImageDataset:
    """The annotated objects of COCO as images to classify: train<year> for training, val<year> for testing.

    This is not the published downstream task (detection and segmentation with Mask R-CNN): each object is cut out by
    its box and becomes one image, so that a classifier can be trained on COCO's pictures. Crowds (iscrowd) are left
    out. The 80 categories are numbered in the order of their ids.

    Args:
        path: the folder with annotations, train<year> and val<year>.
        options: see `PictureOptions`.
        year: of the annotations and folders, 2017 or 2014.
        min_side: in pixels; objects whose box is narrower or lower are left out.
        margin: added to each side of a box, as a share of its width and height, as far as the picture reaches.

    Raises M2MKDError when a folder or file is missing, or the annotations are not COCO's.

    Source: T.-Y. Lin et al., arXiv 1405.0312.
    """
    root = Path(path).expanduser()
    require_folder(root, "the folder of COCO", LAYOUT)
    if min_side < 1 or margin < 0:
        raise M2MKDError(f"min_side={min_side}, margin={margin}: at least 1 pixel, and 0 or more")
    pictures, categories = {}, {}
    for split, part in (("train", f"train{year}"), ("test", f"val{year}")):
        require_folder(root / part, "COCO's folder", LAYOUT)
        annotations = require_file(root / "annotations" / f"instances_{part}.json", LAYOUT)
        pictures[split], categories[split] = _read(annotations, root / part, min_side, margin)
    if categories["train"] != categories["test"]:
        raise M2MKDError(
            f"the annotations in {root / 'annotations'} have different categories for training and testing"
        )
    facts = {"objects": "cut out by their boxes", "min_side": min_side, "margin": margin}
    return make_picture_dataset(f"coco:{path}", categories["train"], pictures, options, facts=facts)


class Crops(PictureSource):
    """Parts of image files: part n is `boxes[n]` (left, top, right, bottom) of `names[files[n]]` in `folder`."""

    def __init__(self, folder: Path, names: list[str], files: Tensor, boxes: Tensor) -> None:
        self.folder, self.names, self.files, self.boxes = folder, names, files, boxes

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.name(index))

    def box(self, index: int) -> tuple[int, int, int, int]:
        left, top, right, bottom = self.boxes[index].tolist()
        return left, top, right, bottom

    def name(self, index: int) -> str:
        return str(self.folder / self.names[int(self.files[index])])

    def identities(self) -> Iterator[str]:
        """With the boxes; the files' sizes are left out: each would be asked for once an object."""
        return (f"{self.names[int(self.files[index])]}/{self.box(index)}" for index in range(len(self)))

    def subset(self, indices: Tensor) -> Crops:
        return Crops(self.folder, self.names, self.files[indices], self.boxes[indices])


def _read(path: Path, folder: Path, min_side: int, margin: float) -> tuple[tuple[Crops, Tensor], list[str]]:
    try:
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        place_of = {image["id"]: place for place, image in enumerate(content["images"])}
        objects = [_object(content, entry, place_of, label_of, margin) for entry in content["annotations"]
                   if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= min_side]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise M2MKDError(
            f"{path} is not COCO's ({type(error).__name__}: {error}); expected a JSON object with images, categories "
            "and annotations"
        ) from error
    if not objects:
        raise M2MKDError(f"{path} has no object at least {min_side} pixels wide and high; lower min_side")
    table = torch.from_numpy(np.array(objects, dtype=np.int64))
    crops = Crops(folder, [image["file_name"] for image in content["images"]], table[:, 0], table[:, 1:5])
    return (crops, table[:, 5].clone()), [category["name"] for category in categories]


def _object(
    content: dict[str, Any], entry: dict[str, Any], place_of: dict[int, int], label_of: dict[int, int], margin: float
) -> tuple[int, int, int, int, int, int]:
    """Place of the image in the list of them, the box with its margin within the picture, label."""
    place = place_of[entry["image_id"]]
    left, top, width, height = entry["bbox"]
    image = content["images"][place]
    return (
        place,
        max(math.floor(left - margin * width), 0),
        max(math.floor(top - margin * height), 0),
        min(math.ceil(left + (1 + margin) * width), image["width"]),
        min(math.ceil(top + (1 + margin) * height), image["height"]),
        label_of[entry["category_id"]],
    )
