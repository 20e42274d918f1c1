"""Latents and the layers between them: read in, propagate, read out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.nac.blocks import READ_INS, Options, Propagator, ReadOut
from m2mkd_fast.models.nac.latents import Latents, LatentSeeder
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache
from m2mkd_fast.nn.options import build
from m2mkd_fast.ops.latent_affinity import signature_distance


class LatentStates(NamedTuple):
    """States after the last layer, each ``[B, U, state_dim]``; the output states ``[B, U, output_dim]`` with a head."""

    input_states: Tensor
    mediator_states: Tensor
    output_states: Tensor


class LatentGraph(CachesInEvaluation):
    """Input latents read the tokens, mediator latents exchange messages, output latents collect the result.

    Args:
        state_dim: size of a state.
        input_dim: size of a token.
        code_dim: size of a code.
        signature_dim: size of a signature.
        num_input_latents: latents that read the tokens.
        num_mediator_latents: latents that exchange messages.
        num_output_latents: latents that hold the result.
        num_iterations: number of propagators.
        output_dim: number of classes; needed where the read-out has a head.
        share_propagator_weights: one propagator, applied num_iterations times.
        share_ffn_between_propagators: one feed-forward layer for all propagators.
        num_heads: number of attention heads.
        head_dim: size of a head.
        path_drop_prob: probability of dropping a branch of an image.
        layer_scale_initial_value: of every residual branch but that of the read-in attention.
        ffn_capacity_factor: hidden size of the feed-forward layers in units of the state's size.
        code_noise_scale: see :class:`~m2mkd_fast.nn.code_noise.CodeNoise`.
        use_code_noise_in_latent_seeder: noise on the codes that become initial states, too.
        share_codes_between_iterations: mediators have one code, else one for every propagator.
        enable_input_output_communication: input latents send to the output latents.
        enable_persistent_input_mediator_communication: input latents send to the mediators at every propagator, else at
            the first only.
        use_geglu: GEGLU instead of GELU.
        qkv_bias_in_attention: queries, keys and values have biases.
        mod_fc_kwargs: options of every modulated linear layer.
        use_latent_seeder: initial states come from the codes, else they are parameters.
        latent_seeder_kwargs: options of :class:`LatentSeeder`.
        input_latent_kwargs: options of the input :class:`Latents`, such as a graph preset; the next two likewise.
        mediator_latent_kwargs: of the mediators.
        output_latent_kwargs: of the output latents.
        read_in_cls: ``"AttentiveReadIn"`` or ``"ProjectionReadIn"``.
        read_in_kwargs: options of the read-in that win over those above.
        propagator_kwargs: of every propagator.
        read_out_kwargs: of the read-out.
        fit_signatures: fit signatures to graph presets.
        stochastic_evaluation: noise on initial states in evaluation, too.
    """

    def __init__(
        self,
        state_dim: int,
        input_dim: int,
        code_dim: int,
        signature_dim: int,
        num_input_latents: int,
        num_mediator_latents: int,
        num_output_latents: int,
        num_iterations: int,
        output_dim: int | None = None,
        *,
        share_propagator_weights: bool = True,
        share_ffn_between_propagators: bool = False,
        num_heads: int = 1,
        head_dim: int = 64,
        path_drop_prob: float = 0.0,
        layer_scale_initial_value: float | None = 1e-6,
        ffn_capacity_factor: float = 1.0,
        code_noise_scale: float | None = None,
        use_code_noise_in_latent_seeder: bool = False,
        share_codes_between_iterations: bool = True,
        enable_input_output_communication: bool = True,
        enable_persistent_input_mediator_communication: bool = True,
        use_geglu: bool = False,
        qkv_bias_in_attention: bool = True,
        mod_fc_kwargs: Options = None,
        use_latent_seeder: bool = True,
        latent_seeder_kwargs: Options = None,
        input_latent_kwargs: Options = None,
        mediator_latent_kwargs: Options = None,
        output_latent_kwargs: Options = None,
        read_in_cls: str = "AttentiveReadIn",
        read_in_kwargs: Options = None,
        propagator_kwargs: Options = None,
        read_out_kwargs: Options = None,
        fit_signatures: bool = True,
        stochastic_evaluation: bool = False,
    ) -> None:
        super().__init__()
        if num_iterations < 1:
            raise M2MKDError(f"num_iterations must be 1 or more, got {num_iterations}")
        if read_in_cls not in READ_INS:
            raise UnknownNameError("read_in_cls", read_in_cls, READ_INS)
        self._distance_cache, self._code_cache = EvaluationCache(), EvaluationCache()
        self.inputs_send_to_outputs = enable_input_output_communication
        self.inputs_always_send = enable_persistent_input_mediator_communication

        latents = {
            "signature_dim": signature_dim,
            "code_dim": code_dim,
            "state_dim": None if use_latent_seeder else state_dim,
            "fit_signatures": fit_signatures,
        }
        self.input_latents = build(
            Latents, "input_latent_kwargs", input_latent_kwargs, num_latents=num_input_latents, **latents
        )
        self.mediator_latents = build(
            Latents,
            "mediator_latent_kwargs",
            mediator_latent_kwargs,
            num_latents=num_mediator_latents,
            num_layers=None if share_codes_between_iterations else num_iterations,
            **latents,
        )
        self.output_latents = build(
            Latents, "output_latent_kwargs", output_latent_kwargs, num_latents=num_output_latents, **latents
        )
        self.latent_seeder = None
        if use_latent_seeder:
            self.latent_seeder = build(
                LatentSeeder,
                "latent_seeder_kwargs",
                latent_seeder_kwargs,
                state_dim=state_dim,
                code_dim=code_dim,
                code_noise_scale=code_noise_scale if use_code_noise_in_latent_seeder else None,
                stochastic_evaluation=stochastic_evaluation,
            )

        layer = {
            "state_dim": state_dim,
            "code_dim": code_dim,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "path_drop_prob": path_drop_prob,
            "ffn_capacity_factor": ffn_capacity_factor,
            "layer_scale_initial_value": layer_scale_initial_value,
            "ffn_layer_scale_initial_value": layer_scale_initial_value,
            "code_noise_scale": code_noise_scale,
            "use_geglu": use_geglu,
            "qkv_bias_in_attention": qkv_bias_in_attention,
            "mod_fc_kwargs": mod_fc_kwargs,
        }
        self.read_in = build(READ_INS[read_in_cls], "read_in_kwargs", read_in_kwargs, input_dim=input_dim, **layer)
        distinct = 1 if share_propagator_weights else num_iterations
        propagators = [build(Propagator, "propagator_kwargs", propagator_kwargs, **layer) for _ in range(distinct)]
        if share_ffn_between_propagators:
            for propagator in propagators:
                propagator.ffn = propagators[0].ffn
        self.propagators = nn.ModuleList(propagators * (num_iterations // distinct))
        self.read_out = build(ReadOut, "read_out_kwargs", read_out_kwargs, output_dim=output_dim, **layer)

    def forward(self, inputs: Tensor) -> LatentStates:
        """All states from tokens ``[B, V, input_dim]``."""
        batch_size = inputs.shape[0]
        input_states = self._initial_states(self.input_latents, batch_size)
        mediator_states = self._initial_states(self.mediator_latents, batch_size)
        output_states = self._initial_states(self.output_latents, batch_size)

        input_states = self.read_in(input_states, self.input_latents.codes(), inputs)
        signatures, num_inputs = self.mediator_latents.signatures, self.input_latents.num_latents
        all_signatures, distance = self._distance_to_mediators()
        all_codes = self._codes_of_senders()
        for depth, propagator in enumerate(self.propagators):
            first = 0 if depth == 0 or self.inputs_always_send else num_inputs
            mediator_states = propagator(
                mediator_states,
                self.mediator_latents.codes(depth),
                signatures,
                mediator_states if first else torch.cat([input_states, mediator_states], dim=1),
                all_codes[depth][first:],
                all_signatures[first:],
                distance[:, first:],
            )
        first = 0 if self.inputs_send_to_outputs else num_inputs
        output_states = self.read_out(
            output_states,
            self.output_latents.codes(),
            self.output_latents.signatures,
            mediator_states if first else torch.cat([input_states, mediator_states], dim=1),
            all_codes[-1][first:],
            all_signatures[first:],
        )
        return LatentStates(input_states, mediator_states, output_states)

    def _distance_to_mediators(self) -> tuple[Tensor, Tensor]:
        """Signatures of input latents and mediators, ``[V, S]``, and their distance from the mediators, ``[U, V]``."""
        mediators = self.mediator_latents.signatures
        sources = [self.input_latents.signatures, mediators]

        def compute() -> tuple[Tensor, Tensor]:
            senders = torch.cat(sources)
            return senders, signature_distance(mediators, senders)

        return self._distance_cache.get(sources, compute)

    def _codes_of_senders(self) -> list[Tensor]:
        """Codes of input latents and mediators, ``[V, C]``, at every depth."""
        inputs, mediators = self.input_latents.codes(), self.mediator_latents

        def compute() -> list[Tensor]:
            if mediators.codes_.dim() == 2:
                return [torch.cat([inputs, mediators.codes()])] * len(self.propagators)
            return [torch.cat([inputs, codes]) for codes in mediators.codes_]

        return self._code_cache.get([inputs, mediators.codes_], compute)

    def _initial_states(self, latents: Latents, batch_size: int) -> Tensor:
        if self.latent_seeder is None:
            return latents.initial_states(batch_size)
        return self.latent_seeder(latents.codes(), batch_size)
