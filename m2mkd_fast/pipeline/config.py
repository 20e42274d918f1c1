"""The typed configuration of a run: defaults, then a named recipe, then the YAML file, then ``key=value`` overrides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2mkd_fast.errors import M2MKDError, UnknownNameError

ARMS = ("m2mkd", "task", "distill", "scratch")
TRACKERS = ("tensorboard", "wandb")


@dataclass
class TrainingConfig:
    """One phase of training. Steps are optimiser updates; the learning rate follows a cosine after a linear warm-up."""

    steps: int = 300
    batch_size: int = 128
    optimizer: str = "adamw"  # any name that timm's create_optimizer_v2 knows
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps
    clip_grad: float = 1.0  # largest gradient norm; 0 leaves gradients alone
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float = 0.0  # 0: no moving average; else its weights are evaluated and kept
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2  # the last ones, of which the newest intact one counts
    accumulate: int = 1  # micro-batches of equal size in which a step takes its batch
    checkpoint_activations: bool = False  # blocks keep their inputs alone and compute again in the backward pass
    compile: bool = False  # forward and backward pass through torch.compile
    layer_decay: float = 1.0  # learning rate of a layer over that of the next one; 1: all alike
    max_skipped: int = 10  # steps left out for a loss or gradient that is not finite, before the run stops


@dataclass
class DataConfig:
    spec: str = "digits"  # one of list_datasets(), such as glyphs, folder:PATH, imagenet:PATH, webdataset:PATTERN
    options: dict[str, Any] = field(default_factory=dict)  # passed to create_dataset
    augmentation: Any = "affine"  # preset, or a mapping with its name and options
    repeats: int = 1  # so many differently augmented copies of an image in succession (DeiT's repeated augmentation: 3)
    num_workers: int = 0


@dataclass
class TeacherConfig:
    model: str = "vit_micro"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None  # safetensors file of a pretrained teacher; without it the run trains one
    parts: Any = 4  # count, list of depths, or "balanced:COUNT"
    train: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class MetaConfig:
    source: str = "teacher"  # "teacher": made from it; "labels": trained first, the teacher is incubated inside it
    depth: Any = 1  # blocks a slot, or a list
    train: TrainingConfig = field(default_factory=TrainingConfig)
    max_hybrid_drop: float = 20.0  # points below the teacher at which a hybrid stops the run


@dataclass
class IncubationConfig:
    """MT, the teacher's modules inside the meta model, and FT, the teacher whole; used with ``meta.source=labels``."""

    train: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class StudentConfig:
    model: str = "vmoe_micro.m2mkd"
    options: dict[str, Any] = field(default_factory=dict)
    parts: Any = 4
    stitches: str = "kept"  # of the assembled model: "kept"; "folded", one at each cut; "dropped", as published
    stitch_init: str = "default"  # "least_squares": those after modules are fitted to the teacher's features first
    stitch_batches: int = 8  # training batches that least squares takes
    tokens: Any = "teacher"  # NAC only: latents of a student module; "teacher" for as many as the teacher has tokens


@dataclass
class BudgetConfig:
    """How the pairs of an arm share their slots * ``pair.train.steps`` steps; see :mod:`m2mkd_fast.pipeline.budget`.

    All keys but ``kind`` belong to the bandit.
    """

    kind: str = "equal"  # "equal": as many steps a pair; "bandit": rounds in which more goes where the loss falls
    rounds: int = 8  # times the bandit looks at the losses
    slice_steps: int = 25  # steps that one draw of the bandit gives to a pair
    discount: float = 0.2  # weight of a reward one round later: 1 forgets nothing, 0 knows the last round alone
    anneal: float = 0.25  # share of all steps at the end, over which the learning rate falls to zero


@dataclass
class PairConfig:
    alpha: float = 0.5
    tau: float = 1.0
    kind: str = "soft"
    kd_reduction: str = "batchmean"
    feature_weight: float = 3.0
    prefix: str = "teacher"  # whose earlier modules make the pair's input: "teacher" or "meta"
    cache: bool = False  # what pairs need of frozen modules is computed once and read from disk
    cache_batches: int = 0  # distinct batches that are kept, and come again after the last; 0: one for every step
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class BaselineConfig:
    """The arms without modules: from scratch, and distilled as a whole."""

    train: TrainingConfig = field(default_factory=TrainingConfig)
    match_steps: bool = True  # give them as many steps as meta, pairs and end-to-end take together


@dataclass
class ParallelConfig:
    """How the processes of a step (`torchrun`) share it. It says where a step computes, not what."""

    strategy: str = "ddp"  # "ddp": weights in every process; "fsdp": each holds a part of weights and optimiser state
    experts: int = 1  # processes among which each mixture's experts are shared out; it divides their number


@dataclass
class RunConfig:
    name: str = "run"
    output: str = ""  # run folder; "" means runs/<name>
    seed: int = 0
    threads: int = 0  # CPU threads a step; 0 divides the cores among the jobs
    device: str = "auto"
    precision: str = "auto"  # "auto": bf16 on a GPU that has it, else float32; "fp16" scales losses
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trackers: list[str] = field(default_factory=list)  # "tensorboard", "wandb": shown what metrics.jsonl holds
    recipe: str = "composable"
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    incubation: IncubationConfig = field(default_factory=IncubationConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    e2e: TrainingConfig = field(default_factory=TrainingConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What a recipe sets; the YAML file and the command line still win over it.
RECIPES: dict[str, dict[str, Any]] = {
    "composable": {
        "meta": {"source": "teacher"},
        "student": {"stitches": "kept", "tokens": "teacher"},
        "pair": {"prefix": "teacher", "feature_weight": 3.0, "kd_reduction": "batchmean"},
    },
    "published": {
        "meta": {"source": "labels"},
        "student": {"stitches": "dropped", "tokens": 1},
        "pair": {"prefix": "meta", "feature_weight": 0.0, "kd_reduction": "reference"},
    },
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": tuple(RECIPES),
    "meta.source": ("teacher", "labels"),
    "student.stitches": ("kept", "folded", "dropped"),
    "student.stitch_init": ("default", "least_squares"),
    "pair.kind": ("soft", "hard"),
    "pair.kd_reduction": ("batchmean", "reference"),
    "pair.prefix": ("teacher", "meta"),
    "pair.budget.kind": ("equal", "bandit"),
    "parallel.strategy": ("ddp", "fsdp"),
    "precision": ("auto", "float32", "bf16", "fp16"),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply ``key=value`` overrides.

    Args:
        path: YAML file whose keys are those of :class:`RunConfig`.
        overrides: as on the command line, for example ``["pair.train.steps=100", "seed=1"]``.

    Raises:
        M2MKDError: the file is missing or no YAML mapping, or a value has the wrong type or is out of range.
        UnknownNameError: a key or a choice is unknown; the near ones are listed.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise M2MKDError(f"no configuration file {str(path)!r}" + (f"; there are {', '.join(near)}" if near else ""))
    try:
        layers = [OmegaConf.load(path)]
    except Exception as error:
        raise M2MKDError(f"{path} is no valid YAML: {error}") from error
    for override in overrides:
        if "=" not in override:
            raise M2MKDError(f"override {override!r} is not of the form key=value, for example pair.alpha=0.5")
        layers.append(OmegaConf.from_dotlist([override]))
    return make_config(layers)


def make_config(layers: Sequence[dict[str, Any] | DictConfig | ListConfig]) -> RunConfig:
    """Merge mappings, later ones winning, over the recipe they name and the defaults; check every key and value."""
    layers = [OmegaConf.create(layer) if isinstance(layer, dict) else layer for layer in layers]
    known = set(dict(_entries(RunConfig())))
    containers = {key: type(value) for key, value in _leaves(RunConfig()) if isinstance(value, dict | list)}
    for layer in layers:
        if not isinstance(layer, DictConfig):
            raise M2MKDError(f"a configuration is a mapping of keys to values, got {type(layer).__name__}")
        _check_keys(OmegaConf.to_container(layer), known, containers)
    recipe = next((layer["recipe"] for layer in reversed(layers) if "recipe" in layer), RunConfig().recipe)
    if recipe not in RECIPES:
        raise UnknownNameError("recipe", str(recipe), RECIPES)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), RECIPES[recipe], *layers)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise M2MKDError(f"configuration: {str(error).splitlines()[0]} (at {error.full_key})") from error
    check_values(config)
    return config


def check_values(config: RunConfig) -> None:
    """Raise an :class:`M2MKDError` for the first value that no run could use."""
    flat = OmegaConf.create(config.to_dict())
    for key, choices in _CHOICES.items():
        value = OmegaConf.select(flat, key)
        if value not in choices:
            raise UnknownNameError(key, str(value), choices)
    for key, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise M2MKDError(f"{key} must be a finite number, got {value}")
    for arm in config.arms:
        if arm not in ARMS:
            raise UnknownNameError("arm", arm, ARMS)
    if config.parallel.experts < 1:
        raise M2MKDError(f"parallel.experts must be at least 1, got {config.parallel.experts}")
    if config.data.repeats < 1:
        raise M2MKDError(f"data.repeats must be at least 1, got {config.data.repeats}")
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            raise UnknownNameError("tracker", tracker, TRACKERS)
    if len(set(config.arms)) < len(config.arms):
        raise M2MKDError(f"arms must name each way to train once, got {', '.join(config.arms)}")
    for name, training in phases(config):
        _check_training(name, training)
    if not 0.0 <= config.pair.alpha <= 1.0:
        raise M2MKDError(f"pair.alpha must be between 0 and 1, got {config.pair.alpha}")
    if not config.pair.tau > 0:
        raise M2MKDError(f"pair.tau must be positive, got {config.pair.tau}")
    if config.pair.feature_weight < 0:
        raise M2MKDError(f"pair.feature_weight must not be negative, got {config.pair.feature_weight}")
    if config.pair.cache_batches < 0:
        raise M2MKDError(f"pair.cache_batches must not be negative, got {config.pair.cache_batches}")
    if config.pair.cache_batches and not config.pair.cache:
        raise M2MKDError(f"pair.cache_batches={config.pair.cache_batches} is read with pair.cache=true only; set both")
    _check_budget(config.pair.budget)
    if config.meta.source == "labels" and config.teacher.weights:
        raise M2MKDError(
            "meta.source=labels trains a new teacher inside the meta model, but teacher.weights names a finished one; "
            "set meta.source=teacher to make the meta model from it, or remove teacher.weights"
        )
    if config.student.tokens != "teacher" and not (
        isinstance(config.student.tokens, int) and config.student.tokens > 0
    ):
        raise M2MKDError(f"student.tokens must be 'teacher' or a positive count, got {config.student.tokens!r}")
    if config.student.stitch_batches < 1:
        raise M2MKDError(f"student.stitch_batches must be at least 1, got {config.student.stitch_batches}")


def _check_budget(budget: BudgetConfig) -> None:
    for key in ("rounds", "slice_steps"):
        if getattr(budget, key) < 1:
            raise M2MKDError(f"pair.budget.{key} must be at least 1, got {getattr(budget, key)}")
    for key in ("discount", "anneal"):
        if not 0.0 <= getattr(budget, key) <= 1.0:
            raise M2MKDError(f"pair.budget.{key} must be between 0 and 1, got {getattr(budget, key)}")


def _check_training(name: str, training: TrainingConfig) -> None:
    least = {"steps": 0, "max_skipped": 0}
    least |= dict.fromkeys(("batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints", "accumulate"), 1)
    for key, least_value in least.items():
        if getattr(training, key) < least_value:
            raise M2MKDError(f"{name}.{key} must be at least {least_value}, got {getattr(training, key)}")
    if not training.learning_rate > 0:
        raise M2MKDError(f"{name}.learning_rate must be positive, got {training.learning_rate}")
    for key, high in {"warmup": 1.0, "label_smoothing": 1.0, "ema_decay": 1.0}.items():
        if not 0.0 <= getattr(training, key) < high:
            raise M2MKDError(f"{name}.{key} must be at least 0 and below {high}, got {getattr(training, key)}")
    for key in ("clip_grad", "mixup", "cutmix", "weight_decay"):
        if getattr(training, key) < 0:
            raise M2MKDError(f"{name}.{key} must not be negative, got {getattr(training, key)}")
    if not 0.0 < training.layer_decay <= 1.0:
        raise M2MKDError(f"{name}.layer_decay must be above 0 and at most 1, got {training.layer_decay}")
    if training.batch_size % training.accumulate:
        raise M2MKDError(
            f"{name}.batch_size={training.batch_size} cannot be cut into {name}.accumulate={training.accumulate} equal "
            "micro-batches; make it a multiple"
        )
    if (training.mixup or training.cutmix) and training.batch_size % 2:
        raise M2MKDError(f"{name}.batch_size must be even with mixup or cutmix, got {training.batch_size}")


def phases(config: RunConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """The phases' training settings with their dotted names."""
    return ((key, value) for key, value in _entries(config) if isinstance(value, TrainingConfig))


def _leaves(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Keys that are no sections, dotted, with their values."""
    return ((key, value) for key, value in _entries(config) if not is_dataclass(value))


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys, dotted, sections before what is in them, with their values."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        yield prefix + entry.name, value
        if is_dataclass(value):
            yield from _entries(value, f"{prefix}{entry.name}.")


def _check_keys(layer: Any, known: set[str], containers: dict[str, type], prefix: str = "") -> None:
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if name not in known or "." in str(key):  # a dotted key in YAML would be a new name, not a path
            raise UnknownNameError("configuration key", name, known)
        inside = sorted(key.removeprefix(f"{name}.") for key in known if key.startswith(f"{name}."))
        if inside and not isinstance(value, dict):
            raise M2MKDError(f"{name} is a section with the keys {', '.join(inside)}; got {value!r}")
        if name in containers and not isinstance(value, containers[name]):
            kind = "mapping, {key: value}" if containers[name] is dict else "list, [one, another]"
            raise M2MKDError(f"{name} is a {kind}; got {value!r}")
        if inside:
            _check_keys(value, known, containers, f"{name}.")
