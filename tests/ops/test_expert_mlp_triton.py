"""The Triton kernels of expert_mlp: on a GPU, and in Triton's interpreter on the CPU (see triton_interpreter)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_interpreter import (
    DEVICES,
    INTERPRETED,
    as_a_gpu_does,
    in_another_process,
    needs_triton,
    run_in_the_interpreter,
)
from triton_resources import resource_usage

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.expert_mlp import expert_mlp, expert_mlp_reference, expert_mlp_torch
from m2mkd_fast.ops.route import Assignment, route

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["gelu", "gelu_tanh", "geglu", "swiglu"]
NAMES = ["out", "x", "weight", "up_weight", "up_bias", "down_weight", "down_bias"]


class Case(NamedTuple):
    tokens: int
    experts: int
    width: int
    hidden: int
    outputs: int
    routing: str = "two of all"


ODD = Case(9, 3, 5, 7, 3)
TILES = Case(20, 2, 18, 20, 17)  # two small tiles in every direction
CASES = {
    "odd": ODD,
    "several tiles": TILES,
    "one expert": Case(5, 1, 4, 6, 4, "one of all"),
    "one of each": Case(1, 1, 1, 1, 1, "one of all"),
    "all to one expert": Case(33, 4, 5, 6, 3, "one of one"),
    "empty experts": Case(9, 6, 6, 5, 4, "two of two"),
    "dropped": Case(16, 3, 5, 7, 3, "dropped"),
    "experts choose": Case(14, 3, 5, 7, 3, "experts choose"),
    "many experts": Case(5, 33, 4, 5, 3),
    "no tokens": Case(0, 3, 5, 7, 3),
}
PUBLISHED = {
    "V-MoE-B/16, 32 images": Case(32 * 197, 8, 768, 3072, 768),
    "V-MoE-S/32": Case(128 * 50, 8, 512, 2048, 512),
    "uneven": Case(1000, 7, 200, 333, 130),
    "all to one expert": Case(4000, 8, 384, 1536, 384, "one of one"),
    "dropped": Case(4000, 8, 384, 1536, 384, "dropped"),
    "experts choose": Case(4000, 32, 384, 1536, 384, "experts choose"),
}

pytestmark = needs_triton


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_run_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=len(CASES) + len(ACTIVATIONS) + 10)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    with as_a_gpu_does():
        yield


@pytest.fixture
def small_tiles(device, monkeypatch) -> None:
    """Several tiles, and several pieces of an expert, at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import expert_mlp as kernels

    tiles = dict.fromkeys(kernels.KERNELS, kernels.Tile(16, 16, 16, 2, 2, 1 if INTERPRETED else 4, 2, 1))
    tiles["up"] = tiles["up"]._replace(slices=4)
    tiles["down"] = tiles["down"]._replace(slices=1)
    monkeypatch.setattr(kernels, "tiles_of", lambda architecture, half: tiles)
    monkeypatch.setattr(kernels, "_SHORTEST_PIECE", 16)
    monkeypatch.setattr(kernels, "_SUM_TILES", 2)


class Inputs(NamedTuple):
    x: Tensor
    assignment: Assignment
    parameters: list[Tensor | None]
    grad: Tensor
    seed: Tensor

    def double(self) -> Inputs:
        assignment = self.assignment._replace(weight=self.assignment.weight.double())
        parameters = [None if tensor is None else tensor.double() for tensor in self.parameters]
        return Inputs(self.x.double(), assignment, parameters, self.grad.double(), self.seed)


def assignment_of(tokens: int, experts: int, routing: str, device: str = "cpu", seed: int = 0) -> Assignment:
    logits = torch.randn(1, tokens, experts, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"top_k": min(experts, 2)}
    if routing == "one of all":
        options["top_k"] = 1
    elif routing == "one of one":
        options["top_k"], logits[..., experts // 2] = 1, 20.0
    elif routing == "two of two":
        logits[..., 1], logits[..., experts - 2] = 20.0, 10.0
    elif routing == "dropped":
        options["capacity"] = max(tokens // 4, 4)
    elif routing == "experts choose":
        options |= {"gate": "experts_choose", "capacity": max(tokens // 8, 4)}
    with use_backend(route="reference"):
        assignment = route(logits, **options)
    return Assignment(*(tensor.to(device) for tensor in assignment))


def random_inputs(
    case: Case, activation: str = "gelu", dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = True
) -> Inputs:
    generator = torch.Generator().manual_seed(case.tokens + 10 * case.width)
    made = case.hidden * (2 if activation in ("geglu", "swiglu") else 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parameters = [
        random(case.experts, made, case.width) * case.width**-0.5,
        random(case.experts, made) if bias else None,
        random(case.experts, case.outputs, case.hidden) * case.hidden**-0.5,
        random(case.experts, case.outputs) if bias else None,
    ]
    x, grad = random(case.tokens, case.width).to(device, dtype), random(case.tokens, case.outputs).to(device, dtype)
    assignment = assignment_of(case.tokens, case.experts, case.routing, device)
    parameters = [None if tensor is None else tensor.to(device, dtype) for tensor in parameters]
    return Inputs(x, assignment, parameters, grad, torch.tensor(0x1234567890ABCDEF, device=device))


def everything(function: Any, inputs: Inputs, **options: Any) -> list[Tensor | None]:
    """The output and the gradients of x, of the rows' weights and of the parameters, in the order of NAMES."""
    leaves = [inputs.x, inputs.assignment.weight, *inputs.parameters]
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in leaves]
    x, weight, *parameters = leaves
    out = function(x, inputs.assignment._replace(weight=weight), *parameters, seed=inputs.seed, **options)
    there = [tensor for tensor in leaves if tensor is not None]
    gradients = iter(torch.autograd.grad(out, there, inputs.grad))
    return [out.detach(), *(None if tensor is None else next(gradients) for tensor in leaves)]


def on_triton(inputs: Inputs, **options: Any) -> list[Tensor | None]:
    with use_backend(expert_mlp="triton"):
        return everything(expert_mlp, inputs, **options)


def assert_as_exact_as_pytorch(inputs: Inputs, pytorch: Any = expert_mlp_reference, **options: Any) -> None:
    """At most three times PyTorch's error at this precision, plus two roundings of the largest number.

    On small tensors PyTorch's largest error can be much below what rounding may do, by luck.
    """
    found, same = on_triton(inputs, **options), everything(pytorch, inputs, **options)
    exact = everything(pytorch, inputs.double(), **options)
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=True):
        if truth is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        limit = 3 * allowed + 2 * torch.finfo(inputs.x.dtype).eps * truth.abs().max()
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_pytorchs(case, device, small_tiles):
    assert_as_exact_as_pytorch(random_inputs(case, device=device))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_with_the_tiles_of_the_table(activation, bias, device):
    inputs = random_inputs(ODD, activation, device=device, bias=bias)
    assert_as_exact_as_pytorch(inputs, activation=activation, dropout=(0.3, 0.2))


@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "gelu"), (torch.float16, "swiglu")])
def test_half_precisions(dtype, activation, device, small_tiles):
    assert_as_exact_as_pytorch(random_inputs(TILES, activation, dtype, device), activation=activation)


@pytest.mark.parametrize("case", ["several tiles", "dropped", "experts choose"])
def test_dropout_drops_what_philox_says(case, device, small_tiles):
    """The masks of the reference are those of philox_keep: a single other one would be an error of the size of 1."""
    assert_as_exact_as_pytorch(random_inputs(CASES[case], device=device), dropout=(0.6, 0.25))


@pytest.mark.parametrize("dropout", [(0.5, 0.0), (0.0, 0.5)], ids=["hidden", "outputs"])
def test_dropout_in_one_place(dropout, device):
    assert_as_exact_as_pytorch(random_inputs(ODD, device=device), dropout=dropout)


@pytest.mark.parametrize("probability", [2.0**-40, 2.0**-32, 1.0 - 2.0**-40], ids=["none", "one in 2^32", "all"])
def test_dropout_of_almost_none_and_almost_all(probability, device):
    assert_as_exact_as_pytorch(random_inputs(ODD, device=device), dropout=(probability, probability))


def test_results_repeat_bit_for_bit(device, small_tiles, monkeypatch):
    from m2mkd_fast.kernels import expert_mlp as kernels

    inputs = random_inputs(TILES, device=device)
    first = on_triton(inputs)
    for programs in (1, 7) if INTERPRETED else (1, 7, 132, *[264] * 50):  # nor does the size of the device matter
        monkeypatch.setattr(kernels, "_multiprocessors", lambda tensor, programs=programs: programs)
        assert_equal(on_triton(inputs), first)


def test_tensors_that_are_not_contiguous(device):
    inputs = random_inputs(ODD, device=device)
    expected = on_triton(inputs)

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, -1)[..., ::2]

    assignment = Assignment(*(spread(tensor) if tensor.dim() else tensor for tensor in inputs.assignment))
    parameters = [spread(tensor) for tensor in inputs.parameters]
    turned = Inputs(spread(inputs.x), assignment, parameters, spread(inputs.grad), inputs.seed)
    assert not any(tensor.is_contiguous() for tensor in (turned.x, turned.grad, assignment.place, *parameters))
    assert_equal(on_triton(turned), expected)
    wide = torch.full((2 * ODD.tokens, 2 * ODD.width), torch.nan, device=device)[::2, : ODD.width]
    assert_equal(on_triton(inputs._replace(x=wide.copy_(inputs.x))), expected)
    summed = inputs._replace(grad=torch.ones((), device=device).expand_as(inputs.grad))
    assert_equal(on_triton(summed), on_triton(summed._replace(grad=summed.grad.contiguous())))


def test_tail_of_dropped_rows_is_neither_read_nor_written(device, small_tiles):
    from m2mkd_fast.kernels import expert_mlp as kernels

    case = CASES["dropped"]
    inputs = random_inputs(case, device=device)
    token, expert, weight, offsets, place = inputs.assignment[:5]
    used = int(offsets[-1])
    assert used < token.shape[0]
    options = ("gelu", 0.2, 0.2, inputs.seed)
    poisoned_token, poisoned_weight = token.clone(), weight.clone()
    poisoned_token[used:], poisoned_weight[used:] = 2**50, torch.nan  # to read x there would be the end
    results = []
    for indices in ((token, expert, weight), (poisoned_token, expert, poisoned_weight)):
        forward = (inputs.x, *indices, offsets, place, *inputs.parameters)
        out, preactivation = kernels.forward(*forward, *options, True)
        assert preactivation[:used].isfinite().all()
        assert preactivation[used:].isnan().all()
        results.append([out, *kernels.backward(inputs.grad, preactivation, *forward, *options, True, True)])
    assert_equal(results[1], results[0])
    assert (results[0][2][used:] == 0).all()


def test_no_memory_of_a_wrong_row_reaches_another_expert(device, small_tiles):
    """NaN in one expert's matrices stays with the tokens that go there."""
    inputs = random_inputs(ODD, device=device)
    clean = on_triton(inputs)
    parameters = [tensor.clone() for tensor in inputs.parameters]
    for tensor in parameters:
        tensor[1] = torch.nan
    found = on_triton(inputs._replace(parameters=parameters))
    token, expert = inputs.assignment.token, inputs.assignment.expert
    touched = torch.zeros(ODD.tokens, dtype=torch.bool, device=device)
    touched[token[expert == 1]] = True
    for ours, before in zip(found[:2], clean[:2], strict=True):
        assert torch.equal(ours[~touched], before[~touched])
        assert ours[touched].isnan().all()
    for ours, before in zip(found[3:6], clean[3:6], strict=True):
        assert torch.equal(ours[[0, 2]], before[[0, 2]])
        assert ours[1].isnan().all()
    assert torch.equal(found[6], clean[6])


def test_only_what_is_needed(device):
    from m2mkd_fast.kernels import expert_mlp as kernels

    inputs = random_inputs(ODD, device=device)
    forward = (inputs.x, *inputs.assignment[:5], *inputs.parameters)
    options = ("gelu", 0.0, 0.0, None)
    out, preactivation = kernels.forward(*forward, *options, True)
    alone, nothing = kernels.forward(*forward, *options, False)
    assert torch.equal(alone, out)
    assert nothing.shape == (0,)
    everything_needed = kernels.backward(inputs.grad, preactivation, *forward, *options, True, True)
    for need_x, need_parameters in ((False, True), (True, False), (False, False)):
        found = kernels.backward(inputs.grad, preactivation, *forward, *options, need_x, need_parameters)
        for number, (ours, theirs) in enumerate(zip(found, everything_needed, strict=True)):
            if {0: need_x, 1: True}.get(number, need_parameters):
                assert torch.equal(ours, theirs)
            else:
                assert ours.shape == (0,)


def test_weights_may_be_double(device):
    inputs = random_inputs(ODD, device=device)
    found = on_triton(inputs._replace(assignment=inputs.assignment._replace(weight=inputs.assignment.weight.double())))
    expected = on_triton(inputs)
    assert found[2].dtype == torch.float64
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_private_ops_are_sound(activation, device):
    inputs = random_inputs(Case(4, 2, 3, 5, 2), activation, device=device)
    ops, options = torch.ops.m2mkd_fast, (activation, 0.1, 0.1, inputs.seed)
    forward = (inputs.x, *inputs.assignment[:5], *inputs.parameters)
    # Poisoned memory would make what nobody has written different from itself.
    torch.use_deterministic_algorithms(False)
    _, preactivation = ops._expert_mlp_triton_forward(*forward, *options, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._expert_mlp_triton_forward.default, (*forward, *options, True), test_utils=tests)
    for needed in ((True, True), (False, False)):
        backward = (inputs.grad, preactivation, *forward, *options, *needed)
        torch.library.opcheck(ops._expert_mlp_triton_backward.default, backward, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED.keys())
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_error_is_pytorchs_at_full_size(activation, case, dtype):
    inputs = random_inputs(case, activation, dtype, "cuda")
    assert_as_exact_as_pytorch(inputs, expert_mlp_torch, activation=activation)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_another_routing():
    """A graph of forward and backward is captured with one routing, and replayed with others."""
    case = Case(300, 5, 64, 128, 48, "dropped")
    inputs = random_inputs(case, dtype=torch.bfloat16, device="cuda")
    on_triton(inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = on_triton(inputs)
    for seed, routing in ((1, "dropped"), (2, "dropped"), (3, "two of two")):
        other = assignment_of(case.tokens, case.experts, routing, "cuda", seed)
        with torch.no_grad():
            for ours, theirs in zip(inputs.assignment[:5], other[:5], strict=True):
                ours.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, on_triton(inputs._replace(assignment=Assignment(*(t.clone() for t in inputs.assignment)))))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_tensors_with_offsets_beyond_32_bits():
    case = Case(40, 3, 64, 96, 48)
    inputs = random_inputs(case, dtype=torch.bfloat16, device="cuda")
    expected = on_triton(inputs)

    def far_apart(tensor: Tensor) -> Tensor:
        stride = 2**32 // case.tokens
        memory = torch.empty(stride * case.tokens, dtype=tensor.dtype, device="cuda")
        return memory.as_strided(tensor.shape, (stride, 1)).copy_(tensor)

    assert_equal(on_triton(inputs._replace(x=far_apart(inputs.x))), expected)
    assert_equal(on_triton(inputs._replace(grad=far_apart(inputs.grad))), expected)
    del inputs, expected
    # 1.2 million rows of 2048 hidden units are more than 2^31 numbers.
    large = random_inputs(Case(600_000, 4, 16, 2048, 16), dtype=torch.bfloat16, device="cuda")
    with use_backend(expert_mlp="triton"):
        found = expert_mlp(large.x, large.assignment, *large.parameters)[-1000:]
    rows = large.assignment.place[-1000:]
    small = Assignment(*(tensor.clone() for tensor in large.assignment))
    keep = torch.zeros_like(small.weight)
    keep[rows.flatten()] = small.weight[rows.flatten()]
    exact = torch.zeros(1000, 16, dtype=torch.float64, device="cuda")
    for choice in range(2):
        for one in range(4):
            mine = small.expert[rows[:, choice]] == one
            x = large.x[-1000:][mine].double()
            up, up_bias, down, down_bias = (tensor[one].double() for tensor in large.parameters)
            hidden = torch.nn.functional.gelu(x @ up.T + up_bias)
            exact[mine] += keep[rows[mine, choice]].double().unsqueeze(1) * (hidden @ down.T + down_bias)
    torch.testing.assert_close(found.double(), exact, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr("m2mkd_fast.ops.expert_mlp.expert_mlp_torch", None)
    inputs = random_inputs(ODD, device="cuda")
    assert expert_mlp(inputs.x, inputs.assignment, *inputs.parameters).shape == (ODD.tokens, ODD.outputs)


@in_another_process
def test_table_has_tiles_for_every_kernel():
    from m2mkd_fast.kernels import expert_mlp as kernels

    for half in (True, False):
        for architecture in (80, 90):
            assert tuple(kernels.tiles_of(architecture, half)) == kernels.KERNELS
        assert kernels.tiles_of(89, half) == kernels.tiles_of(80, half) == kernels.tiles_of(75, half)
        assert kernels.tiles_of(100, half) == kernels.tiles_of(90, half)
    for entry in json.loads(kernels.TABLE.read_text())["tiles"]:
        assert entry["measured"] is None or {"gpu", "versions", "commit", "milliseconds"} <= set(entry["measured"])


@in_another_process
def test_torch_is_preferred_where_it_was_measured_to_be_faster(monkeypatch):
    from m2mkd_fast.kernels import expert_mlp as kernels

    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    assert not kernels.prefers_torch(x, 50_000, 3072, 768, 8, False)
    sizes = {"architecture": 80, "half": True, "gated": False, "width": 768, "hidden": 3072, "outputs": 768}
    comparisons = [
        {**sizes, "rows_per_expert": 6000, "torch_ms": 1.0, "triton_ms": 2.0},
        {**sizes, "rows_per_expert": 60, "torch_ms": 2.0, "triton_ms": 1.0},
    ]
    monkeypatch.setattr(kernels, "_table", lambda: {"comparisons": comparisons})
    assert kernels.prefers_torch(x, 50_000, 3072, 768, 8, False)
    assert not kernels.prefers_torch(x, 1000, 3072, 768, 8, False)
    assert not kernels.prefers_torch(x, 50_000, 3072, 768, 8, True)
    assert not kernels.prefers_torch(x.float(), 50_000, 3072, 768, 8, False)
    assert not kernels.prefers_torch(x, 0, 3072, 768, 8, False)


@in_another_process
def test_pieces_and_tiles_fit_into_what_is_reserved():
    """The bounds that launches rely on, against routings of all kinds; nothing of this can be seen in a result."""
    from m2mkd_fast.kernels import expert_mlp as kernels

    generator = torch.Generator().manual_seed(0)
    for trial in range(300):
        experts = int(torch.randint(1, 20, (), generator=generator))
        tokens = int(torch.randint(1, 40_000, (), generator=generator))
        shares = torch.rand(experts, generator=generator) ** (trial % 7) + 1e-9
        counts = (shares / shares.sum() * tokens).floor().long()
        token, offsets = torch.zeros(tokens, dtype=torch.int64), torch.zeros(experts + 1, dtype=torch.int64)
        x, up = torch.zeros(1, 4), torch.zeros(experts, 4, 4)
        call = kernels._Call(x, token, x, offsets, token, up, up, "gelu", None, None)
        tile = call.tiles["grad_matrix"]
        piece, slots, pieces = call.pieces(tile)
        own = (counts + piece - 1) // piece
        assert own.clamp(min=1).sum() <= pieces
        assert own[own > 1].sum() <= slots
        assert ((counts + tile.rows - 1) // tile.rows).sum() <= call.row_tiles(tile.rows)
        assert piece % tile.step == 0


# Per multiprocessor, a KiB of each program for the system.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
V_MOE = Case(25_216, 8, 768, 3072, 768)


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", [True, False], ids=["half", "float32"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_products_compile_without_spills(architecture, half, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import expert_mlp as kernels

    for name in kernels.KERNELS:
        tile = kernels.tiles_of(architecture, half)[name]
        used = product_usage(name, V_MOE, "bf16" if half else "fp32", architecture, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (name, tile, used)
        assert used["SHARED"] <= SHARED_MEMORY[architecture] // tile.programs - 1024, (name, tile, used)
        assert used["REG"] * 32 * tile.warps * tile.programs <= 65536, (name, tile, used)


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_products_compile_with_odd_sizes_and_with_sizes_of_one(tmp_path, monkeypatch):
    """Triton makes an argument of 1 a constant, which is another kind of value while it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    ones = ("x_row", "grad_out_row", "left_row", "right_row", "row_count", "threshold", "counter")
    others = {**dict.fromkeys(ones, 1), "DROPOUT": True, "GATHERED": False, "KEPT": False, "SUM_BIAS": False}
    for name in ("up", "down", "grad_hidden", "grad_rows", "grad_matrix"):
        assert product_usage(name, Case(9, 3, 5, 7, 3), "fp16", 90, tmp_path, others)["REG"] > 0


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ones", [(), ("tokens", "rows", "width", "size", "grad_out_row", "counter", "threshold")])
def test_sums_compile_without_spills(ones, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import expert_mlp as kernels

    types = dict.fromkeys(("rows", "outputs", "grad_out", "bias", "dropped", "sums"), "*bf16")
    types |= dict.fromkeys(("weight", "row_weight", "along", "grad_bias", "parts", "grad"), "*fp32")
    types |= dict.fromkeys(("place", "token", "offsets", "seed"), "*i64") | {"counter": "i64", "scale": "fp32"}
    experts = {"EXPERTS": 8, "EXPERTS_BLOCK": 32}
    width, block = kernels._COMBINE_WIDTH, kernels._COMBINE_TOKENS
    tokens = {"WIDTH": 768, "TOKENS_BLOCK": block, "WIDTH_BLOCK": width}
    rows = {"WIDTH": 768, "HAS_BIAS": True, "ROWS": kernels._ROWS_BLOCK, "COLUMNS": kernels._ROWS_COLUMNS}
    tiles = {"ROWS": 128, "TILES": kernels._SUM_TILES, "COLUMNS": kernels._SUM_COLUMNS}
    launches = [
        (kernels.combine_kernel, {"CHOICES": 2, "WEIGHTED": True, **tokens}),
        (kernels.combine_kernel, {"CHOICES": 2, "WEIGHTED": False, **tokens}),
        (kernels.gradient_rows_kernel, {"DROPOUT": False, **rows, **experts}),
        (kernels.gradient_rows_kernel, {"DROPOUT": True, **rows, **experts}),
        (kernels.row_weight_kernel, {"EXPERTS": 8, "PARTS": 24, "HAS_BIAS": True, "ROWS": kernels._WEIGHT_ROWS}),
        (kernels.sum_tiles_kernel, {**tiles, **experts}),
        (kernels.sum_pieces_kernel, {"PIECE": 12_608, "BLOCK": kernels._SUM_BLOCK, **experts}),
    ]
    for kernel, constants in launches:
        numbers = {name: 1 for name in ones if name in kernel.arg_names and (name, kernel) != ("rows", launches[0][0])}
        own = {**types, "rows": "i32"} if kernel is kernels.row_weight_kernel else types
        for architecture in (80, 90):
            constants = {**constants, **numbers}
            used = resource_usage(kernel, own, constants, ("grad_out_row",), 4, architecture, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, (kernel.__name__, constants, used)


def product_usage(
    name: str, case: Case, element: str, architecture: int, folder: Any, others: dict[str, Any] | None = None
) -> dict[str, int]:
    """Registers and memory of a product, compiled as a call with biases would compile it, or with other constants."""
    from m2mkd_fast.kernels import expert_mlp as kernels

    tile = kernels.tiles_of(architecture, element != "fp32")[name]
    gated = "gated" in name
    total = case.hidden * (2 if gated else 1)
    experts = {"EXPERTS": case.experts, "EXPERTS_BLOCK": 32}
    walk = {**experts, **kernels._sizes(tile), "SLICES": tile.slices}
    epilogue = {"ACTIVATION": "geglu" if gated else "gelu", "GATED": gated, "DROPOUT": "dropout" in name}
    kernel, constants = {
        "up": (kernels.up_kernel, {"WIDTH": case.width, "HAS_BIAS": True, "KEPT": True, **epilogue, **walk}),
        "down": (
            kernels.product_kernel,
            {"INNER": case.hidden, "WIDTH": case.outputs, "TURNED": False, "HAS_BIAS": True, "DROPOUT": False, **walk},
        ),
        "grad_rows": (
            kernels.product_kernel,
            {"INNER": total, "WIDTH": case.width, "TURNED": True, "HAS_BIAS": False, "DROPOUT": False, **walk},
        ),
        "grad_hidden": (
            kernels.grad_hidden_kernel,
            {"OUTPUTS": case.outputs, "GATHERED": True, "SUM_BIAS": True, **epilogue, **walk},
        ),
        "grad_matrix": (
            kernels.grad_matrix_kernel,
            {
                "HEIGHT": case.hidden,
                "WIDTH": case.width,
                "GATHER_LEFT": False,
                "GATHER_RIGHT": True,
                "PIECE": 12_608,
                "SPLIT": True,
                **experts,
                **kernels._sizes(tile),
            },
        ),
    }[name.removesuffix("_gated").removesuffix("_dropout")]
    constants = {"HIDDEN": case.hidden, **constants, **(others or {})}
    options = constants.pop("num_warps"), constants.pop("num_stages")
    constants = {constant: value for constant, value in constants.items() if constant in kernel.arg_names}
    numbers = ("x_row", "grad_out_row", "left_row", "right_row", "row_count", "threshold")
    types = dict.fromkeys(kernel.arg_names, f"*{element}") | dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys(("token", "offsets", "seed"), "*i64") | {"counter": "i64", "scale": "fp32"}
    types |= dict.fromkeys(("row_weight", "grad_row_weight", "grad_bias", "parts"), "*fp32")
    aligned = numbers if case.width % 16 == 0 else ()
    return resource_usage(kernel, types, constants, aligned, options[0], architecture, folder, options[1])
