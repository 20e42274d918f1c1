"""Where and how a step computes: device, precision, and the processes that share every batch of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import ParallelConfig
from m2mkd_fast.pipeline.parallel_task import ParallelTask

Value = TypeVar("Value")


@dataclass(frozen=True)
class Execution:
    """Where and how a step computes: what does not belong to the result's meaning.

    Under ``torchrun`` a step is done by all its processes together: each takes its rows of every batch (``shard``),
    and what they compute is, to rounding, what one process makes of the whole batch. Accelerate reads torchrun's
    environment, chooses the device and starts the process group (NCCL on CUDA, gloo on the CPU).
    """

    device: str = "auto"
    precision: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def accelerator(self) -> Accelerator:
        return _accelerator(self.device)

    @property
    def rank(self) -> int:
        """This process among those that share the step, 0 to world - 1."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes share the step."""
        return self.accelerator.num_processes

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, world)."""
        return self.rank, self.world

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes for all."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """fp16 or bf16 where it was asked for; bf16 too where ``auto`` finds a GPU that computes in it natively."""
        device = self.accelerator.device.type
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = self.precision == "bf16" or (self.precision == "auto" and native)
        fp16 = self.precision == "fp16"
        return torch.autocast(device, dtype=torch.float16 if fp16 else torch.bfloat16, enabled=bf16 or fp16)

    def prepare(self, task: Task) -> ParallelTask:
        """The task as this process computes it, on its device; call it before the optimiser is built."""
        return ParallelTask(task, self)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same on each. Every process has to call it; so with all that follow."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a floating-point tensor."""
        return value if self.world == 1 else self.sum(value) / self.world

    def any_process(self, flag: Tensor) -> Tensor:
        """Where (bool) at least one process says so. On the flag's device: the host does not wait."""
        return flag if self.world == 1 else self._reduced(flag.to(torch.int32), dist.ReduceOp.MAX).bool()

    def agreed(self, flag: bool) -> bool:
        """Whether at least one process says so."""
        return bool(self.any_process(torch.tensor(flag)))

    def broadcast(self, value: Value) -> Value:
        """Process 0's value, which can be pickled; what the others pass does not count."""
        if self.world == 1:
            return value
        holder: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world == 1:
            return value
        # NCCL takes no tensor of the host.
        reduced = value.detach().to(self.accelerator.device, copy=True)
        dist.all_reduce(reduced, operation)
        return reduced.to(value.device)


@functools.cache
def _accelerator(device: str) -> Accelerator:
    cuda = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu") and not cuda:
        raise M2MKDError(f"device {device!r} was asked for, but torch sees no CUDA device; set device=cpu or auto")
    return Accelerator(cpu=not cuda)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads for operators on the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
