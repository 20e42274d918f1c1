"""This package's layers in the place of those of the published Neural Attentive Circuits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.nn.modulated_feed_forward import ModulatedFeedForward
from m2mkd_fast.nn.read_in_attention import ReadInAttention
from m2mkd_fast.patches.replacement import Replacement, is_from, share_tensors


def nac_layer() -> NACLayer:
    """For :func:`m2mkd_fast.apply`: this package's layers for three of the published code of NAC and m2mKD.

    >>> m2mkd_fast.apply(model, {"**.latent_attention": nac_layer(), "**.read_in_attention": nac_layer()})

    ``KernelModulatedLatentAttention``, ``ReadInAttention`` and ``ModFFN`` of the package ``neural_compilers`` become
    :class:`~m2mkd_fast.nn.latent_attention.LatentAttention`, :class:`~m2mkd_fast.nn.read_in_attention.ReadInAttention`
    and :class:`~m2mkd_fast.nn.modulated_feed_forward.ModulatedFeedForward`, which are called as the published ones are,
    have their very parameters, under the same names, and compute the same, with one exception: where edges are sampled
    those beyond the truncation are absent, which the published code draws with a probability of about 1e-7. (Sampled
    edges and dropped paths come from other random numbers, of the same distributions.)

    Refused are fully connected layers other than ``ModFC`` (``mod_fc_cls``), their options ``activation`` and
    ``scale_dropout``, kernels with Gumbel noise along functions, and edges that are sampled without masking the scores.
    """
    return NACLayer()


class NACLayer(Replacement):
    """See :func:`nac_layer`."""

    def knows(self, module: nn.Module) -> bool:
        return is_from(module, "neural_compilers", *_MAKERS)

    def make(self, module: nn.Module) -> nn.Module:
        if not self.knows(module):
            raise M2MKDError(
                f"nac_layer() replaces {', '.join(_MAKERS)} of the package neural_compilers, not a "
                f"{type(module).__module__}.{type(module).__name__}"
            )
        layer = _MAKERS[type(module).__name__](module).train(module.training)
        share_tensors(module, layer)
        return layer


class PublishedLatentAttention(LatentAttention):
    """:class:`LatentAttention`, called as ``KernelModulatedLatentAttention`` is."""

    def forward(
        self,
        receiver_states: Tensor,
        receiver_signatures: Tensor,
        receiver_codes: Tensor,
        sender_states: Tensor,
        sender_signatures: Tensor,
        sender_codes: Tensor,
    ) -> Tensor:
        return super().forward(
            receiver_states, receiver_codes, receiver_signatures, sender_states, sender_codes, sender_signatures
        )


class PublishedReadInAttention(ReadInAttention):
    """:class:`ReadInAttention`, called as the published one is, with arguments that it does not use."""

    def forward(
        self,
        receiver_states: Tensor,
        receiver_signatures: Tensor | None,
        receiver_codes: Tensor,
        sender_states: Tensor,
        sender_signatures: Tensor | None = None,
        sender_codes: Tensor | None = None,
    ) -> Tensor:
        return super().forward(receiver_states, receiver_codes, sender_states)


def _latent_attention(layer: nn.Module) -> LatentAttention:
    kernel = layer.kernel
    if type(kernel).__name__ != "DotProductKernel":
        raise M2MKDError(f"its kernel is a {type(kernel).__name__}; only DotProductKernel is known")
    if kernel.use_gumbel_along_functions:
        raise M2MKDError("its kernel has use_gumbel_along_functions, which is not known: build it without")
    masks = layer.mask_attn_scores_with_affinities
    if kernel.stochastic_kernel and not masks:
        raise M2MKDError(
            "its kernel is stochastic and does not mask the scores; the published code takes the exponential of the "
            "affinities twice there. Set mask_attn_scores_with_affinities"
        )
    return PublishedLatentAttention(
        layer.state_dim,
        layer.code_dim,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        include_residual=layer.include_residual,
        kernel_kwargs={
            "truncation": kernel.truncation,
            "truncation_implementation": kernel.truncation_implementation,
            "learnable_bandwidth": kernel.learnable_bandwidth,
            "stochastic_kernel": kernel.stochastic_kernel,
            "stochastic_sampling_temperature": kernel.stochastic_sampling_temperature,
            "stochastic_eval_behaviour": kernel.stochastic_eval_behaviour,
        },
        mask_attn_scores_with_affinities=masks,
        scale_attention_by_affinities_after_softmax=layer.scale_attention_by_affinities_after_softmax,
        normalize_kernel_along_keys=layer.normalize_kernel_along_keys,
        share_layernorm=layer.share_layernorm,
        qkv_bias=layer.qkv_bias,
        path_drop_prob=layer.drop_path.drop_prob,
        layer_scale_initial_value=_layer_scale(layer),
        mod_fc_kwargs=_modulated_options(layer),
    )


def _read_in_attention(layer: nn.Module) -> ReadInAttention:
    return PublishedReadInAttention(
        layer.input_dim,
        layer.state_dim,
        layer.code_dim,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        include_residual=layer.include_residual,
        layer_scale_initial_value=_layer_scale(layer),
        qkv_bias=layer.qkv_bias,
        mod_fc_kwargs=_modulated_options(layer),
    )


def _feed_forward(layer: nn.Module) -> ModulatedFeedForward:
    if not layer.include_residual:
        raise M2MKDError("it has no residual connection (include_residual), which the layer in its place adds")
    activation = type(layer.ffn[1].module).__name__
    if activation not in ("GELU", "GEGLU"):
        raise M2MKDError(f"its activation is {activation}, not GELU or GEGLU")
    return ModulatedFeedForward(
        layer.state_dim,
        layer.code_dim,
        capacity_factor=layer.capacity_factor,
        path_drop_prob=layer.drop_path.drop_prob,
        layer_scale_initial_value=_layer_scale(layer),
        use_geglu=activation == "GEGLU",
        mod_fc_kwargs=_modulated_options(layer),
    )


_MAKERS = {
    "KernelModulatedLatentAttention": _latent_attention,
    "ReadInAttention": _read_in_attention,
    "ModFFN": _feed_forward,
}


def _layer_scale(layer: nn.Module) -> float | None:
    return None if layer.layer_scale.gamma is None else 1.0


def _modulated_options(layer: nn.Module) -> dict[str, Any]:
    """The options that all fully connected layers of a published layer have."""
    found: list[dict[str, Any]] = []
    for name, module in layer.named_modules():
        linear = name.endswith(("_compiler", "exit_layer")) or (name.startswith("ffn.") and name.count(".") == 1)
        if not linear or type(module).__name__ == "StatelessWrapper":
            continue
        if type(module).__name__ != "ModFC":
            raise M2MKDError(f"its {name} is a {type(module).__name__}, not a ModFC")
        if module.activation is not None or not isinstance(module.scale_dropout, nn.Identity):
            raise M2MKDError(f"its {name} has an activation or scale_dropout of its own, which are not known")
        learnable = isinstance(module.scale_gain, Tensor)
        options = {
            "scale_normalization_type": module.scale_normalization_type,
            "scale_gain": 1.0 if learnable else module.scale_gain,
            "learnable_scale_gain": learnable,
            "add_one_to_scale": module.add_one_to_scale,
            "scale_times_input_normalization_type": module.scale_times_input_normalization_type,
        }
        if found and options != found[0]:
            raise M2MKDError(f"its {name} has other options than the layers before it")
        found.append(options)
    return found[0]
