"""kd_loss_rows_, what linear_kd_loss makes of a chunk of logits: each divergence against its formula in 60 digits."""

import itertools
import math

import mpmath
import pytest
import torch
from sparsekd.kernels import linear_kd_loss
from test_kd_loss import LEAST, TOLERANCE, Case, largest, log_softmax, make, row
from torch.library import opcheck

ROWS = torch.ops.sparsekd.kd_loss_rows_.default
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def run(student, teacher, target, temperature, hard, soft, divergence, beta=0.5, smoothing=0.0, distill_ignored=False):
    """(loss, gradient)"""
    grad = student.clone()
    settings = (temperature, hard, soft, divergence, beta, -100, smoothing, distill_ignored)
    loss = ROWS(grad, teacher, target, *settings, True)
    kept = student.clone()
    assert torch.equal(ROWS(kept, teacher, target, *settings, False), loss) or loss.isnan()
    assert torch.equal(kept.nan_to_num(), student.nan_to_num())  # no gradient, nothing written
    return loss, grad


def exact(student, teacher, temperature, divergence, beta):
    """(loss, gradient, size of the gradient's terms) of T^2 * D, summed over rows; rounded to float64."""
    grad, losses, terms = torch.zeros(student.shape, dtype=torch.float64), [], 0.0
    with mpmath.workdps(60):
        T, beta = mpmath.mpf(temperature), mpmath.mpf(beta)
        for i in range(student.shape[0]):
            log_q, log_p = (log_softmax([mpmath.mpf(x) / T for x in of[i].tolist()]) for of in (student, teacher))
            q, p = [mpmath.exp(x) for x in log_q], [mpmath.exp(x) for x in log_p]
            if divergence == "forward_kl":
                losses.append(mpmath.fsum(a * (x - y) for a, x, y in zip(p, log_p, log_q, strict=True)))
                of_row = [T * (b - a) for a, b in zip(p, q, strict=True)]
            else:
                log_m = log_p
                if divergence == "jsd":
                    log_m = [mpmath.log(beta * a + (1 - beta) * b) for a, b in zip(p, q, strict=True)]
                distances = [x - m for x, m in zip(log_q, log_m, strict=True)]
                of_q = mpmath.fsum(b * d for b, d in zip(q, distances, strict=True))
                share = 1 - beta if divergence == "jsd" else 1
                losses.append(share * of_q)
                if divergence == "jsd":
                    losses.append(beta * mpmath.fsum(a * (x - m) for a, x, m in zip(p, log_p, log_m, strict=True)))
                of_row = [T * share * b * (d - of_q) for b, d in zip(q, distances, strict=True)]
                terms = max(terms, float(T * share * max(b * abs(d) for b, d in zip(q, distances, strict=True))))
            grad[i] = row(of_row)
        return float(T**2 * mpmath.fsum(losses)), grad, terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_by_hand(dtype):
    # T = 2: the teacher says (3/4, 1/4), the student (1/2, 1/2), so q - p = (-1/4, 1/4).
    #   reverse  1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3); T q (v - E) = 2 * 1/2 * (-ln 3 / 2, ln 3 / 2)
    #   jsd      beta = 1/2: m = (5/8, 3/8), log q/m = (ln 4/5, ln 4/3), p/m = (6/5, 2/3)
    ln3 = math.log(3)
    student, teacher = torch.tensor([[5.0, 5.0]], dtype=dtype), torch.tensor([[2 * ln3, 0]], dtype=dtype)
    loss, grad = run(student, teacher, None, 2.0, 0.0, 1.0, "reverse_kl")
    assert float(loss) == pytest.approx(4 * math.log(4 / 3) / 2, rel=3e-7)
    assert grad.tolist() == [pytest.approx([-ln3 / 2, ln3 / 2], rel=3e-7)]
    loss, grad = run(student, teacher, None, 2.0, 0.0, 1.0, "jsd")
    of_p = 3 / 4 * math.log(6 / 5) + 1 / 4 * math.log(2 / 3)
    of_q = 1 / 2 * math.log(4 / 5) + 1 / 2 * math.log(4 / 3)
    assert float(loss) == pytest.approx(4 * (of_p + of_q) / 2, rel=3e-7)
    half = math.log(5 / 3) / 4  # half of q (ln 4/3 - ln 4/5) / 2, times T
    assert grad.tolist() == [pytest.approx([-half, half], rel=3e-7)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", ["random", "near", "next", "same", "shifted", "one-hot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_formula(dtype, teacher, divergence):
    for temperature, scale, student in itertools.product((0.1, 1.0, 4.0, 100.0), (1e-2, 3.0, 1e3), ("random", "far")):
        case = Case(3, 11, scale, student, teacher, temperature, labels="absent", dtype=dtype)
        for beta in (0.5, 0.01, 0.95) if divergence == "jsd" else (0.5,):
            s, t, _ = make(case)
            loss, grad = run(s, t, None, temperature, 0.0, 1.0, divergence, beta)
            want, want_grad, terms = exact(s, t, temperature, divergence, beta)
            # log 1 + y of a y that is cut to beta of what it comes from: as exact as that, and beta times less.
            loose = 1 / min(beta, 1 - beta) if divergence == "jsd" else 1
            lost = (3e-16 if dtype == torch.float64 else 3e-9) * loose
            assert abs(float(loss) - want) <= (TOLERANCE[dtype] + lost) * want + LEAST[dtype] * temperature**2, (
                case, beta, float(loss), want,
            )  # fmt: skip
            bound = TOLERANCE[dtype] * largest(want_grad) + lost * terms + LEAST[dtype]
            assert largest(grad - want_grad) <= bound, (case, beta, largest(grad - want_grad), largest(want_grad))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 16, 17, 1000])
def test_against_pytorch_with_labels(classes, divergence):
    """Both terms, ignored rows, smoothing: linear_kd_loss's own of the devices that have no such kernel."""
    for dtype, smoothing, distill_ignored in itertools.product(
        (torch.float32, torch.float64), (0.0, 0.1), (False, True)
    ):
        s, t, target = make(Case(9, classes, dtype=dtype))
        loss, grad = run(s, t, target, 4.0, 0.3, 0.2, divergence, 0.3, smoothing, distill_ignored)
        settings = linear_kd_loss.Settings(4.0, 0.5, divergence, 0.3, -100, smoothing, distill_ignored)
        if divergence == "forward_kl":
            known = int((target != -100).sum())
            want, want_grad = linear_kd_loss._rows_elsewhere(s, t, target, known, 0.3, 0.2, settings)
        else:
            want, want_grad = linear_kd_loss._rows_in_float64(s, t, target, 0.3, 0.2, settings)
        relative = 2e-7 if dtype == torch.float32 else 1e-12  # kd_loss rounds once more
        assert float(loss) == pytest.approx(float(want), rel=relative, abs=1e-14)
        assert largest(grad - want_grad) <= relative * largest(want_grad) + 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_where_no_probability_is(divergence):
    """What both rule out does not count; what one rules out is infinite only in the divergence that says so."""
    s, t, _ = make(Case(4, 13, dtype=torch.float64))
    kept = [k for k in range(13) if k not in (3, 12)]
    want, want_grad = run(s[:, kept], t[:, kept], None, 4.0, 0.0, 1.0, divergence)
    s[:, [3, 12]] = t[:, [3, 12]] = -math.inf
    loss, grad = run(s, t, None, 4.0, 0.0, 1.0, divergence)
    assert float(loss) == pytest.approx(float(want), rel=1e-14) and not grad[:, [3, 12]].any()
    torch.testing.assert_close(grad[:, kept], want_grad, rtol=1e-12, atol=1e-15)
    for of_teacher in (False, True):
        low, out = [s.clone(), t.clone()], [s.clone(), t.clone()]
        low[of_teacher][1, 5], out[of_teacher][1, 5] = -1e4, -math.inf
        loss, grad = run(*out, None, 4.0, 0.0, 1.0, divergence)
        if divergence == ("reverse_kl" if of_teacher else "forward_kl"):
            assert loss == math.inf
            continue
        want, want_grad = run(*low, None, 4.0, 0.0, 1.0, divergence)
        torch.testing.assert_close((loss, grad), (want, want_grad), rtol=1e-14, atol=0)
    for place, bad in itertools.product((0, 1), (math.nan, math.inf)):
        pair = [s.clone(), t.clone()]
        pair[place][2, 0] = bad
        loss, grad = run(*pair, None, 4.0, 0.0, 1.0, divergence)
        assert loss.isnan() and grad[2].isnan().any() and not grad[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_same_on_any_number_of_threads(two_thread_counts, divergence):
    s, t, target = make(Case(300, 100))
    one, two = two_thread_counts(lambda: run(s, t, target, 2.0, 0.3, 0.2, divergence))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def check_sample():
    """For each instruction set (conftest.checks_under_isa)."""
    for divergence in DIVERGENCES:
        test_against_pytorch_with_labels(17, divergence)
        test_where_no_probability_is(divergence)
        test_against_the_formula(torch.float32, "near", divergence)


def test_instruction_sets(isa_checks):
    assert isa_checks["kd_loss_divergences"] == "ok", isa_checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    s, t, target = make(Case(5, 9, dtype=dtype))
    for divergence in DIVERGENCES:
        arguments = (s, t, target, 4.0, 0.3, 0.2, divergence, 0.3, -100, 0.1, False, True)
        opcheck(ROWS, arguments, test_utils=["test_schema", "test_faketensor"])


def test_what_it_refuses():
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    good = dict(student=s, teacher=t, target=torch.tensor([0, 5, -100, 2]), temperature=4.0, hard=0.1, soft=0.1)
    good |= dict(
        divergence="jsd", beta=0.5, ignore_index=-100, label_smoothing=0.0, distill_ignored=False, with_grad=True
    )
    ROWS(*(good | dict(student=s.clone())).values())
    for change, error, said in (
        (dict(student=s.half()), TypeError, "Expected teacher logits of dtype Half as the student's, got Float"),
        (dict(student=s.half(), teacher=t.half()), TypeError, "Expected student logits of dtype Float or Double"),
        (dict(student=s.t(), teacher=t.t(), target=torch.zeros(6).long()), ValueError, "Expected contiguous student"),
        (dict(teacher=t[:3]), ValueError, "Expected teacher logits of the student's shape"),
        (dict(teacher=s), ValueError, "Expected teacher logits apart from the student's.*, got shared memory"),
        (dict(target=torch.tensor([0, 6, 0, 0])), IndexError, r"Expected targets in 0\.\.5 .*, got 6"),
        (dict(target=torch.zeros(3).long()), ValueError, "Expected target of size 4"),
        (dict(temperature=0.0), ValueError, "Expected temperature to be positive"),
        (dict(hard=-1.0), ValueError, "Expected weights hard and soft that are finite and not negative, got -1"),
        (dict(soft=math.nan), ValueError, "Expected weights hard and soft"),
        (dict(divergence="kl"), ValueError, "Expected divergence to be one of .*, got 'kl'"),
        (dict(beta=1.0), ValueError, r"Expected beta in \(0, 1\), got 1"),
    ):
        before = s.clone()
        with pytest.raises(error, match=said):
            ROWS(*(good | change).values())
        assert torch.equal(s, before)
