from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from m2mkd_fast.distill.pair_loss import feature_loss, pair_loss
from m2mkd_fast.errors import M2MKDError


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(5, (6,), generator=generator)


def test_soft_terms_follow_the_formula(logits):
    student, teacher, labels = logits
    loss = pair_loss(student, teacher, labels, alpha=0.3, tau=2.0)
    p_teacher = (teacher / 2).softmax(1)
    divergence = (p_teacher * (p_teacher.log() - (student / 2).softmax(1).log())).sum(1).mean()
    torch.testing.assert_close(loss.terms["distillation"], 0.3 * 4 * divergence)
    torch.testing.assert_close(loss.terms["task"], 0.7 * F.nll_loss(student.log_softmax(1), labels))
    torch.testing.assert_close(loss.total, loss.terms["task"] + loss.terms["distillation"])


def test_reference_reduction_is_weaker_by_the_number_of_classes(logits):
    ours = pair_loss(*logits, alpha=1.0).total
    published = pair_loss(*logits, alpha=1.0, kd_reduction="reference").total
    torch.testing.assert_close(ours, 5 * published)


def test_hard_distillation_is_cross_entropy_to_the_decision(logits):
    student, teacher, labels = logits
    loss = pair_loss(student, teacher, labels, alpha=1.0, kind="hard")
    torch.testing.assert_close(loss.total, F.cross_entropy(student, teacher.argmax(1)))


def test_alpha_decides_which_terms_there_are(logits):
    assert set(pair_loss(*logits, alpha=0.0).terms) == {"task"}
    assert set(pair_loss(*logits, alpha=1.0).terms) == {"distillation"}


def test_no_gradient_reaches_the_teacher(logits):
    student, teacher, labels = logits
    teacher.requires_grad_()
    target = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    feature = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    pair_loss(student, teacher, labels, feature=feature, feature_target=target, feature_weight=1.0).total.backward()
    assert teacher.grad is None and target.grad is None
    assert student.grad.abs().sum() > 0 and feature.grad.abs().sum() > 0


def test_feature_loss_does_not_depend_on_the_scale():
    torch.manual_seed(0)
    target, feature = torch.randn(2, 8, 16)
    torch.testing.assert_close(feature_loss(feature, target), feature_loss(100 * feature, 100 * target))
    constant = torch.full_like(target, target.mean().item())
    assert math.isclose(feature_loss(constant, target).item(), 1.0, rel_tol=0.02)


def test_soft_targets_and_smoothing(logits):
    student, teacher, labels = logits
    one_hot = F.one_hot(labels, 5).double()
    smooth = 0.9 * one_hot + 0.02
    torch.testing.assert_close(
        pair_loss(student, teacher, smooth, alpha=0.0).total,
        pair_loss(student, teacher, labels, alpha=0.0, label_smoothing=0.1).total,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha must be between 0"),
        ({"tau": 0.0}, "tau must be a positive temperature, got 0.0"),
        ({"kind": "firm"}, "'soft' or 'hard', got 'firm'"),
        ({"kd_reduction": "mean"}, "'batchmean' or 'reference', got 'mean'"),
        ({"feature_weight": 1.0}, "pass feature= and feature_target="),
        (
            {"feature_weight": 1.0, "feature": torch.zeros(6, 1, 3), "feature_target": torch.zeros(6, 17, 3)},
            r"gives \(6, 1, 3\) and the teacher's \(6, 17, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(logits, change, message):
    with pytest.raises(M2MKDError, match=message):
        pair_loss(*logits, **change)


def test_shapes_that_do_not_fit_are_named(logits):
    student, teacher, labels = logits
    with pytest.raises(M2MKDError, match="same number of classes"):
        pair_loss(student, teacher[:, :4], labels)
    with pytest.raises(M2MKDError, match=r"class indices of shape \(6,\)"):
        pair_loss(student, teacher, labels[:3])
