"""The expert MLP against a loop over rows, in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.expert_mlp import expert_mlp, expert_mlp_reference
from m2mkd_fast.ops.route import Assignment, route

Inputs = tuple[Tensor, Assignment, tuple[Tensor | None, ...]]


def inputs(
    tokens: int = 20,
    experts: int = 4,
    top_k: int = 2,
    *,
    width: int = 8,
    hidden: int = 16,
    out: int = 12,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    logits: Tensor | None = None,
    gate: str = "softmax_top_k",
    capacity: int | None = None,
) -> Inputs:
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    logits = torch.randn(tokens, experts, dtype=dtype) if logits is None else logits
    assignment = route(logits, top_k=top_k, gate=gate, capacity=capacity)
    assignment = assignment._replace(weight=assignment.weight.detach().requires_grad_())
    shapes = ((experts, hidden, width), (experts, hidden) if bias else None)
    shapes += ((experts, out, hidden), (experts, out) if bias else None)
    parameters = (None if s is None else torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return x, assignment, tuple(parameters)


def by_rows(
    x: Tensor, assignment: Assignment, parameters: tuple[Tensor | None, ...], activation: str = "gelu"
) -> Tensor:
    """The definition, row by row."""
    up, up_bias, down, down_bias = parameters
    out = [torch.zeros(down.shape[1], dtype=x.dtype) for _ in range(x.shape[0])]
    for row in range(int(assignment.offsets[-1])):
        token, expert = int(assignment.token[row]), int(assignment.expert[row])
        hidden = up[expert] @ x[token] + (0 if up_bias is None else up_bias[expert])
        hidden = F.gelu(hidden, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
        y = down[expert] @ hidden + (0 if down_bias is None else down_bias[expert])
        out[token] = out[token] + assignment.weight[row] * y
    return torch.stack(out) if out else x.new_zeros(0, down.shape[1])


def values_and_gradients(function: Callable[..., Tensor], given: Inputs, **options: str) -> dict[str, Tensor]:
    x, assignment, parameters = given
    leaves = {"x": x, "weight": assignment.weight}
    leaves |= {f"parameter {i}": parameter for i, parameter in enumerate(parameters) if parameter is not None}
    y = function(x, assignment, *parameters, **options)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, value in wanted.items():
        value = torch.zeros_like(actual[name]) if value is None else value  # the row loop never touched it
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def to_one_expert(tokens: int, experts: int) -> Tensor:
    return torch.eye(experts, dtype=torch.float64)[2].expand(tokens, experts) * 9.0


CASES = {
    "plain": {"out": 8},
    "no biases": {"bias": False},
    "top 1": {"top_k": 1},
    "k = E": {"top_k": 4},
    "one expert": {"experts": 1, "top_k": 1},
    "all tokens to one expert": {"top_k": 1, "logits": to_one_expert(20, 4)},
    "empty experts": {"experts": 16, "tokens": 3},
    "one token": {"tokens": 1},
    "no tokens": {"tokens": 0},
    "renormalised": {"gate": "top_k_softmax"},
    "dropped choices": {"capacity": 4},
    "all but one dropped": {"top_k": 1, "logits": to_one_expert(20, 4), "capacity": 1},
    "experts choose": {"gate": "experts_choose", "capacity": 5},
    "odd widths": {"width": 5, "hidden": 7, "out": 3},
}


# Cases in which the compiled forms take another way; compiling costs a second each.
TRACED = ("plain", "no biases", "empty experts", "no tokens", "dropped choices", "experts choose", "odd widths")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_rows(case: str, activation: str) -> None:
    given = inputs(**CASES[case])
    wanted = (
        values_and_gradients(lambda *a, **o: by_rows(*a[:2], a[2:], **o), given, activation=activation)
        if (given[0].shape[0])
        else None
    )
    for function in (expert_mlp, expert_mlp_reference):
        actual = values_and_gradients(function, given, activation=activation)
        assert all(gradient is not None and gradient.isfinite().all() for gradient in actual.values())
        if wanted is not None:
            assert_same(actual, wanted)
    if wanted is None:
        assert actual["y"].shape == (0, 12)
        assert all(actual[f"parameter {i}"].eq(0).all() for i in range(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", TRACED)
def test_compiled_equals_eager(case: str, dtype: torch.dtype) -> None:
    """float64 takes the masked form, bfloat16 grouped products where the strides allow."""
    torch._dynamo.reset()
    given = inputs(**{**CASES[case], "dtype": dtype})
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    actual, wanted = values_and_gradients(compiled, given), values_and_gradients(expert_mlp, given)
    if dtype == torch.float64:
        assert_same(actual, wanted)
        return
    for name, value in wanted.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm().clamp(min=1e-6)
        assert error < 0.02, f"{name}: {error:.3f}"


def test_compiled_uses_grouped_products_only_where_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **o: calls.append(a[0].dtype) or original(*a, **o))
    wide = {"width": 8, "hidden": 16, "out": 8}
    for case, dtype in ((wide, torch.bfloat16), (wide, torch.float32), ({**wide, "out": 12}, torch.bfloat16)):
        torch._dynamo.reset()
        x, assignment, parameters = inputs(**case, dtype=dtype)
        torch.compile(expert_mlp, backend="eager")(x, assignment, *parameters)
    assert calls == [torch.bfloat16] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_tail_of_dropped_choices_is_never_read(compiled: bool) -> None:
    """Rows beyond the last offset may hold anything finite, and uninitialised products of theirs must not leak."""
    torch._dynamo.reset()
    x, assignment, parameters = inputs(capacity=4, out=8, dtype=torch.bfloat16)
    function = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager") if compiled else expert_mlp
    wanted = values_and_gradients(function, (x, assignment, parameters))
    with torch.no_grad():
        x[0] = float("inf")  # token 0 is what the tail points at; its own rows turn into NaN
    poisoned = values_and_gradients(function, (x, assignment, parameters))
    assert poisoned["y"][1:].isfinite().all()
    torch.testing.assert_close(poisoned["y"][1:], wanted["y"][1:])
    assert poisoned["weight"][int(assignment.offsets[-1]) :].eq(0).all()


def test_non_contiguous_inputs() -> None:
    x, assignment, parameters = inputs()
    wanted = values_and_gradients(expert_mlp, (x, assignment, parameters))
    strided = x.detach().t().contiguous().t().requires_grad_()
    stacked = tuple(p.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for p in parameters)
    assert not strided.is_contiguous()
    assert not stacked[0].is_contiguous()
    assert_same(values_and_gradients(expert_mlp, (strided, assignment, stacked)), wanted)


def test_second_order_gradients_are_refused() -> None:
    x, assignment, parameters = inputs()
    (gradient,) = torch.autograd.grad(expert_mlp(x, assignment, *parameters).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_same_bits_each_time() -> None:
    given = inputs(tokens=500, dtype=torch.float32)
    first, second = (values_and_gradients(expert_mlp, given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def on_gpu(given: Inputs) -> Inputs:
    x, assignment, parameters = given
    moved = (None if p is None else p.detach().cuda().requires_grad_() for p in parameters)
    assignment = Assignment(*(tensor.detach().cuda() for tensor in assignment))
    assignment = assignment._replace(weight=assignment.weight.requires_grad_())
    return x.detach().cuda().requires_grad_(), assignment, tuple(moved)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_equals_the_processor(case: str) -> None:
    given = inputs(**CASES[case])
    actual = values_and_gradients(expert_mlp, on_gpu(given))
    assert_same({name: value.cpu() for name, value in actual.items()}, values_and_gradients(expert_mlp, given), 1e-10)


@pytest.mark.gpu
def test_same_bits_each_time_on_a_gpu() -> None:
    given = on_gpu(inputs(tokens=5000, dtype=torch.float32))
    first, second = (values_and_gradients(expert_mlp, given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_twice_over_a_kept_graph() -> None:
    x, assignment, parameters = inputs()
    y = expert_mlp(x, assignment, *parameters).sum()
    first = torch.autograd.grad(y, (x, *parameters), retain_graph=True)
    second = torch.autograd.grad(y, (x, *parameters))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_multiplies_in_bfloat16(compiled: bool) -> None:
    torch._dynamo.reset()
    given = inputs(tokens=64, out=8, dtype=torch.float32)
    wanted = values_and_gradients(expert_mlp, given)

    def in_autocast(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return expert_mlp(*arguments)

    function = torch.compile(in_autocast, fullgraph=True, backend="aot_eager") if compiled else in_autocast
    actual = values_and_gradients(function, given)
    assert actual["y"].dtype == torch.bfloat16
    for name, value in wanted.items():
        error = (actual[name].float() - value).norm() / value.norm()
        assert error < 0.02, f"{name}: {error:.3f}"
        assert name == "y" or actual[name].dtype == torch.float32
    assert (actual["y"].float() - wanted["y"]).norm() > 0, "it did not run in bfloat16"


def test_autocast_leaves_float64_alone() -> None:
    x, assignment, parameters = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(x, assignment, *parameters)
    assert torch.equal(y, expert_mlp(x, assignment, *parameters))


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    x, assignment, parameters = inputs(tokens=2000, top_k=1, dtype=torch.float32)
    plain = expert_mlp(x, assignment, *parameters)
    torch.manual_seed(3)
    dropped = expert_mlp(x, assignment, *parameters, dropout=(0.0, 0.25))
    zero = dropped == 0
    assert 0.24 < zero.float().mean() < 0.26
    torch.testing.assert_close(dropped[~zero], plain[~zero] / 0.75)
    torch.manual_seed(3)
    assert torch.equal(dropped, expert_mlp(x, assignment, *parameters, dropout=(0.0, 0.25)))
    hidden = expert_mlp(x, assignment, *parameters, dropout=(0.25, 0.0))
    assert not torch.allclose(hidden, plain)
    assert abs((hidden - plain).mean()) < 0.05 * plain.std()


def test_bad_arguments_are_named() -> None:
    x, assignment, parameters = inputs()
    up, up_bias, down, down_bias = parameters
    with pytest.raises(UnknownNameError, match="did you mean 'gelu_tanh'"):
        expert_mlp(x, assignment, *parameters, activation="gelu_than")
    with pytest.raises(M2MKDError, match="both probabilities"):
        expert_mlp(x, assignment, *parameters, dropout=(0.0, 1.0))
    with pytest.raises(M2MKDError, match="flatten the batch first"):
        expert_mlp(x.unsqueeze(0), assignment, *parameters)
    with pytest.raises(M2MKDError, match=r"x has shape \(20, 6\), expected \(20, 8\)"):
        expert_mlp(x[:, :6], assignment, *parameters)
    with pytest.raises(M2MKDError, match=r"down_weight has shape \(4, 12, 15\), expected \(4, 12, 16\)"):
        expert_mlp(x, assignment, up, up_bias, down[..., :15], down_bias)
    with pytest.raises(M2MKDError, match=r"up_bias has shape \(4, 3\), expected \(4, 16\)"):
        expert_mlp(x, assignment, up, up_bias[:, :3], down, down_bias)
    with pytest.raises(M2MKDError, match=r"assignment.place has shape \(20, 2\), expected \(19, 2\)"):
        expert_mlp(x[:19], assignment, *parameters)
    with pytest.raises(M2MKDError, match=r"assignment.offsets has shape \(5,\), expected \(4,\)"):
        expert_mlp(x, assignment, *(parameter[:3] for parameter in parameters))
    with pytest.raises(M2MKDError, match=r"down_bias is torch.float32 but x is torch.float64"):
        expert_mlp(x, assignment, up, up_bias, down, down_bias.float())
