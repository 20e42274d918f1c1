"""From a hierarchical timm model to a Vision Mixture-of-Experts: split, meta model, pairs, assembly; three minutes."""

import timm

import m2mkd_fast as m2mkd

images = m2mkd.create_dataset("digits", image_size=32).splits
teacher = timm.create_model("convnext_atto", in_chans=1, num_classes=10, depths=(2, 2, 2, 2), dims=(16, 32, 64, 128))
m2mkd.train_end_to_end(teacher, images["train"], steps=600)  # stands for your pretrained weights

parts = m2mkd.split(teacher, 4, image_shape=(1, 32, 32))
meta = m2mkd.meta_model(parts)
m2mkd.teach_meta(meta, parts, images["train"], steps=300)
for slot, module in enumerate(parts):
    accuracy = m2mkd.evaluate_accuracy(m2mkd.hybrid(meta, slot, module), images["test"])
    print(f"the teacher's module {slot} in the meta model: {accuracy:.1f} %")

student = m2mkd.create_model("vmoe_micro.m2mkd", img_size=32, depth=4)
modules = m2mkd.student_modules(student, 4, meta.cuts)
for slot, module in enumerate(modules):
    m2mkd.teach_module(module, slot, parts, meta, images["train"], steps=400, learning_rate=6e-3)

model = m2mkd.assemble(modules, stitches="kept").model
print(f"put together, untrained as a whole: {m2mkd.evaluate_accuracy(model, images['test']):.1f} %")
m2mkd.train_end_to_end(model, images["train"], steps=100, learning_rate=1e-3)
print(f"after 100 steps as a whole: {m2mkd.evaluate_accuracy(model, images['test']):.1f} %")
