"""A set of latents, and how their states start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.graphs import initial_signatures
from m2mkd_fast.nn.code_noise import CodeNoise


class Latents(nn.Module):
    """Signatures (who talks to whom), codes (who does what) and, without a seeder, initial states.

    Args:
        num_latents: U.
        signature_dim: S.
        code_dim: C.
        state_dim: size of learned initial states ``[U, state_dim]``; ``None`` where a seeder makes them from the codes.
        num_layers: one set of codes per layer, ``[num_layers, U, C]``; ``None`` for ``[U, C]``, used by all layers.
        graph_preset: the graph that the signatures start from, see `graphs`.
        graph_generator_kwargs: arguments of its networkx generator.
        fit_signatures: whether to fit the signatures to that graph; not done on the meta device.
    """

    def __init__(
        self,
        num_latents: int,
        signature_dim: int,
        code_dim: int,
        state_dim: int | None = None,
        num_layers: int | None = None,
        graph_preset: str | None = None,
        graph_generator_kwargs: Mapping[str, Any] | None = None,
        fit_signatures: bool = True,
    ) -> None:
        super().__init__()
        fit = fit_signatures and torch.get_default_device().type != "meta"
        signatures = initial_signatures(num_latents, signature_dim, graph_preset, graph_generator_kwargs, fit)
        self.signatures_ = nn.Parameter(signatures.to(torch.get_default_device()))
        layers = () if num_layers is None else (num_layers,)
        self.codes_ = nn.Parameter(torch.randn(*layers, num_latents, code_dim))
        self.initial_states_ = None if state_dim is None else nn.Parameter(torch.randn(num_latents, state_dim))

    @property
    def num_latents(self) -> int:
        return self.signatures_.shape[0]

    @property
    def signatures(self) -> Tensor:
        """``[U, S]``."""
        return self.signatures_

    def codes(self, layer: int = 0) -> Tensor:
        """``[U, C]``: the codes of a layer, counted from the end where negative."""
        return self.codes_ if self.codes_.dim() == 2 else self.codes_[layer]

    def initial_states(self, batch_size: int) -> Tensor:
        """``[batch_size, U, state_dim]``."""
        if self.initial_states_ is None:
            raise M2MKDError("these latents have no states of their own; a LatentSeeder makes them from the codes")
        return self.initial_states_.expand(batch_size, -1, -1)


class LatentSeeder(nn.Module):
    r"""Initial states from codes: :math:`\mu(\mathrm{LN}(c)) + \epsilon\, e^{\log\sigma^2(\mathrm{LN}(c)) / 2}`.

    Args:
        state_dim: size of a state.
        code_dim: size of a code.
        code_noise_scale: see :class:`~m2mkd_fast.nn.code_noise.CodeNoise`; ``None`` for none.
        use_state_noise: whether there is a second term, drawn for every image.
        stochastic_evaluation: draw the second term in evaluation, too, as the published code does. Off: two evaluations
            of one image agree.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        code_noise_scale: float | None = None,
        use_state_noise: bool = True,
        stochastic_evaluation: bool = False,
    ) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(code_dim)
        self.code_to_state_mu = nn.Linear(code_dim, state_dim)
        self.code_to_state_logvar = nn.Linear(code_dim, state_dim) if use_state_noise else None
        if self.code_to_state_logvar is not None:
            nn.init.constant_(self.code_to_state_logvar.bias, -5.0)
        self.code_noise = nn.Identity() if code_noise_scale is None else CodeNoise(code_noise_scale)
        self.stochastic_evaluation = stochastic_evaluation

    def forward(self, codes: Tensor, batch_size: int) -> Tensor:
        """``[batch_size, U, state_dim]`` from codes ``[U, code_dim]``."""
        codes = self.layernorm(self.code_noise(codes))
        states = self.code_to_state_mu(codes).expand(batch_size, -1, -1)
        if self.code_to_state_logvar is None or not (self.training or self.stochastic_evaluation):
            return states
        deviation = (0.5 * self.code_to_state_logvar(codes)).exp()
        return states + torch.randn_like(states) * deviation
