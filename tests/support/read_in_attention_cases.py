"""Arguments of the read-in attention, and how exact its result has to be: for the tests of all backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m2mkd_fast.ops.read_in_attention import read_in_attention_reference

NAMES = ["messages", "query", "inputs", "key_weight", "key_scale", "value_weight", "value_scale"]
NAMES += ["key_bias", "value_bias"]


def random_tensors(
    shape: tuple[int, ...],
    bias: bool = True,
    scales: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Arguments as a layer gives them: the query is a transposed view, weights keep the size of what they multiply."""
    batch, heads, latents, dim, tokens, channels = shape
    scales = latents if scales is None else scales
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    tensors = [draw(batch, latents, heads, dim).transpose(1, 2), draw(batch, tokens, channels)]
    for _ in range(2):
        tensors += [draw(heads * dim, channels) / channels**0.5, 1 + 0.3 * draw(scales, channels)]
    tensors += [draw(heads * dim), draw(heads * dim)] if bias else []
    return [tensor.to(device, dtype) for tensor in tensors]


def everything(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The messages and the gradients of all arguments."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    messages = function(*leaves)
    if grad is None:
        grad = torch.randn(messages.shape, generator=torch.Generator().manual_seed(1)).to(messages)
    return [messages.detach(), *torch.autograd.grad(messages, leaves, grad.to(messages))]


def assert_as_exact_as_pytorch(tensors: list[Tensor], function: Callable[..., Tensor], rounding: float = 1) -> None:
    """At most twice (messages) or three times (gradients) the definition's error at this precision.

    A few roundings of the largest number are allowed on top: on small tensors the definition can be lucky.
    """
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    found, same = everything(function, tensors, grad), everything(read_in_attention_reference, tensors, grad)
    exact = everything(read_in_attention_reference, [tensor.double() for tensor in tensors], grad.double())
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=False):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == truth.shape, name
        if name == "key_bias":
            assert not ours.any()  # what rounding leaves of the definition's is about as small
            continue
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        limit = (2 if name == "messages" else 3) * allowed
        limit += rounding * torch.finfo(ours.dtype).eps * truth.abs().max()
        assert error <= limit, f"{name}: error {error:.2e}, the definition's {allowed:.2e}"
