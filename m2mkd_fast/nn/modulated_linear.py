"""A linear layer whose input is scaled by a function of the latent's code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.autocast import autocast_dtype
from m2mkd_fast.errors import UnknownNameError
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache
from m2mkd_fast.nn.options import build
from m2mkd_fast.ops.modulated_norm import modulated_norm

SCALE_NORMALIZATIONS = ("ln", "l2", "none", "sigmoid", "tanh")
INPUT_NORMALIZATIONS = ("none", "ln", "l2")


class ModulatedLinear(CachesInEvaluation):
    r"""One weight for all latents, a scale of its input for each.

    .. math::
        y_n = W\, \mathrm{n}_x\big(x_n \circ s(c_n)\big) + b, \qquad s(c) = g\,\mathrm{n}_s(W_s c) + o

    with :math:`o = 1` if ``add_one_to_scale`` else 0, and the normalisations n (none has parameters of its own)
    chosen by name.

    Args:
        in_features: size of x.
        out_features: size of y.
        context_features: size of the code c.
        bias: whether there is a b.
        scale_normalization_type: n_s, one of ``"ln"`` (layer norm), ``"l2"``, ``"none"``, ``"sigmoid"``, ``"tanh"``.
        scale_gain: g.
        learnable_scale_gain: g is a parameter.
        add_one_to_scale: the layer starts near an ordinary linear layer.
        scale_times_input_normalization_type: n_x, one of ``"none"``, ``"ln"``, ``"l2"``.

    Shapes: x ``[..., N, in_features]``, codes ``[N or 1, context_features]``, y ``[..., N, out_features]``.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031 (ModFC).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int,
        bias: bool = True,
        *,
        scale_normalization_type: str = "ln",
        scale_gain: float = 1.0,
        learnable_scale_gain: bool = False,
        add_one_to_scale: bool = False,
        scale_times_input_normalization_type: str = "none",
    ) -> None:
        super().__init__()
        if scale_normalization_type not in SCALE_NORMALIZATIONS:
            raise UnknownNameError("scale_normalization_type", scale_normalization_type, SCALE_NORMALIZATIONS)
        if scale_times_input_normalization_type not in INPUT_NORMALIZATIONS:
            raise UnknownNameError(
                "scale_times_input_normalization_type", scale_times_input_normalization_type, INPUT_NORMALIZATIONS
            )
        self.native_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.native_bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.native_weight, a=math.sqrt(5))
        self.scale = nn.Linear(context_features, in_features, bias=False)
        self.scale_gain = nn.Parameter(torch.tensor(float(scale_gain))) if learnable_scale_gain else float(scale_gain)
        self.scale_normalization_type = scale_normalization_type
        self.add_one_to_scale = add_one_to_scale
        self.scale_times_input_normalization_type = scale_times_input_normalization_type
        self._scale_cache = EvaluationCache()
        self._weight_cache = EvaluationCache()

    @property
    def scales_only(self) -> bool:
        """Whether the layer is W times a scaled input, with no normalisation between the two."""
        return self.scale_times_input_normalization_type == "none"

    def input_scale(self, codes: Tensor) -> Tensor:
        """s(c), ``[N, in_features]``; without gradients it is computed again only where codes or weights changed."""
        if type(self.scale) is not nn.Linear:  # an adapter in its place may depend on other tensors
            return self._input_scale(codes)
        sources = [codes, self.scale.weight]
        if isinstance(self.scale_gain, Tensor):
            sources.append(self.scale_gain)
        return self._scale_cache.get(sources, lambda: self._input_scale(codes))

    def _input_scale(self, codes: Tensor) -> Tensor:
        scale = self.scale(codes)
        match self.scale_normalization_type:
            case "ln":
                scale = F.layer_norm(scale, scale.shape[-1:])
            case "l2":
                scale = F.normalize(scale, dim=-1)
            case "sigmoid":
                scale = scale.sigmoid()
            case "tanh":
                scale = scale.tanh()
        scale = self.scale_gain * scale
        return scale + 1.0 if self.add_one_to_scale else scale

    def project(self, scaled: Tensor, gain: Tensor | None = None) -> Tensor:
        """The layer from the scaled input on, times ``gain`` ``[out_features]`` where given."""
        return F.linear(self.normalized(scaled), *self.weight_and_bias(gain))

    def normalized(self, scaled: Tensor) -> Tensor:
        """n_x of the scaled input: what W is multiplied with."""
        match self.scale_times_input_normalization_type:
            case "ln":
                return F.layer_norm(scaled, scaled.shape[-1:])
            case "l2":
                return F.normalize(scaled, dim=-1)
        return scaled

    def weight_and_bias(self, gain: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W and b, each row times its ``gain`` where given; without gradients that is computed once, as the scales."""
        weight, bias = self.native_weight, self.native_bias
        if gain is None:
            return weight, bias
        sources = [gain, weight] if bias is None else [gain, weight, bias]
        folded = self._weight_cache.get(sources, lambda: _times_gain(gain, weight, bias))
        return folded[0], None if bias is None else folded[1]

    def forward(self, inputs: Tensor, codes: Tensor) -> Tensor:
        return self.project(inputs * self.input_scale(codes))

    def extra_repr(self) -> str:
        out_features, in_features = self.native_weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.native_bias is not None}"


def modulated_linear(
    in_features: int, out_features: int, code_dim: int, options: Mapping[str, Any] | None, bias: bool = True
) -> ModulatedLinear:
    """A :class:`ModulatedLinear` with the options of a configuration (``mod_fc_kwargs``)."""
    sizes = {"in_features": in_features, "out_features": out_features, "context_features": code_dim}
    return build(ModulatedLinear, "mod_fc_kwargs", options, bias=bias, **sizes)


def normalize_and_project(
    norm: nn.LayerNorm, layers: Sequence[ModulatedLinear], inputs: Tensor, codes: Tensor
) -> list[Tensor]:
    """``layer(norm(inputs), codes)`` for every layer, with one normalisation for all."""
    scales = [layer.input_scale(codes) for layer in layers]
    scaled = modulated_norm(inputs, norm.weight, norm.bias, scales, norm.eps, dtype=product_dtype(layers, inputs))
    return [layer.project(one) for layer, one in zip(layers, scaled, strict=True)]


def product_dtype(layers: Sequence[ModulatedLinear], inputs: Tensor) -> torch.dtype | None:
    """The dtype autocast rounds the scaled inputs to, where nothing but the products reads them."""
    return autocast_dtype(inputs) if all(layer.scales_only for layer in layers) else None


def _times_gain(gain: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    folded = [gain.unsqueeze(1) * weight] if bias is None else [gain.unsqueeze(1) * weight, gain * bias]
    # Autocast remembers what it rounded for parameters alone: rounded here, it is done once in evaluation.
    dtype = autocast_dtype(weight)
    return folded if dtype is None else [tensor.to(dtype) for tensor in folded]
