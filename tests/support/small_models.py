"""Small models of timm's own classes that are not Vision Transformers, in every layout of features."""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn


def convnext(**overrides: object) -> ConvNeXt:
    """Channels first; 8 blocks; layer scales large enough to matter."""
    arguments = {"in_chans": 1, "num_classes": 10, "depths": (3, 3, 1, 1), "patch_size": 2, "output_stride": 8}
    return ConvNeXt(**{**arguments, "dims": (8, 12, 16, 16), "ls_init_value": 0.5, **overrides})


def swin(**overrides: object) -> SwinTransformer:
    """Channels last; 6 blocks, every second with shifted windows."""
    arguments = {"img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": 10, "window_size": 4, "embed_dim": 12}
    return SwinTransformer(**{**arguments, "depths": (4, 2), "num_heads": (2, 4), "drop_path_rate": 0.0, **overrides})


def resnet(**overrides: object) -> ResNet:
    """Channels first with batch normalisation; 7 blocks."""
    arguments = {"block": BasicBlock, "layers": (3, 2, 1, 1), "channels": (8, 12, 16, 16), "in_chans": 1}
    return ResNet(**{**arguments, "num_classes": 10, "output_stride": 8, **overrides})


SMALL = {"convnext": convnext, "swin": swin, "resnet": resnet}


def small(name: str, seed: int = 0, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return SMALL[name](**overrides)
