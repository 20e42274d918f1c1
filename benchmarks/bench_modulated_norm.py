"""Modulated norm: Triton kernels against PyTorch, eager and compiled, at the sizes of the published circuits."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import Ratio, paired_ratio, write_json
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.modulated_norm import modulated_norm, modulated_norm_reference

# batch, latents, width, scales: senders get two scales, for keys and values, receivers one.
CASES = {
    "tiny, senders": (128, 320, 384, 2),
    "tiny, receivers": (128, 256, 384, 1),
    "imagenet, senders": (32, 960, 512, 2),
    "imagenet, receivers": (32, 768, 512, 1),
    "imagenet, senders of one image": (1, 960, 512, 2),
}
# States, y: weights and states stay in float32 under autocast, and the products read bfloat16.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
BASELINES = ("eager", "compiled")


def measure(case: str, precision: str, baseline: str, backward: bool, pairs: int, device: str = "cuda") -> Ratio:
    batch, latents, width, scales = CASES[case]
    states_dtype, dtype = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, latents, width), (width,), (width,), (scales, latents, width))
    tensors = [
        torch.randn(shape, generator=generator).to(device, states_dtype).requires_grad_(backward) for shape in shapes
    ]
    grad = torch.randn((scales, batch, latents, width), generator=generator).to(device, dtype)

    def reference(*tensors: Tensor) -> Tensor:
        return modulated_norm_reference(*tensors).to(dtype)

    def triton(*tensors: Tensor) -> Tensor:
        with use_backend(modulated_norm="triton"):
            return modulated_norm(*tensors, dtype=dtype)

    def call_of(function: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            outputs = function(*tensors)
            return torch.autograd.grad(outputs, tensors, grad) if backward else outputs

        return call

    if baseline == "compiled":
        torch._dynamo.reset()  # each size gets code of its own
    return paired_ratio(
        f"modulated_norm, {case}, {precision}, {'forward and backward' if backward else 'forward'}, against {baseline}",
        call_of(torch.compile(reference, dynamic=False) if baseline == "compiled" else reference),
        call_of(triton),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    results = []
    if not torch.cuda.is_available():
        print("modulated_norm: its only kernels are for CUDA, and there is no CUDA device; nothing to measure")
    else:
        for case, precision, baseline, backward in itertools.product(CASES, PRECISIONS, BASELINES, (False, True)):
            results.append(measure(case, precision, baseline, backward, options.pairs))
            print(results[-1], flush=True)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
