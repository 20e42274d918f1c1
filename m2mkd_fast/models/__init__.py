"""Models by name: `create_model`, `list_models`, and `register_model` for new ones."""

from __future__ import annotations

from m2mkd_fast.models.registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
