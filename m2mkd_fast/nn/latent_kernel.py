"""The learned graph of a layer of latents: a kernel on signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.latent_affinity import latent_affinity, signature_distance
from m2mkd_fast.ops.philox import draw_seed

EVALUATIONS = ("no_sample", "sample", "threshold")
TRUNCATIONS = ("direct", "masked")
EDGE_THRESHOLD = 0.5


class DotProductKernel(nn.Module):
    """Log affinities of receivers to senders; see :func:`m2mkd_fast.ops.latent_affinity.latent_affinity` for the maths.

    Args:
        truncation: largest cosine distance that connects; ``None`` connects all.
        truncation_implementation: ``"direct"`` or ``"masked"``.
        initial_bandwidth: first value of the bandwidth, above zero.
        learnable_bandwidth: the bandwidth is a parameter, else a buffer.
        stochastic_kernel: sample edges while training.
        stochastic_sampling_temperature: temperature of the relaxed Bernoulli variables.
        stochastic_eval_behaviour: what a stochastic kernel does in evaluation: ``"no_sample"`` uses the probabilities
            as they are, ``"sample"`` samples, ``"threshold"`` keeps the edges of probability 1/2 and more and makes
            them equal.
        straight_through: of the published configurations; without effect, see the maths.
        leaky_truncation: truncated edges are sampled with the probability eps of the dtype, as in the published code,
            instead of being absent. Their share of a receiver's attention is 3 to 5 in ten million on average (above a
            thousandth for one receiver in ten thousand), but every edge then costs what a kept one does.

    Raises:
        UnknownNameError: ``stochastic_eval_behaviour`` or ``truncation_implementation`` is none of the above.
        M2MKDError: ``initial_bandwidth`` is not above zero.
    """

    def __init__(
        self,
        truncation: float | None = None,
        truncation_implementation: str = "direct",
        initial_bandwidth: float = 1.0,
        learnable_bandwidth: bool = True,
        stochastic_kernel: bool = False,
        stochastic_sampling_temperature: float = 1.0,
        stochastic_eval_behaviour: str = "no_sample",
        straight_through: bool = True,
        leaky_truncation: bool = False,
    ) -> None:
        super().__init__()
        if stochastic_eval_behaviour not in EVALUATIONS:
            raise UnknownNameError("stochastic_eval_behaviour", stochastic_eval_behaviour, EVALUATIONS)
        if truncation_implementation not in TRUNCATIONS:
            raise UnknownNameError("truncation_implementation", truncation_implementation, TRUNCATIONS)
        if not initial_bandwidth > 0:
            raise M2MKDError(
                f"initial_bandwidth is {initial_bandwidth}; it must be above zero: distances are divided by it"
            )
        self.truncation = truncation
        self.truncation_implementation = truncation_implementation
        self.stochastic = stochastic_kernel
        self.temperature = stochastic_sampling_temperature
        self.evaluation = stochastic_eval_behaviour
        self.leaky_truncation = leaky_truncation
        bandwidth = torch.tensor(float(initial_bandwidth))
        if learnable_bandwidth:
            self.bandwidth = nn.Parameter(bandwidth)
        else:
            self.register_buffer("bandwidth", bandwidth)

    def forward(self, distance: Tensor, batch_size: int, normalize: bool = False) -> Tensor:
        """Log affinities, sampled or not as the module's mode says.

        Args:
            distance: of receivers to senders ``[U, V]``, from
                :func:`~m2mkd_fast.ops.latent_affinity.signature_distance`; the same for all layers of a step.
            batch_size: how many graphs to draw where edges are sampled.
            normalize: the affinities of a receiver sum to one.

        Returns:
            ``[U, V]``, or ``[batch_size, U, V]`` where sampled.
        """
        if not self.samples:
            return self.unsampled(distance, normalize)
        # The seed stays on the device: to read it here would wait for all that the device has still to do.
        seed = draw_seed(distance.device)
        return self._log_affinity(
            distance,
            samples=batch_size,
            seed=seed,
            temperature=self.temperature,
            leaky=self.leaky_truncation,
            normalize=normalize,
        )

    @property
    def samples(self) -> bool:
        """Whether a call draws edges, as the module's mode says."""
        return self.stochastic and (self.training or self.evaluation == "sample")

    @property
    def settings(self) -> tuple[Any, ...]:
        """What :meth:`unsampled` depends on beside its arguments, the bandwidth and the mode."""
        return self.truncation, self.truncation_implementation, self.stochastic, self.evaluation

    def unsampled(self, distance: Tensor, normalize: bool = False) -> Tensor:
        """``[U, V]``: log affinities without a draw; binary in evaluation by threshold."""
        binary = self.stochastic and not self.training and self.evaluation == "threshold"
        return self._log_affinity(distance, threshold=EDGE_THRESHOLD if binary else None, normalize=normalize)

    def link_probability(self, signatures: Tensor) -> Tensor:
        """``[U, U]``: the affinities themselves between latents of one set, never sampled and never binary."""
        return self._log_affinity(signature_distance(signatures, signatures)).exp()

    def _log_affinity(self, distance: Tensor, **options: Any) -> Tensor:
        return latent_affinity(
            distance,
            self.bandwidth,
            truncation=self.truncation,
            truncation_implementation=self.truncation_implementation,
            **options,
        )
