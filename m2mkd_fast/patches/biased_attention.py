"""Faster attention in the place of timm's with a learned position bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation, EvaluationCache
from m2mkd_fast.ops.latent_attention import latent_attention
from m2mkd_fast.patches.replacement import Replacement, is_from

# From this many tokens on, the gradients of attention with a bias come faster from the operator (measured: windows of
# 49 and sequences of 37 tokens are slower, 196 and 197 faster).
_TOKENS_FOR_OPERATOR = 128


def biased_attention() -> BiasedAttentions:
    """For :func:`m2mkd_fast.apply`: faster attention where timm adds a learned bias to the scores.

    >>> m2mkd_fast.apply(beit, {"blocks.*.attn": biased_attention()})

    The layers have the very parameters, under the same names, and compute the same. Known are

    - BEiT's ``Attention``, also with a shared bias: in evaluation the bias is gathered from its table once, not in
      every forward pass; in training on a CPU, sequences of 128 tokens and more go through
      :func:`~m2mkd_fast.ops.latent_attention.latent_attention`, whose gradient of the bias, a sum over images, needs
      no tensor of all images' scores;
    - Swin's ``WindowAttention``: in evaluation fused attention, with bias and mask added up once, not once a forward
      pass and image.

    Elsewhere they compute what timm does. Dropout on attention weights is left to PyTorch's attention.
    """
    return BiasedAttentions()


class BiasedAttentions(Replacement):
    """See :func:`biased_attention`."""

    def knows(self, module: nn.Module) -> bool:
        return _maker(module) is not None

    def make(self, module: nn.Module) -> nn.Module:
        maker = _maker(module)
        if maker is None:
            raise M2MKDError(
                "biased_attention() replaces the Attention of timm's beit and the WindowAttention of its "
                f"swin_transformer, not a {type(module).__module__}.{type(module).__name__}"
            )
        return maker(module)


class _BiasedAttention(CachesInEvaluation):
    """What the layers share: the stock layer's own children and parameters, and the remembered bias."""

    optional: tuple[str, ...] = ()
    """Attributes that are None where the stock layer does without a tensor or child."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        for name in self.optional:
            if getattr(stock, name) is None:
                setattr(self, name, None)
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        persistent = set(stock.state_dict())
        for name, buffer in stock.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in persistent)
        for name, child in stock.named_children():
            self.add_module(name, child)
        self.num_heads = stock.num_heads
        self.training = stock.training
        self._cache = EvaluationCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def _split_heads(self, qkv: Tensor) -> Sequence[Tensor]:
        """``[B, N, 3 H D]`` to three of ``[B, H, N, D]``."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _project(self, messages: Tensor) -> Tensor:
        """``[B, H, N, D]`` to ``[B, N, C]``."""
        return self.proj_drop(self.proj(messages.transpose(1, 2).flatten(-2)))

    @property
    def _dropout(self) -> float:
        return self.attn_drop.p if self.training else 0.0


class BEiTAttention(_BiasedAttention):
    """For BEiT's ``Attention``: ``[B, N, C]`` to the same, ``shared_rel_pos_bias [H, N, N]``."""

    optional = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index")

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.qkv_bias_separate = getattr(stock, "qkv_bias_separate", False)  # not in every version of timm

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            # The two round differently in half precision.
            qkv = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        query, key, value = self._split_heads(qkv)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._own_bias()
            bias = own if bias is None else own + bias
        return self._project(attend(query, key, value, bias, self._dropout))

    def _own_bias(self) -> Tensor:
        table, index = self.relative_position_bias_table, self.relative_position_index
        return self._cache.get([table, index], lambda: _gather(table, index))


class SwinAttention(_BiasedAttention):
    """For Swin's ``WindowAttention``: ``[B W, N, C]`` windows to the same, ``mask [W, N, N]``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self._split_heads(self.qkv(x))
        table, index = self.relative_position_bias_table, self.relative_position_index
        sources = [table, index] if mask is None else [table, index, mask]
        bias = self._cache.get(sources, lambda: _window_bias(table, index, mask))
        return self._project(self._attend(query, key, value, bias))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        windows, heads, tokens, _ = query.shape
        if query.device.type == "cpu" and torch.is_grad_enabled():
            # Gradients of small windows come faster from plain products than from fused attention.
            scores = query * query.shape[-1] ** -0.5 @ key.mT
            scores = (scores.unflatten(0, (-1, bias.shape[0])) + bias).view(windows, heads, tokens, tokens)
            return self.attn_drop(scores.softmax(dim=-1)) @ value
        if bias.shape[0] > 1:
            bias = bias.expand(windows // bias.shape[0], -1, -1, -1, -1).flatten(0, 1)
        return F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout_p=self._dropout)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention of ``[B, H, N, D]`` with a ``bias [H, N, N]`` of the scores, the same for all images."""
    learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if learns and not dropout and query.device.type == "cpu" and query.shape[2] >= _TOKENS_FOR_OPERATOR:
        # The operator's affinities differ between images and are the same for all heads: heads take the part of images.
        swapped = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return latent_attention(*swapped, bias).transpose(0, 1)
    mask = None if bias is None else bias.to(query.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """``[H, N, N]`` from a table ``[distances, H]`` and the index ``[N, N]``."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()


def _window_bias(table: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    """``[1 or W, H, N, N]``."""
    bias = _gather(table, index).unsqueeze(0)
    return bias if mask is None else bias + mask.unsqueeze(1)


_MAKERS = {
    ("beit", "Attention"): BEiTAttention,
    ("swin_transformer", "WindowAttention"): SwinAttention,
}


def _maker(module: nn.Module) -> type[_BiasedAttention] | None:
    kind = type(module)
    if not is_from(module, "timm", kind.__name__):
        return None
    return _MAKERS.get((kind.__module__.rpartition(".")[2], kind.__name__))
