"""Parts of a circuit as modules that stand alone between two stitches, to be distilled one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.blocks import AttentiveReadIn, Propagator, ReadOut
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.stage import Stage
from m2mkd_fast.nn.cut import Cut, as_cut
from m2mkd_fast.nn.stitch import LinearStitch


class NACReadIn(Stage, nn.Module):
    """The first module: images ``[B, C, H, W]`` to latents ``[B, tokens, state_dim]``, stitched to what follows.

    As many latents as the module that follows reads positions stand for these positions, row by row. A single one, as
    published, is handed on as one token, or fills a whole map. The latents' codes and initial states are drawn once and
    saved with the module. (The published code draws them at every start and saves neither, so that its checkpoints do
    not say what they were trained with.)

    Args:
        tokenizer: images to tokens.
        read_in: tokens to latents.
        post_cut: what the module that follows reads, the teacher's; a number is tokens of that width.
        tokens: number of latents. 1 as published; the teacher's number of tokens makes both modules' outputs
            comparable.

    Raises:
        M2MKDError: a map follows, and the latents are neither one nor as many as its positions.
    """

    is_first, is_last = True, False
    stitch_class = LinearStitch
    bare_in_cut = pre_stitch = None

    def __init__(self, tokenizer: nn.Module, read_in: AttentiveReadIn, post_cut: Cut | int, tokens: int = 1) -> None:
        super().__init__()
        attention = read_in.read_in_attention
        state_dim, code_dim = _dims(attention)
        self.tokenizer = tokenizer
        self.read_in = read_in
        self.bare_out_cut, post_cut = _latents_and_cut(state_dim, tokens, as_cut(post_cut))
        self.post_stitch = LinearStitch(state_dim, post_cut.width, self.bare_out_cut, post_cut)
        self.register_buffer("codes", torch.randn(tokens, code_dim))
        self.register_buffer("states", torch.randn(1, tokens, state_dim))

    def forward(self, images: Tensor) -> Tensor:
        states = self.states.expand(images.shape[0], -1, -1)
        states = self.read_in(states, self.codes, self.tokenizer(images))
        return states if self.post_stitch is None else self.post_stitch(states)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for timm's layer-wise learning rates: tokenizer, read-in, stitch."""
        return {"tokenizer": r"^tokenizer", "read_in": r"^read_in"}


class NACMediator(Stage, nn.Module):
    """A module in the middle, between two stitches: ``[B, N, state_dim]`` to the same; all tokens share a saved code.

    Its tokens are the positions that the module before gives; what follows gets them resampled to its own.

    Args:
        propagator: its attention must be without kernel.
        pre_cut: what the module before gives; a number is tokens of that width.
        post_cut: what the module that follows reads.
    """

    is_first = is_last = False
    stitch_class = LinearStitch

    def __init__(self, propagator: Propagator, pre_cut: Cut | int, post_cut: Cut | int) -> None:
        super().__init__()
        state_dim, code_dim = _dims(propagator.latent_attention)
        pre_cut, post_cut = as_cut(pre_cut), as_cut(post_cut)
        self.bare_in_cut = self.bare_out_cut = _as_tokens(pre_cut, state_dim)
        self.pre_stitch = LinearStitch(pre_cut.width, state_dim, pre_cut, self.bare_in_cut)
        self.latent_attention = propagator.latent_attention
        self.ffn = propagator.ffn
        self.post_stitch = LinearStitch(state_dim, post_cut.width, self.bare_out_cut, post_cut)
        self.register_buffer("codes", torch.randn(1, code_dim))

    def forward(self, x: Tensor) -> Tensor:
        states = x if self.pre_stitch is None else self.pre_stitch(x)
        states = self.latent_attention(states, self.codes, None, states, self.codes, None)
        states = self.ffn(states, self.codes)
        return states if self.post_stitch is None else self.post_stitch(states)


class NACReadOut(Stage, nn.Module):
    """The last module: stitched to tokens ``[B, N, state_dim]``, to logits ``[B, classes]`` through one output latent.

    Args:
        read_out: its attention must be without kernel.
        tokenizer: output latents to logits.
        pre_cut: what the module before gives; a number is tokens of that width.
    """

    is_first, is_last = False, True
    stitch_class = LinearStitch
    bare_out_cut = post_stitch = None

    def __init__(self, read_out: ReadOut, tokenizer: nn.Module, pre_cut: Cut | int) -> None:
        super().__init__()
        state_dim, code_dim = _dims(read_out.latent_attention)
        pre_cut = as_cut(pre_cut)
        self.bare_in_cut = _as_tokens(pre_cut, state_dim)
        self.pre_stitch = LinearStitch(pre_cut.width, state_dim, pre_cut, self.bare_in_cut)
        self.latent_attention = read_out.latent_attention
        self.ffn = read_out.ffn
        self.head = read_out.head
        self.tokenizer = tokenizer
        self.register_buffer("codes", torch.randn(1, code_dim))
        self.register_buffer("states", torch.randn(1, 1, state_dim))

    def forward(self, x: Tensor) -> Tensor:
        senders = x if self.pre_stitch is None else self.pre_stitch(x)
        states = self.states.expand(x.shape[0], -1, -1)
        states = self.ffn(self.latent_attention(states, self.codes, None, senders, self.codes, None), self.codes)
        if self.head is not None:
            norm, linear = self.head
            states = linear(norm["module"](states), self.codes)
        return self.tokenizer(states)


def student_modules(circuit: NeuralAttentiveCircuit, cuts: Sequence[Cut | int], tokens: int = 1) -> list[nn.Module]:
    """The circuit's parts as independent student modules: a read-in, one mediator per propagator, a read-out.

    Each part is a copy with the circuit's present tensors. Attention is of all to all: signatures and kernels come into
    play when the circuit is put together, and are not part of a module.

    Args:
        circuit: with a propagator of its own for every step, and an attentive read-in.
        cuts: what passes between the modules, the teacher's, a number for tokens of that width; one less than there are
            modules.
        tokens: latents of the read-in, see :class:`NACReadIn`.

    Raises:
        M2MKDError: the circuit cannot be taken apart, or the number of cuts is another; or the latents do not fill the
            map that the first cut is.
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
    if len(cuts) != circuit.num_modules - 1:
        raise M2MKDError(
            f"this circuit makes {circuit.num_modules} modules (read-in, {len(graph.propagators)} propagators, "
            f"read-out) with {circuit.num_modules - 1} cuts between them, but {len(cuts)} were given; split "
            f"the teacher into {circuit.num_modules} parts, or change num_iterations"
        )
    read_in = copy.deepcopy(graph.read_in)
    read_in.code_noise = nn.Identity()
    mediators = [
        NACMediator(_without_kernel(propagator), pre_cut, post_cut)
        for propagator, pre_cut, post_cut in zip(graph.propagators, cuts[:-1], cuts[1:], strict=True)
    ]
    read_out = NACReadOut(_without_kernel(graph.read_out), copy.deepcopy(circuit.output_tokenizer), cuts[-1])
    return [NACReadIn(copy.deepcopy(circuit.input_tokenizer), read_in, cuts[0], tokens), *mediators, read_out]


def _latents_and_cut(state_dim: int, count: int, cut: Cut) -> tuple[Cut, Cut]:
    """What a read-in of `count` latents gives, without its stitch and with it."""
    if count == cut.tokens:
        return _as_tokens(cut, state_dim), cut
    if cut.layout == "tokens":
        return Cut(state_dim), Cut(cut.width)  # as published: the number of tokens need not be the teacher's
    if count == 1:
        return Cut(state_dim, "tokens", (1, 1)), cut
    raise M2MKDError(
        f"{count} latents of the read-in do not fill {cut}; take one for each position (the pipeline's student.tokens: "
        "teacher), or a single one, which fills the whole map"
    )


def _as_tokens(cut: Cut, width: int) -> Cut:
    """The same positions as tokens of another width."""
    return Cut(width, "tokens", cut.grid, cut.prefix)


def _without_kernel(propagator: Propagator) -> Propagator:
    propagator = copy.deepcopy(propagator)
    propagator.latent_attention.kernel = None
    return propagator


def _dims(attention: nn.Module) -> tuple[int, int]:
    """Sizes of a state and of a code of an attention layer."""
    return attention.receiver_layernorm.normalized_shape[0], attention.query_compiler.scale.in_features
