r"""How the pairs of an arm share one budget of optimiser steps: equally, or as a bandit finds that they use them.

Module-wise adaptive distillation (OPTIMA, arXiv:2310.04550) takes the modules for the arms of a bandit: a reward is the
decrease of a module's loss over a slice of training, and the next slice goes to the module from which Thompson sampling
expects the most. Rewards shrink as a pair converges, so they are discounted (Gaussian discounted Thompson sampling,
arXiv:2305.10718). Here the pairs of a round train side by side, so all slices of a round are drawn before it begins.

Everything is a function of (configuration, history, seed): whoever works out an allocation finds the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_fast.data.seeds import derive_seed
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import PairConfig


@dataclass(frozen=True)
class Slice:
    """What a pair did in one round: optimiser steps, and its loss before and after them on the same batches."""

    steps: int
    loss_before: float
    loss_after: float


History = Sequence[Sequence[Slice]]  # a list a round, with a slice a slot


def annealing_steps(pair: PairConfig, slots: int) -> int:
    """Steps of all pairs together at the end, over which the learning rate falls."""
    return round(pair.budget.anneal * slots * pair.train.steps)


def round_sizes(pair: PairConfig, slots: int) -> list[int]:
    """Steps of all pairs together, a round. With those of the annealing they make slots * ``pair.train.steps``."""
    return equal_shares(slots * pair.train.steps - annealing_steps(pair, slots), pair.budget.rounds)


def equal_shares(total: int, count: int) -> list[int]:
    """`total` in `count` whole shares that differ by one at most, the larger ones first."""
    return [total // count + (index < total % count) for index in range(count)]


def proportional_shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole shares in proportion to `weights`; what is left goes to the largest remainders, in order."""
    whole = sum(weights)
    if not whole:
        return equal_shares(total, len(weights))
    shares = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares


def posterior(history: History, *, slice_steps: int, discount: float) -> list[tuple[float, float]]:
    r"""Mean and standard deviation of the reward that a slice would bring each pair now.

    In round :math:`s` pair :math:`i` took :math:`k_{si}` slices (steps over ``slice_steps``) and its loss fell by
    :math:`d_{si}`, so :math:`x_{si} = d_{si} / k_{si}` a slice. With :math:`R` rounds done and discount :math:`\gamma`

    .. math::
        w_s = \gamma^{R-1-s}, \quad N_i = \sum_s w_s k_{si}, \quad
        \mu = \frac{\sum_{si} w_s d_{si}}{\sum_{si} w_s k_{si}}, \quad
        \sigma^2 = \frac{\sum_{si} w_s k_{si} x_{si}^2}{\sum_{si} w_s k_{si}}, \quad
        \theta_i \sim \mathcal{N}\Big(\frac{\mu + \sum_s w_s d_{si}}{1 + N_i},\ \frac{\sigma^2}{1 + N_i}\Big) .

    The prior is worth one slice of the pairs' common reward, and the noise is taken to be as large as the rewards now
    are, so the scale of the losses does not matter. A pair that gets nothing is forgotten and comes back to the prior.
    """
    slots = len(history[0])
    counts, falls = [0.0] * slots, [0.0] * slots
    squares = 0.0
    for age, done in enumerate(reversed(history)):
        weight = discount**age
        for i, part in enumerate(done):
            taken, fall = part.steps / slice_steps, part.loss_before - part.loss_after
            if not math.isfinite(fall):
                raise M2MKDError(
                    f"pair {i}: a loss that went from {part.loss_before} to {part.loss_after} is no reward; it must be "
                    "finite"
                )
            if taken:
                counts[i] += weight * taken
                falls[i] += weight * fall
                squares += weight * fall * fall / taken
    count = sum(counts)
    mean, variance = (sum(falls) / count, squares / count) if count else (0.0, 0.0)
    return [((mean + falls[i]) / (1 + counts[i]), math.sqrt(variance / (1 + counts[i]))) for i in range(slots)]


def allocate(history: History, *, slots: int, steps: int, slice_steps: int, discount: float, seed: int) -> list[int]:
    """Steps for each pair in the round that follows `history`.

    The first round is shared equally. Later `steps` is cut into slices of ``slice_steps`` (the last may be shorter),
    and each goes to the pair with the largest draw from its :func:`posterior`; equal draws share by lot.

    Args:
        history: the rounds before, each with a slice a slot.
        slots: number of pairs.
        steps: steps of all pairs together in this round; the result's sum is exactly this.
        slice_steps: steps that one draw gives.
        discount: of a reward, a round; between 0 and 1.
        seed: of the draws, with the number of the round.

    Raises:
        M2MKDError: a loss in the history is not finite.
    """
    if not history:
        return equal_shares(steps, slots)
    beliefs = posterior(history, slice_steps=slice_steps, discount=discount)
    draws = random.Random(derive_seed(seed, "round", len(history)))
    shares = [0] * slots
    while steps:
        given = min(slice_steps, steps)
        rewards = [(draws.gauss(mean, deviation), draws.random()) for mean, deviation in beliefs]
        shares[rewards.index(max(rewards))] += given
        steps -= given
    return shares


def learning_rate_factor(step: int, *, warmup: int, end: int, annealing: int) -> float:
    """Factor on the learning rate at a pair's step: linear warm-up from 1/100, constant, linear to zero over the last.

    Args:
        step: of the pair, 0 at its very first.
        warmup: steps of warm-up.
        end: the pair's steps in all.
        annealing: those of them at the end over which it falls; 0 while the rounds last.
    """
    rising = 0.01 + 0.99 * step / warmup if step < warmup else 1.0
    left = end - step
    return rising * (left / annealing if left < annealing else 1.0)
