from __future__ import annotations

import pytest
import torch
from torch import nn

from m2mkd_fast.data import TensorSplit
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate import evaluate_accuracy, evaluate_topk


class Lookup(nn.Module):
    """Gives the logits that the pixels of an image [1, 1, C] are; notes the mode and gradient state it ran in."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout(0.9)
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, torch.is_grad_enabled(), len(images)))
        return self.frozen(images.flatten(1)) * self.scale


def make_split(logits, labels, num_classes=None):
    num_classes = num_classes or logits.shape[1]
    return TensorSplit("test", logits[:, None, None], torch.tensor(labels), num_classes, (0.0,), (1.0,))


@pytest.fixture
def split():
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1]])
    return make_split(logits, [0, 1, 2, 3, 2])


def test_accuracy_is_the_percentage_of_correct_images(split):
    assert evaluate_accuracy(Lookup(), split) == 40.0
    assert evaluate_topk(Lookup(), split, (1, 2, 3)) == {1: 40.0, 2: 80.0, 3: 100.0}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_batch_size_does_not_matter(split, batch_size):
    assert evaluate_topk(Lookup(), split, (2, 1), batch_size=batch_size) == {2: 80.0, 1: 40.0}


def test_random_logits_against_a_direct_count():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    better = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {k: 100 * int((better < k).sum()) / 500 for k in (1, 3, 7)}
    assert evaluate_topk(Lookup(), make_split(logits, labels.tolist()), (1, 3, 7), batch_size=64) == expected
    assert expected[7] == 100


def test_modes_are_restored_and_gradients_off(split):
    model = Lookup().train()
    model.frozen.eval()
    evaluate_accuracy(model, split, batch_size=2)
    assert model.seen == [(False, False, 2), (False, False, 2), (False, False, 1)]
    assert model.training
    assert not model.frozen.training
    model.eval()
    evaluate_accuracy(model, split)
    assert not model.training
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(split):
    model = Lookup().train()
    model.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate_accuracy(model, split)
    assert model.training
    assert model.frozen.training


def test_class_mask_restricts_the_choice():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [9, 1, 8, 7]])
    split = make_split(logits, [1, 2, 3])
    assert evaluate_accuracy(Lookup(), split) == 0.0
    assert evaluate_accuracy(Lookup(), split, class_mask=split.class_mask) == pytest.approx(100 / 3)
    assert evaluate_accuracy(Lookup(), split, class_mask=[1, 2, 3]) == pytest.approx(100 / 3)
    assert evaluate_accuracy(Lookup(), split, class_mask=[False, True, True, True]) == pytest.approx(100 / 3)
    assert evaluate_topk(Lookup(), split, (2,), class_mask=split.class_mask)[2] == 100.0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True, False], r"shape \(2,\) and the model has 4 logits"),
        ([0, 7], r"names class 7 and the model has classes 0 to 3"),
        ([False] * 4, r"leaves no class"),
        ([0, 1], r"'test' has images of class 2, which class_mask leaves out"),
    ],
)
def test_wrong_masks(split, mask, message):
    with pytest.raises(M2MKDError, match=message):
        evaluate_accuracy(Lookup(), split, class_mask=mask)


def test_wrong_requests(split):
    for k in ((), (0,)):
        with pytest.raises(M2MKDError, match=r"at least one number, each at least 1"):
            evaluate_topk(Lookup(), split, k)
    with pytest.raises(M2MKDError, match=r"k=5: the model has only 4 logits"):
        evaluate_topk(Lookup(), split)
    with pytest.raises(M2MKDError, match=r"label 5 and the model has only 4 logits"):
        evaluate_accuracy(Lookup(), make_split(torch.zeros(2, 4), [0, 5], 6))


def test_logits_that_are_not_numbers_are_an_error(split):
    model = Lookup()
    model.scale.data.fill_(torch.nan)
    with pytest.raises(M2MKDError, match=r"logits on split 'test' are not numbers"):
        evaluate_accuracy(model, split)


def test_processes_add_up_their_counts():
    generator = torch.Generator().manual_seed(0)
    split = make_split(torch.randn(23, 6, generator=generator), [i % 6 for i in range(23)])
    counts = []
    for rank in range(3):
        evaluate_topk(Lookup(), split, (1, 3), 4, shard=(rank, 3), total=lambda own: (counts.append(own), own)[1])
    assert [own[-1] for own in counts] == [8, 8, 7]  # whole batches of 4, the last of 3
    together = torch.stack(counts).sum(0)
    shared = evaluate_topk(Lookup(), split, (1, 3), 4, shard=(1, 3), total=lambda own: together)
    assert shared == evaluate_topk(Lookup(), split, (1, 3), 4)
