"""Modulated GEGLU: C++ and Triton kernels against PyTorch, eager and compiled, at the published sizes."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import Ratio, paired_ratio, write_json
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.modulated_geglu import modulated_geglu, modulated_geglu_reference

# batch, latents, width of the values
CASES = {
    "tiny": (128, 256, 768),
    "imagenet": (32, 768, 512),
    "imagenet, one image": (1, 768, 512),
}
CPU_CASES = {"tiny, batch 8": (8, 256, 768), "imagenet, batch 1": (1, 768, 512)}
# Hidden, y: under autocast both products write and read bfloat16, the scale stays in float32.
PRECISIONS = {"float32": (torch.float32, torch.float32), "autocast": (torch.bfloat16, torch.bfloat16)}
BASELINES = ("eager", "compiled")


def measure(case: str, precision: str, baseline: str, backward: bool, pairs: int, device: str = "cuda") -> Ratio:
    batch, latents, width = {**CASES, **CPU_CASES}[case]
    hidden_dtype, dtype = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((batch, latents, 2 * width), generator=generator).to(device, hidden_dtype)
    scale = torch.randn((latents, width), generator=generator).to(device)
    grad = torch.randn((batch, latents, width), generator=generator).to(device, dtype)
    tensors = [hidden.requires_grad_(backward), scale.requires_grad_(backward)]

    def reference(hidden: Tensor, scale: Tensor) -> Tensor:
        return modulated_geglu_reference(hidden, scale).to(dtype)

    def kernel(hidden: Tensor, scale: Tensor) -> Tensor:
        with use_backend(modulated_geglu="triton" if device == "cuda" else "cpu"):
            return modulated_geglu(hidden, scale, dtype=dtype)

    def call_of(function: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            outputs = function(*tensors)
            return torch.autograd.grad(outputs, tensors, grad) if backward else outputs

        return call

    if baseline == "compiled":
        torch._dynamo.reset()  # each size gets code of its own
    passes = "forward and backward" if backward else "forward"
    return paired_ratio(
        f"modulated_geglu, {device}, {case}, {precision}, {passes}, against {baseline}",
        call_of(torch.compile(reference, dynamic=False) if baseline == "compiled" else reference),
        call_of(kernel),
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
    cases = list(itertools.product(CPU_CASES, ["float32"], BASELINES, (False, True), ["cpu"]))
    if torch.cuda.is_available():
        cases += itertools.product(CASES, PRECISIONS, BASELINES, (False, True), ["cuda"])
    results = []
    for case, precision, baseline, backward, device in cases:
        results.append(measure(case, precision, baseline, backward, options.pairs, device))
        print(results[-1], flush=True)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
