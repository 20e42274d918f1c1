"""Routers: gates, noise, groups, capacity, losses, and arguments that do not go together."""

from __future__ import annotations

import math

import pytest
import torch
from host_reads import HostReads
from torch import Tensor, nn

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.router import ROUTERS, Router, inference_routing
from m2mkd_fast.ops.philox import philox_normal
from m2mkd_fast.ops.route import capacity_of
from m2mkd_fast.ops.routing_losses import gshard_loss, importance_loss, load_loss, router_z_loss

LOSS_WEIGHTS = {"importance": 0.5, "load": 0.25, "gshard": 2.0, "z": 3.0}


def build(**arguments: object) -> Router:
    torch.manual_seed(0)
    return Router(8, **{"num_experts": 4, "top_k": 2, **arguments})


def tokens(batch: int = 8, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1))


def test_m2mkd_router() -> None:
    router = build(**ROUTERS["m2mkd"]).train()
    x = tokens()
    routing = router(x)
    assert set(dict(router.named_parameters())) == {"gate.weight", "gate.bias"}
    logits = nn.functional.linear(x.view(-1, 8), router.gate.weight, router.gate.bias)
    best = logits.topk(2)
    weight = routing.assignment.weight[routing.assignment.place]
    torch.testing.assert_close(weight, best.values.softmax(dim=-1))
    assert torch.equal(routing.assignment.expert[routing.assignment.place], best.indices)
    assert routing.losses == {}
    assert router.auxiliary_loss(routing.losses) is None


def test_vmoe_router_in_evaluation() -> None:
    router = build(**ROUTERS["vmoe"]).eval()
    x = tokens()
    routing = router(x)
    assert set(dict(router.named_parameters())) == {"gate.weight"}
    best = nn.functional.linear(x.view(-1, 8), router.gate.weight).softmax(dim=-1).topk(2)
    place = routing.assignment.place
    assert (place >= 0).all(), "a factor of 4 gives every token a slot"
    torch.testing.assert_close(routing.assignment.weight[place], best.values)
    assert torch.equal(routing.assignment.expert[place], best.indices)
    assert routing.losses == {}


def test_noise_has_the_published_scale_and_reaches_the_weights() -> None:
    router = build(noise_std=2.0).train()
    with torch.no_grad():
        router.gate.weight.zero_()  # then the gates are the softmax of the noise alone
    gates = router(tokens(400, 50)).assignment.gates
    noise = gates.log() - gates.log().mean(dim=-1, keepdim=True)
    # Four values less their mean keep 3/4 of the variance.
    assert noise.std().item() == pytest.approx(2.0 / 4 * 0.75**0.5, rel=0.02)
    unscaled = torch.ones(1, 40, 4)
    unscaled[..., 0] = 0.0
    given = router(tokens(), noise=unscaled).assignment.gates
    torch.testing.assert_close(given, (0.5 * unscaled).softmax(dim=-1))


def test_noise_is_drawn_from_a_seed_of_the_generator() -> None:
    router = build(**ROUTERS["vmoe"]).train()
    x = tokens()
    torch.manual_seed(5)
    drawn, next_one = router(x), router(x)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    given = router(x, philox_normal(seed, tuple(drawn.logits.shape), torch.float32))
    torch.testing.assert_close(drawn.assignment.gates, given.assignment.gates)
    assert torch.equal(drawn.assignment.expert, given.assignment.expert)
    for name, loss in drawn.losses.items():
        torch.testing.assert_close(loss, given.losses[name])
    assert not torch.equal(drawn.assignment.gates, next_one.assignment.gates)
    assert torch.equal(drawn.logits, next_one.logits)


@pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_back(training: bool) -> None:
    router = build(**ROUTERS["vmoe"], batch_priority=True).train(training)
    with HostReads() as reads, use_backend(route="cpu"):  # PyTorch's own operators read back, on the CPU alone
        torch.ones(()).item()
        router(tokens())
    assert reads.count == 1, "the first line's own"


def test_sigmoid_gates() -> None:
    router = build(gate="sigmoid", importance_loss_weight=1.0, noise_std=1.0).train()
    x = tokens()
    noise = torch.randn(1, 40, 4)
    routing = router(x, noise)
    logits = nn.functional.linear(x.view(-1, 8), router.gate.weight)
    best = (logits + noise[0] / 4).topk(2)
    place = routing.assignment.place
    torch.testing.assert_close(routing.assignment.weight[place], best.values.sigmoid())
    assert torch.equal(routing.assignment.expert[place], best.indices)
    torch.testing.assert_close(routing.losses["importance"], importance_loss(logits.sigmoid()))


def test_groups_are_routed_independently() -> None:
    router = build(top_k=1, capacity_factor=0.5, group_size=2)
    x = tokens(8)
    together = router(x)
    slots = capacity_of(10, 1, 4, 0.5)
    assert together.logits.shape == (4, 10, 4)
    alone = [router(part) for part in x.split(2)]
    kept = torch.cat([part.assignment.place.ge(0) for part in alone])
    assert torch.equal(together.assignment.place.ge(0), kept)
    assert together.assignment.offsets[-1] < 40
    assert all(part.assignment.offsets.diff().max() <= slots for part in alone)


def test_batch_priority_keeps_the_surest_tokens() -> None:
    x = tokens(1, 64)
    options = {"top_k": 1, "capacity_factor": 0.5}
    sure = build(**options, batch_priority=True)(x)
    gates = sure.logits[0].softmax(dim=-1)
    for expert in range(4):
        mine = gates.argmax(dim=-1) == expert
        kept = (sure.assignment.place[:, 0] >= 0) & mine
        if kept.any() and (mine & ~kept).any():
            assert gates[kept, expert].min() >= gates[mine & ~kept, expert].max()
    first = build(**options)(x)
    assert not torch.equal(first.assignment.place.ge(0), sure.assignment.place.ge(0))


def test_low_capacity_in_evaluation_keeps_the_important_tokens() -> None:
    router = build(**ROUTERS["vmoe"]).eval()
    x = tokens(1, 64)
    first_gate = router(x).assignment.gates[0].max(dim=-1).values
    options = {"top_k": 1, "capacity_factor": 0.25}
    with inference_routing(router, **options, batch_priority=True):
        important = router(x).assignment
    with inference_routing(router, **options):
        first = router(x).assignment
    kept, early = important.place[:, 0] >= 0, first.place[:, 0] >= 0
    assert important.offsets[-1] == first.offsets[-1] == kept.sum() < 32
    best = router(x).logits[0].argmax(dim=-1)
    for expert in range(4):
        mine = best == expert
        slots = capacity_of(64, 1, 4, 0.25)
        wanted = first_gate.masked_fill(~mine, -1.0).topk(min(slots, int(mine.sum()))).indices
        assert set(wanted.tolist()) == set((mine & kept).nonzero()[:, 0].tolist())
        assert (mine & early).nonzero()[:, 0].tolist() == mine.nonzero()[:slots, 0].tolist()
    assert first_gate[kept].mean() > first_gate[early].mean()


def test_inference_routing_changes_evaluation_only_and_for_a_while() -> None:
    model = nn.ModuleDict({"a": build(capacity_factor=1.0), "b": build(top_k=1, num_experts=3)})
    x = tokens()

    def shapes() -> list[tuple[int, int]]:
        assignments = [router(x).assignment for router in model.values()]
        return [(assignment.place.shape[1], int(assignment.offsets[-1])) for assignment in assignments]

    trained, evaluated = model.train() and shapes(), model.eval() and shapes()
    with inference_routing(model, top_k=3, capacity_factor=math.inf):
        assert shapes() == [(3, 120), (3, 120)]
        with inference_routing(model, top_k=1):
            assert shapes() == [(1, 40), (1, 40)]
        assert shapes() == [(3, 120), (3, 120)]
        model.train()
        assert shapes() == trained
        model.eval()
    assert shapes() == evaluated
    with pytest.raises(KeyError), inference_routing(model, top_k=3):
        raise KeyError
    assert shapes() == evaluated


def test_inference_routing_takes_batches_that_do_not_split_into_groups() -> None:
    router = build(capacity_factor=1.0, group_size=4).eval()
    x = tokens(11)
    with pytest.raises(M2MKDError, match=r"or evaluate inside inference_routing\(model, group_size=11\)"):
        router(x)
    with inference_routing(router, group_size=11):
        assert router(x).logits.shape[0] == 1
    with inference_routing(router, group_size=1, capacity_factor=0.5):
        assert router(x).logits.shape[0] == 11
        assert router(x).assignment.offsets.diff().max() <= 11 * capacity_of(5, 2, 4, 0.5)
    with pytest.raises(M2MKDError, match="group_size is 0"), inference_routing(router, group_size=0):
        pass


def test_inference_routing_refuses_what_routers_cannot_do() -> None:
    model = nn.ModuleDict({"a": build(), "b": build(top_k=1, num_experts=3)}).eval()
    with pytest.raises(M2MKDError, match="top_k is 4; with 3 experts in b"), inference_routing(model, top_k=4):
        pass
    assert model["a"](tokens()).assignment.place.shape[1] == 2, "nothing was changed"
    with pytest.raises(M2MKDError, match="no Router in this Linear"), inference_routing(nn.Linear(2, 2), top_k=1):
        pass
    with pytest.raises(M2MKDError, match="capacity_factor is 0"), inference_routing(model, capacity_factor=0):
        pass
    chooser = build(gate="experts_choose", capacity_factor=1.0).eval()
    for option in ({"top_k": 2}, {"batch_priority": True}):
        with pytest.raises(M2MKDError, match=f"{next(iter(option))} has no meaning"):
            inference_routing(chooser, **option).__enter__()
    with inference_routing(chooser, capacity_factor=2.0):
        assert chooser(tokens()).assignment.token.numel() == 2 * 40
    with inference_routing(chooser, capacity_factor=math.inf):
        assert chooser(tokens()).assignment.token.numel() == 4 * 40


def test_capacity_differs_between_training_and_evaluation() -> None:
    router = build(top_k=1, capacity_factor=0.5, eval_capacity_factor=4.0)
    x = tokens(8)
    assert router.train()(x).assignment.offsets[-1] < 40
    assert router.eval()(x).assignment.offsets[-1] == 40
    same = build(top_k=1, capacity_factor=0.5)
    assert same.eval()(x).assignment.offsets[-1] < 40


@pytest.mark.parametrize("batch", [3, 8, 11])
def test_batches_that_do_not_split_into_groups(batch: int) -> None:
    x = tokens(batch)
    tight = build(capacity_factor=1.05, group_size=4)
    balanced = build(importance_loss_weight=1.0, group_size=4)
    for router in (tight.train(), tight.eval(), balanced.train()):
        if batch == 11:
            with pytest.raises(M2MKDError, match="batch of 11 images does not split into groups of 4"):
                router(x)
        else:
            assert router(x).logits.shape[0] == (2 if batch == 8 else 1)
    assert balanced.eval()(x).logits.shape[0] == 1, "without slots and losses groups make no difference"
    assert build(**ROUTERS["vmoe"]).eval()(x).logits.shape[0] == 1


def test_tokens_without_images_are_one_group() -> None:
    router = build(capacity_factor=1.0, group_size=2)
    assert router(tokens().view(40, 8)).logits.shape == (1, 40, 4)


def test_tokens_may_have_several_dimensions() -> None:
    x = torch.randn(4, 3, 5, 8)
    for options in ({"capacity_factor": 0.5, "group_size": 2}, {"gate": "experts_choose", "capacity_factor": 1.0}):
        router = build(**options)
        flat, spread = router(x.flatten(1, 2)), router(x)
        assert torch.equal(flat.logits, spread.logits)
        assert all(torch.equal(a, b) for a, b in zip(flat.assignment, spread.assignment, strict=True))


def test_experts_choose_their_tokens() -> None:
    router = build(gate="experts_choose", capacity_factor=2.0, group_size=4, importance_loss_weight=1.0).train()
    routing = router(tokens(8))
    slots = capacity_of(20, 1, 4, 2.0)
    assert torch.equal(routing.assignment.offsets.diff(), torch.full((4,), 2 * slots))
    assert routing.assignment.place.shape == (40, 4)
    assert set(routing.losses) == {"importance"}
    few = build(gate="experts_choose", capacity_factor=2.0)(tokens(1, 3))
    assert torch.equal(few.assignment.offsets.diff(), torch.full((4,), 3)), "no more slots than tokens"


def test_losses_are_means_over_groups() -> None:
    weights = {f"{name}_loss_weight": weight for name, weight in LOSS_WEIGHTS.items()}
    router = build(noise_std=1.0, group_size=2, **weights).train()
    noise = torch.randn(4, 10, 4)
    routing = router(tokens(8), noise)
    logits, scaled = routing.logits, noise / 4
    wanted = {
        "importance": importance_loss(logits.softmax(dim=-1)).mean(),
        "load": load_loss(logits, scaled, top_k=2, noise_std=1 / 4).mean(),
        "gshard": gshard_loss((logits + scaled).softmax(dim=-1)).mean(),
        "z": router_z_loss(logits).mean(),
    }
    assert set(routing.losses) == set(wanted)
    for name, loss in wanted.items():
        torch.testing.assert_close(routing.losses[name], loss)
    total = sum(LOSS_WEIGHTS[name] * loss for name, loss in wanted.items())
    torch.testing.assert_close(router.auxiliary_loss(routing.losses), total)


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_losses_of_weight_zero_are_not_computed(name: str) -> None:
    router = build(noise_std=1.0, **{f"{name}_loss_weight": 1.0}).train()
    routing = router(tokens())
    assert set(routing.losses) == {name}
    routing.losses[name].backward()
    assert router.gate.weight.grad.abs().sum() > 0
    assert router.eval()(tokens()).losses == {}


@pytest.mark.parametrize("router", ["m2mkd", "vmoe"])
def test_no_tokens(router: str) -> None:
    routing = build(**ROUTERS[router]).train()(tokens(0))
    assert routing.assignment.offsets.eq(0).all()
    assert all(loss == 0 for loss in routing.losses.values())


def test_float64_stays_float64() -> None:
    routing = build().double()(tokens().double())
    assert routing.logits.dtype == routing.assignment.weight.dtype == torch.float64


BAD = {
    "gate": ({"gate": "softmax_topk"}, "did you mean 'softmax_top_k'"),
    "experts": ({"num_experts": 0, "top_k": 0}, "num_experts is 0"),
    "top_k": ({"top_k": 5}, "top_k is 5; with 4 experts"),
    "factor": ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
    "evaluation factor": ({"eval_capacity_factor": -1.0}, "eval_capacity_factor is -1.0"),
    "no factor": ({"gate": "experts_choose"}, "needs a capacity_factor"),
    "priority": ({"gate": "experts_choose", "capacity_factor": 1.0, "batch_priority": True}, "batch_priority has no"),
    "group": ({"group_size": 0}, "group_size is 0"),
    "noise": ({"noise_std": -1.0}, "noise_std is -1.0"),
    "load without noise": ({"load_loss_weight": 0.1}, "load_loss_weight is 0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_go_together(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(M2MKDError, match=message):
        build(**arguments)


def test_errors_are_of_the_right_kind() -> None:
    with pytest.raises(UnknownNameError):
        build(gate="top_k")
    for shape in [(8,), (3, 5, 7)]:
        with pytest.raises(M2MKDError, match=r"takes \[images, tokens, 8\] .* or \[tokens, 8\]") as error:
            build()(torch.randn(shape))
        assert f"x has shape {shape}" in str(error.value)
