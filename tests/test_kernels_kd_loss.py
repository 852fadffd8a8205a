"""The Triton kernel behind kd_loss, through Triton's interpreter (interpreted.py), against the formula in float64."""

import math
import random

import interpreted
import pytest
import test_kd_loss
import torch
from conftest import check_op
from sparsekd.kernels import registration
from torch.autograd import gradcheck

from sparsekd.sparse import ops, reference

OPS = torch.ops.sparsekd

pytestmark = pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)

# Of the loss and of the gradient's largest element. fp32: a logit of size 30 is rounded by 2e-6, sums add a little.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


@pytest.fixture(autouse=True)
def kernels():
    """The ops of CPU tensors run the Triton kernels, interpreted."""
    with interpreted.as_cpu_ops():
        yield


@pytest.fixture(params=[False, True], ids=["in registers", "online"])
def online(request, monkeypatch):
    """Rows of few classes in blocks of 16, as rows of many are."""
    if request.param:
        from sparsekd.kernels import kd_loss

        monkeypatch.setattr(kd_loss, "ONE_BLOCK", 0)
        monkeypatch.setattr(kd_loss, "BLOCK_C", dict.fromkeys(kd_loss.BLOCK_C, 16))


def case(seed):
    """(student, teacher, target, settings)"""
    r = random.Random(seed)
    rows, classes = r.choice([1, 3, 7, 40]), r.choice([1, 2, 10, 17, 33, 100])
    dtype = r.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    scale = r.choice([0.1, 3.0, 20.0])
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)

    student, teacher = logits(), logits()
    if r.random() < 0.2:
        teacher = teacher.double()
    if r.random() < 0.2:
        student = student.t().contiguous().t()
    target = torch.randint(classes, (rows,), generator=generator)
    kind = r.choice(["all", "all", "some", "some", "none", "absent"])
    if kind == "absent":
        target = None
    elif kind != "all":
        target[torch.rand(rows, generator=generator) < (0.4 if kind == "some" else 2)] = -100
    settings = dict(
        temperature=r.choice([1.0, 2.0, 4.0, 0.7, 20.0]),
        alpha=1.0 if target is None else r.choice([0.0, 0.3, 0.5, 1.0]),
        label_smoothing=r.choice([0.0, 0.0, 0.1, 1.0]),
        distill_ignored=r.random() < 0.3,
    )
    return student, teacher, target, settings


def plus_nothing(student, *rest, **settings):
    """The reference of a loss that has no term has no gradient either."""
    return reference.kd_loss_reference(student, *rest, **settings) + 0 * student.sum()


def check(seed):
    student, teacher, target, settings = case(seed)
    got, got_grad = test_kd_loss.with_gradient(ops.kd_loss, student, teacher, target, **settings)
    wide = (student.double(), teacher.double(), target)
    want, want_grad = test_kd_loss.with_gradient(plus_nothing, *wide, **settings)
    assert got.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[student.dtype]
    if math.isnan(want):
        assert math.isnan(got)
        return
    assert abs(got - want) <= tolerance * max(abs(want), 0.01), (settings, float(got), float(want))
    half = torch.finfo(student.dtype).eps if student.dtype.itemsize == 2 else 0  # the gradient's own rounding
    most = float(want_grad.abs().max())
    # The formula's terms may cancel (q against p): what is lost is of their size, which alpha * T / rows bounds.
    terms = max(most, settings["alpha"] * settings["temperature"] / student.shape[0] * 0.1)
    assert float((got_grad.double() - want_grad).abs().max()) <= tolerance * terms + half * most


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations(seed, online):
    check(seed)


def test_worked_by_hand(online):
    test_kd_loss.test_worked_by_hand(torch.float64)


def test_any_number_of_classes():
    """Past ONE_BLOCK a row is walked online."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 20011, generator=generator) * 3 for _ in range(2))
    target = torch.tensor([20010, 7])
    got, grad = test_kd_loss.with_gradient(ops.kd_loss, student, teacher, target)
    want, want_grad = test_kd_loss.with_gradient(
        reference.kd_loss_reference, student.double(), teacher.double(), target
    )
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert float((grad - want_grad).abs().max()) <= 1e-6 * float(want_grad.abs().max())


def test_logits_far_out(online):
    """-inf masks a class; thousands overflow in no exp."""
    student = torch.tensor([[9000.0, 9001.0, 8990.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[-9000.0, -9003.0, -8999.0, -math.inf]], dtype=torch.float64)
    got, grad = test_kd_loss.with_gradient(ops.kd_loss, student, teacher, torch.tensor([1]))
    some, some_grad = test_kd_loss.with_gradient(
        reference.kd_loss_reference, student[:, :3], teacher[:, :3], torch.tensor([1])
    )
    assert float(got) == pytest.approx(float(some), rel=1e-10)
    assert torch.allclose(grad[:, :3], some_grad, rtol=1e-9) and grad[0, 3] == 0


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_target_out_of_range_is_nan(wrong, online):
    """To raise an error would wait for the device. Nothing foreign is read (interpreted.py)."""
    student = torch.randn(3, 5)
    assert ops.kd_loss(student, torch.randn(3, 5), torch.tensor([0, wrong, 1])).isnan()


def test_opcheck_and_gradcheck():
    student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    target = torch.tensor([0, -100, 6])
    settings = (3.0, 0.5, -100, 0.1, False)
    check_op(OPS.kd_loss_forward, [student, teacher, target, *settings, True], ())
    assert gradcheck(lambda s: OPS.kd_loss(s, teacher, target, *settings), student.requires_grad_())


def test_opcheck_of_the_triton_op():
    op = registration.triton_op("kd_loss_forward")
    arguments = (
        torch.randn(3, 7),
        torch.randn(3, 7).half(),
        torch.tensor([0, -100, 6]),
        3.0,
        0.5,
        -100,
        0.1,
        True,
        True,
    )
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    given = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, -100, 6])

    def function(student, teacher, target):
        return ops.kd_loss(student * 2, teacher, target) * 0.5

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(test_kd_loss.with_gradient(f, *given) for f in (function, compiled)), strict=True):
        torch.testing.assert_close(one, other)


def test_no_rows():
    assert ops.kd_loss(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).isnan()


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(temperature=0.0), "Expected temperature to be positive and finite, got 0.0"),
        (dict(alpha=1.5), r"Expected alpha in \[0, 1\], got 1.5"),
        (dict(label_smoothing=-0.1), r"Expected label_smoothing in \[0, 1\], got -0.1"),
        (dict(target=None), "Expected a target unless alpha is 1, got none with alpha=0.5"),
        (dict(target=torch.zeros(3, dtype=torch.int32)), "Expected target of dtype int64"),
        (dict(student=torch.ones(3, 4, dtype=torch.int64)), "Expected student logits of dtype float32"),
    ],
)
def test_what_it_refuses(change, said):
    arguments = dict(student=torch.ones(3, 4), teacher=torch.ones(3, 4), target=torch.zeros(3, dtype=torch.int64))
    with pytest.raises((ValueError, TypeError), match=said):
        ops.kd_loss(**{**arguments, **change})
