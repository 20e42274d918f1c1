"""The loss that a student module learns from while it stands in the teacher module's place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast.distill.whole_batch import batch_variance
from m2mkd_fast.errors import M2MKDError

Kind = Literal["soft", "hard"]
Reduction = Literal["batchmean", "reference"]


class PairLoss(NamedTuple):
    """The scalar to differentiate, and its weighted terms (``total == sum(terms.values())``)."""

    total: Tensor
    terms: dict[str, Tensor]


def pair_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    tau: float = 1.0,
    kind: Kind = "soft",
    kd_reduction: Reduction = "batchmean",
    label_smoothing: float = 0.0,
    feature: Tensor | None = None,
    feature_target: Tensor | None = None,
    feature_weight: float = 0.0,
) -> PairLoss:
    r"""Task, distillation and feature loss of one teaching pair.

    .. math::
        L = (1-\alpha)\,\mathrm{CE}(z_S, y) + \alpha\,\tau^2\,\mathrm{KL}(p_T \| p_S)
            + \lambda\,\frac{\mathrm{mean}\,(h_S - h_T)^2}{\mathrm{var}\,h_T},
        \qquad p = \mathrm{softmax}(z / \tau)

    With ``kind="hard"`` the second term is :math:`\alpha\,\mathrm{CE}(z_S, \arg\max z_T)`. The feature term compares
    what the two modules hand to the next slot; dividing by the target's variance makes its weight independent of the
    width and the scale of the layer.

    Args:
        student_logits: ``[B, C]``, of the meta model with the student's module in slot i.
        teacher_logits: ``[B, C]``, of the meta model with the teacher's module in slot i; gets no gradient.
        labels: class indices ``[B]``, or soft targets ``[B, C]`` (mixup).
        alpha: weight of the distillation term, between 0 (task loss alone) and 1.
        tau: temperature of the soft distillation term.
        kind: ``"soft"`` for the divergence, ``"hard"`` for cross-entropy to the teacher's decision.
        kd_reduction: ``"batchmean"`` divides the divergence by B. ``"reference"`` divides it by B x C, as the published
            code does: distillation then counts C times less than the formula says.
        label_smoothing: applied to class indices; soft targets are taken as they are.
        feature: output of the student's module, any shape; needed where ``feature_weight > 0``.
        feature_target: output of the teacher's module, same shape; gets no gradient.
        feature_weight: :math:`\lambda`.

    Raises:
        M2MKDError: an argument is out of range, or two tensors that are compared differ in shape.

    Source: Lo et al., m2mKD, arXiv 2402.16918; feature term after Bercovich et al., Puzzle, arXiv 2411.19146.
    """
    _check(student_logits, teacher_logits, labels, alpha, tau, kind, kd_reduction)
    terms = {}
    if alpha < 1.0:
        smoothing = label_smoothing if labels.dim() == 1 else 0.0
        terms["task"] = (1.0 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=smoothing)
    if alpha > 0.0:
        terms["distillation"] = alpha * _distillation(student_logits, teacher_logits.detach(), tau, kind, kd_reduction)
    if feature_weight > 0.0:
        terms["feature"] = feature_weight * feature_loss(feature, feature_target)
    return PairLoss(torch.stack(tuple(terms.values())).sum(), terms)


def feature_loss(feature: Tensor | None, target: Tensor | None) -> Tensor:
    """Mean squared error divided by the target's variance (1 is what predicting the target's mean would score).

    The variance is that of the whole batch also where several processes share its rows.
    """
    if feature is None or target is None:
        raise M2MKDError("the feature loss needs both modules' outputs; pass feature= and feature_target=")
    if feature.shape != target.shape:
        raise M2MKDError(
            f"the feature loss compares tensors of one shape, but the student's module gives "
            f"{tuple(feature.shape)} and the teacher's {tuple(target.shape)}; give the student as many tokens as the "
            "teacher, or set feature_weight=0"
        )
    target = target.detach()
    return F.mse_loss(feature, target) / batch_variance(target)


def _distillation(student: Tensor, teacher: Tensor, tau: float, kind: Kind, reduction: Reduction) -> Tensor:
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    log_student, log_teacher = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return tau**2 * divergence / (student.shape[0] if reduction == "batchmean" else student.numel())


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, tau: float, kind: str, reduction: str
) -> None:
    if student.shape != teacher.shape or student.dim() != 2:
        raise M2MKDError(
            f"logits must be [batch, classes] of one shape, got {tuple(student.shape)} from the student and "
            f"{tuple(teacher.shape)} from the teacher; do both heads have the same number of classes?"
        )
    if labels.shape not in (student.shape[:1], student.shape):
        raise M2MKDError(
            f"labels must be class indices of shape {tuple(student.shape[:1])} or soft targets of shape "
            f"{tuple(student.shape)}, got {tuple(labels.shape)}"
        )
    if not 0.0 <= alpha <= 1.0:
        raise M2MKDError(f"alpha must be between 0 (task loss alone) and 1 (distillation alone), got {alpha}")
    if not tau > 0.0:
        raise M2MKDError(f"tau must be a positive temperature, got {tau}")
    if kind not in ("soft", "hard"):
        raise M2MKDError(f"kind must be 'soft' or 'hard', got {kind!r}")
    if reduction not in ("batchmean", "reference"):
        raise M2MKDError(f"kd_reduction must be 'batchmean' or 'reference', got {reduction!r}")
