"""Reading tokens into latents, each latent through projections of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from m2mkd_fast.nn.modulated_linear import modulated_linear, normalize_and_project
from m2mkd_fast.nn.residual import LayerScale, add_branch
from m2mkd_fast.ops.read_in_attention import attend_to_own_keys, read_in_attention


class ReadInAttention(nn.Module):
    """Attention of latents to tokens whose keys and values are modulated by the *receiver's* code.

    Args:
        input_dim: size of a token.
        state_dim: size of a state.
        code_dim: size of a code.
        num_heads: number of attention heads.
        head_dim: size of a head.
        include_residual: add the latents' states to what they read.
        layer_scale_initial_value: ``None`` for no layer scale.
        qkv_bias: queries, keys and values have biases.
        mod_fc_kwargs: options of the four :class:`~m2mkd_fast.nn.modulated_linear.ModulatedLinear`. A normalisation
            after the scale (``scale_times_input_normalization_type``) makes the layer compute the keys and values of
            every pair, which takes many times the time and memory.

    Shapes: receiver_states ``[B, U, state_dim]``, receiver_codes ``[U or 1, code_dim]``, inputs ``[B, V, input_dim]``;
    returns ``[B, U, state_dim]``.
    """

    def __init__(
        self,
        input_dim: int,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        include_residual: bool = True,
        layer_scale_initial_value: float | None = 1.0,
        qkv_bias: bool = True,
        mod_fc_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.include_residual = include_residual
        inner_dim = num_heads * head_dim
        self.sender_layernorm = nn.LayerNorm(input_dim)
        self.receiver_layernorm = nn.LayerNorm(state_dim)
        self.query_compiler = modulated_linear(state_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.key_compiler = modulated_linear(input_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.value_compiler = modulated_linear(input_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.exit_layer = modulated_linear(inner_dim, state_dim, code_dim, mod_fc_kwargs)
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)

    def forward(self, receiver_states: Tensor, receiver_codes: Tensor, inputs: Tensor) -> Tensor:
        (query,) = normalize_and_project(
            self.receiver_layernorm, [self.query_compiler], receiver_states, receiver_codes
        )
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        messages = self._read(query, receiver_codes, self.sender_layernorm(inputs)).transpose(1, 2).flatten(-2)
        scaled = messages * self.exit_layer.input_scale(receiver_codes)
        return add_branch(receiver_states if self.include_residual else None, scaled, self.exit_layer, self.layer_scale)

    def _read(self, query: Tensor, codes: Tensor, inputs: Tensor) -> Tensor:
        key, value = self.key_compiler, self.value_compiler
        if not (key.scales_only and value.scales_only):
            # [B, 1, V, C] with codes [U, 1, C]: every latent projects every token.
            inputs, codes = inputs.unsqueeze(1), codes.unsqueeze(1)
            return attend_to_own_keys(query, key(inputs, codes), value(inputs, codes))
        return read_in_attention(
            query,
            inputs,
            key.native_weight,
            key.input_scale(codes),
            value.native_weight,
            value.input_scale(codes),
            key.native_bias,
            value.native_bias,
        )
