"""Expert parallelism: each rank holds some of the experts, tokens travel to them and back by all-to-all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from m2mkd_fast.autocast import autocast_dtype
from m2mkd_fast.checks import require_finite
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.expert_mlp import ExpertMLP
from m2mkd_fast.ops.expert_mlp import expert_mlp
from m2mkd_fast.ops.route import LOSSES, Assignment


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, average_gradients: bool = True) -> nn.Module:
    r"""Share the experts of every :class:`~m2mkd_fast.nn.expert_mlp.ExpertMLP` in the model out to the ranks of a mesh.

    Of E experts, rank r of R keeps experts ``r E / R`` to ``(r + 1) E / R - 1``. Their parameters become DTensors with
    ``Shard(0)``, of the shapes and names they had; the numbers are those of the mesh's first rank. Everything else
    stays replicated. Every rank routes its own tokens, to all E experts; in the forward pass tokens go to the ranks of
    their experts by all-to-all, in the order of the experts, and what the experts made of them comes back and is summed
    up, weighted, where the tokens are. Both directions carry rows in the dtype of ``x``, under autocast in the autocast
    dtype; an output is rounded to it before it is weighted, which one process does not do.

    With the batch divided evenly over the ranks and a loss that is a mean over each rank's tokens, the gradients are
    those of one process with the whole batch, routed in the same groups: the routers' and all others' after the usual
    average over ranks (DDP, FSDP), the experts' as they are. An expert's gradient is the sum over all ranks' tokens
    divided by R: ``average_gradients=False`` leaves the division out, for losses that are sums.

    Do it before the optimizer is built and before the model is wrapped: DistributedDataParallel leaves the experts
    alone where it wraps this same ``model``. On a mesh with a dimension for data too, ``fully_shard`` takes the experts
    on that dimension, and after them the model on all ranks. Optimizers and gradient norms need one list of parameters
    a mesh: see :func:`split_by_mesh` and :func:`clip_grad_norm_`. ``load_state_dict`` takes whole tensors, the same on
    every rank, as well as DTensors; ``torch.distributed.checkpoint`` saves the shards, and its ``get_model_state_dict``
    with ``full_state_dict=True`` gathers them.

    Every rank must make the same forward and backward passes, with an empty batch where it has no tokens left, or the
    others wait for it. The sizes of the exchange are read from the device once a layer and forward pass. Layers run
    uncompiled within a compiled model. Differentiable once. With dropout, each rank draws the masks of its own experts:
    as good a draw as one process makes, but another; seed the ranks differently.

    Args:
        model: an ExpertMLP, a VisionMoE, a V-MoE, or anything that holds them; changed in place. Parameters on the meta
            device stay there: call ``to_empty`` and load a state dict afterwards.
        mesh: one-dimensional, or one dimension of a mesh: ``mesh["expert"]``.
        average_gradients: see above.

    Returns:
        The model.

    Raises:
        M2MKDError: a mesh of more than one dimension or another device, experts that do not divide among its ranks,
            experts that are sharded already, or none at all.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, ExpertMLP)}
    _check(experts, mesh)
    for module in experts.values():
        for layer in (module.htoh4, module.h4toh):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        module.__class__ = ShardedExpertMLP  # in place: stages and other views of the model hold the same module
        module.mesh, module.gradient_divisor = mesh, mesh.size() if average_gradients else 1
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    # Stages make a parameter go by more than one name.
    everything = model.named_parameters(remove_duplicate=False)
    ignored.update(name for name, parameter in everything if isinstance(parameter, DTensor))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


class ShardedExpertMLP(ExpertMLP):
    """What :func:`shard_experts` makes of an ExpertMLP; ``num_experts`` stays the number of all experts."""

    mesh: DeviceMesh
    gradient_divisor: int

    @torch.compiler.disable
    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """This rank's tokens ``[T, D]`` and their assignment to all experts, to ``[T, O]``."""
        x = x.to(autocast_dtype(x) or x.dtype)
        rows_sent = assignment.offsets.diff().view(self.mesh.size(), -1)  # by rank, then by the rank's expert
        rows_received = torch.empty_like(rows_sent)
        dist.all_to_all_single(rows_received, rows_sent, group=self.mesh.get_group())
        sent, received = torch.stack((rows_sent.sum(dim=1), rows_received.sum(dim=1))).tolist()
        exchange = _Exchange(self.mesh.get_group(), sent, received)

        used = slice(sum(sent))  # the tail of dropped choices stays
        token, weight = assignment.token[used], assignment.weight[used]
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # FSDP's mixed precision rounds inputs
        arrived = _Dispatch.apply(x, token, assignment.place, exchange)
        out = expert_mlp(
            arrived,
            _assignment_of_rows(rows_received, sum(received), weight.dtype),
            *(self._local(p) for p in (self.htoh4.weight, self.htoh4.bias, self.h4toh.weight, self.h4toh.bias)),
            activation=self.activation,
            dropout=(self.drop1.p, self.drop2.p) if self.training else (0.0, 0.0),
        )
        out = _Combine.apply(out, weight, token, assignment.place, exchange)
        require_finite(out, "outputs of experts", "Look at the experts' parameters; float16 overflows beyond 65504")
        return out

    def _local(self, parameter: DTensor | None) -> Tensor | None:
        if parameter is None:
            return None
        shard = parameter.to_local()
        if shard.requires_grad and self.gradient_divisor > 1:
            shard.register_hook(lambda grad: grad / self.gradient_divisor)
        return shard

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, parameter in self.named_parameters():
            whole = state_dict.get(prefix + name)
            # Those of another shape are left to the error that names them.
            if isinstance(whole, Tensor) and not isinstance(whole, DTensor) and whole.shape == parameter.shape:
                # Every rank has the whole tensor and takes its own part.
                state_dict[prefix + name] = distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None)

    def extra_repr(self) -> str:
        count = self.num_experts // self.mesh.size()
        first = self.mesh.get_local_rank() * count
        return f"{super().extra_repr()}, experts {first}..{first + count - 1} of {self.num_experts} on this rank"


def split_by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists of those on one device mesh, plain tensors in a list of their own; order is kept.

    PyTorch's fused operators on lists of tensors, which optimizers use on CUDA, take no list that mixes them.

    Example:
        >>> optimizer = torch.optim.AdamW([{"params": group} for group in split_by_mesh(model.parameters())])
    """
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_` for sharded and plain parameters together: one norm over all of them.

    The same on every rank if the gradients of plain parameters are; every rank has to call it.
    """
    groups = split_by_mesh(parameter for parameter in parameters if parameter.grad is not None)
    norms = [nn.utils.get_total_norm([p.grad for p in group], norm_type, foreach=foreach) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {total.item()}: they cannot be clipped")
    for group in groups:
        norm = total
        if isinstance(group[0], DTensor):
            mesh = group[0].device_mesh
            norm = DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)
        nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=foreach)
    return total


class _Exchange(NamedTuple):
    """How many rows go to each rank and how many come from it."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def there(self, rows: Tensor) -> Tensor:
        return self._exchange(rows, self.sent, self.received)

    def back(self, rows: Tensor) -> Tensor:
        return self._exchange(rows, self.received, self.sent)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out


class _Dispatch(torch.autograd.Function):
    """Rows of the tokens, sent to their experts' ranks.

    By hand rather than with PyTorch's differentiable all-to-all, which is private and leaves the gradient of the gather
    to a scatter in any order.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor, exchange: _Exchange) -> Tensor:
        ctx.save_for_backward(place)
        ctx.exchange = exchange
        return exchange.there(x.index_select(0, token))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_arrived: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _sum_by_place(ctx.exchange.back(grad_arrived), place).to(grad_arrived.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """Weighted sum, for every token, of its rows, which are first sent back to where the token is."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, out: Tensor, weight: Tensor, token: Tensor, place: Tensor, exchange: _Exchange
    ) -> Tensor:
        rows = exchange.back(out)
        ctx.save_for_backward(rows, weight, token)
        ctx.exchange = exchange
        return _sum_by_place(rows, place, weight).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, token = ctx.saved_tensors
        grad_rows = grad.index_select(0, token).to(torch.promote_types(grad.dtype, weight.dtype))
        grad_out = ctx.exchange.there((grad_rows * weight.unsqueeze(1)).to(rows.dtype))
        return grad_out, (grad_rows * rows).sum(dim=1).to(weight.dtype), None, None, None


def _sum_by_place(rows: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """``[T, width]``, in float32 at least: of every token the sum of its rows, in the order of its choices."""
    precision = torch.promote_types(rows.dtype, torch.float32 if weight is None else weight.dtype)
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=precision)
    if rows.shape[0] == 0:
        return total
    # One choice at a time: at once, where experts choose, all E of every token would be held.
    for row in place.unbind(1):
        anywhere = row.clamp(min=0)
        term = rows.index_select(0, anywhere).to(precision)
        if weight is not None:
            term = term * weight.index_select(0, anywhere).unsqueeze(1)
        total += torch.where((row >= 0).unsqueeze(1), term, 0.0)
    return total


def _assignment_of_rows(rows_received: Tensor, count: int, dtype: torch.dtype) -> Assignment:
    """To this rank's experts, each row that arrived a token of weight 1, sorted by expert and then by source rank.

    Rows arrive in blocks by source rank and then by expert, of the sizes ``rows_received [ranks, experts]``. A block
    moves as one, so its shift says where all of its rows go.
    """
    by_expert = rows_received.t().reshape(-1)
    sorted_first = (by_expert.cumsum(0) - by_expert).view(rows_received.shape[::-1])
    arrived_first = (rows_received.flatten().cumsum(0) - rows_received.flatten()).view_as(rows_received)
    shift = arrived_first.t() - sorted_first  # [experts, ranks]
    row = torch.arange(count, device=rows_received.device)
    rows_of_expert = rows_received.sum(dim=0)
    expert = torch.arange(rows_of_expert.numel(), device=row.device)
    return Assignment(
        token=row + shift.flatten().repeat_interleave(by_expert, output_size=count),
        expert=expert.repeat_interleave(rows_of_expert, output_size=count),
        weight=torch.ones(count, dtype=dtype, device=row.device),
        offsets=torch.cat((rows_of_expert.new_zeros(1), rows_of_expert.cumsum(0))),
        place=(row - shift.t().flatten().repeat_interleave(rows_received.flatten(), output_size=count)).unsqueeze(1),
        gates=torch.empty(1, count, 0, dtype=dtype, device=row.device),  # nobody routed here
        losses=torch.empty(len(LOSSES), 0, dtype=dtype, device=row.device),
    )


def _check(experts: dict[str, ExpertMLP], mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ()
        raise M2MKDError(
            f"the mesh has {mesh.ndim} dimensions, {names or 'without names'}; experts are shared out over one: pass "
            "that one, such as mesh['expert']"
        )
    if not experts:
        raise M2MKDError("the model has no ExpertMLP whose experts could be sharded")
    for name, module in experts.items():
        where = f"the ExpertMLP {name!r}" if name else "the ExpertMLP"
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise M2MKDError(f"{where} is sharded already: call shard_experts once, and before fully_shard")
        if type(module) is not ExpertMLP:
            raise M2MKDError(f"{where} is a {type(module).__name__}, whose own methods sharding would replace")
        if module.num_experts % mesh.size() != 0:
            raise M2MKDError(
                f"{where} has {module.num_experts} experts, which {mesh.size()} ranks cannot share evenly: take a mesh "
                "dimension whose size divides the number of experts, or build the model with another num_experts"
            )
        device = module.htoh4.weight.device
        if device.type not in (mesh.device_type, "meta"):
            raise M2MKDError(
                f"{where} is on {device} but the mesh is of {mesh.device_type} devices: move the model to them first"
            )
