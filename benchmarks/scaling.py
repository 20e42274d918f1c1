"""Whole runs at published sizes on 1 to 512 devices, computed from measured steps: writes docs/scaling.md.

python benchmarks/bench_phases.py --json benchmarks/results/cpu/phases.json
python benchmarks/scaling.py benchmarks/results/cpu/phases.json --write docs/scaling.md
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_phases import CASES, PhaseStep

from m2mkd_fast.models import create_model
from m2mkd_fast.nn.vision_moe import VisionMoE

IMAGES = 1_281_167  # ImageNet-1k, training
DEVICES = (1, 8, 64, 512)
GRADIENT_BYTES, ROW_BYTES = 4, 2  # gradients travel in float32, tokens in bf16


@dataclass(frozen=True)
class Phase:
    """A phase of a recipe: epochs over ImageNet, and images of a step on all of its devices."""

    name: str
    epochs: int
    batch_size: int
    label: str


# Epochs and batch sizes are those of m2mKD's published commands (kamanphoebe/m2mKD, TRAIN-MOE.md and TRAIN-NAC.md).
PT = Phase("PT", 300, 2048, "PT: meta model on labels")
MT = Phase("MT", 100, 2048, "MT: teacher's modules in the meta model")
FT = Phase("FT", 100, 1024, "FT: teacher whole")
META = Phase("meta from teacher", 100, 2048, "meta model from the teacher")
E2E = {
    "V-MoE-B from ViT-L/16": Phase("E2E", 100, 1024, "E2E: student whole"),
    "NAC from ViT-H/14": Phase("E2E", 110, 256, "E2E: student whole"),
}
RECIPES: dict[str, list[Phase]] = {
    "published": [PT, MT, FT, Phase("pair, published", 100, 2048, "pairs")],
    "composable": [META, Phase("pair, composable", 100, 2048, "pairs")],
}


def hours(step: PhaseStep, phase: Phase, devices: int) -> float:
    """Of one step's model on so many devices, which share the batch and each make the whole update."""
    rows = math.ceil(phase.batch_size / min(devices, phase.batch_size))
    seconds = rows * step.image_seconds + step.update_seconds
    return phase.epochs * IMAGES / phase.batch_size * seconds / 3600


@dataclass(frozen=True)
class Schedule:
    """When independent modules are trained side by side: hours to the end, and hours that devices computed."""

    makespan: float
    used: float


def side_by_side(steps: Sequence[PhaseStep], phase: Phase, devices: int) -> Schedule:
    """Devices shared out so that the slowest module ends as early as can be; where they are few, the longest first."""
    alone = sorted((hours(step, phase, 1) for step in steps), reverse=True)
    if devices < len(steps):
        ends = [0.0] * devices
        for length in alone:
            heapq.heapreplace(ends, ends[0] + length)
        return Schedule(max(ends), sum(alone))
    shares = [1] * len(steps)
    for _ in range(devices - len(steps)):
        slowest = max(range(len(steps)), key=lambda i: hours(steps[i], phase, shares[i]))
        shares[slowest] += 1
    lengths = [hours(step, phase, share) for step, share in zip(steps, shares, strict=True)]
    return Schedule(max(lengths), sum(length * share for length, share in zip(lengths, shares, strict=True)))


def one_after_another(steps: Sequence[PhaseStep], phase: Phase, devices: int) -> Schedule:
    """Every module on all devices."""
    length = sum(hours(step, phase, devices) for step in steps)
    return Schedule(length, length * devices)


def all_reduce_bytes(parameters: int, devices: int) -> float:
    """Sent by each device for the mean of gradients in a ring."""
    return 2 * (devices - 1) / devices * parameters * GRADIENT_BYTES


def exchange_bytes(images: int, tokens: int, top_k: int, width: int, layers: int, ranks: int) -> float:
    """Sent by each rank to experts on others and back, forward and backward, with choices spread evenly."""
    return 4 * layers * images * tokens * top_k * width * ROW_BYTES * (ranks - 1) / ranks


@dataclass(frozen=True)
class Mixtures:
    """Geometry of a student's mixtures."""

    layers: int
    experts: int
    top_k: int
    tokens: int
    width: int


def mixtures(model: str) -> Mixtures | None:
    with torch.device("meta"):
        student = create_model(model)
    layers = [module for module in student.modules() if isinstance(module, VisionMoE)]
    if not layers:
        return None
    tokens = student.patch_embed.num_patches + student.num_prefix_tokens
    return Mixtures(len(layers), layers[0].gate.num_experts, layers[0].gate.top_k, tokens, student.embed_dim)


class Steps:
    """The measured steps of one case."""

    def __init__(self, case: str, results: Sequence[dict[str, Any]]) -> None:
        self.case = case
        self.all = [PhaseStep(**result) for result in results if result["case"] == case]

    def of(self, phase: Phase) -> list[PhaseStep]:
        return [step for step in self.all if step.phase == phase.name]


def critical_path(steps: Steps, recipe: str, devices: int, schedule: Callable[..., Schedule]) -> Schedule:
    phases = [*RECIPES[recipe], E2E[steps.case]]
    parts = [schedule(steps.of(phase), phase, devices) for phase in phases]
    return Schedule(sum(part.makespan for part in parts), sum(part.used for part in parts))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def phase_table(steps: Steps) -> str:
    """What every phase costs on one device, in units of the student trained whole."""
    unit = sum(hours(step, E2E[steps.case], 1) for step in steps.of(E2E[steps.case]))
    rows = []
    seen: set[str] = set()
    for phase in [*RECIPES["published"], *RECIPES["composable"], E2E[steps.case]]:
        mine = steps.of(phase)
        recipe = " / ".join(name for name, phases in RECIPES.items() if phase in phases) or "both"
        flops = sum(step.image_flops for step in mine)
        cost = sum(hours(step, phase, 1) for step in mine)
        longest = max(hours(step, phase, 1) for step in mine)
        assert phase.name not in seen
        seen.add(phase.name)
        rows.append(
            [
                f"{phase.label} ({recipe})",
                str(len(mine)),
                str(phase.epochs),
                f"{flops / 1e9:,.0f}",
                f"{sum(step.image_seconds for step in mine):.2f}",
                f"{cost / unit:.2f}",
                f"{longest / unit:.2f}",
            ]
        )
    heads = ["phase", "modules", "epochs", "GFLOP an image", "s an image", "cost", "longest module"]
    return table(heads, rows)


def path_table(steps: Steps, recipe: str) -> str:
    unit = sum(hours(step, E2E[steps.case], 1) for step in steps.of(E2E[steps.case]))
    rows = []
    for devices in DEVICES:
        together = critical_path(steps, recipe, devices, side_by_side)
        serial = critical_path(steps, recipe, devices, one_after_another)
        whole = one_after_another(steps.of(E2E[steps.case]), E2E[steps.case], devices)
        rows.append(
            [
                str(devices),
                f"{together.makespan / unit:.4f}",
                f"{serial.makespan / unit:.4f}",
                f"{whole.makespan / unit:.4f}",
                f"{together.used / unit:.2f}",
                f"{serial.used / unit:.2f}",
                f"{1 - together.used / (devices * together.makespan):.0%}",
            ]
        )
    heads = [
        "devices",
        "time, modules side by side",
        "time, one module after another",
        "time, student whole alone",
        "device time, side by side",
        "device time, one after another",
        "idle, side by side",
    ]
    return table(heads, rows)


def gradient_table(steps: Steps, recipe: str) -> str:
    """Megabytes that a device sends in a step for the gradients, and relative to its computing."""
    pairs_phase = next(phase for phase in RECIPES[recipe] if phase.name.startswith("pair"))
    pairs, whole = steps.of(pairs_phase), steps.of(E2E[steps.case])[0]
    rows = []
    for devices in DEVICES[1:]:
        share = max(1, devices // len(pairs))
        biggest = max(pairs, key=lambda step: step.parameters)
        cells = [str(devices)]
        for step, count, phase in ((biggest, share, pairs_phase), (whole, devices, E2E[steps.case])):
            sent = all_reduce_bytes(step.parameters, count)
            computed = step.image_flops * math.ceil(phase.batch_size / count)
            cells += [str(count), f"{sent / 1e6:,.0f}", f"{sent / 1e9 / (computed / 1e12):.2f}"]
        rows.append(cells)
    heads = ["devices", "a pair's", "MB sent", "GB a TFLOP", "the student's", "MB sent", "GB a TFLOP"]
    return table(heads, rows)


def expert_table(steps: Steps, shape: Mixtures) -> str:
    phase, whole = E2E[steps.case], steps.of(E2E[steps.case])[0]
    rows = []
    for devices in DEVICES[1:]:
        ranks = min(devices, shape.experts)
        images = math.ceil(phase.batch_size / devices)
        sent = exchange_bytes(images, shape.tokens, shape.top_k, shape.width, shape.layers, ranks)
        dense = all_reduce_bytes(whole.parameters - whole.expert_parameters, devices)
        experts = all_reduce_bytes(whole.expert_parameters // ranks, devices // ranks)
        computed = images * whole.image_flops / 1e12
        rows.append(
            [
                f"{devices} = {devices // ranks} x {ranks}",
                str(images),
                f"{sent / 1e6:,.0f}",
                f"{(dense + experts) / 1e6:,.0f}",
                f"{all_reduce_bytes(whole.parameters, devices) / 1e6:,.0f}",
                f"{(sent + dense + experts) / 1e9 / computed:.2f}",
                f"{all_reduce_bytes(whole.parameters, devices) / 1e9 / computed:.2f}",
            ]
        )
    heads = [
        "devices = data x experts",
        "images a device",
        "tokens to experts and back, MB",
        "gradients, MB",
        "gradients without expert parallelism, MB",
        "GB a TFLOP, with",
        "GB a TFLOP, without",
    ]
    return table(heads, rows)


def measurement(content: dict[str, Any]) -> str:
    """Where a file of measured steps comes from, as an item of a list."""
    facts, batch = content["facts"], content["results"][0]["batch_size"]
    return (
        f"- {facts['gpu'] or facts['processor']}, {facts['threads']} threads, batch {batch}, "
        f"torch {facts['torch']}, commit {(facts['commit'] or 'unknown')[:12]}: `{facts['command']}`"
    )


PAGE = """# Scaling, on paper

What whole runs cost at published sizes, and what more devices make of it. Nothing on this page is a measurement of a
cluster: it is arithmetic on one device's measured steps, made by

```
{command}
```

**Measured:** seconds and operations of one training step of every phase, and its optimiser's update:

{measured}

No GPU has measured them yet; the same commands make this page of a GPU's steps. All costs are therefore *relative*: 1
is what the student costs when it is trained whole for its {epochs} epochs on one such device ({absolute}).

**Assumed:** epochs and batch sizes as published. A step takes images a device times seconds an image, and the update;
the batch is shared out evenly. Communication takes no time here, and its bytes are listed for you to compare with
your network. ImageNet-1k has {images:,} images.

The steps wait for each other like this. *published*: PT, then MT 0 ... L-1 side by side, then FT, then pairs 0 ... L-1
side by side, then E2E. *composable*, with a pretrained teacher: meta model, then pairs side by side, then E2E.

**How to read it:** on devices that talk for nothing, modules side by side take as long as one after another, each on
all devices, or a little longer where the last one keeps few devices busy. What they gain is in the tables of bytes:
small groups of devices that never talk to one another, which may stand in different places and stop at any time.
"""


def page(contents: Sequence[dict[str, Any]], command: str) -> str:
    """The page, of one or more files of measured steps."""
    cases = [Steps(case, [result for content in contents for result in content["results"]]) for case in CASES]
    absolute = [
        f"{sum(hours(step, E2E[steps.case], 1) for step in steps.of(E2E[steps.case])):,.0f} h for {steps.case}"
        for steps in cases
    ]
    parts = [
        PAGE.format(
            command=command,
            measured="\n".join(map(measurement, contents)),
            epochs=" or ".join(str(E2E[steps.case].epochs) for steps in cases),
            absolute=", ".join(absolute),
            images=IMAGES,
        )
    ]
    for steps in cases:
        case = CASES[steps.case]
        parts.append(f"## {steps.case}\n")
        parts.append(
            f"Teacher `{case.teacher}` in {len(case.parts)} modules of {case.parts} blocks, `{case.student}`.\n"
        )
        parts.append(phase_table(steps) + "\n")
        for recipe in RECIPES:
            parts.append(f"### Critical path, {recipe}\n")
            parts.append(path_table(steps, recipe) + "\n")
        parts.append("### Gradients\n")
        parts.append(
            "A pair's devices exchange the gradients of one module, and nothing with other pairs; the largest module's "
            "are listed (ring all-reduce, float32, composable recipe). GB a TFLOP times your device's TFLOP/s is the "
            "bandwidth in GB/s at which sending takes as long as computing.\n"
        )
        parts.append(gradient_table(steps, "composable") + "\n")
        shape = mixtures(case.student)
        if shape is not None:
            parts.append("### Expert parallelism, end to end\n")
            parts.append(
                f"{shape.layers} mixtures of {shape.experts} experts, {shape.top_k} a token, {shape.tokens} tokens of "
                f"{shape.width} numbers in bf16: every choice travels to its expert and back, forward and backward.\n"
            )
            parts.append(expert_table(steps, shape) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", type=Path, nargs="+", help="what bench_phases.py wrote")
    parser.add_argument("--write", type=Path, help="the page; without it, it is printed")
    options = parser.parse_args()
    files = " ".join(path.as_posix() for path in options.steps)
    text = page(
        [json.loads(path.read_text()) for path in options.steps],
        f"python benchmarks/scaling.py {files} --write docs/scaling.md",
    )
    if options.write is None:
        print(text)
    else:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
