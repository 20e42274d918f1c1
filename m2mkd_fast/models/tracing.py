"""Record what a model computes, as a torch.fx graph whose leaves are the model's blocks and the layers between them.

The model runs on stand-ins for tensors (shapes without values), and every torch function that its own code calls
outside a leaf becomes a node. Control flow on shapes, types and settings is thereby answered as in the model; control
flow on the values of images has no answer and is refused. Nothing of the model is changed: what runs is a copy of its
module objects that shares the parameters.
"""

from __future__ import annotations

import copy
import operator
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.batch_integers import BATCHES, merged_arguments
from m2mkd_fast.models.layout_evidence import LayoutEvidence

# Functions that take no more of a tensor than shape, dtype and device, and those that make the same without the tensor.
_FILLED = {
    "zeros_like": torch.zeros, "new_zeros": torch.zeros, "ones_like": torch.ones, "new_ones": torch.ones,
    "empty_like": torch.empty, "new_empty": torch.empty, "full_like": torch.full, "new_full": torch.full,
}  # fmt: skip
_RUNNING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)
_READS_VALUES = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "nonzero", "__contains__"}


@dataclass(frozen=True)
class InputDevice:
    """The device of the images, where the model's code asks for it."""


@dataclass
class Program:
    """What a model computes in one mode.

    Attributes:
        graph: placeholder `images`, then `call_module` (leaves, by their path in the model), `get_attr` (parameters and
            buffers), `call_function`, `call_method`, and the output. Arguments may hold `BatchInteger` and
            `InputDevice`. Metadata of a node: `image` (whether its value depends on the images' values), and of one
            that gives a tensor `shape` (for `BATCHES[0]` images), `layout` (see `LayoutEvidence`) and `written`
            (whether something after it writes into its memory).
        constants: tensors that the model's code holds outside its parameters and buffers, by the name of their node.
    """

    graph: fx.Graph
    constants: dict[str, Tensor] = field(default_factory=dict)


def trace(model: nn.Module, leaf_parents: set[str], image_shape: tuple[int, int, int]) -> dict[bool, Program]:
    """Record the model's forward pass in eval (False) and in train mode (True); one program where both are the same.

    Args:
        leaf_parents: paths of the modules whose own code is recorded; every other module is a leaf.
        image_shape: channels, height and width of an image.

    Raises:
        M2MKDError: control flow that depends on images' values or, beyond the sizes of tensors, on their number; code
            that cannot run on images of that shape.
    """
    name = type(model).__qualname__
    programs = {mode: _trace(model, leaf_parents, (BATCHES[0], *image_shape), mode) for mode in (False, True)}
    if merged_arguments(programs[False].graph, programs[True].graph, batches=False) is not None:
        del programs[True]
    for mode, program in programs.items():
        other = _trace(model, leaf_parents, (BATCHES[1], *image_shape), mode)
        merged = merged_arguments(program.graph, other.graph, batches=True)
        if merged is None:
            raise M2MKDError(
                f"cannot cut a {name}: it computes something else for {BATCHES[1]} images than for {BATCHES[0]}; what "
                "it does with an image may not depend on the number of images"
            )
        for node, (args, kwargs) in merged.items():
            node.args, node.kwargs = args, kwargs
    return {False: programs[False], True: programs.get(True, programs[False])}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model's module objects and buffers that shares its parameters: it may run without a trace."""
    return _copied(model, {id(parameter): parameter for parameter in model.parameters()})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for tensor in _plain_tensors(model):
        if not tensor.is_leaf:  # what a layer keeps from an earlier call may carry a gradient's graph
            memo.setdefault(id(tensor), tensor.detach())
    return copy.deepcopy(model, memo)


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold beside their parameters and buffers: in an attribute, or a list or dict of one."""
    for module in model.modules():
        for value in vars(module).values():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (part for part in parts if isinstance(part, Tensor))


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value` as an expression."""
    tensor[index] = value
    return tensor


class _Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.program = Program(fx.Graph())
        self.evidence = LayoutEvidence()
        self.leaf: str | None = None
        self.training = root.training
        self.model = type(root).__qualname__
        self.attributes = {id(tensor) for tensor in _plain_tensors(root)}
        self.device = images.device
        self.names = {id(tensor): name for name, tensor in [*root.named_buffers(), *root.named_parameters()]}
        self.nodes: dict[int, fx.Node] = {}
        self.held: list[tuple[fx.Node, Tensor, int]] = []  # also keeps ids from being used again
        node = self.program.graph.placeholder("images")
        node.meta["image"] = True
        self._bind(images, node)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.leaf is None and name in _READS_VALUES and self._depends_on_images(args):
            raise _ControlFlow(name)
        # Shapes are all that is asked for, and the fake kernel of this one is slow: most of a trace's time.
        shape_only = func is functional.batch_norm and args and args[0].is_meta
        result = torch.empty_like(args[0]) if shape_only else func(*args, **kwargs)
        self.evidence.observe(name, args, result)
        if self.leaf is not None:
            return result
        if name == "__setitem__":
            self._record("call_function", set_item, args, kwargs, args[0])
        elif name in _FILLED:
            filled = {"dtype": result.dtype, "device": result.device}
            self._record(
                "call_function", _FILLED[name], (tuple(result.shape), *_fill(name, args, kwargs)), filled, result
            )
        elif _holds_tensor(result):
            self._record(*_operation(func, name, args), kwargs, result)
        return result

    def call_leaf(self, path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.leaf is not None:
            return forward(*args, **kwargs)
        given = self._arguments(args), self._arguments(kwargs)  # now: a leaf may add to a list that it is given
        self.leaf = path
        try:
            result = forward(*args, **kwargs)
        finally:
            self.leaf = None
        if _holds_tensor(result):
            self._record("call_module", path, *given, result)
        return result

    def finish(self, result: Any) -> Program:
        self.program.graph.output(self._arguments(result))
        for node, tensor, version in self.held:
            node.meta["written"] = tensor._version > version
            node.meta["layout"] = self.evidence.of(tensor)
        return self.program

    def _record(self, kind: str, target: Any, args: tuple, kwargs: dict, result: Any) -> None:
        args, kwargs = self._arguments(args), self._arguments(kwargs)
        node = self.program.graph.create_node(kind, target, args, kwargs)
        self._bind_all(result, node)
        if node.meta["image"] and not torch.is_grad_enabled():
            raise M2MKDError(
                f"cannot cut a {self.model}: its own code computes {node.name} under torch.no_grad, which a graph does "
                "not hold; write `detach`, or move that part into a block"
            )

    def _bind_all(self, result: Any, node: fx.Node) -> None:
        node.meta["image"] = any(source.meta["image"] for source in node.all_input_nodes)
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, list | tuple | dict):
            for key, value in result.items() if isinstance(result, dict) else enumerate(result):
                if _holds_tensor(value):
                    part = self.program.graph.call_function(operator.getitem, (node, key))
                    self._bind_all(value, part)

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.held.append((node, tensor, tensor._version))
        node.meta["shape"] = tuple(tensor.shape)
        if node.meta["image"]:
            self.evidence.follow(tensor)

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, list | tuple):
            mapped = [self._arguments(part) for part in value]
            return mapped if isinstance(value, list) else tuple(mapped)
        if isinstance(value, dict):
            return {key: self._arguments(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arguments(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device):
            return InputDevice() if value == self.device else value
        return value

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node = self.nodes.get(id(tensor))
        if node is None:
            name = self.names.get(id(tensor))
            if name is None:
                if id(tensor) not in self.attributes:
                    raise M2MKDError(
                        f"cannot cut a {self.model}: its own code makes a tensor {list(tensor.shape)} by an operation "
                        "that torch does not report (a scripted function, for example); move it into a module"
                    )
                name = f"constant_{'train' if self.training else 'eval'}_{len(self.program.constants)}"
                self.program.constants[name] = tensor
            node = self.program.graph.get_attr(name)
            node.meta["image"] = False
            self._bind(tensor, node)
        return node

    def _depends_on_images(self, args: tuple) -> bool:
        tensors = [part for part in args if isinstance(part, Tensor)]
        return any(id(tensor) in self.nodes and self.nodes[id(tensor)].meta["image"] for tensor in tensors)


class _ControlFlow(Exception):
    """The model's code asked for the value of a tensor."""


def _trace(model: nn.Module, leaf_parents: set[str], shape: tuple[int, ...], training: bool) -> Program:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    attempts = [lambda: (_without_values(model), torch.empty(shape, dtype=like.dtype, device="meta"))]
    if not like.is_meta:  # a block may well look at values, inside; then values are needed
        attempts.append(lambda: (skeleton(model), torch.randn(shape, device=like.device).to(like.dtype)))
    for attempt in attempts:
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            try:
                return _run(*attempt(), leaf_parents, training)
            except _RUNNING_ERRORS as error:
                failure = error
    raise M2MKDError(
        f"a {type(model).__qualname__} does not run on images of shape {list(shape[1:])} in "
        f"{'train' if training else 'eval'} mode: {_first_line(failure)} ({_place(failure)}); give the `image_shape` "
        "(channels, height, width) that the model was made for"
    ) from failure


def _run(root: nn.Module, images: Tensor, leaf_parents: set[str], training: bool) -> Program:
    recorder = _Recorder(root.train(training), images)
    _record_leaves(root, leaf_parents, recorder)
    with torch.enable_grad(), torch.device(images.device):
        try:
            with recorder:
                result = root(images)
        except _ControlFlow as error:
            raise M2MKDError(
                f"cannot cut a {type(root).__qualname__}: {_place(error)} depends on the values of images, so it has "
                "no answer before they are there; write the choice with torch.where, or move it into a block"
            ) from error
    return recorder.finish(result)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model's module objects on the meta device."""
    tensors: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                tensors[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return _copied(model, tensors)


def _record_leaves(root: nn.Module, leaf_parents: set[str], recorder: _Recorder) -> None:
    # `root` is a copy made for this trace, so its modules may be changed; hooks run when the model's own modules are.
    for path, module in root.named_modules():
        if path == "" or path in leaf_parents:
            continue

        def forward(*args: Any, path: str = path, original: Callable = module.forward, **kwargs: Any) -> Any:
            return recorder.call_leaf(path, original, args, kwargs)

        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        vars(module)["forward"] = forward


def _operation(func: Callable, name: str, args: tuple) -> tuple[str, Any, tuple]:
    """Kind of node, target and arguments of a call that torch reported."""
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name.startswith("__r") and hasattr(operator, f"__{name[3:-2]}__"):
        return "call_function", getattr(operator, f"__{name[3:-2]}__"), (args[1], args[0])
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    descriptor = isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType)
    if descriptor or getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
        return "call_method", name, args
    return "call_function", func, args


def _fill(name: str, args: tuple, kwargs: dict) -> tuple:
    """The value that `full_like` or `new_full` was called with; nothing for the others."""
    position = {"full_like": 1, "new_full": 2}.get(name)
    return () if position is None else (kwargs["fill_value"] if "fill_value" in kwargs else args[position],)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def _place(error: BaseException) -> str:
    """The line of the model's code that an error comes from."""
    own = Path(__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent != own and "/torch/" not in frame.filename
    ]
    if not frames:
        return "its code"
    return f"`{frames[-1].line}` in {Path(frames[-1].filename).name}, line {frames[-1].lineno},"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
