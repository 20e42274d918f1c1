"""A mixture of experts that starts from a trained dense MLP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2mkd_fast.autocast import without_autocast
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.expert_mlp import gelu_kind
from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.ops.expert_mlp import Activation
from m2mkd_fast.ops.route import Gate, route


def upcycle(
    mlp: nn.Module,
    num_experts: int,
    noise: float = 0.0,
    *,
    top_k: int = 2,
    gate: Gate = "top_k_softmax",
    **router: Any,
) -> VisionMoE:
    r"""A mixture whose experts all start as a dense MLP, with a fresh router.

    Every expert is a copy of the MLP plus Gaussian noise: to each of its weights and biases of standard deviation
    ``noise`` times that tensor's own. The mixture has the MLP's dtype, device, activation, dropout and training mode;
    all its parameters are new ones, and train.

    Without noise, and in evaluation (or without dropout), a token gets
    ``(sum of the weights of its choices that were kept) * mlp(x)``. So the result equals the dense layer's, to
    rounding, where these weights add up to one: with the gate ``"top_k_softmax"``, the default here, as long as no
    capacity drops a choice. With ``"softmax_top_k"`` the sum is that of the k largest of E softmax values; it is one
    for ``top_k=num_experts`` only, so the layer starts with a smaller output.

    >>> for i in (7, 9, 11):
    ...     vit.blocks[i].mlp = upcycle(vit.blocks[i].mlp, num_experts=8, noise=0.01)

    Args:
        mlp: timm's ``Mlp``, ``GluMlp``, ``SwiGLU`` or ``SwiGLUPacked``, or any module that computes the same with
            children of the same names: ``fc1`` (or ``fc1_g`` and ``fc1_x``), ``act``, ``fc2``, and dropout ``drop1``
            and ``drop2`` if any. The activation is GELU (or its tanh approximation) without gate, GELU or SiLU with.
        num_experts: E.
        noise: at least 0.
        top_k: experts a token chooses.
        gate, router: arguments of :class:`~m2mkd_fast.nn.router.Router`.

    Raises:
        M2MKDError: the MLP has a norm or another layer that experts lack, an unknown activation, layers of other kinds
            or dtypes, or does not compute what its children say; or the router's arguments do not go together.

    Source: Komatsuzaki et al. 2023, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints".
    """
    if not noise >= 0:
        raise M2MKDError(f"noise is {noise}; it must be at least 0 (0 for exact copies)")
    dense = _read(mlp)
    hidden, out = dense.down_weight.shape[1], dense.down_weight.shape[0]
    moe = VisionMoE(
        dense.up_weight.shape[1],
        hidden,
        num_experts,
        top_k,
        out_features=out,
        act_layer=dense.activation,
        bias=(dense.up_bias is not None, dense.down_bias is not None),
        drop=dense.drop,
        device=dense.up_weight.device,
        dtype=dense.up_weight.dtype,
        gate=gate,
        **router,
    )
    up, down = moe.experts.htoh4, moe.experts.h4toh
    copies = [(up.weight, dense.up_weight), (up.bias, dense.up_bias)]
    copies += [(down.weight, dense.down_weight), (down.bias, dense.down_bias)]
    copies = [(stacked, tensor) for stacked, tensor in copies if tensor is not None]
    with torch.no_grad():
        for stacked, tensor in copies:
            stacked.copy_(tensor.expand_as(stacked))
        _check_same(mlp, moe)
        for stacked, tensor in copies:
            if noise > 0:
                stacked += torch.randn_like(stacked) * (noise * tensor.std(correction=0))
    return moe.train(mlp.training)


class _Dense(NamedTuple):
    """What an MLP consists of; the first layer's rows in the experts' order, values and then gates."""

    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    activation: Activation
    drop: tuple[float, float]


_REMEDY = (
    "upcycle takes timm's Mlp, GluMlp, SwiGLU and SwiGLUPacked, and modules with their children fc1 (or fc1_g and "
    "fc1_x), act, fc2, drop1 and drop2"
)


def _read(mlp: nn.Module) -> _Dense:
    kind = type(mlp).__name__
    children = {name: child for name, child in mlp.named_children() if not isinstance(child, nn.Identity)}
    split = "fc1_g" in children
    linear = ("fc1_x", "fc1_g", "fc2") if split else ("fc1", "fc2")
    for name in linear:
        if not isinstance(children.get(name), nn.Linear):
            has = type(children[name]).__name__ if name in children else "not there"
            raise M2MKDError(f"cannot upcycle a {kind}: its {name} is {has}, not a nn.Linear; {_REMEDY}")
    strange = sorted(set(children) - {*linear, "act", "drop1", "drop2"})
    strange += [name for name, _ in (*mlp.named_parameters(recurse=False), *mlp.named_buffers(recurse=False))]
    if strange:
        held = ", ".join(f"{name} ({type(getattr(mlp, name)).__name__})" for name in strange)
        raise M2MKDError(f"cannot upcycle a {kind}: experts have no place for its {held}; {_REMEDY}")
    dtypes = {parameter.dtype for parameter in mlp.parameters()}
    if len(dtypes) > 1:
        raise M2MKDError(
            f"cannot upcycle a {kind} with parameters of several dtypes ({', '.join(sorted(map(str, dtypes)))}): "
            "convert it to one of them"
        )

    def drop(name: str) -> float:
        layer = children.get(name)
        if layer is not None and not isinstance(layer, nn.Dropout):
            raise M2MKDError(f"cannot upcycle a {kind}: its {name} is {type(layer).__name__}, not nn.Dropout")
        return 0.0 if layer is None else layer.p

    hidden = children["fc2"].in_features
    if split:
        layers = [children["fc1_x"], children["fc1_g"]]
        if (layers[0].bias is None) != (layers[1].bias is None):
            raise M2MKDError(f"cannot upcycle a {kind}: one of fc1_x and fc1_g has a bias, the other has none")
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    else:
        weight, bias = children["fc1"].weight, children["fc1"].bias
    gated = weight.shape[0] == 2 * hidden
    if not gated and weight.shape[0] != hidden:
        raise M2MKDError(
            f"cannot upcycle a {kind}: its first layer makes {weight.shape[0]} numbers and fc2 takes {hidden}; "
            "expected as many, or half of them where the other half are gates"
        )
    if gated and not split and not getattr(mlp, "gate_last", True):
        weight, bias = (None if tensor is None else torch.cat(tensor.chunk(2)[::-1]) for tensor in (weight, bias))
    return _Dense(
        weight.detach(),
        None if bias is None else bias.detach(),
        children["fc2"].weight.detach(),
        None if children["fc2"].bias is None else children["fc2"].bias.detach(),
        _activation(kind, children.get("act"), gated),
        (drop("drop1"), drop("drop2")),
    )


def _activation(kind: str, layer: nn.Module | None, gated: bool) -> Activation:
    name = gelu_kind(layer)
    if not gated and name is not None:
        return name
    if gated and name == "gelu":
        return "geglu"
    # timm's own SiLU layer, used where models are exported, has another class of the name it had in the paper.
    if gated and type(layer).__name__ in ("SiLU", "Swish"):
        return "swiglu"
    found = "no layer `act`" if layer is None else f"the activation {layer}"
    wanted = "nn.GELU() or nn.SiLU() on the gates" if gated else 'nn.GELU() or nn.GELU(approximate="tanh")'
    raise M2MKDError(f"cannot upcycle a {kind} with {found}: experts have {wanted}")


def _check_same(mlp: nn.Module, moe: VisionMoE) -> None:
    """Raise unless the MLP computes what an expert made from its children does: its forward may have more in it."""
    weight = moe.experts.htoh4.weight
    if weight.is_meta:
        return
    tokens = torch.linspace(-2, 2, 4 * weight.shape[2], dtype=torch.float64).view(4, -1).to(weight)
    # Equal logits send every token to the first expert, with weight one.
    assignment = route(tokens.new_zeros(4, weight.shape[0]), top_k=1, gate="top_k_softmax")
    modes = {module: module.training for module in mlp.modules()}
    with without_autocast(tokens):
        got = moe.experts.eval()(tokens, assignment)
        try:
            wanted = mlp.eval()(tokens)
        finally:
            for module, training in modes.items():
                module.training = training
    # Another order of rounding is far below half the digits, another computation far above.
    scale = torch.finfo(weight.dtype).eps ** 0.5 * wanted.abs().max()
    if wanted.shape != got.shape or not (wanted - got).abs().max() <= scale:
        raise M2MKDError(
            f"cannot upcycle a {type(mlp).__name__}: it does not compute what its layers alone do (or not all of that "
            f"is finite), so its forward has more in it; {_REMEDY}"
        )
