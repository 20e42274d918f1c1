"""The sequential spine of any model: its units, and what passes between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import fx, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.batch_integers import BATCHES
from m2mkd_fast.models.blocks import find_blocks
from m2mkd_fast.models.tracing import Program, trace
from m2mkd_fast.nn.cut import Cut


@dataclass(frozen=True)
class Crossing:
    """A place between two blocks where no cut can be.

    Attributes:
        before, after: paths of the blocks on both sides.
        carried: what crosses the place, one text each: the module or operation it comes from and its shape.
    """

    before: str
    after: str
    carried: tuple[str, ...]

    def __str__(self) -> str:
        if not self.carried:
            return f"no tensor of its own passes from {self.before} to {self.after}"
        return f"between {self.before} and {self.after} there cross {' and '.join(self.carried)}"


class Place(NamedTuple):
    """Where a cut is: `value` is the node of the one tensor that passes, `last` the last node before the cut."""

    value: fx.Node
    last: fx.Node


@dataclass(frozen=True)
class Spine:
    """What a model computes, as a row of units with exactly one tensor between neighbours.

    A unit is a block, or several that cannot be separated, because more than one image-dependent tensor crosses every
    place between them (dense connections, branches). Values that do not depend on the images (parameters, tables,
    position embeddings) may cross: each side computes them.

    Attributes:
        image_shape: channels, height and width of the images it was found with.
        programs: the model's graph in eval (False) and train mode (True).
        units: paths of the blocks in each unit, in the order in which they run.
        places: for both programs where each cut is, one fewer than the units.
        cuts: what passes at each of these places.
        crossings: the places between blocks where no cut can be.
    """

    image_shape: tuple[int, int, int]
    programs: dict[bool, Program]
    units: tuple[tuple[str, ...], ...]
    places: dict[bool, tuple[Place, ...]]
    cuts: tuple[Cut, ...]
    crossings: tuple[Crossing, ...]

    @property
    def num_classes(self) -> int:
        """The width of what the model gives."""
        return self.programs[False].graph.output_node().args[0].meta["shape"][-1]


def find_spine(model: nn.Module, image_shape: tuple[int, int, int] | None = None) -> Spine:
    """Find the units of a model by running it on stand-ins for images, in eval and in train mode.

    Nothing of the model changes: neither its mode, nor its buffers, nor the state of torch's generators. No values are
    computed, so the cost is a few seconds for a large model, and little memory.

    Args:
        image_shape: channels, height and width of an image; None takes what the model says.

    Raises:
        M2MKDError: the model does not say its image shape, has no blocks, its control flow depends on the images'
            values, or it gives something else than one tensor in eval mode.
    """
    blocks = find_blocks(model)
    shape = image_shape_of(model) if image_shape is None else tuple(image_shape)
    parents = {block[:i] for block in blocks for i, letter in enumerate(block) if letter == "."}
    programs = trace(model, parents, shape)
    while opened := _giving_several(programs.values(), blocks):
        parents |= opened
        programs = trace(model, parents, shape)
    result = programs[False].graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise M2MKDError(
            f"a {type(model).__qualname__} gives {type(result).__name__} of {len(result or ())} instead of one tensor "
            "of logits; cut a model that gives logits alone"
        )
    calls = {training: _block_calls(program.graph, blocks) for training, program in programs.items()}
    names = [str(node.target) for node in calls[False]]
    if names != [str(node.target) for node in calls[True]] or not names:
        raise M2MKDError(
            f"a {type(model).__qualname__} runs other blocks in train mode than in eval mode, or none; pass the bare "
            "model, whose blocks run in one order"
        )
    found = {training: _places(programs[training].graph, calls[training]) for training in programs}
    units, places, cuts, crossings = [[names[0]]], {False: [], True: []}, [], []
    for position, name in enumerate(names[1:]):
        sides = {training: found[training][position] for training in programs}
        carried = next((side for side in sides.values() if not isinstance(side, Place)), None)
        if carried is None:
            value = sides[False].value
            cut = cut_of(model, value)
            if cut is None or value.meta["shape"] != sides[True].value.meta["shape"]:
                carried = (f"{_described(value)}, which is neither tokens nor a map whose channels can be told",)
        if carried is not None:
            crossings.append(Crossing(names[position], name, carried))
        else:
            units.append([])
            cuts.append(cut)
            for training, place in sides.items():
                places[training].append(place)
        units[-1].append(name)
    return Spine(
        shape,
        programs,
        tuple(map(tuple, units)),
        {training: tuple(nodes) for training, nodes in places.items()},
        tuple(cuts),
        tuple(crossings),
    )


def image_shape_of(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model says it takes; M2MKDError where it does not say."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    said = config.get("input_size")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    size = size or getattr(model, "image_size", None) or (said and said[1:])
    if size is None or (convolution is None and said is None):
        raise M2MKDError(
            f"a {type(model).__qualname__} does not say the shape of its images; give `image_shape=(channels, height, "
            "width)`"
        )
    channels = said[0] if convolution is None else convolution.in_channels
    if said and channels in (4 * said[0], 16 * said[0]):  # the stem folds squares of 2 or 4 pixels into channels
        channels = said[0]
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def cut_of(model: nn.Module, value: fx.Node) -> Cut | None:
    """Width, layout and grid of the tensor of a node; None where the layout is not known.

    Three axes are tokens, and a grid where their number fits one that the model has. Of four, the channels' axis is
    told by what the model does with the map, else by the widths that it states, else by the square of the other two.
    """
    shape = value.meta["shape"]
    if shape[0] != BATCHES[0]:
        return None
    if len(shape) == 3:
        prefix, grid = _token_grid(model, value, shape[1])
        return Cut(shape[2], "tokens", grid, prefix)
    if len(shape) != 4:
        return None
    layout = value.meta["layout"]
    if layout is None:
        stated = {info["num_chs"] for info in getattr(model, "feature_info", None) or () if "num_chs" in info}
        first, last = shape[1] in stated, shape[3] in stated
        if first == last:
            first, last = shape[2] == shape[3], shape[1] == shape[2]
        if first == last:
            return None
        layout = "channels_first" if first else "channels_last"
    if layout == "channels_first":
        return Cut(shape[1], layout, (shape[2], shape[3]))
    return Cut(shape[3], layout, (shape[1], shape[2]))


def _giving_several(programs: Iterable[Program], blocks: set[str]) -> set[str]:
    """Modules between the blocks that give more than one tensor, of which some may not depend on the images."""
    calls = (node for program in programs for node in program.graph.nodes if node.op == "call_module")
    return {node.target for node in calls if node.target not in blocks and "shape" not in node.meta}


def _block_calls(graph: fx.Graph, blocks: set[str]) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module" and node.target in blocks and node.meta["image"]]


def _places(graph: fx.Graph, calls: list[fx.Node]) -> list[Place | tuple[str, ...]]:
    """For each pair of neighbouring blocks where to cut, or what crosses where there is none.

    The first possible place after a block is taken, so that what leads to the next stage belongs to the next module.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    found: list[Place | tuple[str, ...]] = []
    for call, following in pairwise(calls):
        least: list[fx.Node] | None = None
        for i in range(position[call], position[following]):
            alive = [node for node in nodes[: i + 1] if node.meta.get("image") and last_use[node] > i]
            if len(alive) == 1 and alive[0].op != "placeholder" and "shape" in alive[0].meta:
                found.append(Place(alive[0], nodes[i]))
                break
            if least is None or len(alive) < len(least):
                least = alive
        else:
            found.append(tuple(map(_described, least or ())))
    return found


def _described(node: fx.Node) -> str:
    shape = "s"
    if "shape" in node.meta:
        batch, *rest = node.meta["shape"] or ("",)
        shape = f" [{', '.join(map(str, ['B' if batch == BATCHES[0] else batch, *rest]))}]"
    if node.op == "placeholder":
        return f"the images{shape}"
    source = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"a tensor{shape} from {source}"


def _token_grid(model: nn.Module, value: fx.Node, tokens: int) -> tuple[int, tuple[int, int] | None]:
    prefixes = dict.fromkeys((int(getattr(model, "num_prefix_tokens", 0) or 0), 0, 1))
    grids = []
    for owner in (getattr(model, "patch_embed", None), model):
        grid = getattr(owner, "grid_size", None)
        if isinstance(grid, list | tuple) and len(grid) == 2:
            grids.append(tuple(map(int, grid)))
    for node in value.graph.nodes:  # the nearest map before it that has as many positions
        if node is value:
            break
        shape = node.meta.get("shape", ())
        if node.meta.get("image") and len(shape) == 4 and shape[0] == BATCHES[0]:
            grids.insert(1, shape[2:] if node.meta["layout"] == "channels_first" else shape[1:3])
    for prefix in prefixes:
        for grid in grids:
            if prefix + math.prod(grid) == tokens:
                return prefix, grid
    for prefix in prefixes:
        side = math.isqrt(tokens - prefix) if tokens > prefix else 0
        if side and side * side == tokens - prefix:
            return prefix, (side, side)
    return 0, None
