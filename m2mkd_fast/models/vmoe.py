"""Vision Mixture-of-Experts: Vision Transformers some or all of whose blocks have a mixture of MLPs."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.registry import register_model
from m2mkd_fast.models.transformer_stage import TransformerStage
from m2mkd_fast.nn.expert_mlp import ExpertInit
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE

MoEBlocks = str | Sequence[int]


class VMoEBlock(Block):
    """timm's pre-norm transformer block whose MLP is a :class:`~m2mkd_fast.nn.vision_moe.VisionMoE`, or is not.

    State names are the published ones: ``norm1``, ``attn``, ``norm2``, then ``moe`` or ``mlp``, and ``pre_stitch`` and
    ``post_stitch`` where a stage has attached stitches.

    Args:
        moe_layer: builds the mixture, called with the arguments of timm's ``Mlp``; None for a dense block.
        arguments: those of timm's ``Block``.
    """

    def __init__(self, *, moe_layer: Callable[..., VisionMoE] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments if moe_layer is None else {**arguments, "mlp_layer": moe_layer})
        self.is_moe = moe_layer is not None
        if self.is_moe:
            self.moe = self._modules.pop("mlp")
        self.pre_stitch: nn.Module | None = None
        self.post_stitch: nn.Module | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.pre_stitch is not None:
            x = self.pre_stitch(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        feed_forward = self.moe if self.is_moe else self.mlp
        x = x + self.drop_path2(self.ls2(feed_forward(self.norm2(x))))
        return x if self.post_stitch is None else self.post_stitch(x)


class VMoE(VisionTransformer):
    """A timm Vision Transformer with mixtures of MLPs in some or all blocks.

    ``forward`` maps images ``[B, C, H, W]`` to logits ``[B, num_classes]``. Add
    :func:`~m2mkd_fast.nn.vision_moe.auxiliary_losses` to the loss in training.

    Args:
        depth: number of blocks; by default what ``divided_depths`` adds up to, or 12.
        moe_blocks: which blocks have a mixture: ``"all"``; ``"every2"`` for blocks 1, 3, 5, ... (every n-th);
            ``"last2"`` for the last two of blocks 1, 3, 5, ..., as in the V-MoE code; or block indices.
        num_experts: E of each mixture.
        top_k: experts a token chooses.
        router: ``"m2mkd"``, ``"vmoe"``, or the arguments of :class:`~m2mkd_fast.nn.router.Router`.
        router_options: arguments of the router that replace some of those, such as ``{"capacity_factor": 1.5}``.
        expert_init: how experts start, see :class:`~m2mkd_fast.nn.expert_mlp.ExpertLinear`. The default is that of the
            dense layers. ``"published"`` is m2mKD's, which starts the experts of ViT-Base 55 and 28 times smaller.
        expert_drop: dropout probability within the experts; dense blocks use ``proj_drop_rate``.
        expert_act_layer: activation of the experts, such as ``"swiglu"`` (see
            :class:`~m2mkd_fast.nn.expert_mlp.ExpertMLP`); that of the dense blocks if not given.
        divided_depths: number of blocks in each of consecutive stages. Where given, ``state_dict()`` holds every tensor
            under the model's name and also as ``stages.<i>.*``, as the published checkpoints do.
        arguments: those of timm's ``VisionTransformer``. ``act_layer=partial(nn.GELU, approximate="tanh")`` or
            ``"gelu_tanh"`` is V-MoE's activation, timm's default is m2mKD's.

    Raises:
        M2MKDError: blocks, depths or names that do not fit.

    Source: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts"; Lo et al. 2024, "m2mKD".
    """

    def __init__(
        self,
        *,
        depth: int | None = None,
        moe_blocks: MoEBlocks = "every2",
        num_experts: int = 8,
        top_k: int = 2,
        router: str | Mapping[str, Any] = "vmoe",
        router_options: Mapping[str, Any] | None = None,
        expert_init: ExpertInit = "trunc_normal",
        expert_drop: float = 0.0,
        expert_act_layer: Callable[[], nn.Module] | str | None = None,
        divided_depths: Sequence[int] | None = None,
        representation_size: int | None = None,
        **arguments: Any,
    ) -> None:
        depth = _depth(depth, divided_depths)
        if isinstance(router, str) and router not in ROUTERS:
            raise UnknownNameError("router", router, ROUTERS)
        positions = moe_positions(moe_blocks, depth)
        moe_layer = partial(
            _moe_in_place_of_mlp,
            num_experts=num_experts,
            top_k=top_k,
            expert_init=expert_init,
            expert_drop=expert_drop,
            expert_act_layer=expert_act_layer,
            **{**(ROUTERS[router] if isinstance(router, str) else router), **(router_options or {})},
        )

        def block(depth: int, **block_arguments: Any) -> VMoEBlock:
            return VMoEBlock(moe_layer=moe_layer if depth in positions else None, depth=depth, **block_arguments)

        super().__init__(depth=depth, block_fn=block, **arguments)
        if representation_size is not None:
            pre_logits = nn.Linear(self.num_features, representation_size)
            logits = nn.Linear(representation_size, self.num_classes)
            layers = {"pre_logits": pre_logits, "tanh": nn.Tanh(), "logits": logits}
            self.head = nn.Sequential(OrderedDict(layers)).apply(init_weights_vit_timm)
        self.moe_blocks = positions
        self.divided_depths = None if divided_depths is None else tuple(divided_depths)
        self._register_stages()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._register_stages()

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self._register_stages()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VMoE:
        super()._apply(fn, recurse)
        # Where values cannot be replaced in place, as by `to_empty` from the meta device, PyTorch makes new parameters.
        # Modules are shared with the stages, but the tokens and the position embedding are entries of their own there.
        if recurse and self.divided_depths is not None:
            for stage in self.stages:
                for name in stage._parameters.keys() & self._parameters.keys():
                    stage._parameters[name] = self._parameters[name]
        return self

    def _register_stages(self) -> None:
        """Views of the stages, made anew after any of the model's modules or parameters was replaced."""
        if self.divided_depths is None:
            return
        bounds = [sum(self.divided_depths[:i]) for i in range(len(self.divided_depths) + 1)]
        self.stages = nn.ModuleList(TransformerStage(self, start, stop) for start, stop in itertools.pairwise(bounds))


def moe_positions(moe_blocks: MoEBlocks, depth: int) -> tuple[int, ...]:
    """Indices, ascending, of the blocks that ``moe_blocks`` (see :class:`VMoE`) means in a model that deep."""
    if not isinstance(moe_blocks, str):
        positions = tuple(sorted(moe_blocks))
        if len(set(positions)) != len(positions) or any(not 0 <= position < depth for position in positions):
            raise M2MKDError(
                f"moe_blocks is {list(moe_blocks)}; with depth {depth}, give distinct indices 0..{depth - 1}"
            )
        return positions
    if moe_blocks == "all":
        return tuple(range(depth))
    match = re.fullmatch(r"(every|last)([1-9][0-9]*)", moe_blocks)
    if match is None:
        raise M2MKDError(f"moe_blocks is {moe_blocks!r}; expected 'all', 'every<n>', 'last<n>' or block indices")
    number = int(match[2])
    candidates = tuple(range(number - 1, depth, number)) if match[1] == "every" else tuple(range(1, depth, 2))
    if not candidates or (match[1] == "last" and number > len(candidates)):
        raise M2MKDError(f"moe_blocks is {moe_blocks!r}, but a model of depth {depth} has too few blocks for it")
    return candidates if match[1] == "every" else candidates[-number:]


def _depth(depth: int | None, divided_depths: Sequence[int] | None) -> int:
    if divided_depths is None:
        return 12 if depth is None else depth
    if not divided_depths or min(divided_depths) < 1:
        raise M2MKDError(f"divided_depths is {list(divided_depths)}; each stage needs at least one block")
    if depth is not None and depth != sum(divided_depths):
        raise M2MKDError(
            f"depth is {depth}, but divided_depths {list(divided_depths)} add up to {sum(divided_depths)}: change one, "
            "or leave depth out"
        )
    return sum(divided_depths)


def _moe_in_place_of_mlp(
    *,
    drop: float,
    expert_drop: float,
    act_layer: Callable[[], nn.Module],
    expert_act_layer: Callable[[], nn.Module] | str | None,
    **arguments: Any,
) -> VisionMoE:
    """A mixture from the arguments of timm's Mlp; dropout rate and activation of the experts may be their own."""
    return VisionMoE(drop=expert_drop, act_layer=expert_act_layer or act_layer, **arguments)


# Widths, depths and heads of the sizes S, B, L and H, as published for V-MoE; its S is not the ViT-S of later papers.
_SIZES: dict[str, dict[str, Any]] = {
    "vmoe_small32": {"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8},
    "vmoe_base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vmoe_base32": {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vmoe_large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vmoe_huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vmoe_micro": {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 8,
        "num_heads": 4,
        "num_experts": 4,
    },
}
# V-MoE as published: tanh GELU, E = 8 and k = 2 as in its released checkpoints.
_VMOE: dict[str, Any] = {"router": "vmoe", "act_layer": "gelu_tanh"}
_TAGS: dict[str, dict[str, Any]] = {
    "m2mkd": {"router": "m2mkd", "moe_blocks": "all"},
    "every2": {**_VMOE, "moe_blocks": "every2"},
    "last2": {**_VMOE, "moe_blocks": "last2"},
    "last5": {**_VMOE, "moe_blocks": "last5"},
}
# m2mKD cuts its models into four stages; its checkpoints name every tensor by its stage too.
_STAGES = {"vmoe_base": (3, 3, 3, 3), "vmoe_large": (6, 6, 6, 6), "vmoe_huge": (8, 8, 8, 8)}
_VARIANTS = {
    "vmoe_small32": ("every2", "last2"),
    "vmoe_base": ("m2mkd", "every2", "last2"),
    "vmoe_base32": ("every2", "last2"),
    "vmoe_large": ("m2mkd", "every2", "last2"),
    "vmoe_huge": ("m2mkd", "every2", "last5"),
    "vmoe_micro": ("m2mkd", "every2", "last2"),
}


def _build(size: str, tag: str, **overrides: Any) -> VMoE:
    arguments = {**_SIZES[size], **_TAGS[tag]}
    if tag == "m2mkd" and size in _STAGES and "depth" not in overrides:
        arguments["divided_depths"] = _STAGES[size]
    if overrides.get("divided_depths") is not None:
        arguments["depth"] = None  # it follows from the stages
    return VMoE(**{**arguments, **overrides})


for _size, _tags in _VARIANTS.items():
    for _tag in _tags:
        register_model(f"{_size}.{_tag}")(partial(_build, _size, _tag))
