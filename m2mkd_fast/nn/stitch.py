"""The trainable adapter between two widths, used where a student module meets the teacher-wide meta model."""

from __future__ import annotations

from torch import Tensor, nn


class Stitch(nn.Module):
    """Layer normalisation, then a linear map: `y = W · LayerNorm(x) + b`.

    Shapes: `x [..., in_features]` to `y [..., out_features]`.

    The layer norm's epsilon is 1e-5 and the linear map starts from a truncated normal of standard deviation 0.02 with a
    zero bias, as in the published V-MoE students of m2mKD (arXiv 2402.16918). State names: `ln.*`, `fc.*`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.ln = nn.LayerNorm(in_features)
        self.fc = nn.Linear(in_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.ln.reset_parameters()
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.ln(x))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"
