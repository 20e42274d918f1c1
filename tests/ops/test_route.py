"""The assignment of tokens to experts: every backend against golden files, a per-token oracle, and float64."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import load_cuda_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import BackendFallbackWarning, use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops import route as route_module
from m2mkd_fast.ops.route import Assignment, capacity_of, route, route_backward_reference, route_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "150"))
ROOT = Path(__file__).parents[2]
GATES = ("softmax_top_k", "top_k_softmax", "experts_choose")
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))

# Settings that reach every branch: gate, top_k, capacity, batch_priority.
CASES: dict[str, dict[str, Any]] = {
    "dropless": {"top_k": 2},
    "top_1": {"top_k": 1, "capacity": 5},
    "capacity": {"top_k": 2, "capacity": 4},
    "batch_priority": {"top_k": 2, "capacity": 4, "batch_priority": True},
    "top_5": {"top_k": 5, "capacity": 9, "batch_priority": True},
    "top_k_softmax": {"top_k": 2, "gate": "top_k_softmax"},
    "top_k_softmax_capacity": {"top_k": 3, "gate": "top_k_softmax", "capacity": 6, "batch_priority": True},
    "experts_choose": {"top_k": 1, "gate": "experts_choose", "capacity": 7},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(
    params=["reference", pytest.param("cpu", marks=needs_cpu_kernel), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the inputs, with the backend forced."""
    with use_backend(route=request.param):
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=[pytest.param("cpu", marks=needs_cpu_kernel), pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(route=request.param):
        yield request.param


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def expected_assignment(
    scores: Tensor,
    gates: Tensor,
    *,
    top_k: int,
    gate: str = "softmax_top_k",
    capacity: int | None = None,
    batch_priority: bool = False,
) -> dict[str, list]:
    """The assignment by plain loops over groups, choices and tokens, with given gates."""
    groups, tokens, experts = scores.shape
    score, weight_of = scores.tolist(), gates.tolist()
    rows: list[list[tuple[int, float, int | None]]] = [[] for _ in range(experts)]  # token, weight, choice number
    dropped = 0
    for g in range(groups):
        if gate == "experts_choose":
            for e in range(experts):
                best = sorted(range(tokens), key=lambda t, g=g, e=e: (-weight_of[g][t][e], t))[:capacity]
                rows[e] += [(g * tokens + t, weight_of[g][t][e], None) for t in best]
            continue
        choices = [sorted(range(experts), key=lambda e, g=g, t=t: (-score[g][t][e], e))[:top_k] for t in range(tokens)]
        order = list(range(tokens))
        if batch_priority:
            order.sort(key=lambda t, g=g, choices=choices: -weight_of[g][t][choices[t][0]])
        filled = [0] * experts
        for k in range(top_k):
            for t in order:
                e = choices[t][k]
                if capacity is None or filled[e] < capacity:
                    filled[e] += 1
                    rows[e].append((g * tokens + t, weight_of[g][t][e], k))
                else:
                    dropped += 1
    place = [[-1] * (0 if gate == "experts_choose" else top_k) for _ in range(groups * tokens)]
    offsets = [0]
    for e in range(experts):
        for slot, (token, _, k) in enumerate(rows[e]):
            if k is not None:
                place[token][k] = offsets[-1] + slot
        offsets.append(offsets[-1] + len(rows[e]))
    return {
        "token": [token for e in rows for token, _, _ in e] + [0] * dropped,
        "expert": [e for e in range(experts) for _ in rows[e]] + [experts - 1] * dropped,
        "weight": [weight for e in rows for _, weight, _ in e] + [0.0] * dropped,
        "offsets": offsets,
        "place": place,
    }


def assert_as_expected(assignment: Assignment, scores: Tensor, **case: Any) -> None:
    expected = expected_assignment(scores.double().cpu(), assignment.gates.double().cpu(), **case)
    for name, value in expected.items():
        assert getattr(assignment, name).tolist() == value, name


@pytest.mark.golden_case("vmoe_layer*.safetensors")
def test_route_golden(golden_case, read_golden, assert_golden, device):
    cases, tensors = read_golden(golden_case)
    for name, config in cases.items():
        assignment = route_golden_case(config, tensors, name, device)
        assert_golden(assignment.gates.cpu(), tensors[f"{name}/gates"], f"{name}/gates")
        place, token, expert = golden_place(config, tensors[f"{name}/assignment"])
        used = int(assignment.offsets[-1])
        assert assignment.place.tolist() == place
        assert assignment.token[:used].tolist() == token
        assert assignment.expert[:used].tolist() == expert
        weight = tensors[f"{name}/gates"].flatten(0, 1)[token, expert]
        assert_golden(assignment.weight[:used].cpu(), weight, f"{name}/weight")


@pytest.mark.golden_case("vmoe_layer*.safetensors")
def test_route_golden_rejects_altered_numbers(golden_case, read_golden, assert_golden, altered_golden, device):
    name = next(iter(read_golden(golden_case)[0]))
    cases, tensors = read_golden(altered_golden(golden_case, f"{name}/gates"))
    assignment = route_golden_case(cases[name], tensors, name, device)
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(assignment.gates.cpu(), tensors[f"{name}/gates"], "gates")


def route_golden_case(config: dict, tensors: dict[str, Tensor], name: str, device: str) -> Assignment:
    logits, noise = tensors[f"{name}/logits"].to(device), None
    if not config["deterministic"] and config["noise_std"]:
        noise = tensors[f"{name}/noise"].to(device) * config["noise_std"] / config["experts"]
    return route(
        logits,
        noise,
        top_k=config["top_k"],
        gate="experts_choose" if config["router"] == "experts choose tokens" else "softmax_top_k",
        capacity=config["capacity"],
        batch_priority=config["batch_priority"],
    )


def golden_place(config: dict, assignment: Tensor) -> tuple[list[list[int]], list[int], list[int]]:
    """place, token and expert of the rows in use, told from the golden file's slots: rows go by expert, group, slot."""
    groups, tokens = config["groups"], config["tokens"]
    if config["router"] == "experts choose tokens":  # [G, S, E, C], one-hot over tokens
        rows = sorted((e, g, slot, g * tokens + t, 0) for g, t, e, slot in assignment.nonzero().tolist())
        return [[] for _ in range(groups * tokens)], [row[3] for row in rows], [row[0] for row in rows]
    rows = sorted(  # [G, S, K, (expert, slot)]
        (e, g, slot, g * tokens + t, k)
        for g, group in enumerate(assignment.tolist())
        for t, choices in enumerate(group)
        for k, (e, slot) in enumerate(choices)
        if slot < config["capacity"]
    )
    place = [[-1] * config["top_k"] for _ in range(groups * tokens)]
    for number, (_, _, _, token, k) in enumerate(rows):
        place[token][k] = number
    return place, [row[3] for row in rows], [row[0] for row in rows]


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
def test_route_fuzz(data, device_of_fuzz):
    gate = data.draw(st.sampled_from(GATES))
    groups, tokens, experts = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 30), (1, 12)))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    capacity = data.draw(st.none() | st.integers(1, 12))
    batch_priority = data.draw(st.booleans())
    if gate == "experts_choose":
        tokens = max(tokens, 1)
        capacity, batch_priority = min(capacity or 1, tokens), False
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scores = random_logits(groups, tokens, experts, seed=data.draw(st.integers(0, 2**16)), dtype=dtype)
    if data.draw(st.booleans()):
        scores = scores.round()  # many ties
    case = {"top_k": top_k, "gate": gate, "capacity": capacity, "batch_priority": batch_priority}
    for backend, device in device_of_fuzz:
        with use_backend(route=backend):
            assignment = route(scores.to(device), **case)
        assert_as_expected(assignment, scores, **case)


@pytest.fixture(scope="session")
def device_of_fuzz() -> list[tuple[str, str]]:
    """Every backend that can run here, with its device."""
    backends = [("reference", "cpu")]
    backends += [("cpu", "cpu")] if why_missing("_C") is None else []
    backends += [("cuda", "cuda")] if torch.cuda.is_available() else []
    return backends


@every_case
def test_many_tokens_agree_with_loops(case, device):
    # More than one chunk of every kernel, and groups that do not fill their last one.
    case = {**case, "capacity": 300} if case.get("capacity") else case
    scores = random_logits(2, 1500, 9, device=device)
    assert_as_expected(route(scores, **case), scores, **case)


@pytest.mark.parametrize("experts", [1, 8, 9, 32, 33, 256])
def test_numbers_of_experts(experts, device):
    scores = random_logits(2, 37, experts, device=device, dtype=torch.float32)
    for case in ({"top_k": min(8, experts)}, {"top_k": 1, "gate": "experts_choose", "capacity": 3}):
        assert_as_expected(route(scores, **case), scores, **case)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_and_gradients_agree_with_float64(case, dtype, device):
    logits = random_logits(3, 40, 8, dtype=dtype, device=device).requires_grad_()
    result = route(logits, **case)
    exact_logits = logits.detach().cpu().double().requires_grad_()
    exact = route_reference(exact_logits, **case)
    assert torch.equal(result.token.cpu(), exact.token)

    grad_weight, grad_gates = random_logits(*exact.weight.shape, seed=1), random_logits(*exact.gates.shape, seed=2)
    loss = (result.weight.cpu() * grad_weight).sum() + (result.gates.cpu() * grad_gates).sum()
    exact_loss = (exact.weight * grad_weight).sum() + (exact.gates * grad_gates).sum()
    loss.backward()
    exact_loss.backward()
    tolerance = {"rtol": 0, "atol": 1e-14 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(result.weight.cpu().double(), exact.weight, **tolerance)
    torch.testing.assert_close(result.gates.cpu().double(), exact.gates, **tolerance)
    torch.testing.assert_close(logits.grad.cpu().double(), exact_logits.grad, **tolerance)


@every_case
@pytest.mark.parametrize("used", ["weight", "gates"])
def test_gradient_of_one_output_alone(case, used, device):
    logits = random_logits(2, 9, 6, device=device).requires_grad_()
    exact_logits = logits.detach().cpu().requires_grad_()
    (grad,) = torch.autograd.grad(getattr(route(logits, **case), used).square().sum(), logits)
    (exact,) = torch.autograd.grad(getattr(route_reference(exact_logits, **case), used).square().sum(), exact_logits)
    torch.testing.assert_close(grad.cpu(), exact, rtol=0, atol=1e-14)


@every_case
def test_gradcheck(case, device):
    logits = random_logits(2, 8, 5, device=device).requires_grad_()
    noise = (0.1 * random_logits(2, 8, 5, seed=1, device=device)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: route(*inputs, **case)[2::3], (logits, noise))


def test_dropped_choices_have_no_gradient(device):
    logits = random_logits(1, 30, 4, device=device).requires_grad_()
    assignment = route(logits, top_k=1, capacity=3)
    used = int(assignment.offsets[-1])
    assert used < 30
    assert assignment.weight[used:].count_nonzero() == 0
    (grad,) = torch.autograd.grad(assignment.weight[used:].sum(), logits)
    assert grad.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 3)])
def test_no_tokens(shape, device):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    assignment = route(logits, top_k=2, capacity=4, batch_priority=True)
    assert assignment.token.numel() == assignment.place.numel() == assignment.gates.numel() == 0
    assert assignment.offsets.tolist() == [0, 0, 0, 0]
    (grad,) = torch.autograd.grad(assignment.weight.sum() + assignment.gates.sum(), logits)
    assert grad.shape == shape


@every_case
def test_inputs_that_are_not_contiguous(case, device):
    dense = random_logits(3, 16, 8, device=device)
    for logits in (dense.transpose(0, 1).contiguous().transpose(0, 1), dense.repeat_interleave(2, -1)[..., ::2]):
        assert not logits.is_contiguous()
        for result, expected in zip(route(logits, **case), route(dense, **case), strict=True):
            assert torch.equal(result, expected)


def test_gradients_that_are_expanded_or_strided(device):
    logits = random_logits(1, 12, 4, device=device).requires_grad_()
    assignment = route(logits, top_k=2)
    gates = random_logits(4, 12, 1, device=device).permute(2, 1, 0)
    (strided,) = torch.autograd.grad(
        (assignment.weight, assignment.gates),
        logits,
        (assignment.weight.new_ones(1).expand(24), gates),
        retain_graph=True,
    )
    (dense,) = torch.autograd.grad(
        (assignment.weight, assignment.gates), logits, (torch.ones_like(assignment.weight), gates.contiguous())
    )
    assert torch.equal(strided, dense)


def test_one_group_may_leave_its_dimension_out(device):
    logits = random_logits(20, 4, device=device)
    for result, expected in zip(route(logits, top_k=2), route(logits[None], top_k=2), strict=True):
        assert torch.equal(result, expected)


def test_noise_is_added_to_the_logits(device):
    logits, noise = random_logits(2, 9, 4, device=device), random_logits(2, 9, 4, seed=1, device=device)
    for result, expected in zip(route(logits, noise, top_k=2), route(logits + noise, top_k=2), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, device):
    logits = random_logits(2, 9, 4, device=device).to(dtype).requires_grad_()
    result, expected = route(logits, top_k=2), route(logits.float(), top_k=2)
    assert result.weight.dtype == result.gates.dtype == torch.float32
    assert torch.equal(result.gates, expected.gates)
    result.weight.sum().backward()
    assert logits.grad.dtype == dtype


def test_ties_go_to_the_lower_index(device):
    assignment = route(torch.zeros(1, 6, 4, device=device), top_k=2, capacity=4, batch_priority=True)
    assert assignment.expert.tolist() == [0] * 4 + [1] * 4 + [3] * 4
    assert assignment.token.tolist() == [0, 1, 2, 3] * 2 + [0] * 4
    assert assignment.place.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7], [-1, -1], [-1, -1]]


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_leave_the_indices_sound(case, bad, device):
    logits = random_logits(2, 20, 6, device=device)
    logits[0, 3, 2] = bad
    logits[1, 7] = bad
    result, expected = route(logits, **case), route_reference(logits.cpu(), **case)
    for name in ("token", "expert", "offsets", "place"):
        assert torch.equal(getattr(result, name).cpu(), getattr(expected, name)), name
    assert torch.equal(result.gates.isnan().cpu(), expected.gates.isnan())


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory):
    """The CUDA kernels, run on the CPU by an imitation of thread blocks and warps."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return load_cuda_on_cpu(ROOT / "csrc/cuda/route.cu", tmp_path_factory.mktemp("route"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (70, 6), (300, 8), (270, 33), (40, 256)], ids=lambda number: str(number)
)
@every_case
def test_cuda_kernels_agree_with_loops_on_the_cpu(case, tokens, experts, cuda_on_cpu):
    top_k, capacity = min(case["top_k"], experts), case.get("capacity")
    capacity = capacity if capacity is None else min(capacity * (1 + tokens // 40), tokens)
    case = {**case, "top_k": top_k, "capacity": capacity}
    scores = random_logits(3, tokens, experts)
    scores[1] = scores[1].round()  # many ties
    arguments = (top_k, case.get("gate", "softmax_top_k"), capacity, "batch_priority" in case)
    if case.get("gate") == "experts_choose":
        arguments = (0, *arguments[1:])
    assignment = Assignment(*cuda_on_cpu._route_forward(scores, *arguments))
    assert_as_expected(assignment, scores, **case)
    torch.testing.assert_close(assignment.gates, route_reference(scores, **case).gates, rtol=0, atol=1e-14)

    saved = (assignment.gates, assignment.token, assignment.expert, assignment.offsets)
    grad_weight, grad_gates = torch.rand_like(assignment.weight), torch.rand_like(assignment.gates)
    for gradients in ((grad_weight, None), (None, grad_gates), (grad_weight, grad_gates)):
        grad, expected = cuda_on_cpu._route_backward(*gradients, *saved), route_backward_reference(*gradients, *saved)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_cuda_kernels_take_no_tokens(cuda_on_cpu):
    assignment = Assignment(*cuda_on_cpu._route_forward(torch.zeros(2, 0, 3), 2, "softmax_top_k", 4, True))
    assert assignment.offsets.tolist() == [0, 0, 0, 0]


@every_case
def test_results_do_not_depend_on_threads_or_repetition(case, kernel_device):
    case = {**case, "capacity": 700} if case.get("capacity") else case
    logits = random_logits(2, 3000, 8, device=kernel_device, dtype=torch.float32).requires_grad_()

    def everything() -> list[Tensor]:
        assignment = route(logits, **case)
        (grad,) = torch.autograd.grad(assignment.weight.square().sum() + assignment.gates.square().sum(), logits)
        return [*assignment, grad]

    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            runs.append(everything())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for tensor, first in zip(run, runs[0], strict=True):
            assert torch.equal(tensor, first)


@every_case
def test_private_ops_are_sound(case, kernel_device):
    scores = random_logits(2, 9, 6, device=kernel_device)
    arguments = (case["top_k"], case.get("gate", "softmax_top_k"), case.get("capacity"), "batch_priority" in case)
    torch.library.opcheck(torch.ops.m2mkd_fast._route_forward.default, (scores, *arguments))
    assignment = Assignment(*torch.ops.m2mkd_fast._route_forward(scores, *arguments))
    saved = (assignment.gates, assignment.token, assignment.expert, assignment.offsets)
    for gradients in ((assignment.weight, None), (None, assignment.gates), (assignment.weight, assignment.gates)):
        torch.library.opcheck(torch.ops.m2mkd_fast._route_backward.default, (*gradients, *saved))


@pytest.mark.parametrize("case", [CASES["batch_priority"], CASES["experts_choose"]], ids=["tokens", "experts"])
def test_compiles_as_one_graph(case, device):
    check_compiled(case, device, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES["batch_priority"], CASES["experts_choose"]], ids=["tokens", "experts"])
def test_compiles_with_inductor(case, kernel_device):
    check_compiled(case, kernel_device, "inductor")


def check_compiled(case: dict[str, Any], device: str, compiler: str) -> None:
    def loss(logits: Tensor) -> tuple[Tensor, Assignment]:
        assignment = route(2 * logits, **case)
        return (assignment.weight.square().sum() + assignment.gates[..., 0].sum()), assignment

    torch._dynamo.reset()
    logits = random_logits(2, 12, 6, device=device).requires_grad_()
    value, assignment = torch.compile(loss, fullgraph=True, backend=compiler)(logits)
    (grad,) = torch.autograd.grad(value, logits)
    expected_value, expected = loss(logits)
    (expected_grad,) = torch.autograd.grad(expected_value, logits)
    assert torch.equal(assignment.token, expected.token)
    assert torch.equal(assignment.place, expected.place)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected_grad)


@every_case
def test_second_derivatives(case, device):
    logits = random_logits(2, 8, 5, device=device).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda logits: route(logits, **case)[2::3], (logits,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoid"}, "unknown gate 'sigmoid'"),
        ({"logits": torch.zeros(4)}, r"shape \(4,\); expected \[groups, tokens, experts\]"),
        ({"logits": torch.zeros(2, 3, 0)}, "at least one expert"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "int64; expected a floating dtype"),
        ({"noise": torch.zeros(3, 4)}, r"noise has shape \(3, 4\), logits \(5, 4\)"),
        ({"top_k": 0}, "top_k is 0; with 4 experts it must be within 1 to 4"),
        ({"top_k": 5}, "top_k is 5; with 4 experts"),
        ({"capacity": 0}, "capacity is 0; it must be at least 1"),
        ({"gate": "experts_choose"}, "capacity is None; with gate='experts_choose'"),
        ({"gate": "experts_choose", "capacity": 6}, "within 1 to 5"),
        ({"gate": "experts_choose", "capacity": 2, "batch_priority": True}, "batch_priority has no meaning"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(5, 4), "top_k": 2, **change}
    with pytest.raises(M2MKDError, match=message):
        route(**arguments)


@pytest.mark.parametrize(
    ("sizes", "capacity"),
    [((1576, 2, 8, 1.05), 416), ((1576, 2, 32, 1.05), 104), ((10, 1, 8, 1.0), 4), ((64, 1, 8, 0.5), 4)],
)
def test_capacity_is_rounded_up_to_a_multiple_of_four(sizes, capacity):
    assert capacity_of(*sizes) == capacity


def test_capacity_of_nothing_is_an_error():
    with pytest.raises(M2MKDError, match="every argument must be positive"):
        capacity_of(0, 2, 8, 1.0)


def test_forcing_a_backend_that_cannot_run_says_why():
    logits = torch.zeros(3, 4)
    with use_backend("cuda"), pytest.raises(M2MKDError, match="cannot run route: the input is on cpu, not on cuda"):
        route(logits, top_k=1)
    with use_backend("triton"), pytest.raises(M2MKDError, match="it has none; there are: reference, cpu, cuda"):
        route(logits, top_k=1)
    with pytest.raises(UnknownNameError, match="did you mean 'cuda'"), use_backend("cude"):
        pass


def test_falling_back_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(route_module, "why_missing", lambda name: f"{name} was left out for this test")
    for _ in range(2):
        route(torch.zeros(3, 4), top_k=1)
    said = [warning for warning in recwarn if warning.category is BackendFallbackWarning]
    assert len(said) == 1
    assert "_C was left out for this test" in str(said[0].message)
    assert said[0].filename == __file__


@needs_cpu_kernel
def test_the_kernel_is_what_runs_by_default(monkeypatch):
    calls: list[Callable] = []
    monkeypatch.setattr(route_module, "route_reference", lambda *args, **kwargs: calls.append(1))
    route(torch.zeros(3, 4), top_k=1)
    assert not calls
    with use_backend("reference"), use_backend(route="auto"):
        route(torch.zeros(3, 4), top_k=1)
    assert not calls
    with use_backend("reference"):
        route(torch.zeros(3, 4), top_k=1)
    assert calls
