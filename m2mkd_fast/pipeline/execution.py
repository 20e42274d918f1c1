"""Where and how a step computes: device and precision."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from m2mkd_fast.errors import M2MKDError


@dataclass(frozen=True)
class Execution:
    """Where and how a step computes: what does not belong to the result's meaning."""

    device: str = "auto"
    precision: str = "auto"

    @property
    def accelerator(self) -> Accelerator:
        return _accelerator(self.device)

    def autocast(self) -> torch.autocast:
        """fp16 or bf16 where it was asked for; bf16 too where ``auto`` finds a GPU that computes in it natively."""
        device = self.accelerator.device.type
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = self.precision == "bf16" or (self.precision == "auto" and native)
        fp16 = self.precision == "fp16"
        return torch.autocast(device, dtype=torch.float16 if fp16 else torch.bfloat16, enabled=bf16 or fp16)


@functools.cache
def _accelerator(device: str) -> Accelerator:
    cuda = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu") and not cuda:
        raise M2MKDError(f"device {device!r} was asked for, but torch sees no CUDA device; set device=cpu or auto")
    return Accelerator(cpu=not cuda)
