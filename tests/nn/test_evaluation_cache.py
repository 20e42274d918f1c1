from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache


class Squares(CachesInEvaluation):
    """The product of a weight and a gain, and how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        self.register_buffer("gain", torch.tensor(10.0))
        self.cache = EvaluationCache()
        self.computed = 0

    def compute(self) -> Tensor:
        self.computed += 1
        return (self.gain * self.weight.unsqueeze(0)) @ torch.ones(3, 1, dtype=self.weight.dtype)

    def forward(self) -> Tensor:
        return self.cache.get([self.weight, self.gain], self.compute)


@pytest.fixture
def squares() -> Squares:
    """A module that remembers its value."""
    module = Squares().eval()
    with torch.no_grad():
        assert module() is module()
    assert module.computed == 1
    return module


def assert_fresh(module: Squares) -> None:
    """One more value is computed, the right one, and then remembered."""
    before = module.computed
    with torch.no_grad():
        found = module()
        torch.testing.assert_close(found, (module.gain * module.weight).sum().to(found.dtype).reshape(1, 1))
        assert module() is found
    assert module.computed == before + 1


def optimizer_step(module: Squares, optimizer: type[torch.optim.Optimizer], **options: bool) -> None:
    module().sum().backward()
    optimizer(module.parameters(), lr=0.5, **options).step()


@torch.no_grad()
def assign_new_memory(module: Squares) -> None:
    """Twice, so that the second tensor could lie where the first one lay."""
    for factor in (2.0, 3.0):
        module.weight.data = factor * module.weight.data


CHANGES: dict[str, Callable[[Squares], object]] = {
    "sgd": lambda module: optimizer_step(module, torch.optim.SGD, foreach=False),
    "foreach": lambda module: optimizer_step(module, torch.optim.AdamW, foreach=True),
    "fused": lambda module: optimizer_step(module, torch.optim.AdamW, fused=True),
    "copy_": lambda module: torch.no_grad()(module.weight.copy_)(torch.ones(3)),
    "one element": lambda module: torch.no_grad()(module.weight[1:2].fill_)(9.0),
    "in inference mode": lambda module: torch.inference_mode()(module.weight.mul_)(2.0),
    "the other source": lambda module: module.gain.fill_(3.0),
    "load_state_dict": lambda module: module.load_state_dict({"weight": torch.ones(3), "gain": torch.tensor(2.0)}),
    "load_state_dict, assigned": lambda module: module.load_state_dict(
        {"weight": torch.ones(3), "gain": torch.tensor(2.0)}, assign=True
    ),
    "new parameter": lambda module: setattr(module, "weight", nn.Parameter(torch.ones(3))),
    "new memory": assign_new_memory,
    "double": lambda module: module.double(),
    "double and back": lambda module: module.double().float(),
    "same values elsewhere": lambda module: setattr(module.weight, "data", module.weight.data.clone()),
    "train and eval": lambda module: module.train().eval(),
    "eval": lambda module: module.eval(),
    "unseen write before eval": lambda module: (module.weight.data.add_(1.0), module.eval()),
    "unseen write before clear": lambda module: (module.weight.data.add_(1.0), module.clear_caches()),
    "unseen write after a forward with gradients": lambda module: (module(), module.weight.data.add_(1.0)),
    "stepped view": lambda module: setattr(
        module, "weight", nn.Parameter(module.weight.detach().repeat_interleave(2)[::2])
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_gives_a_fresh_value(change, squares):
    change(squares)
    assert_fresh(squares)


def test_a_write_through_data_is_not_seen(squares):
    """The documented limit: if this fails, tell so in the documentation."""
    squares.weight.data.add_(1.0)
    with torch.no_grad():
        squares()
    assert squares.computed == 1


@pytest.mark.parametrize("module_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_starts_empty(module_of, squares):
    other = module_of(squares)
    assert other.cache is not squares.cache
    assert_fresh(other)
    with torch.no_grad():
        squares()
        other.weight.add_(1.0)
        assert not torch.equal(other(), squares())
    assert squares.computed == 1


def test_saved_modules_hold_no_value(squares):
    buffer = io.BytesIO()
    torch.save(squares, buffer)
    buffer.seek(0)
    assert_fresh(torch.load(buffer, weights_only=False))
    assert set(squares.state_dict()) == {"weight", "gain"}


def test_autocast_has_values_of_its_own(squares):
    with torch.no_grad():
        exact = squares()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = squares()
            assert squares() is rounded
        with torch.autocast("cpu", dtype=torch.float16):
            assert squares().dtype == torch.float16
        assert rounded.dtype == torch.bfloat16
        assert squares().dtype == exact.dtype == torch.float32
    assert squares.computed == 4


def test_nothing_is_remembered_with_gradients(squares):
    first, second = squares(), squares()
    assert first is not second
    assert squares.computed == 3
    first.sum().backward()
    assert squares.weight.grad is not None


def test_a_value_from_inference_mode_serves_everywhere():
    module = Squares()
    with torch.inference_mode():
        value = module()
        assert module() is value
    assert not value.is_inference()
    with torch.no_grad():
        assert module() is value
    assert (module.weight * value.sum()).requires_grad  # which fails for tensors of inference mode
    assert module.computed == 1


@pytest.mark.parametrize("kind", ["inference", "subclass", "meta"])
def test_sources_that_cannot_be_followed(kind):
    class Subclass(Tensor):
        pass

    cache, computed = EvaluationCache(), []
    with torch.inference_mode(kind == "inference"), torch.no_grad():
        source = torch.ones(2, device="meta" if kind == "meta" else "cpu")
        source = source.as_subclass(Subclass) if kind == "subclass" else source
        for _ in range(2):
            cache.get([source], lambda: computed.append(1) or 2 * source)
    assert len(computed) == 2


def test_values_that_need_gradients_are_not_kept():
    cache, weight = EvaluationCache(), nn.Parameter(torch.ones(2))
    with torch.no_grad():
        assert cache.get([weight], lambda: (weight,))[0] is weight
    assert cache._entry is None


def test_several_tensors_are_remembered_together():
    cache, source = EvaluationCache(), torch.ones(2)
    with torch.no_grad():
        first = cache.get([source], lambda: (source + 1, source + 2))
        assert cache.get([source], lambda: pytest.fail("computed again")) is first
        torch.testing.assert_close(cache.get([source, source], lambda: 3 * source), 3 * source)


def test_inside_vmap_every_call_computes(squares):
    def scaled(weight: Tensor) -> Tensor:
        return EvaluationCache().get([weight], lambda: 2 * weight)

    weights = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(scaled)(weights), 2 * weights)


def test_compiled_graphs_follow_the_parameters(squares):
    torch._dynamo.reset()
    compiled = torch.compile(squares, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), squares())
        squares.weight.data.add_(1.0)  # would be missed if the value were part of the graph
        torch.testing.assert_close(compiled(), (squares.gain * squares.weight).sum().reshape(1, 1))
