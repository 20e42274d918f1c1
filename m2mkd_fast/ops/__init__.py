"""Differentiable operators.

Each file holds one: the public function, its plain PyTorch reference, and the choice of backend.
"""

from __future__ import annotations
