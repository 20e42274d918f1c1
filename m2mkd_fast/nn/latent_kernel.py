"""The learned graph of a layer of latents: a kernel on signatures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import UnknownNameError
from m2mkd_fast.ops.latent_affinity import latent_affinity

EVALUATIONS = ("no_sample", "sample", "threshold")
TRUNCATIONS = ("direct", "masked")
EDGE_THRESHOLD = 0.5


class DotProductKernel(nn.Module):
    """Log affinities of receivers to senders; see :func:`m2mkd_fast.ops.latent_affinity.latent_affinity` for the maths.

    Args:
        truncation: largest cosine distance that connects; ``None`` connects all.
        truncation_implementation: ``"direct"`` or ``"masked"``.
        initial_bandwidth: first value of the bandwidth.
        learnable_bandwidth: the bandwidth is a parameter, else a buffer.
        stochastic_kernel: sample edges while training.
        stochastic_sampling_temperature: temperature of the relaxed Bernoulli variables.
        stochastic_eval_behaviour: what a stochastic kernel does in evaluation: ``"no_sample"`` uses the probabilities
            as they are, ``"sample"`` samples, ``"threshold"`` keeps the edges of probability 1/2 and more and makes
            them equal.
        straight_through: of the published configurations; without effect, see the maths.
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
    ) -> None:
        super().__init__()
        if stochastic_eval_behaviour not in EVALUATIONS:
            raise UnknownNameError("stochastic_eval_behaviour", stochastic_eval_behaviour, EVALUATIONS)
        if truncation_implementation not in TRUNCATIONS:
            raise UnknownNameError("truncation_implementation", truncation_implementation, TRUNCATIONS)
        self.truncation = truncation
        self.truncation_implementation = truncation_implementation
        self.stochastic = stochastic_kernel
        self.temperature = stochastic_sampling_temperature
        self.evaluation = stochastic_eval_behaviour
        bandwidth = torch.tensor(float(initial_bandwidth))
        if learnable_bandwidth:
            self.bandwidth = nn.Parameter(bandwidth)
        else:
            self.register_buffer("bandwidth", bandwidth)

    def forward(
        self, receiver_signatures: Tensor, sender_signatures: Tensor, batch_size: int, normalize: bool = False
    ) -> Tensor:
        """``[U, V]`` log affinities of signatures ``[U, S]`` and ``[V, S]``; ``[batch_size, U, V]`` where sampled."""
        uniform = threshold = None
        if self.stochastic and (self.training or self.evaluation == "sample"):
            shape = (batch_size, receiver_signatures.shape[0], sender_signatures.shape[0])
            dtype = torch.promote_types(receiver_signatures.dtype, torch.float32)
            uniform = torch.rand(shape, dtype=dtype, device=receiver_signatures.device)
        elif self.stochastic and self.evaluation == "threshold":
            threshold = EDGE_THRESHOLD
        return latent_affinity(
            receiver_signatures,
            sender_signatures,
            self.bandwidth,
            truncation=self.truncation,
            truncation_implementation=self.truncation_implementation,
            uniform=uniform,
            temperature=self.temperature,
            threshold=threshold,
            normalize=normalize,
        )

    def link_probability(self, signatures: Tensor) -> Tensor:
        """``[U, U]``: the affinities themselves between latents of one set, never sampled."""
        return latent_affinity(
            signatures,
            signatures,
            self.bandwidth,
            truncation=self.truncation,
            truncation_implementation=self.truncation_implementation,
        ).exp()
