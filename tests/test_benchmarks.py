"""The benchmarks run, and measure what they say: baselines compute the same sums, ratios and memory are right."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tomllib
import torch
from torch import nn

from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.ops.expert_mlp import expert_mlp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def load(name):
    return importlib.import_module(name)


def results_of(mixture, experts):
    return mixture.call_of(experts, True)()


@pytest.mark.parametrize("routing", ["balanced", "skewed", "one expert"])
@pytest.mark.parametrize("name", ["loop", "published"])
def test_baselines_compute_the_experts_sums_and_gradients(name, routing):
    peers = load("_mixture_peers")
    mixture = peers.Mixture("tiny", experts=4, routing=routing)
    for found, expected in zip(results_of(mixture, peers.EXPERTS[name]), results_of(mixture, expert_mlp), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_grouped_products_compute_them_in_bfloat16():
    peers = load("_mixture_peers")
    mixture = peers.Mixture("tiny", experts=4, dtype="bfloat16")
    exact = peers.Mixture("tiny", experts=4)
    with torch.no_grad():
        for mine, other in zip(exact.leaves, mixture.leaves, strict=True):
            mine.copy_(other)
    exact.grad_out = mixture.grad_out.float()
    for found, right in zip(results_of(mixture, peers.grouped_products), results_of(exact, expert_mlp), strict=True):
        assert (found.float() - right).norm() < 0.02 * right.norm()


def test_a_plain_layer_is_our_layer():
    peers = load("_mixture_peers")
    plain, ours = peers.PlainMoE("loop", 32, 64, 4, 2), VisionMoE(32, 64, 4, 2)
    ours.load_state_dict(
        {
            "gate.gate.weight": plain.gate.weight,
            "experts.htoh4.weight": plain.up_weight,
            "experts.htoh4.bias": plain.up_bias,
            "experts.h4toh.weight": plain.down_weight,
            "experts.h4toh.bias": plain.down_bias,
        }
    )
    x = torch.randn(3, 16, 32)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-4, atol=1e-4)


def test_routings_share_the_tokens_as_they_say():
    peers = load("_mixture_peers")
    counts = {routing: peers.Mixture("tiny", experts=4, top_k=1, routing=routing).counts for routing in peers.ROUTINGS}
    assert counts["one expert"] == [48, 0, 0, 0]
    assert counts["skewed"][0] > 2 * counts["skewed"][3]
    assert max(counts["balanced"]) < 2 * min(counts["balanced"])


@pytest.mark.parametrize("whole", [False, True])
def test_products_are_those_of_the_layer(whole):
    peers = load("_mixture_peers")
    mixture = peers.Mixture("tiny", experts=4)
    products = peers.Products(mixture, whole=whole)
    products.forward_and_backward()
    up, _, down, _ = (parameter.detach() for parameter in mixture.parameters)
    expert = torch.zeros_like(mixture.assignment.expert) if whole else mixture.assignment.expert
    rows = mixture.x.detach()[mixture.assignment.token]
    out = torch.einsum("ndh,nh->nd", down[expert], torch.einsum("nhd,nd->nh", up[expert], rows))
    torch.testing.assert_close(products.out, out, rtol=1e-4, atol=1e-4)
    grad_down = torch.zeros_like(down).index_add(
        0, expert, torch.einsum("nd,nh->ndh", products.grad_out, products.hidden)
    )
    torch.testing.assert_close(products.grad_down, grad_down[: len(products.grad_down)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products.grad_rows, torch.einsum("nhd,nh->nd", up[expert], products.grad_hidden))
    assert mixture.flops(backward=True) == 6 * 2 * 48 * 2 * 32 * 64


def test_kept_memory_counts_a_storage_once_and_parameters_not_at_all():
    peers = load("_mixture_peers")
    weight, x = torch.randn(256, 1024, requires_grad=True), torch.randn(1024, 256, requires_grad=True)
    parameters = [weight]
    assert peers.kept_for_backward(lambda: (x @ weight).exp(), parameters) == pytest.approx(5, abs=0.01)
    assert peers.kept_for_backward(lambda: x * x * x, parameters) == pytest.approx(2)
    assert peers.kept_for_backward(lambda: weight.exp(), parameters) == pytest.approx(1)


def test_ratios_compare_times_of_the_same_round(monkeypatch):
    paired = load("_paired")
    clock, order = [0.0], []

    def taking(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds * (1 + len(order) // 6)  # the machine gets slower

        return call

    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    baselines = {"slow": taking("slow", 6.0), "fast": taking("fast", 1.0)}
    slow, fast = paired.paired_ratios(baselines, taking("ours", 2.0), pairs=10, warm_up=2)
    assert (slow.name, fast.name, slow.pairs) == ("slow", "fast", 10)
    assert slow.low <= slow.speedup <= slow.high
    assert slow.speedup == pytest.approx(3.0, rel=0.5)
    assert fast.speedup == pytest.approx(0.5, rel=0.5)
    assert order[:6] == ["slow", "fast", "ours", "ours", "fast", "slow"]


def test_results_are_on_the_disk_after_each_of_them(tmp_path, capsys):
    paired, peers = load("_paired"), load("_mixture_peers")
    results = paired.Results(tmp_path / "new" / "results.json")
    for number in (1, 2):
        results.add(peers.Rate("product", 1.0, 2.0, 0.5))
        written = json.loads((tmp_path / "new" / "results.json").read_text())
        assert len(written["results"]) == number
    results.add("tutel cannot run")
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["notes"] == ["tutel cannot run"]
    assert written["results"][0]["tflops"] == 1.0
    assert written["facts"]["torch"] == torch.__version__
    assert "50.0% of the ceiling" in capsys.readouterr().out


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("baseline", ["products", "products in one piece", "loop", "published", "dense MLP"])
def test_experts_are_measured_against(baseline, backward):
    ratio = load("bench_expert_mlp").measure("tiny", baseline, backward=backward, pairs=2)
    assert ratio.speedup > 0
    assert ratio.name.endswith(f"against {baseline}")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("baseline", ["products", "loop", "published", "dense MLP"])
def test_layers_are_measured_against(baseline, backward):
    ratio = load("bench_vision_moe").measure("tiny", baseline, backward=backward, pairs=2)
    assert ratio.speedup > 0
    assert ratio.name.endswith(f"against {baseline}")


def test_a_layer_with_losses_gives_their_gradients_too():
    bench = load("bench_vision_moe")
    layer = bench.ours("tiny", 4, 2, "float32", "cpu", "vmoe")
    one = bench.Pass(layer, "tiny", "float32", "cpu", backward=True)
    gate = next(i for i, p in enumerate(one.parameters) if p is layer.gate.gate.weight)
    one.grad_out.zero_()
    torch.manual_seed(0)
    assert one()[1 + gate].abs().max() > 0


def test_a_package_that_is_not_there_is_named_and_the_others_are_measured():
    bench = load("bench_vision_moe")
    peers = load("_mixture_peers")
    peers.LAYERS["absent"] = lambda *sizes: importlib.import_module("a_package_that_is_not_there")
    line, ratio = bench.compare("tiny", ["absent", "loop"], backward=False, pairs=2)
    assert "absent cannot run: No module named 'a_package_that_is_not_there'" in line
    assert ratio.name.endswith("against loop")
    with pytest.raises(RuntimeError, match="absent cannot run"):
        bench.measure("tiny", "absent", backward=False, pairs=2)


@pytest.mark.parametrize("name", ["bench_expert_mlp", "bench_vision_moe"])
def test_memory_of_the_layer(name):
    found = load(name).memory(size="tiny")
    assert found["candidate_mib"] > 0
    assert found["ratio"] == pytest.approx(found["baseline_mib"] / found["candidate_mib"])


def test_a_whole_model_on_other_experts_is_the_same_model():
    bench = load("bench_vision_moe")
    ours, others = (bench.Training("micro", 3, "cpu", experts) for experts in (None, "published"))
    torch.testing.assert_close(ours(), others())
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), others.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert bench.measure_model("micro", "loop", 2, 2).speedup > 0


def on_the_processor(function):
    """A function for a GPU, on the processor."""
    signature = inspect.signature(function)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.arguments["device"] = "cpu"
        return function(*bound.args, **bound.kwargs)

    return call


@pytest.fixture
def tiny_gpu(monkeypatch):
    """Every size is tiny, and what would run on a GPU runs here, uncompiled."""
    peers, experts, layers = load("_mixture_peers"), load("bench_expert_mlp"), load("bench_vision_moe")
    for size in peers.SIZES:
        monkeypatch.setitem(peers.SIZES, size, peers.SIZES["tiny"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (experts, layers):
        monkeypatch.setattr(module, "compare", on_the_processor(module.compare))
        monkeypatch.setattr(module, "kept", on_the_processor(module.kept))
    # Of whole models those with the baselines' experts in bfloat16 need a GPU's autocast.
    measure_model = on_the_processor(layers.measure_model)
    monkeypatch.setattr(
        layers,
        "measure_model",
        lambda model, baseline, images, *rest, **more: measure_model("micro", "loop", 2, *rest, **more),
    )
    monkeypatch.setattr(experts, "Mixture", partial_on_the_processor(peers.Mixture))
    monkeypatch.setattr(experts, "ceiling", partial(experts.ceiling, device="cpu", side=64))
    whole = peers.experts_of
    monkeypatch.setattr(experts, "experts_of", lambda name: whole(name.removeprefix("compiled ")))
    layer_of = peers.layer_of
    monkeypatch.setattr(layers, "layer_of", lambda name, *sizes: layer_of(name.removeprefix("compiled "), *sizes))
    return experts, layers


def partial_on_the_processor(kind):
    return lambda *args, **kwargs: kind(*args, **{**kwargs, "device": "cpu"})


@pytest.mark.slow
def test_the_cases_of_a_gpu(tiny_gpu):
    experts, layers = tiny_gpu
    paired = load("_paired")
    found, figures = [], []
    for module in (experts, layers):
        results = paired.Results(None)
        module.on_gpu(results, pairs=1, seconds=600.0)
        figures += results.results
        found += [*(result.name for result in results.results), *results.notes]
    for size in ("B/16", "S/32", "L/16", "H/14", "B/16, one image", "H/14, one image"):
        assert any(f", {size}, 8 experts, balanced, bfloat16, forward and backward, against" in name for name in found)
    for number in (32, 64):
        assert any(f"expert_mlp, cpu, H/14, {number} experts" in name for name in found)
    for baseline in ("compiled loop", "published", "dense MLP", "balanced routing", "plain router", "by loop"):
        assert any(name.endswith(baseline) for name in found)
    rates = [result for result in figures if type(result).__name__ == "Rate"]
    assert max(rate.share_of_ceiling for rate in rates if rate.name.startswith("matrix product")) == 1.0
    assert all(rate.tflops > 0 and rate.milliseconds > 0 for rate in rates)
    for package in ("scattermoe", "megablocks", "tutel", "fastmoe"):
        assert any(package in name for name in found)


def test_a_gpu_run_begins_nothing_after_its_time(tiny_gpu):
    experts, layers = tiny_gpu
    for module in (experts, layers):
        results = load("_paired").Results(None)
        module.on_gpu(results, pairs=1, seconds=-1.0)
        assert {type(result).__name__ for result in results.results} <= {"Kept", "Rate"}
        assert len(results.notes) > 10
        assert all("not reached" in note for note in results.notes)


def test_every_gate_fits_its_benchmark():
    limits = tomllib.loads((BENCHMARKS / "gates.toml").read_text())
    sizes = load("_mixture_peers").SIZES
    for kind, function in (("speedup", "measure"), ("memory", "memory")):
        for entry in limits[kind]:
            module = load(entry["benchmark"])
            measure = getattr(module, function)
            if "arguments" in inspect.signature(measure).parameters:  # they go on to another function
                measure = partial(module.compare, baselines=None) if function == "measure" else module.kept
            arguments = {name: value for name, value in entry["arguments"].items() if name != "baseline"}
            if not isinstance(measure, partial) and "baseline" in entry["arguments"]:
                arguments["baseline"] = entry["arguments"]["baseline"]
            inspect.signature(measure).bind(**arguments)
            assert entry["arguments"].get("size", "tiny") in {*sizes, "imagenet"}
            assert entry["limit"] > 0


def test_layers_of_other_packages_are_modules():
    peers = load("_mixture_peers")
    assert set(peers.OTHER_PACKAGES) < set(peers.LAYERS)
    for name in set(peers.LAYERS) - set(peers.OTHER_PACKAGES):
        assert isinstance(peers.layer_of(name, "tiny", 4, 2, "float32", "cpu"), nn.Module)


@pytest.mark.parametrize("case", ["BEiT-Base, 96 px", "Swin-Tiny, stage 2, shifted"])
def test_layers_are_measured_before_and_after_apply(case):
    bench = load("bench_patch")
    for training in (False, True):
        assert bench.measure(case, images=1, training=training, pairs=1, device="cpu").speedup > 0


def test_the_loop_is_measured_beside_a_bare_one():
    ratio = load("bench_training_loop").measure("pair 1", blocks=1)
    assert ratio.pairs == 1 and ratio.baseline_ms > 0 and ratio.candidate_ms > 0


def test_pairs_are_measured_with_and_without_the_cache():
    ratio = load("bench_pair_cache").measure(pairs=1)
    assert ratio.speedup > 0 and ratio.flops_ratio > 1


@pytest.mark.slow
def test_pairs_side_by_side_are_measured_as_whole_commands():
    phases = ("teacher.train", "meta.train", "pair.train")
    overrides = [f"{phase}.steps=2" for phase in phases] + ["meta.max_hybrid_drop=100"]
    ratio = load("bench_jobs").measure(2, 1, overrides)
    assert ratio.pairs == 1 and ratio.candidate_ms > 0
