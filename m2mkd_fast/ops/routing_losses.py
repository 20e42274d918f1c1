"""Losses that keep the experts of a mixture evenly used. All of them treat each group of tokens on its own.

They return one value per group; average them over groups, and add them over the layers of a model, as V-MoE does:
``total = task_loss + 0.005 * importance + 0.005 * load`` for each layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError


def importance_loss(gates: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' total gate.

    ``I_e = sum_s gates[g, s, e]``, ``loss_g = Var_e(I) / Mean_e(I)**2`` with the population variance. V-MoE applies it
    to the softmax of the logits *without* noise.

    Args:
        gates: [..., S, E], non-negative; [G, S, E] as a rule.

    Returns:
        [...], zero where all experts get the same total; a group without tokens gives zero.

    Raises:
        M2MKDError: ``gates`` has fewer than two dimensions or no experts.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", appendix A.2; Shazeer et al. 2017,
        eq. 6-7.
    """
    _check_scores("gates", gates)
    return _squared_coefficient_of_variation(gates.sum(dim=-2))


def load_loss(logits: Tensor, noise: Tensor, *, top_k: int, noise_std: float) -> Tensor:
    """Squared coefficient of variation of the experts' expected load under a fresh draw of the noise.

    With ``h = logits + noise``, the threshold of token s is the k-th largest ``h[s, :]`` and

    ``p[s, e] = 1 - Phi((threshold_s - logits[s, e]) / noise_std)``, ``p_e = mean_s p[s, e]``,
    ``loss_g = Var_e(p) / Mean_e(p)**2`` with the population variance.

    The gradient also flows through the threshold, as in the published code.

    Args:
        logits: [..., S, E] without noise.
        noise: [..., S, E], the values that were added to the logits (already scaled).
        top_k: number of experts a token chooses, 1 to E.
        noise_std: standard deviation of ``noise``; V-MoE uses ``1 / E``.

    Returns:
        [...], one value a group; a group without tokens gives zero.

    Raises:
        M2MKDError: shapes differ, ``top_k`` is not within 1 to E, or ``noise_std`` is not positive.

    Source: Riquelme et al. 2021, appendix A.2.
    """
    _check_scores("logits", logits)
    if noise.shape != logits.shape:
        raise M2MKDError(f"noise has shape {tuple(noise.shape)}, logits {tuple(logits.shape)}; they must be the same")
    experts = logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise M2MKDError(f"top_k is {top_k}; with {experts} experts it must be within 1 to {experts}")
    if not noise_std > 0:
        raise M2MKDError(
            f"noise_std is {noise_std}; it must be positive. Without noise the load loss is undefined: leave it out"
        )
    threshold = (logits + noise).topk(top_k, dim=-1).values[..., -1:]
    # 1 - Phi(z) = erfc(z / sqrt 2) / 2 keeps the tail's digits that 1 - cdf would cancel.
    chosen = 0.5 * torch.erfc((threshold - logits) / (noise_std * math.sqrt(2.0)))
    return _squared_coefficient_of_variation(chosen.sum(dim=-2) / max(logits.shape[-2], 1))


def gshard_loss(gates: Tensor, first: Tensor | None = None) -> Tensor:
    """Product of the share of tokens whose first choice an expert is and its mean gate, averaged over experts.

    ``loss_g = E**2 * mean_e(f_e * m_e)``, ``f_e`` = share of tokens with ``argmax_e gates = e`` (no gradient),
    ``m_e = mean_s gates[s, e]``. It is 1 for perfectly even use. V-MoE applies it to the softmax *with* noise.

    Args:
        gates: [..., S, E]; [G, S, E] as a rule.
        first: [..., S] int64, each token's first choice; by default that of its largest gate. Where gates are rounded
            to the same number, scores may still tell them apart.

    Returns:
        [...], one value a group; a group without tokens gives zero.

    Raises:
        M2MKDError: ``gates`` has fewer than two dimensions or no experts.

    Source: Lepikhin et al. 2020, "GShard", section 2.2 (auxiliary loss), as in the V-MoE code.
    """
    _check_scores("gates", gates)
    tokens, experts = gates.shape[-2:]
    first = gates.detach().argmax(dim=-1) if first is None else first
    count = torch.nn.functional.one_hot(first, experts).sum(dim=-2)
    # The published code takes the share as count * (1 / S) in single precision whatever the gates' is: the same here,
    # so that values agree to the last digits.
    share = (count.float() * (1.0 / max(tokens, 1))).to(gates.dtype)
    return (share * gates.sum(dim=-2) / max(tokens, 1)).mean(dim=-1) * experts**2


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp; keeps router logits small.

    ``loss_g = mean_s (log sum_e exp logits[s, e])**2``

    Args:
        logits: [..., S, E]; [G, S, E] as a rule.

    Returns:
        [...], one value a group; a group without tokens gives zero.

    Raises:
        M2MKDError: ``logits`` has fewer than two dimensions or no experts.

    Source: Zoph et al. 2022, "ST-MoE", eq. 5.
    """
    _check_scores("logits", logits)
    return logits.logsumexp(dim=-1).square().sum(dim=-1) / max(logits.shape[-2], 1)


def _squared_coefficient_of_variation(values: Tensor) -> Tensor:
    """Var / mean² over the last dimension. Without a square root, whose gradient is NaN at exactly equal values."""
    mean = values.mean(dim=-1)
    variance = (values - mean.unsqueeze(-1)).square().mean(dim=-1)
    # An all-zero row (no tokens) has variance 0: dividing by 1 there gives 0 and a finite gradient.
    square = mean.square()
    return variance / torch.where(square > 0, square, torch.ones_like(square))


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.dim() < 2 or scores.shape[-1] == 0:
        raise M2MKDError(
            f"{name} has shape {tuple(scores.shape)}; expected [..., tokens, experts] with at least one expert"
        )
