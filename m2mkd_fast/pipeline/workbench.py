"""Makes the data and models of a configuration, and reads what earlier steps of its run folder made."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m2mkd_fast.data import ImageDataset, Split, create_dataset
from m2mkd_fast.data.seeds import derive_seed
from m2mkd_fast.distill.tasks import DistillationSettings
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.evaluate import evaluate_accuracy
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.assemble import Assembly, assemble
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import hybrid, meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import build_without_memory, give_memory, load_module, load_strict
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.pipeline.config import RunConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.files import read_json


class Workbench:
    """Everything is made anew from (configuration, seed) where it is asked for, so every process makes the same."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.execution = Execution(config.device, config.precision, config.parallel)

    @functools.cached_property
    def dataset(self) -> ImageDataset:
        return create_dataset(self.config.data.spec, **self.config.data.options)

    @property
    def train_split(self) -> Split:
        return self.dataset.splits["train"]

    def step_folder(self, name: str) -> Path:
        return self.folder / "steps" / name

    def cache_folder(self, key: str) -> Path:
        """Where the features of a key are, see :mod:`m2mkd_fast.pipeline.caching`."""
        return self.folder / "cache" / key[:16]

    def result(self, name: str) -> dict[str, Any] | None:
        """What a step reported, or None where it is not finished."""
        path = self.step_folder(name) / "result.json"
        return read_json(path) if path.exists() else None

    def seed(self, *words: int | str) -> int:
        return derive_seed(self.config.seed, *words)

    def teacher(self) -> tuple[nn.Module, ModuleChain]:
        """The teacher as a whole and as the chain of its modules, with its pretrained weights where there are any."""
        config = self.config.teacher
        model = self._model(config.model, config.options, "teacher")
        if config.weights:
            load_pretrained(model, Path(config.weights))
        return model, split(model, config.parts, self.dataset.image_shape)

    @functools.cached_property
    def _teacher_shape(self) -> tuple[nn.Module, ModuleChain]:
        """The teacher and its chain without memory for parameters: cutting along a graph costs a few seconds."""
        config = self.config.teacher
        model = build_without_memory(lambda: self._model(config.model, config.options, "teacher"))
        return model, split(model, config.parts, self.dataset.image_shape)

    @property
    def slots(self) -> int:
        return len(self._teacher_shape[1])

    def teacher_chain(self) -> ModuleChain:
        """The teacher's modules as they are before the run trains anything."""
        config = self.config.teacher
        model, chain = copy.deepcopy(self._teacher_shape)
        give_memory(model, chain)
        if config.weights:
            load_pretrained(model, Path(config.weights))
        else:
            load_strict(model, self._model(config.model, config.options, "teacher").state_dict(), config.model)
        return chain

    def meta(self, teacher: ModuleChain | None = None) -> ModuleChain:
        """The meta model, freshly initialised, from the untrained teacher if that is there already."""
        teacher = self.teacher_chain() if teacher is None else teacher
        torch.manual_seed(self.seed("meta"))
        return meta_model(teacher, self.config.meta.depth)

    def student_model(self) -> nn.Module:
        """The whole student, freshly initialised, the same in every arm."""
        return self._model(self.config.student.model, self.config.student.options, "student")

    def student_modules(self) -> list[nn.Module]:
        """The student's modules, freshly initialised, stitched to the teacher's cuts."""
        teacher, model = self._teacher_shape[1], self.student_model()
        circuit = hasattr(model, "module_key")
        tokens = self.config.student.tokens
        if tokens == "teacher":
            tokens = next(iter(teacher.tokens), None) or 1  # a teacher of one module has no cut
        parts = None if circuit else self.config.student.parts
        torch.manual_seed(self.seed("stitches"))
        return student_modules(model, parts, teacher.cuts, tokens=tokens, image_shape=self.dataset.image_shape)

    def assembled(self, modules: list[nn.Module], stitches: str) -> Assembly:
        return assemble(modules, into=self.student_model() if stitches == "dropped" else None, stitches=stitches)

    def load(self, module: nn.Module, step: str, *, partly: bool = False) -> nn.Module:
        """Fill a module, or that part of it which has memory, with the weights that a finished step made."""
        path = self.step_folder(step) / "weights.safetensors"
        metadata = load_module(path, module, partly=partly)
        result = self.result(step)
        if result is None or metadata["weights_hash"] != result["weights_hash"]:
            raise M2MKDError(f"{path} is not the file that step {step} wrote; delete {path.parent} to make it again")
        return module

    @property
    def teacher_step(self) -> str:
        return "ft" if self.config.meta.source == "labels" else "teacher"

    def trained_teacher(self, slots: Iterable[int] | None = None) -> ModuleChain:
        """The finished teacher; with `slots`, the other modules are without memory."""
        return self._trained(copy.deepcopy(self._teacher_shape[1]), self.teacher_step, slots)

    def trained_meta(self, slots: Iterable[int] | None = None) -> ModuleChain:
        """The finished meta model; with `slots`, the other modules are without memory."""
        return self._trained(meta_model(self._teacher_shape[1], self.config.meta.depth), "meta", slots)

    def _trained(self, chain: ModuleChain, step: str, slots: Iterable[int] | None = None) -> ModuleChain:
        give_memory(*(chain[slot] for slot in (range(len(chain)) if slots is None else slots)))
        return self.load(chain, step, partly=True)

    def step_model(self, name: str) -> nn.Module:
        """The model that a finished step made, as something that maps images to logits."""
        result = self.result(name)
        if result is None:
            steps = self.folder / "steps"
            finished = [str(path.parent.relative_to(steps)) for path in steps.glob("**/result.json")]
            raise UnknownNameError("finished step", name, finished)
        phase, arm, slot = result["phase"], result["arm"], result["slot"]
        if phase == "m2mKD":
            return hybrid(self.trained_meta(), slot, self.load(self.student_modules()[slot], name))
        if phase == "MT":
            return hybrid(self.trained_meta(), slot, self.load(self.teacher_chain()[slot], name))
        if phase == "E2E":
            stitches = self.config.student.stitches
            if arm in ("scratch", "distill") or stitches == "dropped":
                return self.load(self.student_model(), name)
            return self.load(self.assembled(self.student_modules(), stitches).model, name)
        if phase in ("hybrids", "cache"):
            raise M2MKDError(f"step {name} made no model; evaluate teacher, meta, a pair or an arm's e2e")
        return self.trained_meta() if phase == "PT" else self._trained(copy.deepcopy(self._teacher_shape[1]), name)

    def settings(self, arm: str, training_smoothing: float) -> DistillationSettings:
        """Loss weights of an arm; the arm ``task`` learns its modules from the labels alone."""
        pair = self.config.pair
        distils = arm != "task"
        return DistillationSettings(
            alpha=pair.alpha if distils else 0.0,
            tau=pair.tau,
            kind=pair.kind,
            kd_reduction=pair.kd_reduction,
            feature_weight=pair.feature_weight if distils else 0.0,
            label_smoothing=training_smoothing,
        )

    def accuracies(self, model: nn.Module, prefix: str = "") -> dict[str, float]:
        """Accuracy in percent on every split that is held out; the processes of a step share its batches.

        On "ood" of the logits of its own classes, as published.
        """
        execution, device = self.execution, self.execution.accelerator.device
        return {
            f"{prefix}{name}_accuracy": evaluate_accuracy(
                model.to(device),
                split,
                device=device,
                class_mask=split.class_mask if name == "ood" else None,
                num_workers=self.config.data.num_workers,
                shard=execution.shard,
                total=execution.sum,
            )
            for name, split in self.dataset.splits.items()
            if name != "train"
        }

    def _model(self, name: str, options: dict[str, Any], stream: str) -> nn.Module:
        channels, height, _ = self.dataset.image_shape
        facts = {"num_classes": self.dataset.num_classes, "img_size": height, "in_chans": channels, **options}
        torch.manual_seed(self.seed(stream))
        try:
            return create_model(name, **facts)
        except M2MKDError as error:
            # timm's convolutional models take images of any size, and no argument for it.
            if "img_size" in options or "unexpected keyword argument 'img_size'" not in str(error):
                raise
        del facts["img_size"]
        torch.manual_seed(self.seed(stream))
        return create_model(name, **facts)


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load a teacher from a safetensors file: one of this package, or a plain state dict such as timm's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise M2MKDError(f"teacher.weights: there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format", "").startswith("m2mkd_fast")
            state = {} if ours else {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise M2MKDError(f"teacher.weights: {path} is truncated or no safetensors file ({error})") from error
    if ours:
        load_module(path, model)
    else:
        load_strict(model, state, path)
