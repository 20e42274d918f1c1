"""Consecutive units of any model as a module of their own that shares the model's parameters."""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.batch_integers import BatchInteger
from m2mkd_fast.models.fresh import fresh_graph_stage
from m2mkd_fast.models.spine import Place, Spine
from m2mkd_fast.models.stage import Stage
from m2mkd_fast.models.tracing import InputDevice

_HOLDERS = ("call_module", "get_attr")


class GraphStage(Stage, nn.Module):
    """Units `start` to `stop` (exclusive) of a model's spine, as a view: its parameters are the model's own.

    The first stage also does what the model does before its first unit, the last one what it does after its last; what
    the model does between two units belongs to the stage of the second one. The first stage reads images
    `[B, C, H, W]`, the last one gives what the model gives; between them passes the one tensor that `in_cut` and
    `out_cut` describe. The composition of all stages is the model, bit for bit, in train mode too.

    State names are the model's own in full: `layers.2.blocks.0.attn.qkv.weight`. Values that do not depend on the
    images are computed in each stage that needs them, so a parameter that several stages need (a shared table of
    relative positions) is the same tensor in each, and in the state of each; its gradient, a sum over the stages, is
    the model's up to rounding. Where such a value is random in train mode (dropout on a shared position bias), each
    stage draws its own.

    Sizes and dtypes that the model's code took from the images are fixed: a stage reads images of `image_shape`, any
    number of them. A view holds modules and parameters, not names: replacing one in the model afterwards does not reach
    the view. `copy.deepcopy` makes an independent stage.

    Attributes:
        slot: position of the stage in its chain, or None where nobody has said.
        start, stop: the units of the spine that the stage holds.
        unit_names: paths of the blocks in each of these units.
        graphs: what the stage computes in eval (False) and train mode (True); `use_graphs` replaces both.
        is_first, is_last: whether the stage reads images, and whether it gives what the model gives.
        image_shape: (channels, height, width) of the whole model's images.
        num_classes: classes of the whole model: the width of what it gives.
    """

    def __init__(self, model: nn.Module, spine: Spine, start: int, stop: int) -> None:
        nn.Module.__init__(self)
        if not 0 <= start < stop <= len(spine.units):
            raise M2MKDError(
                f"a stage needs 0 <= start < stop <= {len(spine.units)} (the model's units), not {start} and {stop}"
            )
        self.training = model.training
        self.slot: int | None = None
        self.start, self.stop = start, stop
        self.unit_names = spine.units[start:stop]
        self.is_first, self.is_last = start == 0, stop == len(spine.units)
        self.image_shape = spine.image_shape
        self.num_classes = spine.num_classes
        self.model_name = type(model).__qualname__
        self.bare_in_cut = None if self.is_first else spine.cuts[start - 1]
        self.bare_out_cut = None if self.is_last else spine.cuts[stop - 1]
        self.pre_stitch: nn.Module | None = None
        self.post_stitch: nn.Module | None = None
        graphs, constants = {}, {}
        for training, program in spine.programs.items():
            places = spine.places[training]
            before = None if self.is_first else places[start - 1]
            after = None if self.is_last else places[stop - 1]
            graphs[training] = _stage_graph(program.graph, before, after)
            constants.update(program.constants)
        self._hold(model, {str(n.target) for g in graphs.values() for n in g.nodes if n.op in _HOLDERS}, constants)
        self._undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        self.use_graphs(graphs)

    def forward(self, x: Tensor) -> Any:
        if self.pre_stitch is not None:
            x = self.pre_stitch(x)
        x = self._run[self.training](self, x)
        if self.post_stitch is not None:
            x = self.post_stitch(x)
        return x

    def use_graphs(self, graphs: dict[bool, fx.Graph]) -> None:
        """Compute what these graphs say, in eval (False) and train mode (True), with the modules that the stage has."""
        self.graphs = graphs
        self._run = {training: _compiled(graph) for training, graph in graphs.items()}

    @property
    def depth(self) -> int:
        """Number of units."""
        return len(self.unit_names)

    @property
    def tokens(self) -> int | None:
        """Number of positions that the units give."""
        return None if self.bare_out_cut is None else self.bare_out_cut.tokens

    def _hold(self, model: nn.Module, names: set[str], constants: dict[str, Tensor]) -> None:
        """Register the model's modules, parameters and buffers of these names, in its own order, under these names."""
        modules = dict(model.named_modules())
        for name in [*modules, *dict(model.named_parameters()), *dict(model.named_buffers()), *constants]:
            parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
            if name not in names or not names.isdisjoint(parents):
                continue
            top = name.partition(".")[0]
            if hasattr(self, top) and top not in {**self._modules, **self._parameters, **self._buffers}:
                raise M2MKDError(
                    f"cannot cut a {self.model_name}: its {top!r} has the name of an attribute of the stage that would "
                    "hold it; give it another name"
                )
            holder: nn.Module = self
            for part in parents:
                part = part.rpartition(".")[2]
                if part not in holder._modules:
                    holder.add_module(part, nn.Module().train(self.training))
                holder = holder._modules[part]
            owner, last = modules[parents[-1] if parents else ""], name.rpartition(".")[2]
            if name in modules:
                holder.add_module(last, modules[name])
            elif name in constants:
                holder.register_buffer(last, constants[name], persistent=False)
            elif last in owner._parameters:
                holder.register_parameter(last, owner._parameters[last])
            else:
                holder.register_buffer(last, owner._buffers[last], last not in owner._non_persistent_buffers_set)

    def fresh(self, depth: int, start: int) -> GraphStage:
        """A shallow, newly initialised stage that reads and gives the same: see `fresh_graph_stage`."""
        return fresh_graph_stage(self, depth, start)

    def no_weight_decay(self) -> set[str]:
        """The model's own list, as far as the stage holds the names."""
        return self._undecayed & {name for name, _ in self.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Which layer a parameter belongs to, for timm's layer-wise learning rates: what the model holds before its
        first unit, the units in order, each with what stands behind it, and behind the last one the head.
        """
        units = [tuple(f"{block}." for block in unit) for unit in self.unit_names]
        layers, layer = {}, 0
        for name, _ in self.named_parameters():
            unit = next((number for number, blocks in enumerate(units, start=1) if name.startswith(blocks)), None)
            if unit is not None:
                layer = unit
            elif name.startswith("pre_stitch."):
                layer = 0
            elif layer == len(units) and (self.is_last or name.startswith("post_stitch.")):
                layer = len(units) + 1
            layers[name] = float(layer)
        return layers.__getitem__

    def extra_repr(self) -> str:
        return f"units {self.start}..{self.stop - 1} of a {self.model_name}"


def _stage_graph(program: fx.Graph, start: Place | None, stop: Place | None) -> fx.Graph:
    """What a program computes from `start` (None: the images) up to `stop` (None: its output)."""
    nodes = list(program.nodes)
    source = nodes[0] if start is None else start.value
    first = 1 if start is None else nodes.index(start.last) + 1
    inside = nodes[first:] if stop is None else nodes[first : nodes.index(stop.last) + 1]
    wanted = {node for node in inside if node.op == "output" or node.meta["image"]}
    pending = list(wanted)
    while pending:
        for node in pending.pop().all_input_nodes:
            if not node.meta["image"] and node not in wanted:
                wanted.add(node)
                pending.append(node)
    graph = fx.Graph()
    given = graph.placeholder("x")
    given.meta = dict(source.meta)
    if start is not None and source.meta["written"]:
        # What the stage before gave is not this stage's to change.
        given = graph.call_method("clone", (given,))
        given.meta = dict(source.meta)
    copies = {source: given}
    images: list[fx.Node] = []

    def copied(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if isinstance(value, list | tuple):
            return type(value)(map(copied, value))
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(copied(value.start), copied(value.stop), copied(value.step))
        if isinstance(value, InputDevice):
            return graph.call_function(getattr, (given, "device"))
        if isinstance(value, BatchInteger):
            if not images:
                images.append(graph.call_method("size", (given, 0)))
            scaled = images[0] if value.slope == 1 else graph.call_function(operator.mul, (images[0], value.slope))
            return graph.call_function(operator.add, (scaled, value.offset)) if value.offset else scaled
        return value

    for node in nodes:
        if node in wanted and node.op != "output":
            copies[node] = graph.create_node(node.op, node.target, copied(tuple(node.args)), copied(dict(node.kwargs)))
            copies[node].meta = dict(node.meta)
    graph.output(copied(nodes[-1].args[0] if stop is None else stop.value))
    return graph


def _compiled(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Any]:
    code = graph.python_code("self")
    name = f"<stage {hash(code.src):x}>"
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)
    # Tracebacks and torch.compile show the source.
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    return namespace["forward"]
