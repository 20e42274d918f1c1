"""The experts of a mixture: E two-layer perceptrons with stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.expert_mlp import Activation, expert_mlp
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
    """E experts: ``linear, GELU, dropout, linear, dropout``, run by :func:`m2mkd_fast.ops.expert_mlp.expert_mlp`.

    State names are the published ones: ``htoh4.weight [E, H, D]``, ``htoh4.bias [E, H]``, ``h4toh.weight [E, O, H]``,
    ``h4toh.bias [E, O]``.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: H, D if not given.
        out_features: O, D if not given.
        act_layer: ``nn.GELU``, timm's GELU layers, ``functools.partial(nn.GELU, approximate="tanh")``, or one of the
            names ``"gelu"`` and ``"gelu_tanh"``.
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
        self.htoh4 = ExpertLinear(num_experts, in_features, hidden_features, up_bias, **factory)
        self.h4toh = ExpertLinear(num_experts, hidden_features, out_features, down_bias, **factory)
        self.drop1 = nn.Dropout(up_drop)
        self.drop2 = nn.Dropout(down_drop)

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """``[T, D]`` tokens and their assignment to ``[T, O]``."""
        return expert_mlp(
            x,
            assignment,
            self.htoh4.weight,
            self.htoh4.bias,
            self.h4toh.weight,
            self.h4toh.bias,
            activation=self.activation,
            dropout=(self.drop1.p, self.drop2.p) if self.training else (0.0, 0.0),
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def activation_name(act_layer: Callable[[], nn.Module] | str) -> Activation:
    """The activation of the expert MLP that an activation layer stands for."""
    if isinstance(act_layer, str):
        if act_layer not in get_args(Activation):
            raise UnknownNameError("activation", act_layer, get_args(Activation))
        return act_layer
    layer = act_layer()
    # timm's own layers go by their class names: importing timm for an isinstance is not worth seconds of start-up.
    if type(layer).__name__ == "GELUTanh":
        return "gelu_tanh"
    if type(layer).__name__ == "GELU":
        return "gelu_tanh" if getattr(layer, "approximate", "none") == "tanh" else "gelu"
    raise M2MKDError(f"experts have no activation {type(layer).__name__}; use nn.GELU, 'gelu' or 'gelu_tanh'")
