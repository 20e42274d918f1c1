from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup

from m2mkd_fast.data import TensorSplit, create_dataset, eval_batches, train_batches
from m2mkd_fast.data.batches import batch_indices, shard_rows
from m2mkd_fast.errors import M2MKDError, UnknownNameError

AUGMENTATIONS = ["none", "affine", "crop_flip", {"name": "affine", "rotation": 0.1, "scale": 0.0}]
TIMM = {"name": "timm", "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}


@pytest.fixture(scope="module")
def split():
    return create_dataset("digits").splits["train"]


@pytest.fixture(scope="module")
def colour_split():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (37, 3, 20, 20), generator=generator, dtype=torch.uint8)
    return TensorSplit("train", pixels, torch.arange(37) % 5, 5, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


@given(size=st.integers(1, 60), batch_size=st.integers(1, 150), seed=st.integers(0, 2**62), epochs=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_epoch_shows_each_image_once(size, batch_size, seed, epochs):
    steps = -(-epochs * size // batch_size)
    drawn = torch.cat([batch_indices(size, batch_size=batch_size, seed=seed, t=t) for t in range(steps)])
    assert len(drawn) == steps * batch_size
    for epoch in range(epochs):
        assert drawn[epoch * size : (epoch + 1) * size].sort().values.tolist() == list(range(size))


@given(size=st.integers(2, 60), batch_size=st.integers(1, 150), seed=st.integers(0, 2**62), t=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_far_batches_are_reached_directly_and_are_reproducible(size, batch_size, seed, t):
    indices = batch_indices(size, batch_size=batch_size, seed=seed, t=t)
    batch_indices(size, batch_size=batch_size, seed=seed + 1, t=0)  # would show any hidden state
    assert len(indices) == batch_size
    assert torch.equal(indices, batch_indices(size, batch_size=batch_size, seed=seed, t=t))
    assert indices.min() >= 0
    assert indices.max() < size


@given(size=st.integers(1, 60), batch_size=st.integers(1, 30), repeats=st.integers(1, 5), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_repeated_augmentation_shows_images_in_succession(size, batch_size, repeats, seed):
    drawn = torch.cat(
        [batch_indices(size, batch_size=batch_size, seed=seed, t=t, repeats=repeats) for t in range(2 * size)]
    )
    for epoch in range(batch_size * 2):  # 2 * size batches are so many epochs
        order = batch_indices(size, batch_size=size, seed=seed, t=epoch)
        shown = drawn[epoch * size : (epoch + 1) * size]
        assert shown.tolist() == [int(order[place // repeats]) for place in range(size)]


def test_repeated_augmentation_agrees_with_timms_sampler(monkeypatch):
    """The batch of all processes together is the one that timm's processes draw, rank k every R-th place from k on."""
    from timm.data.distributed_sampler import RepeatAugSampler

    from m2mkd_fast.data import batches

    size, ranks, batch_size, repeats = 512, 4, 16, 3
    monkeypatch.setattr(batches, "derived_generator", lambda seed, word, epoch: torch.Generator().manual_seed(epoch))
    batches._epoch_order.cache_clear()
    samplers = [RepeatAugSampler(range(size), ranks, rank, num_repeats=repeats) for rank in range(ranks)]
    drawn = [list(sampler) for sampler in samplers]
    for t in range(size // (ranks * batch_size)):
        theirs = [index for rank in drawn for index in rank[t * batch_size : (t + 1) * batch_size]]
        ours = batch_indices(size, batch_size=ranks * batch_size, seed=0, t=t, repeats=repeats).tolist()
        assert sorted(ours) == sorted(theirs)
        assert [ours[rank::ranks] for rank in range(ranks)] == [
            rank[t * batch_size : (t + 1) * batch_size] for rank in drawn
        ]
    batches._epoch_order.cache_clear()


def test_repeated_images_are_augmented_differently(colour_split):
    images, labels = next(
        train_batches(colour_split, batch_size=6, seed=0, stop=1, repeats=3, augmentation={**TIMM, "color_jitter": 0.4})
    )
    assert labels[0] == labels[1] == labels[2] and labels[3] == labels[4] == labels[5]
    assert len({image.numpy().tobytes() for image in images}) == 6
    with pytest.raises(M2MKDError, match=r"repeats=0: each image is shown at least once"):
        train_batches(colour_split, batch_size=6, seed=0, stop=1, repeats=0)


def test_orders_differ_between_epochs_and_seeds():
    orders = [batch_indices(200, batch_size=200, seed=seed, t=t) for seed in (0, 1, 2) for t in (0, 1, 2)]
    for i, order in enumerate(orders):
        for other in orders[i + 1 :]:
            assert (order == other).float().mean() < 0.1


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
@pytest.mark.parametrize("start", [0, 1, 9, 11, 14])
def test_starting_late_equals_skipping(split, augmentation, start):
    options = {"batch_size": 128, "seed": 3, "stop": 14, "augmentation": augmentation}
    assert same(train_batches(split, start=start, **options), islice(train_batches(split, **options), start, None))


def test_starting_late_equals_skipping_with_timm(colour_split):
    options = {"batch_size": 16, "seed": 3, "stop": 5, "augmentation": TIMM}
    assert same(
        train_batches(colour_split, start=2, **options), islice(train_batches(colour_split, **options), 2, None)
    )


@pytest.mark.parametrize("augmentation", ["affine", TIMM], ids=["affine", "timm"])
def test_workers_change_nothing(colour_split, augmentation):
    options = {"batch_size": 16, "seed": 5, "start": 1, "stop": 6, "augmentation": augmentation}
    here = list(train_batches(colour_split, **options))
    there = list(train_batches(colour_split, num_workers=2, **options))
    assert same(here, there)
    assert isinstance(there[0], tuple)


@pytest.mark.parametrize("augmentation", ["affine", "crop_flip", TIMM], ids=["affine", "crop_flip", "timm"])
def test_seeds_and_batches_are_augmented_differently(colour_split, augmentation):
    def first_image_of(seed, t):
        return next(train_batches(one, batch_size=1, seed=seed, start=t, stop=t + 1, augmentation=augmentation))[0]

    one = TensorSplit("train", colour_split.pixels[:1], colour_split.labels[:1], 5, colour_split.mean, colour_split.std)
    images = [first_image_of(seed, t) for seed in (0, 1) for t in range(4)]
    distinct = {image.numpy().tobytes() for image in images}
    assert len(distinct) >= 7


@pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip", TIMM], ids=str)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_states_are_neither_used_nor_changed(colour_split, augmentation, num_workers):
    def states():
        return (
            random.getstate(),
            [part.tobytes() for part in np.random.get_state()[1:2]],
            torch.get_rng_state().tolist(),
        )

    options = {"batch_size": 8, "seed": 0, "stop": 3, "augmentation": augmentation, "num_workers": num_workers}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = states()
    first = list(train_batches(colour_split, **options))
    list(eval_batches(colour_split, 8, num_workers=num_workers))
    assert states() == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert same(first, train_batches(colour_split, **options))


def test_batches_larger_than_the_split(colour_split):
    (images, labels), *rest = train_batches(colour_split, batch_size=100, seed=0, stop=2)
    assert images.shape == (100, 3, 20, 20)
    assert labels.shape == (100,)
    assert labels.dtype == torch.int64
    assert len(rest) == 1


def test_unaugmented_images_are_the_splits_own(split):
    images, labels = next(train_batches(split, batch_size=128, seed=0, start=4, stop=5))
    indices = batch_indices(len(split), batch_size=128, seed=0, t=4)
    assert torch.equal(images, (split.pixels[indices] - 0.3) / 0.36)
    assert torch.equal(labels, split.labels[indices])


def test_eval_batches_show_every_image_once_in_order(split):
    batches = list(eval_batches(split, 100))
    assert [len(labels) for _, labels in batches] == [100] * 12 + [97]
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    assert torch.equal(torch.cat([images for images, _ in batches]), split.normalise(split.pixels))
    assert same(batches, eval_batches(split, 100, num_workers=2))


def test_far_start_is_cheap(split):
    generator = train_batches(split, batch_size=128, seed=0, start=10**12, stop=10**12 + 1, augmentation="affine")
    assert next(generator)[0].shape == (128, 1, 16, 16)


def test_impossible_requests_fail_at_the_call(split, colour_split):
    with pytest.raises(M2MKDError, match=r"start=3, stop=2"):
        train_batches(split, batch_size=8, seed=0, start=3, stop=2)
    with pytest.raises(M2MKDError, match=r"batch_size=0"):
        train_batches(split, batch_size=0, seed=0, stop=2)
    with pytest.raises(M2MKDError, match=r"batch_size=-1"):
        eval_batches(split, -1)
    with pytest.raises(M2MKDError, match=r"num_workers=-1"):
        train_batches(split, batch_size=8, seed=0, stop=2, num_workers=-1)
    empty = TensorSplit("ood", colour_split.pixels[:0], colour_split.labels[:0], 5, colour_split.mean, colour_split.std)
    with pytest.raises(M2MKDError, match=r"'ood' has no images"):
        eval_batches(empty, 8)
    with pytest.raises(UnknownNameError, match=r"'afine'; did you mean 'affine'"):
        train_batches(split, batch_size=8, seed=0, stop=2, augmentation="afine")
    with pytest.raises(M2MKDError, match=r"3 channels and the dataset has 1"):
        train_batches(split, batch_size=8, seed=0, stop=2, augmentation="timm")


@pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip", TIMM], ids=str)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_shard_is_its_rows_of_the_whole_batch(colour_split, augmentation, mirrored):
    options = {"batch_size": 12, "seed": 3, "start": 2, "stop": 5, "augmentation": augmentation}
    whole = list(train_batches(colour_split, **options))
    for world in (2, 3):
        seen = []
        for rank in range(world):
            rows = shard_rows(12, (rank, world), mirrored=mirrored)
            shards = train_batches(colour_split, shard=(rank, world), mirrored=mirrored, **options)
            assert same(shards, [(images[rows], labels[rows]) for images, labels in whole])
            seen += rows.tolist()
        assert sorted(seen) == list(range(12))


def test_mixing_a_mirrored_shard_is_the_shard_of_the_mixed_batch(split):
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)

    def mixed(images, labels, seed):
        np.random.seed(seed)
        return mixup(images, labels)

    for t in range(6):  # both kinds of mixing
        options = {"batch_size": 24, "seed": 1, "start": t, "stop": t + 1, "augmentation": "affine"}
        images, labels = mixed(*next(train_batches(split, **options)), t)
        for rank in range(3):
            own = mixed(*next(train_batches(split, shard=(rank, 3), mirrored=True, **options)), t)
            rows = shard_rows(24, (rank, 3), mirrored=True)
            assert torch.equal(own[0], images[rows]) and torch.equal(own[1], labels[rows])


def test_a_shard_makes_only_its_own_images(split, monkeypatch):
    loaded = []
    load = type(split).load
    monkeypatch.setattr(
        type(split), "load", lambda self, indices, **how: (loaded.append(len(indices)), load(self, indices, **how))[1]
    )
    next(train_batches(split, batch_size=32, seed=0, stop=1, augmentation="affine", shard=(1, 4)))
    assert loaded == [8]


def test_batches_that_do_not_divide_are_named():
    with pytest.raises(M2MKDError, match=r"batch_size=10 does not divide into 4 equal parts \(4 processes\)"):
        shard_rows(10, (0, 4))
    with pytest.raises(M2MKDError, match="batch_size=6 does not divide into 4 equal parts.*flip.*multiple of 4"):
        shard_rows(6, (0, 2), mirrored=True)
    with pytest.raises(M2MKDError, match=r"batch_size=8 does not divide into 6 .*\(3 micro-batches times 2 processes"):
        shard_rows(8, (0, 2), micro_batches=3)
    with pytest.raises(M2MKDError, match=r"shard=\(2, 2\): a rank is from 0 to 1"):
        shard_rows(8, (2, 2))


def test_evaluation_is_shared_out_in_whole_batches(split):
    batches = list(eval_batches(split, 100))
    assert same(eval_batches(split, 100, shard=(1, 3)), batches[1::3])
    assert list(eval_batches(split, 1000, shard=(2, 3))) == []  # more processes than batches
    with pytest.raises(M2MKDError, match=r"shard=\(-1, 3\)"):
        eval_batches(split, 100, shard=(-1, 3))


@given(world=st.integers(1, 5), micro_batches=st.integers(1, 4), stretch=st.integers(1, 4), mirrored=st.booleans())
@settings(max_examples=40, deadline=None)
def test_micro_batches_of_all_ranks_are_those_of_the_whole_batch(world, micro_batches, stretch, mirrored):
    size = 2 * world * stretch * micro_batches
    shards = [shard_rows(size, (rank, world), mirrored=mirrored, micro_batches=micro_batches) for rank in range(world)]
    for number, whole in enumerate(torch.arange(size).chunk(micro_batches)):
        assert torch.equal(torch.cat([rows.chunk(micro_batches)[number] for rows in shards]).sort().values, whole)
    for rows in shards:
        assert (rows.diff() > 0).all()
        if mirrored:
            assert torch.equal(rows, size - 1 - rows.flip(0))
