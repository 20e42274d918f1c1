"""The bandit over pairs: what it gives to whom, that it gives all of it, and that anybody finds the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import PHASE, tiny

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.budget import (
    Slice,
    allocate,
    annealing_steps,
    learning_rate_factor,
    posterior,
    proportional_shares,
    round_sizes,
)
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import BudgetConfig, PairConfig, RunConfig, TrainingConfig, make_config
from m2mkd_fast.pipeline.plan import plan, training_steps
from m2mkd_fast.pipeline.run import run

BANDIT = {"pair": {"budget": {"kind": "bandit"}}}
Curve = Callable[[int], float]


def falling(height: float, constant: float, floor: float = 0.5) -> Curve:
    """A loss that falls exponentially in the pair's own steps."""
    return lambda step: floor + height * math.exp(-step / constant)


def spend(curves: Sequence[Curve], *, rounds: int = 8, steps: int = 200, discount: float = 0.2, seed: int = 0):
    """Play the rounds on synthetic losses; the steps that every pair got in each of them."""
    history, done, given = [], [0] * len(curves), []
    for _ in range(rounds):
        shares = allocate(history, slots=len(curves), steps=steps, slice_steps=10, discount=discount, seed=seed)
        given.append(shares)
        history.append([Slice(n, curve(at), curve(at + n)) for n, at, curve in zip(shares, done, curves, strict=True)])
        done = [at + n for at, n in zip(done, shares, strict=True)]
    return given


def totals(given: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*given, strict=True)]


def test_a_pair_that_has_converged_gets_little_and_one_that_still_falls_gets_more():
    curves = [falling(1.0, 15.0), falling(1.0, 500.0), falling(1.0, 15.0), falling(1.0, 15.0)]
    for seed in range(5):
        given = spend(curves, seed=seed)
        assert given[0] == [50, 50, 50, 50]
        late = totals(given[3:])
        assert late[1] > 0.55 * sum(late)
        assert max(late[0], late[2], late[3]) < 0.2 * sum(late)


def test_the_scale_of_the_losses_does_not_matter():
    curves = [falling(1.0, 50.0), falling(0.4, 300.0), falling(0.1, 1000.0)]
    # A power of two changes no digit, so not even the rounding of the draws.
    larger = [lambda step, curve=curve: 1024.0 * curve(step) for curve in curves]
    assert spend(curves) == spend(larger)


def test_a_pair_that_was_forgotten_is_tried_again():
    """One whose loss begins to fall late, and at once the most: a discount finds it, perfect memory is slow to."""

    def late(step: int) -> float:
        return 1.0 if step < 60 else math.exp(-(step - 60) / 200)

    curves = [late, falling(1.0, 60.0, 0.0), falling(1.0, 60.0, 0.0)]
    found = [totals(spend(curves, rounds=16, steps=120, seed=seed))[0] for seed in range(5)]
    assert min(found) > 16 * 120 / 3


def test_discount_of_one_forgets_nothing_and_of_zero_knows_the_last_round_alone():
    first = [Slice(10, 3.0, 2.0), Slice(10, 3.0, 2.9)]
    second = [Slice(10, 2.0, 2.0), Slice(20, 2.9, 2.5)]
    assert posterior([first, second], slice_steps=10, discount=0.0) == posterior([second], slice_steps=10, discount=0.5)
    # By hand: falls 1.0 and 0.5 over 2 and 3 slices, 1.5 over 5 in all.
    mean, deviation = zip(*posterior([first, second], slice_steps=10, discount=1.0), strict=True)
    assert mean == pytest.approx([(0.3 + 1.0) / 3, (0.3 + 0.5) / 4])
    variance = (1.0 + 0.01 + 0.0 + 0.08) / 5
    assert deviation == pytest.approx([math.sqrt(variance / 3), math.sqrt(variance / 4)])


def test_pairs_that_all_stand_still_share_by_lot():
    still = [[Slice(10, 1.0, 1.0)] * 4]
    shares = allocate(still, slots=4, steps=4000, slice_steps=10, discount=0.5, seed=0)
    assert min(shares) > 700 and sum(shares) == 4000
    rising = [[Slice(10, 1.0, 1.5), *[Slice(10, 1.0, 0.9)] * 3]]
    shares = allocate(rising, slots=4, steps=4000, slice_steps=10, discount=0.5, seed=0)
    assert shares[0] == min(shares)


def test_a_loss_that_is_not_finite_is_no_reward():
    with pytest.raises(M2MKDError, match="pair 1: a loss that went from 1.0 to nan is no reward"):
        posterior([[Slice(1, 1.0, 0.5), Slice(1, 1.0, math.nan)]], slice_steps=1, discount=0.5)


losses = st.floats(-100.0, 100.0)
budgets = st.fixed_dictionaries(
    {
        "slice_steps": st.integers(1, 50),
        "discount": st.floats(0.0, 1.0),
        "seed": st.integers(0, 2**32),
        "steps": st.integers(0, 500),
    }
)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Slice]]:
    slots = draw(st.integers(1, 6))
    one = st.builds(Slice, st.integers(0, 200), losses, losses)
    return draw(st.lists(st.lists(one, min_size=slots, max_size=slots), min_size=1, max_size=6))


@settings(max_examples=100, deadline=None)
@given(history=histories(), budget=budgets)
def test_all_of_a_round_is_given_and_the_same_by_anybody(history, budget):
    shares = allocate(history, slots=len(history[0]), **budget)
    assert sum(shares) == budget["steps"] and min(shares) >= 0
    assert sum(share % budget["slice_steps"] != 0 for share in shares) <= 1
    assert shares == allocate([list(part) for part in history], slots=len(history[0]), **budget)


@settings(max_examples=50, deadline=None)
@given(
    slots=st.integers(1, 9),
    steps=st.integers(0, 1000),
    rounds=st.integers(1, 20),
    anneal=st.floats(0.0, 1.0),
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=9),
)
def test_rounds_and_annealing_make_the_whole_budget(slots, steps, rounds, anneal, weights):
    budget = BudgetConfig(kind="bandit", rounds=rounds, anneal=anneal)
    config = RunConfig(arms=["m2mkd"], pair=PairConfig(train=TrainingConfig(steps=steps), budget=budget))
    annealing = annealing_steps(config.pair, slots)
    assert sum(round_sizes(config.pair, slots)) + annealing == slots * steps
    pairs = [step for step in plan(config, slots) if step.phase in ("round", "m2mKD")]
    assert sum(training_steps(config, step, slots) for step in pairs) == slots * steps
    shares = proportional_shares(annealing, weights)
    assert sum(shares) == annealing
    if sum(weights):
        assert all(abs(share - annealing * w / sum(weights)) < 1 for share, w in zip(shares, weights, strict=True))


def test_the_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(t, warmup=4, end=20, annealing=8) for t in range(20)]
    assert factors[0] == 0.01 and factors[4:13] == [1.0] * 9
    assert factors[:5] == sorted(factors[:5]) and factors[12:] == sorted(factors[12:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 8)
    # While the rounds last nothing is known of the end.
    assert factors[:12] == [learning_rate_factor(t, warmup=4, end=12, annealing=0) for t in range(12)]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"rounds": 0}, "pair.budget.rounds must be at least 1, got 0"),
        ({"slice_steps": 0}, "pair.budget.slice_steps must be at least 1, got 0"),
        ({"discount": 1.5}, "pair.budget.discount must be between 0 and 1, got 1.5"),
        ({"anneal": -0.1}, "pair.budget.anneal must be between 0 and 1, got -0.1"),
    ],
)
def test_impossible_budgets_are_errors(budget, message):
    with pytest.raises(M2MKDError, match=message):
        make_config([{"pair": {"budget": budget}}])


def test_an_unknown_kind_of_budget_names_those_there_are():
    with pytest.raises(UnknownNameError, match="unknown pair.budget.kind 'bandits'; did you mean 'bandit'"):
        make_config([{"pair": {"budget": {"kind": "bandits"}}}])


def test_the_plan_has_a_step_a_pair_and_round_and_the_equal_plan_is_as_it_was():
    config = make_config([BANDIT, {"pair": {"budget": {"rounds": 2}}, "arms": ["m2mkd", "task"]}])
    steps = {step.name: step for step in plan(config, 3)}
    names = [f"m2mkd/round0/pair{i}" for i in range(3)]
    assert steps["m2mkd/round0/pair2"].needs == ("teacher", "meta", "hybrids")
    assert steps["m2mkd/round1/pair0"].needs == ("teacher", "meta", "hybrids", *names)
    assert steps["task/pair1"].needs[3:] == tuple(f"task/round1/pair{i}" for i in range(3))
    assert steps["task/e2e"].needs == ("task/pair0", "task/pair1", "task/pair2")
    equal = plan(make_config([{"arms": ["m2mkd", "task"]}]), 3)
    assert [step for step in equal if step.phase == "round"] == []
    assert all(step.needs == ("teacher", "meta", "hybrids") for step in equal if step.phase == "m2mKD")


def bandit(folder: Path):
    """Two pairs, two rounds of five steps and two of annealing, with all that a pair's state may hold."""
    small = {"teacher": {"parts": 2, "options": {"depth": 2}}, "student": {"parts": 2, "options": {"depth": 2}}}
    return make_config(
        [
            tiny(output=str(folder), arms=["m2mkd"], student__stitch_init="least_squares", student__stitch_batches=2),
            small,
            {
                "pair": {
                    "train": PHASE | {"steps": 6, "ema_decay": 0.5},
                    "budget": {"kind": "bandit", "rounds": 2, "slice_steps": 2, "anneal": 0.2},
                }
            },
        ]
    )


def train_pairs(folder: Path) -> Path:
    return run(bandit(folder), only=lambda step: step.phase == "m2mKD")


def results(folder: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("steps/**/result.json")))
    return {result["step"]: result for result in found}


def outcome(folder: Path) -> dict[str, list]:
    keys = ("weights_hash", "metrics", "terms", "steps", "images", "flops", "slice", "budget", "stitch_fit")
    return {name: [result.get(key) for key in keys] for name, result in results(folder).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_pairs(tmp_path_factory.mktemp("bandit"))


def test_rounds_give_the_whole_budget_and_a_pair_its_whole_result(trained):
    done = results(trained)
    pairs = [done[f"m2mkd/pair{i}"] for i in range(2)]
    assert sum(pair["steps"] for pair in pairs) == 2 * 6
    history = []
    for index in range(2):
        expected = allocate(history, slots=2, steps=5, slice_steps=2, discount=0.2, seed=budget_seed())
        rounds = [done[f"m2mkd/round{index}/pair{i}"] for i in range(2)]
        assert [result["steps"] for result in rounds] == [result["slice"]["steps"] for result in rounds] == expected
        history.append([Slice(**result["slice"]) for result in rounds])
    for i, pair in enumerate(pairs):
        slices = [Slice(**part) for part in pair["budget"]["slices"]]
        assert slices[:2] == [history[0][i], history[1][i]]
        assert pair["steps"] == sum(part.steps for part in slices)
        assert pair["images"] == 16 * pair["steps"]
        # Each goes on from where the one before it ended, and what it costs is counted once.
        assert [part.loss_before for part in slices[1:]] == [part.loss_after for part in slices[:-1]]
        assert pair["flops"] > sum(done[f"m2mkd/round{index}/pair{i}"]["flops"] for index in range(2)) > 0
        lines = [json.loads(line) for line in (trained / f"steps/m2mkd/pair{i}/metrics.jsonl").read_text().splitlines()]
        losses = [line["step"] for line in lines if "loss" in line]
        assert losses == sorted(set(losses)) and losses[0] <= 3 and losses[-1] == pair["steps"]
        assert (trained / f"steps/m2mkd/pair{i}/weights.safetensors").exists()
        assert set(pair["stitch_fit"]) == ({"post"} if i == 0 else set())
    kept = {path.parts[-4] + "/" + path.parts[-3] for path in trained.glob("steps/m2mkd/**/checkpoints/*.json")}
    assert kept == {f"round1/pair{i}" for i in range(2)}


def budget_seed() -> int:
    from m2mkd_fast.data.seeds import derive_seed

    return derive_seed(0, "budget", "m2mkd")


class Killed(BaseException):
    """What ends a process between any two checkpoints."""


def test_killed_again_and_again_it_ends_the_same(trained, tmp_path, monkeypatch):
    """Every start writes four checkpoints at most: what a step takes over, what it saves within and at its end."""
    shared = [trained / "steps" / name for name in ("teacher", "meta", "hybrids")]
    for path in shared:
        shutil.copytree(path, tmp_path / "steps" / path.name)
    save, left = Checkpoints.save, 0

    def mortal(self, *arguments):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", mortal)
    starts = 0
    while "m2mkd/pair1" not in results(tmp_path):
        starts, left = starts + 1, 4
        try:
            train_pairs(tmp_path)
        except Killed:
            assert starts < 20
    assert starts > 2
    assert outcome(tmp_path) == outcome(trained)


def test_a_damaged_state_falls_back_and_a_lost_one_says_what_to_delete(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "steps/m2mkd/pair1")
    states = tmp_path / "steps/m2mkd/round1/pair1/checkpoints"
    newest = max(states.glob("*.safetensors"))
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    train_pairs(tmp_path)
    ended, expected = (results(path)["m2mkd/pair1"] for path in (tmp_path, trained))
    for key in ("weights_hash", "metrics", "budget", "steps", "images", "flops"):
        assert ended[key] == expected[key]
    for folder in (tmp_path / "steps/m2mkd/pair1", states):
        shutil.rmtree(folder)
    with pytest.raises(M2MKDError, match=r"round1/pair1 holds no intact state .* delete .*/m2mkd/round\*/pair1"):
        train_pairs(tmp_path)
