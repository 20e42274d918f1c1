"""The assignment of tokens to experts: every backend against golden files, a per-token oracle, and float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import BackendFallbackWarning, use_backend
from m2mkd_fast.checks import debug
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops import route as route_module
from m2mkd_fast.ops.philox import philox_normal
from m2mkd_fast.ops.route import (
    LOSSES,
    Assignment,
    capacity_of,
    route,
    route_backward_reference,
    route_reference,
)
from m2mkd_fast.ops.routing_losses import gshard_loss, importance_loss, load_loss, router_z_loss

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "150"))
GATES = ("softmax_top_k", "top_k_softmax", "sigmoid", "experts_choose")
INDICES = ("token", "expert", "offsets", "place")
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
    "sigmoid": {"top_k": 2, "gate": "sigmoid", "capacity": 6, "batch_priority": True},
    "experts_choose": {"top_k": 1, "gate": "experts_choose", "capacity": 7},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

# With noise and losses: from where the noise comes, and its standard deviation.
every_gate = pytest.mark.parametrize("gate", GATES)
every_noise = pytest.mark.parametrize("noise_kind", ["none", "given", "seed"])
NOISE_STD = 0.3


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


def training_case(
    gate: str, noise_kind: str, logits: Tensor, losses: tuple[str, ...] = LOSSES
) -> tuple[Tensor | None, dict[str, Any]]:
    """The noise, if it is given, and the other arguments of a call with all the losses that go with them."""
    case: dict[str, Any] = {"top_k": 2, "gate": gate, "capacity": max(1, logits.shape[-2] // 4)}
    without_load = gate == "experts_choose" or noise_kind == "none"
    case["losses"] = tuple(name for name in losses if not (name == "load" and without_load))
    if noise_kind != "none":
        case["noise_std"] = NOISE_STD
    if noise_kind == "seed":
        case["seed"] = torch.tensor(2**62 + 12345, device=logits.device)
    noise = NOISE_STD * random_logits(*logits.shape, seed=7).to(logits) if noise_kind == "given" else None
    return noise, case


def differentiable(assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    return assignment.weight, assignment.gates, assignment.losses


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
    rows: list[list[tuple[int, float, int]]] = [[] for _ in range(experts)]  # token, weight, column of place
    dropped = 0
    for g in range(groups):
        if gate == "experts_choose":
            for e in range(experts):
                best = sorted(range(tokens), key=lambda t, g=g, e=e: (-weight_of[g][t][e], t))[:capacity]
                rows[e] += [(g * tokens + t, weight_of[g][t][e], e) for t in best]
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
    place = [[-1] * (experts if gate == "experts_choose" else top_k) for _ in range(groups * tokens)]
    offsets = [0]
    for e in range(experts):
        for slot, (token, _, column) in enumerate(rows[e]):
            place[token][column] = offsets[-1] + slot
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
        rows = sorted((e, g, slot, g * tokens + t, e) for g, t, e, slot in assignment.nonzero().tolist())
        place = [[-1] * config["experts"] for _ in range(groups * tokens)]
        for number, (e, _, _, token, _) in enumerate(rows):
            place[token][e] = number
        return place, [row[3] for row in rows], [row[0] for row in rows]
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
    noise, noise_std = None, data.draw(st.sampled_from([0.0, 0.125]))
    if noise_std:
        noise = noise_std * random_logits(groups, tokens, experts, seed=1, dtype=dtype).round()  # keeps ties
    wanted = data.draw(st.sets(st.sampled_from(LOSSES)))
    losses = wanted if noise_std and gate != "experts_choose" else wanted - {"load"}
    for backend, device in device_of_fuzz:
        with use_backend(route=backend):
            assignment = route(
                scores.to(device),
                None if noise is None else noise.to(device),
                noise_std=noise_std,
                losses=losses,
                **case,
            )
        assert_as_expected(assignment, scores if noise is None else scores + noise, **case)
        expected = expected_losses(scores.double(), None if noise is None else noise.double(), case, noise_std, losses)
        torch.testing.assert_close(assignment.losses.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def expected_losses(
    logits: Tensor, noise: Tensor | None, case: dict[str, Any], noise_std: float, losses: Any
) -> Tensor:
    """[4, G] by the functions of routing_losses."""

    def gates(scores: Tensor) -> Tensor:
        return scores.sigmoid() if case["gate"] == "sigmoid" else scores.softmax(-1)

    scores = logits if noise is None else logits + noise
    values = {
        "importance": lambda: importance_loss(gates(logits)),
        "load": lambda: load_loss(logits, noise, top_k=case["top_k"], noise_std=noise_std),
        "gshard": lambda: gshard_loss(gates(scores), first=scores.argmax(-1)),
        "z": lambda: router_z_loss(logits),
    }
    none = logits.new_zeros(logits.shape[0])
    return torch.stack([values[name]() if name in losses else none for name in LOSSES])


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
    assert torch.autograd.gradcheck(lambda *inputs: differentiable(route(*inputs, **case))[:2], (logits, noise))


@every_gate
@every_noise
def test_gradcheck_of_the_losses(gate, noise_kind, device):
    logits = random_logits(2, 8, 5, device=device).requires_grad_()
    noise, case = training_case(gate, noise_kind, logits.detach())
    inputs = (logits,) if noise is None else (logits, noise.requires_grad_())
    assert torch.autograd.gradcheck(lambda *inputs: differentiable(route(*inputs, **case)), inputs)


@every_gate
@every_noise
@pytest.mark.parametrize("shape", [(2, 37, 8), (1, 1100, 5), (3, 20, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_call_is_as_exact_as_pytorch(gate, noise_kind, shape, dtype, kernel_device):
    """Values within twice, gradients within three times the error of the reference in the same precision."""
    logits = random_logits(*shape, dtype=torch.float32).double()
    noise, case = training_case(gate, noise_kind, logits)
    noise = None if noise is None else noise.float().double()

    def run(backend: str, device: str, dtype: torch.dtype) -> tuple[Assignment, list[Tensor]]:
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in (logits, noise) if x is not None]
        arguments = {name: value.to(device) if name == "seed" else value for name, value in case.items()}
        with use_backend(route=backend):
            assignment = route(*inputs, **arguments)
        outputs = differentiable(assignment)
        weights = [random_logits(*output.shape, seed=n).to(output) for n, output in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, inputs, weights)
        return assignment, [tensor.detach().cpu().double() for tensor in (*outputs, *gradients)]

    found, found_values = run(kernel_device, kernel_device, dtype)
    _, same_precision = run("reference", "cpu", dtype)
    exact, exact_values = run("reference", "cpu", torch.float64)
    for name in INDICES:
        assert torch.equal(getattr(found, name).cpu(), getattr(exact, name)), name
    for number, (value, other, true) in enumerate(zip(found_values, same_precision, exact_values, strict=True)):
        # In float64 the reference is its own truth: some units in the last place of the largest intermediate number.
        floor = (4 if dtype == torch.float32 else 100) * torch.finfo(dtype).eps * max(1.0, true.abs().max().item())
        allowed = (2 if number < 3 else 3) * (other - true).abs().max().item() + floor
        assert (value - true).abs().max().item() <= allowed, number


@every_gate
@pytest.mark.parametrize("name", LOSSES)
def test_one_loss_alone(gate, name, device):
    """The others are zero, and leave no gradient."""
    logits = random_logits(2, 23, 8, device=device).requires_grad_()
    noise, case = training_case(gate, "given", logits.detach(), losses=(name,))
    assignment = route(logits, noise, **case)
    exact = logits.detach().cpu().requires_grad_()
    expected = expected_losses(exact, noise.cpu(), case, NOISE_STD, case["losses"])
    assert ("load" in case["losses"]) == (name == "load" and gate != "experts_choose")
    torch.testing.assert_close(assignment.losses.cpu(), expected, rtol=1e-12, atol=0)
    if not case["losses"]:
        assert gate == "experts_choose"
        return
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad((assignment.losses * weights.to(device)).sum(), logits)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-10, atol=1e-15)


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 700, 8), (3, 7, 5), (1, 1, 1), (1, 3, 256)], ids=str)
def test_noise_of_a_seed_is_that_of_philox(gate, dtype, shape, device):
    logits = random_logits(*shape, dtype=dtype, device=device)
    for number in (0, -1, 2**63 - 1):
        seed = torch.tensor([number], device=device)
        case = {"top_k": 1, "gate": gate, "capacity": 1 if gate == "experts_choose" else None}
        found = route(logits, seed=seed, noise_std=0.7, losses=("gshard",), **case)
        noise = 0.7 * philox_normal(seed.cpu(), shape, torch.float64)
        expected = route_reference(logits.cpu().double(), noise, losses=("gshard",), **case)
        for name in INDICES:
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-14}
        torch.testing.assert_close(found.gates.cpu().double(), expected.gates, **tolerance)
        tolerance["atol"] *= 10
        torch.testing.assert_close(found.losses.cpu().double(), expected.losses, **tolerance)


def test_first_choices_of_the_gshard_loss_go_by_score(device):
    """Of scores whose gates are rounded to the same number, too."""
    logits = torch.tensor([[[40.0, 50.0]] * 3 + [[1.0, 0.0]]], device=device)
    (loss,) = route(logits, top_k=1, gate="sigmoid", losses=("gshard",)).losses[2].tolist()
    first, second = (3 + 0.7310585786300049) / 4, (3 + 0.5) / 4
    assert loss == pytest.approx(2 * (0.25 * first + 0.75 * second), rel=1e-6)


@pytest.mark.parametrize("gate", ["softmax_top_k", "sigmoid"])
def test_all_experts_chosen(gate, device):
    """k = E: the threshold of the load loss is the smallest score, and every expert has a row of every token."""
    logits = random_logits(2, 9, 8, device=device).requires_grad_()
    noise = NOISE_STD * random_logits(2, 9, 8, seed=1, device=device)
    assignment = route(logits, noise, top_k=8, gate=gate, noise_std=NOISE_STD, losses=("load",))
    assert assignment.offsets.tolist() == [18 * e for e in range(9)]
    assert assignment.token.view(8, 18).sort().values.tolist() == [list(range(18))] * 8
    expected = load_loss(logits, noise, top_k=8, noise_std=NOISE_STD)
    torch.testing.assert_close(assignment.losses[1], expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(assignment.losses[1].sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-16)


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
    assignment = route(
        logits,
        top_k=2,
        capacity=4,
        batch_priority=True,
        losses=LOSSES,
        seed=torch.tensor(1, device=device),
        noise_std=1.0,
    )
    assert assignment.token.numel() == assignment.place.numel() == assignment.gates.numel() == 0
    assert assignment.offsets.tolist() == [0, 0, 0, 0]
    assert assignment.losses.tolist() == [[0.0] * (shape[0] if len(shape) == 3 else 1)] * 4
    (grad,) = torch.autograd.grad(assignment.weight.sum() + assignment.gates.sum() + assignment.losses.sum(), logits)
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


@every_gate
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("noise_kind", ["none", "seed"])
def test_values_that_are_not_finite_leave_other_tokens_alone(gate, bad, noise_kind, device):
    clean = random_logits(2, 40, 8, device=device, dtype=torch.float32)
    _, case = training_case(gate, noise_kind, clean)
    case["capacity"] = 40  # drops nothing
    logits = clean.clone()
    logits[0, 3, 2] = bad
    logits[0, 11] = bad
    logits.requires_grad_()
    result, expected = route(logits, **case), route(clean, **case)
    others = torch.ones(80, dtype=torch.bool, device=device)
    others[[3, 11]] = False
    assert torch.equal(result.gates.flatten(0, 1)[others], expected.gates.flatten(0, 1)[others])
    assert torch.equal(result.losses[:, 1], expected.losses[:, 1])  # of the other group
    for name, limit in (("token", 80), ("expert", 8), ("offsets", result.token.numel() + 1)):
        indices = getattr(result, name)
        assert indices.min() >= 0 and indices.max() < limit, name
    assert result.place.min() >= -1 and result.place.max() < result.token.numel()
    (grad,) = torch.autograd.grad(result.weight[result.weight.isfinite()].sum(), logits)
    assert grad.flatten(0, 1)[others].isfinite().all()


def test_debug_says_where_a_score_is_not_finite(device):
    logits = random_logits(2, 9, 4, device=device)
    logits[1, 2, 3] = float("nan")
    route(logits, top_k=2)
    with debug(), pytest.raises(M2MKDError, match=r"routing scores .* not finite .*\[1, 2, 3\]"):
        route(logits, top_k=2)
    with debug(), pytest.raises(M2MKDError, match="routing scores"):
        route(torch.zeros_like(logits), logits, top_k=2)


@every_gate
def test_outputs_do_not_depend_on_what_was_in_their_memory(gate, kernel_device):
    logits = random_logits(2, 300, 8, device=kernel_device, dtype=torch.float32).requires_grad_()
    _, case = training_case(gate, "seed", logits.detach())
    case["capacity"] = 40

    def everything() -> list[Tensor]:
        assignment = route(logits, **case)
        value = sum(tensor.square().sum() for tensor in differentiable(assignment))
        return [*assignment, torch.autograd.grad(value, logits)[0]]

    expected = [tensor.detach().clone() for tensor in everything()]
    for poison in (float("nan"), 1e30):
        for _ in range(2):
            poisoned = [torch.full_like(tensor, poison) for tensor in expected if tensor.is_floating_point()]
            poisoned += [torch.full_like(tensor, 2**40) for tensor in expected if not tensor.is_floating_point()]
            del poisoned
            for tensor, first in zip(everything(), expected, strict=True):
                assert torch.equal(tensor, first)


@every_gate
def test_forty_calls_have_the_same_bits(gate, kernel_device):
    logits = random_logits(2, 1500, 8, device=kernel_device, dtype=torch.float32).requires_grad_()
    _, case = training_case(gate, "seed", logits.detach())
    threads, first = torch.get_num_threads(), None
    try:
        for number in range(40):
            torch.set_num_threads(1 + number % 2)
            assignment = route(logits, **case)
            value = sum(tensor.square().sum() for tensor in differentiable(assignment))
            run = [*assignment, torch.autograd.grad(value, logits)[0]]
            first = first or run
            for tensor, expected in zip(run, first, strict=True):
                assert torch.equal(tensor, expected)
    finally:
        torch.set_num_threads(threads)


def test_evaluation_takes_no_autograd_function(monkeypatch, kernel_device):
    logits = random_logits(1, 9, 4, device=kernel_device)
    expected = route(logits, top_k=2)
    monkeypatch.setattr(route_module, "_Route", None)
    with torch.no_grad():
        found = route(logits, top_k=2)
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)


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


@every_gate
@pytest.mark.parametrize("noise_kind", ["none", "seed"])
def test_private_ops_are_sound(gate, noise_kind, kernel_device):
    logits = random_logits(2, 9, 6, device=kernel_device)
    noise, case = training_case(gate, noise_kind, logits, losses=LOSSES if noise_kind == "seed" else ())
    noise_std, top_k = case.get("noise_std", 0.0), 0 if gate == "experts_choose" else 2
    wanted = sum(1 << LOSSES.index(name) for name in case["losses"])
    arguments = (logits, noise, case.get("seed"), noise_std, top_k, gate, case["capacity"], False, wanted)
    torch.library.opcheck(torch.ops.m2mkd_fast._route_forward.default, arguments)
    outputs = torch.ops.m2mkd_fast._route_forward(*arguments)
    assignment, saved = Assignment(*outputs[:7]), outputs[7:]
    gradients = differentiable(assignment) if wanted else (assignment.weight, None, None)
    tensors = (*gradients, logits, assignment.gates, assignment.place, *saved)
    for need_noise in (False, True):
        torch.library.opcheck(
            torch.ops.m2mkd_fast._route_backward.default, (*tensors, noise_std, gate, wanted, need_noise)
        )


@every_gate
@every_noise
def test_backward_op_is_the_gradient_of_the_reference(gate, noise_kind, kernel_device):
    logits = random_logits(2, 9, 6, device=kernel_device)
    noise, case = training_case(gate, noise_kind, logits)
    noise_std, top_k = case.get("noise_std", 0.0), 0 if gate == "experts_choose" else 2
    wanted = sum(1 << LOSSES.index(name) for name in case["losses"])
    outputs = torch.ops.m2mkd_fast._route_forward(
        logits, noise, case.get("seed"), noise_std, top_k, gate, case["capacity"], False, wanted
    )
    assignment, saved = Assignment(*outputs[:7]), outputs[7:]
    if noise_kind == "seed":
        noise = noise_std * philox_normal(case["seed"], tuple(logits.shape), logits.dtype)
    gradients = [random_logits(*tensor.shape, seed=3).to(tensor) for tensor in differentiable(assignment)]
    for used in ((0,), (1,), (2,), (0, 1, 2)):
        chosen = [tensor if n in used else None for n, tensor in enumerate(gradients)]
        found = torch.ops.m2mkd_fast._route_backward(
            *chosen, logits, assignment.gates, assignment.place, *saved, noise_std, gate, wanted, True
        )
        expected = route_backward_reference(
            *chosen,
            logits,
            noise,
            assignment,
            saved[0],
            top_k=top_k,
            gate=gate,
            noise_std=noise_std,
            losses=case["losses"],
        )
        for tensor, other in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gate", ["sigmoid", "experts_choose"])
def test_training_call_compiles_as_one_graph(gate, kernel_device):
    logits = random_logits(2, 12, 6, device=kernel_device)
    _, case = training_case(gate, "seed", logits)
    check_compiled(case, kernel_device, "aot_eager")


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
        value = assignment.weight.square().sum() + assignment.gates[..., 0].sum() + assignment.losses.sum()
        return value, assignment

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
    assert torch.autograd.gradgradcheck(lambda logits: differentiable(route(logits, **case)), (logits,))


@every_gate
@every_noise
def test_second_derivatives_of_the_losses(gate, noise_kind, device):
    logits = random_logits(2, 6, 4, device=device).requires_grad_()
    noise, case = training_case(gate, noise_kind, logits.detach())
    inputs = (logits,) if noise is None else (logits, noise.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *inputs: differentiable(route(*inputs, **case)), inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoids"}, "unknown gate 'sigmoids'"),
        ({"losses": ("zloss",)}, "unknown loss 'zloss'"),
        ({"losses": ("load",)}, "load loss needs noise and its noise_std"),
        ({"losses": ("load",), "noise": torch.zeros(5, 4)}, "load loss needs noise and its noise_std"),
        ({"losses": ("load",), "gate": "experts_choose", "capacity": 2}, "load loss is defined where tokens choose"),
        ({"noise_std": 0.1}, "noise_std is 0.1, but there is no noise"),
        ({"noise_std": -0.1}, "noise_std is -0.1; it must be a finite number"),
        ({"noise_std": float("inf")}, "noise_std is inf"),
        ({"seed": torch.tensor(1)}, "noise_std is 0, so seed would draw no noise"),
        ({"seed": torch.tensor(1), "noise": torch.zeros(5, 4), "noise_std": 1.0}, "two sources of noise"),
        ({"seed": torch.tensor(1.0), "noise_std": 1.0}, "torch.float32, on cpu; expected one int64 number on cpu"),
        ({"seed": torch.tensor([1, 2]), "noise_std": 1.0}, r"seed has shape \(2,\)"),
        ({"noise": torch.zeros(5, 4, dtype=torch.int64)}, "noise is torch.int64 on cpu"),
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
