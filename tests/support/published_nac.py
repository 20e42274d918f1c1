"""Three layers of the published Neural Attentive Circuits in plain PyTorch: class and state names, calls, semantics.

The published package, `neural_compilers`, needs several others to be imported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModFC(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int,
        bias: bool = True,
        *,
        scale_normalization_type: str = "ln",
        scale_gain: float = 1.0,
        learnable_scale_gain: bool = False,
        scale_dropout: float = 0.0,
        add_one_to_scale: bool = False,
    ) -> None:
        super().__init__()
        self.native_weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-0.5, 0.5))
        self.native_bias = nn.Parameter(torch.empty(out_features).uniform_(-0.5, 0.5)) if bias else None
        self.scale = nn.Linear(context_features, in_features, bias=False)
        self.scale_dropout = nn.Dropout(scale_dropout) if scale_dropout else nn.Identity()
        self.activation = None
        self.scale_normalization_type = scale_normalization_type
        self.scale_gain = nn.Parameter(torch.tensor(scale_gain)) if learnable_scale_gain else scale_gain
        self.scale_times_input_normalization_type = "none"
        self.add_one_to_scale = add_one_to_scale

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        scale = self.scale(context)
        if self.scale_normalization_type == "ln":
            scale = F.layer_norm(scale, scale.shape[-1:])
        scale = self.scale_dropout(self.scale_gain * scale) + float(self.add_one_to_scale)
        return F.linear(x * scale, self.native_weight, self.native_bias)


class FC(ModFC):
    pass


class StatelessWrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.module(x)


class ModSequential(nn.Sequential):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for module in self:
            x = module(x, context)
        return x


class GEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)


class LayerScale(nn.Module):
    def __init__(self, dim: int, initial_value: float | None) -> None:
        super().__init__()
        self.gamma = None if initial_value is None else nn.Parameter(torch.full((dim,), initial_value))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.gamma is None else self.gamma * x


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, old: Tensor, residual: Tensor) -> Tensor:
        assert self.drop_prob == 0 or not self.training, "another draw than ours: nothing to compare"
        return old + residual


class DotProductKernel(nn.Module):
    def __init__(
        self,
        truncation: float | None = None,
        truncation_implementation: str = "direct",
        initial_bandwidth: float = 1.0,
        learnable_bandwidth: bool = True,
        stochastic_kernel: bool = False,
        stochastic_eval_behaviour: str = "no_sample",
        use_gumbel_along_functions: bool = False,
    ) -> None:
        super().__init__()
        self.truncation, self.truncation_implementation = truncation, truncation_implementation
        self.learnable_bandwidth = learnable_bandwidth
        self.stochastic_kernel, self.stochastic_eval_behaviour = stochastic_kernel, stochastic_eval_behaviour
        self.stochastic_sampling_temperature = 1.0
        self.use_gumbel_along_functions = use_gumbel_along_functions
        if learnable_bandwidth:
            self.bandwidth = nn.Parameter(torch.tensor(initial_bandwidth))
        else:
            self.register_buffer("bandwidth", torch.tensor(initial_bandwidth))

    def forward(self, signatures: Tensor, types: Tensor, normalize: bool) -> Tensor:
        distance = 1 - F.normalize(signatures, dim=-1) @ F.normalize(types, dim=-1).mT
        log_affinity = -distance / self.bandwidth
        if self.truncation is not None:
            log_affinity = log_affinity.masked_fill(distance > self.truncation, -math.inf)
        if self.stochastic_kernel and self.stochastic_eval_behaviour == "threshold":
            assert not self.training
            log_affinity = torch.where(log_affinity < math.log(0.5), -math.inf, 0.0)
        return log_affinity - log_affinity.logsumexp(dim=-1, keepdim=True) if normalize else log_affinity


class KernelModulatedLatentAttention(nn.Module):
    def __init__(
        self,
        *,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        include_residual: bool = True,
        kernel_kwargs: dict[str, Any] | None = None,
        mask_attn_scores_with_affinities: bool = True,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 0.5,
        scale_attention_by_affinities_after_softmax: bool = False,
        normalize_kernel_along_keys: bool = True,
        share_layernorm: bool = False,
        qkv_bias: bool = True,
        mod_fc_cls: type[ModFC] = ModFC,
        mod_fc_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.state_dim, self.code_dim, self.num_heads, self.head_dim = state_dim, code_dim, num_heads, head_dim
        self.include_residual = include_residual
        self.mask_attn_scores_with_affinities = mask_attn_scores_with_affinities
        self.scale_attention_by_affinities_after_softmax = scale_attention_by_affinities_after_softmax
        self.normalize_kernel_along_keys = normalize_kernel_along_keys
        self.share_layernorm, self.qkv_bias = share_layernorm, qkv_bias
        self.kernel = DotProductKernel(**(kernel_kwargs or {}))
        self.receiver_layernorm = nn.LayerNorm(state_dim)
        self.sender_layernorm = None if share_layernorm else nn.LayerNorm(state_dim)
        inner_dim, options = num_heads * head_dim, mod_fc_kwargs or {}
        self.query_compiler = mod_fc_cls(state_dim, inner_dim, code_dim, qkv_bias, **options)
        self.key_compiler = mod_fc_cls(state_dim, inner_dim, code_dim, qkv_bias, **options)
        self.value_compiler = mod_fc_cls(state_dim, inner_dim, code_dim, qkv_bias, **options)
        self.exit_layer = mod_fc_cls(inner_dim, state_dim, code_dim, **options)
        self.drop_path = DropPath(path_drop_prob)
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)

    def forward(
        self,
        receiver_states: Tensor,
        receiver_signatures: Tensor,
        receiver_codes: Tensor,
        sender_states: Tensor,
        sender_signatures: Tensor,
        sender_codes: Tensor,
    ) -> Tensor:
        log_affinity = self.kernel(receiver_signatures, sender_signatures, self.normalize_kernel_along_keys)
        receivers = self.receiver_layernorm(receiver_states)
        senders = (self.receiver_layernorm if self.share_layernorm else self.sender_layernorm)(sender_states)
        query, key, value = (
            tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tensor in (
                self.query_compiler(receivers, receiver_codes),
                self.key_compiler(senders, sender_codes),
                self.value_compiler(senders, sender_codes),
            )
        )
        scores = query @ key.mT / math.sqrt(self.head_dim)
        weights = (scores + log_affinity if self.mask_attn_scores_with_affinities else scores).softmax(dim=-1)
        if self.scale_attention_by_affinities_after_softmax:
            weights = weights * log_affinity.exp()
        messages = self.exit_layer((weights @ value).transpose(1, 2).flatten(-2), receiver_codes)
        messages = self.layer_scale(messages)
        return self.drop_path(receiver_states, messages) if self.include_residual else messages


class ReadInAttention(nn.Module):
    def __init__(
        self,
        *,
        input_dim: int,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        include_residual: bool = True,
        layer_scale_initial_value: float | None = 1.0,
        qkv_bias: bool = True,
        mod_fc_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.input_dim, self.state_dim, self.code_dim = input_dim, state_dim, code_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.include_residual, self.qkv_bias = include_residual, qkv_bias
        self.sender_layernorm = nn.LayerNorm(input_dim)
        self.receiver_layernorm = nn.LayerNorm(state_dim)
        inner_dim, options = num_heads * head_dim, mod_fc_kwargs or {}
        self.query_compiler = ModFC(state_dim, inner_dim, code_dim, qkv_bias, **options)
        self.key_compiler = ModFC(input_dim, inner_dim, code_dim, qkv_bias, **options)
        self.value_compiler = ModFC(input_dim, inner_dim, code_dim, qkv_bias, **options)
        self.exit_layer = ModFC(inner_dim, state_dim, code_dim, **options)
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)

    def forward(
        self,
        receiver_states: Tensor,
        receiver_signatures: Tensor | None,
        receiver_codes: Tensor,
        sender_states: Tensor,
        sender_signatures: Tensor | None = None,
        sender_codes: Tensor | None = None,
    ) -> Tensor:
        latents = receiver_states.shape[1]
        senders = self.sender_layernorm(sender_states).unsqueeze(2).expand(-1, -1, latents, -1)  # [B, V, U, C]
        key, value = (
            layer(senders, receiver_codes).unflatten(-1, (self.num_heads, -1))  # [B, V, U, H, D]
            for layer in (self.key_compiler, self.value_compiler)
        )
        query = self.query_compiler(self.receiver_layernorm(receiver_states), receiver_codes)
        query = query.unflatten(-1, (self.num_heads, -1))
        weights = (torch.einsum("buhd,bvuhd->bhuv", query, key) / math.sqrt(self.head_dim)).softmax(dim=-1)
        messages = torch.einsum("bhuv,bvuhd->buhd", weights, value).flatten(-2)
        messages = self.layer_scale(self.exit_layer(messages, receiver_codes))
        return receiver_states + messages if self.include_residual else messages


class ModFFN(nn.Module):
    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        capacity_factor: float = 1.0,
        include_residual: bool = True,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 0.5,
        use_geglu: bool = False,
        mod_fc_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.state_dim, self.code_dim, self.capacity_factor = state_dim, code_dim, capacity_factor
        self.include_residual = include_residual
        self.layernorm = nn.LayerNorm(state_dim)
        hidden_dim, options = round(capacity_factor * state_dim), mod_fc_kwargs or {}
        self.ffn = ModSequential(
            ModFC(state_dim, (2 if use_geglu else 1) * hidden_dim, code_dim, **options),
            StatelessWrapper(GEGLU() if use_geglu else nn.GELU()),
            ModFC(hidden_dim, state_dim, code_dim, **options),
        )
        self.drop_path = DropPath(path_drop_prob)
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        residual = self.layer_scale(self.ffn(self.layernorm(states), codes))
        return self.drop_path(states, residual) if self.include_residual else residual


for published in (KernelModulatedLatentAttention, ReadInAttention, ModFFN):
    published.__module__ = "neural_compilers.model.nc.attention"
