"""Modulated GEGLU: C++ and Triton kernels against PyTorch, eager and compiled, at the published sizes."""

from __future__ import annotations

import torch
from _paired import Ratio, main_of_elementwise, measure_against_reference
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

    return measure_against_reference(
        f"modulated_geglu, {device}, {case}, {precision}",
        reference,
        kernel,
        tensors,
        grad,
        baseline=baseline,
        backward=backward,
        pairs=pairs,
        device=device,
    )


if __name__ == "__main__":
    main_of_elementwise(__doc__, measure, CPU_CASES, CASES, PRECISIONS)
