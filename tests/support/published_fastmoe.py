"""fastmoe's layer in plain PyTorch: its class names, module names, state names, shapes and semantics.

fastmoe itself builds a CUDA extension when it is installed, and runs on GPUs only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FMoELinear(nn.Module):
    """Weights of ``num_expert`` linear layers."""

    def __init__(self, num_expert: int, in_feat: int, out_feat: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat).uniform_(-0.5, 0.5))
        self.bias = nn.Parameter(torch.empty(num_expert, out_feat).uniform_(-0.5, 0.5))


class _Expert(nn.Module):
    def __init__(self, num_expert: int, d_model: int, d_hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model)
        self.activation = activation

    def of(self, x: Tensor, index: int) -> Tensor:
        hidden = self.activation(x @ self.htoh4.weight[index].mT + self.htoh4.bias[index])
        return hidden @ self.h4toh.weight[index].mT + self.h4toh.bias[index]


class NaiveGate(nn.Module):
    def __init__(self, d_model: int, num_expert: int, top_k: int, gate_bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_expert, bias=gate_bias)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, chosen = self.gate(x).topk(self.top_k, dim=-1)
        return chosen, values.softmax(dim=-1)


class GShardGate(NaiveGate):
    pass


class FMoETransformerMLP(nn.Module):
    """``stacked``: one module holds all experts (to 1.0.0), else a list holds one module for each (since 1.0.1)."""

    def __init__(
        self,
        num_expert: int,
        d_model: int,
        d_hidden: int,
        activation: nn.Module,
        top_k: int = 2,
        gate: type[NaiveGate] = NaiveGate,
        gate_bias: bool = True,
        gate_hook: object = None,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.num_expert, self.d_model, self.top_k = num_expert, d_model, top_k
        self.world_size = self.slice_size = 1
        self.experts_fused = stacked
        if stacked:
            self.experts = _Expert(num_expert, d_model, d_hidden, activation)
        else:
            self.experts = nn.ModuleList(_Expert(1, d_model, d_hidden, activation) for _ in range(num_expert))
        self.gate = gate(d_model, num_expert, top_k, gate_bias)
        self.gate_hook, self.mask, self.mask_dict = gate_hook, None, None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.d_model)
        chosen, weights = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for expert in range(self.num_expert):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            module, index = (self.experts, expert) if self.experts_fused else (self.experts[expert], 0)
            out = out.index_add(0, token, weights[token, choice, None] * module.of(tokens[token], index))
        return out.view(x.shape)


for published in (FMoELinear, _Expert, FMoETransformerMLP):
    published.__module__ = "fmoe.transformer"
for published in (NaiveGate, GShardGate):
    published.__module__ = "fmoe.gates"
