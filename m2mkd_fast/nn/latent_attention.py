"""Message passing between latents along the learned graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache
from m2mkd_fast.nn.latent_kernel import DotProductKernel
from m2mkd_fast.nn.modulated_linear import modulated_linear, normalize_and_project
from m2mkd_fast.nn.options import build
from m2mkd_fast.nn.residual import DropPath, LayerScale, add_branch
from m2mkd_fast.ops.latent_affinity import signature_distance
from m2mkd_fast.ops.latent_attention import latent_attention


class LatentAttention(CachesInEvaluation):
    """Kernel-modulated attention: receivers ask, senders answer, a kernel on their signatures weighs who hears whom.

    Args:
        state_dim: size of a state.
        code_dim: size of a code.
        num_heads: number of attention heads.
        head_dim: size of a head.
        include_residual: add the receivers' states to their messages.
        kernel_type: ``"DotProductKernel"``, or ``None`` for attention of all to all, without signatures.
        kernel_kwargs: options of the kernel.
        mask_attn_scores_with_affinities: add log affinities to the scores.
        scale_attention_by_affinities_after_softmax: multiply the attention weights by affinities.
        normalize_kernel_along_keys: the affinities of a receiver sum to one. Matters to the scaling after the softmax
            alone (the softmax removes it from the scores), and is computed only there.
        share_layernorm: senders use the receivers' layer norm.
        qkv_bias: queries, keys and values have biases.
        path_drop_prob: probability of dropping the branch of an image.
        layer_scale_initial_value: ``None`` for no layer scale.
        mod_fc_kwargs: options of the four :class:`~m2mkd_fast.nn.modulated_linear.ModulatedLinear`.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        include_residual: bool = True,
        kernel_type: str | None = "DotProductKernel",
        kernel_kwargs: Mapping[str, Any] | None = None,
        mask_attn_scores_with_affinities: bool = True,
        scale_attention_by_affinities_after_softmax: bool = False,
        normalize_kernel_along_keys: bool = True,
        share_layernorm: bool = False,
        qkv_bias: bool = True,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 1e-6,
        mod_fc_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if kernel_type not in (None, "DotProductKernel"):
            raise UnknownNameError("kernel_type", kernel_type, ["DotProductKernel"])
        if path_drop_prob > 0.0 and not include_residual:
            raise M2MKDError(
                f"path_drop_prob is {path_drop_prob}, but without include_residual a dropped path would leave nothing; "
                "set it to 0"
            )
        self.num_heads = num_heads
        self.include_residual = include_residual
        self.mask_scores = mask_attn_scores_with_affinities
        self.scale_weights = scale_attention_by_affinities_after_softmax
        self.normalize_kernel = normalize_kernel_along_keys
        self.skip_empty_tiles = False  # set by `plan_tiles`, where a graph has enough of them
        self.kernel = None if kernel_type is None else build(DotProductKernel, "kernel_kwargs", kernel_kwargs)
        self.receiver_layernorm = nn.LayerNorm(state_dim)
        self.sender_layernorm = None if share_layernorm else nn.LayerNorm(state_dim)
        self._distance_cache, self._affinity_cache = EvaluationCache(), EvaluationCache()
        inner_dim = num_heads * head_dim
        self.query_compiler = modulated_linear(state_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.key_compiler = modulated_linear(state_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.value_compiler = modulated_linear(state_dim, inner_dim, code_dim, mod_fc_kwargs, bias=qkv_bias)
        self.exit_layer = modulated_linear(inner_dim, state_dim, code_dim, mod_fc_kwargs)
        self.layer_scale = LayerScale(state_dim, layer_scale_initial_value)
        self.drop_path = DropPath(path_drop_prob)

    def forward(
        self,
        receiver_states: Tensor,
        receiver_codes: Tensor,
        receiver_signatures: Tensor | None,
        sender_states: Tensor,
        sender_codes: Tensor,
        sender_signatures: Tensor | None,
        distance: Tensor | None = None,
    ) -> Tensor:
        """New receiver states.

        Args:
            receiver_states: ``[B, U, state_dim]``.
            receiver_codes: ``[U or 1, code_dim]``.
            receiver_signatures: ``[U, S]``; not used without a kernel, as the senders'.
            sender_states: ``[B, V, state_dim]``.
            sender_codes: ``[V or 1, code_dim]``.
            sender_signatures: ``[V, S]``.
            distance: ``[U, V]``, the signatures' :func:`~m2mkd_fast.ops.latent_affinity.signature_distance`, where the
                caller has it already: it is the same for all layers between the same latents.
        """
        sender_norm = self.receiver_layernorm if self.sender_layernorm is None else self.sender_layernorm
        (query,) = normalize_and_project(
            self.receiver_layernorm, [self.query_compiler], receiver_states, receiver_codes
        )
        key, value = normalize_and_project(
            sender_norm, [self.key_compiler, self.value_compiler], sender_states, sender_codes
        )
        query, key, value = (
            tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value)
        )
        log_affinity = None
        if self.kernel is not None:
            if distance is None:
                distance = self._distance(receiver_signatures, sender_signatures)
            log_affinity = self._log_affinity(distance, receiver_states.shape[0])
        messages = latent_attention(
            query,
            key,
            value,
            log_affinity if self.mask_scores else None,
            log_affinity if self.scale_weights else None,
            skip_empty_tiles=self.skip_empty_tiles,
        )
        scaled = messages.transpose(1, 2).flatten(-2) * self.exit_layer.input_scale(receiver_codes)
        states = receiver_states if self.include_residual else None
        return add_branch(states, scaled, self.exit_layer, self.layer_scale, self.drop_path)

    def _log_affinity(self, distance: Tensor, batch_size: int) -> Tensor:
        """Once for all images while no edge is sampled, and then remembered in evaluation."""
        normalize = self.normalize_kernel and self.scale_weights
        if self.kernel.samples:
            return self.kernel(distance, batch_size, normalize=normalize)
        return self._affinity_cache.get(
            [distance, self.kernel.bandwidth],
            lambda: self.kernel.unsampled(distance, normalize),
            (normalize, *self.kernel.settings),
        )

    def _distance(self, receiver_signatures: Tensor | None, sender_signatures: Tensor | None) -> Tensor:
        if receiver_signatures is None or sender_signatures is None:
            raise M2MKDError(
                "this layer weighs messages by a kernel on signatures, but was called without them; pass "
                "receiver_signatures and sender_signatures, or build it with kernel_type=None"
            )
        return self._distance_cache.get(
            [receiver_signatures, sender_signatures], lambda: signature_distance(receiver_signatures, sender_signatures)
        )

    def receivers_without_sender(self, receiver_signatures: Tensor, sender_signatures: Tensor) -> Tensor:
        """How many receivers, a scalar, are farther from every sender than the kernel's truncation.

        Such a receiver gets a message of zeros. It happens after senders were removed, and to signatures of zero.
        """
        if self.kernel is None:
            return torch.zeros((), dtype=torch.int64, device=receiver_signatures.device)
        log_affinity = self.kernel.unsampled(self._distance(receiver_signatures, sender_signatures))
        return (log_affinity == -math.inf).all(dim=-1).sum()
