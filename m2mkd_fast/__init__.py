"""Module-to-module knowledge distillation for modular vision transformers.

Take a pretrained model apart into modules, distil each into the matching module of a modular student, put the student
together. The names below are loaded on first use, so that importing the package costs next to nothing and starts no
CUDA.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Assembly": "modules",
    "ExpertMLP": "nn.expert_mlp",
    "M2MKDError": "errors",
    "ModuleChain": "modules",
    "Router": "nn.router",
    "UnknownNameError": "errors",
    "VisionMoE": "nn.vision_moe",
    "accelerate": "patches",
    "apply": "patch",
    "assemble": "modules",
    "auxiliary_losses": "nn.vision_moe",
    "biased_attention": "patches",
    "capture_inference": "models.cuda_graph",
    "create_dataset": "data",
    "create_model": "models",
    "debug": "checks",
    "density_report": "models.nac",
    "evaluate_accuracy": "evaluate",
    "expert_mlp": "ops.expert_mlp",
    "export": "interop.export",
    "fastmoe_mlp": "patches",
    "fastmoe_state_dict": "nn.expert_mlp",
    "fit_stitches": "modules",
    "fold_stitches": "modules",
    "from_pretrained": "models.pretrained",
    "hybrid": "modules",
    "inference_routing": "nn.router",
    "list_datasets": "data",
    "list_models": "models",
    "load_exported": "interop.export",
    "load_module": "modules",
    "meta_model": "modules",
    "mixture": "patches",
    "nac_layer": "patches",
    "pair_loss": "distill.pair_loss",
    "plan_tiles": "models.nac",
    "prune_latents": "models.nac",
    "pruning_frontier": "pipeline.pruning",
    "published_checkpoint": "models.published",
    "push_to_hub": "interop.hub",
    "read_published": "models.published",
    "register_model": "models",
    "reorder_latents": "models.nac",
    "route": "ops.route",
    "save_module": "modules",
    "save_pretrained": "models.pretrained",
    "shard_experts": "nn.expert_parallel",
    "split": "modules",
    "student_modules": "modules",
    "teach_meta": "pipeline.teaching",
    "teach_module": "pipeline.teaching",
    "train_end_to_end": "pipeline.teaching",
    "upcycle": "nn.upcycle",
    "use_backend": "backend",
    "verify_split": "modules",
    "write_published": "models.published",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
