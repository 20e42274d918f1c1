"""From images to tokens, and from latents to logits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.options import build

CAPACITIES = {
    "tiny": (3, 3, 9),
    "mini": (3, 3, 6),
    "micro": (3, 3, 3),
    "nano": (1, 1, 1),
    "pico": (1, 1, 0),
    "femto": (1, 0, 0),
    "atto": (0, 0, 0),
}
SOFTMAXES = ("vanilla", "gumbel", "gumbel-hard")


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution and a two-layer MLP on a residual branch (Liu et al., arXiv 2201.03545).

    The maths is that of timm's block of this name. Its tensors have other names there, and parameters, gradients and
    optimizer states of this project go by the published ones.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value))
        self.drop_path = DropPath(drop_path)

    def forward(self, images: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(images).permute(0, 2, 3, 1))
        branch = self.gamma * self.pwconv2(F.gelu(self.pwconv1(branch)))
        return images + self.drop_path(branch.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """Stages of ConvNeXt blocks without pooling and head; 1/4 of the image's size, half of it again each stage."""

    def __init__(
        self,
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            halve = nn.Conv2d(before, after, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(before, eps=1e-6), halve))
        # Deeper blocks are dropped more often, the last one with the whole rate.
        total = sum(depths)
        rates = iter([drop_path_rate * index / max(1, total - 1) for index in range(total)])
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvNeXtBlock(dim, next(rates), layer_scale_init_value) for _ in range(depth)])
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            images = stage(downsample(images))
        return images


class PositionalGrid(nn.Module):
    """A learned vector for every place of a feature map, concatenated to its channels."""

    def __init__(self, dim: int, grid_size: Sequence[int] = (8, 8)) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(dim, *grid_size))

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-2:] != self.grid.shape[-2:]:
            raise M2MKDError(
                f"the positional grid is {tuple(self.grid.shape[-2:])}, but these images give features of "
                f"{tuple(features.shape[-2:])}; use images of the size the model was built for, or set grid_size"
            )
        return torch.cat([features, self.grid.expand(features.shape[0], -1, -1, -1)], dim=1)


class ConvNeXtImageTokenizer(nn.Module):
    """Images ``[B, input_dim, H, W]`` to tokens ``[B, V, output_dim]``.

    Args:
        input_dim: channels of the images.
        repr_dim: the last of three stages is this wide, each one before half as wide.
        capacity_preset: depths of the stages, a name in `CAPACITIES`.
        num_stages: 1 to 3; each token covers ``4 * 2 ** (num_stages - 1)`` pixels squared.
        convnext_kwargs: ``drop_path_rate`` and ``layer_scale_init_value`` of :class:`ConvNeXt`.
        positional_grid_kwargs: options of :class:`PositionalGrid`; ``None`` for no positions.
    """

    def __init__(
        self,
        input_dim: int = 3,
        repr_dim: int = 384,
        capacity_preset: str = "tiny",
        num_stages: int = 3,
        convnext_kwargs: Mapping[str, Any] | None = None,
        positional_grid_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if capacity_preset not in CAPACITIES:
            raise UnknownNameError("capacity_preset", capacity_preset, CAPACITIES)
        if not 1 <= num_stages <= 3:
            raise M2MKDError(f"num_stages must be 1, 2 or 3, got {num_stages}")
        self.backbone = build(
            ConvNeXt,
            "convnext_kwargs",
            convnext_kwargs,
            in_chans=input_dim,
            depths=CAPACITIES[capacity_preset][:num_stages],
            dims=(repr_dim // 4, repr_dim // 2, repr_dim)[:num_stages],
        )
        self.positional_grid = None
        if positional_grid_kwargs is not None:
            self.positional_grid = build(PositionalGrid, "positional_grid_kwargs", positional_grid_kwargs)

    @property
    def output_dim(self) -> int:
        positions = 0 if self.positional_grid is None else self.positional_grid.grid.shape[0]
        return self.backbone.dims[-1] + positions

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        if self.positional_grid is not None:
            features = self.positional_grid(features)
        return features.flatten(2).transpose(1, 2)


class FirstSlotAsLogits(nn.Module):
    """The state of the first output latent is the logits: states ``[B, U, C]`` to ``[B, C]``."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, 0]


class OutputLatentPooling(nn.Module):
    """States ``[B, U, state_dim]`` to logits ``[B, output_dim]``: a linear layer on a mean weighed by confidence.

    Args:
        state_dim: size of a state.
        output_dim: number of classes.
        softmax_type: how confidences become weights: ``"vanilla"``, or ``"gumbel"`` and ``"gumbel-hard"``, which choose
            at random.
        softmax_temperature: divides the confidences.
        stochastic_evaluation: choose at random in evaluation, too, as the published code does. Off: the Gumbel noise is
            left out there.
    """

    def __init__(
        self,
        state_dim: int,
        output_dim: int,
        softmax_type: str = "gumbel",
        softmax_temperature: float = 1.0,
        stochastic_evaluation: bool = False,
    ) -> None:
        super().__init__()
        if softmax_type not in SOFTMAXES:
            raise UnknownNameError("softmax_type", softmax_type, SOFTMAXES)
        self.softmax_type = softmax_type
        self.temperature = softmax_temperature
        self.stochastic_evaluation = stochastic_evaluation
        self.confidence_scorer = nn.Linear(state_dim, 1)
        self.to_logits = nn.Linear(state_dim, output_dim)

    def weights(self, confidences: Tensor) -> Tensor:
        """``[B, U]``, rows sum to one."""
        hard = self.softmax_type == "gumbel-hard"
        if self.softmax_type != "vanilla" and (self.training or self.stochastic_evaluation):
            return F.gumbel_softmax(confidences, tau=self.temperature, hard=hard, dim=-1)
        if hard:
            return F.one_hot(confidences.argmax(dim=-1), confidences.shape[-1]).to(confidences.dtype)
        return (confidences / self.temperature).softmax(dim=-1)

    def forward(self, states: Tensor) -> Tensor:
        weights = self.weights(self.confidence_scorer(states).squeeze(-1))
        return self.to_logits(torch.einsum("buc,bu->bc", states, weights.to(states.dtype)))


INPUT_TOKENIZERS = {"ConvNeXtImageTokenizer": ConvNeXtImageTokenizer}
OUTPUT_TOKENIZERS = {"FirstSlotAsLogits": FirstSlotAsLogits, "OutputLatentPooling": OutputLatentPooling}
