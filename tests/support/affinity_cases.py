"""What the tests of latent_affinity share, on CPU backends and on Triton: inputs, the truth, and what may differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.latent_affinity import latent_affinity
from m2mkd_fast.ops.philox import philox_uniform

MARGIN = 1e-4  # no distance as near to a truncation: precisions may not agree on its side

# What reaches every branch. "seed" and "uniform" are filled in by `arguments_of`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"truncation": 0.9},
    "masked": {"truncation": 0.9, "truncation_implementation": "masked"},
    "threshold": {"truncation": 0.9, "threshold": 0.5},
    "seed": {"truncation": 0.9, "temperature": 0.5, "seed": True},
    "seed, masked": {"truncation": 0.9, "truncation_implementation": "masked", "temperature": 0.5, "seed": True},
    "seed, all edges": {"temperature": 1.0, "seed": True},
    "seed, leaky": {"truncation": 0.9, "temperature": 0.5, "seed": True, "leaky": True},
    "seed, temperature 0.7": {"truncation": 0.9, "temperature": 0.7, "seed": True},
    "seed, temperature 0.1": {"truncation": 1.1, "temperature": 0.1, "seed": True},
    "uniform": {"truncation": 0.9, "temperature": 0.5, "uniform": True},
    "uniform, leaky": {"truncation": 0.9, "temperature": 1.0, "uniform": True, "leaky": True},
    "uniform, all edges": {"temperature": 0.5, "uniform": True},
}


def random_distance(receivers: int, senders: int, *, number: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Distances as of random signatures, some of them 0, none within MARGIN of the truncations used here."""
    generator = torch.Generator().manual_seed(number)
    distance = 1.0 + 0.3 * torch.randn(receivers, senders, generator=generator, dtype=torch.float64)
    distance = distance.clamp(0.0, 2.0).fill_diagonal_(0.0)
    for truncation in (0.9, 1.1):
        near = (distance - truncation).abs() < 2 * MARGIN
        distance = torch.where(near, truncation + 2 * MARGIN, distance)
    return distance.to(dtype)


def arguments_of(case: dict[str, Any], distance: Tensor, samples: int = 3, number: int = 5) -> dict[str, Any]:
    """A case with its noise, on the device and in the dtype of the distance."""
    arguments = dict(case)
    if arguments.pop("seed", False):
        arguments |= {"samples": samples, "seed": torch.tensor(number, device=distance.device)}
    if arguments.pop("uniform", False):
        generator = torch.Generator().manual_seed(number)
        uniform = torch.rand(samples, *distance.shape, generator=generator, dtype=distance.dtype)
        arguments["uniform"] = uniform.to(distance.device)
    return arguments


def exact_affinity(distance: Tensor, bandwidth: Tensor, dtype: torch.dtype, **arguments: Any) -> Tensor:
    """The maths of the docstring in float64, by another way than the reference, with noise and limits of `dtype`."""
    limits = torch.finfo(dtype)
    distance, bandwidth = distance.double(), bandwidth.double()
    scaled = distance / bandwidth
    cut = torch.zeros_like(distance, dtype=torch.bool)
    if (truncation := arguments.get("truncation")) is not None:
        masked = arguments.get("truncation_implementation") == "masked"
        cut = distance >= truncation if masked else distance > truncation
    if (threshold := arguments.get("threshold")) is not None:
        return torch.where(cut | (scaled.neg().exp() < threshold), -math.inf, 0.0 * scaled)
    uniform = arguments.get("uniform")
    if uniform is None and "seed" in arguments:
        uniform = philox_uniform(arguments["seed"], (arguments["samples"], *distance.shape), dtype)
    if uniform is None:
        return (-scaled).masked_fill(cut, -math.inf)
    uniform = uniform.double().clamp(limits.eps, 1 - limits.eps)
    leaky = arguments.get("leaky", False)
    scaled = scaled.masked_fill(cut, math.inf).clamp(-math.log1p(-limits.eps), -math.log(limits.eps))
    odds_against = scaled.expm1() * (1 - uniform) / uniform
    x = odds_against.log() / arguments["temperature"]
    log_weight = -torch.nn.functional.softplus(x, threshold=700)
    log_weight = log_weight.clamp(math.log(limits.tiny), math.log1p(-limits.eps))
    return log_weight if leaky else log_weight.masked_fill(cut, -math.inf)


def everything(function: Any, distance: Tensor, bandwidth: Tensor, **arguments: Any) -> list[Tensor]:
    """The affinities and, where they have one, the gradients of distance and bandwidth."""
    leaves = distance.detach().requires_grad_(), bandwidth.detach().requires_grad_()
    out = function(*leaves, **arguments)
    if not out.requires_grad:
        return [out]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_as_exact_as_reference(distance: Tensor, bandwidth: Tensor, **arguments: Any) -> None:
    """At most twice (values) or three times (gradients) the error of the reference at this precision.

    On few numbers the reference's largest error can be much below what rounding may do, by luck.
    """
    dtype = distance.dtype

    def reference(distance: Tensor, bandwidth: Tensor, **arguments: Any) -> Tensor:
        with use_backend(latent_affinity="reference"):
            return latent_affinity(distance, bandwidth, **arguments)

    def exact(distance: Tensor, bandwidth: Tensor, **arguments: Any) -> Tensor:
        return exact_affinity(distance, bandwidth, dtype, **arguments)

    found = everything(latent_affinity, distance, bandwidth, **arguments)
    same = everything(reference, distance, bandwidth, **arguments)
    truth = everything(exact, distance.double(), bandwidth.double(), **arguments)
    assert len(found) == len(same)
    for name, ours, theirs, right in zip(("values", "distance", "bandwidth"), found, same, truth, strict=False):
        assert ours.dtype == theirs.dtype == dtype
        assert ours.shape == theirs.shape == right.shape
        absent = right == -math.inf
        assert torch.equal(ours == -math.inf, absent), name
        error, allowed, scale = (
            torch.where(absent, 0.0, tensor).abs().max() if right.numel() else torch.zeros(())
            for tensor in (ours.double() - right, theirs.double() - right, right)
        )
        if name == "bandwidth":  # terms of either sign, that sum to less than they are
            scale = (truth[1] * distance).abs().sum() / bandwidth
        limit = (2 if name == "values" else 3) * allowed + 2 * torch.finfo(dtype).eps * scale
        if dtype == torch.float64:  # of which the truth here is no more exact
            limit = 1e-11 * scale
        assert error <= limit, f"{name}: error {error:.2e}, the reference's {allowed:.2e}, of {scale:.2e}"
