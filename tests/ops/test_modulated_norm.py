from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.ops.modulated_norm import modulated_norm


def random_tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6), (6,), (6,), (3, 4, 6))
    inputs, weight, bias, scales = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return inputs, weight, bias, scales


def test_is_layer_norm_times_each_scale() -> None:
    inputs, weight, bias, scales = random_tensors()
    normalised = F.layer_norm(inputs, (6,), weight, bias, 1e-3)
    expected = torch.stack([normalised * scale for scale in scales])
    torch.testing.assert_close(modulated_norm(inputs, weight, bias, scales, eps=1e-3), expected)
    shared = modulated_norm(inputs, weight, bias, scales[:, :1], eps=1e-3)
    torch.testing.assert_close(shared[1], normalised * scales[1, 0])


def test_dtype_of_the_result() -> None:
    tensors = random_tensors(torch.float32)
    assert modulated_norm(*tensors).dtype == torch.float32
    assert modulated_norm(*(tensor.bfloat16() for tensor in tensors)).dtype == torch.bfloat16
    rounded = modulated_norm(*tensors, dtype=torch.bfloat16)
    assert torch.equal(rounded, modulated_norm(*tensors).bfloat16())


def test_gradcheck() -> None:
    tensors = [tensor.requires_grad_() for tensor in random_tensors()]
    assert torch.autograd.gradcheck(modulated_norm, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(4, 6)}, r"inputs has shape \(4, 6\); expected \[batch, latents, width\]"),
        ({"inputs": torch.zeros(2, 4, 0)}, "width of at least 1"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(6,\) for inputs \(2, 4, 6\)"),
        ({"bias": torch.zeros(1, 6)}, r"bias has shape \(1, 6\), expected \(6,\)"),
        ({"scales": torch.ones(4, 6)}, r"scales has shape \(4, 6\); .* expected \[M, 4, 6\] or \[M, 1, 6\]"),
        ({"scales": torch.ones(3, 2, 6)}, r"scales has shape \(3, 2, 6\)"),
        ({"scales": torch.ones(3, 4, 5)}, r"scales has shape \(3, 4, 5\)"),
        ({"scales": torch.ones(0, 4, 6)}, "M at least 1"),
        ({"inputs": torch.zeros(2, 4, 6, dtype=torch.int64)}, "inputs has dtype torch.int64; expected a floating"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta, inputs on cpu; move one of them"),
        ({"dtype": torch.int32}, "dtype is torch.int32; expected a floating"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {
        "inputs": torch.zeros(2, 4, 6),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "scales": torch.ones(3, 4, 6),
        **change,
    }
    with pytest.raises(M2MKDError, match=message):
        modulated_norm(**arguments)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_fast.backend._TRITON_INTERPRETS", False)
    tensors = random_tensors(torch.float32)
    reason = "cannot run modulated_norm: the input is on cpu, not on cuda .TRITON_INTERPRET=1"
    with use_backend("triton"), pytest.raises(M2MKDError, match=reason):
        modulated_norm(*tensors)
    monkeypatch.setattr("m2mkd_fast.backend._HAS_TRITON", False)
    with use_backend("triton"), pytest.raises(M2MKDError, match="triton is not installed; pip install triton"):
        modulated_norm(*tensors)


def test_the_cpu_runs_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    modulated_norm(*random_tensors())
    assert not recwarn.list
