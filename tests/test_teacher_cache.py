"""The teacher's kept answers: the teacher's own, asked for once, forgotten when it changes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekd.distillation import Distiller, KDLoss, TeacherCache

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Adds up the rows that it is asked for."""

    def __init__(self):
        super().__init__()
        self.inner, self.rows = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)), 0

    def forward(self, x):
        self.rows += x.shape[0]
        return self.inner(x)


def test_each_row_is_asked_for_once_and_in_any_order():
    teacher = Counting().eval()
    cache = TeacherCache(teacher).eval()
    x = torch.randn(6, 4)
    want = teacher.inner(x)
    assert torch.allclose(cache(x[:4]), want[:4]) and teacher.rows == 4
    order = torch.tensor([5, 1, 0, 4, 1])
    assert torch.allclose(cache(x[order]), want[order]) and teacher.rows == 6
    assert (cache.hits, cache.misses) == (3, 6)


def test_rows_that_differ_in_one_bit_shape_or_dtype_are_other_rows():
    cache = TeacherCache(nn.Flatten()).eval()
    x = torch.ones(1, 2, 3)
    nudged = x.clone()
    nudged[0, 1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    # 2.0 as int32 has the bytes of a float32.
    for other in (x, nudged, x.view(1, 3, 2), x.view(torch.int32)):
        assert torch.equal(cache(other), other.flatten(1))
    assert cache.misses == 4


@pytest.mark.parametrize("change", ["in place", "another tensor", "buffer"])
def test_a_changed_teacher_is_asked_anew(change):
    teacher = nn.BatchNorm1d(3).eval()
    cache, x = TeacherCache(teacher).eval(), torch.randn(2, 3)
    cache(x)
    with torch.no_grad():
        if change == "in place":
            teacher.weight.mul_(2)
        elif change == "another tensor":
            teacher.weight = nn.Parameter(torch.full((3,), 5.0))
        else:
            teacher.running_mean.add_(1)
    assert torch.equal(cache(x), teacher(x))


def test_a_teacher_in_train_mode_answers_each_time():
    teacher = Counting().train()
    cache, x = TeacherCache(teacher), torch.ones(8, 4)
    assert not torch.equal(cache(x), cache(x)), "dropout draws anew"
    assert teacher.rows == 16 and cache.misses == 0


def test_memory_is_bounded():
    teacher = Counting().eval()
    cache, x = TeacherCache(teacher, max_bytes=2 * 5 * 4).eval(), torch.randn(3, 4)
    for _ in range(2):
        assert torch.allclose(cache(x), teacher.inner(x))
    assert len(cache._kept) == 2 and teacher.rows == 3 + 1
    assert all(kept.untyped_storage().nbytes() == 20 for kept in cache._kept.values()), "no whole batch is held"


class Answering(nn.Module):
    """A linear teacher whose answer is wrapped."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(3, 2), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, None)],
    ids=["hf", "dict", "tuple"],
)
def test_logits_of_a_teacher_that_gives_more(wrap):
    teacher, x = Answering(wrap), torch.randn(4, 3)
    cache = TeacherCache(teacher).eval()
    for _ in range(2):
        assert torch.allclose(cache(x), teacher.inner(x))
    assert cache.hits == cache.misses == 4


def test_a_student_learns_the_same_from_kept_answers():
    x, y = torch.randn(32, 4), torch.randint(5, (32,))
    loader = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    teacher, students = Counting(), []
    for taught in (teacher, TeacherCache(teacher)):
        torch.manual_seed(1)
        student = nn.Linear(4, 5)
        Distiller(student, taught, KDLoss()).fit(loader, 3, torch.optim.SGD(student.parameters(), lr=0.1))
        students.append(student.weight)
    assert teacher.rows == 3 * 32 + 32
    assert torch.allclose(*students, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: TeacherCache(None), TypeError, "Expected teacher to be a torch.nn.Module, got NoneType"),
        (lambda: TeacherCache(nn.Identity(), -1), ValueError, "Expected max_bytes to be an int of at least 0, got -1"),
        (lambda: TeacherCache(nn.Identity()).eval()([1]), TypeError, "Expected a batch as one tensor, got list"),
        (
            lambda: TeacherCache(nn.Flatten(0)).eval()(torch.ones(2, 3)),
            ValueError,
            r"Expected 2 rows from the teacher, got a shape of \(6,\)",
        ),
        (
            lambda: TeacherCache(Answering(lambda logits: None)).eval()(torch.ones(2, 3)),
            TypeError,
            "Expected the teacher to give logits .* got NoneType",
        ),
    ],
)
def test_what_it_refuses(make, error, said):
    with pytest.raises(error, match=said):
        make()
