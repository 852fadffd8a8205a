"""Several teachers as one: the gradient is that of the weighted sum of their losses."""

import copy

import pytest
import torch
from torch import nn

from sparsekd.distillation import Distiller, KDLoss, TeacherCache, TeacherEnsemble

pytestmark = pytest.mark.usefixtures("one_thread")


def teachers(count=3):
    torch.manual_seed(0)
    return [nn.Linear(4, 5).double() for _ in range(count)]


def kl(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0, 1, 0]])
def test_gradient_is_that_of_the_weighted_sum(weights):
    made, x, temperature = teachers(), torch.randn(7, 4, dtype=torch.float64), 3.0
    student = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor(weights or [1, 1, 1], dtype=torch.float64)
    shares = shares / shares.sum()
    want = sum(share * kl(student, teacher(x).detach(), temperature) for share, teacher in zip(shares, made))  # noqa: B905
    answer = TeacherEnsemble(made, weights, temperature)(x).detach()
    got = KDLoss(temperature, alpha=1.0)(student, answer)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-13)
    if weights == [0, 1, 0]:
        assert torch.allclose(got, want)


def test_by_hand():
    """(0.5, 0.5) and (0.9, 0.1) at equal weights are (0.7, 0.3)."""
    one, two = nn.Identity(), nn.Sequential()
    ensemble = TeacherEnsemble([one, two], temperature=1.0)
    one.forward = lambda x: torch.tensor([[0.5, 0.5]]).log()
    two.forward = lambda x: (torch.tensor([[0.9, 0.1]]).log() + 3,)  # a tuple that starts with logits
    assert torch.allclose(ensemble(torch.ones(1)).softmax(1), torch.tensor([[0.7, 0.3]]))


def test_large_logits_stay_finite():
    ensemble = TeacherEnsemble([nn.Identity(), nn.Identity()])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert ensemble(torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype)).isfinite().all()


def test_student_is_trained_by_all_with_cache_and_features(tmp_path):
    torch.manual_seed(1)
    made = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)) for _ in range(2)]
    student = copy.deepcopy(made[0])  # self-distillation, beside another
    before = copy.deepcopy(made)
    loader = [(torch.randn(8, 4), torch.randint(5, (8,))) for _ in range(3)]
    cached = TeacherCache(TeacherEnsemble(made, [3, 1]), folder=tmp_path)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    history = Distiller(student, cached).fit(loader, 2, optimizer)
    assert cached.hits == cached.misses == 24 and history[1].loss < history[0].loss
    Distiller(student, TeacherEnsemble(made), features={"0": "teachers.1.0"}).fit(loader, 1, optimizer)
    for teacher, old in zip(made, before, strict=True):
        for a, b in zip(teacher.parameters(), old.parameters(), strict=True):
            assert torch.equal(a, b) and a.grad is None


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: TeacherEnsemble([]), ValueError, "Expected at least one teacher, got none"),
        (lambda: TeacherEnsemble([1]), TypeError, "Expected teachers to be torch.nn.Modules, got int"),
        (lambda: TeacherEnsemble(teachers(2), [1]), ValueError, r"Expected 2 weights of at least 0 .*, got \[1.0\]"),
        (lambda: TeacherEnsemble(teachers(2), [0, 0]), ValueError, "not all 0"),
        (lambda: TeacherEnsemble(teachers(2), [1, -1]), ValueError, "of at least 0"),
        (lambda: TeacherEnsemble(teachers(1), temperature=0), ValueError, "Expected temperature to be positive"),
        (
            lambda: TeacherEnsemble([nn.Linear(4, 5), nn.Linear(4, 6)])(torch.ones(2, 4)),
            ValueError,
            r"Expected logits of one shape from all teachers, got \(2, 5\) and \(2, 6\)",
        ),
    ],
)
def test_what_it_refuses(make, error, said):
    with pytest.raises(error, match=said):
        make()
