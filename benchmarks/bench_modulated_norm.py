"""Modulated norm: C++ and Triton kernels against PyTorch, eager and compiled, at the published sizes."""

from __future__ import annotations

import torch
from _paired import Ratio, main_of_elementwise, measure_against_reference
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
CPU_CASES = {
    "tiny, senders, batch 8": (8, 320, 384, 2),
    "tiny, receivers, batch 8": (8, 256, 384, 1),
    "imagenet, senders, batch 1": (1, 960, 512, 2),
    "imagenet, receivers, batch 1": (1, 768, 512, 1),
}
# States, y: weights and states stay in float32 under autocast, and the products read bfloat16.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


def measure(case: str, precision: str, baseline: str, backward: bool, pairs: int, device: str = "cuda") -> Ratio:
    batch, latents, width, scales = {**CASES, **CPU_CASES}[case]
    states_dtype, dtype = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, latents, width), (width,), (width,), *[(latents, width)] * scales]
    tensors = [
        torch.randn(shape, generator=generator).to(device, states_dtype).requires_grad_(backward) for shape in shapes
    ]
    grads = [torch.randn((batch, latents, width), generator=generator).to(device, dtype) for _ in range(scales)]

    def reference(inputs: Tensor, weight: Tensor, bias: Tensor, *scales: Tensor) -> list[Tensor]:
        return [output.to(dtype) for output in modulated_norm_reference(inputs, weight, bias, scales)]

    def kernel(inputs: Tensor, weight: Tensor, bias: Tensor, *scales: Tensor) -> list[Tensor]:
        with use_backend(modulated_norm="triton" if device == "cuda" else "cpu"):
            return modulated_norm(inputs, weight, bias, scales, dtype=dtype)

    return measure_against_reference(
        f"modulated_norm, {device}, {case}, {precision}",
        reference,
        kernel,
        tensors,
        grads,
        baseline=baseline,
        backward=backward,
        pairs=pairs,
        device=device,
    )


if __name__ == "__main__":
    main_of_elementwise(__doc__, measure, CPU_CASES, CASES, PRECISIONS)
