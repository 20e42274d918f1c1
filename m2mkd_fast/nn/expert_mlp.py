"""The experts of a mixture: E two-layer perceptrons with stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from m2mkd_fast.checks import require_finite
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.expert_mlp import GATED, Activation, expert_mlp
from m2mkd_fast.ops.route import Assignment

ExpertInit = Literal["linear", "trunc_normal", "published"]


class ExpertLinear(nn.Module):
    """Parameters of E linear layers: ``weight [E, out, in]`` and ``bias [E, out]``.

    ``expert_init`` says how each of the E layers starts:

    - ``"linear"``: like :class:`torch.nn.Linear`, weights and biases uniform within ``1 / sqrt(in)``;
    - ``"trunc_normal"``: truncated normal of standard deviation 0.02 and zero biases, like every linear layer of a
      timm ViT;
    - ``"published"``: uniform within ``1 / sqrt(out * in)`` and zero biases, as the published m2mKD V-MoE starts. Its
      library initialises the stacked tensor as if it were one convolution, so the fan-in is ``out`` times too large:
      for ViT-Base the experts start 55 times (first layer) and 28 times (second layer) smaller than linear layers.
      For parity only.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        expert_init: ExpertInit = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(num_experts, in_features, out_features) < 1:
            raise M2MKDError(
                f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}: each must be >= 1"
            )
        if expert_init not in get_args(ExpertInit):
            raise UnknownNameError("expert_init", expert_init, get_args(ExpertInit))
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.expert_init = expert_init
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        if self.expert_init == "trunc_normal":
            nn.init.trunc_normal_(self.weight, std=0.02)
        else:
            fan_in = self.in_features * (self.out_features if self.expert_init == "published" else 1)
            nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.expert_init == "linear" else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def init_weights(self) -> None:
        """What timm's Vision Transformers call on modules that know their own initialisation."""
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


class ExpertMLP(nn.Module):
    """E experts: ``linear, activation, dropout, linear, dropout``.

    They are run by :func:`m2mkd_fast.ops.expert_mlp.expert_mlp`, which also draws the dropout masks, from a seed that
    comes from PyTorch's generator.

    State names are the published ones: ``htoh4.weight [E, H, D]``, ``htoh4.bias [E, H]``, ``h4toh.weight [E, O, H]``,
    ``h4toh.bias [E, O]``. With a gated activation ``htoh4`` has 2H rows: H that make the values, then H that make the
    gates. ``load_state_dict`` also takes the names of FastMoE since 1.0.1, which keeps a list of single experts
    (``0.htoh4.weight [1, H, D]``, ...); :func:`fastmoe_state_dict` gives them.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: H, the width of what enters the second layer, after any gate; D if not given. (timm's
            ``GluMlp`` counts values and gates together: give half of its number.)
        out_features: O, D if not given.
        act_layer: ``nn.GELU``, timm's GELU layers, ``functools.partial(nn.GELU, approximate="tanh")``, or one of the
            names ``"gelu"``, ``"gelu_tanh"``, ``"geglu"`` (values times the GELU of gates) and ``"swiglu"`` (values
            times the SiLU of gates).
        bias: whether both layers have one; a pair for each layer.
        drop: dropout probability after the activation and after the second layer; a pair for each.
        expert_init: see :class:`ExpertLinear`.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        expert_init: ExpertInit = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        up_bias, down_bias = bias if isinstance(bias, tuple) else (bias, bias)
        up_drop, down_drop = drop if isinstance(drop, tuple) else (drop, drop)
        factory = {"expert_init": expert_init, "device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.activation = activation_name(act_layer)
        up_features = hidden_features * (2 if self.activation in GATED else 1)
        self.htoh4 = ExpertLinear(num_experts, in_features, up_features, up_bias, **factory)
        self.h4toh = ExpertLinear(num_experts, hidden_features, out_features, down_bias, **factory)
        self.drop1 = nn.Dropout(up_drop)
        self.drop2 = nn.Dropout(down_drop)
        self.register_load_state_dict_pre_hook(_stack_single_experts)

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """``[T, D]`` tokens and their assignment to ``[T, O]``."""
        out = expert_mlp(
            x,
            assignment,
            self.htoh4.weight,
            self.htoh4.bias,
            self.h4toh.weight,
            self.h4toh.bias,
            activation=self.activation,
            dropout=(self.drop1.p, self.drop2.p) if self.training else (0.0, 0.0),
        )
        require_finite(out, "outputs of experts", "Look at the experts' parameters; float16 overflows beyond 65504")
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def activation_name(act_layer: Callable[[], nn.Module] | str) -> Activation:
    """The activation of the expert MLP that an activation layer's constructor, or a name, stands for."""
    if isinstance(act_layer, str):
        if act_layer not in get_args(Activation):
            raise UnknownNameError("activation", act_layer, get_args(Activation))
        return act_layer
    layer = act_layer()
    kind = gelu_kind(layer)
    if kind is None:
        known = ", ".join(get_args(Activation))
        raise M2MKDError(f"experts have no activation {type(layer).__name__}; use nn.GELU or one of {known}")
    return kind


def gelu_kind(layer: nn.Module) -> Literal["gelu", "gelu_tanh"] | None:
    """Which GELU a layer computes; None for any other layer."""
    # timm's own layers go by their class names: importing timm for an isinstance is not worth seconds of start-up.
    if type(layer).__name__ == "GELUTanh":
        return "gelu_tanh"
    if type(layer).__name__ == "GELU":
        return "gelu_tanh" if getattr(layer, "approximate", "none") == "tanh" else "gelu"
    return None


def fastmoe_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with the names of FastMoE since 1.0.1, whose layer keeps its experts in a list.

    ``...experts.htoh4.weight [E, H, D]`` becomes ``...experts.<i>.htoh4.weight [1, H, D]``, a view of the parameter,
    for each expert i, and so on for the other parameters of every :class:`ExpertMLP`; all other names stay.
    ``load_state_dict`` of a model takes either kind of names.

    Example:
        >>> torch.save(fastmoe_state_dict(model), "fastmoe.pt")
    """
    experts = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ExpertMLP)
    }
    split = {f"{prefix}{name}": prefix for prefix, module in experts.items() for name, _ in module.named_parameters()}
    state = {}
    for key, tensor in model.state_dict().items():
        if key in split:
            prefix = split[key]
            singles = tensor.split(1)
            state.update({f"{prefix}{i}.{key.removeprefix(prefix)}": single for i, single in enumerate(singles)})
        else:
            state[key] = tensor
    return state


def _stack_single_experts(
    experts: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Put FastMoE's lists of single experts into the stacked names; name those that are missing or do not fit.

    Single experts that the layer has no place for stay in the state, where PyTorch finds and names them.
    """
    for name, parameter in experts.named_parameters():
        keys = [f"{prefix}{expert}.{name}" for expert in range(parameter.shape[0])]
        present = [key for key in keys if key in state]
        if not present or f"{prefix}{name}" in state:
            continue
        shape = (1, *parameter.shape[1:])
        singles = {key: state.pop(key) for key in present}
        missing += [key for key in keys if key not in singles]
        misshapen = {key: tuple(tensor.shape) for key, tensor in singles.items() if tensor.shape != shape}
        errors += [
            f"size mismatch for {key}: copying a param with shape {has} from checkpoint, the shape of a single expert "
            f"in current model is {shape}."
            for key, has in misshapen.items()
        ]
        if len(singles) == len(keys) and not misshapen:
            state[f"{prefix}{name}"] = torch.cat([singles[key] for key in keys])
