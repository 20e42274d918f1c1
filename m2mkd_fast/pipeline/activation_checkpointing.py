"""Activation checkpointing: blocks keep what goes in, and the backward pass computes their inside again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.graph_stage import GraphStage
from m2mkd_fast.models.nac import NACMediator, NACReadIn, NACReadOut, NeuralAttentiveCircuit
from m2mkd_fast.nn.vision_moe import VisionMoE


@contextmanager
def activation_checkpointing(model: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Inside the block, training passes of ``model`` keep the inputs of its blocks and what lies between them.

    Loss and gradients are the same to the last bit, random numbers included; the forward pass of the blocks is computed
    twice. Blocks are those of Vision Transformers (V-MoE and stages too), the layers of a circuit, whole modules of a
    circuit, whole stages of other models, and what timm's ``set_grad_checkpointing`` takes in a model that is whole.

    Args:
        model: what is trained.
        compiled: its passes go through :func:`torch.compile`.

    Raises:
        M2MKDError: the model is of a kind that has none of these, or it has mixtures of experts and is compiled: what
            they leave for the loss cannot leave a compiled checkpoint.
    """
    if compiled and _mixtures(model):
        raise M2MKDError(
            "compile=true and checkpoint_activations=true do not go together in a model with mixtures of experts, "
            "whose balance losses cannot leave a compiled checkpoint; set one of them to false"
        )
    blocks: list[nn.Module] = []
    of_timm: list[nn.Module] = []
    _collect(model, blocks, of_timm)
    if not blocks and not of_timm:
        raise M2MKDError(
            f"checkpoint_activations=true, but a {type(model).__qualname__} has no blocks that are known to it: Vision "
            "Transformers, V-MoE, circuits, chains of stages, and timm's models with set_grad_checkpointing have; set "
            "checkpoint_activations=false"
        )
    for block in blocks:
        # An attribute of the instance: names of tensors, hooks and class stay as they are.
        mixtures = _mixtures(block)
        block.forward = functools.partial(_checkpointed, block.forward, _MixturesKept(mixtures) if mixtures else None)
    for module in of_timm:
        module.set_grad_checkpointing(True)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        for module in of_timm:
            module.set_grad_checkpointing(False)


def _collect(module: nn.Module, blocks: list[nn.Module], of_timm: list[nn.Module]) -> None:
    if isinstance(module, VisionTransformer):
        blocks.extend(module.blocks)
    elif isinstance(module, NeuralAttentiveCircuit):
        graph = module.graph
        blocks.extend(dict.fromkeys([module.input_tokenizer, graph.read_in, *graph.propagators, graph.read_out]))
    elif isinstance(module, GraphStage | NACReadIn | NACMediator | NACReadOut):
        blocks.append(module)
    elif hasattr(module, "set_grad_checkpointing"):
        of_timm.append(module)
    else:
        for child in module.children():
            _collect(child, blocks, of_timm)


def _mixtures(block: nn.Module) -> list[VisionMoE]:
    return [module for module in block.modules() if isinstance(module, VisionMoE)]


def _checkpointed(forward: Callable[..., Any], kept: _MixturesKept | None, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    if kept is None:  # torch.compile knows checkpoints without contexts
        return checkpoint(forward, *inputs, use_reentrant=False, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), kept), **options)


class _MixturesKept:
    """What mixtures show of the batch stays that of the first pass: the repetition's would keep its graph in memory.

    A context that can be entered again: with a retained graph every backward pass repeats the forward pass.
    """

    def __init__(self, layers: list[VisionMoE]) -> None:
        self.layers = layers

    def __enter__(self) -> None:
        self.shown = [(layer.losses, layer.auxiliary_loss, layer.rows_per_expert) for layer in self.layers]

    def __exit__(self, *exception: object) -> None:
        for layer, shown in zip(self.layers, self.shown, strict=True):
            layer.losses, layer.auxiliary_loss, layer.rows_per_expert = shown
        del self.shown
