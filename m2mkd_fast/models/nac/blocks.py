"""The three kinds of layers of a latent graph: read-in, propagator, read-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.code_noise import CodeNoise
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.nn.modulated_feed_forward import ModulatedFeedForward
from m2mkd_fast.nn.modulated_linear import modulated_linear
from m2mkd_fast.nn.options import build
from m2mkd_fast.nn.read_in_attention import ReadInAttention

Options = Mapping[str, Any] | None


def _code_noise(scale: float | None) -> nn.Module:
    return nn.Identity() if scale is None else CodeNoise(scale)


class AttentiveReadIn(nn.Module):
    """Latents attend to tokens: :class:`ReadInAttention`, then :class:`ModulatedFeedForward`.

    Args:
        input_dim: size of a token.
        state_dim: size of a state.
        code_dim: size of a code.
        num_heads: number of attention heads.
        head_dim: size of a head.
        path_drop_prob: probability of dropping the feed-forward branch of an image.
        read_in_layer_scale_initial_value: of the attention.
        ffn_layer_scale_initial_value: of the feed-forward layer.
        ffn_capacity_factor: hidden size of the feed-forward layer in units of the state's size.
        code_noise_scale: see :class:`CodeNoise`.
        include_residual_in_read_in_attention: add the initial states to what is read.
        use_geglu: GEGLU instead of GELU.
        qkv_bias_in_attention: queries, keys and values have biases.
        mod_fc_kwargs: options of every modulated linear layer.
    """

    def __init__(
        self,
        input_dim: int,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        path_drop_prob: float = 0.0,
        read_in_layer_scale_initial_value: float | None = 1.0,
        ffn_layer_scale_initial_value: float | None = 1e-6,
        ffn_capacity_factor: float = 1.0,
        code_noise_scale: float | None = None,
        include_residual_in_read_in_attention: bool = False,
        use_geglu: bool = False,
        qkv_bias_in_attention: bool = True,
        mod_fc_kwargs: Options = None,
    ) -> None:
        super().__init__()
        self.read_in_attention = ReadInAttention(
            input_dim,
            state_dim,
            code_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            include_residual=include_residual_in_read_in_attention,
            layer_scale_initial_value=read_in_layer_scale_initial_value,
            qkv_bias=qkv_bias_in_attention,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.ffn = ModulatedFeedForward(
            state_dim,
            code_dim,
            capacity_factor=ffn_capacity_factor,
            path_drop_prob=path_drop_prob,
            layer_scale_initial_value=ffn_layer_scale_initial_value,
            use_geglu=use_geglu,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.code_noise = _code_noise(code_noise_scale)

    def forward(self, states: Tensor, codes: Tensor, inputs: Tensor) -> Tensor:
        """New states ``[B, U, state_dim]``; codes ``[U or 1, code_dim]``, inputs ``[B, V, input_dim]``."""
        codes = self.code_noise(codes)
        return self.ffn(self.read_in_attention(states, codes, inputs), codes)


class ProjectionReadIn(nn.Module):
    """Every latent takes one token, through a modulated projection; initial states are not used.

    Needs as many latents as there are tokens. The arguments are those of :class:`AttentiveReadIn`.
    """

    def __init__(
        self,
        input_dim: int,
        state_dim: int,
        code_dim: int,
        path_drop_prob: float = 0.0,
        ffn_layer_scale_initial_value: float | None = 1e-6,
        ffn_capacity_factor: float = 1.0,
        code_noise_scale: float | None = None,
        use_geglu: bool = False,
        mod_fc_kwargs: Options = None,
    ) -> None:
        super().__init__()
        self.read_in_projection = modulated_linear(input_dim, state_dim, code_dim, mod_fc_kwargs)
        self.ffn = ModulatedFeedForward(
            state_dim,
            code_dim,
            capacity_factor=ffn_capacity_factor,
            path_drop_prob=path_drop_prob,
            layer_scale_initial_value=ffn_layer_scale_initial_value,
            use_geglu=use_geglu,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.code_noise = _code_noise(code_noise_scale)

    def forward(self, states: Tensor, codes: Tensor, inputs: Tensor) -> Tensor:
        if inputs.shape[1] != states.shape[1]:
            raise M2MKDError(
                f"ProjectionReadIn gives every latent one token, but there are {states.shape[1]} latents and "
                f"{inputs.shape[1]} tokens; set num_input_latents to the number of tokens, or use AttentiveReadIn"
            )
        codes = self.code_noise(codes)
        return self.ffn(self.read_in_projection(inputs, codes), codes)


class Propagator(nn.Module):
    """One step of message passing: :class:`LatentAttention`, then :class:`ModulatedFeedForward`.

    Args:
        state_dim: size of a state.
        code_dim: size of a code.
        num_heads: number of attention heads.
        head_dim: size of a head.
        path_drop_prob: probability of dropping a branch of an image, for both branches.
        layer_scale_initial_value: of both branches.
        ffn_capacity_factor: hidden size of the feed-forward layer in units of the state's size.
        latent_attention_kwargs: options of the attention, such as its kernel's, that win over the others here.
        code_noise_scale: see :class:`CodeNoise`; receivers' and senders' codes get noise of their own.
        include_residual_in_latent_attention: add the receivers' states to their messages.
        use_geglu: GEGLU instead of GELU.
        qkv_bias_in_attention: queries, keys and values have biases.
        mod_fc_kwargs: options of every modulated linear layer.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        num_heads: int = 1,
        head_dim: int = 64,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 1e-6,
        ffn_capacity_factor: float = 1.0,
        latent_attention_kwargs: Options = None,
        code_noise_scale: float | None = None,
        include_residual_in_latent_attention: bool = True,
        use_geglu: bool = False,
        qkv_bias_in_attention: bool = True,
        mod_fc_kwargs: Options = None,
    ) -> None:
        super().__init__()
        self.latent_attention = build(
            LatentAttention,
            "latent_attention_kwargs",
            latent_attention_kwargs,
            state_dim=state_dim,
            code_dim=code_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            include_residual=include_residual_in_latent_attention,
            layer_scale_initial_value=layer_scale_initial_value,
            path_drop_prob=path_drop_prob,
            qkv_bias=qkv_bias_in_attention,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.ffn = ModulatedFeedForward(
            state_dim,
            code_dim,
            capacity_factor=ffn_capacity_factor,
            path_drop_prob=path_drop_prob,
            layer_scale_initial_value=layer_scale_initial_value,
            use_geglu=use_geglu,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.code_noise = _code_noise(code_noise_scale)

    def forward(
        self,
        states: Tensor,
        codes: Tensor,
        signatures: Tensor | None,
        sender_states: Tensor,
        sender_codes: Tensor,
        sender_signatures: Tensor | None,
        distance: Tensor | None = None,
    ) -> Tensor:
        """New states of the receivers; shapes as in :meth:`LatentAttention.forward`."""
        codes, sender_codes = self.code_noise(codes), self.code_noise(sender_codes)
        states = self.latent_attention(
            states, codes, signatures, sender_states, sender_codes, sender_signatures, distance
        )
        return self.ffn(states, codes)


class ReadOut(Propagator):
    """A propagator to the output latents, with a head where they hold logits.

    Args:
        state_dim: size of a state.
        code_dim: size of a code.
        output_dim: number of classes; needed with a head.
        pre_output_layernorm: layer norm before the head.
        use_head: a modulated linear layer to `output_dim` after the propagator.
        mod_fc_kwargs: options of every modulated linear layer.

    The other arguments are those of :class:`Propagator`.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        output_dim: int | None = None,
        num_heads: int = 1,
        head_dim: int = 64,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 1e-6,
        ffn_capacity_factor: float = 1.0,
        latent_attention_kwargs: Options = None,
        code_noise_scale: float | None = None,
        include_residual_in_latent_attention: bool = True,
        pre_output_layernorm: bool = True,
        use_head: bool = True,
        use_geglu: bool = False,
        qkv_bias_in_attention: bool = True,
        mod_fc_kwargs: Options = None,
    ) -> None:
        super().__init__(
            state_dim,
            code_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            path_drop_prob=path_drop_prob,
            layer_scale_initial_value=layer_scale_initial_value,
            ffn_capacity_factor=ffn_capacity_factor,
            latent_attention_kwargs=latent_attention_kwargs,
            code_noise_scale=code_noise_scale,
            include_residual_in_latent_attention=include_residual_in_latent_attention,
            use_geglu=use_geglu,
            qkv_bias_in_attention=qkv_bias_in_attention,
            mod_fc_kwargs=mod_fc_kwargs,
        )
        self.head = None
        if use_head:
            if output_dim is None:
                raise M2MKDError("a read-out with use_head needs output_dim, the number of classes")
            norm = nn.LayerNorm(state_dim) if pre_output_layernorm else nn.Identity()
            # The extra level gives the norm its published name, head.0.module.
            self.head = nn.ModuleList(
                [nn.ModuleDict({"module": norm}), modulated_linear(state_dim, output_dim, code_dim, mod_fc_kwargs)]
            )

    def forward(
        self,
        states: Tensor,
        codes: Tensor,
        signatures: Tensor | None,
        sender_states: Tensor,
        sender_codes: Tensor,
        sender_signatures: Tensor | None,
        distance: Tensor | None = None,
    ) -> Tensor:
        """``[B, U, state_dim]``, or ``[B, U, output_dim]`` with a head, which uses the codes without noise."""
        states = super().forward(states, codes, signatures, sender_states, sender_codes, sender_signatures, distance)
        if self.head is None:
            return states
        norm, linear = self.head
        return linear(norm["module"](states), codes)


READ_INS = {"AttentiveReadIn": AttentiveReadIn, "ProjectionReadIn": ProjectionReadIn}
