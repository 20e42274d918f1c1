"""Latent attention: compiled kernels against the plain reference and what else PyTorch offers, at published sizes."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from _paired import Ratio, Results, paired_ratio
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.latent_attention import latent_attention, latent_attention_reference

HEAD_DIM = 64
# heads, receivers, senders
SIZES = {"tiny": (6, 256, 320), "imagenet": (8, 768, 960)}
BATCH = {"cpu": {"tiny": 8, "imagenet": 1}, "cuda": {"tiny": 128, "imagenet": 32}}
# Part of the edges that there are; None: no affinities at all. A published graph has 22 % of them at the start.
DENSITIES = (0.22, 0.5, 0.75, None)
PEERS = {
    "cpu": ("reference", "sdpa"),
    "cuda": ("reference", "compiled reference", "sdpa", "sdpa without cuDNN", "flex"),
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Inputs:
    tensors: list[Tensor]
    log_affinity: Tensor | None
    grad_out: Tensor

    def leaves(self) -> list[Tensor]:
        return self.tensors if self.log_affinity is None else [*self.tensors, self.log_affinity]


@dataclass(frozen=True)
class KeptMemory:
    """Bytes that a forward leaves on the GPU for its backward, its result included."""

    name: str
    baseline_bytes: int
    candidate_bytes: int

    def __str__(self) -> str:
        ratio = self.baseline_bytes / self.candidate_bytes
        return (
            f"{self.name:<60} {ratio:6.2f}x  {self.baseline_bytes / 2**20:.1f} MiB -> "
            f"{self.candidate_bytes / 2**20:.1f} MiB"
        )


def inputs_of(
    size: str, batch: int, density: float | None, sampled: bool, dtype: torch.dtype, device: str, backward: bool
) -> Inputs:
    """Tensors as the layer passes them: views of [B, N, H * D]. Every receiver has an edge."""
    heads, receivers, senders = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def states(latents: int) -> Tensor:
        tensor = torch.randn(batch, latents, heads * HEAD_DIM, generator=generator).to(device, dtype)
        return tensor.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2).requires_grad_(backward)

    tensors = [states(latents) for latents in (receivers, senders, senders)]
    log_affinity = None
    if density is not None:
        shape = (batch, receivers, senders) if sampled else (receivers, senders)
        there = torch.rand(shape, generator=generator) < density
        there[..., 0] = True
        log_affinity = torch.where(there, -torch.rand(shape, generator=generator), -math.inf)
        log_affinity = log_affinity.to(device).requires_grad_(backward)
    return Inputs(tensors, log_affinity, states(receivers).detach())


def ours(backend: str) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor | None) -> Tensor:
        with use_backend(latent_attention=backend):
            return latent_attention(query, key, value, log_affinity)

    return attention


def sdpa(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor | None) -> Tensor:
    if log_affinity is not None:  # in the dtype of q: cuDNN takes a wider mask for a narrow one, silently
        log_affinity = log_affinity.to(query.dtype)
        log_affinity = log_affinity if log_affinity.dim() == 2 else log_affinity.unsqueeze(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=log_affinity)


def sdpa_without_cudnn(*tensors: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(*tensors)


def flex(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor | None) -> Tensor:
    def shift(score: Tensor, image: Tensor, head: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        edge = (receiver, sender) if log_affinity.dim() == 2 else (image, receiver, sender)
        return score + log_affinity[edge]

    return flex_attention(query, key, value, score_mod=None if log_affinity is None else shift)


@cache
def compiled(attention: Attention) -> Attention:
    return torch.compile(attention, dynamic=False)


def peer(name: str) -> Attention:
    return {
        "reference": latent_attention_reference,
        "compiled reference": compiled(latent_attention_reference),
        "sdpa": sdpa,
        "sdpa without cuDNN": sdpa_without_cudnn,
        "flex": compiled(flex),
    }[name]


def call_of(attention: Attention, inputs: Inputs, backward: bool) -> Callable[[], object]:
    def call() -> object:
        with nullcontext() if backward else torch.inference_mode():
            out = attention(*inputs.tensors, inputs.log_affinity)
            return torch.autograd.grad(out, inputs.leaves(), inputs.grad_out) if backward else out

    return call


def name_of(size: str, device: str, density: float | None, sampled: bool, dtype: torch.dtype, baseline: str) -> str:
    graph = "no affinities" if density is None else f"{100 * density:.0f} % of the edges"
    kind = ", sampled" if sampled else ""
    return f"latent_attention, {device}, {size}, {graph}{kind}, {str(dtype).removeprefix('torch.')}, against {baseline}"


def measure(
    size: str,
    device: str,
    density: float | None,
    *,
    backward: bool,
    pairs: int,
    baseline: str = "reference",
    sampled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Ratio:
    """``backward``: with gradients of query, key, value and affinities. ``sampled``: affinities differ by image."""
    inputs = inputs_of(size, BATCH[device][size], density, sampled, dtype, device, backward)
    return paired_ratio(
        f"{name_of(size, device, density, sampled, dtype, baseline)}, "
        f"{'forward and backward' if backward else 'forward'}",
        call_of(peer(baseline), inputs, backward),
        call_of(ours("cpu" if device == "cpu" else "triton"), inputs, backward),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def measure_memory(size: str, density: float | None, *, baseline: str, sampled: bool, dtype: torch.dtype) -> KeptMemory:
    inputs = inputs_of(size, BATCH["cuda"][size], density, sampled, dtype, "cuda", backward=True)

    def kept_by(attention: Attention) -> int:
        attention(*inputs.tensors, inputs.log_affinity)  # once for what stays: workspaces and compiled code
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = attention(*inputs.tensors, inputs.log_affinity)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del out
        return kept

    return KeptMemory(
        f"{name_of(size, 'cuda', density, sampled, dtype, baseline)}, memory kept",
        kept_by(peer(baseline)),
        kept_by(ours("triton")),
    )


def results_of(device: str, pairs: int) -> Iterator[Ratio | KeptMemory | str]:
    """Every case; a line of text where a peer cannot run it."""
    for size, density, dtype, baseline in itertools.product(SIZES, DENSITIES, DTYPES[device], PEERS[device]):
        # Evaluation has one graph for all images, training samples one for each.
        for backward, sampled in ((False, False), (True, False), (True, True)):
            if density is None and sampled:
                continue
            options = {"baseline": baseline, "sampled": sampled, "dtype": dtype}
            try:
                yield measure(size, device, density, backward=backward, pairs=pairs, **options)
                if device == "cuda" and backward:
                    yield measure_memory(size, density, **options)
            except Exception as error:  # a peer's own limit: it is named, and the others are measured
                if baseline == "reference":
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                yield f"{name_of(size, device, density, sampled, dtype, baseline)} cannot run: {reason[:120]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one; by default every one that is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [options.device] if options.device else there:
        for result in results_of(device, options.pairs):
            results.add(result)


if __name__ == "__main__":
    main()
