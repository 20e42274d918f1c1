from __future__ import annotations

import torch

from m2mkd_fast.models.registry import create_model


def test_micro_has_its_documented_geometry() -> None:
    model = create_model("vit_micro")
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (96, 8, 4)
    assert model.pos_embed.shape == (1, 17, 96)
    assert model.blocks[0].attn.qkv.bias is not None
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_micro_takes_the_common_overrides() -> None:
    model = create_model("vit_micro", num_classes=4, img_size=8, in_chans=3)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_golden_vit_of_the_published_distillation_runs(golden_dir, read_golden) -> None:
    """The teacher of the golden files is a small ViT of this kind: its state has our names and shapes."""
    metadata, tensors = read_golden(golden_dir / "m2mkd_vmoe_idx0_soft.safetensors")
    config = metadata["config"]
    model = create_model("vit_micro", in_chans=3, depth=sum(config["teacher_depths"]), **config["vit"])
    stages = {}
    for name, tensor in tensors.items():
        if name.startswith("teacher/stages."):
            stages.setdefault(int(name.split(".")[1]), {})[name.split(".", 2)[2]] = tensor.shape
    names = {}
    start = 0
    for index, depth in enumerate(config["teacher_depths"]):
        for name, shape in stages[index].items():
            if name.startswith("blocks."):
                _, block, rest = name.split(".", 2)
                name = f"blocks.{start + int(block)}.{rest}"
            names[name] = shape
        start += depth
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == names
