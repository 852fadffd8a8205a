"""kd_loss and its gradient against the formula, written out in 60 digits."""

import dataclasses
import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.sparse import ops, reference

OPS = torch.ops.sparsekd
HALF_TYPES = [torch.float16, torch.bfloat16]

# Largest error of the loss, relative to itself, and of the gradient, relative to its largest element.
#
# float64: x / T is rounded, so exp(x / T) is off by |x / T| <= 700 units in the last place.
# float32: computed in double from polynomials good to 3e-9, and then rounded, by half a unit in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.0**-24 + 3e-9}
# What is smaller than this is not kept: the 60 digits of the formula are of 1, and float32 ends at 2^-149.
LEAST = {torch.float64: 1e-40, torch.float32: 2.0**-149}


# --- the formula -----------------------------------------------------------------------------------------------------


def log_softmax(logits):
    top = max(logits)
    rest = mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in logits))
    return [x - top - rest for x in logits]


def row(elements):
    return torch.tensor([float(x) for x in elements], dtype=torch.float64)


def exact(student, teacher, target, temperature, alpha, ignore_index, label_smoothing, distill_ignored):
    """(loss, gradient, size of the gradient's terms) as written, from the logits as they are; rounded to float64.

    The formula in float64 itself will not do: it keeps 1e-16 of log q and log p, which leaves four digits of the KL of
    a teacher that differs by 1e-4 at T = 100. The terms may cancel: q against a smoothed label, CE against KL.
    """
    rows, classes = student.shape
    labels = [None] * rows if target is None else [None if y == ignore_index else y for y in target.tolist()]
    labelled = sum(y is not None for y in labels)
    distilled = rows if target is None or distill_ignored else labelled
    grad = torch.zeros(rows, classes, dtype=torch.float64)
    if distilled == 0:
        return math.nan, grad, 0.0
    loss, terms = [], 0.0
    with mpmath.workdps(60):
        T, alpha, smooth = mpmath.mpf(temperature), mpmath.mpf(alpha), mpmath.mpf(label_smoothing)
        for i, y in enumerate(labels):
            s, t = ([mpmath.mpf(x) for x in logits[i].tolist()] for logits in (student, teacher))
            if y is not None and alpha < 1:
                log_q = log_softmax(s)
                q = [mpmath.exp(x) for x in log_q]
                wanted = [(1 - smooth) * (k == y) + smooth / classes for k in range(classes)]
                scale = (1 - alpha) / labelled
                loss.append(-scale * mpmath.fsum(w * x for w, x in zip(wanted, log_q, strict=True) if w))
                grad[i] += row(scale * (q[k] - wanted[k]) for k in range(classes))
                terms = max(terms, float(scale * max([min(smooth, 1 - smooth), *q[:y], *q[y + 1 :]])))
            if alpha > 0 and (target is None or y is not None or distill_ignored):
                log_q, log_p = log_softmax([x / T for x in s]), log_softmax([x / T for x in t])
                q, p = [mpmath.exp(x) for x in log_q], [mpmath.exp(x) for x in log_p]
                scale = alpha / distilled
                loss.append(scale * T**2 * mpmath.fsum(p[k] * (log_p[k] - log_q[k]) for k in range(classes)))
                of_kl = row(scale * T * (q[k] - p[k]) for k in range(classes))
                grad[i] += of_kl
                terms = max(terms, float(of_kl.abs().max()))
        return float(mpmath.fsum(loss)), grad, terms


def with_gradient(function, student, teacher, target, **settings):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, target, **settings)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_by_hand(dtype):
    # T = 2: the teacher says (3/4, 1/4) in both rows, the student (1/2, 1/2) and (1/4, 3/4); row 1 has no label.
    #   CE = ln 2,                             its gradient q - label = (-1/2, 1/2)
    #   KL = 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2) = 3/4 ln 3 - ln 2,   T (q - p) = 2 (-1/4, 1/4)
    #   KL of row 1 = 3/4 ln 3 - 1/4 ln 3 = 1/2 ln 3,                   T (q - p) = 2 (-1/2, 1/2)
    ln2, ln3 = math.log(2), math.log(3)
    student = torch.tensor([[5, 5], [0, 2 * ln3]], dtype=dtype)
    teacher = torch.tensor([[2 * ln3, 0], [1 + 2 * ln3, 1]], dtype=dtype)
    target = torch.tensor([0, -100])
    options = dict(temperature=2, alpha=0.25)

    def worked(loss, grad, **more):
        got, got_grad = with_gradient(ops.kd_loss, student, teacher, target, **options, **more)
        assert got.item() == pytest.approx(loss, rel=3e-7)
        assert got_grad.tolist() == [pytest.approx(elements, rel=3e-7) for elements in grad]

    first = 3 / 4 * ln3 - ln2
    worked(0.75 * ln2 + 0.25 * 4 * first, [[-1 / 2, 1 / 2], [0, 0]])
    both = (first + 1 / 2 * ln3) / 2
    worked(0.75 * ln2 + 0.25 * 4 * both, [[-7 / 16, 7 / 16], [-1 / 8, 1 / 8]], distill_ignored=True)
    # Smoothed by 1/2 the label is (3/4, 1/4); a student that says (1/2, 1/2) pays ln 2 all the same.
    worked(0.75 * ln2 + 0.25 * 4 * first, [[-5 / 16, 5 / 16], [0, 0]], label_smoothing=0.5)


# --- random configurations -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 5
    classes: int = 10
    scale: float = 3.0  # of the logits; none is beyond 1e4
    student: str = "random"  # equal: one value in all classes; far: 9000 higher; sure: of the label, by 60
    teacher: str = "random"  # same, shifted: the student's logits, by a constant apart; near, next: almost; one-hot
    temperature: float = 4.0
    alpha: float = 0.5
    labels: str = "some"  # all; some, the others ignored; none, all are ignored; absent: no target
    ignore_index: int = -100
    label_smoothing: float = 0.0
    distill_ignored: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def settings(self):
        return dict(
            temperature=self.temperature,
            alpha=1.0 if self.labels == "absent" else self.alpha,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            distill_ignored=self.distill_ignored,
        )


def make(case):
    """(student, teacher, target) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.rows, case.classes)
    student, other, small = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    target = torch.randint(case.classes, (case.rows,), generator=generator)
    student *= case.scale
    if case.student == "equal":
        student = student[:, :1].expand(shape).clone()
    elif case.student == "far":
        student += 9000
    elif case.student == "sure":
        student[torch.arange(case.rows), target] = student.amax(1) + 60
    student = student.clamp(-1e4, 1e4).to(case.dtype)
    teacher = {
        "random": other * case.scale,
        "same": student.double(),
        "shifted": student.double() + 0.5,
        "near": student.double() + 1e-3 * small,
        "next": torch.where(small > 0, student, student.nextafter(torch.zeros_like(student))).double(),
        "one-hot": torch.full(shape, -1e4, dtype=torch.float64).scatter_(1, target[:, None], 1e4),
    }[case.teacher]
    teacher = teacher.clamp(-1e4, 1e4).to(case.dtype)
    if case.labels == "absent":
        return student, teacher, None
    drop = torch.rand(case.rows, generator=generator) < {"all": 0.0, "some": 0.3, "none": 1.0}[case.labels]
    return student, teacher, target.masked_fill(drop, case.ignore_index)


def check_case(case):
    student, teacher, target = make(case)
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target, **case.settings)
    want, want_grad, terms = exact(student, teacher, target, **case.settings)
    assert loss.shape == () and loss.dtype == case.dtype
    assert grad.shape == student.shape and grad.dtype == case.dtype and grad.is_contiguous()
    if math.isnan(want):
        assert loss.isnan() and not grad.any(), f"{case}: {loss}"
        return
    bound = TOLERANCE[case.dtype] * want + LEAST[case.dtype]
    assert abs(loss.item() - want) <= bound, f"{case}: loss {loss.item()!r}, wanted {want!r}"
    error = largest(grad - want_grad)
    # Terms that cancel leave what they were rounded by.
    lost = (3e-16 if case.dtype == torch.float64 else 3e-9) * terms + LEAST[case.dtype]
    bound = TOLERANCE[case.dtype] * largest(want_grad) + lost
    assert error <= bound, f"{case}: gradient off by {error:.3g}, largest element {largest(want_grad):.3g}"
    if case.dtype == torch.float32 and terms:
        _, eager = with_gradient(reference.kd_loss_reference, student, teacher, target, **case.settings)
        assert error <= largest(eager - want_grad) + lost, f"{case}: gradient off by {error:.3g}, eager by less"


@settings(max_examples=500)
@given(
    st.builds(
        Case,
        rows=st.sampled_from([0, 1, 2, 5]),
        classes=st.integers(1, 40) | st.sampled_from([2, 8, 16, 64, 100, 129]),
        scale=st.sampled_from([0.0, 1e-2, 1.0, 30.0, 1e3, 1e4]),
        student=st.sampled_from(["random", "random", "equal", "far", "sure"]),
        teacher=st.sampled_from(["random", "random", "same", "shifted", "near", "next", "one-hot"]),
        temperature=st.sampled_from([0.1, 1.0, 4.0, 100.0]) | st.floats(0.1, 100),
        alpha=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
        labels=st.sampled_from(["all", "some", "none", "absent"]),
        ignore_index=st.sampled_from([-100, -1, 0, 255]),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1),
        distill_ignored=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 2**31),
    )
)
def test_random_configurations(case):
    check_case(case)


def test_large_logits_that_differ_by_little():
    """Student and teacher are 9000 apart and agree to 1e-2: float64 rounds off 1e-12 of s - t."""
    for classes, temperature in itertools.product((2, 5, 8, 33), (0.1, 4.0, 100.0)):
        check_case(Case(3, classes, 1e-2, "far", temperature=temperature, labels="absent", dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_close_to_its_smoothed_label(dtype):
    """The gradient is what is left of q - 1 / classes: every digit of the sum over the classes counts."""
    check_case(Case(1, 4097, 1e-2, alpha=0.0, labels="all", label_smoothing=1.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("teacher", ["random", "near", "next", "one-hot"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logits_up_to_1e4(scale, teacher, temperature, dtype):
    check_case(Case(3, 12, scale, teacher=teacher, temperature=temperature, dtype=dtype))


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000, 4097, 32000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0, 10.0, 100.0])
def test_against_the_formula_in_float64(classes, temperature):
    """Where student and teacher are far apart, float64 is enough, and as quick as it must be for many classes."""
    case = Case(max(3, 8000 // classes), classes, temperature=temperature, label_smoothing=0.1, scale=5.0)
    student, teacher, target = make(case)
    want, want_grad = with_gradient(
        reference.kd_loss_reference, student.double(), teacher.double(), target, **case.settings
    )
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target, **case.settings)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE[torch.float32])
    _, eager = with_gradient(reference.kd_loss_reference, student, teacher, target, **case.settings)
    assert largest(grad - want_grad) <= largest(eager - want_grad)
    assert largest(grad - want_grad) <= TOLERANCE[torch.float32] * largest(want_grad)
    wide, wide_grad = with_gradient(ops.kd_loss, student.double(), teacher.double(), target, **case.settings)
    # In float64 the reference itself keeps 1e-16 of each log p, T^2 of which count.
    assert wide.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-15 * temperature**2)
    assert largest(wide_grad - want_grad) <= 1e-12 * largest(want_grad)


@pytest.mark.parametrize("teacher", ["random", pytest.param("near", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_32000_classes(dtype, teacher):
    check_case(Case(1, 32000, teacher=teacher, temperature=100.0, labels="all", dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("student", ["equal", "far", "sure"])
@pytest.mark.parametrize("teacher", ["next", "one-hot"])
def test_many_classes_at_the_extremes(teacher, student, dtype):
    check_case(Case(1, 5000, 1e4, student, teacher, 10.0, labels="all", label_smoothing=0.1, dtype=dtype))


def test_sums_of_equal_terms_keep_their_digits():
    """The same number added up a million times is rounded the same way each time."""
    count = 2**20
    student = torch.full((1, count), -0.7, dtype=torch.float64)
    student[0, 0] = 0
    want = math.log(1 + math.exp(-0.7) * (count - 1))
    target = torch.tensor([0])
    loss, grad = with_gradient(ops.kd_loss, student, student, target, alpha=0)
    assert loss.item() == pytest.approx(want, rel=1e-15)
    assert grad[0, 1].item() == pytest.approx(math.exp(-0.7 - want), rel=3e-15)
    loss = ops.kd_loss(student, student, target, alpha=0, label_smoothing=1)
    assert loss.item() == pytest.approx(want + 0.7 * (count - 1) / count, rel=1e-15)
    row = torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    one = ops.kd_loss(row, row, target, alpha=0)
    many = ops.kd_loss(row.expand(count, 2), row.expand(count, 2), target.expand(count), alpha=0)
    assert many.item() == pytest.approx(one.item(), rel=1e-15)


def test_nothing_to_learn_is_exactly_zero():
    for dtype, classes in itertools.product((torch.float32, torch.float64), (1, 2, 3, 17, 1000)):
        student = torch.randn(4, classes, dtype=dtype)
        loss, grad = with_gradient(ops.kd_loss, student, student, None, alpha=1)
        assert loss == 0 and not grad.any()
        if classes == 1:
            loss, grad = with_gradient(ops.kd_loss, student, student * 3 + 9000, torch.tensor([0] * 4))
            assert loss == 0 and not grad.any()
        # The least informative label and a student that agrees.
        loss, grad = with_gradient(
            ops.kd_loss, student[:, :1].expand(4, classes), student, torch.tensor([0] * 4), alpha=0, label_smoothing=1
        )
        assert loss.item() == pytest.approx(math.log(classes)) and not grad.any()


def test_reference_means_the_same():
    for case in (Case(), Case(labels="absent"), Case(labels="none", distill_ignored=True), Case(distill_ignored=True)):
        case = dataclasses.replace(case, dtype=torch.float64, label_smoothing=0.1)
        want, want_grad, _ = exact(*make(case), **case.settings)
        loss, grad = with_gradient(reference.kd_loss_reference, *make(case), **case.settings)
        assert loss.item() == pytest.approx(want, rel=1e-13) and largest(grad - want_grad) < 1e-15


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_are_float32_and_the_gradient_is_rounded_once(dtype):
    student, teacher, target = make(Case(40, 33))
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    want, want_grad = with_gradient(ops.kd_loss, student.float(), teacher.float(), target)
    assert loss.dtype == torch.float32 and torch.equal(loss, want)
    assert grad.dtype == dtype and torch.equal(grad, want_grad.to(dtype))


@pytest.mark.parametrize("student_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_teacher_of_another_dtype_loses_nothing(student_dtype, teacher_dtype):
    student, teacher, target = make(Case(7, 12, dtype=torch.float64))
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    loss, grad = with_gradient(ops.kd_loss, student, teacher, target)
    assert grad.dtype == student_dtype
    assert loss.dtype == (torch.float64 if student_dtype == torch.float64 else torch.float32)
    want, want_grad = with_gradient(ops.kd_loss, student.double(), teacher.double(), target)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12 if loss.dtype == torch.float64 else 1e-7)
    # Rounded to float32 and from there to the half type: a hair more than once.
    unit = torch.finfo(student_dtype).eps / 2 * (1 + 1e-3) + 1e-13
    assert largest(grad - want_grad) <= unit * largest(want_grad)


# --- threads and instruction sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, classes", [(1, 5000), (301, 33), (3000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_on_any_number_of_threads(two_thread_counts, rows, classes, dtype):
    case = Case(rows, classes, label_smoothing=0.1, distill_ignored=True, dtype=dtype)
    one, two = two_thread_counts(lambda: with_gradient(ops.kd_loss, *make(case), **case.settings))
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


def check_sample():
    """Classes around the widths of SIMD vectors, and the hard cases; for each instruction set (conftest)."""
    dtypes = (torch.float32, torch.float64)
    for classes, dtype in itertools.product((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 130), dtypes):
        check_case(Case(2, classes, label_smoothing=0.1, dtype=dtype))
    for student, teacher, dtype in itertools.product(("random", "far", "sure"), ("near", "one-hot"), dtypes):
        check_case(Case(2, 13, 1e4, student, teacher, temperature=100.0, distill_ignored=True, dtype=dtype))


def test_instruction_sets(isa_checks):
    assert isa_checks["kd_loss"] == "ok"
