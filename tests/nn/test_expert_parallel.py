"""Experts shared out over processes: the numbers of one process that has them all, and the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from m2mkd_fast.checks import debug
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.vmoe import VMoE
from m2mkd_fast.nn import expert_parallel
from m2mkd_fast.nn.expert_mlp import ExpertMLP, fastmoe_state_dict
from m2mkd_fast.nn.expert_parallel import (
    ShardedExpertMLP,
    _assignment_of_rows,
    clip_grad_norm_,
    shard_experts,
    split_by_mesh,
)
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE, auxiliary_losses
from m2mkd_fast.ops.route import route

# --- what every process runs: checks named check_..., collected below ---


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))


def mixture(**options: Any) -> VisionMoE:
    """The same on every rank."""
    torch.manual_seed(1)
    options = {"num_experts": 8, "top_k": 2, "expert_init": "linear", "dtype": torch.float64, **options}
    return VisionMoE(6, 10, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """What DistributedDataParallel makes of a gradient."""
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def assert_near(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-11) -> None:
    assert actual is not None and actual.shape == expected.shape, name
    error = (actual.detach() - expected.detach()).abs().max().item() if actual.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-3), f"{name}: off by {error:.2e} at a scale of {scale:.2e}"


def compare(layer: VisionMoE, batches: list[Tensor], noise: Tensor | None = None) -> tuple[VisionMoE, VisionMoE]:
    """Outputs, losses and all gradients of one process with all batches and of the ranks with one each.

    The loss is the mean over the ranks of each rank's own, which must be what the layer, routing group by group, makes
    of all batches together.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sharded = shard_experts(copy.deepcopy(layer), mesh_of_all())
    targets = [torch.randn(*batch.shape, dtype=batch.dtype) for batch in batches]

    inputs = [batch.clone().requires_grad_() for batch in batches]
    outputs = layer(torch.cat(inputs), noise).split([len(batch) for batch in batches])
    losses = [(output * target).sum(dim=-1).mean() for output, target in zip(outputs, targets, strict=True)]
    (torch.stack(losses).mean() + auxiliary_losses(layer)).backward()

    own = batches[rank].clone().requires_grad_()
    # `noise` has a row a group and every rank the same number of groups.
    own_noise = None if noise is None else noise.chunk(size)[rank]
    output = sharded(own, own_noise)
    ((output * targets[rank]).sum(dim=-1).mean() + auxiliary_losses(sharded)).backward()

    assert_near(output, outputs[rank], "output")
    assert_near(own.grad, size * inputs[rank].grad, "gradient of the input")
    for (name, parameter), expected in zip(sharded.named_parameters(), layer.parameters(), strict=True):
        assert isinstance(parameter, DTensor) == name.startswith("experts.")
        gradient = whole(parameter.grad) if isinstance(parameter, DTensor) else mean_over_ranks(parameter.grad)
        assert_near(gradient, expected.grad, f"gradient of {name}")
    assert_near(mean_over_ranks(sharded.rows_per_expert.double()) * size, layer.rows_per_expert.double(), "load")
    return layer, sharded


def images(count: int, tokens: int = 5) -> list[Tensor]:
    """One batch a rank."""
    torch.manual_seed(2)
    return list(torch.randn(dist.get_world_size(), count, tokens, 6, dtype=torch.float64))


def check_tokens_choose() -> None:
    compare(mixture(**ROUTERS["m2mkd"]), images(3))


def check_biases_and_activations() -> None:
    compare(mixture(bias=(True, False)), images(2))
    compare(mixture(bias=(False, True), act_layer="gelu_tanh", top_k=3), images(2))
    compare(mixture(bias=False, act_layer="swiglu", gate="sigmoid"), images(2))


def check_capacity_drops_and_losses_of_groups() -> None:
    router = {**ROUTERS["vmoe"], "capacity_factor": 0.5, "group_size": 2, "importance_loss_weight": 0.5}
    router |= {"load_loss_weight": 0.25, "gshard_loss_weight": 0.5, "z_loss_weight": 0.125}
    for batch_priority in (False, True):
        layer = mixture(**router, batch_priority=batch_priority)
        torch.manual_seed(3)
        noise = torch.randn(2 * dist.get_world_size(), 40, 8, dtype=torch.float64)
        layer, sharded = compare(layer, images(4, tokens=20), noise)
        assert layer.rows_per_expert.sum() < dist.get_world_size() * 4 * 20 * 2, "nothing was dropped"
        assert sharded.auxiliary_loss is not None


def check_experts_choose() -> None:
    layer = mixture(gate="experts_choose", capacity_factor=2.0, group_size=2)
    compare(layer, images(4, tokens=7))


def check_experts_that_get_nothing() -> None:
    layer = mixture(gate_bias=True, gate="top_k_softmax")
    with torch.no_grad():
        layer.gate.gate.weight.zero_()
        layer.gate.gate.bias.copy_(torch.tensor([0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    _, sharded = compare(layer, images(2))
    for parameter in sharded.experts.parameters():
        used = whole(parameter.grad).flatten(1).abs().sum(dim=1) > 0
        assert used.tolist() == [expert in (1, 2) for expert in range(8)]


def check_uneven_batches_and_a_rank_without_tokens() -> None:
    """Losses are sums here, so gradients are too."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for lengths in ([7, *[3] * (size - 1)], [0, *[5] * (size - 1)], [0] * size):
        layer = mixture()
        sharded = shard_experts(copy.deepcopy(layer), mesh_of_all(), average_gradients=False)
        x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
        own = x.detach().split(lengths)[rank].requires_grad_()
        expected, output = layer(x), sharded(own)
        expected.square().sum().backward()
        output.square().sum().backward()
        assert_near(output, expected.split(lengths)[rank], "output")
        assert_near(own.grad, x.grad.split(lengths)[rank], "gradient of the input")
        for (name, parameter), single in zip(sharded.named_parameters(), layer.parameters(), strict=True):
            gradient = parameter.grad
            gradient = whole(gradient) if isinstance(gradient, DTensor) else mean_over_ranks(gradient) * size
            assert_near(gradient, single.grad, name)


def check_autocast_halves_what_travels() -> None:
    layer = mixture(dtype=torch.float32)
    sharded = shard_experts(copy.deepcopy(layer), mesh_of_all())
    own = images(3)[dist.get_rank()].float().requires_grad_()
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, expected = sharded(own), layer(own)
        output.float().square().sum().backward()
    travelled = [call.args[1].dtype for call in exchange.call_args_list]
    assert travelled == [torch.int64, *[torch.bfloat16] * 4]
    assert output.dtype == expected.dtype == torch.bfloat16
    assert own.grad.dtype == whole(sharded.experts.htoh4.weight.grad).dtype == torch.float32
    assert_near(output.float(), expected.float(), "output", tolerance=0.02)


def check_mixed_precision_of_fsdp() -> None:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "expert"))
    layer = mixture(dtype=torch.float32)
    sharded = shard_experts(copy.deepcopy(layer), mesh["expert"])
    fully_shard(sharded.experts, mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    own = images(3)[dist.get_rank()].float()
    with mock.patch.object(expert_parallel, "expert_mlp", wraps=expert_parallel.expert_mlp) as op:
        output = sharded(own)
    (rows, assignment, *_), _ = op.call_args
    assert output.dtype == rows.dtype == torch.bfloat16
    assert assignment.weight.dtype == torch.float32, "FSDP rounds it, but the op and the weighted sum need it wide"
    assert_near(output.float(), layer(own), "output", tolerance=0.02)
    output.float().square().sum().backward()
    assert sharded.experts.htoh4.weight.grad.dtype == torch.float32


def check_what_travels_is_what_the_scaling_page_says() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from scaling import ROW_BYTES, exchange_bytes

    size, tokens, width, experts = dist.get_world_size(), 16, 6, 8
    layer = shard_experts(mixture(dtype=torch.float32), mesh_of_all())
    # Token t takes experts t and t + 1, so that every rank gets as much from every other.
    scores = torch.eye(experts).roll(0, 1) + 0.5 * torch.eye(experts).roll(1, 1)
    assignment = route(scores.repeat(1, tokens // experts, 1), top_k=2)
    there_and_back = 0
    exchange = expert_parallel._Exchange._exchange

    def counted(self: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        nonlocal there_and_back
        away = sum(count for rank, count in enumerate(sent) if rank != dist.get_rank())
        there_and_back += away * rows.shape[1] * rows.element_size()
        return exchange(self, rows, sent, received)

    with mock.patch.object(expert_parallel._Exchange, "_exchange", counted):
        layer.experts(torch.randn(tokens, width, requires_grad=True), assignment).sum().backward()
    total = torch.tensor(there_and_back)
    dist.all_reduce(total)
    expected = exchange_bytes(1, tokens, 2, width, 1, size) * torch.float32.itemsize / ROW_BYTES
    assert total.item() == size * expected


def check_same_bits_every_time() -> None:
    batch = images(3)[dist.get_rank()]

    def run() -> list[Tensor]:
        layer = shard_experts(mixture(**ROUTERS["vmoe"], drop=0.25, top_k=3), mesh_of_all()).train()
        torch.manual_seed(dist.get_rank())
        output = layer(batch)
        (output.square().sum() + auxiliary_losses(layer)).backward()
        return [output, *(parameter.grad for parameter in layer.parameters())]

    first, second = run(), run()
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(first, second, strict=True))


def check_dropout_acts_in_training_only() -> None:
    layer = mixture(drop=0.5)
    sharded = shard_experts(copy.deepcopy(layer), mesh_of_all())
    own = images(3)[dist.get_rank()]
    assert not torch.allclose(sharded.train()(own), layer.eval()(own))
    for evaluation in (torch.no_grad, torch.inference_mode):
        with evaluation():
            assert_near(sharded.eval()(own), layer(own), "output in evaluation")


def check_activation_checkpointing_and_compile() -> None:
    layer = mixture()
    own = images(3)[dist.get_rank()]
    sharded = shard_experts(copy.deepcopy(layer), mesh_of_all())
    expected = sharded(own)
    expected.square().sum().backward()
    gradients = [whole(parameter.grad) for parameter in sharded.parameters()]
    compiled = torch.compile(sharded, backend="aot_eager")
    for run in (compiled, lambda x: torch.utils.checkpoint.checkpoint(sharded, x, use_reentrant=False)):
        sharded.zero_grad()
        output = run(own.clone().requires_grad_())
        output.square().sum().backward()
        assert_near(output, expected, "output")
        for (name, parameter), gradient in zip(sharded.named_parameters(), gradients, strict=True):
            assert_near(whole(parameter.grad), gradient, name)


def check_fastmoe_names_load() -> None:
    layer = mixture()
    sharded = shard_experts(mixture(act_layer="gelu_tanh"), mesh_of_all())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    sharded.load_state_dict(fastmoe_state_dict(layer))
    for (name, parameter), expected in zip(sharded.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(whole(parameter), expected), name


def check_debug_looks_at_the_outputs() -> None:
    layer = mixture()
    with torch.no_grad():
        layer.experts.h4toh.bias.fill_(float("inf"))
    sharded = shard_experts(layer, mesh_of_all())
    with debug(), pytest.raises(M2MKDError, match="outputs of experts"):
        sharded(images(2)[dist.get_rank()])


def check_second_order_is_refused() -> None:
    sharded = shard_experts(mixture(), mesh_of_all())
    own = images(2)[dist.get_rank()].requires_grad_()
    (gradient,) = torch.autograd.grad(sharded(own).square().sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def vision_transformer(**options: Any) -> VMoE:
    """With drops, a group a rank, auxiliary losses, and every tensor under two names."""
    torch.manual_seed(4)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "num_heads": 2}
    router = {"capacity_factor": 0.75, "group_size": 4, "gshard_loss_weight": 0.5}
    options = {"moe_blocks": "all", "num_experts": 4, "router": router, "divided_depths": (1, 1), **options}
    model = VMoE(**sizes, **options)
    return model.double().train()


def train(model: nn.Module, parallel: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Three steps; the norms of the gradients, which are clipped."""
    groups = [{"params": group} for group in split_by_mesh(model.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=0.05, foreach=True)
    norms = []
    for pixels, labels in batches:
        optimizer.zero_grad()
        (F.cross_entropy(parallel(pixels), labels) + auxiliary_losses(model)).backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return norms


def check_a_model_on_a_rank_without_images() -> None:
    (pixels, _), *_ = training_batches(1)
    own = pixels if dist.get_rank() == 0 else pixels[:0]
    single = vision_transformer(router="m2mkd", router_options={})
    model = copy.deepcopy(single)
    shard_experts(model, mesh_of_all(), average_gradients=False)
    for run, batch in ((single, pixels), (model, own)):
        run(batch).square().sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        size = 1 if isinstance(parameter, DTensor) else dist.get_world_size()
        gradient = whole(parameter.grad) if size == 1 else mean_over_ranks(parameter.grad) * size
        assert_near(gradient, expected.grad, name)

    single = vision_transformer().eval()
    model = shard_experts(copy.deepcopy(single), mesh_of_all())
    assert_near(model(own), single(own), "logits in evaluation")


def training_batches(size: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(4 * size, 1, 8, 8, dtype=torch.float64), torch.randint(3, (4 * size,))) for _ in range(3)]


def compare_training(wrap: Callable[[nn.Module], nn.Module]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    single, model = vision_transformer(), vision_transformer()
    batches = training_batches(size)
    expected = train(single, single, batches)
    parallel = wrap(model)
    norms = train(model, parallel, [(pixels.chunk(size)[rank], labels.chunk(size)[rank]) for pixels, labels in batches])
    assert min(expected) > 0.5, "nothing was clipped"
    for norm, wanted in zip(norms, expected, strict=True):
        assert_near(norm, wanted, "norm of the gradients")
    start = vision_transformer().state_dict()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in single.state_dict().items():
        assert_near(full[name], tensor, name, tolerance=1e-8)
        assert not torch.allclose(tensor, start[name], rtol=1e-4, atol=1e-6), f"{name} was not trained"


def check_training_with_ddp() -> None:
    compare_training(lambda model: DistributedDataParallel(shard_experts(model, mesh_of_all())))


def check_ddp_ignores_what_it_was_told_to_ignore_before() -> None:
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), mixture())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    parallel = DistributedDataParallel(shard_experts(model, mesh_of_all()))
    parallel(images(2)[dist.get_rank()]).square().sum().backward()
    for name, equal in (("0.weight", True), ("0.bias", False)):
        gradient = model.get_parameter(name).grad
        assert torch.allclose(gradient, mean_over_ranks(gradient)) == equal, name


def check_clip_grad_norm_is_pytorchs() -> None:
    for norm_type in (2.0, 1.0, float("inf")):
        for foreach in (None, False):
            layer = mixture()
            sharded = shard_experts(copy.deepcopy(layer), mesh_of_all())
            for plain, shard in zip(layer.parameters(), sharded.parameters(), strict=True):
                plain.grad = torch.randn_like(plain)
                shard.grad = plain.grad.clone()
                if isinstance(shard, DTensor):
                    shard.grad = dist.tensor.distribute_tensor(plain.grad, shard.device_mesh, [Shard(0)])
            expected = nn.utils.clip_grad_norm_(layer.parameters(), 0.5, norm_type)
            norm = clip_grad_norm_(sharded.parameters(), 0.5, norm_type, foreach=foreach)
            assert_near(norm, expected, "norm")
            for plain, shard in zip(layer.parameters(), sharded.parameters(), strict=True):
                assert_near(whole(shard.grad), plain.grad, "clipped gradient")
    sharded.experts.htoh4.weight.grad.to_local().fill_(float("nan"))
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(sharded.parameters(), 0.5, error_if_nonfinite=True)
    sharded.zero_grad()
    assert clip_grad_norm_(sharded.parameters(), 0.5) == 0


def check_parameters_are_shards_of_the_first_ranks_numbers() -> None:
    torch.manual_seed(dist.get_rank())
    layer = VisionMoE(6, 10, num_experts=8)
    names = list(layer.state_dict())
    first = [parameter.detach().clone() for parameter in layer.experts.parameters()]
    for parameter in first:
        dist.broadcast(parameter, src=0)
    layer.experts.h4toh.weight.requires_grad_(False)
    assert shard_experts(layer, mesh_of_all()) is layer
    assert list(layer.state_dict()) == names
    assert not layer.experts.h4toh.weight.requires_grad and layer.experts.h4toh.bias.requires_grad
    for parameter, expected in zip(layer.experts.parameters(), first, strict=True):
        assert parameter.placements == (Shard(0),)
        assert parameter.to_local().shape[0] == 8 // dist.get_world_size()
        assert torch.equal(whole(parameter), expected)
    layer(torch.randn(2, 3, 6)).sum().backward()
    assert layer.experts.h4toh.weight.grad is None
    count = 8 // dist.get_world_size()
    assert f"experts {dist.get_rank() * count}..{(dist.get_rank() + 1) * count - 1} of 8" in repr(layer)


def check_copies_run() -> None:
    """As an exponential moving average makes them."""
    layer = mixture()
    sharded = copy.deepcopy(shard_experts(copy.deepcopy(layer), mesh_of_all()))
    own = images(2)[dist.get_rank()]
    assert_near(sharded(own), layer(own), "output")


def check_whole_state_dicts_load() -> None:
    source = vision_transformer().state_dict()
    with torch.no_grad():
        for tensor in source.values():
            tensor.add_(1.0)
    sharded = [shard_experts(vision_transformer(), mesh_of_all()) for _ in range(2)]
    sharded[0].load_state_dict(source)
    set_model_state_dict(sharded[1], dict(source), options=StateDictOptions(full_state_dict=True))
    for model in sharded:
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert full.keys() == source.keys()
        assert all(torch.equal(full[name], tensor) for name, tensor in source.items())
    key = "blocks.0.moe.experts.htoh4.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        sharded[0].load_state_dict({**source, key: source[key][:2]})
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        sharded[0].load_state_dict({name: tensor for name, tensor in source.items() if name != key})


def check_from_the_meta_device() -> None:
    layer = mixture()
    with torch.device("meta"):
        sharded = shard_experts(mixture(), mesh_of_all())
    assert sharded.experts.htoh4.weight.is_meta
    sharded.to_empty(device="cpu").load_state_dict(layer.state_dict())
    own = images(2)[dist.get_rank()]
    assert_near(sharded(own), layer(own), "output")

    single = vision_transformer().eval()
    with torch.device("meta"):
        model = shard_experts(vision_transformer(), mesh_of_all()).eval()
    model.to_empty(device="cpu").load_state_dict(single.state_dict())
    pixels = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert_near(model(pixels), single(pixels), "logits")


def check_distributed_checkpoint() -> None:
    """Shards of model and optimizer, saved and loaded; training goes on as if nothing had been."""
    own = images(2)[dist.get_rank()]

    def start(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        groups = [{"params": group} for group in split_by_mesh(model.parameters())]
        return model, torch.optim.AdamW(groups, lr=0.1, foreach=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(own).square().mean().backward()
        for parameter in model.gate.parameters():
            parameter.grad = mean_over_ranks(parameter.grad)
        optimizer.step()

    model, optimizer = start(shard_experts(mixture(), mesh_of_all()))
    step(model, optimizer)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id="checkpoint")

    alone = mixture().state_dict()
    dcp.load({"model": alone}, checkpoint_id="checkpoint")
    assert all(torch.equal(alone[name], whole(tensor)) for name, tensor in model.state_dict().items())

    other = mixture()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other, other_optimizer = start(shard_experts(other, mesh_of_all()))
    states = get_state_dict(other, other_optimizer)
    loaded = {"model": states[0], "optimizer": states[1]}
    dcp.load(loaded, checkpoint_id="checkpoint")
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for _ in range(2):
        for (name, parameter), expected in zip(other.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(whole(parameter), whole(expected)), name
        step(model, optimizer)
        step(other, other_optimizer)


def check_errors() -> None:
    size, mesh = dist.get_world_size(), mesh_of_all()
    with pytest.raises(M2MKDError, match=f"'1.experts' has 5 experts, which {size} ranks.*another num_experts"):
        shard_experts(nn.Sequential(mixture(), mixture(num_experts=5)), mesh)
    with pytest.raises(M2MKDError, match=r"mesh has 2 dimensions, \('data', 'expert'\).*mesh\['expert'\]"):
        shard_experts(mixture(), init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "expert")))
    with pytest.raises(M2MKDError, match="no ExpertMLP"):
        shard_experts(nn.Linear(2, 2), mesh)

    layer = nn.Sequential(mixture(num_experts=size), mixture(num_experts=size + 1))
    with pytest.raises(M2MKDError):
        shard_experts(layer, mesh)
    assert type(layer[0].experts) is ExpertMLP, "sharded although another layer could not be"
    sharded = shard_experts(layer[0], mesh)
    assert type(sharded.experts) is ShardedExpertMLP
    with pytest.raises(M2MKDError, match="'experts' is sharded already: call shard_experts once"):
        shard_experts(sharded, mesh)
    with pytest.raises(M2MKDError, match="sharded already.*before fully_shard"):
        shard_experts(fully_shard(mixture(), mesh=mesh), mesh)

    class OwnExperts(ExpertMLP):
        pass

    with pytest.raises(M2MKDError, match="ExpertMLP is a OwnExperts"):
        shard_experts(OwnExperts(8, 4), mesh)


def check_a_mesh_for_data_and_experts() -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "expert"))

    def wrap(model: nn.Module) -> nn.Module:
        shard_experts(model, mesh["expert"])
        for module in model.modules():
            if isinstance(module, ShardedExpertMLP):
                fully_shard(module, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh_of_all())

    compare_training(wrap)


CHECKS = [name for name in globals() if name.startswith("check_")]
FOUR = ["check_tokens_choose", "check_capacity_drops_and_losses_of_groups", "check_experts_choose"]
FOUR += ["check_uneven_batches_and_a_rank_without_tokens", "check_training_with_ddp", "check_distributed_checkpoint"]
FOUR += ["check_a_mesh_for_data_and_experts"]
TWO = [name for name in CHECKS if name != "check_a_mesh_for_data_and_experts"]


@pytest.mark.timeout(300)  # the first one waits for all
@pytest.mark.parametrize("name", TWO)
def test_on_two_processes(name: str, outcomes: Callable) -> None:
    if error := outcomes(2, TWO)[name]:
        pytest.fail(error, pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOUR)
def test_on_four_processes(name: str, outcomes: Callable) -> None:
    if error := outcomes(4, FOUR)[name]:
        pytest.fail(error, pytrace=False)


# --- without processes ---


def test_a_model_on_another_device_than_the_mesh_is_refused() -> None:
    mesh = SimpleNamespace(ndim=1, device_type="cuda", size=lambda: 2)
    with pytest.raises(M2MKDError, match="'experts' is on cpu but the mesh is of cuda devices: move the model"):
        shard_experts(mixture(), mesh)


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_are_sorted_by_expert_and_then_by_rank(ranks: int) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        rows_received = torch.randint(0, 4, (ranks, 5))
        expert = torch.arange(5).repeat(ranks).repeat_interleave(rows_received.flatten())
        assignment = _assignment_of_rows(rows_received, len(expert), torch.float32)
        sorted_expert, token = expert.sort(stable=True)
        assert torch.equal(assignment.expert, sorted_expert)
        assert torch.equal(assignment.token, token)
        assert torch.equal(assignment.place.squeeze(1)[token], torch.arange(len(expert)))
        assert torch.equal(assignment.offsets.diff(), rows_received.sum(dim=0))
        assert assignment.offsets[0] == 0
        assert torch.equal(assignment.weight, torch.ones(len(expert)))
