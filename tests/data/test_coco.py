from __future__ import annotations

import json

import numpy as np
import pytest
from pictures import reds
from PIL import Image

from m2mkd_fast.data import create_dataset, eval_batches, train_batches
from m2mkd_fast.errors import M2MKDError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
PLAIN = {"image_size": 8, "crop_fraction": 1.0, "mean": (0,) * 3, "std": (1,) * 3}


def annotation(image, category, box, **more):
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}


@pytest.fixture
def coco(tmp_path):
    """Each part has one picture of 100 x 80, black but for a red square [20, 60) x [10, 50)."""
    for part in ("train2017", "val2017"):
        pixels = np.zeros((80, 100, 3), dtype=np.uint8)
        pixels[10:50, 20:60, 0] = 200
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "000000000009.png")
        objects = [
            annotation(9, 18, [20.0, 10.0, 40.0, 40.0]),
            annotation(9, 1, [60.2, 0.0, 39.8, 80.0]),
            annotation(9, 1, [0.0, 0.0, 31.9, 80.0]),  # too narrow
            annotation(9, 1, [0.0, 0.0, 100.0, 80.0], iscrowd=1),
        ]
        images = [{"id": 9, "file_name": "000000000009.png", "width": 100, "height": 80}]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "categories": CATEGORIES, "annotations": objects}
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return tmp_path


def test_objects_are_cut_out(coco):
    dataset = create_dataset(f"coco:{coco}", margin=0.0, **PLAIN)
    assert dataset.class_names == ["person", "dog"]  # in the order of the ids
    images, labels = next(eval_batches(dataset.splits["test"], 8))
    assert labels.tolist() == [1, 0]
    assert reds(images) == [200, 0]
    assert images[0, 0].min() > 0.75  # nothing but the square
    assert dataset.splits["test"].pictures.boxes.tolist() == [[20, 10, 60, 50], [60, 0, 100, 80]]


def test_margins_stay_within_the_picture(coco):
    dataset = create_dataset(f"coco:{coco}", margin=0.5, min_side=20, **PLAIN)
    boxes = dataset.splits["train"].pictures.boxes.tolist()
    assert boxes == [[0, 0, 80, 70], [40, 0, 100, 80], [0, 0, 48, 80]]
    assert len(list(train_batches(dataset.splits["train"], batch_size=4, seed=0, stop=2, augmentation="timm"))) == 2
    smaller = create_dataset(f"coco:{coco}", margin=0.0, **PLAIN)
    assert smaller.describe()["content_hash"] != dataset.describe()["content_hash"]


def test_errors_say_what_is_expected(coco):
    with pytest.raises(M2MKDError, match=r"no object at least 90 pixels wide and high; lower min_side"):
        create_dataset(f"coco:{coco}", min_side=90)
    with pytest.raises(M2MKDError, match=r"min_side=0, margin=0.1"):
        create_dataset(f"coco:{coco}", min_side=0)
    with pytest.raises(M2MKDError, match=r"train2014 does not exist; expected annotations/instances_train2017.json"):
        create_dataset(f"coco:{coco}", year=2014)
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "categories": [*CATEGORIES, {"id": 2, "name": "bicycle"}]}))
    with pytest.raises(M2MKDError, match=r"annotations have different categories for training and testing"):
        create_dataset(f"coco:{coco}")
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(M2MKDError, match=r"val2017.json is not COCO's \(KeyError: 'categories'\)"):
        create_dataset(f"coco:{coco}")
    file.unlink()
    with pytest.raises(M2MKDError, match=r"instances_val2017.json does not exist; .* has: instances_train2017.json"):
        create_dataset(f"coco:{coco}")
