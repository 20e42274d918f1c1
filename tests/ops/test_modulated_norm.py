from __future__ import annotations

import torch
import torch.nn.functional as F

from m2mkd_fast.ops.modulated_norm import modulated_norm


def test_is_layer_norm_times_each_scale() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    scales = torch.randn(3, 4, 6, dtype=torch.float64)
    normalised = F.layer_norm(inputs, (6,), weight, bias, 1e-3)
    expected = torch.stack([normalised * scale for scale in scales])
    torch.testing.assert_close(modulated_norm(inputs, weight, bias, scales, eps=1e-3), expected)
    shared = modulated_norm(inputs, weight, bias, scales[:, :1], eps=1e-3)
    torch.testing.assert_close(shared[1], normalised * scales[1, 0])
