"""The end of a run whose loss is not finite too often: what went wrong, and the batch at which it did."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.batch_source import BatchSource
from m2mkd_fast.pipeline.config import TrainingConfig
from m2mkd_fast.pipeline.loss_window import StepLoss

BAD_BATCH = "bad_batch.safetensors"


def save_batch(path: Path, source: BatchSource, t: int, seed: int) -> None:
    """Write batch ``t`` as it was trained on: ``images`` (``inputs.<n>`` where there are several), ``labels``.

    The file's metadata have ``step`` and ``seed``.

    Raises:
        M2MKDError: the file cannot be written.
    """
    inputs, labels = next(iter(source.batches(t, t + 1)))
    named = {"images": inputs} if isinstance(inputs, Tensor) else {f"inputs.{n}": part for n, part in enumerate(inputs)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**named, "labels": labels}.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"step": str(t), "seed": str(seed)}))


def not_finite(step: StepLoss, config: TrainingConfig, folder: Path | None) -> M2MKDError:
    """The error for a step too many whose loss or gradient is not finite.

    Args:
        step: the last one.
        config: of the training run.
        folder: with its checkpoints and the batch, None where nothing is kept.
    """
    what = "gradient" if math.isfinite(step.loss) else "loss"
    kept = "nothing was written"
    if folder is not None:
        kept = f"its last checkpoint is kept, and the batch is in {folder / BAD_BATCH}"
    before = f", after {config.max_skipped} such steps that were left out (max_skipped)" if config.max_skipped else ""
    return M2MKDError(
        f"the {what} at step {step.step} is not finite (terms: {step.terms}){before}; {kept}. Lower the learning rate "
        f"(now {config.learning_rate:g}), clip gradients more tightly (clip_grad, now {config.clip_grad:g}), or use "
        "precision=float32"
    )
