"""Objectives against arithmetic written out by hand."""

import math

import pytest
import torch
from conftest import tiny_model
from torch import nn

from modeling_ride_bf import RideBfOutput
from ride_bf.methods.losses import CrossEntropyLoss, RideLoss
from ride_bf.methods.objectives import (
    ClassificationObjective,
    DistillationObjective,
    MixedObjective,
    RouterObjective,
    SharedClassifierObjective,
    next_expert_needed,
)

LOGITS = torch.tensor([[[2.0, 1.0, 0.0], [0.5, 1.5, -1.0]], [[0.0, 3.0, 1.0], [1.0, 1.0, 1.0]]])  # (2, 2, 3)
LABELS = torch.tensor([0, 2])
BATCH = {"labels": LABELS, "pixel_values": torch.zeros(2, 3, 4, 4)}


def softmax(logits):
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def test_mixed_images_count_for_both_classes_by_their_share():
    criterion = RideLoss([10, 5, 2])
    outputs = RideBfOutput(expert_logits=LOGITS, batchformer_expert_logits=LOGITS.flip(0))
    batch = {**BATCH, "mixed_labels": torch.tensor([2, 1]), "label_weight": torch.tensor(0.7)}
    for objective in (ClassificationObjective(criterion), SharedClassifierObjective(criterion, 0.5)):
        own = objective(outputs, {"labels": LABELS}, reweight=True)
        other = objective(outputs, {"labels": batch["mixed_labels"]}, reweight=True)
        mixed = MixedObjective(objective)
        torch.testing.assert_close(mixed(outputs, batch, reweight=True), 0.7 * own + 0.3 * other)
        taught = DistillationObjective(mixed, Teacher(), distillation_factor=0.0)
        torch.testing.assert_close(taught(outputs, batch, reweight=True), 0.7 * own + 0.3 * other)


class Teacher(nn.Module):
    """Answers with fixed logits, and other ones in train mode."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Parameter(torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 2.0]]))

    def forward(self, pixel_values):
        assert pixel_values is BATCH["pixel_values"]
        return RideBfOutput(logits=self.fixed * (-1 if self.training else 1))


def divergence_by_hand(logits, temperature):
    total = 0.0
    for image in range(2):
        teacher = softmax([value / temperature for value in Teacher().fixed[image].tolist()])
        student = softmax([value / temperature for value in logits[image].mean(dim=0).tolist()])
        total += sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True)) / 2
    return temperature**2 * total


@pytest.mark.parametrize("reweight", [False, True])
def test_distillation(reweight):
    plain = ClassificationObjective(RideLoss([81, 16, 1]))
    objective = DistillationObjective(plain, Teacher(), distillation_factor=0.7, temperature=1.5, loss_factor=0.5)
    outputs = RideBfOutput(expert_logits=LOGITS)
    expected = 0.5 * plain(outputs, BATCH, reweight=reweight).item() + 0.7 * divergence_by_hand(LOGITS, 1.5)
    assert objective(outputs, BATCH, reweight=reweight).item() == pytest.approx(expected, rel=1e-6)


def test_distillation_of_both_streams():
    plain = SharedClassifierObjective(CrossEntropyLoss(), batchformer_loss_weight=0.1)
    outputs = RideBfOutput(expert_logits=LOGITS, batchformer_expert_logits=LOGITS.flip(0))
    expected = plain(outputs, BATCH).item()
    expected += divergence_by_hand(LOGITS, 2.0) + 0.1 * divergence_by_hand(LOGITS.flip(0), 2.0)
    assert DistillationObjective(plain, Teacher(), temperature=2.0)(outputs, BATCH).item() == pytest.approx(expected)


def test_a_teacher_stays_in_evaluation_mode_and_learns_nothing():
    teacher = Teacher()
    objective = DistillationObjective(ClassificationObjective(CrossEntropyLoss()), teacher).train()
    assert not teacher.training
    logits = LOGITS.clone().requires_grad_()
    objective(RideBfOutput(expert_logits=logits), BATCH).backward()
    assert logits.grad.abs().sum() > 0
    assert teacher.fixed.grad is None


def test_router_targets():
    # each image's running prediction by expert: 0 1 1, 1 1 1, 1 0 1, 0 0 0, 1 1 0
    one_hot = torch.eye(2)
    steps = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]])
    growing = torch.tensor([1.0, 10.0, 100.0])  # so that the last expert decides the mean
    expert_logits = one_hot[steps] * growing[:, None]
    needed = next_expert_needed(expert_logits, torch.ones(5, dtype=torch.long))
    assert needed.tolist() == [[True, False], [False, False], [False, True], [False, False], [False, False]]


def test_router_objective():
    router_logits = torch.tensor([[0.3], [-1.2]])
    # image 0, class 0: 2.0 > 1.0, right at once. Image 1, class 2: 0 3 1, then 1 4 2: never right
    outputs = RideBfOutput(expert_logits=LOGITS, router_logits=router_logits)
    sigmoid = [1 / (1 + math.exp(-value)) for value in (0.3, -1.2)]
    by_hand = -(math.log(1 - sigmoid[0]) + math.log(1 - sigmoid[1])) / 2
    assert RouterObjective(100.0)(outputs, BATCH).item() == pytest.approx(by_hand)
    # image 0, class 1: wrong at first, 2.5 = 2.5 then: make it right
    logits = LOGITS + torch.tensor([[[0.0, 0, 0], [0, 0.1, 0]], [[0, 0, 0], [0, 0, 0]]])
    needed = {"labels": torch.tensor([1, 2])}
    by_hand = -(100 * math.log(sigmoid[0]) + math.log(1 - sigmoid[1])) / 2
    outputs = RideBfOutput(expert_logits=logits, router_logits=router_logits)
    assert RouterObjective(100.0)(outputs, needed).item() == pytest.approx(by_hand)


def test_router_objective_reaches_the_router_and_is_float32_under_autocast():
    model = tiny_model(router=True, router_top_k=3, router_hidden_size=4).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RouterObjective()(model(torch.randn(6, 3, 16, 16)), {"labels": torch.arange(6) % 5})
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.router.parameters())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="router=True"):
        RouterObjective()(RideBfOutput(expert_logits=LOGITS), BATCH)
    with pytest.raises(ValueError, match="positive_weight must be positive, got 0"):
        RouterObjective(0)
    with pytest.raises(ValueError, match="temperature of distillation must be positive, got 0"):
        DistillationObjective(ClassificationObjective(CrossEntropyLoss()), Teacher(), temperature=0)
