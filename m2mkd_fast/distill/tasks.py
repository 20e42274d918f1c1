"""What each phase of the pipeline trains, as a module whose forward pass returns the loss of a batch.

The trainable part is ``task.trainable``; everything else in a task is frozen and stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.distill.pair_loss import Kind, PairLoss, Reduction, feature_loss, pair_loss
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import hybrid
from m2mkd_fast.nn.vision_moe import auxiliary_losses


@dataclass(frozen=True)
class DistillationSettings:
    """How the terms of :func:`m2mkd_fast.distill.pair_loss.pair_loss` are weighed."""

    alpha: float = 0.5
    tau: float = 1.0
    kind: Kind = "soft"
    kd_reduction: Reduction = "batchmean"
    feature_weight: float = 0.0
    label_smoothing: float = 0.0


class Task(nn.Module):
    """Base of the tasks: freezes what is not trained. ``forward(images, labels)`` returns a :class:`PairLoss`."""

    def __init__(self, trainable: nn.Module, *frozen: nn.Module) -> None:
        super().__init__()
        self.trainable = trainable
        self.frozen = nn.ModuleList()
        self._freeze(*frozen)

    def _freeze(self, *modules: nn.Module) -> None:
        self.frozen.extend(modules)
        self.frozen.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Task:
        super().train(mode)
        self.frozen.eval()
        return self

    def _with_regularisers(self, loss: PairLoss) -> PairLoss:
        """Add what the trained modules ask for themselves: balance losses of routers, graph losses of a circuit."""
        terms = dict(loss.terms)
        auxiliary = auxiliary_losses(self.trainable)
        if auxiliary.requires_grad:
            terms["balance"] = auxiliary
        regularization = getattr(self.trainable, "regularization_loss", None)
        if regularization is not None:
            graph = regularization()
            if graph.requires_grad:
                terms["graph"] = graph
        return PairLoss(torch.stack([term.to(loss.total.dtype) for term in terms.values()]).sum(), terms)


class SupervisedTask(Task):
    """A whole model learns from labels."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
        smoothing = self.label_smoothing if labels.dim() == 1 else 0.0
        task = F.cross_entropy(self.trainable(images), labels, label_smoothing=smoothing)
        return self._with_regularisers(PairLoss(task, {"task": task}))


class WholeModelDistillation(Task):
    """A whole student learns from labels and a whole teacher's logits: the usual distillation, a baseline."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: DistillationSettings) -> None:
        super().__init__(student, teacher)
        self.settings = settings

    def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
        with torch.no_grad():
            teacher_logits = self.frozen[0](images)
        loss = _logit_loss(self.trainable(images), teacher_logits, labels, self.settings)
        return self._with_regularisers(loss)


class MetaFromTeacher(Task):
    r"""The meta model learns the teacher's language at every cut, so that modules of both can stand in for each other.

    Each meta module :math:`M_i` learns what the teacher's module :math:`T_i` does, from the teacher's own activation
    :math:`h_i` and along the meta model's own path :math:`g_i`:

    .. math::
        L = \sum_{i<L-1} \big[\ell(M_i(h_i), h_{i+1}) + \ell(M_i(g_i), h_{i+1})\big]
            + \mathrm{KL}(p_T \| p(M_{L-1}(h_{L-1}))) + \mathrm{KL}(p_T \| p(M_{L-1}(g_{L-1})))

    with :math:`\ell` the squared error over the target's variance. Labels are not used.
    """

    def __init__(self, meta: ModuleChain, teacher: ModuleChain) -> None:
        super().__init__(meta, teacher)

    def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
        meta, teacher = self.trainable, self.frozen[0]
        taught, own, features, logits = images, images, [], []
        for i in range(len(meta)):
            with torch.no_grad():
                target = teacher.run(taught, i, i + 1)
            on_teacher, own = meta.run(taught, i, i + 1), meta.run(own, i, i + 1)
            if i < len(meta) - 1:
                features += [feature_loss(on_teacher, target), feature_loss(own, target)]
            else:
                logits += [_divergence(on_teacher, target), _divergence(own, target)]
            taught = target
        terms = {"distillation": torch.stack(logits).sum()}
        if features:
            terms["feature"] = torch.stack(features).sum()
        return PairLoss(torch.stack(tuple(terms.values())).sum(), terms)


class _Slot(Task):
    """A student's module before the frozen modules that follow its slot in the meta model."""

    def __init__(self, student: nn.Module, index: int, meta: ModuleChain, settings: DistillationSettings) -> None:
        if not 0 <= index < len(meta):
            raise M2MKDError(f"slot {index} is not one of the meta model's {len(meta)} slots 0 ... {len(meta) - 1}")
        hybrid(meta, index, student)
        # Nothing else of the meta model is held: a module without memory may stand in the other slots.
        super().__init__(student, nn.Sequential(*meta[index + 1 :]))
        self.index, self.last = index, index == len(meta) - 1
        self.settings = settings

    def _loss(
        self, inputs: Tensor, labels: Tensor, target: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> PairLoss:
        """Loss of what the student makes of its input; `target` and `teacher_logits` where the settings need them."""
        output = self.trainable(inputs)
        feature = None if self.last else (output, target)
        loss = _logit_loss(self.frozen[0](output), teacher_logits, labels, self.settings, feature)
        return self._with_regularisers(loss)


class PairTask(_Slot):
    """One teaching pair: a student's module learns to do in slot ``index`` what the teacher's module does there.

    The student's module and the teacher's get the same input, made by the earlier modules of ``prefix``, and both
    outputs go on through the later, frozen modules of the meta model to logits. The task holds only these modules.

    Args:
        student: the student's module with its stitches.
        index: its slot, 0 ... L-1.
        teacher: the teacher; None trains on the labels alone (incubation).
        meta: the meta model.
        prefix: whose modules make the input, the teacher's or the meta model's (as published).
        settings: weights of the loss's terms.

    Raises:
        M2MKDError: no such slot; a module of the student or the teacher that reads or gives something else than the
            slot does; distillation without a teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        index: int,
        teacher: ModuleChain | None,
        meta: ModuleChain,
        prefix: ModuleChain,
        settings: DistillationSettings,
    ) -> None:
        super().__init__(student, index, meta, settings)
        self._freeze(nn.Sequential(*prefix[:index]))
        if settings.alpha > 0 or settings.feature_weight > 0:
            if teacher is None:
                raise M2MKDError(
                    "distillation and feature terms need a teacher; pass one, or set alpha=0 and feature_weight=0"
                )
            # Both modules hand features of one layout to one slot, or nothing that is compared here means anything.
            hybrid(meta, index, teacher[index])
            self._freeze(teacher[index])

    def forward(self, images: Tensor, labels: Tensor) -> PairLoss:
        following, earlier, *taught = self.frozen
        target = teacher_logits = None
        with torch.no_grad():
            inputs = earlier(images)
            if taught:
                target = taught[0](inputs)
                teacher_logits = following(target)
        return self._loss(inputs, labels, target, teacher_logits)


class CachedPairTask(_Slot):
    """A teaching pair whose frozen part is computed: see :class:`m2mkd_fast.distill.features.PairFeatures`.

    Teacher and earlier modules are not needed, so this holds only the student's module and the later ones of the meta
    model. With float32 features its loss is that of :class:`PairTask` bit for bit, with float16 up to their rounding.

    ``forward`` takes, for the images, the tensors that ``reads`` names, in that order, in any floating-point dtype.

    Args and errors: as of :class:`PairTask`.
    """

    def __init__(self, student: nn.Module, index: int, meta: ModuleChain, settings: DistillationSettings) -> None:
        super().__init__(student, index, meta, settings)
        compares = settings.feature_weight > 0 and not self.last
        wanted = {"inputs": True, "target": compares, "teacher_logits": settings.alpha > 0}
        self.reads = tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def forward(self, features: Sequence[Tensor], labels: Tensor) -> PairLoss:
        given = {name: feature.float() for name, feature in zip(self.reads, features, strict=True)}
        return self._loss(labels=labels, **given)


def _logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    settings: DistillationSettings,
    feature: tuple[Tensor, Tensor] | None = None,
) -> PairLoss:
    compared, target = feature or (None, None)
    return pair_loss(
        student_logits,
        student_logits if teacher_logits is None else teacher_logits,
        labels,
        alpha=settings.alpha,
        tau=settings.tau,
        kind=settings.kind,
        kd_reduction=settings.kd_reduction,
        label_smoothing=settings.label_smoothing,
        feature=compared,
        feature_target=target,
        feature_weight=settings.feature_weight if compared is not None else 0.0,
    )


def _divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_student, log_teacher = F.log_softmax(student_logits, dim=1), F.log_softmax(teacher_logits, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
