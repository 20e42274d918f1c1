"""The expert MLP of every backend that runs on the processor against a loop over rows, in eager mode and compiled."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops import expert_mlp as op_module
from m2mkd_fast.ops.expert_mlp import GATED, expert_mlp
from m2mkd_fast.ops.philox import philox_keep
from m2mkd_fast.ops.route import Assignment, route

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "40"))
ACTIVATIONS = ("gelu", "gelu_tanh", "geglu", "swiglu")
Inputs = tuple[Tensor, Assignment, tuple[Tensor | None, ...]]
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))


@pytest.fixture(params=["reference", "torch", pytest.param("cpu", marks=needs_cpu_kernel)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(expert_mlp=request.param):
        yield request.param


eager_and_compiled = pytest.mark.parametrize(
    ("backend", "compiled"),
    [
        ("reference", False),
        ("torch", False),
        ("torch", True),
        pytest.param("cpu", False, marks=needs_cpu_kernel),
        pytest.param("cpu", True, marks=needs_cpu_kernel),
    ],
    indirect=["backend"],
)


@pytest.fixture
def kernel() -> Iterator[None]:
    if why_missing("_C") is not None:
        pytest.skip(why_missing("_C"))
    with use_backend(expert_mlp="cpu"):
        yield


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
    activation: str = "gelu",
) -> Inputs:
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    logits = torch.randn(tokens, experts, dtype=dtype) if logits is None else logits
    assignment = route(logits, top_k=top_k, gate=gate, capacity=capacity)
    assignment = assignment._replace(weight=assignment.weight.detach().requires_grad_())
    made = 2 * hidden if activation in GATED else hidden
    shapes = ((experts, made, width), (experts, made) if bias else None)
    shapes += ((experts, out, hidden), (experts, out) if bias else None)
    parameters = (None if s is None else torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return x, assignment, tuple(parameters)


def activated(made: Tensor, activation: str) -> Tensor:
    if activation not in GATED:
        return F.gelu(made, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
    values, gates = made[: made.shape[0] // 2], made[made.shape[0] // 2 :]
    return values * {"geglu": F.gelu, "swiglu": F.silu}[activation](gates)


def by_rows(
    x: Tensor,
    assignment: Assignment,
    parameters: tuple[Tensor | None, ...],
    activation: str = "gelu",
    dropout: tuple[float, float] = (0.0, 0.0),
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, row by row."""
    up, up_bias, down, down_bias = parameters
    rows, (wide, hidden_units) = assignment.token.shape[0], down.shape[1:]
    factors = [torch.ones(rows, hidden_units, dtype=x.dtype), torch.ones(rows, wide, dtype=x.dtype)]
    if any(dropout):
        first = rows * -(-hidden_units // 4)
        masks = philox_keep(seed, rows, hidden_units, dropout[0]), philox_keep(seed, rows, wide, dropout[1], first)
        factors = [mask.to(x.dtype) / (1.0 - p) for mask, p in zip(masks, dropout, strict=True)]
    out = [torch.zeros(down.shape[1], dtype=x.dtype) for _ in range(x.shape[0])]
    for row in range(int(assignment.offsets[-1])):
        token, expert = int(assignment.token[row]), int(assignment.expert[row])
        made = up[expert] @ x[token] + (0 if up_bias is None else up_bias[expert])
        hidden = activated(made, activation) * factors[0][row]
        y = (down[expert] @ hidden + (0 if down_bias is None else down_bias[expert])) * factors[1][row]
        out[token] = out[token] + assignment.weight[row] * y
    return torch.stack(out) if out else x.new_zeros(0, down.shape[1])


def by_rows_like_op(x: Tensor, assignment: Assignment, *parameters: Tensor | None, **options: Any) -> Tensor:
    return by_rows(x, assignment, parameters, **options)


def grad_y(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype or y.dtype).to(y.dtype)


def values_and_gradients(function: Callable[..., Tensor], given: Inputs, **options: Any) -> dict[str, Tensor]:
    x, assignment, parameters = given
    leaves = {"x": x, "weight": assignment.weight}
    leaves |= {f"parameter {i}": parameter for i, parameter in enumerate(parameters) if parameter is not None}
    grad_dtype = options.pop("grad_dtype", x.dtype)
    y = function(x, assignment, *parameters, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y(y, grad_dtype), allow_unused=True)
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
    "empty experts": {"experts": 8, "tokens": 3},
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_rows(case: str, activation: str, backend: str) -> None:
    given = inputs(**CASES[case], activation=activation)
    actual = values_and_gradients(expert_mlp, given, activation=activation)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in actual.values())
    if given[0].shape[0]:
        assert_same(actual, values_and_gradients(by_rows_like_op, given, activation=activation))
    else:
        assert actual["y"].shape == (0, 12)
        assert all(actual[f"parameter {i}"].eq(0).all() for i in range(4))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, backend: str) -> None:
    x, assignment, parameters = inputs(6, 3, width=3, hidden=5, out=2, activation=activation)

    def function(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return expert_mlp(
            x, assignment._replace(weight=weight), *parameters, activation=activation, dropout=(0.3, 0.2), seed=seed
        )

    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(function, (x, assignment.weight, *parameters))


# Odd sizes around a tile, a group of rows, a panel and a block; experts that share a round and that fill several.
SIZES = {
    "odd": {"tokens": 37, "experts": 3, "width": 67, "hidden": 101, "out": 53},
    "long sums": {"tokens": 30, "experts": 2, "width": 520, "hidden": 300, "out": 7},
    "one expert in several rounds": {"tokens": 1100, "experts": 2, "width": 9, "hidden": 50, "out": 11},
    "all to one": {"tokens": 700, "experts": 4, "top_k": 1, "logits": to_one_expert(700, 4), "hidden": 20},
    "many experts": {"tokens": 60, "experts": 40, "top_k": 3, "hidden": 49},
    "dropped": {"tokens": 90, "experts": 4, "capacity": 20},
    "experts choose": {"tokens": 90, "experts": 4, "capacity": 20, "gate": "experts_choose"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("size", SIZES)
def test_error_is_pytorchs(size: str, activation: str, dtype: torch.dtype, kernel: None) -> None:
    """At most twice (outputs) or three times (gradients) PyTorch's, plus a rounding: by luck PyTorch's can be small."""
    x, assignment, parameters = inputs(**{**SIZES[size], "bias": size != "odd"}, dtype=dtype, activation=activation)
    scaled = tuple(p if p is None else (p / p.shape[-1] ** 0.5).detach().requires_grad_() for p in parameters)
    weight = assignment.weight.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    given = (x, assignment._replace(weight=weight), scaled)
    exact = (
        x.detach().double().requires_grad_(),
        assignment._replace(weight=weight.detach().double().requires_grad_()),
    )
    doubled = tuple(p if p is None else p.detach().double().requires_grad_() for p in scaled)
    found = values_and_gradients(expert_mlp, given, activation=activation)
    with use_backend(expert_mlp="torch"):
        same = values_and_gradients(expert_mlp, given, activation=activation)
        if dtype == torch.float64:
            assert_same(found, same)
            return
        truth = values_and_gradients(expert_mlp, (*exact, doubled), activation=activation, grad_dtype=dtype)
    for name, right in truth.items():
        assert found[name].dtype == same[name].dtype
        error, allowed = ((one[name].double() - right).abs().max() for one in (found, same))
        rounding = torch.finfo(dtype).eps * right.abs().max()
        assert error <= (2 if name == "y" else 3) * allowed + rounding, name


@pytest.mark.parametrize("dropout", [(0.3, 0.0), (0.0, 0.4), (0.2, 0.3)])
@pytest.mark.parametrize(
    "case",
    [{"hidden": 50, "out": 11}, {"capacity": 4}, {"gate": "experts_choose", "capacity": 5, "activation": "geglu"}],
)
def test_dropout_is_philox_in_value_and_gradient(
    case: dict[str, Any], dropout: tuple[float, float], backend: str
) -> None:
    given = inputs(**case)
    options = {"activation": case.get("activation", "gelu"), "dropout": dropout, "seed": torch.tensor(2**61 + 12345)}
    assert_same(
        values_and_gradients(expert_mlp, given, **options), values_and_gradients(by_rows_like_op, given, **options)
    )


def test_what_dropout_drops_is_zero_even_of_nan(backend: str) -> None:
    x, assignment, parameters = inputs(tokens=8, experts=1, top_k=1)
    parameters[3].data[:] = float("nan")
    y = expert_mlp(x, assignment, *parameters, dropout=(0.0, 0.5), seed=torch.tensor(1))
    kept = philox_keep(torch.tensor(1), 8, 12, 0.5, first=8 * 4)
    assert torch.equal(y.isnan(), kept)
    assert y[~kept].eq(0).all()


def test_nan_stays_in_its_token(backend: str) -> None:
    x, assignment, parameters = inputs(tokens=50)
    wanted = expert_mlp(x, assignment, *parameters).detach()
    with torch.no_grad():
        x[7] = float("nan")
    actual = expert_mlp(x, assignment, *parameters)
    others = torch.arange(50) != 7
    assert actual[7].isnan().all()
    assert torch.equal(actual[others], wanted[others])
    (grad_x,) = torch.autograd.grad(actual.sum(), x)
    assert grad_x[others].isfinite().all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_results_do_not_depend_on_threads_or_repetition(sizes: dict[str, Any], kernel: None) -> None:
    given = inputs(**{"dtype": torch.float32, **sizes, "width": 300, "hidden": 400}, activation="geglu")
    options = {"activation": "geglu", "dropout": (0.1, 0.1), "seed": torch.tensor(3)}
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(values_and_gradients(expert_mlp, given, **options))
    finally:
        torch.set_num_threads(1)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in other)


def test_forty_repetitions_have_the_same_bits(backend: str) -> None:
    given = inputs(tokens=50, hidden=33, dtype=torch.float32)
    first = values_and_gradients(expert_mlp, given, dropout=(0.1, 0.1), seed=torch.tensor(3))
    for _ in range(39):
        again = values_and_gradients(expert_mlp, given, dropout=(0.1, 0.1), seed=torch.tensor(3))
        assert all(torch.equal(first[name], again[name]) for name in first)


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
@needs_cpu_kernel
def test_expert_mlp_fuzz(data: st.DataObject) -> None:
    experts, width, hidden, out = (data.draw(st.integers(1, most)) for most in (12, 40, 110, 40))
    tokens, top_k = data.draw(st.integers(0, 120)), data.draw(st.integers(1, min(experts, 4)))
    gate = data.draw(st.sampled_from(["softmax_top_k", "experts_choose"])) if tokens else "softmax_top_k"
    capacity = (
        data.draw(st.integers(1, max(tokens, 1))) if gate == "experts_choose" or data.draw(st.booleans()) else None
    )
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    given = inputs(
        tokens, experts, top_k, width=width, hidden=hidden, out=out, bias=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from([torch.float64, torch.float32])), gate=gate, capacity=capacity,
        activation=activation,
    )  # fmt: skip
    p = data.draw(st.sampled_from([0.0, 0.25]))
    options = {
        "activation": activation,
        "dropout": (p, p),
        "seed": torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1))),
    }
    with use_backend(expert_mlp="cpu"):
        found = values_and_gradients(expert_mlp, given, **options)
    with use_backend(expert_mlp="torch"):
        wanted = values_and_gradients(expert_mlp, given, **options)
    for name, right in wanted.items():
        largest = right.abs().max().item() if right.numel() else 0.0
        tolerance = (1e-12 if right.dtype == torch.float64 and given[0].dtype == torch.float64 else 2e-5) * (
            largest + 1.0
        )
        torch.testing.assert_close(found[name], right, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_only_what_needs_a_gradient_gets_one(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, assignment, parameters = inputs()
    full = values_and_gradients(expert_mlp, (x, assignment, parameters))
    frozen = tuple(p.detach() for p in parameters)
    (grad_x,) = torch.autograd.grad(expert_mlp(x, assignment, *frozen), x, grad_y(full["y"]))
    torch.testing.assert_close(grad_x, full["x"])
    y = expert_mlp(x.detach(), assignment, frozen[0], frozen[1], parameters[2], frozen[3])
    (grad_down,) = torch.autograd.grad(y, parameters[2], grad_y(full["y"]))
    torch.testing.assert_close(grad_down, full["parameter 2"])


@needs_cpu_kernel
def test_inference_keeps_no_preactivation() -> None:
    x, assignment, parameters = inputs()
    token, expert, weight, offsets, place = assignment[:5]
    arguments = (x, token, expert, weight, offsets, place, *parameters, "gelu", 0.0, 0.0, None)
    forward = torch.ops.m2mkd_fast._expert_mlp_forward
    out, preactivation = forward(*arguments, False)
    assert preactivation.numel() == 0
    assert torch.equal(out, forward(*arguments, True)[0])


@needs_cpu_kernel
@pytest.mark.parametrize(("activation", "dtype"), [("gelu", torch.float64), ("swiglu", torch.bfloat16)])
def test_opcheck(activation: str, dtype: torch.dtype) -> None:
    given = inputs(tokens=7, dtype=dtype, activation=activation, logits=torch.randn(7, 4))
    x, assignment, parameters = given[0].detach(), given[1], tuple(p.detach() for p in given[2])
    token, expert, weight, offsets, place = (tensor.detach() for tensor in assignment[:5])
    rest = (token, expert, weight, offsets, place, *parameters, activation, 0.1, 0.2, torch.tensor(3))
    ops = torch.ops.m2mkd_fast
    for keep in (True, False):
        torch.library.opcheck(ops._expert_mlp_forward.default, (x, *rest, keep))
    out, preactivation = ops._expert_mlp_forward(x, *rest, True)
    for need_x, need_parameters in ((True, True), (False, False)):
        torch.library.opcheck(ops._expert_mlp_backward.default, (out, preactivation, x, *rest, need_x, need_parameters))


@needs_cpu_kernel
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("token", 20, "token must be below"), ("place", 40, "place must be below"), ("offsets", 99, "offsets must rise")],
)
def test_assignments_that_point_elsewhere_are_refused(field: str, value: int, message: str, kernel: None) -> None:
    x, assignment, parameters = inputs()
    broken = getattr(assignment, field).clone()
    broken.view(-1)[-1 if field == "offsets" else 0] = value
    with pytest.raises(RuntimeError, match=message):
        expert_mlp(x, assignment._replace(**{field: broken}), *parameters)


def test_shapes_come_from_the_meta_device() -> None:
    x, assignment, parameters = inputs(capacity=4)
    on_meta = [None if p is None else p.detach().to("meta") for p in parameters]
    assignment = Assignment(*(tensor.detach().to("meta") for tensor in assignment))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expert_mlp(x.detach().to("meta"), assignment, *on_meta).shape == (20, 12)


@pytest.mark.parametrize("sizes", [{"width": 0}, {"hidden": 0}], ids=str)
def test_widths_of_zero(sizes: dict[str, int]) -> None:
    """Nothing is left but biases."""
    given = inputs(**sizes)
    with use_backend(expert_mlp="reference"):
        wanted = values_and_gradients(expert_mlp, given)
    assert_same(values_and_gradients(expert_mlp, given), wanted)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("faster", [False, True])
def test_measured_table_chooses_on_a_gpu(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2mkd_fast.kernels import expert_mlp as kernels

    x, assignment, parameters = inputs(dtype=torch.bfloat16)
    asked = []
    with FakeTensorMode():
        on_gpu = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "prefers_torch", lambda *sizes: asked.append(sizes) or faster)
    reasons = op_module._reasons(on_gpu, assignment, parameters, "geglu")
    able = [name for name, reason in reasons.items() if reason is None]
    assert able == (["torch", "triton"] if faster else ["triton", "torch"])
    assert asked == [(on_gpu, 40, 16, 12, 4, True)]


def test_choice_of_the_backend_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries know wider vectors than the kernel their products go first, unless compiled code would have
    to take the reference instead."""
    x, assignment, parameters = inputs()
    for outdoes, first in ((True, "cpu"), (False, "torch")):
        monkeypatch.setattr(op_module, "_KERNEL_OUTDOES_LIBRARIES", outdoes)
        able = [
            name for name, reason in op_module._reasons(x, assignment, parameters, "gelu").items() if reason is None
        ]
        assert able == ([first, *({"cpu", "torch"} - {first})] if why_missing("_C") is None else ["torch"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    able = [name for name, reason in op_module._reasons(x, assignment, parameters, "gelu").items() if reason is None]
    assert able == (["cpu", "torch"] if why_missing("_C") is None else ["torch"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", TRACED)
def test_torch_compiled_equals_eager(case: str, dtype: torch.dtype) -> None:
    """float64 takes the reference, bfloat16 grouped products where the strides allow."""
    with use_backend(expert_mlp="torch"):
        compare_compiled(case, dtype)


@pytest.mark.parametrize("case", ["plain", "no biases", "no tokens", "experts choose"])
def test_kernel_compiled_equals_eager(case: str, kernel: None) -> None:
    compare_compiled(case, torch.float64)


def compare_compiled(case: str, dtype: torch.dtype) -> None:
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
    with use_backend(expert_mlp="torch"):
        for case, dtype in ((wide, torch.bfloat16), (wide, torch.float32), ({**wide, "out": 12}, torch.bfloat16)):
            torch._dynamo.reset()
            x, assignment, parameters = inputs(**case, dtype=dtype)
            torch.compile(expert_mlp, backend="eager")(x, assignment, *parameters)
    assert calls == [torch.bfloat16] * 2


@eager_and_compiled
def test_tail_of_dropped_choices_is_never_read(backend: str, compiled: bool) -> None:
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


def test_non_contiguous_inputs(backend: str) -> None:
    x, assignment, parameters = inputs()
    wanted = values_and_gradients(expert_mlp, (x, assignment, parameters))
    strided = x.detach().t().contiguous().t().requires_grad_()
    stacked = tuple(p.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for p in parameters)
    assert not strided.is_contiguous()
    assert not stacked[0].is_contiguous()
    assert_same(values_and_gradients(expert_mlp, (strided, assignment, stacked)), wanted)


def test_second_order_gradients_are_refused(backend: str) -> None:
    """Also those of a gradient that nobody looked at, such as that of a sum, which does not need one itself."""
    x, assignment, parameters = inputs()
    (gradient,) = torch.autograd.grad(expert_mlp(x, assignment, *parameters).sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, M2MKDError), match="once_differentiable|differentiable once"):
        gradient.sum().backward()


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


def test_backward_twice_over_a_kept_graph(backend: str) -> None:
    x, assignment, parameters = inputs()
    y = expert_mlp(x, assignment, *parameters).sum()
    first = torch.autograd.grad(y, (x, *parameters), retain_graph=True)
    second = torch.autograd.grad(y, (x, *parameters))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@eager_and_compiled
def test_autocast_multiplies_in_bfloat16(backend: str, compiled: bool) -> None:
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


def test_autocast_leaves_float64_alone(backend: str) -> None:
    x, assignment, parameters = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(x, assignment, *parameters)
    assert torch.equal(y, expert_mlp(x, assignment, *parameters))


def test_dropout_keeps_the_mean_and_follows_the_generator(backend: str) -> None:
    x, assignment, parameters = inputs(tokens=1000, top_k=1, dtype=torch.float32)
    plain = expert_mlp(x, assignment, *parameters)
    torch.manual_seed(3)
    dropped = expert_mlp(x, assignment, *parameters, dropout=(0.0, 0.25))
    zero = dropped == 0
    assert 0.23 < zero.float().mean() < 0.27
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
    with pytest.raises(M2MKDError, match=r"down_weight has shape \(4, 12, 16\), expected \(4, 12, 8\).*'geglu'"):
        expert_mlp(x, assignment, *parameters, activation="geglu")
    with pytest.raises(M2MKDError, match="values and as many gates, an even number, not 15"):
        expert_mlp(x, assignment, up[:, :15], up_bias[:, :15], down, down_bias, activation="swiglu")
    with pytest.raises(
        M2MKDError, match=r"seed has shape \(2,\), torch.int64, on cpu; expected one int64 number on cpu"
    ):
        expert_mlp(x, assignment, *parameters, dropout=(0.1, 0.1), seed=torch.tensor([1, 2]))
    with pytest.raises(M2MKDError, match=r"down_bias is on meta, x on cpu; move one of them"):
        expert_mlp(x, assignment, up, up_bias, down, down_bias.to("meta"))
