from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m2mkd_fast.data import create_dataset
from m2mkd_fast.distill.tasks import DistillationSettings, PairTask, SupervisedTask, Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.meta import meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.vision_moe import expert_load
from m2mkd_fast.pipeline.activation_checkpointing import activation_checkpointing
from m2mkd_fast.pipeline.batch_source import AugmentedBatches
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.optimization import create_optimizer
from m2mkd_fast.pipeline.optimizer_step import OptimizerStep
from m2mkd_fast.pipeline.training import fit

CPU = Execution(device="cpu", precision="float32")
TINY = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 8, "num_classes": 10, "in_chans": 1}


@pytest.fixture(scope="module")
def images():
    return create_dataset("digits", image_size=8, images_per_class=6).splits["train"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair_task(feature_weight=0.0, tau=2.0) -> PairTask:
    torch.manual_seed(0)
    teacher = split(create_model("vit_micro", **TINY), 3)
    meta = meta_model(teacher)
    student = student_modules(create_model("vmoe_micro.m2mkd", **TINY | {"num_experts": 2}), 3, teacher.cuts)[1]
    return PairTask(student, 1, teacher, meta, teacher, DistillationSettings(feature_weight=feature_weight, tau=tau))


def gradients(task: Task, batch: tuple, **training) -> list[torch.Tensor]:
    task = copy.deepcopy(task)
    config = TrainingConfig(**{"clip_grad": 0.0, **training})
    optimizer = torch.optim.SGD(task.trainable.parameters(), lr=0.0)
    step = OptimizerStep(CPU.prepare(task), optimizer, None, None, config, CPU)
    torch.manual_seed(7)
    outcome = step(0, *batch)
    return [outcome.total, *(p.grad for p in task.trainable.parameters() if p.grad is not None)]


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


@pytest.mark.parametrize("make", [pair_task, lambda: SupervisedTask(create_model("vit_micro", **TINY), 0.1)])
@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(double, make, accumulate):
    whole, cut = gradients(make(), batch()), gradients(make(), batch(), accumulate=accumulate)
    assert len(whole) == len(cut) > 20
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_micro_batches_take_tuples_apart_too(double):
    class Difference(Task):
        def forward(self, inputs, labels):
            left, right = inputs
            return SupervisedTask.forward(self, left - right, labels)

        label_smoothing = 0.0

    (images, labels), model = batch(), create_model("vit_micro", **TINY)
    other = torch.randn(8, 1, 8, 8)
    whole = gradients(SupervisedTask(model), (images - other, labels))
    cut = gradients(Difference(model), ((images, other), labels), accumulate=4)
    for one, another in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-10, atol=1e-13)


def circuit() -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 10, "img_size": 8, "in_chans": 1, "fit_signatures": False}
    return create_model("nac_micro.ring", **options)


def transformer(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **TINY | {"depth": 6} | options)


CHECKPOINTED = {
    "ViT with dropout": lambda: transformer("vit_micro", proj_drop_rate=0.3, drop_path_rate=0.3),
    "V-MoE with balance losses": lambda: transformer("vmoe_micro.every2", num_experts=3, proj_drop_rate=0.3),
    "chain of stages": lambda: split(transformer("vit_micro"), 3),
    "circuit": circuit,
    "model cut along its graph": lambda: split(create_model("resnet10t", num_classes=10, in_chans=1), 4, (1, 32, 32)),
}


@pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointed_activations_give_the_same_bits_in_less_memory(make):
    model = make()
    size = 32 if isinstance(getattr(model, "stages", None), nn.ModuleList) and len(model.stages) == 4 else 8
    given = torch.randn(8, 1, size, size), torch.randint(10, (8,))
    task = SupervisedTask(model)
    names = list(model.state_dict())

    def run():
        task.zero_grad()
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        torch.manual_seed(3)
        saved = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = task(*given)
        load = expert_load(model)
        loss.total.backward()
        assert expert_load(model) == load
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        return [loss.total, *(p.grad for p in model.parameters())], kept

    buffers = [buffer.clone() for buffer in model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    plain, memory = run()
    with activation_checkpointing(model):
        assert list(model.state_dict()) == names
        checkpointed, less = run()
    for one, other in zip(plain, checkpointed, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert less < 0.6 * memory
    assert run()[1] == memory  # and after it nothing is left of it


def test_a_model_without_blocks_is_named():
    nothing = activation_checkpointing(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(M2MKDError, match="checkpoint_activations=true, but a Sequential has no blocks"), nothing:
        pass


def test_mixtures_are_not_compiled_and_checkpointed():
    nothing = activation_checkpointing(transformer("vmoe_micro.every2", num_experts=2), compiled=True)
    with pytest.raises(M2MKDError, match="compile=true and checkpoint_activations=true do not go together"), nothing:
        pass


def test_a_trained_run_does_not_depend_on_checkpointed_activations(images):
    weights = []
    for checkpoint in (False, True):
        model = transformer("vmoe_micro.every2", num_experts=3, proj_drop_rate=0.1)
        config = TrainingConfig(steps=3, batch_size=16, evaluate_every=2, checkpoint_activations=checkpoint)
        result = fit(SupervisedTask(model), images, config, seed=0, execution=CPU)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert set(result.gradient_share) == {"task", "balance"}
    assert torch.equal(*weights)


class Poisoned(SupervisedTask):
    """Gives a loss or a gradient that is not finite at chosen calls; its model has a buffer that changes."""

    def __init__(self, model: nn.Module, loss_at=(), gradient_at=()) -> None:
        super().__init__(model)
        self.calls, self.loss_at, self.gradient_at = -1, loss_at, gradient_at

    def forward(self, images, labels):
        self.calls += 1
        loss = super().forward(images, labels)
        total = loss.total
        if self.calls in self.loss_at:
            total = total * math.nan
        if self.calls in self.gradient_at:
            total = total + (self.trainable[1].weight.sum() * 0.0).abs().sqrt()  # 0, with an infinite slope
        return loss._replace(total=total)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def state(task, optimizer, average):
    tensors = {**task.trainable.state_dict(), **{f"average.{k}": v for k, v in average.module.state_dict().items()}}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{k}": v for k, v in moments.items() if isinstance(v, torch.Tensor)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("on_device", [False, True], ids=["the host looks", "decided on the device"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("poison", [{"loss_at": (2,)}, {"gradient_at": (2,)}], ids=["loss", "gradient"])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_step_that_is_left_out_changes_nothing(optimizer, on_device, poison, clip_grad):
    task = Poisoned(normed(), **poison)
    config = TrainingConfig(optimizer=optimizer, learning_rate=0.1, clip_grad=clip_grad)
    prepared = CPU.prepare(task)
    made = create_optimizer(task.trainable, config)
    average = prepared.moving_average(0.5)
    step = OptimizerStep(prepared, made, average, None, config, CPU)
    if on_device:
        step.host_looks = False
    outcomes, states = [], []
    for t in range(4):
        outcomes.append(step(t, *batch()))
        states.append(state(task, made, average))
    assert [bool(outcome.left_out) for outcome in outcomes] == [False, False, True, False]
    assert states[1].keys() == states[2].keys()
    for name, tensor in states[1].items():
        assert torch.equal(tensor, states[2][name]), name
        assert tensor.isfinite().all()
    changed = [name for name in states[2] if not torch.equal(states[2][name], states[3][name])]
    assert {"1.weight", "2.running_mean", "2.num_batches_tracked", "average.1.weight", "average.2.running_mean"} <= {
        *changed
    }


def test_the_device_decides_as_the_host_does():
    ended = []
    for host_looks in (True, False):
        task, config = Poisoned(normed(), loss_at=(1,), gradient_at=(3,)), TrainingConfig(learning_rate=0.01)
        prepared = CPU.prepare(task)
        made, average = create_optimizer(task.trainable, config), prepared.moving_average(0.5)
        step = OptimizerStep(prepared, made, average, None, config, CPU)
        step.host_looks = host_looks
        for t in range(6):
            step(t, *batch())
        ended.append(state(task, made, average))
    for name, tensor in ended[0].items():
        torch.testing.assert_close(tensor, ended[1][name], rtol=1e-6, atol=1e-7, msg=name)


def training(**changes) -> TrainingConfig:
    return TrainingConfig(**{"steps": 20, "batch_size": 8, "checkpoint_every": 5, "evaluate_every": 10, **changes})


@pytest.mark.parametrize("at", [4, 9])
def test_a_run_that_left_steps_out_is_resumed_with_the_same_bits(images, tmp_path, at):
    class Dying(Poisoned):
        """Poison that depends on the batch, as real poison does."""

        dies_at = None

        def forward(self, images, labels):
            self.calls = int(torch.get_rng_state().sum()) % 3  # a function of the step's seed
            self.number = getattr(self, "number", -1) + 1
            if self.number == self.dies_at:
                raise KeyboardInterrupt
            loss = SupervisedTask.forward(self, images, labels)
            return loss._replace(total=loss.total * (math.nan if self.calls == 0 else 1.0))

    def run(folder, dies_at=None):
        task = Dying(normed())
        task.dies_at = dies_at
        result = fit(task, images, training(ema_decay=0.9), seed=5, execution=CPU, folder=folder)
        return result, torch.cat([v.flatten().double() for v in task.trainable.state_dict().values()])

    whole, weights = run(tmp_path / "whole")
    assert 1 <= whole.skipped <= 10
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies_at=at)
    resumed, again = run(tmp_path / "killed")
    assert torch.equal(weights, again)
    assert (resumed.skipped, resumed.terms) == (whole.skipped, whole.terms)


def test_too_many_of_them_stop_the_run_with_the_batch(images, tmp_path):
    task = Poisoned(normed(), loss_at=(3, 6, 7))
    expected = r"the loss at step 7 is not finite \(terms: .*\), after 2 such steps .*its last checkpoint is kept, and "
    with pytest.raises(M2MKDError, match=rf"{expected}the batch is in .*bad_batch.safetensors.*learning rate"):
        fit(task, images, training(max_skipped=2), seed=0, execution=CPU, folder=tmp_path)
    saved = load_file(tmp_path / "bad_batch.safetensors")
    (expected_images, labels) = next(
        AugmentedBatches(images, training(), 0, DataConfig(augmentation="none")).batches(7, 8)
    )
    assert torch.equal(saved["images"], expected_images) and torch.equal(saved["labels"], labels)
    assert all(value.isfinite().all() for value in task.trainable.state_dict().values())


def test_skipped_steps_are_in_result_and_metrics_but_not_in_the_losses(images, tmp_path):
    result = fit(Poisoned(normed(), loss_at=(3, 6)), images, training(), seed=0, execution=CPU, folder=tmp_path)
    assert result.skipped == 2 and result.steps == 20
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["skipped"] for entry in entries] == [1, 2, 2, 2]
    assert all(math.isfinite(entry["loss"]) for entry in entries)


def test_fp16_finds_its_scale_and_keeps_it_in_checkpoints(images, tmp_path):
    half = Execution(device="cpu", precision="fp16")

    def run(folder, until=None):
        task = SupervisedTask(normed())
        result = fit(task, images, training(), seed=1, execution=half, folder=folder, until=until)
        return result, torch.cat([p.detach().flatten() for p in task.trainable.parameters()])

    result, weights = run(tmp_path / "whole")
    assert result.skipped == 0 and weights.isfinite().all()
    run(tmp_path / "parts", until=7)
    again, same = run(tmp_path / "parts")
    assert torch.equal(weights, same) and again.steps == 20


@pytest.fixture
def dynamo():
    """Counters of torch.compile, at zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_student_trains_alike_in_one_graph(images, tmp_path, dynamo):
    ended, losses = [], []
    for compiled in (False, True):
        task, folder = SupervisedTask(transformer("vit_micro", depth=1)), tmp_path / str(compiled)
        config = TrainingConfig(steps=5, batch_size=16, evaluate_every=3, checkpoint_every=1, accumulate=2)
        config.compile = compiled
        fit(task, images, config, seed=0, execution=CPU, folder=folder)
        ended.append(torch.cat([p.detach().flatten() for p in task.trainable.parameters()]))
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*ended, rtol=1e-3, atol=1e-3)  # Adam's first steps have the size of the learning rate
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


@pytest.mark.slow
def test_checkpointed_activations_can_be_compiled(dynamo):
    model = transformer("vit_micro", depth=2)
    task, given = SupervisedTask(model), batch()
    compiled = torch.compile(task, backend="aot_eager")
    found = []
    with activation_checkpointing(model, compiled=True):
        for called in (task, compiled):
            model.zero_grad()
            called(*given).total.backward()
            found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]
