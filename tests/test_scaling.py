"""The arithmetic of the page on scaling, and that the page is what its command writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ("benchmarks/results/cpu/phases_vmoe.json", "benchmarks/results/cpu/phases_nac.json")


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scaling")
    sys.path.remove(str(ROOT / "benchmarks"))


def step(scaling, image_seconds: float = 1.0, update_seconds: float = 0.0, **changes):
    values = {"case": "NAC from ViT-H/14", "phase": "MT", "slot": 0, "batch_size": 2, "image_flops": 1e9}
    values |= {"parameters": 100, "expert_parameters": 0, **changes}
    return scaling.PhaseStep(image_seconds=image_seconds, update_seconds=update_seconds, **values)


def test_hours_are_images_times_seconds_and_an_update_a_step(scaling):
    phase = scaling.Phase("MT", 2, 100, "")
    steps = 2 * scaling.IMAGES / 100
    assert scaling.hours(step(scaling, 0.5, 7.0), phase, 1) == pytest.approx(steps * (50 + 7) / 3600)
    assert scaling.hours(step(scaling, 0.5, 7.0), phase, 8) == pytest.approx(steps * (13 * 0.5 + 7) / 3600)
    # Beyond one image a device, more devices do not help.
    assert scaling.hours(step(scaling), phase, 100) == scaling.hours(step(scaling), phase, 1000)


def test_modules_side_by_side_wait_for_the_slowest(scaling):
    phase = scaling.Phase("MT", 1, 64, "")
    steps = [step(scaling, seconds) for seconds in (3.0, 1.0, 1.0, 1.0)]
    alone = [scaling.hours(one, phase, 1) for one in steps]
    assert scaling.side_by_side(steps, phase, 1) == scaling.one_after_another(steps, phase, 1)
    two = scaling.side_by_side(steps, phase, 2)  # the long one here, the others there
    assert two.makespan == pytest.approx(alone[0]) and two.used == pytest.approx(sum(alone))
    six = scaling.side_by_side(steps, phase, 6)  # the two more go to the long one
    assert six.makespan == pytest.approx(max(scaling.hours(steps[0], phase, 3), alone[1]))


def test_side_by_side_a_step_updates_one_module_where_one_after_another_all_do(scaling):
    phase = scaling.Phase("MT", 1, 1024, "")
    steps = [step(scaling, 0.01, 1.0) for _ in range(4)]
    together, serial = (make(steps, phase, 64) for make in (scaling.side_by_side, scaling.one_after_another))
    assert together.makespan < serial.makespan and together.used < serial.used


def test_bytes_of_gradients_and_tokens(scaling):
    assert scaling.all_reduce_bytes(1000, 1) == 0
    assert scaling.all_reduce_bytes(1000, 4) == 2 * 3 / 4 * 1000 * 4
    # Four passes of 3 images' 5 tokens, 2 rows each of 7 numbers of 2 bytes, half of them for the other rank.
    assert scaling.exchange_bytes(3, 5, 2, 7, 1, 2) == 4 * 3 * 5 * 2 * 7 * 2 / 2


def test_published_mixtures_are_those_of_the_model(scaling):
    assert scaling.mixtures("vmoe_base.m2mkd") == scaling.Mixtures(12, 8, 2, 197, 768)
    assert scaling.mixtures("nac_imagenet.scale_free") is None


def test_the_page_is_what_its_command_writes(scaling):
    contents = [json.loads((ROOT / path).read_text()) for path in STEPS]
    command = f"python benchmarks/scaling.py {' '.join(STEPS)} --write docs/scaling.md"
    written = scaling.page(contents, command)
    assert (ROOT / "docs" / "scaling.md").read_text() == written, f"make it again: {command}"
    results = [result for content in contents for result in content["results"]]
    measured = {(result["case"], result["phase"], result["slot"]) for result in results}
    for name, case in scaling.CASES.items():
        slots = range(len(case.parts))
        phases = [("MT", *slots), ("pair, published", *slots), ("pair, composable", *slots)]
        assert {(name, phase, slot) for phase, *own in phases for slot in own} <= measured
