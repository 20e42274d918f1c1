"""What can be known to be wrong is said before any long work."""

from __future__ import annotations

import torch
from timm.optim import list_optimizers

from m2mkd_fast.data import eval_batches, train_batches
from m2mkd_fast.distill.tasks import PairTask
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.modules.fit_stitches import fit_stitches
from m2mkd_fast.modules.meta import check_compatible
from m2mkd_fast.pipeline.config import phases
from m2mkd_fast.pipeline.workbench import Workbench


def preflight(bench: Workbench) -> int:
    """Build everything once, untrained, and send two images through every pair; return the number of slots.

    Raises:
        M2MKDError: data, names, widths, tokens, classes or numbers of modules that do not fit.
    """
    config = bench.config
    bench.execution.accelerator  # noqa: B018 (a device that is not there is an error now)
    if "test" not in bench.dataset.splits:
        raise M2MKDError(f"{config.data.spec!r} has no test split (it has {', '.join(bench.dataset.splits)})")
    optimizers = list_optimizers()
    for _, training in phases(config):
        if training.optimizer not in optimizers:
            raise UnknownNameError("optimizer", training.optimizer, optimizers)
    train_batches(bench.train_split, batch_size=1, seed=0, stop=1, augmentation=config.data.augmentation)
    teacher = bench.teacher()[1]
    if teacher.num_classes != bench.dataset.num_classes:
        raise M2MKDError(
            f"the teacher has {teacher.num_classes} classes, {config.data.spec!r} has {bench.dataset.num_classes}; "
            "choose teacher.options.num_classes or the data to fit"
        )
    if not {"m2mkd", "task"} & set(config.arms):
        bench.student_model()
        return len(teacher)
    meta, students = bench.meta(teacher), bench.student_modules()
    check_compatible(teacher, meta, students)
    images, labels = next(iter(eval_batches(bench.train_split, 2)))
    prefix = teacher if config.pair.prefix == "teacher" else meta
    settings = bench.settings("m2mkd", config.pair.train.label_smoothing)
    if config.student.stitch_init == "least_squares":
        fit_stitches(students, teacher, [images], prefix=prefix)
    with torch.no_grad():
        for i, student in enumerate(students):
            try:
                PairTask(student, i, teacher, meta, prefix, settings)(images, labels)
            except (M2MKDError, RuntimeError) as error:
                raise M2MKDError(f"pair {i} does not fit together: {error}") from error
        try:
            for stitches in ("kept", "folded"):
                bench.assembled(students, stitches).model(images)
        except (M2MKDError, RuntimeError) as error:
            raise M2MKDError(f"the student's modules do not fit one another with their stitches: {error}") from error
        # Once taught, no parameter of one module equals that of another: what several modules share shows now.
        for i, student in enumerate(students):
            for parameter in student.parameters():
                parameter.add_(i)
        bench.assembled(students, "dropped")
    return len(teacher)
