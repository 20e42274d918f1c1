from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2mkd_fast.data.subset import check_num_classes, choose_images
from m2mkd_fast.errors import M2MKDError


@given(labels=st.lists(st.integers(0, 5), max_size=60), num_classes=st.integers(1, 6))
def test_without_a_limit_all_images_of_the_classes_are_kept(labels, num_classes):
    kept = choose_images("x", torch.tensor(labels, dtype=torch.int64), num_classes=num_classes)
    assert kept.tolist() == [i for i, label in enumerate(labels) if label < num_classes]


@given(order=st.permutations([0] * 8 + [1] * 7 + [2] * 9), seed=st.integers(0, 100))
def test_smaller_choices_are_part_of_larger_ones(order, seed):
    labels = torch.tensor(order)
    small, large = (choose_images("x", labels, num_classes=3, images_per_class=n, seed=seed).tolist() for n in (3, 6))
    assert set(small) < set(large)
    assert torch.bincount(labels[small]).tolist() == [3, 3, 3]
    assert large == sorted(large)


def test_impossible_choices():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(M2MKDError, match=r"class 1 has 1 training image\(s\); choose from 1 to 1"):
        choose_images("x", labels, num_classes=2, images_per_class=2)
    with pytest.raises(M2MKDError, match=r"images_per_class=0"):
        choose_images("x", labels, num_classes=2, images_per_class=0)
    with pytest.raises(M2MKDError, match=r"num_classes=1 for dataset 'x': choose from 2 to 7"):
        check_num_classes("x", 1, 7)
