"""The Neural Attentive Circuit: an image tokenizer, a latent graph, a read-out of logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.nac.latent_graph import LatentGraph
from m2mkd_fast.models.nac.regularizers import GraphSparsity
from m2mkd_fast.models.nac.tokenizers import INPUT_TOKENIZERS, OUTPUT_TOKENIZERS
from m2mkd_fast.nn.options import build

# Which tensors of a student module belong into the circuit, and where. {} is the propagator's index.
_READ_IN = ((r"tokenizer\.", "input_tokenizer."), (r"read_in\.", "latent_graphs.0.read_in."))
_MEDIATOR = ((r"(latent_attention|ffn)\.", r"latent_graphs.0.propagators.{}.\1."),)
_READ_OUT = (
    (r"(latent_attention|ffn|head)\.", r"latent_graphs.0.read_out.\1."),
    (r"tokenizer\.", "output_tokenizer."),
)


class CircuitStates(NamedTuple):
    """Everything on the way from images to logits."""

    tokenized_inputs: Tensor
    input_states: Tensor
    mediator_states: Tensor
    output_states: Tensor
    logits: Tensor


class NeuralAttentiveCircuit(nn.Module):
    """Images ``[B, input_dim, H, W]`` to logits ``[B, output_dim]``, through modules wired by a learned graph.

    The arguments have the names of the published configuration files, so that a file's ``model.kwargs`` builds the
    model (:meth:`from_config`); state-dict names are the published ones. Evaluation is deterministic: noise on initial
    states, edges and pooling belongs to training, where it comes from torch's random numbers alone.

    Args:
        input_dim: channels of the images.
        output_dim: number of classes.
        state_dim: size of a state.
        input_tokenizer_type: ``"ConvNeXtImageTokenizer"``.
        input_tokenizer_kwargs: options of the input tokenizer.
        latent_graph_type: ``"LatentGraph"``.
        latent_graph_kwargs: options of the latent graph.
        output_tokenizer_type: ``"OutputLatentPooling"`` or ``"FirstSlotAsLogits"``.
        output_tokenizer_kwargs: options of the output tokenizer.
        graph_sparsity: the regulariser behind :meth:`regularization_loss`: ``criterion.graph_sparsity`` of a published
            configuration, see :class:`~m2mkd_fast.models.nac.regularizers.GraphSparsity`; ``None`` for none.
        fit_signatures: fit signatures to the graph presets; off where a state dict is loaded afterwards. On the meta
            device there is nothing to fit.
        stochastic_evaluation: noise on initial states and pooling in evaluation too, as the published code has it.

    Raises:
        UnknownNameError: a type or an option that does not exist, with near names.
        M2MKDError: options that contradict one another.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        output_dim: int,
        state_dim: int,
        input_tokenizer_type: str = "ConvNeXtImageTokenizer",
        input_tokenizer_kwargs: Mapping[str, Any] | None = None,
        latent_graph_type: str = "LatentGraph",
        latent_graph_kwargs: Mapping[str, Any] | None = None,
        output_tokenizer_type: str = "FirstSlotAsLogits",
        output_tokenizer_kwargs: Mapping[str, Any] | None = None,
        graph_sparsity: Mapping[str, Any] | None = None,
        fit_signatures: bool = True,
        stochastic_evaluation: bool = False,
    ) -> None:
        super().__init__()
        for kind, name, known in (
            ("input_tokenizer_type", input_tokenizer_type, INPUT_TOKENIZERS),
            ("latent_graph_type", latent_graph_type, ["LatentGraph"]),
            ("output_tokenizer_type", output_tokenizer_type, OUTPUT_TOKENIZERS),
        ):
            if name not in known:
                raise UnknownNameError(kind, name, known)
        self.num_classes = output_dim
        self.input_tokenizer = build(
            INPUT_TOKENIZERS[input_tokenizer_type],
            "input_tokenizer_kwargs",
            input_tokenizer_kwargs,
            input_dim=input_dim,
            repr_dim=state_dim,
        )
        graph = build(
            LatentGraph,
            "latent_graph_kwargs",
            latent_graph_kwargs,
            state_dim=state_dim,
            input_dim=self.input_tokenizer.output_dim,
            output_dim=output_dim,
            fit_signatures=fit_signatures,
            stochastic_evaluation=stochastic_evaluation,
        )
        # A list, for the published names of its tensors; there is never more than one.
        self.latent_graphs = nn.ModuleList([graph])
        self.output_tokenizer = build(
            OUTPUT_TOKENIZERS[output_tokenizer_type],
            "output_tokenizer_kwargs",
            output_tokenizer_kwargs,
            state_dim=state_dim,
            output_dim=output_dim,
            stochastic_evaluation=stochastic_evaluation,
        )
        self.graph_sparsity = build(GraphSparsity, "graph_sparsity", graph_sparsity)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> NeuralAttentiveCircuit:
        """Build from ``model.kwargs`` of a published configuration file; overrides win.

        ``simplified_interface`` is accepted and has no effect: images in, logits out is the only interface.
        """
        config = {key: value for key, value in config.items() if key != "simplified_interface"}
        return build(cls, "the configuration", config | overrides)

    @property
    def graph(self) -> LatentGraph:
        return self.latent_graphs[0]

    @property
    def num_modules(self) -> int:
        """Slots for student modules: read-in with tokenizer, every propagator, read-out with pooling."""
        return len(self.graph.propagators) + 2

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_states(images).logits

    def forward_states(self, images: Tensor) -> CircuitStates:
        """Logits, and the states that they come from."""
        tokens = self.input_tokenizer(images)
        states = self.graph(tokens)
        return CircuitStates(tokens, *states, self.output_tokenizer(states.output_states))

    def regularization_loss(self) -> Tensor:
        """The weighted loss on signatures that `graph_sparsity` asks for, to be added to the task's; 0 if none."""
        return self.graph_sparsity(self.graph)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for timm's layer-wise learning rates: tokenizer, latents with read-in, every propagator, read-out."""
        return {
            "tokenizer": r"^input_tokenizer",
            "read_in": r"^latent_graphs\.0\.(?!propagators|read_out)",
            "propagators": r"^latent_graphs\.0\.propagators" if coarse else r"^latent_graphs\.0\.propagators\.(\d+)",
        }

    def module_key(self, index: int, key: str, num_modules: int) -> str | None:
        """Where a tensor of a student module belongs in this circuit.

        Args:
            index: slot of the module.
            key: the tensor's name in the module.
            num_modules: number of slots.

        Returns:
            The tensor's name in the circuit; ``None`` for what has no place there: stitches, and the codes and states
            that a module brings along (the circuit has its own).

        Raises:
            M2MKDError: the circuit has another number of slots.
        """
        if num_modules != self.num_modules or not 0 <= index < num_modules:
            raise M2MKDError(
                f"slot {index} of {num_modules} does not exist here: this circuit has {self.num_modules} slots, 0 to "
                f"{self.num_modules - 1}: read-in, {self.num_modules - 2} propagators, read-out"
            )
        rules = _READ_IN if index == 0 else _READ_OUT if index == num_modules - 1 else _MEDIATOR
        for pattern, replacement in rules:
            if re.match(pattern, key):
                return re.sub(f"^{pattern}", replacement.format(index - 1), key)
        return None
