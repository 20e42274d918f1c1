from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.batch_integers import BatchInteger
from m2mkd_fast.models.tracing import InputDevice, skeleton, trace


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Inside a block a choice may depend on values.
        return torch.relu(self.map(x)) if bool((x > 0).any()) else x


class Model(nn.Module):
    """Blocks on the pixels' rows; `middle` is the model's own code between them."""

    def __init__(self, middle=lambda x, model: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros(()))
        self.table = torch.ones(4)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x.flatten(1, 2))
        return self.blocks[1](self.middle(x, self)).mean(1)


PARENTS = {"blocks"}
SHAPE = (1, 4, 4)


def targets(model: nn.Module, training: bool = False) -> list[object]:
    return [node.target for node in trace(model, PARENTS, SHAPE)[training].graph.nodes]


def arguments(model: nn.Module) -> list[object]:
    return [part for node in trace(model, PARENTS, SHAPE)[False].graph.nodes for part in node.args]


def test_blocks_are_leaves_and_the_code_between_them_is_recorded() -> None:
    model = Model(lambda x, model: 1 - x * model.scale + model.steps)
    assert [t if isinstance(t, str) else t.__name__ for t in targets(model)] == [
        "images", "flatten", "blocks.0", "scale", "mul", "sub", "steps", "add", "blocks.1", "mean", "output",
    ]  # fmt: skip


def test_a_block_may_add_to_a_list_that_it_is_given() -> None:
    class Root(Block):
        def forward(self, x: Tensor, children: list[Tensor]) -> Tensor:
            children.append(self.map(x))
            return sum(children)

    model = Model(lambda x, model: model.root(x, [x * 2]))
    model.root = Root()
    call = next(node for node in trace(model, PARENTS, SHAPE)[False].graph.nodes if node.target == "root")
    x, children = call.args
    assert x.target == "blocks.0" and [child.target for child in children] == ["mul"]


def test_one_program_for_both_modes_unless_they_differ() -> None:
    same = trace(Model(), PARENTS, SHAPE)
    assert same[False] is same[True]
    dropped = trace(Model(lambda x, model: nn.functional.dropout(x, 0.5, model.training)), PARENTS, SHAPE)
    assert dropped[False] is not dropped[True]


def test_numbers_of_images_are_found() -> None:
    model = Model(lambda x, model: x.reshape(x.shape[0] * 4, 4).reshape(x.shape[0], 4, x.shape[2]))
    assert {part for part in arguments(model) if isinstance(part, BatchInteger)} == {
        BatchInteger(4, 0),
        BatchInteger(1, 0),
    }


def test_devices_follow_the_images() -> None:
    model = Model(lambda x, model: x + torch.arange(4, device=x.device))
    nodes = trace(model, PARENTS, SHAPE)[False].graph.nodes
    assert [node.kwargs["device"] for node in nodes if "device" in node.kwargs] == [InputDevice()]


def test_tensors_that_are_no_buffers_are_constants() -> None:
    model = Model(lambda x, model: x * model.table)
    program = trace(model, PARENTS, SHAPE)[False]
    assert [value.tolist() for value in program.constants.values()] == [[1.0] * 4]


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (
            lambda x, model: x if x.sum() > 0 else -x,
            r"if x.sum\(\) > 0.*test_tracing.py.*values of images.*torch.where",
        ),
        (lambda x, model: x * x.max().item(), "values of images"),
        (lambda x, model: x * x.shape[0] if x.shape[0] == 2 else x.abs(), "something else for 3 images than for 2"),
        (lambda x, model: x.view(7, 7), r"does not run on images of shape \[1, 4, 4\].*image_shape"),
        (lambda x, model: x + x.detach().clone().requires_grad_(), None),
    ],
    ids=["bool", "item", "batch", "shape", "fine"],
)
def test_control_flow_and_shapes_without_an_answer_are_refused(middle, message: str | None) -> None:
    if message is None:
        assert "detach" in targets(Model(middle))
    else:
        with pytest.raises(M2MKDError, match=message):
            trace(Model(middle), PARENTS, SHAPE)


def test_code_without_gradients_is_refused() -> None:
    def middle(x: Tensor, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return x * 2

    with pytest.raises(M2MKDError, match="no_grad.*detach"):
        trace(Model(middle), PARENTS, SHAPE)


def test_nothing_of_the_model_changes() -> None:
    model = Model(lambda x, model: model.norm(x) * torch.rand(()))
    model.norm = nn.BatchNorm1d(4)
    model.cache = {"last": (model.scale * 2)}  # a tensor with a gradient's graph, which deepcopy alone would refuse
    model.train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trace(model, PARENTS, SHAPE)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_skeleton_shares_parameters_and_nothing_else() -> None:
    model = Model()
    copy = skeleton(model)
    assert copy.scale is model.scale
    assert copy.steps is not model.steps
    assert copy.blocks[0] is not model.blocks[0]
