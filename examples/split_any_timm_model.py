"""Take timm models of several families apart, show what passes each cut, and prove that the parts equal the model."""

import timm
import torch

import m2mkd_fast as m2mkd

SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 4},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)},
    "resnet18": {},
    "regnety_002": {},
}

for name, options in SMALL.items():
    model = timm.create_model(name, num_classes=10, **options).eval()
    size = options.get("img_size", 64)
    parts = m2mkd.split(model, 4, image_shape=(3, size, size))
    m2mkd.verify_split(model, parts.eval(), torch.randn(2, 3, size, size))
    print(f"{name}: blocks {[module.depth for module in parts]}; " + "; ".join(str(cut) for cut in parts.cuts))
