"""Vision Transformers, V-MoE and their modules: what the shapes of their tensors say, and how to build them."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.published.record import Published, differences
from m2mkd_fast.models.registry import create_model, list_models

# Published sizes by their width; the patch size tells two of one width apart.
_VMOE = {
    (64, 4): "vmoe_micro",
    (512, 32): "vmoe_small32",
    (768, 16): "vmoe_base",
    (768, 32): "vmoe_base32",
    (1024, 16): "vmoe_large",
    (1280, 14): "vmoe_huge",
}
_VIT = {
    (96, 4): "vit_micro",
    (768, 16): "vit_base_patch16_224",
    (1024, 16): "vit_large_patch16_224",
    (1280, 14): "vit_huge_patch14_224",
}
_MODULE = ("depth", "moe_blocks", "divided_depths")


def is_transformer(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a Vision Transformer, or of some of its blocks."""
    return any(re.match(r"blocks\.\d+\.(norm1|attn)\.", name) for name in state)


def identify(state: dict[str, Tensor], options: Mapping[str, Any], facts: dict[str, Any]) -> Published:
    """Name and options of the transformer, or of the one that the module is a part of.

    Raises:
        M2MKDError: the number of heads is needed and not given.
    """
    options = dict(options)
    found = description(state)
    part = _part(state)
    mixture = "num_experts" in found
    name = options.pop("model", None) or _named(found, mixture)
    named = _reference(name)
    heads = named["num_heads"]
    assumed = []
    overrides = differences(found, named)
    overrides.pop("router_bias", None)  # which the name says
    if found.get("class_token") is False:
        overrides |= {"global_pool": "avg", "fc_norm": False}
    if "num_heads" not in options:
        if {"embed_dim", "mlp_ratio"} & overrides.keys():
            raise M2MKDError(
                f"the weights are {found['embed_dim']} wide and do not show how many heads attention has; give "
                "--option num_heads=N"
            )
        assumed.append(f"num_heads={heads}, as in {name} (weights do not show it)")
    elif options["num_heads"] == heads:
        del options["num_heads"]
    if mixture and "top_k" not in options:
        assumed.append("top_k=2, as in all published models (weights do not show it)")
    if mixture and part is None and facts.get("divided_depths", named["divided_depths"]) != named["divided_depths"]:
        overrides["divided_depths"] = facts["divided_depths"]
    if part is not None:
        overrides = {key: value for key, value in overrides.items() if key not in _MODULE}
    kind: Literal["vmoe", "vit", "vmoe module", "vit module"] = "vmoe" if mixture else "vit"
    if part is not None:
        kind = f"{kind} module"
    return Published(kind, name, overrides | options, state, part, facts, tuple(assumed))


def build(published: Published) -> nn.Module:
    """The transformer, or its stage with the stitches, with other weights."""
    from m2mkd_fast.models.transformer_stage import TransformerStage
    from m2mkd_fast.models.vmoe import moe_positions

    before, after = stitches(published.state)
    if published.part is None:
        model = create_model(published.model, **published.options)
        for block in sorted(before.keys() | after.keys()):
            TransformerStage(model, block, block + 1).attach_stitches(before.get(block), after.get(block))
        return model
    # A block before and one after make the stage a middle or last one; they are not part of it.
    found = description(published.state)
    start, depth = int(published.part != "first"), found["depth"]
    total = start + depth + int(published.part != "last")
    arguments = {**published.options, "depth": total}
    if "moe_blocks" in found:
        positions = moe_positions(found["moe_blocks"], depth)
        arguments |= {"moe_blocks": [start + block for block in positions], "divided_depths": None}
    stage = copy.deepcopy(TransformerStage(create_model(published.model, **arguments), start, start + depth))
    stage.attach_stitches(before.get(0), after.get(depth - 1))
    stage.slot = published.facts.get("slot", published.facts.get("block_index"))
    return stage


def stitches(state: Mapping[str, Tensor]) -> tuple[dict[int, int], dict[int, int]]:
    """Widths outside the stitches before and after blocks, by block."""
    sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for name, tensor in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(pre|post)_stitch\.fc\.weight", name)
        if match is not None and tensor.dim() == 2:
            sides[match[2] == "post"][int(match[1])] = tensor.shape[1 if match[2] == "pre" else 0]
    return sides


def description(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes say, by the arguments of our models."""
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    first, depth = min(blocks), max(blocks) + 1

    def shape(name: str, dims: int) -> tuple[int, ...] | None:
        return tuple(state[name].shape) if name in state and state[name].dim() == dims else None

    width = (shape(f"blocks.{first}.norm1.weight", 1) or (0,))[0]
    found: dict[str, Any] = {"embed_dim": width, "depth": depth}
    found["qkv_bias"] = f"blocks.{first}.attn.qkv.bias" in state
    mixtures = tuple(block for block in sorted(blocks) if shape(f"blocks.{block}.moe.experts.h4toh.weight", 3))
    down = shape(f"blocks.{first}.mlp.fc2.weight", 2)
    if mixtures:
        down = shape(f"blocks.{mixtures[0]}.moe.experts.h4toh.weight", 3)
        found |= {"num_experts": down[0], "moe_blocks": _pattern(mixtures, depth)}
        found["router_bias"] = f"blocks.{mixtures[0]}.moe.gate.gate.bias" in state
    if down is not None and width:
        found["mlp_ratio"] = down[-1] / width
    patches, positions = shape("patch_embed.proj.weight", 4), shape("pos_embed", 3)
    if patches is not None:
        found |= {"in_chans": patches[1], "patch_size": patches[2], "class_token": "cls_token" in state}
        if positions is not None:
            found["img_size"] = math.isqrt(max(positions[1] - found["class_token"], 0)) * patches[2]
    if hidden := shape("head.pre_logits.weight", 2):
        found["representation_size"] = hidden[0]
    if logits := shape("head.weight", 2) or shape("head.logits.weight", 2):
        found["num_classes"] = logits[0]
    return found


def _part(state: Mapping[str, Tensor]) -> Literal["first", "middle", "last"] | None:
    starts, ends = any(name.startswith("patch_embed.") for name in state), "norm.weight" in state
    if starts and ends:
        return None
    return "first" if starts else "last" if ends else "middle"


def _named(found: Mapping[str, Any], mixture: bool) -> str:
    """The registered model nearest to a description."""
    sizes = _VMOE if mixture else _VIT
    key = (found["embed_dim"], found.get("patch_size"))
    known = [size for size in sizes if size == key or (key[1] is None and size[0] == key[0])]
    size = sizes[known[0] if known else (768, 16)]
    if not mixture:
        # Deep Incubation's largest ViT has neither the biases nor the layer norms' epsilon of timm's.
        return f"{size}.deep_incubation" if size.startswith("vit_huge") and not found["qkv_bias"] else size
    if found["router_bias"]:
        return f"{size}.m2mkd" if list_models(f"{size}.m2mkd") else "vmoe_base.m2mkd"
    tag = found["moe_blocks"] if isinstance(found["moe_blocks"], str) else "every2"
    return f"{size}.{tag}" if list_models(f"{size}.{tag}") else f"{size}.every2"


def _pattern(mixtures: tuple[int, ...], depth: int) -> str | list[int]:
    """`moe_blocks` of V-MoE for the blocks that have a mixture: the published names where one fits."""
    from m2mkd_fast.models.vmoe import moe_positions

    names = ["all"] + [f"every{n}" for n in range(2, depth + 1)] + [f"last{n}" for n in range(1, depth // 2 + 1)]
    return next((name for name in names if moe_positions(name, depth) == mixtures), list(mixtures))


@functools.cache
def _reference(name: str) -> dict[str, Any]:
    """The same description of a registered model, and its heads."""
    with torch.device("meta"):
        model = create_model(name)
    if not isinstance(model, VisionTransformer):
        raise M2MKDError(f"{name} is no Vision Transformer, and these weights are one's; correct --option model=NAME")
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("stages.")}
    divided = getattr(model, "divided_depths", None)
    facts = {"num_heads": model.blocks[0].attn.num_heads, "divided_depths": None if divided is None else list(divided)}
    return description(state) | facts
