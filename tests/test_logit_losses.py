"""Each loss between logits or features against a formula of its own, and at the ends of half types."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sparsekd.distillation import DistillationLoss, KDLoss
from sparsekd.distillation.feature_losses import at_loss, fitnet_loss, rkd_loss, sp_loss
from sparsekd.distillation.logit_losses import (
    LOGIT_LOSSES,
    dist_loss,
    dkd_loss,
    jsd_loss,
    kl_loss,
    logit_standardisation_loss,
    mse_loss,
    reverse_kl_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
N, C = 5, 7


def softmax(row, temperature):
    """In probabilities and plain loops: nothing in common with log space."""
    powers = [math.exp(float(value) / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def kl(q, p):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True))


def rows_mean(student, teacher, of, temperature):
    pairs = [(softmax(s, temperature), softmax(t, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * math.fsum(of(p, q) for p, q in pairs) / len(pairs)


def mixed(beta):
    def of(p, q):
        m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    return of


def decoupled(student, teacher, target, alpha, beta, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, target.tolist(), strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        total += alpha * kl([q[label], 1 - q[label]], [p[label], 1 - p[label]])
        rest = [[v / (1 - row[label]) for i, v in enumerate(row) if i != label] for row in (q, p)]
        total += beta * kl(*rest)
    return temperature**2 * total / len(target)


def z_scores(logits):
    return [(np.array(row) - np.mean(row)) / (np.std(row, ddof=1) + 1e-7) for row in logits.tolist()]


def correlations(student, teacher, temperature, beta, gamma):
    p, q = (np.array([softmax(row, temperature) for row in part.tolist()]) for part in (student, teacher))
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


TARGET = torch.tensor([0, 3, 6, 2, 2])
CASES = {
    "kl": (lambda s, t: kl_loss(s, t, 3.0), lambda s, t: rows_mean(s, t, lambda p, q: kl(q, p), 3.0)),
    "reverse kl": (lambda s, t: reverse_kl_loss(s, t, 2.0), lambda s, t: rows_mean(s, t, kl, 2.0)),
    "jsd": (lambda s, t: jsd_loss(s, t, 2.0, 0.3), lambda s, t: rows_mean(s, t, mixed(0.3), 2.0)),
    "dkd": (
        lambda s, t: dkd_loss(s, t, TARGET, 1.5, 4.0, 3.0),
        lambda s, t: decoupled(s, t, TARGET, 1.5, 4.0, 3.0),
    ),
    "logit standardisation": (
        lambda s, t: logit_standardisation_loss(s, t, 2.0),
        lambda s, t: rows_mean(z_scores(s), z_scores(t), lambda p, q: kl(q, p), 2.0),
    ),
    "dist": (lambda s, t: dist_loss(s, t, 2.0, 0.7, 1.3), lambda s, t: correlations(s, t, 2.0, 0.7, 1.3)),
    "mse": (mse_loss, lambda s, t: float(((s - t).numpy() ** 2).mean())),
}


@pytest.mark.parametrize("kind", CASES)
def test_formula(kind):
    ours, formula = CASES[kind]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (3 * torch.randn(N, C, dtype=torch.float64, generator=generator) for _ in range(2))
        got = ours(student, teacher)
        assert got.dtype == torch.float64 and got.shape == ()
        assert float(got) == pytest.approx(formula(student, teacher), rel=0, abs=1e-10)


@pytest.mark.parametrize("kind", CASES)
def test_gradients(kind):
    student = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: CASES[kind][0](s, teacher), (student,))
    CASES[kind][0](student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_at_the_ends_of_half_types(kind, dtype):
    """mdistiller#60: DKD is infinite where a probability is 0."""
    signs = torch.randint(2, (N, C)) * 2 - 1
    for student, teacher in ((6e4 * signs, -6e4 * signs), (torch.zeros(N, C), 6e4 * signs), (6e4 * signs, 6e4 * signs)):
        student = student.to(dtype).requires_grad_()
        loss = CASES[kind][0](student, teacher.to(dtype))
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()
        if torch.equal(student.detach(), teacher.to(dtype)):
            assert abs(loss.item()) < 1e-4 or kind == "dist"  # classes that never differ have no correlation


def test_at_one_another():
    """The same logits: nothing to learn, and half of KD is KL alone."""
    student, teacher, target = torch.randn(N, C), torch.randn(N, C), TARGET
    for name in ("kl", "reverse_kl", "jsd", "logit_standardisation", "dist", "mse"):
        assert float(LOGIT_LOSSES[name](student, student)) == pytest.approx(0, abs=1e-5)
    assert float(kl_loss(student, teacher, 4.0)) == pytest.approx(
        float(KDLoss(4.0, alpha=1.0)(student, teacher, target)), rel=1e-5
    )
    # With alpha 1 and beta 1 - q_target, row by row, the decoupled parts are KL again; here of one row.
    one, other, label = student[:1].double(), teacher[:1].double(), target[:1]
    weight = 1 - float((other / 4).softmax(1)[0, label])
    assert float(dkd_loss(one, other, label, 1.0, weight, 4.0)) == pytest.approx(float(kl_loss(one, other, 4.0)))


def test_dkd_of_two_classes_is_refused():
    """mdistiller#60."""
    logits, target = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="^Expected more than two classes for the non-target part of dkd_loss, got 2"):
        dkd_loss(logits, logits + 1, target)
    assert float(dkd_loss(logits, 2 * logits, target, beta=0.0)) == pytest.approx(float(kl_loss(logits, 2 * logits)))


def test_batchmean_and_t_squared():
    """HikariTJU/LD#74: a mean over classes is C times smaller; keras-io#869: no T^2. Doubled rows change nothing."""
    student, teacher = torch.randn(N, C), torch.randn(N, C)
    for name in ("kl", "reverse_kl", "jsd", "logit_standardisation", "mse"):
        loss = LOGIT_LOSSES[name]
        twice = loss(torch.cat([student] * 2), torch.cat([teacher] * 2))
        assert float(twice) == pytest.approx(float(loss(student, teacher)), rel=1e-5)
    sizes = []
    for temperature in (10.0, 20.0):
        leaf = student.clone().requires_grad_()
        kl_loss(leaf, teacher, temperature).backward()
        sizes.append(float(leaf.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_with_labels():
    student, teacher, target = torch.randn(N, C), torch.randn(N, C), TARGET.clone()
    target[1] = -100
    known = target != -100
    for term, settings in (("dkd", {"beta": 2.0}), ("jsd", {"temperature": 2.0}), (mse_loss, {})):
        of = LOGIT_LOSSES[term] if isinstance(term, str) else term
        extra = (target[known],) if term == "dkd" else ()
        want = 0.25 * F.cross_entropy(student[known], target[known])
        want += 0.75 * of(student[known], teacher[known], *extra, **settings)
        assert float(DistillationLoss(term, 0.75, **settings)(student, teacher, target)) == pytest.approx(float(want))
    part = functools.partial(dkd_loss, alpha=2.0)
    assert DistillationLoss(part)(student, teacher, target).isfinite()


def test_positions_are_rows():
    """Segmentation: [N, C, H, W] is the same as its pixels one by one, unlabelled ones left out."""
    student, teacher = torch.randn(2, C, 3, 2), torch.randn(2, C, 3, 2)
    target = torch.randint(C, (2, 3, 2))
    target[0, 1] = -100
    rows = [logits.permute(0, 2, 3, 1).reshape(-1, C) for logits in (student, teacher)]
    for term in LOGIT_LOSSES:
        loss = DistillationLoss(term, 0.4)
        assert float(loss(student, teacher, target)) == pytest.approx(float(loss(*rows, target.flatten())), rel=1e-6)


def test_without_labels():
    student, teacher = torch.randn(N, C), torch.randn(N, C)
    loss = DistillationLoss("jsd", 1.0)
    assert torch.equal(loss(student, teacher), jsd_loss(student, teacher))
    maps = [logits.t()[None] for logits in (student, teacher)]  # [1, C, N]
    assert float(loss(*maps)) == pytest.approx(float(loss(student, teacher)))
    none = torch.full((N,), -100)
    for made in (DistillationLoss("dkd"), KDLoss()):
        assert made(student, teacher, none).isnan(), "as torch's cross entropy"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: DistillationLoss("kl")(torch.ones(2, 3), torch.ones(2, 3)),
            ValueError,
            "Expected a target unless alpha is 1 and the term needs no labels, got None",
        ),
        (
            lambda: DistillationLoss("dkd", 1.0)(torch.ones(2, 3), torch.ones(2, 3)),
            ValueError,
            "Expected a target unless alpha is 1",
        ),
        (
            lambda: DistillationLoss("kl")(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2).long()),
            ValueError,
            r"Expected student_logits .* got \(2, 3, 4\), \(2, 3, 4\) and \(2,\)",
        ),
        (
            lambda: DistillationLoss("dist", temprature=2.0),
            TypeError,
            "Expected settings of 'dist' out of temperature, beta, gamma, got temprature",
        ),
        (lambda: DistillationLoss("mse", beta=2.0), TypeError, "Expected settings of 'mse' out of none, got beta"),
        (lambda: kl_loss(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "Expected student_logits and teacher_logits"),
        (lambda: kl_loss(torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "Expected floating student_logits"),
        (lambda: kl_loss(torch.ones(2, 3), None), TypeError, "Expected floating teacher_logits, got NoneType"),
        (lambda: kl_loss(torch.ones(2, 3), torch.ones(2, 3), 0), ValueError, "Expected temperature to be positive"),
        (lambda: jsd_loss(torch.ones(2, 3), torch.ones(2, 3), beta=1.0), ValueError, r"Expected beta in \(0, 1\)"),
        (lambda: dkd_loss(torch.ones(2, 3), torch.ones(2, 3), None), ValueError, r"Expected target of int64 \[2\]"),
        (
            lambda: dkd_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 3])),
            ValueError,
            r"Expected targets in 0..2, got 0..3",
        ),
        (lambda: DistillationLoss("kd"), ValueError, "Expected term to be one of kl, reverse_kl"),
        (lambda: DistillationLoss("kl", 2.0), ValueError, r"Expected alpha in \[0, 1\], got 2.0"),
    ],
)
def test_what_they_refuse(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# --- features --------------------------------------------------------------------------------------------------------


def attention_formula(s, t):
    def map_of(x):
        energy = (x.numpy() ** 2).mean(1).reshape(len(x), -1)
        return energy / np.linalg.norm(energy, axis=1, keepdims=True)

    return ((map_of(s) - map_of(t)) ** 2).mean()


def huber(gap):
    return gap * gap / 2 if abs(gap) < 1 else abs(gap) - 0.5


def relations_formula(s, t):
    def distances(x):
        gaps = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return gaps / (gaps.sum() / (len(x) * (len(x) - 1)))

    def angle(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if i != j and k != j else 0.0

    s, t = (part.flatten(1).numpy() for part in (s, t))
    n, ds, dt = len(s), distances(s), distances(t)
    far = sum(huber(ds[i, j] - dt[i, j]) for i in range(n) for j in range(n)) / n**2
    corners = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    turned = sum(huber(angle(s, *c) - angle(t, *c)) for c in corners) / n**3
    return 25 * far + 50 * turned


def similarity_formula(s, t):
    def rows(x):
        gram = x.flatten(1).numpy() @ x.flatten(1).numpy().T
        return gram / np.linalg.norm(gram, axis=1, keepdims=True)

    return np.linalg.norm(rows(s) - rows(t), "fro") ** 2 / len(s) ** 2


FEATURES = {
    "fitnet": (fitnet_loss, lambda s, t: float(((s - t) ** 2).mean()), 3),
    "at": (at_loss, attention_formula, 5),
    "rkd": (rkd_loss, relations_formula, 5),
    "sp": (sp_loss, similarity_formula, 5),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_feature_formula(kind):
    loss, formula, channels = FEATURES[kind]
    student = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    teacher = torch.randn(4, channels, 3, 2, dtype=torch.float64)
    assert float(loss(student, teacher)) == pytest.approx(float(formula(student, teacher)), rel=0, abs=1e-10)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = loss(student.float(), teacher.float())
    assert float(narrow) == pytest.approx(float(loss(student.float(), teacher.float())), rel=1e-6)
    assert gradcheck(lambda x: loss(x, teacher), (student.requires_grad_(),))
    half = torch.full((4, 3, 3, 2), 200.0, dtype=torch.float16, requires_grad=True)  # all rows alike
    loss(half, torch.randn(4, channels, 3, 2).half()).backward()
    assert half.grad.isfinite().all()
    with pytest.raises(ValueError, match="^Expected features "):
        loss(torch.ones(4, 3, 3, 2), torch.ones(5, channels, 2, 2))
