"""What happens to long runs, made to happen: afterwards the same command ends with the results of an undisturbed run.

Compared are, to the bit, the weights of every step, its accuracies and losses, and the work that was done.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fault_harness import Ended, Fault, Harness
from omegaconf import OmegaConf
from tiny_run import PHASE, outcome, tiny

from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import make_config

pytestmark = pytest.mark.timeout(600)

KILLS = int(os.environ.get("M2MKD_FAULT_KILLS", "5"))
KILLED = -9
STITCHES = {"stitch_init": "least_squares", "stitch_batches": 3, "stitches": "folded"}
RECIPES = {
    "composable": {},
    "published": {"recipe": "published", "meta": {"max_hybrid_drop": 100.0, "train": PHASE}},
}
# A step of every phase, in the order in which they are done.
STEPS = {
    "composable": ("teacher", "meta", "hybrids", "m2mkd/pair1", "m2mkd/e2e"),
    "published": ("meta", "mt1", "ft", "m2mkd/pair1", "m2mkd/e2e"),
}


class Run:
    """A run folder, and the command for it."""

    def __init__(self, harness: Harness, folder: Path, recipe: str = "composable") -> None:
        self.harness, self.folder = harness, folder
        config = make_config([tiny(output=str(folder), student={**tiny()["student"], **STITCHES}), RECIPES[recipe]])
        path = folder.with_suffix(".yaml")
        OmegaConf.save(OmegaConf.create(config.to_dict()), path)
        self.command = ["train", str(path), "--arm", "m2mkd"]

    def start(self, fault: Fault | None = None, more: Sequence[str] = ()) -> Ended:
        return self.harness.run(self.folder, [*self.command, *more], fault)

    def without(self, step: str) -> Run:
        """Take away a step, a pair or the last, and the last, which is made from all pairs."""
        for name in {step, "m2mkd/e2e"}:
            shutil.rmtree(self.folder / "steps" / name)
        return self

    def rest(self) -> list[str]:
        """What a finished run has no use for."""
        return [path.name for pattern in ("*.partial", "checkpoints") for path in self.folder.rglob(pattern)]


class Undisturbed:
    """A whole run by recipe, made when first asked for: its results and the file operations that it took."""

    def __init__(self, harness: Harness, folder: Path) -> None:
        self.harness, self.folder = harness, folder
        self.ended: dict[str, Ended] = {}

    def run(self, recipe: str) -> Run:
        run = Run(self.harness, self.folder / recipe, recipe)
        if recipe not in self.ended:
            self.ended[recipe] = run.start()
            assert self.ended[recipe].code == 0, self.ended[recipe].said
            assert run.rest() == []
        return run

    def outcome(self, recipe: str = "composable") -> dict[str, tuple]:
        return outcome(self.run(recipe).folder)

    def count(self, pattern: str, recipe: str = "composable") -> int:
        """Of file operations that match."""
        self.run(recipe)
        return len(self.ended[recipe].matching(pattern))


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    with Harness() as harness:
        yield harness


@pytest.fixture(scope="module")
def undisturbed(harness, tmp_path_factory) -> Undisturbed:
    return Undisturbed(harness, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def copied(undisturbed, tmp_path) -> Run:
    """A finished run, from which a test takes away what is to be done again."""
    shutil.copytree(undisturbed.run("composable").folder, tmp_path / "run")
    return Run(undisturbed.harness, tmp_path / "run")


def test_killed_at_random_points_of_every_phase_it_ends_the_same(undisturbed, harness, tmp_path):
    """Between any two operations on files and, when there are more than a few kills, at any moment as well."""
    draws, done = random.Random(6), Counter()
    rounds = starts = 0
    while done.total() < KILLS:
        assert rounds < KILLS, "nearly no kill meets a run"
        recipe = list(RECIPES)[rounds % 2]
        run = Run(harness, tmp_path / f"run{rounds}", recipe)
        for step in STEPS[recipe]:
            pattern = f" steps/{step}/"
            at = draws.randrange(undisturbed.count(pattern, recipe))
            kind = "kill later" if rounds // 2 % 2 else "kill"
            ended = run.start(Fault(kind, pattern, at, draws.uniform(0.0, 0.3)))
            # It ends undisturbed where it was faster, or where its lease was renewed less often.
            assert ended.code in (KILLED, 0), ended.said
            done[f"{recipe} {step}"] += ended.code == KILLED
            starts += 1
        ended = run.start()
        assert ended.code == 0, ended.said
        assert outcome(run.folder) == undisturbed.outcome(recipe)
        assert run.rest() == []
        rounds, starts = rounds + 1, starts + 1
    counts = ", ".join(f"{step} {count}" for step, count in done.items())
    print(f"\n{done.total()} kills in {rounds} runs ({starts} starts), each the same as undisturbed: {counts}")


def test_asked_to_stop_in_every_phase_it_saves_and_goes_on(undisturbed, harness, tmp_path):
    """The signal comes while step 2 is written down, so training steps stop at 3, between two checkpoints."""
    run = Run(harness, tmp_path / "run")
    for step in STEPS["composable"]:
        pattern = "" if step == "hybrids" else "checkpoints/00000002.json"
        ended = run.start(Fault("stop", f" steps/{step}/{pattern}"))
        assert ended.code == 75, ended.said
        assert "m2mkd: stopped: " in ended.said
        assert ended.said.endswith("; the same command goes on from there\n")
        if step != "hybrids":
            assert (run.folder / "steps" / step / "checkpoints/00000003.json").exists()
    ended = run.start()
    assert ended.code == 0, ended.said
    assert "m2mkd/e2e: continues at 3/4" in ended.said
    assert outcome(run.folder) == undisturbed.outcome()


@pytest.mark.parametrize(("step", "damage"), [("m2mkd/e2e", "a flipped bit"), ("m2mkd/pair1", "truncated")])
def test_a_damaged_checkpoint_of_a_killed_run_is_passed_over(undisturbed, copied, step, damage):
    copied.without(step)
    assert copied.start(Fault("kill", rf" steps/{step}/\.weights\.safetensors")).code == KILLED
    path = copied.folder / "steps" / step / "checkpoints/00000004.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)
    ended = copied.start()
    assert ended.code == 0, ended.said
    assert f"{path} is damaged (" in ended.said
    assert "going on from the checkpoint of step 2\n" in ended.said
    assert f"{step}: continues at 2/4" in ended.said
    assert outcome(copied.folder) == undisturbed.outcome()


def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_leaves_the_one_before(undisturbed, copied):
    copied.without("m2mkd/e2e")
    # The folder is asked for before each file: for the tensors and facts of step 2, then for the tensors of step 4.
    ended = copied.start(Fault("full disk", "os.mkdir steps/m2mkd/e2e/checkpoints$", 2))
    assert ended.code == 2, ended.said
    assert re.search(r"m2mkd: error: .*cannot write .*File too large", ended.said)
    assert "Traceback" not in ended.said
    assert not list(copied.folder.rglob("*.partial"))
    _, facts = Checkpoints(copied.folder / "steps/m2mkd/e2e/checkpoints").load()
    assert facts["progress"]["step"] == 2
    ended = copied.start()
    assert ended.code == 0, ended.said
    assert "m2mkd/e2e: continues at 2/4" in ended.said
    assert outcome(copied.folder) == undisturbed.outcome()


def test_a_disk_that_is_full_from_the_start_is_one_error(harness, tmp_path):
    run = Run(harness, tmp_path / "run")
    ended = run.start(Fault("full disk"))
    assert ended.code == 2, ended.said
    assert "m2mkd: error: cannot write" in ended.said and "Traceback" not in ended.said
    assert not [path for path in run.folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_loader_worker_that_dies_in_a_run_costs_a_warning(undisturbed, copied):
    copied.without("m2mkd/e2e")
    ended = copied.start(Fault("dying loader worker", " steps/m2mkd/e2e/"), ["data.num_workers=1"])
    assert ended.code == 0, ended.said
    assert "a loader worker died" in ended.said
    assert outcome(copied.folder) == undisturbed.outcome()


def test_two_launchers_of_which_one_is_killed_while_the_others_clock_jumps(undisturbed, harness, tmp_path):
    """What the dead one held is taken over, and nothing that it had finished is done again."""
    run = Run(harness, tmp_path / "run")
    # Within the first step that it gets: how many there are for it is the other one's affair.
    kill = Fault("kill", " steps/", undisturbed.count(" steps/") // 14)
    ended = harness.run_together(run.folder, [(run.command, Fault("jumping clock")), (run.command, kill)])
    assert [each.code for each in ended] == [0, KILLED], "\n\n".join(each.said for each in ended)
    finished = Counter(operation for each in ended for operation in each.operations if "result.json" in operation)
    assert all(count == 1 for operation, count in finished.items() if operation.startswith("os.rename")), finished
    assert outcome(run.folder) == undisturbed.outcome()


@pytest.mark.slow
def test_killed_with_worker_processes_it_ends_the_same(undisturbed, harness, tmp_path):
    draws = random.Random(2)
    run = Run(harness, tmp_path / "run")
    kills = 0
    for _ in range(max(4, KILLS // 3)):
        ended = run.start(Fault("kill later", seconds=draws.uniform(0.1, 2.0)), ["--jobs", "2"])
        assert ended.code in (KILLED, 0), ended.said
        kills += ended.code == KILLED
    assert kills, "no kill met the run"
    ended = run.start(more=["--jobs", "2"])
    assert ended.code == 0, ended.said
    assert outcome(run.folder) == undisturbed.outcome()
    print(f"\n{kills} kills of a launcher with two worker processes, the same as undisturbed")
