"""Distil a timm model into a Vision Mixture-of-Experts, module by module."""

import timm

import m2mkd_fast as m2mkd

images = m2mkd.create_dataset("digits").splits
teacher = timm.create_model(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
)
m2mkd.train_end_to_end(teacher, images["train"], steps=600)  # stands for your pretrained weights

parts = m2mkd.split(teacher, 4)
meta = m2mkd.meta_model(parts)
m2mkd.teach_meta(meta, parts, images["train"], steps=300)

student = m2mkd.create_model("vmoe_micro.m2mkd", depth=4)
modules = m2mkd.student_modules(student, 4, parts.cuts)
for slot, module in enumerate(modules):
    m2mkd.teach_module(module, slot, parts, meta, images["train"], steps=400, learning_rate=6e-3)

model = m2mkd.assemble(modules, stitches="kept").model
print(f"put together, untrained as a whole: {m2mkd.evaluate_accuracy(model, images['test']):.1f} %")
