"""Limits that a change may not break, from ``gates.toml``: speed-ups, operators, graph breaks, waits, bits, imports.

A speed-up fails only where even the good end of its confidence interval misses the limit, in two measurements.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomllib
import torch
import torch.nn.functional as F
from _paired import Ratio, write_json
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd_fast.backend import use_backend
from m2mkd_fast.models import create_model
from m2mkd_fast.nn.vision_moe import auxiliary_losses
from m2mkd_fast.ops.expert_mlp import expert_mlp
from m2mkd_fast.ops.latent_affinity import latent_affinity
from m2mkd_fast.ops.latent_attention import latent_attention
from m2mkd_fast.ops.modulated_geglu import modulated_geglu
from m2mkd_fast.ops.modulated_norm import modulated_norm
from m2mkd_fast.ops.route import route

THREADS = 2
LIMITS = Path(__file__).with_suffix(".toml")
# Operators whose result the host reads: on a GPU it would wait there for all work before.
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if not func.is_view and any("Tensor" in str(returned.type) for returned in func._schema.returns):
            self.launches.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Gates:
    """Prints every result, and remembers whether it holds."""

    def __init__(self) -> None:
        self.results: list[bool] = []
        self.ratios: list[Ratio] = []

    def note(self, passed: bool, text: str) -> bool:
        self.results.append(passed)
        print(f"{'ok  ' if passed else 'FAIL'} {text}", flush=True)
        return passed

    def speedup(self, benchmark: str, arguments: Mapping[str, Any], limit: float) -> None:
        measure = importlib.import_module(benchmark).measure
        ratio = measure(**arguments)
        if ratio.high < limit:
            print(f"     {ratio}  limit {limit}x, missed; once more")
            ratio = measure(**arguments)
        self.ratios.append(ratio)
        self.note(ratio.high >= limit, f"{ratio}  limit {limit}x")

    def memory(self, benchmark: str, arguments: Mapping[str, Any], limit: float) -> None:
        found = importlib.import_module(benchmark).memory(**arguments)
        sizes = f"{found['baseline_mib']:.1f} MiB -> {found['candidate_mib']:.1f} MiB"
        self.note(found["ratio"] >= limit, f"{found['name']}: {sizes}, {found['ratio']:.1f}x  limit {limit}x")


def operators(gates: Gates, limits: Mapping[str, int]) -> None:
    """Dispatched operators of one call that make a tensor, without views: on a GPU each is at least a launch."""
    logits, states, scale = torch.randn(1, 64, 8), torch.randn(2, 16, 32), torch.randn(16, 32)
    heads, distance = torch.randn(2, 4, 16, 8), torch.rand(16, 16)
    seed, one = torch.zeros((), dtype=torch.int64), torch.ones(())
    assignment, up, down = route(logits, top_k=2), torch.randn(8, 16, 32), torch.randn(8, 32, 16)
    bias, tokens = torch.randn(8, 48), torch.randn(64, 32)

    def kernel_of_experts() -> object:
        with use_backend(expert_mlp="cpu"):  # on some processors the libraries are chosen, which take many operators
            return expert_mlp(tokens, assignment, up, bias[:, :16], down, bias[:, 16:])

    calls: dict[str, Callable[[], object]] = {
        "route": lambda: route(logits, top_k=2),
        "expert_mlp": kernel_of_experts,
        "latent_affinity": lambda: latent_affinity(distance, one, truncation=0.9, samples=2, seed=seed),
        "latent_attention": lambda: latent_attention(heads, heads, heads, distance),
        "modulated_norm": lambda: modulated_norm(states, scale[0], scale[1], [scale, scale]),
        "modulated_geglu": lambda: modulated_geglu(states, scale[:, :16]),
    }
    for name, limit in limits.items():
        calls[name]()
        with CountOperators() as counted:
            calls[name]()
        gates.note(len(counted.launches) <= limit, f"{name} dispatches {counted.launches}, limit {limit}")


def training_loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device))
    loss = loss + auxiliary_losses(model)
    return loss + model.regularization_loss() if hasattr(model, "regularization_loss") else loss


def small_models() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    for name in ("nac_micro.ring", "nac_micro.planted", "vmoe_micro.m2mkd", "vmoe_micro.every2"):
        torch.manual_seed(0)
        yield name, create_model(name), torch.randn(2, 1, 16, 16)


def graph_breaks(gates: Gates) -> None:
    """``torch.compile`` has to capture every model as one graph, in training and in evaluation."""
    for name, model, images in small_models():
        for training in (True, False):
            torch._dynamo.reset()
            model.train(training)
            breaks = torch._dynamo.explain(model)(images).graph_break_count
            gates.note(breaks == 0, f"{name} in {'training' if training else 'evaluation'}: {breaks} graph breaks")


def waits(gates: Gates) -> None:
    """A training step on a GPU may read nothing back from it.

    Forward with fake tensors, which take a GPU's path and have nothing to be read; backward on the processor, because
    autograd looks for a driver. The planted graph is left out: its regulariser assigns clusters on the host, as the
    published one does.
    """
    for name in ("nac_micro.ring", "vmoe_micro.m2mkd", "vmoe_micro.every2"):
        found = set()
        with torch.device("meta"):
            model = create_model(name)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", torch.bfloat16):
            try:
                training_loss(model.to_empty(device="cuda"), torch.randn(2, 1, 16, 16, device="cuda"))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                found.add(f"{error.func} (forward)")
        loss = training_loss(create_model(name), torch.randn(2, 1, 16, 16))
        with CountOperators() as counted:
            loss.backward()
        found |= {f"{operator} (backward)" for operator in WAITS.intersection(counted.names)}
        gates.note(not found, f"{name}: a training step waits for {sorted(found) or 'nothing'}")


def same_bits(gates: Gates) -> None:
    for name, model, images in small_models():
        runs = []
        for _ in range(2):
            model.zero_grad()
            training_loss(model, images).backward()
            runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        same = all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
        gates.note(same, f"{name}: two training steps give {'the same' if same else 'different'} bits")


def imports(gates: Gates, seconds: float, heavy_modules: list[str]) -> None:
    code = (
        "import json, sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import m2mkd_fast;"
        "print(json.dumps([time.perf_counter() - start, torch.cuda.is_initialized(), [*(set(sys.modules) - before)]]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    measured = statistics.median(run[0] for run in runs)
    _, cuda_started, modules = runs[0]
    heavy = [name for name in modules if name in heavy_modules]
    gates.note(
        measured < seconds and not heavy and not cuda_started,
        f"import m2mkd_fast adds {measured:.3f} s to torch, limit {seconds}; heavy modules: {heavy or 'none'}; "
        f"CUDA started: {cuda_started}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure only speed-ups whose benchmark or arguments contain this")
    parser.add_argument("--json", type=Path, help="write the speed-ups to this file")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    limits = tomllib.loads(LIMITS.read_text())
    gates = Gates()
    if not options.only:
        imports(gates, **limits["import"])
        operators(gates, limits["operators"])
        graph_breaks(gates)
        waits(gates)
        same_bits(gates)
        for entry in limits["memory"]:
            gates.memory(**entry)
    for entry in limits["speedup"]:
        if options.only in f"{entry['benchmark']} {entry['arguments']}":
            gates.speedup(**entry)
    if options.json:
        write_json(options.json, gates.ratios)
    print(f"{sum(gates.results)} of {len(gates.results)} limits hold")
    return 0 if all(gates.results) else 1


if __name__ == "__main__":
    sys.exit(main())
