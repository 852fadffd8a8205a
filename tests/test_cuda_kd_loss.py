"""kd_loss's CUDA kernels, run by the emulator and checked, against plain PyTorch in float64."""

import dataclasses
import random

import emulated
import pytest
import torch
from conftest import assert_near

from sparsekd.sparse import reference

DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16]
IN_MAKE_TEST = 24


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    temperature: float
    alpha: float
    label_smoothing: float
    target: bool
    ignored: float  # share of rows
    distill_ignored: bool
    offset: float  # common to all logits of the student
    agreement: float  # the teacher's logits are so near the student's
    masked: bool  # classes that are impossible for both
    shifted: bool  # not at a 16-byte boundary
    seed: int


def draw(seed):
    r = random.Random(seed)
    alpha = r.choice([0.0, 0.3, 0.7, 0.7, 1.0])
    return Case(
        # in registers up to 1024 classes, by 8 or 32 lanes, one or four at a time; a block a row beyond
        classes=r.choice([1, 2, 3, 8, 10, 21, 32, 33, 100, 127, 128, 129, 200, 256, 500, 512, 999, 1000, 1024])
        if seed % 4
        else r.choice([1025, 1028, 1500, 2051, 4100]),
        rows=r.choice([1, 2, 7, 33] if seed % 4 else [1, 2, 5]),
        student_dtype=r.choice(DTYPES),
        teacher_dtype=r.choice(DTYPES),
        temperature=r.choice([1.0, 2.0, 4.0, 20.0]),
        alpha=alpha,
        label_smoothing=r.choice([0.0, 0.0, 0.1, 1.0]),
        target=alpha < 1 or r.random() < 0.5,
        ignored=r.choice([0.0, 0.0, 0.4, 1.0]),
        distill_ignored=r.random() < 0.4,
        offset=r.choice([0.0, 0.0, -300.0, 50.0]),
        agreement=r.choice([1.0, 1.0, 0.05]),
        masked=r.random() < 0.2,
        shifted=r.random() < 0.2,
        seed=seed,
    )


def operands(case):
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.rows, case.classes)
    logits = torch.randn(shape, generator=generator) * 3
    student = (logits + case.offset).to(case.student_dtype)
    teacher = (logits + torch.randn(shape, generator=generator) * 3 * case.agreement).to(case.teacher_dtype)
    target = None
    if case.target:
        target = torch.randint(case.classes, (case.rows,), generator=generator)
        target[torch.rand(case.rows, generator=generator) < case.ignored] = -100
    if case.masked and case.classes > 2:
        # the labels' classes stay possible; smoothing would spread over those that are not, so that nothing is finite
        masked = torch.rand(case.classes, generator=generator) < 0.3
        masked[0] = False
        if target is not None:
            masked[target.clamp(min=0)] = False
        student[:, masked] = teacher[:, masked] = -torch.inf
    if case.shifted:
        student = torch.cat([student.new_zeros(1), student.flatten()])[1:].view(shape)
    smoothing = 0.0 if case.masked else case.label_smoothing
    return student, teacher, target, case.temperature, case.alpha, -100, smoothing, case.distill_ignored


def oracle(student, teacher, target, *settings):
    wide = student.double().requires_grad_()
    impossible = student == -torch.inf  # for both: no terms, where log_softmax makes NaN of -inf - -inf
    finite = wide.masked_fill(impossible, -1e9) if impossible.any() else wide
    loss = reference.kd_loss_reference(finite, teacher.double().masked_fill(impossible, -1e9), target, *settings)
    loss.backward() if loss.requires_grad else None
    return loss.detach(), torch.zeros_like(wide) if wide.grad is None else wide.grad


def check(student, teacher, target, *settings, what=""):
    loss, grad = emulated.in_two_orders("kd_loss_forward", student, teacher, target, *settings, True)
    want, want_grad = oracle(student, teacher, target, *settings)
    assert loss.dtype == grad.dtype == torch.float32
    assert loss.isnan() == want.isnan(), what
    if want.isnan():
        return
    assert_near(loss, want, torch.float32, what)
    assert_near(grad, want_grad, torch.float32, what)
    alone, none = emulated.emulator().ops.kd_loss_forward(student, teacher, target, *settings, False)
    assert torch.equal(alone, loss) and none.numel() == 0


SEEDS = [pytest.param(seed, marks=[] if seed < IN_MAKE_TEST else pytest.mark.slow) for seed in range(100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_oracle(seed):
    case = draw(seed)
    check(*operands(case), what=str(case))


def test_small_gradients_keep_their_digits():
    """Where teacher and student nearly agree, q - p in fp32 would be mostly rounding."""
    student = torch.randn(5, 1000)
    teacher = student + torch.randn(5, 1000) * 0.01
    settings = (None, 100.0, 1.0, -100, 0.0, False)
    loss, grad = emulated.emulator().ops.kd_loss_forward(student, teacher, *settings, True)
    want, want_grad = oracle(student, teacher, *settings)
    assert_near(loss, want, torch.float32)
    assert_near(grad, want_grad, torch.float32)
    equal = emulated.emulator().ops.kd_loss_forward(student, student, None, 4.0, 1.0, -100, 0.0, False, True)
    assert equal[0] == 0 and not equal[1].any()


@pytest.mark.parametrize("classes", [10, 1000])
def test_many_rows(classes):
    """Blocks that take several rows one after another, and several parts of the target that are counted apart."""
    rows = 5000 if classes == 10 else 40
    student, teacher = torch.randn(rows, classes), torch.randn(rows, classes)
    target = torch.randint(classes, (rows,))
    target[::3] = 255
    check(student, teacher, target, 4.0, 0.5, 255, 0.1, False)


def test_no_rows():
    empty = torch.empty(0, 10)
    target = torch.empty(0, dtype=torch.long)
    loss, grad = emulated.emulator().ops.kd_loss_forward(empty, empty, target, 4.0, 0.5, -100, 0.0, False, True)
    assert loss.isnan() and grad.shape == (0, 10)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_a_target_that_is_no_class_is_an_error(label):
    logits = torch.randn(3, 10)
    target = torch.tensor([0, label, 2])
    with pytest.raises(RuntimeError, match="Expected targets to be classes"):
        emulated.emulator().ops.kd_loss_forward(logits, logits, target, 4.0, 0.5, -100, 0.0, False, True)


def test_float64_is_an_error():
    logits = torch.randn(3, 10, dtype=torch.float64)
    with pytest.raises(TypeError, match="Expected student logits of dtype Float, Half or BFloat16 on cuda, got Double"):
        emulated.emulator().ops.kd_loss_forward(logits, logits, None, 4.0, 1.0, -100, 0.0, False, True)
