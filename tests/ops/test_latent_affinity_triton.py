"""The Triton kernels of latent_affinity: on a GPU, and in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So :func:`test_kernels_run_in_the_interpreter` runs this file
once more in a process of its own, where the tests below it get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from affinity_cases import CASES, arguments_of, assert_as_exact_as_reference, everything, random_distance
from triton_interpreter import DEVICES, INTERPRETED, in_another_process, needs_triton, run_in_the_interpreter

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.latent_kernel import DotProductKernel
from m2mkd_fast.ops.latent_affinity import (
    latent_affinity,
    latent_affinity_reference,
    signature_distance,
)
from m2mkd_fast.ops.philox import philox_uniform

# receivers, senders: a multiple of four edges or not, less than a block and several
SHAPES = [(1, 1), (5, 15), (4, 20)]
# batch, receivers, senders
PUBLISHED = {
    "tiny": (128, 256, 320),
    "tiny, read-out": (128, 64, 320),
    "imagenet": (32, 768, 960),
    "odd": (7, 333, 1001),
}

pytestmark = needs_triton
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kernels_run_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=len(SHAPES) * len(CASES))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(latent_affinity="triton"):
        yield request.param


@pytest.fixture
def small_blocks(device, monkeypatch) -> None:
    """Several blocks of edges and chunks of samples at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import latent_affinity as kernels

    monkeypatch.setattr(kernels, "_BLOCK", 64)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    monkeypatch.setattr(kernels, "_LONGEST_CHUNK", 2)


def bandwidth_on(device: str, value: float = 0.7) -> torch.Tensor:
    return torch.tensor(value, device=device)


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_the_references(case, shape, device, small_blocks):
    distance = random_distance(*shape, dtype=torch.float32).to(device)
    assert_as_exact_as_reference(distance, bandwidth_on(device), **arguments_of(case, distance, samples=5))


@pytest.mark.parametrize("bandwidth", [1e-3, 0.05, 30.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.3])
def test_error_is_the_references_where_probabilities_are_clamped(bandwidth, temperature, device):
    distance = random_distance(8, 40, dtype=torch.float32).to(device)
    case = {"truncation": 1.1, "temperature": temperature, "seed": True}
    assert_as_exact_as_reference(distance, bandwidth_on(device, bandwidth), **arguments_of(case, distance))


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_error_is_the_references_at_full_size(case, shape, device):
    samples, *edges = shape
    distance = random_distance(*edges, dtype=torch.float32).to(device)
    assert_as_exact_as_reference(distance, bandwidth_on(device), **arguments_of(case, distance, samples=samples))


@pytest.mark.golden_case("nac_sampled_affinity*")
def test_golden_samples(golden_case, read_golden, device):
    """In float32, as the kernels compute."""
    metadata, tensors = read_golden(golden_case)
    checked = 0
    for case, arguments in metadata.items():
        if f"{case}/out" not in tensors or arguments["truncation"] is not None:
            continue  # what leaks has the dtype's own probability
        receivers, senders, uniform, expected, grad = (
            tensors[f"{case}/{name}"]
            for name in ("receiver_signatures", "sender_signatures", "uniform", "out", "grad_out")
        )
        distance = signature_distance(receivers, senders)
        leaves = [
            distance.float().to(device).requires_grad_(),
            bandwidth_on(device, arguments["bandwidth"]).requires_grad_(),
        ]
        out = latent_affinity(
            *leaves,
            uniform=uniform.float().to(device),
            temperature=arguments["temperature"],
            normalize=arguments["normalize_dim"] == -1,
        )
        torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-5, atol=2e-5)
        grad_distance, grad_bandwidth = torch.autograd.grad(out, leaves, grad.float().to(device))
        signatures = receivers.requires_grad_(), senders.requires_grad_()
        found = torch.autograd.grad(signature_distance(*signatures), signatures, grad_distance.double().cpu())
        for name, gradient in zip(("receiver", "sender", "bandwidth"), (*found, grad_bandwidth), strict=True):
            right = tensors[f"{case}/grad_{name}"]
            error = (gradient.double().cpu() - right).abs().max()
            assert error <= 1e-5 * right.abs().max(), f"{case}/grad_{name}"
        checked += 1
    assert checked == 8


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (3, 4, 33)], ids=str)
def test_noise_has_the_same_bits_as_the_references(shape, device, small_blocks):
    samples, *edges = shape
    distance = random_distance(*edges, dtype=torch.float32).to(device)
    for number in (-1, 123456789123456789):
        seed = torch.tensor(number, device=device)
        uniform = philox_uniform(seed.cpu(), shape, torch.float32).to(device)
        case = {"truncation": 0.9, "temperature": 0.5}
        by_seed = everything(latent_affinity, distance, bandwidth_on(device), samples=samples, seed=seed, **case)
        given = everything(latent_affinity, distance, bandwidth_on(device), uniform=uniform, **case)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_seed, given, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_noise_has_the_same_bits_at_full_size(shape, device):
    samples, *edges = shape
    distance = random_distance(*edges, dtype=torch.float32).to(device)
    seed = torch.tensor(987654321987654321, device=device)
    uniform = philox_uniform(seed, shape, torch.float32)
    for case in ({"temperature": 0.5}, {"truncation": 0.9, "temperature": 0.7}):
        by_seed = everything(latent_affinity, distance, bandwidth_on(device), samples=samples, seed=seed, **case)
        given = everything(latent_affinity, distance, bandwidth_on(device), uniform=uniform, **case)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_seed, given, strict=True))


def test_samples_have_the_distribution_of_torch(device, monkeypatch):
    from m2mkd_fast.kernels import latent_affinity as kernels

    if INTERPRETED:
        monkeypatch.setattr(kernels, "_BLOCK", 4096)  # few programs: the interpreter takes its time for each
    torch.manual_seed(0)
    draws, probability = 20000, 0.3
    bandwidth = bandwidth_on(device, -1.0 / math.log(probability))
    seed = torch.tensor(5, device=device)
    for temperature in (0.5, 2.0):
        distance = torch.ones(100, draws // 100, device=device)
        out = latent_affinity(distance, bandwidth, samples=1, seed=seed, temperature=temperature)
        distribution = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), torch.tensor(probability))
        ours, theirs = out.exp().cpu().flatten().sort().values, distribution.sample((draws,)).sort().values
        # Two-sample Kolmogorov-Smirnov distance, bound for p = 0.001.
        levels = torch.cat([ours, theirs])
        ours, theirs = (torch.searchsorted(sample, levels, right=True) / draws for sample in (ours, theirs))
        assert (ours - theirs).abs().max() < 1.95 * math.sqrt(2 / draws)


@pytest.mark.parametrize("name", ["truncated", "seed"])
def test_results_repeat_bit_for_bit(name, device, small_blocks):
    distance = random_distance(3, 40, dtype=torch.float32).to(device)
    arguments = arguments_of(CASES[name], distance, samples=5)
    first = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
    for _ in range(1 if INTERPRETED else 50):
        again = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
        assert all(torch.equal(ours, once) for ours, once in zip(again, first, strict=True))


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_at_full_size(device):
    samples, *edges = PUBLISHED["imagenet"]
    distance = random_distance(*edges, dtype=torch.float32).to(device)
    arguments = arguments_of(CASES["seed"], distance, samples=samples)
    first = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
    for _ in range(20):
        again = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
        assert all(torch.equal(ours, once) for ours, once in zip(again, first, strict=True))


@pytest.mark.parametrize("name", ["truncated", "seed", "uniform"])
def test_tensors_that_are_not_contiguous(name, device, small_blocks):
    distance = random_distance(6, 10, dtype=torch.float32).to(device)
    arguments = arguments_of(CASES[name], distance)
    expected = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
    if "uniform" in arguments:
        arguments["uniform"] = arguments["uniform"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = everything(latent_affinity, distance.T.contiguous().T, bandwidth_on(device), **arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    leaf = distance.requires_grad_()
    out = latent_affinity(leaf, bandwidth_on(device), **arguments)
    row = torch.arange(10.0, device=device)
    (expanded,) = torch.autograd.grad(out, leaf, row.expand_as(out), retain_graph=True)
    (dense,) = torch.autograd.grad(out, leaf, row.expand_as(out).contiguous())
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("name", ["truncated", "threshold", "seed", "uniform"])
def test_nothing_to_do(name, device):
    for edges, samples in (((0, 5), 3), ((5, 0), 3), ((3, 4), 0)):
        distance = torch.zeros(edges, device=device)
        arguments = arguments_of(CASES[name], distance, samples=samples)
        out, *gradients = everything(latent_affinity, distance, bandwidth_on(device), **arguments)
        assert out.shape == (*([samples] if name in ("seed", "uniform") else []), *edges)
        assert name == "truncated" or all((gradient == 0).all() for gradient in gradients)


@every_case
def test_values_that_are_not_numbers_are_seen(case, device, small_blocks):
    distance = random_distance(3, 20, dtype=torch.float32)
    distance[1, 2] = distance[2, 19] = math.nan
    distance = distance.to(device)
    out = latent_affinity(distance, bandwidth_on(device), **arguments_of(case, distance))
    assert torch.equal(out.isnan(), distance.isnan().expand_as(out))


@pytest.mark.parametrize("bandwidth", [0.0, -0.5])
def test_bandwidths_that_are_not_positive_give_nan_where_they_cannot_be_looked_at(bandwidth, device):
    distance = random_distance(3, 20, dtype=torch.float32).to(device)
    for name in ("plain", "threshold", "seed, all edges", "seed, temperature 0.7"):
        arguments = arguments_of({**CASES[name], "truncation": None}, distance)
        options = (
            None,
            False,
            arguments.get("samples"),
            arguments.get("seed"),
            None,
            arguments.get("temperature", 1.0),
        )
        out = torch.ops.m2mkd_fast._latent_affinity_triton_forward(
            distance, bandwidth_on(device, bandwidth), *options, arguments.get("threshold"), False
        )
        assert out.isnan().all()


def test_gradients_of_gradients_are_the_references(device):
    distance = random_distance(4, 6, dtype=torch.float32).to(device)
    arguments = arguments_of(CASES["seed"], distance)

    def second(function: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
        leaves = distance.clone().requires_grad_(), bandwidth_on(device).requires_grad_()
        out = function(*leaves, **arguments).clamp(min=-50.0)
        return torch.autograd.grad(
            sum(gradient.square().sum() for gradient in torch.autograd.grad(out.sum(), leaves, create_graph=True)),
            leaves,
        )

    for ours, theirs in zip(
        second(latent_affinity, **arguments), second(latent_affinity_reference, **arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_other_dtypes_are_refused_by_name(device):
    distance = torch.zeros(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(M2MKDError, match="cannot run latent_affinity: the kernel knows float32, not torch.float64"):
        latent_affinity(distance, bandwidth_on(device))


@pytest.mark.parametrize("name", ["truncated", "threshold", "seed", "uniform"])
def test_private_ops_are_sound(name, device):
    distance, bandwidth = random_distance(5, 7, dtype=torch.float32).to(device), bandwidth_on(device)
    arguments = arguments_of(CASES[name], distance)
    noise = arguments.get("seed"), arguments.get("uniform"), arguments.get("temperature", 1.0)
    samples = 3 if name in ("seed", "uniform") else None
    checks = "test_schema", "test_faketensor"
    forward = (distance, bandwidth, 0.9, False, samples, *noise, arguments.get("threshold"), False)
    ops = torch.ops.m2mkd_fast
    torch.library.opcheck(ops._latent_affinity_triton_forward.default, forward, test_utils=checks)
    grad = ops._latent_affinity_triton_forward(*forward).clamp(-1.0)
    backward = (grad, distance, bandwidth, 0.9, False, *noise)
    torch.library.opcheck(ops._latent_affinity_triton_backward.default, backward, test_utils=checks)


def test_compiles_as_one_graph(device):
    torch._dynamo.reset()
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True).to(device)
    distance = random_distance(5, 7, dtype=torch.float32).to(device).requires_grad_()
    out = torch.compile(kernel, fullgraph=True, backend="aot_eager")(distance, batch_size=3)
    assert out.shape == (3, 5, 7)
    out.exp().sum().backward()
    assert distance.grad.isfinite().all()


@pytest.mark.gpu
def test_a_layer_does_not_wait_for_the_device(device):
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True).to(device)
    distance = random_distance(64, 96, dtype=torch.float32).to(device).requires_grad_()
    kernel(distance, batch_size=4).exp().sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(distance, batch_size=4).exp().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import latent_affinity as kernels

    sizes = {"BLOCK": kernels._BLOCK, "CHUNK": 8}
    for mode, exponent, leaky, aligned in (
        (kernels._PLAIN, 2, False, True),
        (kernels._BINARY, 2, False, True),
        (kernels._SEED, 2, False, True),
        (kernels._SEED, 2, True, True),
        (kernels._SEED, 0, False, True),
        (kernels._SEED, 2, False, False),
        (kernels._UNIFORM, 1, False, True),
    ):
        constants = {**sizes, "MODE": mode, "EXPONENT": exponent, "ALIGNED": aligned}
        variants = [(kernels.forward_kernel, {**constants, "LEAKY": leaky})]
        variants += [(kernels.sum_samples_kernel, constants)] if mode in (kernels._SEED, kernels._UNIFORM) else []
        for kernel, wanted in variants:
            used = resource_usage(kernel, wanted, aligned, kernels._NUM_WARPS, architecture, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, (kernel.__name__, wanted, used)
            if aligned:
                # Four edges to a thread from end to end: nothing is exchanged between threads.
                assert used["SHARED"] == 0, (kernel.__name__, wanted, used)
                assert used["REG"] <= 64, (kernel.__name__, wanted, used)
    for kernel, wanted in (
        (kernels.finish_kernel, {"SAMPLED": True, "BLOCK": kernels._BLOCK}),
        (kernels.bandwidth_kernel, {"BLOCK": kernels._BLOCK}),
    ):
        used = resource_usage(kernel, wanted, True, kernels._NUM_WARPS, architecture, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel.__name__, used)
        assert used["REG"] <= 64, (kernel.__name__, used)


@in_another_process
@pytest.mark.slow
def test_kernels_compile_for_sizes_of_one(tmp_path, monkeypatch):
    """Triton makes an argument of 1 a constant, which is another kind of value while it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import latent_affinity as kernels

    constants = {"MODE": kernels._SEED, "EXPONENT": 2, "ALIGNED": False, "BLOCK": 64, "CHUNK": 1, "LEAKY": False}
    constants |= {"SAMPLED": True} | dict.fromkeys(("edges", "samples", "chunks", "blocks"), 1)
    for kernel in (kernels.forward_kernel, kernels.sum_samples_kernel, kernels.finish_kernel, kernels.bandwidth_kernel):
        wanted = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert resource_usage(kernel, wanted, False, 1, 90, tmp_path)["REG"] > 0


def resource_usage(
    kernel: Any, constants: dict[str, Any], aligned: bool, num_warps: int, architecture: int, folder: Path
) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel, compiled as a call would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"seed": "*i64", **dict.fromkeys(("edges", "samples", "chunks", "blocks"), "i32")}
    types |= dict.fromkeys(("truncation", "inverse_temperature", "lowest"), "fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    multiples_of_16 = [
        number
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name == "edges" and aligned)
    ]
    attributes = {(number,): [["tt.divisibility", 16]] for number in multiples_of_16}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    assert len(found) == 4, text
    return found
