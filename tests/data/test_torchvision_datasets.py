from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch

from m2mkd_fast.data import create_dataset, train_batches
from m2mkd_fast.errors import M2MKDError, UnknownNameError


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Files in CIFAR-10's format with ten times as few images, and torchvision told of their checksums."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def images():
        return {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", images()) for i in (1, 2)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", images())])
    name, checksum = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path


def test_pixels_and_labels_are_torchvisions(cifar):
    from torchvision.datasets import CIFAR10

    dataset = create_dataset("torchvision:cifar10", root=cifar)
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.class_names[:2] == ["class 0", "class 1"]
    for name in ("train", "test"):
        source = CIFAR10(cifar, train=name == "train")
        split = dataset.splits[name]
        assert split.labels.tolist() == source.targets
        for index in (0, 7, 19):
            picture, label = split.picture(index)
            assert np.array_equal(np.array(picture), np.array(source[index][0]))
            assert label == source[index][1]
    images, _ = next(
        train_batches(dataset.splits["train"], batch_size=9, seed=0, stop=1, augmentation={"name": "timm"})
    )
    assert images.shape == (9, 3, 32, 32)


def test_sizes_channels_and_fewer_images(cifar):
    options = {"root": cifar, "num_classes": 3, "images_per_class": 2}
    colour = create_dataset("torchvision:cifar10", **options).splits["train"]
    grey = create_dataset("torchvision:cifar10", in_chans=1, **options).splits["train"]
    small = create_dataset("torchvision:cifar10", image_size=16, **options).splits["train"]
    assert torch.bincount(colour.labels).tolist() == [2, 2, 2]
    assert grey.pixels.shape == (6, 1, 32, 32)
    luminance = (colour.pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (grey.pixels - luminance).abs().max() <= 0.51
    assert small.pixels.shape == (6, 3, 16, 16)
    assert small.pixels.dtype == torch.uint8
    assert abs(small.pixels.float().mean() - colour.pixels.float().mean()) < 1


def test_errors(tmp_path):
    with pytest.raises(UnknownNameError, match=r"'cifar1O'; did you mean 'cifar10'"):
        create_dataset("torchvision:cifar1O")
    with pytest.raises(
        M2MKDError, match=r"needs root=.* create_dataset\('torchvision:cifar10', root='data', download=True"
    ):
        create_dataset("torchvision:cifar10")
    with pytest.raises(M2MKDError, match=rf"is not in {tmp_path} .* root='{tmp_path}', download=True\)"):
        create_dataset("torchvision:cifar100", root=tmp_path)
    with pytest.raises(M2MKDError, match=r"in_chans=2"):
        create_dataset("torchvision:cifar10", root=tmp_path, in_chans=2)
