"""Latent affinity: compiled kernels against plain PyTorch, at the sizes of the published circuits.

Baselines: "eager" is what a layer runs without kernels, noise of torch's generator included; "compiled" the same under
`torch.compile`; "philox" the reference with the kernels' own noise, which plain PyTorch makes slowly.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import Ratio, Results, paired_ratio
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.latent_affinity import latent_affinity, latent_affinity_reference

# receivers, senders, and the batch on a CPU and on a GPU
CIRCUITS = {"tiny": (256, 320, 8, 128), "imagenet": (768, 960, 1, 32)}
# sampling, leaky truncation, temperature
MODES = {
    "sampled": (True, False, 0.5),
    "sampled, leaky": (True, True, 0.5),
    "sampled, temperature 0.7": (True, False, 0.7),
    "not sampled": (False, False, 0.5),
}
TRUNCATION, BANDWIDTH = 0.9, 0.7
BASELINES = {"cpu": ("eager", "philox"), "cuda": ("eager", "compiled", "philox")}


def distances(receivers: int, senders: int, density: float) -> Tensor:
    """Distances of which the given part is kept: a receiver's own and, evenly spread from 0.2, others'."""
    generator = torch.Generator().manual_seed(0)
    distance = 0.2 + torch.rand(receivers, senders, generator=generator) * (TRUNCATION - 0.2) / density
    return distance.fill_diagonal_(0.0)


def calls(
    circuit: str, mode: str, baseline: str, backward: bool, density: float, device: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The baseline and the kernels, on the same distances."""
    receivers, senders, *batches = CIRCUITS[circuit]
    batch = batches[device == "cuda"]
    sampled, leaky, temperature = MODES[mode]
    distance = distances(receivers, senders, density).to(device).requires_grad_(backward)
    bandwidth = torch.tensor(BANDWIDTH, device=device, requires_grad=backward)
    shape = (batch, receivers, senders) if sampled else (receivers, senders)
    grad = torch.randn(shape, device=device)

    def eager(distance: Tensor, bandwidth: Tensor) -> Tensor:
        uniform = torch.rand(shape, device=device) if sampled else None
        return latent_affinity_reference(
            distance, bandwidth, TRUNCATION, uniform=uniform, temperature=temperature, leaky=leaky
        )

    def ours(distance: Tensor, bandwidth: Tensor) -> Tensor:
        seed = torch.randint(2**63 - 1, (), device=device) if sampled else None
        return latent_affinity(
            distance,
            bandwidth,
            truncation=TRUNCATION,
            samples=batch if sampled else None,
            seed=seed,
            temperature=temperature,
            leaky=leaky,
        )

    def call_of(function: Callable[..., Tensor], backend: str) -> Callable[[], object]:
        def call() -> object:
            with use_backend(latent_affinity=backend):
                log_affinity = function(distance, bandwidth)
            return torch.autograd.grad(log_affinity, (distance, bandwidth), grad) if backward else log_affinity

        return call

    if baseline == "compiled":
        torch._dynamo.reset()  # each size gets code of its own
    before = {"eager": eager, "philox": ours, "compiled": torch.compile(eager, dynamic=False)}[baseline]
    return call_of(before, "reference"), call_of(ours, "triton" if device == "cuda" else "cpu")


def measure(circuit: str, mode: str, baseline: str, backward: bool, density: float, pairs: int, device: str) -> Ratio:
    batch = CIRCUITS[circuit][2 + (device == "cuda")]
    direction = "forward and backward" if backward else "forward"
    return paired_ratio(
        f"latent_affinity, {device}, {circuit}, batch {batch}, density {density:.0%}, {mode}, {direction}, "
        f"against {baseline}",
        *calls(circuit, mode, baseline, backward, density, device),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def memory(*arguments: object) -> str:
    """Peak memory on a GPU of the two calls, beyond what was there before."""
    peaks = []
    for call in calls(*arguments, "cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return f"{', '.join(map(str, arguments))}: peak {peaks[0]:.1f} -> {peaks[1]:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--density", type=float, nargs="*", default=[0.22, 0.6])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in itertools.product(CIRCUITS, MODES, BASELINES[device], (False, True), options.density):
            sampled = MODES[case[1]][0]
            if not sampled and case[2] == "philox":
                continue  # without noise it is the eager baseline
            results.add(measure(*case, options.pairs, device))
            if device == "cuda":
                results.add(memory(*case))


if __name__ == "__main__":
    main()
