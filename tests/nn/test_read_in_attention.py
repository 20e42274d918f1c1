from __future__ import annotations

import pytest
import torch

from m2mkd_fast.nn.read_in_attention import ReadInAttention


@pytest.mark.parametrize("of_input", ["none", "ln", "l2"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_latent_projects_every_token(of_input: str, bias: bool) -> None:
    """Against attention written out for one latent at a time with the layer's own projections."""
    torch.manual_seed(0)
    layer = ReadInAttention(
        6,
        8,
        5,
        num_heads=2,
        head_dim=3,
        include_residual=True,
        qkv_bias=bias,
        mod_fc_kwargs={"add_one_to_scale": True, "scale_times_input_normalization_type": of_input},
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    states, codes, inputs = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 8), (4, 5), (2, 7, 6)))
    out = layer(states, codes, inputs)
    tokens = layer.sender_layernorm(inputs)
    for latent in range(4):
        code = codes[latent : latent + 1]
        query = layer.query_compiler(layer.receiver_layernorm(states[:, latent : latent + 1]), code)
        heads = [
            tensor.unflatten(-1, (2, 3)).transpose(1, 2)
            for tensor in (query, layer.key_compiler(tokens, code), layer.value_compiler(tokens, code))
        ]
        message = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        expected = states[:, latent : latent + 1] + layer.layer_scale(layer.exit_layer(message, code))
        torch.testing.assert_close(out[:, latent : latent + 1], expected)
    one = layer(states, codes[:1], inputs)
    torch.testing.assert_close(one, layer(states, codes[:1].expand(4, -1), inputs))
