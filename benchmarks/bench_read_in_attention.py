"""Read-in attention: backends against each other and PyTorch's own attention, at the sizes of the published circuits.

On the CPU the rearranged products run against the definition that makes all keys and values, and against
`scaled_dot_product_attention` on the rearranged form; on a GPU the Triton kernels run against these, the compiled
definition and the rearranged products too. Memory is what is allocated on top of the arguments, at most and at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _paired import Ratio, Results, paired_ratio
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.read_in_attention import read_in_attention, read_in_attention_reference

# batch, heads, latents, head size, inputs, channels
CASES = {
    "cpu": {"tiny, batch 4": (4, 6, 64, 64, 64, 256), "imagenet, batch 1": (1, 8, 192, 64, 784, 320)},
    "cuda": {
        "tiny, batch 128": (128, 6, 64, 64, 64, 256),
        "imagenet, batch 32": (32, 8, 192, 64, 784, 320),
        "imagenet, batch 1": (1, 8, 192, 64, 784, 320),
    },
}
BASELINES = {"cpu": ("definition", "sdpa"), "cuda": ("definition", "compiled", "sdpa", "torch")}
CANDIDATE = {"cpu": "torch", "cuda": "triton"}


def random_tensors(case: str, device: str, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    batch, heads, latents, dim, tokens, channels = CASES[device][case]
    generator = torch.Generator().manual_seed(0)
    inner = heads * dim
    query = torch.randn(batch, latents, heads, dim, generator=generator).transpose(1, 2)
    inputs = torch.randn(batch, tokens, channels, generator=generator)
    projections = []
    for _ in range(2):
        projections.append(torch.randn(inner, channels, generator=generator) / channels**0.5)
        projections.append(1 + 0.1 * torch.randn(latents, channels, generator=generator))
    return [tensor.to(device, dtype).requires_grad_(grad) for tensor in (query, inputs, *projections)]


def on_backend(backend: str, *tensors: Tensor) -> Tensor:
    with use_backend(read_in_attention=backend):
        return read_in_attention(*tensors)


def through_sdpa(
    query: Tensor, inputs: Tensor, key_weight: Tensor, key_scale: Tensor, value_weight: Tensor, value_scale: Tensor
) -> Tensor:
    """The rearranged form around one call of PyTorch's attention, with one head of as many channels as an input."""
    _, heads, latents, dim = query.shape
    absorbed = torch.einsum("bhud,hdc->bhuc", query, key_weight.unflatten(0, (heads, dim))) * key_scale
    keys = inputs.unsqueeze(1)
    rows = absorbed.flatten(1, 2).unsqueeze(1).to(keys.dtype)
    gathered = F.scaled_dot_product_attention(rows, keys, keys, scale=dim**-0.5)
    gathered = gathered.squeeze(1).unflatten(1, (heads, latents)) * value_scale
    return torch.einsum("bhuc,hdc->bhud", gathered.to(keys.dtype), value_weight.unflatten(0, (heads, dim)))


def function_of(name: str) -> Callable[..., Tensor]:
    if name == "definition":
        return read_in_attention_reference
    if name == "compiled":
        torch._dynamo.reset()  # each size gets code of its own
        return torch.compile(read_in_attention_reference, dynamic=False)
    return through_sdpa if name == "sdpa" else partial(on_backend, name)


def call_of(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        tensors = [tensor.detach() for tensor in tensors]
        return lambda: function(*tensors)
    grad = torch.randn_like(tensors[0])

    def call() -> object:
        messages = function(*tensors)
        return torch.autograd.grad(messages, tensors, grad.to(messages.dtype))

    return call


def measure(
    case: str, device: str, baseline: str, backward: bool, pairs: int, dtype: torch.dtype = torch.float32
) -> Ratio:
    tensors = random_tensors(case, device, dtype)
    what = "forward and backward" if backward else "forward"
    return paired_ratio(
        f"read_in_attention, {device}, {case}, {str(dtype).removeprefix('torch.')}, {what}, against {baseline}",
        call_of(function_of(baseline), tensors, backward),
        call_of(function_of(CANDIDATE[device]), tensors, backward),
        pairs=pairs,
        warm_up=min(pairs, 3),
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most that is allocated at once on top of what there is. The same in every run."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(case: str, device: str, backward: bool, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    tensors = random_tensors(case, device, dtype)
    before, after = (
        peak_bytes(call_of(function_of(name), tensors, backward), device) for name in ("definition", CANDIDATE[device])
    )
    return {
        "name": f"read_in_attention, {device}, {case}, {'forward and backward' if backward else 'forward'}, memory",
        "baseline_mib": before / 2**20,
        "candidate_mib": after / 2**20,
        "ratio": before / after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for case in CASES[device]:
            for backward in (False, True):
                for baseline in BASELINES[device]:
                    results.add(measure(case, device, baseline, backward, options.pairs, dtype))
                found = memory(case, device, backward, dtype)
                sizes = f"{found['baseline_mib']:9.1f} MiB -> {found['candidate_mib']:9.1f} MiB"
                results.add(f"{found['name']:<60} {found['ratio']:6.2f}x  {sizes}")


if __name__ == "__main__":
    main()
