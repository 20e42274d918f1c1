"""What each phase does. A step reads the results it needs, trains, and writes weights and then its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from m2mkd_fast.data import train_batches
from m2mkd_fast.distill.tasks import (
    CachedPairTask,
    DistillationSettings,
    MetaFromTeacher,
    PairTask,
    SupervisedTask,
    Task,
    WholeModelDistillation,
)
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.fit_stitches import fit_stitches
from m2mkd_fast.modules.meta import hybrid
from m2mkd_fast.modules.state import save_module
from m2mkd_fast.nn.vision_moe import expert_load
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.pipeline.batch_source import BatchSource
from m2mkd_fast.pipeline.caching import cached_batches, make_cache
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import TrainingConfig
from m2mkd_fast.pipeline.files import Failure, write_json
from m2mkd_fast.pipeline.learned_graph import save_learned_graph
from m2mkd_fast.pipeline.lease import Lease, LeaseLost
from m2mkd_fast.pipeline.optimization import LearningRateFactor
from m2mkd_fast.pipeline.plan import Step, baseline_training
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.rounds import TeachingPair, finish_rounds, train_round
from m2mkd_fast.pipeline.stopping import Stopped
from m2mkd_fast.pipeline.trackers import open_trackers
from m2mkd_fast.pipeline.training import Evaluate, FitResult, fit
from m2mkd_fast.pipeline.workbench import Workbench


def run_step(bench: Workbench, step: Step, progress: Progress, lease: Lease | None) -> dict[str, Any]:
    """Do one step, or go on with it where it was left, and return its result. A finished step is not done again.

    Args:
        bench: the run's tools.
        step: all that it needs is finished.
        progress: told how far it is.
        lease: the step's, held by this process; None in the processes of a group that only help, and write nothing.

    Raises:
        M2MKDError: the step cannot be done; ``failure.json`` says why.
        LeaseLost: another process has taken it over.
        Stopped: on request; it is saved.
    """
    finished = bench.result(step.name)
    if finished is not None:
        return finished
    failure = Failure(bench.step_folder(step.name))
    if lease is not None:
        failure.begin()
    try:
        return _run_step(bench, step, progress, lease)
    except (Stopped, LeaseLost):
        raise
    except Exception as error:
        if lease is not None:
            final = isinstance(error, M2MKDError)  # any other may come from the state of this process
            failure.record(str(error) if final else repr(error), final, progress.message)
        raise


def _run_step(bench: Workbench, step: Step, progress: Progress, lease: Lease | None) -> dict[str, Any]:
    folder = bench.step_folder(step.name)
    made_from = {name: bench.result(name)["weights_hash"] for name in step.needs if name != "hybrids"}
    work = _Work(bench, step, progress, lease)
    started = time.perf_counter()
    result = {"step": step.name, "phase": step.phase, "arm": step.arm, "slot": step.slot}
    result |= {"steps": 0, "images": 0, "seconds": 0.0, "flops": 0.0}
    result |= _PHASES[step.phase](work)
    result["wall_seconds"] = time.perf_counter() - started
    result["made_from"] = made_from
    if lease is None:
        return result
    work.guard()
    write_json(folder / "result.json", result)
    tidy(bench, step)
    if result["steps"]:
        progress.finish(step.name, _headline(result))
    else:  # nothing was trained, so no bar was started
        progress.message(f"{step.name}: {_headline(result)}")
    return result


def tidy(bench: Workbench, step: Step) -> None:
    """Remove what a finished step needs no more: its checkpoints, and pieces of files that a kill left behind.

    Whoever calls this holds the step's lease.
    """
    folder = bench.step_folder(step.name)
    if step.phase != "round":  # its state is where the pair's next step begins
        Checkpoints(folder / "checkpoints").clear()
    for rest in pieces(folder):
        rest.unlink(missing_ok=True)


def pieces(folder: Path) -> list[Path]:
    """Files of a step's folder that were being written when a process was killed."""
    return [*folder.glob(".*.partial"), *folder.glob("checkpoints/.*.partial")]


class _Work:
    """One step's tools: its trained weights, its training run, its evaluations."""

    def __init__(self, bench: Workbench, step: Step, progress: Progress, lease: Lease | None) -> None:
        self.bench, self.step, self.progress, self.lease = bench, step, progress, lease
        self.config = bench.config

    @property
    def writes(self) -> bool:
        """Whether this process writes what the step makes; in a group, the others only help."""
        return self.lease is not None

    def guard(self) -> None:
        """Call before anything is written: raises where another process has taken the step over."""
        if self.lease is not None:
            self.lease.check()

    @property
    def seed(self) -> int:
        """Of everything random in the step's training; the steps of a pair under a bandit's budget share one."""
        phase = "m2mKD" if self.step.phase == "round" else self.step.phase
        return self.bench.seed(phase, -1 if self.step.slot is None else self.step.slot)

    def fit(
        self,
        task: Task,
        training: TrainingConfig,
        evaluate: Evaluate | None,
        source: BatchSource | None = None,
        learning_rate: LearningRateFactor | None = None,
    ) -> FitResult:
        folder, name = self.bench.folder, self.step.name
        trackers = self.config.trackers if self.writes else []
        with open_trackers(trackers, folder, name, self.progress.message) as tracker:
            return fit(
                task,
                self.bench.train_split,
                training,
                seed=self.seed,
                data=self.config.data,
                execution=self.bench.execution,
                folder=self.bench.step_folder(name),
                evaluate=evaluate,
                progress=self.progress,
                name=name,
                source=source,
                learning_rate=learning_rate,
                tracker=tracker,
                guard=self.guard,
            )

    def finish(self, model: nn.Module, fitted: FitResult, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Write the weights, in the process that writes; the result comes after them, so one has its weights."""
        path = self.bench.step_folder(self.step.name) / "weights.safetensors"
        description = {"step": self.step.name, "phase": self.step.phase, "slot": self.step.slot}
        digest = None
        if self.writes:
            self.guard()
            digest = save_module(path, model, description)
        costs = asdict(fitted)
        terms, shares = costs.pop("terms"), costs.pop("gradient_share")
        return {**costs, "metrics": metrics, "terms": terms, "gradient_share": shares, "weights_hash": digest, **more}


def _teacher(work: _Work) -> dict[str, Any]:
    bench, training = work.bench, work.config.teacher.train
    chain = bench.teacher_chain()
    if work.config.teacher.weights:
        return work.finish(chain, FitResult(0, 0, 0.0, 0.0), bench.accuracies(chain))
    fitted = work.fit(SupervisedTask(chain, training.label_smoothing), training, bench.accuracies)
    return work.finish(chain, fitted, bench.accuracies(chain))


def _meta(work: _Work) -> dict[str, Any]:
    bench, training = work.bench, work.config.meta.train
    meta = bench.meta()
    if work.config.meta.source == "teacher":
        task: Task = MetaFromTeacher(meta, bench.trained_teacher())
    else:
        task = SupervisedTask(meta, training.label_smoothing)
    fitted = work.fit(task, training, bench.accuracies)
    return work.finish(meta, fitted, bench.accuracies(meta))


def _incubate(work: _Work) -> dict[str, Any]:
    bench, training, slot = work.bench, work.config.incubation.train, work.step.slot
    module, meta = bench.teacher_chain()[slot], bench.trained_meta()
    settings = DistillationSettings(alpha=0.0, label_smoothing=training.label_smoothing)
    task = PairTask(module, slot, None, meta, meta, settings)
    fitted = work.fit(task, training, lambda module: _in_slot(bench, meta, slot, module))
    return work.finish(module, fitted, _in_slot(bench, meta, slot, module))


def _finetune_teacher(work: _Work) -> dict[str, Any]:
    bench, training = work.bench, work.config.incubation.finetune
    chain = bench.teacher_chain()
    for i, module in enumerate(chain):
        bench.load(module, f"mt{i}")
    cold = bench.accuracies(chain, "cold_")
    fitted = work.fit(SupervisedTask(chain, training.label_smoothing), training, bench.accuracies)
    return work.finish(chain, fitted, bench.accuracies(chain) | cold)


def _hybrids(work: _Work) -> dict[str, Any]:
    bench = work.bench
    teacher, meta = bench.trained_teacher(), bench.trained_meta()
    accuracies = [_in_slot(bench, meta, i, teacher[i])["test_accuracy"] for i in range(len(meta))]
    return {
        "metrics": {
            "hybrid_accuracy": accuracies,
            "teacher_accuracy": bench.accuracies(teacher)["test_accuracy"],
            "meta_accuracy": bench.accuracies(meta)["test_accuracy"],
        }
    }


def check_hybrids(result: dict[str, Any], max_drop: float) -> None:
    """Stop a run whose teacher and meta model speak different languages: the distillation targets would be noise."""
    metrics = result["metrics"]
    teacher, hybrids = metrics["teacher_accuracy"], metrics["hybrid_accuracy"]
    if min(hybrids) < teacher - max_drop:
        listed = ", ".join(f"{accuracy:.1f}" for accuracy in hybrids)
        raise M2MKDError(
            f"the meta model with one of the teacher's modules reaches {listed} % (slots 0 ... {len(hybrids) - 1}), "
            f"the teacher {teacher:.1f} %: more than meta.max_hybrid_drop={max_drop:g} points apart, so teacher and "
            "meta model do not speak the same language at every cut and the targets of the pairs would be noise. Train "
            "the meta model longer (meta.train.steps) and from the teacher (meta.source=teacher), or raise "
            "meta.max_hybrid_drop"
        )


def _cache(work: _Work) -> dict[str, Any]:
    return make_cache(work.bench, work.step.name, work.progress.message, work.guard)


def _make_pair(work: _Work, fresh: bool = True) -> TeachingPair:
    """Build a pair. One that is not `fresh` gets its weights from a checkpoint, so no stitches are fitted for it.

    Modules of the teacher and the meta model that the pair does not use get no memory.
    """
    bench, pair, slot = work.bench, work.config.pair, work.step.slot
    settings = bench.settings(work.step.arm, pair.train.label_smoothing)
    meta = bench.trained_meta(i for i in range(bench.slots) if i != slot)
    students, stitch_fit, flops = bench.student_modules(), {}, 0.0
    # The arm `task` learns from labels alone, so nothing of the teacher's may be in where it starts.
    fits = fresh and work.config.student.stitch_init == "least_squares" and work.step.arm != "task"
    if fits or not pair.cache:
        earlier = range(slot) if pair.prefix == "teacher" else ()
        taught = (slot,) if fits or settings.alpha > 0 or settings.feature_weight > 0 else ()
        teacher = bench.trained_teacher((*earlier, *taught))
        prefix = teacher if pair.prefix == "teacher" else meta
    if fits:
        with flop_counter() as counter:
            stitch_fit = _fit_stitches(bench, students, slot, teacher, prefix)
        flops = float(counter.get_total_flops())
    source: BatchSource | None = None
    if pair.cache:
        task: Task = CachedPairTask(students[slot], slot, meta, settings)
        source = cached_batches(bench, task, work.progress.message)
    else:
        task = PairTask(students[slot], slot, teacher, meta, prefix, settings)
    evaluate = partial(_in_slot, bench, meta, slot)
    return TeachingPair(students[slot], task, source, evaluate, stitch_fit, flops)


def _pair(work: _Work) -> dict[str, Any]:
    if work.config.pair.budget.kind == "bandit":
        return finish_rounds(work, partial(_make_pair, work))
    pair = _make_pair(work)
    fitted = work.fit(pair.task, work.config.pair.train, pair.evaluate, source=pair.source)
    fitted = replace(fitted, flops=fitted.flops + pair.flops)
    return work.finish(pair.student, fitted, pair.evaluate(pair.student), stitch_fit=pair.stitch_fit)


def _round(work: _Work) -> dict[str, Any]:
    return train_round(work, partial(_make_pair, work))


def _fit_stitches(
    bench: Workbench, students: list[nn.Module], slot: int, teacher: ModuleChain, prefix: ModuleChain
) -> dict[str, float]:
    """Fit a module's stitch to training batches; the share of variance that it explains, by its side."""
    config, device = bench.config, bench.execution.accelerator.device
    batches = train_batches(
        bench.train_split,
        batch_size=config.pair.train.batch_size,
        seed=bench.seed("stitch batches"),
        stop=config.student.stitch_batches,
        augmentation=config.data.augmentation,
        num_workers=config.data.num_workers,
    )
    for module in (*students, *teacher, *prefix):
        if not any(parameter.is_meta for parameter in module.parameters()):
            module.to(device)
    images = [images.to(device) for images, _ in batches]
    return {fit.side: fit.explained for fit in fit_stitches(students, teacher, images, slots=[slot], prefix=prefix)}


def _end_to_end(work: _Work) -> dict[str, Any]:
    bench, arm, training = work.bench, work.step.arm, work.config.e2e
    cold: dict[str, float] = {}
    if arm in ("scratch", "distill"):
        training, model = baseline_training(work.config, bench.slots), bench.student_model()
    else:
        assemblies = {}
        for stitches in ("kept", "folded", "dropped"):
            modules = bench.student_modules()
            for i, module in enumerate(modules):
                bench.load(module, f"{arm}/pair{i}")
            assemblies[stitches] = bench.assembled(modules, stitches).model
            cold |= bench.accuracies(assemblies[stitches], f"cold_{stitches}_")
        chosen = work.config.student.stitches
        model = assemblies[chosen]
        cold["cold_test_accuracy"] = cold[f"cold_{chosen}_test_accuracy"]
    if arm == "distill":
        settings = bench.settings(arm, training.label_smoothing)
        task: Task = WholeModelDistillation(model, bench.trained_teacher(), settings)
    else:
        task = SupervisedTask(model, training.label_smoothing)
    fitted = work.fit(task, training, bench.accuracies)
    metrics = bench.accuracies(model) | cold
    density = save_learned_graph(bench.step_folder(work.step.name), model) if work.writes else []
    return work.finish(model, fitted, metrics, expert_load=expert_load(model), graph_density=density)


def _in_slot(bench: Workbench, meta: ModuleChain, slot: int, module: nn.Module) -> dict[str, float]:
    """Accuracies of the meta model with a module in one of its slots."""
    return bench.accuracies(hybrid(meta, slot, module))


def _headline(result: dict[str, Any]) -> str:
    if result["phase"] == "cache":
        return f"{result['cache']['batches']} batches in {result['cache']['bytes'] / 1e6:.1f} MB"
    if result["phase"] == "round":
        part = result["slice"]
        return f"{part['steps']} steps, loss {part['loss_before']:.4g} to {part['loss_after']:.4g}"
    shown = []
    for name, value in result["metrics"].items():
        values = value if isinstance(value, list) else [value]
        shown.append(f"{name.replace('_', ' ')} {', '.join(f'{v:.1f}' for v in values)} %")
    return " · ".join(shown)


_PHASES: dict[str, Callable[[_Work], dict[str, Any]]] = {
    "teacher": _teacher,
    "PT": _meta,
    "MT": _incubate,
    "FT": _finetune_teacher,
    "hybrids": _hybrids,
    "cache": _cache,
    "round": _round,
    "m2mKD": _pair,
    "E2E": _end_to_end,
}
