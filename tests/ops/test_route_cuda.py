"""The CUDA kernels of `route`: run on the CPU by an imitation of blocks and warps, and on a GPU where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import CudaOnCpu, load_cuda_on_cpu
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.philox import philox_normal
from m2mkd_fast.ops.route import LOSSES, Assignment, route, route_backward_reference, route_reference

pytestmark = pytest.mark.timeout(300)  # a compiler runs
ROOT = Path(__file__).parents[2]

# Settings that reach every branch of the kernels. "noise" is "given", "seed" or missing; losses are named.
CASES: dict[str, dict[str, Any]] = {
    "dropless": {"top_k": 2},
    "top_1": {"top_k": 1, "capacity": 5, "noise": "given", "losses": ("load",)},
    "v_moe": {"top_k": 2, "capacity": 9, "noise": "seed", "losses": LOSSES},
    "batch_priority": {"top_k": 2, "capacity": 4, "batch_priority": True, "losses": ("gshard", "z")},
    "top_8": {"top_k": 8, "capacity": 9, "batch_priority": True, "noise": "given", "losses": ("importance",)},
    "top_k_softmax": {"top_k": 3, "gate": "top_k_softmax", "capacity": 6, "noise": "seed", "losses": LOSSES},
    "top_k_softmax_dropless": {"top_k": 2, "gate": "top_k_softmax"},
    "sigmoid": {"top_k": 2, "gate": "sigmoid", "noise": "seed", "losses": LOSSES},
    "sigmoid_priority": {"top_k": 5, "gate": "sigmoid", "capacity": 7, "batch_priority": True, "losses": ("z",)},
    "experts_choose": {"gate": "experts_choose", "capacity": 7},
    "experts_choose_losses": {
        "gate": "experts_choose",
        "capacity": 20,
        "noise": "seed",
        "losses": ("importance", "gshard", "z"),
    },
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
NOISE_STD = 0.125


class Outputs(NamedTuple):
    """What the private op returns."""

    assignment: Assignment
    choice: Tensor
    threshold: Tensor
    slopes: Tensor
    softmax: Tensor


class Problem:
    """A case with its inputs, and the calls of the private ops and of the reference for it."""

    def __init__(self, logits: Tensor, case: dict[str, Any]) -> None:
        _, tokens, experts = logits.shape
        self.logits = logits
        self.gate, self.losses = case.get("gate", "softmax_top_k"), case.get("losses", ())
        self.top_k = min(case.get("top_k", 0), experts)
        capacity = case.get("capacity")
        self.capacity = None if capacity is None else min(capacity * (1 + tokens // 40), max(tokens, 1))
        self.batch_priority = case.get("batch_priority", False)
        kind = case.get("noise")
        self.noise_std = NOISE_STD if kind else 0.0
        self.noise = NOISE_STD * random_logits(*logits.shape, seed=9, like=logits) if kind == "given" else None
        self.seed = torch.tensor(2**40 + 12345, device=logits.device) if kind == "seed" else None

    @property
    def wanted(self) -> int:
        return sum(1 << number for number, name in enumerate(LOSSES) if name in self.losses)

    def forward(self, ops: torch._ops._OpNamespace) -> Outputs:
        outputs = ops._route_forward(
            self.logits,
            self.noise,
            self.seed,
            self.noise_std,
            self.top_k,
            self.gate,
            self.capacity,
            self.batch_priority,
            self.wanted,
        )
        return Outputs(Assignment(*outputs[:7]), *outputs[7:])

    def backward(
        self, ops: torch._ops._OpNamespace, gradients: tuple[Tensor | None, ...], outputs: Outputs
    ) -> tuple[Tensor, Tensor]:
        gates, place = outputs.assignment.gates, outputs.assignment.place
        return ops._route_backward(
            *gradients, self.logits, gates, place, *outputs[1:], self.noise_std, self.gate, self.wanted, True
        )

    def added_noise(self) -> Tensor | None:
        """In the precision of the logits, as the scores have it."""
        if self.seed is None:
            return self.noise
        return self.noise_std * philox_normal(self.seed, tuple(self.logits.shape), self.logits.dtype)

    def reference(self) -> Assignment:
        """In float64, of the noise in the precision of the logits."""
        noise = self.added_noise()
        return route_reference(
            self.logits.double(),
            None if noise is None else noise.double(),
            top_k=self.top_k,
            gate=self.gate,
            capacity=self.capacity,
            batch_priority=self.batch_priority,
            noise_std=self.noise_std,
            losses=self.losses,
        )

    def expected_gradients(self, gradients: tuple[Tensor | None, ...], outputs: Outputs) -> tuple[Tensor, Tensor]:
        """In float64, of the assignment that was made."""
        noise = self.added_noise()
        grad_weight, grad_gates, grad_losses = (None if g is None else g.double() for g in gradients)
        return route_backward_reference(
            grad_weight,
            grad_gates,
            grad_losses if self.losses else None,
            self.logits.double(),
            None if noise is None else noise.double(),
            outputs.assignment,
            outputs.choice,
            top_k=self.top_k,
            gate=self.gate,
            noise_std=self.noise_std,
            losses=self.losses,
        )


def random_logits(*shape: int, seed: int = 0, like: Tensor | None = None) -> Tensor:
    """Float64 on the CPU, or as `like` is."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits if like is None else logits.to(like)


def random_gradients(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """Of weight, gates and losses."""
    assignment, generator = outputs.assignment, torch.Generator().manual_seed(3)
    tensors = (assignment.weight, assignment.gates, assignment.losses)
    return tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors)


def assert_sound(problem: Problem, outputs: Outputs) -> None:
    """The assignment follows by plain loops from the gates, and from each token's choices, that were returned."""
    assignment, choice = outputs.assignment, outputs.choice.tolist()
    groups, tokens, experts = problem.logits.shape
    gates = assignment.gates.flatten(0, 1).double()
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(experts)]  # token, its column of place
    for g in range(groups):
        group = range(g * tokens, (g + 1) * tokens)
        if problem.gate == "experts_choose":
            for e in range(experts):
                best = gates[group, e].sort(descending=True, stable=True).indices[: problem.capacity].tolist()
                rows[e] += [(g * tokens + t, e) for t in best]
            continue
        order = list(group)
        if problem.batch_priority:
            priority = torch.stack([gates[t, choice[t][0]] for t in group])
            order = [group[i] for i in priority.sort(descending=True, stable=True).indices.tolist()]
        full = [problem.capacity + len(rows[e]) if problem.capacity else None for e in range(experts)]
        for k in range(problem.top_k):
            for t in order:
                e = choice[t][k]
                if full[e] is None or len(rows[e]) < full[e]:
                    rows[e].append((t, k))
    place = torch.full_like(assignment.place, -1, device="cpu")
    in_order = [(e, *row) for e in range(experts) for row in rows[e]]
    for number, (_, t, column) in enumerate(in_order):
        place[t, column] = number
    dropped = assignment.token.numel() - len(in_order)
    assert assignment.place.tolist() == place.tolist()
    assert assignment.expert.tolist() == [e for e, _, _ in in_order] + [experts - 1] * dropped
    assert assignment.token.tolist() == [t for _, t, _ in in_order] + [0] * dropped
    assert assignment.weight.tolist() == [gates[t, e].item() for e, t, _ in in_order] + [0.0] * dropped
    ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
    assert assignment.offsets.tolist() == [0, *ends]


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: {error} of {scale}"


def check_against_reference(problem: Problem, ops: torch._ops._OpNamespace) -> None:
    outputs = problem.forward(ops)
    assignment, expected = outputs.assignment, problem.reference()
    tolerance = 1e-13 if problem.logits.dtype == torch.float64 else 4e-6
    noise = problem.added_noise()
    scores = problem.logits if noise is None else problem.logits + noise
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : problem.top_k].flatten(0, 1)
    agree = (outputs.choice == best).all(dim=-1)
    # The noise that kernels draw may differ in its last bit, and so tell apart, or swap, what is nearly a tie.
    assert agree.all() if problem.seed is None else agree.double().mean() > 0.999
    assert_sound(problem, outputs)
    assert_close(assignment.gates.flatten(0, 1)[agree], expected.gates.flatten(0, 1)[agree], "gates", tolerance)
    # Of a coefficient of variation the rounding of the probabilities is a larger part.
    assert_close(assignment.losses, expected.losses, "losses", 4 * tolerance)

    every = random_gradients(outputs)
    for names in ((0,), (1,), (2,), (0, 1, 2)):
        gradients = tuple(gradient if number in names else None for number, gradient in enumerate(every))
        for name, actual, exact in zip(
            ("logits", "noise"),
            problem.backward(ops, gradients, outputs),
            problem.expected_gradients(gradients, outputs),
            strict=True,
        ):
            assert_close(actual, exact, f"gradient of {name} from {names}", 10 * tolerance)


@pytest.fixture(scope="module")
def imitation(tmp_path_factory) -> CudaOnCpu:
    """The CUDA kernels, run on the CPU by an imitation of thread blocks and warps."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return load_cuda_on_cpu(ROOT / "csrc/cuda/route.cu", tmp_path_factory.mktemp("route"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (70, 6), (300, 8), (129, 33), (40, 256)], ids=str)
@every_case
def test_imitation_agrees_with_reference(case, tokens, experts, dtype, imitation):
    logits = random_logits(3, tokens, experts).to(dtype)
    logits[1] = logits[1].round()  # many ties
    check_against_reference(Problem(logits, case), imitation.ops)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", range(1, 9))
def test_imitation_of_every_top_k(top_k, imitation):
    case = {"top_k": top_k, "capacity": 12, "batch_priority": top_k % 2 == 0, "noise": "seed", "losses": LOSSES}
    check_against_reference(Problem(random_logits(2, 50, 9), case), imitation.ops)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["batch_priority", "experts_choose"])
def test_imitation_of_groups_longer_than_a_block_sorts(name, dtype, imitation):
    logits = random_logits(3, 4100, 2).to(dtype)
    logits[1] = logits[1].round()
    logits[2, 17] = float("nan")
    problem = Problem(logits, {**CASES[name], "losses": ()})
    problem.capacity = 3000
    outputs = problem.forward(imitation.ops)
    expected = problem.reference().gates
    assert_close(outputs.assignment.gates.nan_to_num(7.0), expected.nan_to_num(7.0), "gates", 1e-6)
    outputs = outputs._replace(assignment=with_nan_as(2.0, outputs.assignment))  # plain loops compare by equality
    assert_sound(problem, outputs)


def with_nan_as(value: float, assignment: Assignment) -> Assignment:
    return assignment._replace(gates=assignment.gates.nan_to_num(value), weight=assignment.weight.nan_to_num(value))


@pytest.mark.slow
def test_imitation_launches_few_kernels(imitation):
    for name, (forward, backward) in {
        "dropless": (3, 1),
        "v_moe": (3, 1),
        "sigmoid": (3, 1),
        "top_8": (5, 1),
        "experts_choose": (3, 1),
        "experts_choose_losses": (4, 1),
    }.items():
        problem = Problem(random_logits(2, 300, 8), CASES[name])
        imitation.launches()
        outputs = problem.forward(imitation.ops)
        assert imitation.launches() == forward, name
        problem.backward(imitation.ops, random_gradients(outputs), outputs)
        assert imitation.launches() == backward, name


@pytest.mark.slow
@every_case
def test_imitation_gives_the_same_bits_in_another_order_and_in_poisoned_memory(case, imitation):
    logits = random_logits(3, 300, 9).float()

    def everything() -> list[Tensor]:
        problem = Problem(logits, case)
        outputs = problem.forward(imitation.ops)
        return [
            *outputs.assignment,
            *outputs[1:],
            *problem.backward(imitation.ops, random_gradients(outputs), outputs),
        ]

    first = everything()
    with imitation.backwards():
        backwards = everything()
    torch.use_deterministic_algorithms(True)  # with which empty tensors are filled with NaN and the largest integers
    try:
        poisoned = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, other, third in zip(first, backwards, poisoned, strict=True):
        assert torch.equal(tensor, other)
        assert torch.equal(tensor, third)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_imitation_with_values_that_are_not_finite(case, bad, imitation):
    logits = random_logits(2, 130, 6)
    logits[0, 3, 2] = bad
    logits[1, 7] = bad
    problem = Problem(logits, case)
    outputs, expected = problem.forward(imitation.ops), problem.reference()
    for name in ("token", "expert", "offsets", "place"):
        assert torch.equal(getattr(outputs.assignment, name), getattr(expected, name)), name
    assert torch.equal(outputs.assignment.gates.isnan(), expected.gates.isnan())
    assert torch.equal(outputs.assignment.losses.isfinite(), expected.losses.isfinite())
    grad_weight, grad_gates, _ = random_gradients(outputs)
    grad, _ = problem.backward(imitation.ops, (grad_weight, grad_gates, None), outputs)
    whole = torch.ones(2, 130, dtype=torch.bool)
    whole[0, 3] = whole[1, 7] = False
    assert grad[whole].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_imitation_takes_no_tokens(shape, imitation):
    problem = Problem(torch.zeros(shape), {"top_k": 2, "capacity": 4, "batch_priority": True, "losses": LOSSES[2:]})
    outputs = problem.forward(imitation.ops)
    assert outputs.assignment.offsets.tolist() == [0, 0, 0, 0]
    assert outputs.assignment.losses.tolist() == [[0.0] * shape[0]] * 4
    grad_logits, grad_noise = problem.backward(imitation.ops, random_gradients(outputs), outputs)
    assert grad_logits.shape == grad_noise.shape == shape


@pytest.mark.slow
def test_imitation_takes_strided_tensors(imitation):
    dense = Problem(random_logits(2, 40, 8), CASES["top_1"])
    strided = Problem(dense.logits.repeat_interleave(2, -1)[..., ::2], CASES["top_1"])
    strided.noise = dense.noise.transpose(0, 1).contiguous().transpose(0, 1)
    outputs, expected = strided.forward(imitation.ops), dense.forward(imitation.ops)
    gradients = tuple(g.new_ones(1).expand(g.shape) for g in random_gradients(expected))
    results = (*outputs.assignment, *strided.backward(imitation.ops, gradients, outputs))
    gradients = tuple(g.contiguous() for g in gradients)
    for result, exact in zip(
        results, (*expected.assignment, *dense.backward(imitation.ops, gradients, expected)), strict=True
    ):
        assert torch.equal(result, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "top_k", "message"), [(257, 1, "up to 256 experts"), (12, 9, "up to 8 choices")])
def test_imitation_refuses_what_it_cannot_hold(experts, top_k, message, imitation):
    with pytest.raises(RuntimeError, match=message):
        Problem(torch.zeros(1, 4, experts), {"top_k": top_k}).forward(imitation.ops)


@pytest.fixture
def cuda_backend() -> Iterator[None]:
    with use_backend(route="cuda"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(1, 1), (70, 6), (1576, 8), (1300, 33), (700, 256), (4100, 3)],
    ids=lambda number: str(number),
)
@every_case
def test_gpu_agrees_with_reference(case, tokens, experts, dtype):
    logits = random_logits(3, tokens, experts).to("cuda", dtype)
    logits[1] = logits[1].round()
    check_against_reference(Problem(logits, case), torch.ops.m2mkd_fast)


@pytest.mark.gpu
@every_case
def test_gpu_repeats_bit_for_bit(case):
    problem = Problem(random_logits(4, 6000, 8).to("cuda", torch.float32), case)

    def everything() -> list[Tensor]:
        outputs = problem.forward(torch.ops.m2mkd_fast)
        gradients = problem.backward(torch.ops.m2mkd_fast, random_gradients(outputs), outputs)
        return [*outputs.assignment, *outputs[1:], *gradients]

    first = everything()
    for _ in range(40):
        for tensor, expected in zip(everything(), first, strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("tokens", [1576, 6000])
def test_gpu_graph_follows_the_routing(case, tokens, cuda_backend):
    """A captured call, replayed with other logits and another seed, gives what a call gives."""
    case = dict(case)
    noise, losses = case.pop("noise", None), case.get("losses", ())
    options = {"top_k": 1, **case, "noise_std": NOISE_STD if noise else 0.0}
    logits = torch.zeros(2, tokens, 8, device="cuda", requires_grad=True)
    given = torch.zeros_like(logits) if noise == "given" else None
    seed = torch.tensor(0, device="cuda") if noise == "seed" else None

    def call() -> list[Tensor]:
        assignment = route(logits, given, seed=seed, **options)
        value = assignment.weight.square().sum() + assignment.gates[..., 0].sum() + assignment.losses.sum()
        return [*assignment, *torch.autograd.grad(value, logits)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for number in range(3):
        with torch.no_grad():
            logits.copy_(random_logits(2, tokens, 8, seed=number))
            if given is not None:
                given.copy_(NOISE_STD * random_logits(2, tokens, 8, seed=10 + number))
            if seed is not None:
                seed.fill_(number)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for tensor, expected in zip(replayed, call(), strict=True):
            assert torch.equal(tensor, expected)
    assert losses == () or captured[6].count_nonzero() > 0


@pytest.mark.gpu
def test_gpu_counts_elements_beyond_32_bits():
    """More than 2^31 gates: 9 million tokens of 256 experts, in groups."""
    groups, tokens, experts = 64, 140_000, 256
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    logits = torch.zeros(groups, tokens, experts, device="cuda")
    logits[..., 3] = 1.0
    logits[-1, -1, 200] = 2.0
    with use_backend(route="cuda"):
        assignment = route(logits, top_k=1, capacity=5, losses=("importance",))
    assert assignment.offsets[-1].item() == 5 * groups + 1
    assert assignment.place[-1].item() == 5 * groups
    assert assignment.token[5 * groups].item() == groups * tokens - 1
    assert assignment.expert[5 * groups].item() == 200
    torch.testing.assert_close(assignment.losses[0, 0], assignment.losses[0, 1])
