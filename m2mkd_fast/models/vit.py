"""A Vision Transformer small enough to train on a CPU in minutes: the teacher of tests, examples and demonstrations."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from m2mkd_fast.models.registry import register_model


@register_model("vit_micro")
def vit_micro(**overrides: object) -> VisionTransformer:
    """timm's VisionTransformer for 16x16 grey images: 16 patches of 4x4 and a class token, width 96, 8 blocks."""
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
