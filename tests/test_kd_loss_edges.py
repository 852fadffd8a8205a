"""The distillation loss at its edges: no rows, no labels, infinities, and what it refuses."""

import itertools
import math

import pytest
import torch
from test_kd_loss import OPS, Case, make, with_gradient

from sparsekd.sparse import ops


def test_no_rows():
    for target in (None, torch.empty(0, dtype=torch.long)):
        loss, grad = with_gradient(ops.kd_loss, torch.empty(0, 7), torch.empty(0, 7), target, alpha=1)
        assert loss.isnan() and grad.shape == (0, 7)
    loss, grad = with_gradient(
        ops.kd_loss, torch.empty(2, 5, 0), torch.empty(2, 5, 0), torch.empty(2, 0, dtype=torch.long)
    )
    assert loss.isnan() and grad.shape == (2, 5, 0)


def test_rows_without_a_label_have_no_gradient():
    student, teacher, target = make(Case(6, 9, labels="all"))
    target[[1, 4]] = -100
    teacher[1], student[4] = math.nan, math.inf  # padding may hold anything
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    kept = [0, 2, 3, 5]
    want, want_grad = with_gradient(ops.kd_loss, student[kept], teacher[kept], target[kept])
    assert torch.equal(loss, want) and torch.equal(grad[kept], want_grad) and not grad[[1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_layout_does_not_matter(dtype):
    student, teacher, target = make(Case(6, 14, dtype=dtype, labels="all"))
    want, want_grad = with_gradient(ops.kd_loss, student, teacher, target)
    wide = torch.stack([student, student], 2).flatten(1)[:, ::2]
    for view in (student.t().contiguous().t(), wide, student.flip(0).flip(0)):
        every_other = torch.stack([target, target], 1)[:, 0]
        loss, grad = with_gradient(ops.kd_loss, view, teacher.t().contiguous().t(), every_other)
        assert torch.equal(loss, want) and torch.equal(grad, want_grad)
    one = teacher[:1]
    loss, grad = with_gradient(ops.kd_loss, student, one.expand(6, 14), target)
    want, want_grad = with_gradient(ops.kd_loss, student, one.repeat(6, 1), target)
    assert torch.equal(loss, want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("shape", [(5,), (3, 5, 4), (2, 5, 3, 2), (2, 1, 3)])
def test_classes_are_dimension_1(shape):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    dim = 0 if len(shape) == 1 else 1
    target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    rows = [logits.movedim(dim, -1).reshape(-1, shape[dim]) for logits in (student, teacher)]
    want, want_grad = with_gradient(ops.kd_loss, *rows, target.reshape(-1))
    assert torch.equal(loss, want) and grad.shape == shape
    assert torch.equal(grad.movedim(dim, -1).reshape(-1, shape[dim]), want_grad)
    if len(shape) == 4:
        layout = [logits.to(memory_format=torch.channels_last) for logits in (student, teacher)]
        loss, again = with_gradient(ops.kd_loss, *layout, target)
        assert torch.equal(loss, want) and torch.equal(again, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_both_rule_out_do_not_count(dtype):
    student, teacher, target = make(Case(4, 11, dtype=dtype, labels="all"))
    out = [2, 5, 10]
    kept = [k for k in range(11) if k not in out]
    target = torch.tensor([0, 1, 4, 7])  # among the kept ones
    want, want_grad = with_gradient(ops.kd_loss, student[:, kept], teacher[:, kept], target)
    student[:, out] = teacher[:, out] = -math.inf
    loss, grad = with_gradient(ops.kd_loss, student, teacher, torch.tensor(kept)[target])
    torch.testing.assert_close(loss, want, rtol=1e-14 if dtype == torch.float64 else 1e-7, atol=0)
    torch.testing.assert_close(grad[:, kept], want_grad, rtol=1e-6, atol=1e-14)
    assert not grad[:, out].any()


def test_minus_infinity_on_one_side():
    student, teacher, target = make(Case(3, 9, dtype=torch.float64, labels="all"))
    target[1] = 5
    # The teacher rules a class out: p log p = 0, as if it were far below.
    low, ruled_out = teacher.clone(), teacher.clone()
    low[1, 4], ruled_out[1, 4] = -1e4, -math.inf
    want, want_grad = with_gradient(ops.kd_loss, student, low, target)
    loss, grad = with_gradient(ops.kd_loss, student, ruled_out, target)
    assert torch.equal(loss, want) and torch.equal(grad, want_grad)
    # The student rules out what the teacher does not: infinitely wrong, and the gradient says in which direction.
    student[1, 4] = -math.inf
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    assert loss == math.inf and grad.isfinite().all() and grad[1, 4] < 0
    # The same of the label.
    loss, grad = with_gradient(ops.kd_loss, student, teacher, torch.tensor([0, 4, 0]), alpha=0)
    assert loss == math.inf and grad.isfinite().all() and grad[1, 4] == pytest.approx(-1 / 3)
    # And of a class that label smoothing gives a share.
    assert ops.kd_loss(student, teacher, target, alpha=0) < math.inf
    assert ops.kd_loss(student, teacher, target, alpha=0, label_smoothing=0.1) == math.inf


@pytest.mark.parametrize("classes", [3, 8, 21])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show(bad, classes):
    student, teacher, target = make(Case(4, classes, labels="all"))
    good, good_grad = with_gradient(ops.kd_loss, student, teacher, target)
    for place, position in itertools.product(("student", "teacher"), (0, classes - 1)):
        logits = {"student": student.clone(), "teacher": teacher.clone()}
        logits[place][2, position] = bad
        loss, grad = with_gradient(ops.kd_loss, *logits.values(), target)
        assert loss.isnan() and grad[2].isnan().any()
        assert torch.equal(grad[[0, 1, 3]], good_grad[[0, 1, 3]])
        # A term that does not count is not looked at.
        loss, _ = with_gradient(ops.kd_loss, *logits.values(), target, alpha=0)
        assert loss.isnan() == (place == "student")
    for lost in (torch.full((2, classes), -math.inf), torch.full((2, classes), math.nan)):
        assert ops.kd_loss(lost, teacher[:2], target[:2]).isnan()
        assert ops.kd_loss(student[:2], lost, target[:2]).isnan()


def test_forgeries_are_refused():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    good = dict(student=student, teacher=teacher, target=torch.tensor([0, 5, -100, 2]))
    good |= dict(temperature=4.0, alpha=0.5, ignore_index=-100, label_smoothing=0.1, distill_ignored=False)
    OPS.kd_loss(*good.values())  # the unforged calls work
    OPS.kd_loss_forward(*good.values(), True)
    label = torch.tensor
    nan, inf = math.nan, math.inf
    forged = [
        ({"student": student[0]}, ValueError, "Expected student logits with 2 dimensions, got shape"),
        ({"student": student[:, :, None]}, ValueError, "Expected student logits with 2 dimensions, got shape"),
        ({"student": student.int()}, TypeError, "Expected student logits of dtype .*, got Int"),
        ({"student": student.cfloat()}, TypeError, "Expected student logits of dtype .*, got ComplexFloat"),
        ({"teacher": teacher.bool()}, TypeError, "Expected teacher logits of dtype .*, got Bool"),
        (
            {"teacher": teacher[:3]},
            ValueError,
            r"Expected teacher logits of the student's shape \[4, 6\], got \[3, 6\]",
        ),
        ({"teacher": teacher[:, :5]}, ValueError, r"Expected teacher logits of the student's shape .*, got \[4, 5\]"),
        ({"teacher": teacher[:, 0]}, ValueError, r"Expected teacher logits of the student's shape .*, got \[4\]"),
        ({"teacher": teacher.to("meta")}, ValueError, "Expected teacher logits on cpu, got meta"),
        ({"student": student[:, :0], "teacher": teacher[:, :0]}, ValueError, "Expected at least one class, got shape"),
        ({"target": good["target"][:3]}, ValueError, "Expected target of size 4 .*, got shape"),
        ({"target": torch.zeros(5).long()}, ValueError, "Expected target of size 4 .*, got shape"),
        ({"target": good["target"][:, None]}, ValueError, "Expected target with 1 dimensions, got shape"),
        ({"target": good["target"].int()}, TypeError, "Expected target of dtype Long .*, got Int"),
        ({"target": torch.softmax(student, 1)}, TypeError, "Expected target of dtype Long .*, got Float"),
        ({"target": good["target"].to("meta")}, ValueError, "Expected target on cpu, got meta"),
        ({"target": label([0, 6, 0, 0])}, IndexError, r"Expected targets in 0\.\.5 or ignore_index=-100, got 6"),
        ({"target": label([0, 0, 0, -1])}, IndexError, r"Expected targets in 0\.\.5 or ignore_index=-100, got -1"),
        ({"target": label([2**62, 0, 0, 0])}, IndexError, r"Expected targets in 0\.\.5 .*, got 4611686018427387904"),
        (
            {"target": label([-(2**63), 0, 0, 0])},
            IndexError,
            r"Expected targets in 0\.\.5 .*, got -9223372036854775808",
        ),
        ({"ignore_index": 1}, IndexError, r"Expected targets in 0\.\.5 or ignore_index=1, got -100"),
        ({"ignore_index": 1, "alpha": 1.0}, IndexError, r"Expected targets in 0\.\.5 or ignore_index=1, got -100"),
        ({"target": None}, ValueError, "Expected a target unless alpha is 1, got none with alpha=0.5"),
        *(
            ({"temperature": T}, ValueError, "Expected temperature to be positive and finite, got")
            for T in (0.0, -1.0, nan, inf)
        ),
        *(({"alpha": alpha}, ValueError, r"Expected alpha in \[0, 1\], got") for alpha in (-0.1, 1.1, nan)),
        *(({"label_smoothing": eps}, ValueError, "Expected label_smoothing in .*, got") for eps in (-0.1, 1.1, nan)),
    ]
    for changes, error, message in forged:
        arguments = list((good | changes).values())
        with pytest.raises(error, match=message):
            OPS.kd_loss(*arguments)
        with pytest.raises(error, match=message):
            OPS.kd_loss_forward(*arguments, True)
        if arguments[0].is_floating_point():
            arguments[0] = arguments[0].detach().requires_grad_()
            with pytest.raises(error, match=message):
                OPS.kd_loss(*arguments)


def test_arguments_that_do_not_fit():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"Expected student and teacher logits of one shape .*got \(2, 3, 4\) and \(2, 3\)"
    ):
        ops.kd_loss(student, teacher[..., 0], torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="Expected student and teacher logits of one shape"):
        ops.kd_loss(torch.tensor(1.0), torch.tensor(1.0), alpha=1)
    with pytest.raises(ValueError, match=r"Expected target of shape \(2, 4\), got \(8,\)"):
        ops.kd_loss(student, teacher, torch.zeros(8).long())
    with pytest.raises(TypeError, match="Expected target of dtype torch.int64 .*, got torch.float32"):
        ops.kd_loss(student, teacher, torch.softmax(student, 1))
    with pytest.raises(IndexError, match=r"Expected targets in 0\.\.2 .*, got 3"):
        ops.kd_loss(student, teacher, torch.full((2, 4), 3))
