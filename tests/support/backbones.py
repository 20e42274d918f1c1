"""Small models of many kinds, with every parameter and statistic away from its initial value."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.levit import Levit
from timm.models.mlp_mixer import MlpMixer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from m2mkd_fast.models.spine import Spine, find_spine

IMAGE = (1, 32, 32)
_TOKENS = {
    "img_size": 32,
    "in_chans": 1,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 6,
}

SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 2, 1), 6, 1, channels=(8, 16, 24, 32), zero_init_last=False),
    "convnext": lambda: ConvNeXt(1, 6, depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), patch_size=2, ls_init_value=1.0),
    "swin": lambda: SwinTransformer(
        32, 2, 1, 6, embed_dim=8, depths=(1, 2, 2), num_heads=(1, 2, 2), window_size=4, drop_path_rate=0.2
    ),
    "beit": lambda: Beit(**_TOKENS, use_shared_rel_pos_bias=True, use_abs_pos_emb=False),
    "eva": lambda: Eva(**_TOKENS, use_rot_pos_emb=True, pos_drop_rate=0.1),
    "cait": lambda: Cait(**_TOKENS),
    "mixer": lambda: MlpMixer(6, 32, 1, 8, num_blocks=3, embed_dim=16),
    "regnet": lambda: RegNet(RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=8, se_ratio=0.25), 1, 6),
    "pvt": lambda: PyramidVisionTransformerV2(
        1, 6, depths=(1, 2, 1), embed_dims=(8, 12, 16), num_heads=(1, 2, 2), sr_ratios=(4, 2, 1), mlp_ratios=(2, 2, 2)
    ),
    "levit": lambda: Levit(
        32, 1, 6, embed_dim=(16, 24), key_dim=8, depth=(2, 1), num_heads=2, stem_type="s8", drop_rate=0.1
    ),
    "densenet": lambda: DenseNet(4, (2, 2, 1), 6, 1),
}


def small(kind: str) -> nn.Module:
    """One of `SMALL`, the same at each call, in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return shaken(SMALL[kind]()).eval()


@functools.cache
def small_spine(kind: str) -> tuple[nn.Module, Spine]:
    """A small model, to be left as it is, and its spine."""
    model = small(kind)
    return model, find_spine(model, IMAGE)


def shaken(model: nn.Module) -> nn.Module:
    """Parameters and statistics away from their initial values, which hide a missing layer where they are 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                tensor.mul_(1 + torch.rand(tensor.shape, generator=generator))
    return model
