"""The configurations with published settings say what was published, and their models are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2mkd_fast.data import ImageDataset, TensorSplit
from m2mkd_fast.data.augmentation import create_augmentation
from m2mkd_fast.pipeline.config import load_config, phases
from m2mkd_fast.pipeline.workbench import Workbench

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("imagenet_vmoe_base", "imagenet_nac", "tiny_imagenet_nac")
# Epochs, of which warm-up, batch, base learning rate for 512 images, weight decay, clipping: TRAIN-MOE.md,
# TRAIN-NAC.md and the configurations they name.
PREPARATION = {
    "meta.train": (300, 20, 2048, 5e-4, 0.05, 0),
    "incubation.train": (100, 20, 2048, 5e-4, 0.05, 0),
    "incubation.finetune": (100, 0, 1024, 5e-4, 0.05, 1),
    "pair.train": (100, 20, 2048, 5e-4, 0.05, 0),
}
END_TO_END = {
    "imagenet_vmoe_base": (100, 0, 1024, 5e-4, 0.05, 1),
    "imagenet_nac": (110, 25, 8 * 32, 1.2e-3, 0.05, 0),
    "tiny_imagenet_nac": (400, 25, 8 * 128, 1.2e-3, 0.075, 0),
}
IMAGES = {"imagenet_vmoe_base": 1_281_167, "imagenet_nac": 1_281_167, "tiny_imagenet_nac": 100_000}


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_published_ones(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.recipe == "published" and config.data.repeats == 3 and config.student.stitches == "dropped"
    pair = config.pair
    assert (pair.alpha, pair.tau, pair.kind, pair.kd_reduction) == (0.5, 1, "soft", "reference")
    assert create_augmentation(config.data.augmentation).options["auto_augment"] == "rand-m9-mstd0.5-inc1"
    settings = dict(phases(config))
    for phase, published in {**PREPARATION, "e2e": END_TO_END[name]}.items():
        epochs, warmup, batch, rate, decay, clip = published
        training = settings[phase]
        assert training.steps == epochs * (IMAGES[name] // batch), phase
        assert training.warmup == pytest.approx(warmup / epochs, rel=1e-3), phase
        assert training.batch_size == batch and training.optimizer == "adamw"
        assert training.learning_rate == pytest.approx(rate * batch / 512), phase
        assert (training.weight_decay, training.clip_grad) == (decay, clip), phase
        assert (training.mixup, training.cutmix, training.label_smoothing) == (0.8, 1.0, 0.1), phase


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [("imagenet_vmoe_base", 304.3, 483.3), ("imagenet_nac", 631.9, 37.6), ("tiny_imagenet_nac", 630.1, 26.7)],
)
def test_models_are_the_published_ones(name, teacher, student, tmp_path):
    """Made without memory for their millions of parameters."""
    bench = Workbench(load_config(CONFIGS / f"{name}.yaml"), tmp_path)
    side, classes = (64, 200) if name.startswith("tiny") else (224, 1000)
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    split = TensorSplit("train", pixels, torch.tensor([0]), classes, (0.5,) * 3, (0.5,) * 3)
    bench.dataset = ImageDataset("none", [str(label) for label in range(classes)], {"train": split, "test": split})
    chain = bench._teacher_shape[1]
    with torch.device("meta"):
        meta, modules, model = bench.meta(chain), bench.student_modules(), bench.student_model()
    assert [module.depth for module in chain] == bench.config.teacher.parts
    assert len(meta) == len(modules) == len(chain)
    for made, millions in ((chain, teacher), (model, student)):
        assert sum(parameter.numel() for parameter in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
