"""Gradients of the distillation loss, and what torch asks of an operator."""

import dataclasses

import pytest
import torch
from test_kd_loss import OPS, Case, largest, make, with_gradient
from torch.autograd import gradcheck
from torch.library import opcheck

from sparsekd.sparse import ops, reference


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 4),
        Case(3, 4, labels="absent", temperature=0.7),
        Case(4, 3, alpha=0.0, label_smoothing=0.3),
        Case(4, 5, distill_ignored=True, label_smoothing=0.1, temperature=20.0),
        Case(3, 4, teacher="near", temperature=30.0),
    ],
    ids=["plain", "no target", "cross entropy", "distill ignored", "near"],
)
def test_gradcheck(case):
    student, teacher, target = make(dataclasses.replace(case, scale=1.0, dtype=torch.float64))
    assert gradcheck(lambda s: ops.kd_loss(s, teacher, target, **case.settings), student.requires_grad_())


def test_the_gradient_is_scaled_by_what_comes_from_above():
    student, teacher, target = make(Case())
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    for factor in (2.0, -3.0, 0.0, 1e-3):
        _, scaled = with_gradient(lambda *inputs, by=factor: ops.kd_loss(*inputs) * by, student, teacher, target)
        assert torch.equal(scaled, grad * factor)
    # Two losses of one student.
    _, both = with_gradient(lambda *inputs: ops.kd_loss(*inputs) + ops.kd_loss(*inputs), student, teacher, target)
    assert torch.equal(both, grad * 2)
    with torch.no_grad():
        alone = ops.kd_loss(student.requires_grad_(), teacher, target)
    assert torch.equal(alone, loss) and not alone.requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.kd_loss(student, teacher, target), loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loss_scale_keeps_small_gradients(dtype):
    """As torch.amp.GradScaler: float16 holds neither the scale, 2^16, nor most of the gradient without it."""
    student, _, target = make(Case(64, 20, scale=0.1, labels="all"))
    student = (student + 13 * torch.nn.functional.one_hot(target, 20)).to(dtype)
    teacher = student + 1
    _, want = with_gradient(ops.kd_loss, student.float(), teacher.float(), target)
    assert 0 < want.half().eq(0).float().mean() < 1 and largest(want) < 2.0**-14
    _, got = with_gradient(lambda *inputs: ops.kd_loss(*inputs) * 2.0**16, student, teacher, target)
    assert torch.equal(got, (want * 2.0**16).to(dtype)) and got.isfinite().all() and got.ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_finite_at_the_ends_of_half_types(dtype, temperature):
    """mdistiller#60: infinite where a probability is 0. Logits of +-6e4, at one with the teacher, against it, alone."""
    generator = torch.Generator().manual_seed(1)
    signs, target = torch.randint(2, (6, 9), generator=generator) * 2.0 - 1, torch.arange(6)
    for student, teacher in ((signs, -signs), (signs, signs), (0 * signs, signs), (signs, 0 * signs)):
        student, teacher = ((6e4 * logits).to(dtype) for logits in (student, teacher))
        loss, grad = with_gradient(ops.kd_loss, student, teacher, target, temperature=temperature, alpha=0.5)
        want, exact = with_gradient(ops.kd_loss, student.double(), teacher.double(), target, temperature=temperature)
        assert loss.isfinite() and grad.isfinite().all() and torch.allclose(loss.double(), want.double(), rtol=1e-3)
        assert torch.allclose(grad.double(), exact, rtol=2e-2, atol=1e-3)


def test_backward_twice_gives_the_same_gradient_twice():
    student, teacher, target = make(Case())
    _, want = with_gradient(ops.kd_loss, student, teacher, target)
    student.requires_grad_()
    loss = ops.kd_loss(student, teacher, target)
    loss.backward(retain_graph=True)
    student.grad.zero_()  # as an optimizer may; it must not be the gradient that the graph keeps
    loss.backward()
    assert torch.equal(student.grad, want)


def test_teacher_and_target_take_no_gradient():
    student, teacher, target = make(Case())
    assert not ops.kd_loss(student, teacher.requires_grad_(), target).requires_grad
    loss = ops.kd_loss(student.requires_grad_(), teacher, target)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, teacher)


def test_a_second_derivative_is_refused():
    student, teacher, target = make(Case(dtype=torch.float64))
    student.requires_grad_()
    said = "Expected kd_loss to be differentiated once.*kd_loss_reference.*got a backward with create_graph=True"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(ops.kd_loss(student, teacher, target), student, create_graph=True)
    # Among terms that can be, a gradient without history would be taken for a constant.
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(ops.kd_loss(student, teacher, target) + student.pow(3).sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.functional.hessian(lambda s: ops.kd_loss(s, teacher, target), student.detach())
    # What the message points to.
    torch.autograd.functional.hessian(lambda s: reference.kd_loss_reference(s, teacher, target), student.detach())


# --- what torch asks of an operator ----------------------------------------------------------------------------------

SAMPLES = {
    "plain": Case(),
    "no target": Case(3, 17, labels="absent"),
    "double": Case(4, 5, dtype=torch.float64, label_smoothing=0.1, distill_ignored=True),
    "half": Case(6, 8, dtype=torch.bfloat16, scale=1.0),
    "no rows": Case(0, 4),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    case = SAMPLES[sample]
    student, teacher, target = make(case)
    arguments = (teacher, target, *case.settings.values())
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if sample == "no rows":  # the loss is NaN, which the last check does not find equal to itself
        checks = checks[:3]
    for with_grad in (False, True):
        opcheck(OPS.kd_loss_forward.default, (student, *arguments, with_grad), test_utils=checks)
    opcheck(OPS.kd_loss.default, (student, *arguments), test_utils=checks)
    opcheck(OPS.kd_loss.default, (student.requires_grad_(), *arguments), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend, dynamic", [("inductor", None), ("aot_eager", True)])
def test_compiled_equals_eager(backend, dynamic, dtype):
    torch._dynamo.reset()

    def function(student, teacher, target):
        return ops.kd_loss(student * 2, teacher, target, temperature=3.0, label_smoothing=0.1) * 3

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (6, 9, 2) if dynamic else (6,):
        inputs = make(Case(rows, 12, labels="all"))
        inputs = (inputs[0].to(dtype), inputs[1].to(dtype), inputs[2])
        for got, want in zip(with_gradient(compiled, *inputs), with_gradient(function, *inputs), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), function(*inputs))


def test_compiled_with_dimensions_after_the_classes():
    torch._dynamo.reset()

    def function(student, teacher, target):
        return ops.kd_loss(student, teacher, target)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, width in ((2, 3), (3, 5)):
        student, teacher = torch.randn(rows, 4, width), torch.randn(rows, 4, width)
        target = torch.randint(4, (rows, width))
        for got, want in zip(
            with_gradient(compiled, student, teacher, target),
            with_gradient(function, student, teacher, target),
            strict=True,
        ):
            assert torch.equal(got, want)
