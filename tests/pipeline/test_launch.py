"""Launchers: workers that die, several on one folder, process groups and jobs, all with the outcome of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm_commands
from omegaconf import OmegaConf
from tiny_run import outcome, tiny

from m2mkd_fast.cli import main
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.lease import Holder, read_holder
from m2mkd_fast.pipeline.opening import own_settings
from m2mkd_fast.pipeline.run import run
from m2mkd_fast.pipeline.stopping import Stopped, handle_stop_signals, request_stop

# The shortest run with steps that need one another and steps that do not: two modules, one arm beside another.
SMALL = {"arms": ["m2mkd", "scratch"], "teacher__parts": 2, "student__parts": 2}
SMALL |= {"teacher__options__depth": 2, "student__options__depth": 2}


def config_of(folder: Path, **changes):
    return make_config([tiny(output=str(folder), **SMALL, **changes)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(config_of(tmp_path_factory.mktemp("undisturbed")), jobs=1)


def test_the_plan_is_written_down(undisturbed):
    rows = json.loads((undisturbed / "plan.json").read_text())
    assert [row["name"] for row in rows] == [
        "scratch/e2e", "teacher", "meta", "hybrids", "m2mkd/pair0", "m2mkd/pair1", "m2mkd/e2e",
    ]  # fmt: skip
    assert rows[4].keys() == {"name", "phase", "needs", "arm", "slot", "round", "training_steps"}
    assert rows[4]["needs"] == ["teacher", "meta", "hybrids"] and rows[4]["training_steps"] == 4
    assert rows[3]["training_steps"] == 0


def test_two_launchers_divide_the_steps_and_do_each_once(undisturbed, tmp_path):
    """Each with a worker of its own; a step that was begun twice would have a lease with a higher number."""
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            run(config_of(tmp_path), jobs=2)
        except BaseException as error:
            errors.append(error)

    launchers = [threading.Thread(target=launch) for _ in range(2)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    assert not errors
    assert outcome(tmp_path) == outcome(undisturbed)
    holders = {path.parent: read_holder(path) for path in tmp_path.glob("steps/**/lease")}
    assert {holder.number for holder in holders.values()} == {1}
    assert {holder.state for holder in holders.values()} == {"released"}


def as_soon_as_begun(folder: Path, step: str, act: Callable[[Holder], None]) -> threading.Thread:
    """A thread that does something about who works on a step as soon as somebody does."""

    def watch() -> None:
        deadline = time.monotonic() + 100
        while (holder := read_holder(folder / "steps" / step / "lease")) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        act(holder)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill(holder: Holder) -> None:
    os.kill(holder.pid, signal.SIGKILL)


def test_asked_to_stop_workers_save_and_the_next_start_goes_on(undisturbed, tmp_path):
    with handle_stop_signals():
        asking = as_soon_as_begun(tmp_path, "meta", lambda holder: request_stop())
        with pytest.raises(Stopped, match=r"\d of 7 steps are done"):
            run(config_of(tmp_path), jobs=2)
        asking.join()
    assert not (tmp_path / "steps/m2mkd/e2e/result.json").exists()
    assert all(read_holder(path).state == "released" for path in tmp_path.glob("steps/**/lease"))
    run(config_of(tmp_path), jobs=1)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(undisturbed, tmp_path, capsys):
    killer = as_soon_as_begun(tmp_path, "teacher", kill)
    with pytest.raises(M2MKDError, match=r"step teacher: its process was killed by SIGKILL .* attempt 1"):
        run(config_of(tmp_path), jobs=2, retries=0)
    killer.join()
    failure = json.loads((tmp_path / "steps/teacher/failure.json").read_text())
    assert "SIGKILL" in failure["error"] and failure["attempts"] == 1
    killer = as_soon_as_begun(tmp_path, "meta", kill)
    run(config_of(tmp_path), jobs=2)
    killer.join()
    assert "retry 1 of 2" in capsys.readouterr().err
    assert outcome(tmp_path) == outcome(undisturbed)
    assert not list(tmp_path.rglob("failure.json"))


def test_one_step_alone_and_what_it_refuses(undisturbed, tmp_path, capsys):
    import shutil

    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(folder / "steps/m2mkd/pair1")
    shutil.rmtree(folder / "steps/m2mkd/e2e")
    assert main(["step", str(folder), "m2mkd/e2e"]) == 2
    assert "step m2mkd/e2e needs m2mkd/pair1 first" in capsys.readouterr().err
    assert main(["step", str(folder), "m2mkd/pair1", "pair.alpha=0.1"]) == 2
    assert "another configuration: pair.alpha (there 0.5, now 0.1)" in capsys.readouterr().err
    assert main(["step", str(folder), "m2mkd/pair7"]) == 2
    assert "'m2mkd/pair1'" in capsys.readouterr().err
    assert main(["step", str(tmp_path), "teacher"]) == 2
    assert "is no opened run" in capsys.readouterr().err
    for name in ("m2mkd/pair1", "m2mkd/e2e", "m2mkd/e2e"):
        assert main(["step", str(folder), name, "device=cpu", "threads=1"]) == 0
    assert outcome(folder) == outcome(undisturbed)


def test_a_key_that_an_older_run_does_not_know_has_its_default(undisturbed):
    path = undisturbed / "config.yaml"
    text = path.read_text()
    older = OmegaConf.to_container(OmegaConf.create(text))
    for section in (older["pair"]["train"], older["e2e"]):
        del section["keep_checkpoints"], section["accumulate"]
    del older["trackers"]
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(older)))
    try:
        run(config_of(undisturbed, e2e__keep_checkpoints=3), jobs=1)
        with pytest.raises(M2MKDError, match=r"e2e.accumulate \(there 1, now 2\)"):
            run(config_of(undisturbed, e2e__accumulate=2), jobs=1)
        changed = config_of(undisturbed, threads=3, pair__train__keep_checkpoints=4)
        assert own_settings(changed, undisturbed) == ["pair.train.keep_checkpoints=4", "threads=3"]
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"launcher": "slrm"}, "unknown launcher 'slrm'; did you mean 'slurm'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"retries": -1}, "retries must not be negative"),
        ({"processes": 2}, "needs launcher torchrun or slurm"),
        ({"launcher": "torchrun", "nodes": 2}, "--nnodes"),
        ({"slurm": {"partition": "gpu"}}, "need launcher slurm"),
        ({"launcher": "slurm", "slurm": {"cluster": "local", "partitoin": "gpu"}}, "partitoin"),
        ({"launcher": "slurm", "slurm": {"cluster": "local", "time": "1-00"}}, "minutes as a whole number"),
        ({"launcher": "slurm", "slurm": {"cluster": "nowhere"}}, "nowhere"),
    ],
)
def test_impossible_launches_are_refused(tmp_path, options, message):
    with pytest.raises(M2MKDError, match=message):
        run(config_of(tmp_path), **options)
    assert not (tmp_path / "steps").exists()


def test_a_job_saves_before_its_time_is_over_and_is_queued_again(tmp_path, monkeypatch):
    """submitit's handler of the signal is called once the step has saved, and not before."""
    pytest.importorskip("submitit")
    from m2mkd_fast.pipeline.launch.slurm import StepJob
    from m2mkd_fast.pipeline.stopping import stop_requested

    order: list[str] = []

    asking = iter((signal.SIGUSR2, signal.SIGTERM))

    def work(job: StepJob) -> None:
        os.kill(os.getpid(), next(asking))
        order.append("saved" if stop_requested() else "not asked")
        raise Stopped("step meta was stopped at 2 of 4")

    monkeypatch.setattr(StepJob, "_work", work)
    before = signal.signal(signal.SIGUSR2, lambda *_: order.append("queued again"))
    try:
        for _ in range(2):
            job = StepJob(tmp_path, "meta", 1, 1, [])
            assert job() == "stopped: step meta was stopped at 2 of 4"
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert order == ["saved", "queued again", "saved"]  # a job that its owner cancels is not
    assert job.checkpoint().function is job


def in_arm_scratch(step) -> bool:
    return step.arm == "scratch"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_of_submitits_local_executor(undisturbed, tmp_path):
    run(config_of(tmp_path), launcher="slurm", slurm={"cluster": "local", "timeout_min": 20}, only=in_arm_scratch)
    assert outcome(tmp_path)["scratch/e2e"] == outcome(undisturbed)["scratch/e2e"]
    assert json.loads((tmp_path / "slurm/jobs.json").read_text()) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_job_arrays_outlive_their_launcher_and_are_queued_again(tmp_path):
    """The launcher is killed while the first array runs, one of its jobs is preempted; a second launcher goes on."""
    cluster, folder, arms = tmp_path / "cluster", tmp_path / "run", ["scratch", "distill"]
    alone = run(make_config([tiny(output=str(tmp_path / "alone"), arms=arms)]), jobs=1)
    programs = slurm_commands.install(cluster)
    OmegaConf.save(OmegaConf.create(tiny(output=str(folder), arms=arms)), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "m2mkd_fast", "run", str(tmp_path / "config.yaml"), "--launcher", "slurm"]
    command += ["--slurm", "time=60", "partition=gpu"]
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    launcher = subprocess.Popen(command, env=environment)
    teacher = folder / "steps/teacher"
    wait_for(lambda: (teacher / "lease").exists())
    launcher.kill()
    launcher.wait()
    subprocess.run([programs / "scancel", "1_1", "--signal", "USR2"], check=True)
    wait_for(lambda: (teacher / "result.json").exists())
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(alone)
    script = next((folder / "slurm").glob("*submission.sh")).read_text()
    assert "--partition=gpu" in script and "--array=0-1" in script
    holders = [read_holder(path) for path in folder.glob("steps/**/lease")]
    assert sum(holder.number > 1 for holder in holders) <= 1  # the preempted job's, if it had begun


def wait_for(there) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_in_process_groups(undisturbed, tmp_path):
    run(config_of(tmp_path), launcher="torchrun", only=in_arm_scratch)
    assert outcome(tmp_path)["scratch/e2e"] == outcome(undisturbed)["scratch/e2e"]
