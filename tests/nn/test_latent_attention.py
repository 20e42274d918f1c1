"""The layer's paths that the golden circuits do not take."""

from __future__ import annotations

import copy

import pytest
import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.latent_attention import LatentAttention

U, V, STATE, CODE, SIGNATURE = 4, 6, 8, 5, 7


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, U, STATE), (U, CODE), (U, SIGNATURE), (2, V, STATE), (V, CODE), (V, SIGNATURE)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def layer(**options: object) -> LatentAttention:
    torch.manual_seed(0)
    return LatentAttention(STATE, CODE, num_heads=2, head_dim=4, layer_scale_initial_value=1.0, **options)


def test_without_kernel_signatures_have_no_part() -> None:
    attention = layer(kernel_type=None)
    states, codes, signatures, senders, sender_codes, sender_signatures = inputs()
    out = attention(states, codes, None, senders, sender_codes, None)
    assert torch.equal(out, attention(states, codes, signatures, senders, sender_codes, sender_signatures))
    assert not [name for name in attention.state_dict() if name.startswith("kernel")]


def test_with_kernel_signatures_are_needed() -> None:
    states, codes, signatures, senders, sender_codes, _ = inputs()
    with pytest.raises(M2MKDError, match="kernel_type=None"):
        layer()(states, codes, signatures, senders, sender_codes, None)


def test_distant_senders_are_not_heard() -> None:
    attention = layer(kernel_kwargs={"truncation": 0.9})
    states, codes, signatures, senders, sender_codes, sender_signatures = inputs()
    sender_signatures = signatures[:1].expand(V, -1).clone()
    sender_signatures[2] *= -1.0
    expected = attention(states, codes, signatures, senders, sender_codes, sender_signatures)[:, 0]
    senders[:, 2] += 100.0
    actual = attention(states, codes, signatures, senders, sender_codes, sender_signatures)[:, 0]
    assert torch.equal(actual, expected)


def test_receiver_without_sender_keeps_its_state() -> None:
    attention = layer(kernel_kwargs={"truncation": 0.9})
    states, codes, signatures, senders, sender_codes, _ = inputs()
    out = attention(states, codes, signatures, senders, sender_codes, -signatures[:1].expand(V, -1))
    torch.testing.assert_close(out[:, 0], states[:, 0] + attention.exit_layer.native_bias)


def test_receivers_without_sender_are_counted() -> None:
    _, _, signatures, _, _, _ = inputs()
    far = -signatures[:1].expand(V, -1)
    assert layer(kernel_kwargs={"truncation": 0.9}).receivers_without_sender(signatures, signatures) == 0
    assert 1 <= layer(kernel_kwargs={"truncation": 0.9}).receivers_without_sender(signatures, far) <= U
    assert layer(kernel_kwargs={"truncation": 0.9}).receivers_without_sender(signatures[:1], far) == 1
    assert layer().receivers_without_sender(signatures, far) == 0
    assert layer(kernel_type=None).receivers_without_sender(signatures, far) == 0


@pytest.mark.parametrize(("option", "value"), [("evaluation", "threshold"), ("truncation", 0.9), ("stochastic", False)])
@torch.no_grad()
def test_what_evaluation_remembers_follows_the_kernels_options(option: str, value: object) -> None:
    options = {"stochastic_kernel": True, "stochastic_eval_behaviour": "no_sample"}
    if option == "stochastic":
        options["stochastic_eval_behaviour"] = "threshold"
    attention = layer(kernel_kwargs=options).eval()
    before = attention(*inputs())
    setattr(attention.kernel, option, value)
    after = attention(*inputs())
    assert not torch.allclose(after, before)
    assert torch.equal(after, copy.deepcopy(attention)(*inputs()))


def test_key_normalisation_matters_to_scaled_weights_alone() -> None:
    for scaled in (False, True):
        options = {"scale_attention_by_affinities_after_softmax": scaled}
        with_, without = layer(**options), layer(**options, normalize_kernel_along_keys=False)
        same = torch.allclose(with_(*inputs()), without(*inputs()), atol=1e-6)
        assert same is not scaled


def test_training_samples_edges_per_image_with_torchs_random_numbers() -> None:
    attention = layer(kernel_kwargs={"stochastic_kernel": True})
    states, *others, senders, sender_codes, sender_signatures = inputs()
    # Both images are the same: only their edges can differ.
    arguments = (states[:1].expand(2, -1, -1), *others, senders[:1].expand(2, -1, -1), sender_codes, sender_signatures)
    torch.manual_seed(1)
    first = attention(*arguments)
    torch.manual_seed(1)
    assert torch.equal(first, attention(*arguments))
    assert not torch.equal(first, attention(*arguments))
    assert not torch.allclose(first[0], first[1])
    attention.eval()
    assert torch.equal(attention(*arguments)[0], attention(*arguments)[1])


def test_paths_are_dropped_while_training() -> None:
    attention = layer(path_drop_prob=0.5, kernel_type=None)
    states, codes, _, senders, sender_codes, _ = inputs()
    states, senders = states[:1].expand(64, -1, -1), senders[:1].expand(64, -1, -1)
    torch.manual_seed(0)
    change = attention(states, codes, None, senders, sender_codes, None) - states
    dropped = (change == 0).flatten(1).all(dim=1)
    assert 16 < dropped.sum() < 48
    expected = attention.eval()(states, codes, None, senders, sender_codes, None) - states
    torch.testing.assert_close(change[~dropped], 2.0 * expected[~dropped], atol=1e-5, rtol=1e-4)


def test_bad_options() -> None:
    with pytest.raises(UnknownNameError, match="kernel_type 'GaussianKernel'"):
        layer(kernel_type="GaussianKernel")
    with pytest.raises(UnknownNameError, match="did you mean 'truncation'"):
        layer(kernel_kwargs={"truncatoin": 0.9})
    with pytest.raises(UnknownNameError, match="'no_sample'"):
        layer(kernel_kwargs={"stochastic_eval_behaviour": "no_samples"})
    with pytest.raises(UnknownNameError, match="'masked'"):
        layer(kernel_kwargs={"truncation_implementation": "mask"})
    with pytest.raises(M2MKDError, match="set it to 0"):
        layer(include_residual=False, path_drop_prob=0.1)
