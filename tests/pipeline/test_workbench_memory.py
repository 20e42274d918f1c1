"""A pair has in memory the modules that it uses, and what a file holds for the others is checked all the same."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finished_runs import finished_bench
from safetensors.torch import load_file, save_file
from tiny_run import tiny
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.state import save_module
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.pipeline.caching import make_cache
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.steps import _make_pair, _Work
from m2mkd_fast.pipeline.workbench import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    return finished_bench(tiny(pair__cache=True), tmp_path_factory.mktemp("run"))


class Silent(Progress):
    def message(self, text: str) -> None:
        pass


@pytest.fixture
def created(monkeypatch) -> Iterator[list[weakref.ref]]:
    """Every parameter that is made from now on, as long as it lives."""
    references, make = [], nn.Parameter.__new__

    def recorded(*arguments, **options):
        parameter = make(*arguments, **options)
        references.append(weakref.ref(parameter))
        return parameter

    monkeypatch.setattr(nn.Parameter, "__new__", recorded)
    gc.freeze()  # what was there before need not be looked through
    yield references
    gc.unfreeze()


def bytes_alive(references: list[weakref.ref]) -> int:
    gc.collect()
    alive = [parameter for reference in references if (parameter := reference()) is not None and not parameter.is_meta]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in alive}.values())


def bytes_of(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("cache", "prefix", "arm", "slot", "teachers"),
    [
        (False, "teacher", "m2mkd", 0, [0]),
        (False, "teacher", "m2mkd", 1, [0, 1]),
        (False, "meta", "m2mkd", 2, [2]),
        (False, "teacher", "task", 2, [0, 1]),
        (False, "meta", "task", 1, []),
        (True, "teacher", "m2mkd", 1, []),
    ],
)
def test_a_pair_holds_the_modules_that_it_uses(bench, monkeypatch, created, cache, prefix, arm, slot, teachers):
    monkeypatch.setattr(bench.config.pair, "cache", cache)
    monkeypatch.setattr(bench.config.pair, "prefix", prefix)
    if cache:
        make_cache(bench, "cache", print, lambda: None)
    teacher, meta = bench.teacher_chain(), bench.meta()
    wanted = bytes_of(*(teacher[i] for i in teachers), *(meta[i] for i in range(3) if i != slot))
    wanted += bytes_of(bench.student_modules()[slot])
    del teacher, meta
    assert bytes_alive(created) == 0
    pair = _make_pair(_Work(bench, Step(f"{arm}/pair{slot}", "m2mKD", arm=arm, slot=slot), Silent(), None))
    inputs, labels = (
        next(iter(pair.source.batches(0, 1)))
        if cache
        else (torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.long))
    )
    assert pair.task(inputs, labels).total.isfinite()
    assert bytes_alive(created) == wanted


GRAPH = {"teacher__model": "resnet10t", "teacher__options": {}, "student__options": {"embed_dim": 8, "depth": 3}}


@pytest.mark.parametrize("model", [{}, GRAPH], ids=["transformer", "graph"])
def test_modules_read_alone_are_those_of_the_whole(tmp_path, model):
    bench = finished_bench(tiny(**model), tmp_path)
    with torch.no_grad():
        for buffer in (chain := bench.teacher_chain()).buffers():
            buffer.add_(1)
    digest = save_module(bench.step_folder("teacher") / "weights.safetensors", chain, {})
    (bench.step_folder("teacher") / "result.json").write_text(f'{{"weights_hash": "{digest}"}}')
    part = bench.trained_teacher([0, 1]).eval()
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(part.run(images, 0, 2), chain.eval().run(images, 0, 2))
    assert all(parameter.is_meta for parameter in part[2].parameters())


def altered(bench: Workbench, folder: Path, change) -> M2MKDError:
    """The error that reading module 0 gives where the file of the whole teacher is another."""
    path = bench.step_folder("teacher") / "weights.safetensors"
    kept = path.read_bytes()
    try:
        change(path)
        with pytest.raises(M2MKDError) as error:
            bench.trained_teacher([0])
    finally:
        path.write_bytes(kept)
    return error.value


def test_modules_that_are_not_wanted_are_checked_too(bench, tmp_path):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1  # in the last tensor: of module 2
        path.write_bytes(content)

    def save(stages):
        return lambda path: save_module(path, ModuleChain(stages), {})

    whole = bench.trained_teacher()
    assert "not those that were written" in str(altered(bench, tmp_path, flip))
    assert "missing stages.2." in str(altered(bench, tmp_path, save(whole[:2])))
    narrow = Workbench(bench.config, bench.folder)
    narrow.config.teacher.options["mlp_ratio"] = 2
    try:
        stages = [*whole[:2], narrow.teacher_chain()[2]]
    finally:
        del narrow.config.teacher.options["mlp_ratio"]
    assert "misshapen stages.2.blocks.0.mlp.fc1.weight" in str(altered(bench, tmp_path, save(stages)))


def test_a_plain_file_is_not_read_in_parts(bench, tmp_path):
    def strip(path):
        save_file(load_file(path), path)

    assert "of another program" in str(altered(bench, tmp_path, strip))


PEAK = """
import sys, threading
from pathlib import Path
import torch
from m2mkd_fast.pipeline.config import load_config
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.steps import _make_pair, _Work
from m2mkd_fast.pipeline.workbench import Workbench

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

class Silent(Progress):
    def message(self, text): pass

config = load_config(sys.argv[1])
bench, slot = Workbench(config, config.folder), int(sys.argv[2])
bench.dataset, bench.execution.accelerator
before, peak, over = anonymous(), [0], threading.Event()
def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch); watcher.start()
pair = _make_pair(_Work(bench, Step(f"m2mkd/pair{slot}", "m2mKD", arm="m2mkd", slot=slot), Silent(), None))
pair.task(torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.long)).total.backward()
over.set(); watcher.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_of_a_pair_excludes_the_teachers_other_modules(tmp_path):
    """A teacher of 8 blocks of 12 MB: the pair of slot 0 never has more than the two of its module."""
    from omegaconf import OmegaConf

    options = {"embed_dim": 512, "depth": 8, "num_heads": 4}
    bench = finished_bench(tiny(teacher__options=options, teacher__parts=4, student__parts=4), tmp_path)
    bench.config.student.options["depth"] = 4
    OmegaConf.save(OmegaConf.create(bench.config.to_dict()), tmp_path / "config.yaml")
    whole, meta = bytes_of(bench.teacher_chain()), bytes_of(bench.meta())
    peaks = {}
    for slot in (0, 3):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "config.yaml"), str(slot)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[slot] = int(done.stdout)
    assert peaks[0] < 0.75 * meta + 0.25 * whole + 0.12 * whole  # the last: the student, activations, one tensor more
    assert peaks[3] > whole  # which shows that this would be seen
