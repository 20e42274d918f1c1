"""Inference as one CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.cuda_graph import capture_inference
from m2mkd_fast.models.nac import prune_latents
from m2mkd_fast.models.registry import create_model


def circuit(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("nac_micro.ring", fit_signatures=False, **overrides).eval()


def images(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_processor_has_no_cuda_graphs() -> None:
    with pytest.raises(M2MKDError, match="model and example are on cpu; "):
        capture_inference(circuit(), images())


@pytest.mark.gpu
def test_replays_equal_the_model() -> None:
    model = circuit().cuda()
    fast = capture_inference(model, images().cuda())
    first = fast(images(seed=2).cuda())
    for seed in (3, 4, 5):
        inputs = images(seed=seed).cuda()
        with torch.no_grad():
            expected = model(inputs)
        torch.testing.assert_close(fast(inputs), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(first, model(images(seed=2).cuda()), rtol=1e-5, atol=1e-6)
    assert not first.requires_grad
    assert torch.equal(fast(images().cuda()), fast(images().cuda())), "the same bits every time"


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    fast, inputs = capture_inference(circuit().cuda(), images().cuda()), images().cuda()
    fast(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_happens_to_the_model_does_not_reach_the_recording() -> None:
    model, inputs = circuit().cuda(), images().cuda()
    fast = capture_inference(model, inputs)
    before = fast(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.train()
    model.cpu()
    del model
    torch.cuda.empty_cache()
    filler = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(16)]
    assert torch.equal(fast(inputs), before)
    del filler


@pytest.mark.gpu
def test_autocast_is_recorded() -> None:
    model, inputs = circuit().cuda(), images().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        fast = capture_inference(model, inputs)
        with torch.no_grad():
            expected = model(inputs)
    with torch.no_grad():
        exact = model(inputs)
    result = fast(inputs)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(result.float(), exact)


@pytest.mark.gpu
def test_what_is_drawn_at_random_is_drawn_at_each_replay() -> None:
    options = {"output_tokenizer_kwargs": {"softmax_type": "gumbel"}, "stochastic_evaluation": True}
    fast = capture_inference(circuit(**options).cuda(), images().cuda())
    assert not torch.equal(fast(images().cuda()), fast(images().cuda()))


@pytest.mark.gpu
def test_a_pruned_circuit_is_captured_as_any() -> None:
    model = prune_latents(circuit().cuda(), 0.25)
    fast = capture_inference(model, images(1).cuda())
    with torch.no_grad():
        torch.testing.assert_close(fast(images(1).cuda()), model(images(1).cuda()), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_mistakes_name_the_remedy() -> None:
    model, inputs = circuit().cuda(), images().cuda()
    fast = capture_inference(model, inputs)
    for other in (images(3).cuda(), inputs.half(), images()):
        with pytest.raises(M2MKDError, match=r"captured for torch.float32 \[2, 1, 16, 16\] on cuda:0"):
            fast(other)
    with pytest.raises(M2MKDError, match="cpu and cuda:0; move model and example to one CUDA device"):
        capture_inference(model, images())
    training = copy.deepcopy(model)
    training.latent_graphs[0].read_out.train()
    with pytest.raises(M2MKDError, match="latent_graphs.0.read_out is in training mode"):
        capture_inference(training, inputs)


@pytest.mark.gpu
def test_a_model_that_returns_no_tensor_is_refused() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.circuit = circuit()

        def forward(self, images: torch.Tensor) -> object:
            return self.circuit.forward_states(images)

    with pytest.raises(M2MKDError, match="returns a CircuitStates"):
        capture_inference(States().eval().cuda(), images().cuda())
