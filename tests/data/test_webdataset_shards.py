from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from pictures import encoded, reds
from torch import nn

from m2mkd_fast.data import create_dataset, eval_batches, train_batches
from m2mkd_fast.data.shard_index import UnkeptIndexWarning
from m2mkd_fast.distill.tasks import SupervisedTask
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.training import fit

webdataset = pytest.importorskip("webdataset")
PLAIN = {"image_size": 4, "mean": (0,) * 3, "std": (1,) * 3}


def write_shard(path, values):
    """Samples of one picture each, of class value % 3, as webdataset writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for value in values:
            writer.write({"__key__": f"sample{value:04d}", "png": encoded(value), "cls": value % 3})


@pytest.fixture
def shards(tmp_path):
    """Four shards of five training samples, one of six for testing."""
    for number in range(4):
        write_shard(tmp_path / f"set-train-{number:03d}.tar", range(5 * number, 5 * number + 5))
    write_shard(tmp_path / "set-val-000.tar", range(100, 106))
    return tmp_path


def values_of(split):
    images, labels = next(eval_batches(split, len(split)))
    assert labels.tolist() == [red % 3 for red in reds(images)]
    return reds(images)


def test_a_folder_and_patterns_name_the_same_shards(shards):
    datasets = [
        create_dataset(f"webdataset:{shards}", **PLAIN),
        create_dataset(f"webdataset:{shards}", train="set-train-{000..003}.tar", test="set-val-*.tar", **PLAIN),
        create_dataset(f"webdataset:{shards}/set-train-{{000..003}}.tar", test=f"{shards}/set-val-000.tar", **PLAIN),
        create_dataset(
            f"webdataset:{shards}/set-train-{{000..001}}.tar::{shards}/set-train-00[23].tar",
            test=f"{shards}/set-val-000.tar",
            **PLAIN,
        ),
    ]
    for dataset in datasets:
        assert values_of(dataset.splits["train"]) == list(range(20))
        assert values_of(dataset.splits["test"]) == list(range(100, 106))
        assert dataset.class_names == ["0", "1", "2"]
        assert dataset.describe()["content_hash"] == datasets[0].describe()["content_hash"]
    assert dataset.describe()["shards"] == {"train": 4, "test": 1}


def test_the_samples_are_webdatasets_own(shards):
    """In order, keys, images and labels are those that webdataset streams."""
    split = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    urls = [str(path) for path in sorted(shards.glob("*train*.tar"))]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    images, labels = split.load(torch.arange(20))
    assert list(split.pictures.keys) == [key for key, _, _ in streamed]
    assert labels.tolist() == [label for _, _, label in streamed]
    assert reds(images) == [int(image[3, 3, 0]) for _, image, _ in streamed]


@pytest.mark.parametrize("augmentation", ["none", {"name": "timm", "auto_augment": "rand-m9-mstd0.5"}], ids=str)
def test_training_goes_on_in_mid_epoch(shards, augmentation):
    split = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    options = {"batch_size": 3, "seed": 2, "stop": 8, "augmentation": augmentation}
    whole = list(train_batches(split, **options))
    late = list(train_batches(split, start=4, num_workers=2, **options))
    for (images, labels), (other_images, other_labels) in zip(whole[4:], late, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_a_training_that_stopped_in_mid_epoch_ends_with_the_same_weights(shards, tmp_path):
    split = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    config = TrainingConfig(steps=5, batch_size=6, checkpoint_every=2)
    data = DataConfig(augmentation={"name": "timm", "hflip": 0.5}, repeats=2)
    ends = []
    for stops in ((5,), (2, 3, 5)):  # 20 images: an epoch ends in the fourth batch
        for until in stops:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
            options = {"seed": 1, "data": data, "execution": Execution("cpu"), "until": until}
            fit(SupervisedTask(model), split, config, folder=tmp_path / f"run{len(stops)}", **options)
        ends.append(model[1].weight)
    assert torch.equal(*ends)


def test_a_copy_for_another_process_opens_its_own_files(shards):
    split = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    expected = values_of(split)
    copied = pickle.loads(pickle.dumps(split.pictures))
    assert not copied._open_files and split.pictures._open_files
    assert [copied.open(index).getpixel((0, 0))[0] for index in range(20)] == expected


def test_few_files_are_open_at_once(shards, monkeypatch):
    monkeypatch.setattr("m2mkd_fast.data.webdataset_shards._OPEN_FILES", 2)
    split = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    for index in (0, 7, 12, 19, 1):
        assert split.picture(index)[0].getpixel((0, 0))[0] == index
        assert len(split.pictures._open_files) <= 2
    descriptors = list(split.pictures._open_files.values())
    assert len(descriptors) == 2 and [os.fstat(descriptor).st_size > 0 for descriptor in descriptors]
    del split
    for descriptor in descriptors:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(shards, monkeypatch, tmp_path):
    create_dataset(f"webdataset:{shards}", **PLAIN)
    kept = shards / "set-train-001.tar.index.safetensors"
    assert kept.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("the shard's headers were read again"))
        assert values_of(create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]) == list(range(20))
    write_shard(shards / "set-train-001.tar", range(40, 43))
    changed = create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]
    assert values_of(changed) == [*range(5), *range(40, 43), *range(10, 20)]
    kept.write_bytes(kept.read_bytes()[:-40])  # a damaged index is no reason to stop
    assert values_of(create_dataset(f"webdataset:{shards}", **PLAIN).splits["train"]) == values_of(changed)

    elsewhere = tmp_path / "elsewhere"
    for path in shards.glob("*.index.safetensors"):
        path.unlink()
    create_dataset(f"webdataset:{shards}", cache_dir=elsewhere, **PLAIN)
    assert not list(shards.glob("*.index.safetensors")) and len(list(elsewhere.iterdir())) == 5


def test_a_read_only_folder_is_said(shards, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.warns(UnkeptIndexWarning, match=r"index of shards cannot be kept in .*read-only.*give cache_dir="):
        dataset = create_dataset(f"webdataset:{shards}", **PLAIN)
    assert len(dataset.splits["train"]) == 20


@pytest.mark.parametrize("cut", [100, 512, 1024, 1536, 2048 + 300, 5 * 2048])
def test_truncated_shards_are_named(shards, cut):
    path = shards / "set-train-002.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:cut])
    assert cut < size
    with pytest.raises(M2MKDError, match=r"set-train-002.tar is truncated"):
        create_dataset(f"webdataset:{shards}", **PLAIN)


def test_a_shard_cut_after_it_was_indexed_is_an_unreadable_image(shards):
    split = create_dataset(f"webdataset:{shards}", max_unreadable=0, **PLAIN).splits["train"]
    os.truncate(shards / "set-train-003.tar", 1000)
    with pytest.raises(M2MKDError, match=r"cannot read image sample0016 in .*train-003.tar \(the shard ends"):
        split.load(torch.tensor([16]))


def test_the_benchmark_reads_the_same_images(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["bench_shards", "--shards=2", "--samples=3", "--side=16", "--pairs=1"])
    importlib.import_module("bench_shards").main()
    assert "6 images decoded, by index against webdataset" in capsys.readouterr().out
    for name in ("bench_shards", "_paired"):
        sys.modules.pop(name)


def write_members(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_labels_in_json_and_other_extensions(shards):
    members = {"__meta__": b"{}", "__meta__/0.json": b"{}", "README": b"no extension"}
    for value in (3, 7):
        members[f"part/{value}.WEBP"] = encoded(value, kind="webp")
        members[f"part/{value}.seg.png"] = encoded(200)
        members[f"part/{value}.json"] = json.dumps({"facts": {"label": value}}).encode()
    write_members(shards / "a.tar", members)
    names = [f"class {number}" for number in range(8)]
    options = {"train": "a.tar", "test": "a.tar", "label": "json.facts.label", "class_names": names}
    dataset = create_dataset(f"webdataset:{shards}", image="webp", **options, **PLAIN)
    images, labels = next(eval_batches(dataset.splits["train"], 2))
    assert labels.tolist() == [3, 7]
    assert reds(images) == pytest.approx([3, 7], abs=4)
    assert dataset.class_names == names
    with pytest.raises(M2MKDError, match=r"class_names has 2 names and the labels go up to 7"):
        create_dataset(f"webdataset:{shards}", **options | {"class_names": ["a", "b"]})
    with pytest.raises(M2MKDError, match=r"sample 'part/3' has no label \(.cls\); it has .webp, .seg.png, .json. Name"):
        create_dataset(f"webdataset:{shards}", train="a.tar", test="a.tar")
    with pytest.raises(M2MKDError, match=r"sample 'part/3' has no image \(.jpg\)"):
        create_dataset(f"webdataset:{shards}", image="jpg", **options)
    with pytest.raises(M2MKDError, match=r"label of sample 'part/3', .json at facts.class, is no number \(KeyError"):
        create_dataset(f"webdataset:{shards}", **options | {"label": "json.facts.class"})


def test_what_is_no_set_of_shards(shards, tmp_path):
    with pytest.raises(M2MKDError, match=r"no shard .*train-004.tar' for split 'train'.*beside it: .*set-train-000"):
        create_dataset(f"webdataset:{shards}", train="set-train-{003..004}.tar")
    with pytest.raises(M2MKDError, match=r"no shards for testing; give test="):
        create_dataset(f"webdataset:{shards}/set-train-000.tar")
    with pytest.raises(M2MKDError, match=r"is the training shards already; leave train= out"):
        create_dataset(f"webdataset:{shards}/set-train-000.tar", train="x.tar")
    with pytest.raises(M2MKDError, match=r"must be files; download them first"):
        create_dataset("webdataset:https://example.org/train-{00..10}.tar", test="x.tar")
    (shards / "set-train-000.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(M2MKDError, match=r"set-train-000.tar is truncated, compressed or no tar file"):
        create_dataset(f"webdataset:{shards}")
    write_members(shards / "set-train-000.tar", {})
    with pytest.raises(M2MKDError, match=r"set-train-000.tar has no sample"):
        create_dataset(f"webdataset:{shards}")
