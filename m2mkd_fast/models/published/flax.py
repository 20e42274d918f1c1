"""The official V-MoE's parameters (google-research/vmoe, flax) under our names, and back.

An ``.npz`` holds them flattened: ``numpy.savez(path, **flax.traverse_util.flatten_dict(params, sep="/"))``. With D the
width, A heads of size C, H the hidden width, E experts::

    embedding/kernel [P, P, channels, D]                     patch_embed.proj.weight [D, channels, P, P]
    cls [1, 1, D]                                            cls_token
    Encoder/posembed_input/pos_embedding [1, N, D]           pos_embed
    Encoder/encoderblock_<i>/LayerNorm_0/scale               blocks.<i>.norm1.weight
        SelfAttention/{query,key,value}/kernel [D, A, C]     attn.qkv.weight [3 A C, D]
        SelfAttention/out/kernel [A, C, D]                   attn.proj.weight [D, A C]
        Mlp/Dense_0/kernel [D, H]                            mlp.fc1.weight [H, D]
        Moe/Router/dense/kernel [D, E]                       moe.gate.gate.weight [E, D]
        Moe/Mlp/Dense_0/kernel [E, D, H]                     moe.experts.htoh4.weight [E, H, D]
    Encoder/encoder_norm/scale                               norm.weight
    pre_logits/kernel, head/kernel                           head.pre_logits.weight, head.logits.weight
    head/kernel [D, classes]                                 head.weight where there is no pre_logits
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

_IN_BLOCK = re.compile(r"(.*?)Encoder/encoderblock_\d+/")
_QKV = ("query", "key", "value")
# Theirs and ours, without the block's prefixes. Kernels are transposed.
_BLOCK = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_1/scale": "norm2.weight",
    "LayerNorm_1/bias": "norm2.bias",
    "SelfAttention/out/bias": "attn.proj.bias",
    "Mlp/Dense_0/kernel": "mlp.fc1.weight",
    "Mlp/Dense_0/bias": "mlp.fc1.bias",
    "Mlp/Dense_1/kernel": "mlp.fc2.weight",
    "Mlp/Dense_1/bias": "mlp.fc2.bias",
    "Moe/Router/dense/kernel": "moe.gate.gate.weight",
    "Moe/Mlp/Dense_0/kernel": "moe.experts.htoh4.weight",
    "Moe/Mlp/Dense_0/bias": "moe.experts.htoh4.bias",
    "Moe/Mlp/Dense_1/kernel": "moe.experts.h4toh.weight",
    "Moe/Mlp/Dense_1/bias": "moe.experts.h4toh.bias",
}
_OUTSIDE = {
    "embedding/bias": "patch_embed.proj.bias",
    "cls": "cls_token",
    "Encoder/posembed_input/pos_embedding": "pos_embed",
    "Encoder/encoder_norm/scale": "norm.weight",
    "Encoder/encoder_norm/bias": "norm.bias",
}
_HEAD = {"head/kernel": "head.weight", "head/bias": "head.bias"}
_HEADS = {
    "pre_logits/kernel": "head.pre_logits.weight",
    "pre_logits/bias": "head.pre_logits.bias",
    "head/kernel": "head.logits.weight",
    "head/bias": "head.logits.bias",
}


def is_flax(names: Mapping[str, object]) -> bool:
    """Whether the names are those of the official V-MoE's parameters, alone or within a larger tree."""
    return any(_IN_BLOCK.match(name) for name in names)


def from_flax(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, list[str]]:
    """Our state, the number of heads, and the names of arrays that are not parameters (an optimizer's, say).

    Names that mean nothing here stay as they are: comparing the state with a model of ours lists them.
    """
    # A whole training state has the same names again in its optimizer, deeper.
    prefixes = {match[1] for name in arrays if (match := _IN_BLOCK.match(name))}
    root = min(prefixes, key=lambda prefix: (prefix.count("/"), prefix not in ("params/", "target/")))
    others = tuple(prefixes - {root}) if root == "" else ()
    left_out = [name for name in arrays if not name.startswith(root) or name.startswith(others)]
    params = {name.removeprefix(root): tensor for name, tensor in arrays.items() if name not in left_out}
    queries = [tensor for name, tensor in params.items() if name.endswith("SelfAttention/query/kernel")]
    heads = queries[0].shape[1] if queries and queries[0].dim() == 3 else 0
    outside = _OUTSIDE | (_HEADS if "pre_logits/kernel" in params else _HEAD)
    state: dict[str, Tensor] = {}
    for name, tensor in params.items():
        match = re.fullmatch(r"Encoder/encoderblock_(\d+)/(.+)", name)
        if name == "embedding/kernel" and tensor.dim() == 4:
            state["patch_embed.proj.weight"] = tensor.permute(3, 2, 0, 1)
        elif name in outside:
            state[outside[name]] = tensor.mT if name.endswith("kernel") else tensor
        elif match is not None:
            state |= _block_tensor(f"Encoder/encoderblock_{match[1]}/", f"blocks.{match[1]}.", match[2], tensor, params)
        else:
            state[name] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}, heads, left_out


def _block_tensor(theirs: str, ours: str, name: str, tensor: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if name in _BLOCK:
        return {ours + _BLOCK[name]: tensor.mT if name.endswith("kernel") else tensor}
    if name == "SelfAttention/out/kernel" and tensor.dim() == 3:
        return {f"{ours}attn.proj.weight": tensor.flatten(0, 1).mT}
    projection = re.fullmatch(r"SelfAttention/(query|key|value)/(kernel|bias)", name)
    if projection is None:
        return {theirs + name: tensor}
    if projection[1] != "query":  # the query's name stands for all three
        return {}
    three = [params.get(f"{theirs}SelfAttention/{which}/{projection[2]}") for which in _QKV]
    absent = [which for which, part in zip(_QKV, three, strict=True) if part is None or part.shape != tensor.shape]
    if absent:
        raise M2MKDError(
            f"{theirs}SelfAttention: {' and '.join(absent)}/{projection[2]} is missing or has another shape than query/"
            f"{projection[2]} {list(tensor.shape)}; write the parameters anew"
        )
    if projection[2] == "kernel":
        return {f"{ours}attn.qkv.weight": torch.cat([part.flatten(1).mT for part in three])}
    return {f"{ours}attn.qkv.bias": torch.cat([part.flatten() for part in three])}


def to_flax(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The official V-MoE's names for a state of ours.

    Raises:
        M2MKDError: a tensor that the official V-MoE has no place for, such as a router's bias or a stitch.
    """
    outside = {ours: theirs for names in (_OUTSIDE, _HEAD, _HEADS) for theirs, ours in names.items()}
    blocks = {ours: theirs for theirs, ours in _BLOCK.items()}
    arrays: dict[str, Tensor] = {}
    foreign = []
    for name, tensor in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        place = f"Encoder/encoderblock_{match[1]}/" if match else ""
        theirs = blocks.get(match[2]) if match else outside.get(name)
        if name == "patch_embed.proj.weight":
            arrays["embedding/kernel"] = tensor.permute(2, 3, 1, 0)
        elif theirs is not None:
            arrays[place + theirs] = tensor.mT if theirs.endswith("kernel") else tensor
        elif match and match[2] == "attn.proj.weight":
            arrays[f"{place}SelfAttention/out/kernel"] = tensor.mT.unflatten(0, (heads, -1))
        elif match and match[2] == "attn.qkv.weight":
            for which, part in zip(_QKV, tensor.chunk(3), strict=True):
                arrays[f"{place}SelfAttention/{which}/kernel"] = part.mT.unflatten(1, (heads, -1))
        elif match and match[2] == "attn.qkv.bias":
            for which, part in zip(_QKV, tensor.chunk(3), strict=True):
                arrays[f"{place}SelfAttention/{which}/bias"] = part.unflatten(0, (heads, -1))
        else:
            foreign.append(name)
    if foreign:
        raise M2MKDError(
            f"the official V-MoE has no place for {', '.join(foreign)}; give a file name that ends in .safetensors for "
            "m2mKD's layout"
        )
    return {name: tensor.contiguous() for name, tensor in arrays.items()}
