"""Give a trained timm ViT experts that start as copies of its MLPs, and train them."""

import timm

import m2mkd_fast as m2mkd

images = m2mkd.create_dataset("digits").splits
vit = timm.create_model(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
)
m2mkd.train_end_to_end(vit, images["train"], steps=300)  # stands for your pretrained weights
print(f"dense: {m2mkd.evaluate_accuracy(vit, images['test']):.1f} %")

handle = m2mkd.apply(vit, {"blocks.[13].mlp": m2mkd.mixture(num_experts=4, top_k=2)})
print(handle.report)
print(f"with experts, untrained: {m2mkd.evaluate_accuracy(vit, images['test']):.1f} %")

m2mkd.train_end_to_end(vit, images["train"], steps=300, learning_rate=1e-3)
print(f"with experts, trained: {m2mkd.evaluate_accuracy(vit, images['test']):.1f} %")
