"""The training loop: one task, one configuration, resumable at any checkpoint with the same result to the last bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.seeds import derive_seed
from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.pipeline.activation_checkpointing import activation_checkpointing
from m2mkd_fast.pipeline.batch_source import AugmentedBatches, BatchSource
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.loss_window import LossWindow
from m2mkd_fast.pipeline.metrics import Meter, MetricsFile, Tracker, model_facts
from m2mkd_fast.pipeline.non_finite import BAD_BATCH, not_finite, save_batch
from m2mkd_fast.pipeline.optimization import LearningRate, LearningRateFactor, create_optimizer
from m2mkd_fast.pipeline.optimizer_step import OptimizerStep, Outcome
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.stopping import Stopped, stop_requested
from m2mkd_fast.pipeline.training_progress import FitResult, TrainingProgress
from m2mkd_fast.pipeline.training_state import TrainingState

LOG_EVERY = 10

Evaluate = Callable[[nn.Module], dict[str, float]]
Guard = Callable[[], None]


def fit(
    task: Task,
    split: Split,
    config: TrainingConfig,
    *,
    seed: int,
    data: DataConfig | None = None,
    execution: Execution | None = None,
    folder: Path | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    name: str = "training",
    source: BatchSource | None = None,
    until: int | None = None,
    learning_rate: LearningRateFactor | None = None,
    guard: Guard = lambda: None,
    tracker: Tracker | None = None,
) -> FitResult:
    """Train ``task.trainable`` in place for ``config.steps`` updates.

    Step t draws its batch, augmentation, mixing and dropout from (seed, t) alone. A run that was killed and is started
    again with the same ``folder`` goes on from its last checkpoint and ends with the same bits as an undisturbed one.

    A step whose loss or gradient is not finite is left out; see :class:`OptimizerStep`.

    Args:
        task: what is trained, and its loss.
        split: training images.
        config: the phase's settings.
        seed: of everything random in this phase.
        data: augmentation and workers; none by default.
        execution: device, precision and processes.
        folder: where checkpoints and metrics go; None keeps nothing.
        evaluate: called on the (averaged) model every ``config.evaluate_every`` steps and at the end.
        progress: told every few steps how far it is, for a progress display.
        name: what the display calls this phase.
        source: of the batches; by default those of ``split``, augmented and mixed as ``data`` and ``config`` say.
        until: stop after so many of the steps, with a checkpoint from which a later call goes on; None for all.
        learning_rate: factor on ``config.learning_rate`` at step t; None for a cosine after a linear warm-up.
        guard: called before anything is written; raises where this process may no longer write into ``folder``.
        tracker: told every entry that the metrics get.

    Raises:
        M2MKDError: more than ``config.max_skipped`` steps were left out (then ``bad_batch.safetensors`` in ``folder``
            is the last one's batch), the disk is full, or the checkpoint in ``folder`` is of another model.
        Stopped: this process was asked to stop; a checkpoint was written before.
    """
    execution = execution or Execution()
    if source is None:
        data = data or DataConfig(augmentation="none")
        source = AugmentedBatches(split, config, seed, data, execution.accelerator.device, execution.shard)
    display = progress if execution.is_main else None
    run = _Run(task, source, config, seed, execution, folder, learning_rate, guard, tracker, display, name)
    stop = config.steps if until is None else min(until, config.steps)
    if not config.checkpoint_activations:
        return run.train(evaluate, stop)
    with activation_checkpointing(run.task.trainable, config.compile):
        return run.train(evaluate, stop)


class _Run:
    def __init__(
        self,
        task: Task,
        source: BatchSource,
        config: TrainingConfig,
        seed: int,
        execution: Execution,
        folder: Path | None,
        learning_rate: LearningRateFactor | None,
        guard: Guard,
        tracker: Tracker | None,
        display: Progress | None,
        name: str,
    ) -> None:
        self.source, self.config, self.seed, self.execution = source, config, seed, execution
        self.folder, self.guard, self.display, self.name = folder, guard, display, name
        self.task = execution.prepare(task)
        if config.compile:
            self.task.compile()
        optimizer = create_optimizer(self.task.trainable, config)
        self.task.group_by_mesh(optimizer)
        self.learning_rate = LearningRate(optimizer, config, learning_rate)
        self.average = self.task.moving_average(config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(execution.accelerator.device.type) if execution.precision == "fp16" else None
        self.step = OptimizerStep(self.task, optimizer, self.average, self.scaler, config, execution)
        self.progress, self.window = TrainingProgress(), LossWindow(execution)
        self.metrics: MetricsFile | None = None
        if folder is not None:
            self.state = TrainingState(self.task.trainable, optimizer, self.average, self.scaler, execution)
            say = display.message if display is not None else None
            self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, say)
            facts = self.state.load(self.checkpoints)
            if facts is not None:
                self.progress = TrainingProgress(**facts["progress"])
                self.window = LossWindow(execution, facts["window"])
            if execution.is_main:
                guard()
                kept = self.progress.step if facts is not None else -1  # step 0 is evaluated again
                self.metrics = MetricsFile(folder / "metrics.jsonl", kept, tracker)
        done = self.progress
        flops = done.flops / execution.world  # of this process, whose device has a peak of its own
        self.meter = Meter(execution.accelerator.device, execution.autocast(), done.images, done.seconds, flops)

    def train(self, evaluate: Evaluate | None, stop: int) -> FitResult:
        config, progress = self.config, self.progress
        if self.display is not None:
            self.display.start(self.name, config.steps, progress.step)
        if progress.step == 0 and evaluate is not None:
            self._evaluate(evaluate)
        self.task.train()
        first = progress.step
        batches = self.source.batches(first, max(first, stop))
        for t, (inputs, labels) in zip(range(first, stop), batches, strict=False):
            started = time.perf_counter()
            outcome = self._step(t, inputs, labels)
            self.window.add(t, outcome)
            progress.step = t + 1
            progress.images += len(labels) * self.execution.world
            progress.flops += progress.flops_per_step
            progress.seconds += time.perf_counter() - started
            ends = progress.step == stop
            evaluates = evaluate is not None and (ends or progress.step % config.evaluate_every == 0)
            saves = self.folder is not None and (ends or progress.step % config.checkpoint_every == 0)
            logs = ends or evaluates or saves or progress.step % LOG_EVERY == 0
            stops = not ends and self._stops(logs)
            if logs:
                self._log()  # first, since it stops the run before a loss that is not finite does harm
            if evaluates:
                self._evaluate(evaluate)
            if saves or (stops and self.folder is not None):
                self._save()
            if stops:
                raise Stopped(f"{self.name} was stopped at step {progress.step} of {stop}")
        if self.average is not None:
            self.task.trainable.load_state_dict(self.average.module.state_dict())
        self.task.finish()
        return FitResult(
            progress.step,
            progress.images,
            progress.seconds,
            progress.flops,
            progress.skipped,
            progress.terms,
            progress.gradient_share,
        )

    def _step(self, t: int, inputs: Any, labels: Tensor) -> Outcome:
        rank = self.execution.rank
        step_seed = derive_seed(self.seed, "step", t, *(("rank", rank) if rank else ()))
        device = self.execution.accelerator.device
        # torch.manual_seed also takes notes for each kind of accelerator that is not there, a stack trace each.
        torch.default_generator.manual_seed(step_seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(step_seed)
        np.random.seed(step_seed)
        random.seed(step_seed)
        self.learning_rate.set(t)
        inputs, labels = send_to_device((inputs, labels), device)
        counts = self.progress.flops_per_step is None
        shares = (t + 1) % self.config.evaluate_every == 0 and not counts
        # Neither a counter of operations nor two backward passes of one graph go through compiled code.
        eager = self.config.compile and (counts or shares)
        with (
            torch.compiler.set_stance("force_eager") if eager else nullcontext(),
            flop_counter() if counts else nullcontext() as counter,
        ):
            outcome = self.step(t, inputs, labels, shares=shares)
        if counts:
            self.progress.flops_per_step = float(counter.get_total_flops()) * self.execution.world
        if shares:
            self.progress.gradient_share = outcome.gradient_share
        return outcome

    def _stops(self, logs: bool) -> bool:
        """Whether the process was asked to stop; several processes agree where they wait for one another anyway."""
        if self.execution.world > 1:
            return logs and self.execution.agreed(stop_requested())
        return stop_requested()

    def _save(self) -> None:
        self._read_losses()
        self.guard()
        facts = {"progress": vars(self.progress), "window": self.window.as_json()}
        self.state.save(self.checkpoints, self.progress.step, facts)

    def _read_losses(self) -> None:
        """The only time the host waits for the device."""
        started = time.perf_counter()
        new = self.window.read()
        self.progress.seconds += time.perf_counter() - started
        for step in new:
            self.progress.skipped += step.counts
            if self.progress.skipped > self.config.max_skipped:
                if self.metrics is not None:
                    self.guard()
                    save_batch(self.folder / BAD_BATCH, self.source, step.step, self.seed)
                raise not_finite(step, self.config, self.folder)

    def _log(self) -> None:
        """Look at the losses since the last look and write them down."""
        self._read_losses()
        progress = self.progress
        loss, terms = self.window.take()
        entry: dict[str, Any] = {"step": progress.step}
        if loss is not None:
            progress.terms = terms
            entry |= {"loss": loss, "terms": terms}
        entry |= {
            "learning_rate": self.learning_rate.value,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "flops": progress.flops,
        }
        if progress.gradient_share:
            entry["gradient_share"] = progress.gradient_share
        if progress.skipped:
            entry["skipped"] = progress.skipped
        if self.scaler is not None:
            entry["loss_scale"] = self.scaler.get_scale()
        entry |= self.meter.read(progress.images, progress.seconds, progress.flops / self.execution.world)
        if self.metrics is not None:
            self.guard()
            self.metrics.append(entry)
        if self.display is not None:
            self.display.update(self.name, progress.step, loss, terms, entry["images_per_second"])

    def _evaluate(self, evaluate: Evaluate) -> None:
        progress = self.progress
        averaged = self.average is not None and progress.step > 0
        with self.task.whole(self.average.module if averaged else self.task.trainable) as model:
            values = evaluate(model) | model_facts(model)
        self.task.train()
        if self.metrics is not None and values:
            self.guard()
            self.metrics.append({"step": progress.step, **values, "seconds": progress.seconds, "flops": progress.flops})
