"""Parts of a circuit as modules that stand alone between two stitches, to be distilled one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.blocks import AttentiveReadIn, Propagator, ReadOut
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit


class NACReadIn(nn.Module):
    """The first module: images ``[B, C, H, W]`` to ``[B, tokens, post_width]``.

    The latents' codes and initial states are drawn once and saved with the module. (The published code draws them at
    every start and saves neither, so that its checkpoints do not say what they were trained with.)

    Args:
        tokenizer: images to tokens.
        read_in: tokens to latents.
        post_width: width of the module that follows, the teacher's.
        tokens: number of latents. 1 as published; the teacher's number of tokens makes both modules' outputs
            comparable.
    """

    def __init__(self, tokenizer: nn.Module, read_in: AttentiveReadIn, post_width: int, tokens: int = 1) -> None:
        super().__init__()
        attention = read_in.read_in_attention
        state_dim, code_dim = _dims(attention)
        self.tokenizer = tokenizer
        self.read_in = read_in
        self.post_stitch = nn.Linear(state_dim, post_width)
        self.register_buffer("codes", torch.randn(tokens, code_dim))
        self.register_buffer("states", torch.randn(1, tokens, state_dim))

    def forward(self, images: Tensor) -> Tensor:
        states = self.states.expand(images.shape[0], -1, -1)
        return self.post_stitch(self.read_in(states, self.codes, self.tokenizer(images)))


class NACMediator(nn.Module):
    """A module in the middle: tokens ``[B, N, pre_width]`` to ``[B, N, post_width]``; all tokens share one saved code.

    Args:
        propagator: its attention must be without kernel.
        pre_width: width of the module before.
        post_width: width of the module that follows.
    """

    def __init__(self, propagator: Propagator, pre_width: int, post_width: int) -> None:
        super().__init__()
        state_dim, code_dim = _dims(propagator.latent_attention)
        self.pre_stitch = nn.Linear(pre_width, state_dim)
        self.latent_attention = propagator.latent_attention
        self.ffn = propagator.ffn
        self.post_stitch = nn.Linear(state_dim, post_width)
        self.register_buffer("codes", torch.randn(1, code_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.pre_stitch(tokens)
        states = self.latent_attention(states, self.codes, None, states, self.codes, None)
        return self.post_stitch(self.ffn(states, self.codes))


class NACReadOut(nn.Module):
    """The last module: tokens ``[B, N, pre_width]`` to logits ``[B, classes]``, through one output latent.

    Args:
        read_out: its attention must be without kernel.
        tokenizer: output latents to logits.
        pre_width: width of the module before.
    """

    def __init__(self, read_out: ReadOut, tokenizer: nn.Module, pre_width: int) -> None:
        super().__init__()
        state_dim, code_dim = _dims(read_out.latent_attention)
        self.pre_stitch = nn.Linear(pre_width, state_dim)
        self.latent_attention = read_out.latent_attention
        self.ffn = read_out.ffn
        self.head = read_out.head
        self.tokenizer = tokenizer
        self.register_buffer("codes", torch.randn(1, code_dim))
        self.register_buffer("states", torch.randn(1, 1, state_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        senders = self.pre_stitch(tokens)
        states = self.states.expand(tokens.shape[0], -1, -1)
        states = self.ffn(self.latent_attention(states, self.codes, None, senders, self.codes, None), self.codes)
        if self.head is not None:
            norm, linear = self.head
            states = linear(norm["module"](states), self.codes)
        return self.tokenizer(states)


def student_modules(circuit: NeuralAttentiveCircuit, cut_widths: Sequence[int], tokens: int = 1) -> list[nn.Module]:
    """The circuit's parts as independent student modules: a read-in, one mediator per propagator, a read-out.

    Each part is a copy with the circuit's present tensors. Attention is of all to all: signatures and kernels come into
    play when the circuit is put together, and are not part of a module.

    Args:
        circuit: with a propagator of its own for every step, and an attentive read-in.
        cut_widths: widths between the modules, the teacher's; one less than there are modules.
        tokens: latents of the read-in, see :class:`NACReadIn`.

    Raises:
        M2MKDError: the circuit cannot be taken apart, or the number of widths is another.
    """
    graph = circuit.graph
    if not isinstance(graph.read_in, AttentiveReadIn):
        raise M2MKDError(
            f"a read-in of type {type(graph.read_in).__name__} cannot be a student module; use AttentiveReadIn"
        )
    distinct = {id(propagator.ffn) for propagator in graph.propagators}
    if len(distinct) < len(graph.propagators):
        raise M2MKDError(
            "propagators that share weights cannot be distilled one by one; set share_propagator_weights and "
            "share_ffn_between_propagators to false"
        )
    if len(cut_widths) != circuit.num_modules - 1:
        raise M2MKDError(
            f"this circuit makes {circuit.num_modules} modules (read-in, {len(graph.propagators)} propagators, "
            f"read-out) with {circuit.num_modules - 1} widths between them, but {len(cut_widths)} were given; split "
            f"the teacher into {circuit.num_modules} parts, or change num_iterations"
        )
    read_in = copy.deepcopy(graph.read_in)
    read_in.code_noise = nn.Identity()
    mediators = [
        NACMediator(_without_kernel(propagator), pre_width, post_width)
        for propagator, pre_width, post_width in zip(graph.propagators, cut_widths[:-1], cut_widths[1:], strict=True)
    ]
    read_out = NACReadOut(_without_kernel(graph.read_out), copy.deepcopy(circuit.output_tokenizer), cut_widths[-1])
    return [NACReadIn(copy.deepcopy(circuit.input_tokenizer), read_in, cut_widths[0], tokens), *mediators, read_out]


def _without_kernel(propagator: Propagator) -> Propagator:
    propagator = copy.deepcopy(propagator)
    propagator.latent_attention.kernel = None
    return propagator


def _dims(attention: nn.Module) -> tuple[int, int]:
    """Sizes of a state and of a code of an attention layer."""
    return attention.receiver_layernorm.normalized_shape[0], attention.query_compiler.scale.in_features
