"""The published Neural Attentive Circuits by name, and tiny ones for tests and demonstrations.

========================  ==========================================================================
``nac_tiny.<graph>``      Tiny ImageNet: 64x64 images, 200 classes, 64 + 256 + 64 latents of size 384
``nac_imagenet.<graph>``  ImageNet: 224x224 images, 1000 classes, 192 + 768 + 64 latents of size 512
``nac_fewshot.<graph>``   the ImageNet circuit with 8 classes; published with ``scale_free`` alone
``nac_micro.<graph>``     16x16 grey images, 10 classes, 8 + 16 + 4 latents of size 64
========================  ==========================================================================

<graph> is the graph that the mediators' signatures start from: ``scale_free``, ``planted``, ``ring`` or ``erdos``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.registry import register_model

Config = dict[str, Any]

_HINGE_REPULSION = {"type": "signature_hinge_repulsion", "use": True, "hinge": 0.4, "weight": 0.1}


def _block_model(num_clusters: int) -> Config:
    options = {"num_clusters": num_clusters, "p_in": 0.9, "p_out": 0.2}
    sets = {f"regularize_{name}_latents": name == "mediator" for name in ("input", "mediator", "output")}
    return {"type": "stochastic_block_model_regularization", "use": True, "kwargs": options | sets}


def _graphs(clusters: int, cluster_size: int, edges_per_node: int) -> dict[str, Config]:
    """Options of the mediators for every graph of `clusters * cluster_size` nodes."""
    size = clusters * cluster_size
    generators = {
        "scale_free": ("barabasi-albert", {"n": size, "m": edges_per_node}),
        "planted": ("planted-partition", {"l": clusters, "k": cluster_size, "p_in": 0.9, "p_out": 0.2}),
        "ring": ("ring-of-cliques", {"num_cliques": clusters, "clique_size": cluster_size}),
        "erdos": ("erdos-renyi", {"n": size, "p": 0.1}),
    }
    return {
        graph: {"graph_preset": preset, "graph_generator_kwargs": options}
        for graph, (preset, options) in generators.items()
    }


def _config(
    *,
    image: tuple[int, int],
    num_classes: int,
    state_dim: int,
    heads: tuple[int, int],
    latents: tuple[int, int, int],
    num_iterations: int,
    signature_dim: int,
    ffn_capacity_factor: float,
    tokenizer: Config,
    position_dim: int,
    path_drop_prob: float,
    softmax_type: str,
) -> Config:
    """What all variants have in common. `image` is (channels, size), `heads` is (number, size of each)."""
    num_heads, head_dim = heads
    num_inputs, num_mediators, num_outputs = latents
    in_chans, img_size = image
    stride = 4 * 2 ** (tokenizer["num_stages"] - 1)
    return {
        "input_dim": in_chans,
        "output_dim": num_classes,
        "state_dim": state_dim,
        "input_tokenizer_type": "ConvNeXtImageTokenizer",
        "input_tokenizer_kwargs": {
            **tokenizer,
            "positional_grid_kwargs": {"dim": position_dim, "grid_size": [img_size // stride, img_size // stride]},
        },
        "latent_graph_type": "LatentGraph",
        "latent_graph_kwargs": {
            "code_dim": state_dim,
            "signature_dim": signature_dim,
            "num_input_latents": num_inputs,
            "num_mediator_latents": num_mediators,
            "num_output_latents": num_outputs,
            "num_iterations": num_iterations,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "ffn_capacity_factor": ffn_capacity_factor,
            "use_geglu": True,
            "qkv_bias_in_attention": False,
            "layer_scale_initial_value": 0.1,
            "path_drop_prob": path_drop_prob,
            "code_noise_scale": 0.05,
            "use_code_noise_in_latent_seeder": True,
            "share_propagator_weights": False,
            "mod_fc_kwargs": {"add_one_to_scale": True, "learnable_scale_gain": True, "scale_gain": 0.1},
            "propagator_kwargs": {
                "latent_attention_kwargs": {
                    "kernel_type": "DotProductKernel",
                    "kernel_kwargs": {
                        "stochastic_kernel": True,
                        "stochastic_sampling_temperature": 0.5,
                        "truncation": 0.9,
                    },
                    "share_layernorm": True,
                }
            },
            "read_in_kwargs": {"include_residual_in_read_in_attention": True, "path_drop_prob": 0.0},
            "read_out_kwargs": {
                "include_residual_in_latent_attention": False,
                "path_drop_prob": 0.0,
                "pre_output_layernorm": False,
                "use_head": False,
            },
        },
        "output_tokenizer_type": "OutputLatentPooling",
        "output_tokenizer_kwargs": {"softmax_type": softmax_type},
    }


_TINY = {
    "image": (3, 64),
    "num_classes": 200,
    "state_dim": 384,
    "heads": (6, 64),
    "latents": (64, 256, 64),
    "num_iterations": 8,
    "signature_dim": 64,
    "ffn_capacity_factor": 2.0,
    "tokenizer": {"capacity_preset": "tiny", "num_stages": 2},
    "position_dim": 64,
    "path_drop_prob": 0.1,
    "softmax_type": "gumbel",
}
_IMAGENET = {
    **_TINY,
    "image": (3, 224),
    "num_classes": 1000,
    "state_dim": 512,
    "heads": (8, 64),
    "latents": (192, 768, 64),
    "ffn_capacity_factor": 1.0,
}
_MICRO = {
    "image": (1, 16),
    "num_classes": 10,
    "state_dim": 64,
    "heads": (4, 16),
    "latents": (8, 16, 4),
    "num_iterations": 2,
    "signature_dim": 16,
    "ffn_capacity_factor": 2.0,
    # One stage, so that 16 tokens are left of 16x16 pixels, and three quarters of a state wide.
    "tokenizer": {
        "repr_dim": 192,
        "capacity_preset": "nano",
        "num_stages": 1,
        "convnext_kwargs": {"layer_scale_init_value": 0.1},
    },
    "position_dim": 16,
    "path_drop_prob": 0.0,
    "softmax_type": "vanilla",
}
_FAMILIES = {
    # base, graphs, clusters of the regulariser (8 in both published files, whatever the graph has)
    "nac_tiny": (_TINY, _graphs(8, 32, edges_per_node=2), 8),
    "nac_imagenet": (_IMAGENET, _graphs(12, 64, edges_per_node=6), 8),
    "nac_fewshot": (
        {**_IMAGENET, "num_classes": 8},
        {"scale_free": _graphs(12, 64, edges_per_node=6)["scale_free"]},
        8,
    ),
    "nac_micro": (_MICRO, _graphs(4, 4, edges_per_node=2), 4),
}


def variant_config(
    family: str,
    graph: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    **overrides: Any,
) -> Config:
    """The arguments of :meth:`NeuralAttentiveCircuit.from_config` for a variant.

    Args:
        family: ``"nac_tiny"``, ``"nac_imagenet"``, ``"nac_fewshot"`` or ``"nac_micro"``.
        graph: ``"scale_free"``, ``"planted"``, ``"ring"`` or ``"erdos"``.
        num_classes: as is usual; ``None`` keeps the variant's.
        img_size: sets the size of the positional grid.
        in_chans: channels of the images.
        overrides: keys of the configuration; nested options are merged into the variant's.

    Raises:
        M2MKDError: the tokenizer's stride does not divide `img_size`.
    """
    base, graphs, clusters = _FAMILIES[family]
    channels, size = base["image"]
    arguments = {**base, "image": (in_chans or channels, img_size or size)}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    stride = 4 * 2 ** (base["tokenizer"]["num_stages"] - 1)
    if arguments["image"][1] % stride:
        raise M2MKDError(f"img_size of {family} must be a multiple of {stride}, got {img_size}")
    config = _config(**arguments)
    config["latent_graph_kwargs"]["mediator_latent_kwargs"] = graphs[graph]
    config["graph_sparsity"] = _block_model(clusters) if graph == "planted" else _HINGE_REPULSION
    return merge_options(config, overrides)


def merge_options(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy of nested options in which those of ``overrides`` win."""
    merged = copy.deepcopy(config)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = merge_options(merged[key], value) if nested else copy.deepcopy(value)
    return merged


def _register(family: str, graph: str) -> None:
    @register_model(f"{family}.{graph}")
    def build(**overrides: Any) -> NeuralAttentiveCircuit:
        return NeuralAttentiveCircuit.from_config(variant_config(family, graph, **overrides))

    build.__doc__ = f"The {family} circuit whose mediators start from the {graph} graph; see `variant_config`."


for _family, (_, _graph_options, _) in _FAMILIES.items():
    for _graph in _graph_options:
        _register(_family, _graph)
