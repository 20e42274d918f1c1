"""The feed-forward layer of a latent, modulated by its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.nn.modulated_linear import modulated_linear, normalize_and_project, product_dtype
from m2mkd_fast.nn.residual import DropPath, LayerScale, add_branch
from m2mkd_fast.ops.modulated_geglu import modulated_geglu


class GEGLU(nn.Module):
    """Half of the channels times the GELU of the other half (Shazeer, arXiv 2002.05202)."""

    def forward(self, inputs: Tensor) -> Tensor:
        values, gates = inputs.chunk(2, dim=-1)
        return values * F.gelu(gates)


class ModulatedFeedForward(nn.Module):
    """Layer norm, modulated linear, GELU or GEGLU, modulated linear, layer scale, on a residual branch.

    Args:
        state_dim: size of a state.
        code_dim: size of a code.
        capacity_factor: hidden size in units of the state's size (GEGLU has twice as many inputs).
        path_drop_prob: probability of dropping the branch of an image.
        layer_scale_initial_value: ``None`` for no layer scale.
        use_geglu: GEGLU instead of GELU.
        mod_fc_kwargs: options of both :class:`~m2mkd_fast.nn.modulated_linear.ModulatedLinear`.

    Shapes: states ``[B, N, state_dim]``, codes ``[N or 1, code_dim]``; returns states.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        capacity_factor: float = 1.0,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 1e-6,
        use_geglu: bool = False,
        mod_fc_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = round(capacity_factor * state_dim)
        self.layernorm = nn.LayerNorm(state_dim)
        self.ffn = nn.ModuleList(
            [
                modulated_linear(state_dim, 2 * hidden_dim if use_geglu else hidden_dim, code_dim, mod_fc_kwargs),
                GEGLU() if use_geglu else nn.GELU(),
                modulated_linear(hidden_dim, state_dim, code_dim, mod_fc_kwargs),
            ]
        )
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)
        self.drop_path = DropPath(path_drop_prob)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        expand, activation, contract = self.ffn
        (hidden,) = normalize_and_project(self.layernorm, [expand], states, codes)
        scale = contract.input_scale(codes)
        if isinstance(activation, GEGLU):
            scaled = modulated_geglu(hidden, scale, dtype=product_dtype([contract], hidden))
        else:
            scaled = activation(hidden) * scale
        return add_branch(states, scaled, contract, self.layer_scale, self.drop_path)
