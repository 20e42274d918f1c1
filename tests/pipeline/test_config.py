from __future__ import annotations

import math
import os
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.config import ARMS, RECIPES, RunConfig, _leaves, load_config, make_config
from m2mkd_fast.pipeline.plan import closure, plan

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "100"))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_later_layers_win_over_the_recipe(tmp_path):
    path = write(tmp_path, "recipe: published\npair: {feature_weight: 1.5}\nteacher: {parts: [2, 2]}\n")
    config = load_config(path, ["pair.alpha=0.25", "pair.train.steps=7"])
    assert config.pair.feature_weight == 1.5
    assert config.pair.prefix == RECIPES["published"]["pair"]["prefix"] == "meta"
    assert config.student.stitches == "dropped"
    assert (config.pair.alpha, config.pair.train.steps, config.teacher.parts) == (0.25, 7, [2, 2])


def test_the_command_line_may_choose_the_recipe(tmp_path):
    assert load_config(write(tmp_path, "seed: 3"), ["recipe=published"]).meta.source == "labels"
    assert load_config(write(tmp_path, "seed: 3")).meta.source == "teacher"


def test_resolved_configuration_reads_back(tmp_path):
    config = make_config([{"seed": 5, "student": {"options": {"num_experts": 4}}}])
    assert make_config([config.to_dict()]) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("pair: {alhpa: 0.5}", [], r"unknown configuration key 'pair.alhpa'; did you mean 'pair.alpha'"),
        ("", ["pair.train.step=3"], r"did you mean 'pair.train.steps'"),
        ("recipe: composible", [], r"unknown recipe 'composible'; did you mean 'composable'"),
        ("arms: [m2mdk]", [], r"unknown arm 'm2mdk'; did you mean 'm2mkd'"),
        ("student: {stitches: keep}", [], r"unknown student.stitches 'keep'; did you mean 'kept'"),
        ("student: {stitch_init: least_square}", [], r"unknown student.stitch_init .*did you mean 'least_squares'"),
        ("student: {stitch_batches: 0}", [], r"student.stitch_batches must be at least 1, got 0"),
        ("pair: {alpha: 2}", [], r"pair.alpha must be between 0 and 1, got 2"),
        ("e2e: {steps: many}", [], r"many.*e2e.steps"),
        ("e2e: {batch_size: 0}", [], r"e2e.batch_size must be at least 1, got 0"),
        ("e2e: {learning_rate: 0}", [], r"e2e.learning_rate must be positive"),
        ("e2e: {batch_size: 7, mixup: 0.8}", [], r"must be even with mixup"),
        ("student: {tokens: many}", [], r"student.tokens must be 'teacher' or a positive count, got 'many'"),
        ("meta: {source: labels}\nteacher: {weights: t.safetensors}", [], r"set meta.source=teacher"),
        ("e2e: {clip_grad: .nan}", [], r"e2e.clip_grad must be a finite number, got nan"),
        ("pair: {feature_weight: .inf}", [], r"pair.feature_weight must be a finite number, got inf"),
        ("- a\n- b", [], r"a configuration is a mapping"),
        ("a: [", [], r"is no valid YAML"),
        ("", ["seed"], r"override 'seed' is not of the form key=value"),
        ("pair: 3", [], r"pair is a section with the keys alpha, .*; got 3"),
        ("seed: [1]", [], r"configuration: .*seed"),
        ("arms: m2mkd", [], r"arms is a list, \[one, another\]; got 'm2mkd'"),
        ("teacher: {options: []}", [], r"teacher.options is a mapping, .*; got \[\]"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(M2MKDError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(M2MKDError, match="no configuration file .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 64, -1, 0.0, 0.5, 0.999, 1.0, 1.5, -0.5, 1e-9, 1e9, math.nan, math.inf])
WORDS = st.sampled_from(
    [*ARMS, *RECIPES, "kept", "meta", "teacher", "labels", "bf16", "", "balanced:3", "bandit", "Kept"]
)
LAYER = st.tuples(st.sampled_from(sorted(dict(_leaves(RunConfig())))), ANYTHING | NUMBERS | WORDS)


@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
@given(st.lists(LAYER, max_size=4))
@example([("e2e.clip_grad", math.nan)])
@example([("pair.train.weight_decay", math.inf)])
@example([("arms", ["task", "task"])])
@example([("teacher.options", [])])
def test_fuzz_any_value_of_any_key_is_taken_or_refused_clearly(layers):
    """What is taken is usable: it reads back the same, has a plan, and every number in it is one."""
    try:
        config = make_config([nested(key, value) for key, value in layers])
    except M2MKDError as error:
        assert str(error)
        return
    assert make_config([config.to_dict()]) == config
    steps = plan(config, 3)
    assert closure(steps, steps) == steps
    assert len({step.name for step in steps}) == len(steps)
    assert all(math.isfinite(value) for _, value in _leaves(config) if isinstance(value, float))


@given(st.text(min_size=1))
def test_fuzz_unknown_keys_are_errors(key):
    if key in RunConfig().to_dict():
        return
    with pytest.raises(UnknownNameError, match="unknown configuration key"):
        make_config([{key: 1}])
