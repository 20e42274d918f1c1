"""What a step writes down: JSON lines and the table beside them, memory, pace, utilisation, load and density."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from m2mkd_fast import create_model
from m2mkd_fast.data import create_dataset
from m2mkd_fast.distill.tasks import SupervisedTask
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline import metrics, utilisation
from m2mkd_fast.pipeline.config import TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.metrics import Meter, MetricsFile, flat_numbers, model_facts
from m2mkd_fast.pipeline.training import fit

FLOAT32 = torch.autocast("cpu", enabled=False)


def table(path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_lost_work_and_half_written_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 4}\n{"step": 2}\n{"step": 3, "loss": 2}\n{"ste')
    path.with_suffix(".csv").write_text("anything,else\n1,2\n3")
    MetricsFile(path, keep_until=2).append({"step": 3, "loss": 2.5})
    assert lines(path) == [{"step": 1, "loss": 4}, {"step": 2}, {"step": 3, "loss": 2.5}]
    assert table(path) == [{"step": "1", "loss": "4"}, {"step": "2", "loss": ""}, {"step": "3", "loss": "2.5"}]


def test_the_table_grows_with_what_appears(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_until=0)
    entries = [
        {"step": 10, "loss": 1.5, "terms": {"task": 1.0, "graph": 0.5}},
        {"step": 20, "loss": 1.25, "terms": {"task": 1.25}},
        {"step": 20, "test_accuracy": 50.0, "expert_load": {"blocks.1": [0.5, 0.5]}},
    ]
    for entry in entries:
        file.append(entry)
    assert lines(path) == entries
    assert [list(row) for row in table(path)] == [["step", "loss", "terms.task", "terms.graph", "test_accuracy"]] * 3
    numbers = [{name: float(cell) for name, cell in row.items() if cell} for row in table(path)]
    assert numbers == [flat_numbers(entry) for entry in entries]


def test_a_tracker_is_told_what_the_file_gets(tmp_path):
    seen = []
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0, tracker=seen.append)
    file.append({"step": 1, "loss": 0.5})
    assert seen == [{"step": 1, "loss": 0.5}]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0)
    file.table.unlink()
    file.table.mkdir()
    with pytest.raises(M2MKDError, match=r"cannot write .*metrics\.csv.*make room"):
        file.append({"step": 1})


def test_pace_and_utilisation_are_those_since_the_last_look(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 1000.0)
    meter = Meter(torch.device("cpu"), FLOAT32, images=100, seconds=50.0, flops=1e6)
    first, second = meter.read(120, 54.0, 1e6 + 800), meter.read(150, 55.0, 1e6 + 1300)
    assert (first["recent_images_per_second"], first["model_flop_utilisation"]) == (5.0, 0.2)
    assert (second["recent_images_per_second"], second["model_flop_utilisation"]) == (30.0, 0.5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell its count")
def test_memory_is_what_the_process_has_held():
    facts = Meter(torch.device("cpu"), FLOAT32).read(0, 0.0, 0.0)
    assert facts.keys() == {"peak_memory_bytes"}  # no time has passed, so there is no pace
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert facts["peak_memory_bytes"] == pytest.approx(1024 * int(kibibytes), rel=0.05)


def test_a_device_without_a_known_peak_has_no_utilisation(monkeypatch):
    assert utilisation.peak_flops(torch.device("meta"), torch.float32) is None
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: None)
    meter = Meter(torch.device("cpu"), FLOAT32)
    assert "model_flop_utilisation" not in meter.read(1, 1.0, 1.0)


def test_the_peak_of_a_processor_is_measured_and_nothing_random_is_drawn():
    before = torch.random.get_rng_state()
    peak = utilisation.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert utilisation.peak_flops(torch.device("cpu"), torch.float32) == peak  # once a process
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "kind", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-PCIE-16GB", "float16", 112),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),  # it has none
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("Quadro 4000", "float32", None),
    ],
)
def test_peaks_of_gpus_go_by_their_names(name, kind, tera):
    assert utilisation.gpu_peak(name, kind) == (None if tera is None else tera * 1e12)


def test_the_precision_is_what_autocast_makes_of_it():
    device = torch.device("cpu")
    assert utilisation.compute_dtype(FLOAT32, device) is torch.float32
    assert utilisation.compute_dtype(torch.autocast("cpu", dtype=torch.bfloat16), device) is torch.bfloat16


def test_a_mixture_shows_its_load():
    torch.manual_seed(0)
    model = create_model("vmoe_micro.m2mkd", embed_dim=8, depth=2, num_heads=2, num_experts=4, img_size=8, in_chans=1)
    assert model_facts(model) == {}  # nothing has run
    model(torch.randn(3, 1, 8, 8))
    facts = model_facts(model)
    assert facts.keys() == {"expert_load", "expert_imbalance"}
    for name, shares in facts["expert_load"].items():
        assert sum(shares) == pytest.approx(1.0) and len(shares) == 4
        assert facts["expert_imbalance"][name] == pytest.approx(4 * max(shares))
    assert facts["expert_load"]


def test_a_circuit_shows_its_density_by_layer():
    model = create_model("nac_micro.ring", img_size=8, in_chans=1, num_classes=4)
    density = model_facts(model)["graph_density"]
    assert "read_out" in density
    assert all(0 <= layer["probable_edges"] <= layer["edges"] <= 1 for layer in density.values())


def test_other_models_have_nothing_to_show():
    assert model_facts(nn.Linear(2, 2)) == {}


def test_training_writes_them_down_and_goes_on_with_them(tmp_path):
    """Stopped half-way and gone on with, or not: the same lines but for what the clock says."""
    split = create_dataset("digits", image_size=8, images_per_class=4).splits["train"]
    config = TrainingConfig(steps=4, batch_size=8, evaluate_every=2, checkpoint_every=2)
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_experts": 3, "img_size": 8, "in_chans": 1}

    def train(folder, **more):
        torch.manual_seed(0)
        task = SupervisedTask(create_model("vmoe_micro.m2mkd", **options))

        def evaluate(model):
            model.eval()(split.load(torch.arange(8))[0])
            return {"test_accuracy": 50.0}

        execution = Execution(device="cpu", precision="float32")
        fit(task, split, config, seed=1, folder=folder, evaluate=evaluate, execution=execution, **more)
        return lines(folder / "metrics.jsonl")

    seen = []
    whole = train(tmp_path / "whole", tracker=seen.append)
    assert whole == json.loads(json.dumps(seen))
    logged, evaluated = ([entry for entry in whole if key in entry] for key in ("loss", "test_accuracy"))
    assert [entry["step"] for entry in logged] == [2, 4] and [entry["step"] for entry in evaluated] == [0, 2, 4]
    for entry in logged:
        assert entry["peak_memory_bytes"] > 1 << 20
        assert entry["recent_images_per_second"] > 0 and 0 < entry["model_flop_utilisation"] < 1
    assert all(entry["expert_load"] and entry["expert_imbalance"] for entry in evaluated)

    train(tmp_path / "stopped", until=2)
    timed = {"seconds", "images_per_second", "recent_images_per_second", "model_flop_utilisation", "peak_memory_bytes"}
    stopped = [
        [{key: value for key, value in entry.items() if key not in timed} for entry in entries]
        for entries in (train(tmp_path / "stopped"), whole)
    ]
    assert stopped[0] == stopped[1]
    assert [row["step"] for row in table(tmp_path / "stopped/metrics.jsonl")] == ["0", "2", "2", "4", "4"]
