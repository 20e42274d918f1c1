"""Vision Transformers that timm does not have: one small enough for a CPU, and Deep Incubation's largest."""

from __future__ import annotations

from functools import partial

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_fast.models.registry import register_model


@register_model("vit_micro")
def vit_micro(**overrides: object) -> VisionTransformer:
    """timm's VisionTransformer for 16x16 grey images: 16 patches of 4x4 and a class token, width 96, 8 blocks.

    Small enough to train on a CPU in minutes: the teacher of tests, examples and demonstrations.
    """
    arguments = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 96,
        "depth": 8,
        "num_heads": 4,
        "qkv_bias": True,
    }
    return VisionTransformer(**{**arguments, **overrides})


@register_model("vit_huge_patch14_224.deep_incubation")
def vit_huge_deep_incubation(**overrides: object) -> VisionTransformer:
    """ViT-H/14 as Deep Incubation and m2mKD train it (arXiv 2212.04129): no query, key and value biases, epsilon 1e-5.

    Their smaller ones are timm's `vit_base_patch16_224` and `vit_large_patch16_224`.
    """
    arguments = {"qkv_bias": False, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    return timm.create_model("vit_huge_patch14_224", **{**arguments, **overrides})
