"""KDLoss and the penalties: the formula and its factors; the operator beneath has its own tests."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.distillation import KDLoss, penalty
from sparsekd.sparse.modules import SparseConv2d


def written_out(student, teacher, target, temperature, alpha):
    """The formula in torch's own words; "batchmean" divides by the rows, not by the elements."""
    kl = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * F.cross_entropy(student, target) + alpha * temperature**2 * kl


# --- the loss --------------------------------------------------------------------------------------------------------


def test_two_classes_by_hand():
    # T = 2: the teacher says (3/4, 1/4), the student (1/2, 1/2), so with label 0
    #   CE = ln 2                                               = 0.693147
    #   KL = 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2)              = 0.130812,  T^2 KL = 0.523248
    #   gradient = (1/2 - 1) / 2 + 1/2 * 2 * (1/2 - 3/4)        = -1/2 at class 0
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    loss = KDLoss(temperature=2, alpha=0.5)(student, teacher, torch.tensor([0]))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.608198, abs=1e-6)
    loss.backward()
    assert student.grad.tolist() == [[pytest.approx(-0.5), pytest.approx(0.5)]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperature_is_squared(temperature):
    # HikariTJU/LD#74, keras-io#869, haitongli/knowledge-distillation-pytorch#2: without T^2 the teacher fades as the
    # temperature rises.
    student, teacher, target = torch.randn(7, 5).double(), torch.randn(7, 5).double(), torch.arange(7) % 5
    got = KDLoss(temperature, alpha=0.7)(student, teacher, target)
    assert got.item() == pytest.approx(written_out(student, teacher, target, temperature, 0.7).item(), rel=1e-10)


def test_gradient_keeps_its_size_as_the_temperature_rises():
    student, teacher = torch.randn(6, 4).double().requires_grad_(), torch.randn(6, 4).double()
    sizes = []
    for temperature in (50.0, 500.0):
        (grad,) = torch.autograd.grad(KDLoss(temperature, alpha=1.0)(student, teacher), student)
        sizes.append(grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_mean_over_rows_not_over_elements():
    # facebookresearch/deit#116, haitongli/knowledge-distillation-pytorch#48: a mean over elements is C times smaller.
    # The same row again changes nothing, and neither does a class that no one believes in.
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, -1.0]])
    loss = KDLoss(alpha=1.0, temperature=1.0)
    one = loss(student, teacher).item()
    assert loss(student.repeat(9, 1), teacher.repeat(9, 1)).item() == pytest.approx(one)
    padded = [torch.cat([logits, torch.full((1, 6), -200.0)], 1) for logits in (student, teacher)]
    assert loss(*padded).item() == pytest.approx(one)


def test_every_position_counts_as_a_row():
    student, teacher, target = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.randint(4, (2, 3, 5))
    rows = [logits.movedim(1, -1).reshape(-1, 4) for logits in (student, teacher)]
    assert KDLoss()(student, teacher, target).item() == pytest.approx(KDLoss()(*rows, target.reshape(-1)).item())


@pytest.mark.parametrize("sharpness", [1.0, 100.0, 1e4])
def test_two_classes_stay_finite(sharpness):
    # mdistiller#60
    student = (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * sharpness).requires_grad_()
    loss = KDLoss()(student, -student.detach(), torch.tensor([1, 1]))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_alpha_zero_is_cross_entropy():
    student, teacher, target = torch.randn(6, 5), torch.full((6, 5), math.nan), torch.arange(6) % 5
    want = F.cross_entropy(student, target, label_smoothing=0.1).item()
    assert KDLoss(alpha=0, label_smoothing=0.1)(student, teacher, target).item() == pytest.approx(want)


def test_alpha_one_hears_the_teacher_alone():
    """trl PR#5731: half a hard loss by a default that nobody saw. Here alpha=1 has none, and the default says 0.5."""
    assert KDLoss().alpha == 0.5
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    loss = KDLoss(alpha=1)
    want = written_out(student, teacher, torch.zeros(6, dtype=torch.long), 4.0, 1.0).item()
    assert loss(student, teacher).item() == pytest.approx(want, rel=1e-5)
    assert loss(student, teacher, torch.arange(6) % 5).item() == pytest.approx(want, rel=1e-5)
    assert loss(student, student).item() == pytest.approx(0, abs=1e-6)


def test_teacher_takes_no_gradient():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    KDLoss()(student, teacher, torch.tensor([0, 1, 2])).backward()
    assert student.grad is not None and teacher.grad is None


def test_unlabelled_rows():
    student, teacher, target = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([2, -100, 0, -100])
    kept = [0, 2]
    out = KDLoss()(student, teacher, target).item()
    assert out == pytest.approx(KDLoss()(student[kept], teacher[kept], target[kept]).item())
    distilled = KDLoss(distill_ignored=True)(student, teacher, target).item()
    want = 0.5 * F.cross_entropy(student, target) + 0.5 * KDLoss(alpha=1)(student, teacher)
    assert distilled == pytest.approx(want.item(), rel=1e-5)


def test_no_label_at_all():
    student, teacher, target = torch.randn(4, 3), torch.randn(4, 3), torch.full((4,), -100)
    assert KDLoss()(student, teacher, target).isnan()
    want = 0.5 * KDLoss(alpha=1)(student, teacher)
    assert KDLoss(distill_ignored=True)(student, teacher, target).item() == pytest.approx(want.item())


def test_another_ignore_index():
    student, teacher = torch.randn(3, 3), torch.randn(3, 3)
    got = KDLoss(ignore_index=255)(student, teacher, torch.tensor([0, 255, 2]))
    assert got.item() == pytest.approx(KDLoss()(student, teacher, torch.tensor([0, -100, 2])).item())


def test_repr_shows_what_was_set():
    assert repr(KDLoss()) == "KDLoss(temperature=4.0, alpha=0.5)"
    shown = repr(KDLoss(2, 1, ignore_index=0, label_smoothing=0.1, distill_ignored=True))
    assert shown == "KDLoss(temperature=2.0, alpha=1.0, ignore_index=0, label_smoothing=0.1, distill_ignored=True)"


@pytest.mark.parametrize(
    "settings, error, said",
    [
        ({"alpha": 1.5}, ValueError, r"Expected alpha in \[0, 1\], got 1.5"),
        ({"alpha": math.nan}, ValueError, r"Expected alpha in \[0, 1\], got nan"),
        ({"alpha": "much"}, TypeError, "Expected alpha to be a number, got 'much'"),
        ({"temperature": 0}, ValueError, "Expected temperature to be positive and finite, got 0"),
        ({"temperature": math.inf}, ValueError, "Expected temperature to be positive and finite, got inf"),
        ({"label_smoothing": -0.1}, ValueError, r"Expected label_smoothing in \[0, 1\], got -0.1"),
        ({"ignore_index": 0.5}, TypeError, "Expected ignore_index to be an int, got 0.5"),
    ],
)
def test_settings_out_of_range(settings, error, said):
    with pytest.raises(error, match=said):
        KDLoss(**settings)


def test_arguments_that_do_not_fit():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="Expected a target unless alpha is 1, got none"):
        KDLoss()(logits, logits)
    with pytest.raises(ValueError, match="Expected student and teacher logits of one shape"):
        KDLoss()(logits, torch.zeros(2, 4), torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="Expected targets in 0..2"):
        KDLoss()(logits, logits, torch.tensor([0, 3]))


# --- the penalties ---------------------------------------------------------------------------------------------------


def small_model():
    """A convolution of weights 1, -2 and a linear layer of weights 3, -4; the rest must not be counted."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
        model[3].weight.copy_(torch.tensor([[3.0, -4.0]]))
        model[0].bias.fill_(100)
    return model


@pytest.mark.parametrize("name, want, gradient", [("l1", 10, [1, -1]), ("l2", 30, [2, -4])])
def test_penalty_by_hand(name, want, gradient):
    model = small_model()
    value = penalty(name)(model)
    value.backward()
    assert value.shape == () and value.item() == want
    assert model[0].weight.grad.flatten().tolist() == gradient
    assert model[0].bias.grad is None and model[1].weight.grad is None


def test_penalty_of_packed_values():
    dense = nn.Conv2d(2, 3, 3)
    mask = torch.rand(dense.weight.shape) < 0.3
    with torch.no_grad():
        dense.weight.mul_(mask)
    model = nn.Sequential(SparseConv2d.from_dense(dense, mask), nn.Flatten())
    value = penalty("l2")(model)
    assert value.item() == pytest.approx(dense.weight.square().sum().item(), rel=1e-6)
    value.backward()
    assert torch.equal(model[0].values.grad, 2 * model[0].values.detach())


def test_shared_weight_counts_once():
    shared = nn.Linear(2, 2)
    twin = nn.Linear(2, 2)
    twin.weight = shared.weight
    assert penalty("l1")(nn.Sequential(shared, twin)).item() == pytest.approx(shared.weight.abs().sum().item())


def test_penalty_takes_a_callable_as_it_is():
    def biases(model):
        return model[0].bias.sum()

    assert penalty(biases) is biases


def test_penalties_that_do_not_fit():
    with pytest.raises(ValueError, match="Expected penalty to be l1, l2, group_lasso or a callable, got 'l3'"):
        penalty("l3")
    with pytest.raises(TypeError, match="Expected penalty to be a name or a callable, got int"):
        penalty(2)
    with pytest.raises(ValueError, match="Expected a model with convolutions or linear layers to penalise, got none"):
        penalty("l1")(nn.ReLU())
