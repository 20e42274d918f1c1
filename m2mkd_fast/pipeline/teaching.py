"""The pipeline's phases as plain functions, for use on models in memory: no configuration, no run folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from m2mkd_fast.data import Split
from m2mkd_fast.distill.tasks import DistillationSettings, MetaFromTeacher, PairTask, SupervisedTask
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.training import FitResult, fit


def teach_meta(
    meta: ModuleChain,
    teacher: ModuleChain,
    images: Split,
    *,
    augmentation: str = "none",
    seed: int = 0,
    **training: Any,
) -> FitResult:
    """Make a meta model that speaks the teacher's language at every cut (:class:`MetaFromTeacher`).

    Args:
        meta: trained in place; see :func:`m2mkd_fast.meta_model`.
        teacher: the pretrained model as a chain; see :func:`m2mkd_fast.split`. Is frozen.
        images: training images.
        augmentation: preset of the data room.
        seed: of everything random.
        training: fields of :class:`m2mkd_fast.pipeline.config.TrainingConfig`, for example ``steps=800``.
    """
    return _fit(MetaFromTeacher(meta, teacher), images, augmentation, seed, training)


def teach_module(
    module: nn.Module,
    index: int,
    teacher: ModuleChain,
    meta: ModuleChain,
    images: Split,
    *,
    settings: DistillationSettings | None = None,
    augmentation: str = "none",
    seed: int = 0,
    **training: Any,
) -> FitResult:
    """Distil the teacher's module ``index`` into a student's module, in the default recipe ``composable``.

    Args:
        module: trained in place, its stitches too; see :func:`m2mkd_fast.student_modules`.
        index: its slot, 0 ... L-1.
        teacher: frozen; its earlier modules make the input.
        meta: frozen; its later modules turn both outputs into logits.
        images: training images.
        settings: weights of the loss's terms; the recipe's by default.
        augmentation, seed, training: as in :func:`teach_meta`.
    """
    settings = settings or DistillationSettings(feature_weight=3.0, label_smoothing=0.1)
    return _fit(PairTask(module, index, teacher, meta, teacher, settings), images, augmentation, seed, training)


def train_end_to_end(
    model: nn.Module, images: Split, *, augmentation: str = "none", seed: int = 0, **training: Any
) -> FitResult:
    """Train a whole model, assembled or not, on its labels; arguments as in :func:`teach_meta`."""
    smoothing = TrainingConfig(**training).label_smoothing
    return _fit(SupervisedTask(model, smoothing), images, augmentation, seed, training)


def _fit(task: nn.Module, images: Split, augmentation: str, seed: int, training: dict[str, Any]) -> FitResult:
    data = DataConfig(augmentation=augmentation)
    return fit(task, images, TrainingConfig(**training), seed=seed, data=data)
