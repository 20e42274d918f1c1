"""Inference of pruned circuits against the whole one; on a GPU eagerly and as CUDA graphs.

Weights are random: this is what removing latents saves in time. What it costs in accuracy depends on the training;
``m2mkd prune RUN`` measures both on a trained student.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import Ratio, Results, paired_ratio
from torch import Tensor, nn

from m2mkd_fast.models import create_model
from m2mkd_fast.models.cuda_graph import capture_inference
from m2mkd_fast.models.nac import prune_latents

CASES = {"tiny": ("nac_tiny.ring", 64), "imagenet": ("nac_imagenet.ring", 224)}
# Shares of mediators and of input latents that stay.
KEEPS = ((0.5, 1.0), (0.25, 1.0), (0.125, 1.0), (0.125, 0.5))


def measure(case: str, keep: tuple[float, float], batch_size: int, pairs: int, *, captured: bool = False) -> Ratio:
    """Pruned against whole, in turns, both captured or both eager."""
    name, size = CASES[case]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    whole = create_model(name, fit_signatures=False).to(device).eval()
    pruned = prune_latents(whole, keep[0], keep_inputs=keep[1])
    images = torch.randn(batch_size, 3, size, size, device=device)

    def inference(model: nn.Module) -> Callable[[], Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            if captured:
                recording = capture_inference(model, images)
                return lambda: recording(images)

        @torch.inference_mode()
        def call() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                return model(images)

        return call

    how = "CUDA graph" if captured else "eager"
    return paired_ratio(
        f"circuit, {case}, batch {batch_size}, {how}, {keep[0]:.1%} mediators, {keep[1]:.0%} inputs",
        inference(whole),
        inference(pruned),
        pairs=pairs,
        warm_up=2,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = Results(options.json)
    ways = (False, True) if torch.cuda.is_available() else (False,)
    batch_sizes = (1, 128) if torch.cuda.is_available() else (1,)
    for case, batch_size, captured, keep in itertools.product(CASES, batch_sizes, ways, KEEPS):
        results.add(measure(case, keep, batch_size, options.pairs, captured=captured))


if __name__ == "__main__":
    main()
