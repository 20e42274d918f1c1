from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import timm.data
import torch
from pictures import reds, write_picture
from torch import nn

from m2mkd_fast.data import create_dataset, eval_batches
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.evaluate import evaluate_accuracy
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.workbench import Workbench

INFO = Path(timm.data.__file__).parent / "_info"
IMAGENET = (INFO / "imagenet_synsets.txt").read_text().split()
RENDITIONS = (INFO / "imagenet_r_synsets.txt").read_text().split()
OTHERS = [wnid for wnid in IMAGENET if wnid not in RENDITIONS]
WNIDS = sorted([*RENDITIONS[:2], *OTHERS[:2]])  # two classes of four are among ImageNet-R's
PLAIN = {"image_size": 4, "mean": (0,) * 3, "std": (1,) * 3}


def make_train(root):
    for label, wnid in enumerate(WNIDS):
        for i in range(2):
            write_picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", 50 * label + 10 * i)


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    make_train(root)
    for label, wnid in enumerate(WNIDS):
        write_picture(root / "val" / wnid / f"ILSVRC2012_val_0000000{label}.JPEG", 50 * label + 30)
    return root


@pytest.fixture
def flat_imagenet(tmp_path):
    """val/ as the archive has it: image n of class 3 - n."""
    root = tmp_path / "flat"
    make_train(root)
    for n in range(4):
        write_picture(root / "val" / f"ILSVRC2012_val_0000000{n + 1}.JPEG", 50 * (3 - n) + 30)
    return root


@pytest.fixture
def tiny_imagenet(tmp_path):
    """200 classes, of which ImageNet-R has 62, as in Tiny-ImageNet; one image each."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = sorted([*RENDITIONS[:62], *OTHERS[:138]])
    lines = []
    (root / "val" / "images").mkdir(parents=True)
    picture = None
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        if picture is None:
            write_picture(folder / f"{wnid}_0.JPEG", 90, (64, 64))
            picture = (folder / f"{wnid}_0.JPEG").read_bytes()
        (folder / f"{wnid}_0.JPEG").write_bytes(picture)
        (root / "val" / "images" / f"val_{label}.JPEG").write_bytes(picture)
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)))
    return root


def test_class_folders(imagenet):
    dataset = create_dataset(f"imagenet:{imagenet}", **PLAIN)
    assert dataset.class_names == WNIDS
    images, labels = next(eval_batches(dataset.splits["test"], 8))
    assert labels.tolist() == [0, 1, 2, 3]
    assert reds(images) == pytest.approx([30, 80, 130, 180], abs=2)
    assert len(dataset.splits["train"]) == 8
    assert create_dataset(f"imagenet:{imagenet}").image_shape == (3, 224, 224)


def devkit(folder):
    ids = {wnid: 10 + place for place, wnid in enumerate(reversed(WNIDS))}  # ILSVRC's own order, not that of the wnids
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in ids.items()] + [(99, "n00001740", "entity", "", 4)]
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
    truth = "".join(f"{ids[WNIDS[3 - n]]}\n" for n in range(4))
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def meta_bin(path):
    torch.save((dict.fromkeys(WNIDS, ("a name",)), [WNIDS[3 - n] for n in range(4)]), path)


def solution(path):
    rows = [f"ILSVRC2012_val_0000000{n + 1},{WNIDS[3 - n]} 1 2 3 4 {WNIDS[3 - n]} 5 6 7 8" for n in (2, 0, 3, 1)]
    path.write_text("ImageId,PredictionString\n" + "\n".join(rows))


@pytest.mark.parametrize(
    ("place", "write"),
    [("ILSVRC2012_devkit_t12/data", devkit), ("meta.bin", meta_bin), ("LOC_val_solution.csv", solution)],
    ids=["devkit", "torchvision", "kaggle"],
)
def test_flat_validation_folder(flat_imagenet, tmp_path, place, write):
    with pytest.raises(M2MKDError, match=r"no class folders, and the file .* is not in .*flat: meta.bin"):
        create_dataset(f"imagenet:{flat_imagenet}")
    elsewhere = tmp_path / "elsewhere" / place
    elsewhere.parent.mkdir(parents=True)
    write(elsewhere)
    write(flat_imagenet / place)
    for options in ({}, {"val_truth": elsewhere}):
        dataset = create_dataset(f"imagenet:{flat_imagenet}", **PLAIN, **options)
        images, labels = next(eval_batches(dataset.splits["test"], 8))
        assert labels.tolist() == [0, 1, 2, 3]
        assert reds(images) == pytest.approx([30, 80, 130, 180], abs=2)


def test_wrong_ground_truth(flat_imagenet):
    torch.save(({}, [WNIDS[0]] * 3), flat_imagenet / "meta.bin")
    with pytest.raises(M2MKDError, match=r"names 3 images and .*val has 4"):
        create_dataset(f"imagenet:{flat_imagenet}")
    (flat_imagenet / "meta.bin").write_bytes(b"nonsense")
    with pytest.raises(M2MKDError, match=r"meta.bin is not as published .*; expected meta.bin"):
        create_dataset(f"imagenet:{flat_imagenet}")
    truth = flat_imagenet / "LOC_val_solution.csv"
    truth.write_text("image,class\n1,2\n")
    with pytest.raises(M2MKDError, match=r"solution.csv is not as published \(KeyError: 'ImageId'\)"):
        create_dataset(f"imagenet:{flat_imagenet}", val_truth=truth)
    truth.write_text(f"ImageId,PredictionString\nILSVRC2012_val_00000001,{WNIDS[0]} 1 2 3 4\n")
    with pytest.raises(M2MKDError, match=r"does not name ILSVRC2012_val_00000002.JPEG"):
        create_dataset(f"imagenet:{flat_imagenet}", val_truth=truth)
    with pytest.raises(M2MKDError, match=r"truth.csv does not exist; expected meta.bin"):
        create_dataset(f"imagenet:{flat_imagenet}", val_truth=flat_imagenet / "truth.csv")


def test_wrong_folders(imagenet, tmp_path):
    with pytest.raises(M2MKDError, match=r"imagnet does not exist; expected train/<wnid>/.* did you mean .*imagenet"):
        create_dataset(f"imagenet:{tmp_path / 'imagnet'}")
    with pytest.raises(M2MKDError, match=r"train.train does not exist"):
        create_dataset(f"imagenet:{imagenet / 'train'}")
    with pytest.raises(M2MKDError, match=r"val_annotations.txt does not exist; expected train/<wnid>/images"):
        create_dataset(f"tiny-imagenet:{imagenet}")
    write_picture(imagenet / "train" / "cat" / "0.JPEG", 0)
    with pytest.raises(M2MKDError, match=r"1 folder\(s\) that are no class of ImageNet-1k: cat; .* use 'folder:"):
        create_dataset(f"imagenet:{imagenet}")
    with pytest.raises(UnknownNameError, match=r"'imagenet_a'; did you mean 'imagenet_r'"):
        create_dataset(f"imagenet:{imagenet}", imagenet_a=imagenet)


class RedToLogits(nn.Module):
    """Prefers class 3, which is none of ImageNet-R's here or is not: then the class that the red says."""

    def __init__(self, favourite):
        super().__init__()
        self.favourite = favourite

    def forward(self, images):
        red = 255 * images[:, 0].mean((1, 2))
        logits = -(red[:, None] - 50 * torch.arange(4)).abs()
        logits[:, self.favourite] = 1.0
        return logits


def test_renditions_are_judged_by_the_logits_of_their_classes(imagenet, tmp_path):
    """Without the mask a model that takes a rendition for a class that ImageNet-R has not is marked wrong."""
    for wnid in RENDITIONS[:3]:  # the third is not trained on
        write_picture(tmp_path / "imagenet-r" / wnid / "art_0.jpg", 50 * WNIDS.index(wnid) if wnid in WNIDS else 0)
    dataset = create_dataset(f"imagenet:{imagenet}", imagenet_r=tmp_path / "imagenet-r", **PLAIN)
    ood = dataset.splits["ood"]
    own = [WNIDS.index(wnid) for wnid in RENDITIONS[:2]]
    assert ood.labels.tolist() == own
    assert dataset.describe()["ood_classes"] == 2
    assert torch.nonzero(ood.class_mask).flatten().tolist() == own
    model = RedToLogits(favourite=WNIDS.index(OTHERS[0]))
    assert evaluate_accuracy(model, ood) == 0.0
    assert evaluate_accuracy(model, ood, class_mask=ood.class_mask) == 100.0
    bench = Workbench(make_config([{"device": "cpu"}]), tmp_path)
    bench.dataset = dataset
    assert bench.accuracies(model) == {
        "test_accuracy": 25.0,
        "ood_accuracy": 100.0,
    }  # test: its favourite's image alone


def test_tiny_imagenet_r_has_62_classes(tiny_imagenet, tmp_path):
    picture = next((tiny_imagenet / "val" / "images").iterdir()).read_bytes()
    for wnid in RENDITIONS:  # the whole of ImageNet-R, of which 62 classes are Tiny-ImageNet's
        (tmp_path / "r" / wnid).mkdir(parents=True)
        (tmp_path / "r" / wnid / "sketch_0.jpg").write_bytes(picture)
    dataset = create_dataset(f"tiny-imagenet:{tiny_imagenet}", imagenet_r=tmp_path / "r")
    assert dataset.num_classes == 200
    assert dataset.image_shape == (3, 64, 64)
    assert len(dataset.splits["ood"]) == 62
    assert [dataset.class_names[label] for label in dataset.splits["ood"].labels] == RENDITIONS[:62]
    assert int(dataset.splits["ood"].class_mask.sum()) == 62

    for wnid in RENDITIONS[62:]:  # Tiny-ImageNet-R as it is published
        (tmp_path / "r" / wnid / "sketch_0.jpg").unlink()
        (tmp_path / "r" / wnid).rmdir()
    same = create_dataset(f"tiny-imagenet:{tiny_imagenet}", imagenet_r=tmp_path / "r")
    assert same.describe()["content_hash"] == dataset.describe()["content_hash"]

    (tmp_path / "r" / RENDITIONS[5] / "sketch_0.jpg").unlink()
    (tmp_path / "r" / RENDITIONS[5]).rmdir()
    message = rf"lacks 1 of the 62 classes that ImageNet-R shares .*: {RENDITIONS[5]}; unpack the whole archive"
    with pytest.raises(M2MKDError, match=message):
        create_dataset(f"tiny-imagenet:{tiny_imagenet}", imagenet_r=tmp_path / "r")
    with pytest.raises(M2MKDError, match=r"that are no class of ImageNet-R: "):
        create_dataset(f"tiny-imagenet:{tiny_imagenet}", imagenet_r=tiny_imagenet / "train")
