"""What the phases train, and what they must leave alone. The pair's numbers are in the golden tests of the models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import small

from m2mkd_fast.distill.tasks import (
    DistillationSettings,
    MetaFromTeacher,
    PairTask,
    SupervisedTask,
    WholeModelDistillation,
)
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules import meta_model, split, student_modules

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.fixture
def parts():
    torch.manual_seed(0)
    teacher = split(create_model("vit_micro", **SMALL), 3)
    meta = meta_model(teacher)
    student = create_model("vmoe_micro.m2mkd", **SMALL | {"embed_dim": 8})
    return teacher, meta, student_modules(student, 3, teacher.widths)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(4, 1, 16, 16), torch.tensor([0, 3, 3, 9])


def moved(task) -> set[str]:
    """Names of the parameters that a backward pass gives a gradient."""
    return {name for name, parameter in task.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_pair_trains_the_students_module_alone(parts, batch, index):
    teacher, meta, students = parts
    task = PairTask(students[index], index, teacher, meta, teacher, DistillationSettings(feature_weight=1.0))
    loss = task(*batch)
    assert set(loss.terms) == ({"task", "distillation"} if index == 2 else {"task", "distillation", "feature"})
    loss.total.backward()
    assert moved(task) == {name for name, _ in task.named_parameters() if name.startswith("trainable.")}


def test_the_input_of_a_pair_comes_from_the_prefix(parts, batch):
    teacher, meta, students = parts
    settings = DistillationSettings()
    losses = [PairTask(students[1], 1, teacher, meta, prefix, settings)(*batch).total for prefix in (teacher, meta)]
    assert losses[0] != losses[1]
    by_hand = meta.run(students[1](teacher.run(batch[0], 0, 1)), 2)
    torch.testing.assert_close(2 * losses_task(parts, batch), F.cross_entropy(by_hand, batch[1]))


def losses_task(parts, batch):
    teacher, meta, students = parts
    return PairTask(students[1], 1, teacher, meta, teacher, DistillationSettings())(*batch).terms["task"]


def test_without_distillation_no_teacher_is_needed(parts, batch):
    _, meta, students = parts
    task = PairTask(students[0], 0, None, meta, meta, DistillationSettings(alpha=0.0))
    assert set(task(*batch).terms) == {"task"}
    with pytest.raises(M2MKDError, match="need a teacher"):
        PairTask(students[0], 0, None, meta, meta, DistillationSettings(alpha=0.5))


@pytest.mark.parametrize("index", [-1, 3])
def test_slots_are_counted_from_zero(parts, index):
    teacher, meta, students = parts
    with pytest.raises(M2MKDError, match=rf"slot {index} is not one of the meta model's 3 slots 0 ... 2"):
        PairTask(students[0], index, teacher, meta, meta, DistillationSettings())


def test_frozen_parts_stay_in_evaluation_mode(parts):
    teacher, meta, students = parts
    task = PairTask(students[0], 0, teacher, meta, teacher, DistillationSettings()).train()
    assert task.trainable.training
    assert not any(module.training for module in task.frozen.modules())


def test_a_meta_model_equal_to_the_teacher_has_no_loss(parts, batch):
    teacher, _, _ = parts
    import copy

    loss = MetaFromTeacher(copy.deepcopy(teacher), teacher)(*batch)
    assert loss.total.abs() < 1e-5
    assert set(loss.terms) == {"distillation", "feature"}


def test_the_meta_model_learns_along_both_paths(parts, batch):
    teacher, meta, _ = parts
    task = MetaFromTeacher(meta, teacher)
    task(*batch).total.backward()
    assert moved(task) == {name for name, _ in task.named_parameters() if name.startswith("trainable.")}


def test_losses_that_a_student_asks_for_itself_are_added(batch):
    torch.manual_seed(0)
    mixture = SupervisedTask(create_model("vmoe_micro.every2", **SMALL))
    assert mixture(*batch).terms["balance"] > 0
    loss = mixture(*batch)
    torch.testing.assert_close(loss.total, loss.terms["task"] + loss.terms["balance"])
    assert set(SupervisedTask(create_model("vit_micro", **SMALL))(*batch).terms) == {"task"}


def test_whole_model_distillation_is_the_same_loss_on_whole_models(parts, batch):
    teacher, _, _ = parts
    student = create_model("vit_micro", **SMALL)
    loss = WholeModelDistillation(student, teacher, DistillationSettings(alpha=1.0, tau=2.0))(*batch)
    p, q = (teacher(batch[0]) / 2).log_softmax(1), (student(batch[0]) / 2).log_softmax(1)
    torch.testing.assert_close(loss.total, 4 * (p.exp() * (p - q)).sum(1).mean())


@pytest.fixture(scope="module")
def with_batch_norms():
    """A ResNet, its meta model and a ResNet student of another width: all three hold running statistics."""
    torch.manual_seed(0)
    teacher = split(small("resnet"), [3, 2, 2], (1, 16, 16))
    student = small("resnet", channels=(4, 6, 8, 8))
    students = student_modules(student, [3, 2, 2], teacher.cuts, image_shape=(1, 16, 16))
    return teacher, meta_model(teacher), students


def buffers(module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_statistics_of_frozen_modules_do_not_move(with_batch_norms, batch, index):
    teacher, meta, students = with_batch_norms
    task = PairTask(students[index], index, teacher, meta, teacher, DistillationSettings(feature_weight=1.0))
    before = buffers(task)
    losses = [task.train()(*batch).total for _ in range(2)]
    moved = {name for name, buffer in buffers(task).items() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("trainable.")}
    assert torch.equal(*losses), "in train mode the loss is a function of the batch alone"


def test_statistics_of_the_teacher_do_not_move_while_the_meta_model_learns(with_batch_norms, batch):
    teacher, _, _ = with_batch_norms
    meta = meta_model(teacher)
    before = buffers(teacher)
    task = MetaFromTeacher(meta, teacher).train()
    task(*batch).total.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers(teacher).items())
    assert all(p.grad is not None for p in meta.parameters())


def test_features_are_compared_in_the_teachers_layout(with_batch_norms, batch):
    teacher, meta, _ = with_batch_norms
    torch.manual_seed(0)
    mixture = create_model("vmoe_micro.m2mkd", **SMALL)
    students = student_modules(mixture, 3, teacher.cuts)
    settings = DistillationSettings(feature_weight=1.0)
    for index in (0, 1):
        task = PairTask(students[index], index, teacher, meta, teacher, settings)
        target = teacher.run(batch[0], 0, index + 1)
        assert students[index](teacher.run(batch[0], 0, index)).shape == target.shape
        assert task(*batch).terms["feature"] > 0
    tokens = student_modules(mixture, 3, teacher.widths)
    with pytest.raises(M2MKDError, match=r"gives tokens of width 8 where the meta model's module 0 gives channels-fir"):
        PairTask(tokens[0], 0, teacher, meta, teacher, settings)
