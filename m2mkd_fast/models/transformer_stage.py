"""Consecutive blocks of a timm Vision Transformer as a module of their own that shares the model's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.fresh import remove_dropout
from m2mkd_fast.models.stage import Stage
from m2mkd_fast.nn.cut import Cut

# Everything a VisionTransformer holds beside its blocks, in the order of the published state dicts. What is on neither
# list has no known place in a stage, and a model that has such a thing is refused instead of being cut wrongly.
STEM = ("pos_embed", "cls_token", "reg_token", "dist_token", "patch_embed", "pos_drop", "patch_drop", "norm_pre")
TAIL = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")


def check_supported(model: nn.Module) -> None:
    """Raise M2MKDError unless the model can be cut into stages whose composition is the model, bit for bit."""
    remedy = (
        "supported are timm's VisionTransformer and its subclasses that keep its `forward` and `forward_features` "
        "(ViT, DeiT, DeiT distilled, V-MoE); pass the bare model, not a compiled, parallel or stage wrapper"
    )
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, VisionTransformer):
        raise M2MKDError(f"cannot cut a {name} into modules; {remedy}")
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(VisionTransformer, method):
            raise M2MKDError(f"cannot cut a {name} into modules, because it has a `{method}` of its own; {remedy}")
    held = [*model._modules, *model._parameters, *model._buffers]
    strange = sorted(set(held) - set(STEM) - set(TAIL) - {"blocks", "stages"})
    if strange:
        raise M2MKDError(f"cannot cut a {name} into modules: no known place for its {', '.join(strange)}; {remedy}")


class TransformerStage(Stage, VisionTransformer):
    """Blocks `start` to `stop` (exclusive) of a Vision Transformer, as a view: its parameters are the model's own.

    The first stage also owns the patch embedding, the class, register and distillation tokens, the position embedding
    and the norm before the blocks; the last one the norm after the blocks, the pooling and the classifier. With B
    images, N tokens (class and register tokens included) and width D:

    * the first stage maps images `[B, C, H, W]` to tokens `[B, N, D]`, a middle one `[B, N, D]` to `[B, N, D]`, and the
      last one `[B, N, D]` to logits `[B, num_classes]`; a stage that is both first and last is the whole model;
    * the composition of all stages is the model, bit for bit.

    State names are the published ones: `patch_embed.*`, `cls_token`, `pos_embed`, `blocks.0.*` counted from 0 in each
    stage, `norm.*`, `head.*`.

    A view holds modules and parameters, not names: replacing one in the model afterwards (`reset_classifier`, and
    `to_empty` from the meta device) does not reach the view; changing values, moving and casting do.

    Attributes:
        slot: position of the stage in its chain, or None where nobody has said.
        start, stop: the blocks of the model that the stage holds.
        is_first, is_last: whether the stage reads images, and whether it gives logits.
        image_shape: (channels, height, width) of the whole model's images.
        num_classes: classes of the whole model.
        tokens: N, or None where it varies (dynamic image size, patch dropout).
        grid_size: rows and columns of the patches, at the image size of `image_shape`.
    """

    def __init__(self, model: VisionTransformer, start: int, stop: int) -> None:
        nn.Module.__init__(self)
        depth = len(model.blocks)
        if not 0 <= start < stop <= depth:
            raise M2MKDError(f"a stage needs 0 <= start < stop <= {depth} (the model's blocks), not {start} and {stop}")
        for name, value in vars(model).items():  # settings such as global_pool, num_prefix_tokens, grad_checkpointing
            if not name.startswith("_") and name not in (*STEM, *TAIL, "stages"):
                vars(self)[name] = value
        self.model_class = type(model)
        self.slot: int | None = None
        self.start, self.stop = start, stop
        self.is_first, self.is_last = start == 0, stop == depth
        for name in STEM:
            setattr(self, name, getattr(model, name, None) if self.is_first else None)
        self.blocks = nn.Sequential(*list(model.blocks)[start:stop])
        for name in TAIL:
            setattr(self, name, getattr(model, name, None) if self.is_last else None)
        self.image_shape = (model.in_chans, *model.patch_embed.img_size)
        varying = model.dynamic_img_size or isinstance(model.patch_drop, PatchDropout)
        self.tokens = None if varying else model.patch_embed.num_patches + model.num_prefix_tokens
        self.grid_size = model.patch_embed.grid_size
        self.pre_stitch: nn.Module | None = None
        self.post_stitch: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        # The methods are looked up in the model's own class: DeiT distilled, for one, has its own.
        if self.is_first:
            x = self.patch_embed(x)
            x = self.model_class._pos_embed(self, x)
            x = self.patch_drop(x)
            x = self.norm_pre(x)
        if self.pre_stitch is not None:
            x = self.pre_stitch(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        if self.post_stitch is not None:
            x = self.post_stitch(x)
        if self.is_last:
            x = self.norm(x)
            x = self.model_class.forward_head(self, x)
        return x

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def bare_in_cut(self) -> Cut | None:
        """What the blocks read; None where the stage reads images."""
        return None if self.is_first else self._cut

    @property
    def bare_out_cut(self) -> Cut | None:
        """What the blocks give; None where the stage gives logits."""
        return None if self.is_last else self._cut

    @property
    def _cut(self) -> Cut:
        grid = None if self.tokens is None else self.grid_size
        return Cut(self.embed_dim, "tokens", grid, self.num_prefix_tokens)

    def _stitch_owner(self, side: str) -> nn.Module:
        block = self.blocks[0 if side == "pre" else -1]
        return block if hasattr(block, "pre_stitch") else self

    def fresh(self, depth: int, start: int) -> TransformerStage:
        """An independent stage of the same kind with `depth` newly initialised blocks, without dropout of any sort.

        New block j is built like this stage's block `j * self.depth // depth`, so that a mix of block kinds is kept as
        far as the depth allows. The initialisation is the model's own (timm's), drawn from torch's generator; `start`
        is the number of blocks before this stage in its new chain.
        """
        sources = [self.blocks[j * self.depth // depth] for j in range(depth)]
        blocks = nn.Sequential(*(copy.deepcopy(source) for source in sources))
        stage = copy.deepcopy(self, {id(self.blocks): blocks})  # everything but the blocks, which are those just made
        stage.start, stage.stop = start, start + depth
        remove_dropout(stage)
        stage.init_weights(needs_reset=True)
        return stage.requires_grad_(True).train()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layers of the model's class, behind the stitch before them; a stitch after them counts as a head."""
        return {"pre_stitch": r"^pre_stitch", **self.model_class.group_matcher(self, coarse)}

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        super().init_weights(mode=mode, needs_reset=needs_reset)

    def fix_init_weight(self) -> None:
        with torch.no_grad():
            for position, block in enumerate(self.blocks, start=self.start + 1):
                block.attn.proj.weight.div_((2.0 * position) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * position) ** 0.5)

    def extra_repr(self) -> str:
        return f"blocks {self.start}..{self.stop - 1} of a {self.model_class.__name__}"
