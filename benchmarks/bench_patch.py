"""What `m2mkd_fast.apply` brings: attention layers of timm before and after, in turns.

    python benchmarks/bench_patch.py --pairs 60

Shapes are those of BEiT-Base and Swin-Tiny at 224 pixels (196 patches and a class token; windows of 49, of which half
of the layers shift); a mask is passed where the model passes one.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from _paired import Ratio, Results, paired_ratio
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from m2mkd_fast import apply, biased_attention

CASES = {
    "BEiT-Base": lambda: Beit(depth=1, use_rel_pos_bias=True, qkv_bias=True, num_classes=0).blocks[0],
    "BEiT-Base, 96 px": lambda: Beit(img_size=96, depth=1, use_rel_pos_bias=True, qkv_bias=True).blocks[0],
    "Swin-Tiny, stage 0": lambda: SwinTransformer(depths=(2,), num_heads=(3,)).layers[0].blocks[0],
    "Swin-Tiny, stage 0, shifted": lambda: SwinTransformer(depths=(2,), num_heads=(3,)).layers[0].blocks[1],
    "Swin-Tiny, stage 2": lambda: SwinTransformer(depths=(1, 1, 2), num_heads=(3, 6, 12)).layers[2].blocks[0],
    "Swin-Tiny, stage 2, shifted": lambda: SwinTransformer(depths=(1, 1, 2), num_heads=(3, 6, 12)).layers[2].blocks[1],
}


def measure(case: str, images: int, training: bool, pairs: int, device: str) -> Ratio:
    """One attention layer, forward without gradients, or forward and backward."""
    torch.manual_seed(0)
    block = CASES[case]().to(device).train(training)
    patched = copy.deepcopy(block)
    apply(patched, {"attn": biased_attention()})
    if case.startswith("BEiT"):
        tokens, arguments = block.attn.relative_position_index.shape[0], ()
        windows = images
    else:
        tokens, arguments = block.attn.window_area, (block.attn_mask,)
        height, width = block.input_resolution
        windows = images * height * width // tokens
    x = torch.randn(windows, tokens, block.attn.qkv.in_features, device=device, requires_grad=training)

    def call_of(attention: nn.Module) -> object:
        parameters = [x, *attention.parameters()]
        grad = torch.ones_like(x)

        def call() -> object:
            with torch.set_grad_enabled(training):
                out: Tensor = attention(x, *arguments)
                return torch.autograd.grad(out, parameters, grad) if training else out

        return call

    kind = "forward and backward" if training else "forward"
    return paired_ratio(
        f"{case}, {images} images, {kind}",
        call_of(block.attn),
        call_of(patched.attn),
        pairs=pairs,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    for case in options.cases:
        for training in (False, True):
            results.add(measure(case, options.images, training, options.pairs, options.device))


if __name__ == "__main__":
    main()
