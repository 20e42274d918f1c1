"""Save a model with its model card, read it back, prepare its upload, and export it."""

import torch

import m2mkd_fast as m2mkd

images = m2mkd.create_dataset("digits").splits
model = m2mkd.create_model("vmoe_micro.m2mkd", depth=4)
m2mkd.train_end_to_end(model, images["train"], steps=200)
results = {"test_accuracy": m2mkd.evaluate_accuracy(model, images["test"])}

provenance = {"data": "digits", "results": results}
m2mkd.save_pretrained(model, "digits_vmoe", provenance=provenance)
again = m2mkd.create_model("local-dir:digits_vmoe")
sample = torch.randn(4, 1, 16, 16)
assert torch.equal(again(sample), model.eval()(sample))

# Without dry_run it is uploaded; `hf auth login` once, before.
m2mkd.push_to_hub(model, "owner/digits-vmoe", provenance=provenance, dry_run="what_would_be_sent")

print(m2mkd.export(model, "digits_vmoe.pt2", sample))
