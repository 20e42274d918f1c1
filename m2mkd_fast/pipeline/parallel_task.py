"""A task as one of several processes computes it: DistributedDataParallel, FSDP2, experts shared out, or all at once.

DDP and FSDP2 are PyTorch's own here, not Accelerate's ``prepare``: that refuses DDP for models that hold DTensors, as
shared-out experts are; knows FSDP on accelerators only, so nothing of it could be tested on a CPU; and shards one model
over one mesh, where a task has frozen models inside and experts a mesh of their own.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.distill.tasks import Task
from m2mkd_fast.distill.whole_batch import batch_shared_by_all
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.transformer_stage import TransformerStage
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.nn.expert_mlp import ExpertMLP
from m2mkd_fast.nn.expert_parallel import clip_grad_norm_, shard_experts, split_by_mesh
from m2mkd_fast.pipeline.sharded_tensors import fill, own_tensors, whole_tensor

if TYPE_CHECKING:
    from m2mkd_fast.pipeline.execution import Execution


class ParallelTask:
    """``task`` on this process's device, its gradients averaged over the processes; in one process the task itself.

    Every process has the same task, calls it with its own rows of a batch (as many as the others), and makes the same
    calls of everything here.

    Where weights are sharded (FSDP, experts), the given task stays whole and gets a sharded copy, which is the one that
    trains: the whole one serves evaluation and, after :meth:`finish`, is what was trained. Between these it waits in
    the host's memory.

    Attributes:
        trainable: whose parameters the optimiser, the average and the training state take.

    Raises:
        M2MKDError: the processes do not divide into groups of ``parallel.experts``, or the experts of a mixture do not.
    """

    def __init__(self, task: Task, execution: Execution) -> None:
        self.given, self.device = task, execution.accelerator.device
        self.world, self.parallel = execution.world, execution.parallel
        experts = self.parallel.experts
        if self.world > 1 and self.world % experts:
            raise M2MKDError(
                f"parallel.experts={experts} does not divide the {self.world} processes of this step; set it to a "
                "divisor of their number"
            )
        self.shares_experts = self.world > 1 and experts > 1 and bool(_experts(task.trainable))
        self.fully_sharded = self.world > 1 and self.parallel.strategy == "fsdp"
        self.task = task
        if not self.sharded:
            task.to(self.device)
        elif self.fully_sharded:
            self.task = copy.deepcopy(task.to("cpu"))
        else:  # what is frozen is whole in every process, and shared
            task.trainable.to("cpu")
            self.task = copy.deepcopy(task, {id(task.frozen): task.frozen})
        if self.sharded:
            self._shard(self.task, self.task.trainable)
        self.call: nn.Module = self.task
        if self.world > 1 and not self.fully_sharded:
            self.call = self._data_parallel(self.task)

    @property
    def sharded(self) -> bool:
        """Whether no process has all weights."""
        return self.fully_sharded or self.shares_experts

    @property
    def trainable(self) -> nn.Module:
        return self.task.trainable

    def train(self) -> None:
        """Training mode, but for what is frozen."""
        self.task.train()

    def compile(self) -> None:
        """Let ``torch.compile`` have the forward pass."""
        self.task.compile()

    def __call__(self, inputs: Any, labels: Tensor) -> PairLoss:
        if self.world == 1:
            return self.call(inputs, labels)
        with batch_shared_by_all():
            return self.call(inputs, labels)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around forward and backward pass of every micro-batch but a step's last: gradients add up here for now."""
        modules = [module for module in self.task.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            if isinstance(self.call, DistributedDataParallel):
                with self.call.no_sync():
                    yield
            else:
                yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common norm is at most ``max_norm``; the norm they had."""
        clip = clip_grad_norm_ if self.sharded else nn.utils.clip_grad_norm_
        return clip(self.trainable.parameters(), max_norm)

    def group_by_mesh(self, optimizer: Optimizer) -> None:
        """Split parameter groups that mix tensors on several device meshes, which operators on lists refuse."""
        groups = [
            {**group, "params": parameters}
            for group in optimizer.param_groups
            for parameters in split_by_mesh(group["params"])
        ]
        if len(groups) > len(optimizer.param_groups):
            optimizer.param_groups[:] = groups

    def moving_average(self, decay: float) -> ModelEmaV3:
        """Exponential moving average of ``trainable``, sharded as that is; made before the first step."""
        if not self.sharded:
            return ModelEmaV3(self.trainable, decay=decay)
        # Operators on lists of tensors would refuse the mixture of meshes.
        average = ModelEmaV3(self.given.trainable, decay=decay, foreach=False)
        self._shard(average.module, average.module)
        return average

    @property
    def measures_gradient_share(self) -> bool:
        """Whether :func:`torch.autograd.grad` sees the parameters: FSDP replaces them during a pass."""
        return not any(isinstance(module, FSDPModule) for module in self.task.modules())

    def gradient_norm(self, gradients: Sequence[Tensor | None]) -> float:
        """Norm of the gradients that ``torch.autograd.grad`` gave in every process, averaged over the processes."""
        given = [gradient.double() for gradient in gradients if gradient is not None]
        squares = [g.square().sum().full_tensor() for g in given if isinstance(g, DTensor)]
        plain = [g for g in given if not isinstance(g, DTensor)]
        if self.world > 1 and plain:
            mean = torch.cat([g.flatten() for g in plain])
            torch.distributed.all_reduce(mean)
            plain = [mean / self.world]
        return float(torch.stack([*squares, *(g.square().sum() for g in plain)]).sum().sqrt())

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[nn.Module]:
        """A plain module with all weights of ``module`` (``trainable``, or an average of it) in every process.

        Frozen modules of the task can be used beside it, on the CPU or wherever they are moved.
        """
        if not self.sharded:
            yield module
            return
        self._fill(module)
        try:
            yield self.given.trainable
        finally:
            (self.given if self.fully_sharded else self.given.trainable).to("cpu")

    def finish(self) -> None:
        """Leave the trained weights in the module that was given to train, on the CPU where it was sharded."""
        if self.sharded:
            self._fill(self.trainable)

    def _fill(self, module: nn.Module) -> None:
        sharded = own_tensors(module)
        for name, tensor in own_tensors(self.given.trainable).items():
            fill(tensor, whole_tensor(sharded[name]))

    def _shard(self, root: nn.Module, trainable: nn.Module) -> None:
        if not self.fully_sharded:  # FSDP moves to the device what it keeps of a tensor
            root.to(self.device)
        if self.shares_experts:
            shape = (self.world // self.parallel.experts, self.parallel.experts)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "expert"))
            for experts in _experts(trainable):
                experts.to(self.device)
            shard_experts(trainable, mesh["expert"])
            # Also under DDP, which leaves experts alone: this averages their gradients over "data".
            if shape[0] > 1 or self.fully_sharded:
                _fully_shard(_experts(trainable), mesh["data"])
        if self.fully_sharded:
            _fully_shard([*_called_modules(root), root], init_device_mesh(self.device.type, (self.world,)))

    def _data_parallel(self, task: Task) -> nn.Module:
        names = itertools.chain(
            task.named_parameters(remove_duplicate=False), task.named_buffers(remove_duplicate=False)
        )
        # Frozen models are the same everywhere, and DTensors see to their gradients themselves.
        ignored = [name for name, tensor in names if name.startswith("frozen.") or isinstance(tensor, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, ignored)
        return DistributedDataParallel(task)


def _experts(model: nn.Module) -> list[ExpertMLP]:
    return [module for module in model.modules() if isinstance(module, ExpertMLP)]


def _fully_shard(modules: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    for module in modules:
        fully_shard(module, mesh=mesh)


def _called_modules(root: nn.Module) -> list[nn.Module]:
    """Blocks, and then the stages of chains: modules of which nothing is used but what their forward pass gives.

    FSDP gathers a module's weights for its forward pass alone, and everything else for that of the root. Models whose
    losses read parameters (a circuit's graph) have none here.
    """
    found: dict[nn.Module, None] = {}
    for module in root.modules():
        if isinstance(module, TransformerStage | VisionTransformer):
            found |= dict.fromkeys(module.blocks)
    for module in root.modules():
        if isinstance(module, ModuleChain):
            held = Counter(id(parameter) for stage in module.stages for parameter in stage.parameters())
            # A table that several stages share can be gathered for one of them only: such stages stay with the root.
            found |= dict.fromkeys(
                stage for stage in module.stages if all(held[id(p)] == 1 for p in stage.parameters())
            )
    return list(found)
