"""Shallow, newly initialised stages of the same kind as given ones: what the slots of a meta model hold."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

if TYPE_CHECKING:
    from m2mkd_fast.models.graph_stage import GraphStage

_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def fresh_graph_stage(stage: GraphStage, depth: int, start: int) -> GraphStage:
    """An independent stage that reads and gives what `stage` does, with at most `depth` blocks a resolution.

    A block can be left out where it gives features of the shape it reads. Of neighbouring ones of one shape `depth`
    stay, evenly spaced; all other blocks stay (those that change the resolution or the width, those of a unit that
    holds several), and so does what the model computes beside its blocks. There is no dropout of any sort.

    Layers that can initialise themselves (`reset_parameters`: linear maps, convolutions, norms with their statistics)
    start fresh from torch's generator. Parameters that belong to no such layer keep copies of the given stage's values:
    position tables, layer scales, class tokens.
    """
    fresh = copy.deepcopy(stage)
    alone = {unit[0] for unit in stage.unit_names if len(unit) == 1}
    removed: set[str] = set()
    for run in _removable_runs(fresh.graphs, alone):
        stay = min(depth, len(run))
        removed |= set(run) - {run[j * len(run) // stay] for j in range(stay)}
    for graph in fresh.graphs.values():
        _bypass(graph, removed)
        _bypass_dropout(graph)
    fresh.use_graphs(fresh.graphs)
    _forget_unused(fresh, {str(node.target) for graph in fresh.graphs.values() for node in graph.nodes})
    fresh.unit_names = tuple(unit for unit in stage.unit_names if removed.isdisjoint(unit))
    fresh.start, fresh.stop = start, start + len(fresh.unit_names)
    remove_dropout(fresh)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
    return fresh.requires_grad_(True).train()


def _removable_runs(graphs: dict[bool, fx.Graph], names: set[str]) -> list[list[str]]:
    """The blocks that can be left out in every graph, in order, together as long as the shape stays the same."""
    for graph in graphs.values():
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
        names = names - {str(node.target) for node in calls if _stand_in(node) is None}
    runs: list[list[str]] = []
    shape = None
    for node in graphs[False].nodes:
        if node.op == "call_module" and node.target in names:
            if node.meta["shape"] != shape:
                runs.append([])
            if node.target not in runs[-1]:
                runs[-1].append(str(node.target))
            shape = node.meta["shape"]
    return runs


def _stand_in(node: fx.Node) -> fx.Node | None:
    """What a block reads, if it may stand for what the block gives: the only tensor of images, and of one shape."""
    images = [source for source in node.all_input_nodes if source.meta["image"]]
    if len(images) != 1 or "shape" not in node.meta or images[0].meta.get("shape") != node.meta["shape"]:
        return None
    return images[0]


def _bypass(graph: fx.Graph, names: set[str]) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in names:
            others = [source for source in node.all_input_nodes if not source.meta["image"]]
            node.replace_all_uses_with(_stand_in(node))
            graph.erase_node(node)
            _erase_unused(graph, others)


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase nodes that only a block left out has used, and then what only they have used."""
    for node in nodes:
        if not node.users and not node.meta["image"]:
            sources = node.all_input_nodes
            graph.erase_node(node)
            _erase_unused(graph, sources)


def _bypass_dropout(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _forget_unused(module: nn.Module, used: set[str], path: str = "") -> None:
    """Drop the modules and tensors that no graph names any more."""
    for name, child in list(module.named_children()):
        inner = f"{path}{name}"
        if inner not in used:
            if any(other.startswith(f"{inner}.") for other in used):
                _forget_unused(child, used, f"{inner}.")
            else:
                delattr(module, name)
    for name in [*module._parameters, *module._buffers]:
        if f"{path}{name}" not in used:
            delattr(module, name)


def remove_dropout(module: nn.Module) -> None:
    """Turn every dropout layer inside a module off for good: of elements, channels, regions, patches and paths."""
    for name, child in module.named_children():
        if isinstance(child, DropPath | PatchDropout | StochasticDepth):
            setattr(module, name, nn.Identity())
        elif isinstance(child, _DropoutNd):
            child.p = 0.0
        elif isinstance(child, DropBlock2d):
            child.drop_prob = 0.0
        else:
            remove_dropout(child)
