"""Route: compiled kernel against the plain PyTorch reference, at the sizes of V-MoE-B/16 with 128 images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import Ratio, paired_ratio, write_json

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.route import capacity_of, route

TOKENS, EXPERTS, GROUPS = 128 * 197, 8, 16
CASES = {
    "dropless, one group": (1, {"top_k": 2}),
    "top_k_softmax, one group": (1, {"top_k": 2, "gate": "top_k_softmax"}),
    "capacity 1.05, 16 groups": (GROUPS, {"top_k": 2, "capacity": capacity_of(TOKENS // GROUPS, 2, EXPERTS, 1.05)}),
    "batch priority 1.05, 16 groups": (
        GROUPS,
        {"top_k": 2, "capacity": capacity_of(TOKENS // GROUPS, 2, EXPERTS, 1.05), "batch_priority": True},
    ),
    "experts_choose 1.05, 16 groups": (
        GROUPS,
        {"top_k": 1, "gate": "experts_choose", "capacity": capacity_of(TOKENS // GROUPS, 1, EXPERTS, 1.05)},
    ),
}


def measure(case: str, device: str, backward: bool, pairs: int) -> Ratio:
    groups, arguments = CASES[case]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(groups, TOKENS // groups, EXPERTS, generator=generator).to(device).requires_grad_(backward)

    def with_backend(backend: str) -> Callable[[], object]:
        def call() -> object:
            with use_backend(route=backend):
                assignment = route(logits, **arguments)
            if backward:
                return torch.autograd.grad((assignment.weight, assignment.gates), logits, gradients)
            return assignment

        return call

    assignment = route(logits, **arguments)
    gradients = (torch.randn_like(assignment.weight), torch.randn_like(assignment.gates))
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
    results = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in CASES:
            for backward in (False, True):
                results.append(measure(case, device, backward, options.pairs))
                print(results[-1], flush=True)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
