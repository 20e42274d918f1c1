"""From a hierarchical timm model to a Vision Mixture-of-Experts: split, meta model, pairs, assembly; a few minutes."""

import timm

import m2mkd_fast as m2mkd

images = m2mkd.create_dataset("digits").splits
teacher = timm.create_model(
    "swin_tiny_patch4_window7_224",
    img_size=16,
    patch_size=2,
    window_size=4,
    in_chans=1,
    num_classes=10,
    embed_dim=32,
    depths=(4, 4),
    num_heads=(2, 4),
)
m2mkd.train_end_to_end(teacher, images["train"], steps=400, batch_size=64)  # stands for your pretrained weights

parts = m2mkd.split(teacher, 4)
meta = m2mkd.meta_model(parts)
m2mkd.teach_meta(meta, parts, images["train"], steps=200, batch_size=64)
for slot, module in enumerate(parts):
    accuracy = m2mkd.evaluate_accuracy(m2mkd.hybrid(meta, slot, module), images["test"])
    print(f"the teacher's module {slot} in the meta model: {accuracy:.1f} %")

student = m2mkd.create_model("vmoe_micro.m2mkd", depth=4)
modules = m2mkd.student_modules(student, 4, meta.cuts)
for slot, module in enumerate(modules):
    m2mkd.teach_module(module, slot, parts, meta, images["train"], steps=250, batch_size=64, learning_rate=6e-3)

model = m2mkd.assemble(modules, stitches="kept").model
print(f"put together, untrained as a whole: {m2mkd.evaluate_accuracy(model, images['test']):.1f} %")
m2mkd.train_end_to_end(model, images["train"], steps=60, batch_size=64, learning_rate=1e-3)
print(f"after 60 steps as a whole: {m2mkd.evaluate_accuracy(model, images['test']):.1f} %")
