"""Route: compiled kernel against the plain PyTorch reference, at the sizes of V-MoE-B/16 with 128 images.

In the training case the reference gets its noise from ``torch.randn``, which is the fastest way in plain PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _paired import Ratio, Results, paired_ratio

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.route import Assignment, capacity_of, route

TOKENS, EXPERTS, GROUPS = 128 * 197, 8, 16
CAPACITY = capacity_of(TOKENS // GROUPS, 2, EXPERTS, 1.05)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dropless, one group": (1, {"top_k": 2}),
    "top_k_softmax, one group": (1, {"top_k": 2, "gate": "top_k_softmax"}),
    "sigmoid, one group": (1, {"top_k": 2, "gate": "sigmoid"}),
    "capacity 1.05, 16 groups": (GROUPS, {"top_k": 2, "capacity": CAPACITY}),
    "batch priority 1.05, 16 groups": (GROUPS, {"top_k": 2, "capacity": CAPACITY, "batch_priority": True}),
    "experts_choose 1.05, 16 groups": (
        GROUPS,
        {"top_k": 1, "gate": "experts_choose", "capacity": capacity_of(TOKENS // GROUPS, 1, EXPERTS, 1.05)},
    ),
    "training: noise, importance and load, 16 groups": (
        GROUPS,
        {"top_k": 2, "capacity": CAPACITY, "noise_std": 1.0 / EXPERTS, "losses": ("importance", "load")},
    ),
}


def measure(case: str, device: str, backward: bool, pairs: int) -> Ratio:
    groups, arguments = CASES[case]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(groups, TOKENS // groups, EXPERTS, generator=generator).to(device).requires_grad_(backward)
    noise_std, seed = arguments.get("noise_std", 0.0), torch.tensor(1, device=device)

    def assign(backend: str) -> Assignment:
        with use_backend(route=backend):
            if noise_std == 0:
                return route(logits, **arguments)
            if backend == "reference":
                return route(logits, torch.randn_like(logits) * noise_std, **arguments)
            return route(logits, seed=seed, **arguments)

    def with_backend(backend: str) -> Callable[[], object]:
        def call() -> object:
            assignment = assign(backend)
            return torch.autograd.grad(outputs(assignment), logits, gradients) if backward else assignment

        return call

    def outputs(assignment: Assignment) -> list[torch.Tensor]:
        return [assignment.weight, assignment.losses if "losses" in arguments else assignment.gates]

    gradients = [torch.randn_like(tensor) for tensor in outputs(assign(device))]
    return paired_ratio(
        f"route, {device}, {case}, {'forward and backward' if backward else 'forward'}",
        with_backend("reference"),
        with_backend(device),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in CASES:
            for backward in (False, True):
                results.add(measure(case, device, backward, options.pairs))


if __name__ == "__main__":
    main()
