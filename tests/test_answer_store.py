"""The teacher's answers on disk: whose they are, in which form, for several processes, after a kill."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn

from sparsekd.distillation import Distiller, KDLoss, TeacherCache
from sparsekd.distillation.answer_store import HEADER

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Adds up the rows that it is asked for."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.rows = nn.Linear(4, 6), 0

    def forward(self, x):
        self.rows += x.shape[0]
        return self.inner(x)


def cache_of(folder, seed=0, **options):
    return TeacherCache(Counting(seed).eval(), folder=folder, **options).eval()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def test_the_next_run_asks_nothing_and_gets_the_same_to_the_bit(tmp_path, x):
    first = cache_of(tmp_path)
    answers = first(x)
    assert torch.equal(answers, first.teacher.inner(x).half().float()) and first.teacher.rows == 5
    again = cache_of(tmp_path)
    assert torch.equal(again(x.flip(0)), answers.flip(0)) and again.teacher.rows == 0
    assert (again.hits, again.misses) == (5, 0)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, x):
    cache_of(tmp_path)(x[:3])
    second = cache_of(tmp_path)
    second(x)
    assert second.teacher.rows == 2


def test_the_same_sample_with_another_augmentation_is_asked_about_anew(tmp_path, x):
    cache, augmented = cache_of(tmp_path), {seed: x + torch.randn(5, 4) for seed in (1, 2)}
    for seed in (1, 2, 1, 2):
        assert torch.allclose(cache(augmented[seed]), cache.teacher.inner(augmented[seed]), atol=2e-3)
    assert cache.teacher.rows == 10


@pytest.mark.parametrize(
    "options, said",
    [
        ({"seed": 1}, "Expected answers of this teacher in .*, got those of"),
        ({"top_k": 2}, "Expected answers of top_k=2 in .*, got those of None: choose another folder"),
        ({"dtype": torch.float32}, "Expected answers of dtype=float32 in .*, got those of float16"),
    ],
)
def test_answers_of_another_teacher_or_form_are_not_read(tmp_path, x, options, said):
    cache_of(tmp_path)(x)
    with pytest.raises(ValueError, match=said):
        cache_of(tmp_path, **options)


def test_a_teacher_that_changes_is_an_error(tmp_path, x):
    cache = cache_of(tmp_path)
    cache(x)
    cache.load_state_dict(cache.state_dict())  # the same values
    cache(x)
    with torch.no_grad():
        cache.teacher.inner.bias.add_(1)
    with pytest.raises(RuntimeError, match="got one that has changed"):
        cache(x)


def test_structure_and_hidden_buffers_tell_teachers_apart(tmp_path, x):
    def made(slope, buffer):
        module = nn.Sequential(nn.LeakyReLU(slope))
        module.register_buffer("hidden", torch.tensor(buffer), persistent=False)
        return module.eval()

    TeacherCache(made(0.1, 1.0), folder=tmp_path)(x)
    TeacherCache(made(0.1, 1.0), folder=tmp_path)
    for slope, buffer in ((0.2, 1.0), (0.1, 2.0)):
        with pytest.raises(ValueError, match="this teacher"):
            TeacherCache(made(slope, buffer), folder=tmp_path)


def test_top_k_keeps_the_largest_and_the_probability_of_the_rest(tmp_path, x):
    temperature = 3.0
    cache = cache_of(tmp_path, top_k=2, dtype=torch.float32, temperature=temperature)
    full, got = cache.teacher.inner(x), cache(x)
    best, classes = full.topk(2, dim=1)
    assert torch.allclose(got.gather(1, classes), best)
    soft, want = (got / temperature).softmax(1), (full / temperature).softmax(1)
    assert torch.allclose(soft.gather(1, classes), want.gather(1, classes), atol=1e-6)
    assert torch.equal(cache_of(tmp_path, top_k=2, dtype=torch.float32, temperature=temperature)(x), got)
    whole = cache_of(tmp_path / "whole", top_k=6, dtype=torch.float32)
    assert torch.allclose(whole(x), full)


def test_top_k_is_smaller_and_the_size_is_bounded(tmp_path, x):
    record = 16 + 6 * 2 + 4
    cache = cache_of(tmp_path, max_bytes=HEADER + 3 * record)
    for _ in range(2):
        assert torch.allclose(cache(x), cache.teacher.inner(x), atol=2e-3)
    assert cache.teacher.rows == 5 + 2 and cache._store.bytes == HEADER + 3 * record
    other = cache_of(tmp_path, max_bytes=HEADER + 3 * record)  # the bound is of the folder
    other(x)
    assert other._store.bytes == HEADER + 3 * record
    small = cache_of(tmp_path / "small", top_k=1)
    small(x)
    assert small._store.bytes == HEADER + 5 * (16 + 2 * 2 + 4 + 4)


def test_torn_and_broken_records_are_asked_for_again(tmp_path, x):
    cache_of(tmp_path)(x)
    (file,) = tmp_path.glob("*.answers")
    content = bytearray(file.read_bytes())
    content[HEADER + 20] ^= 1  # in the first answer
    file.write_bytes(content[:-7])  # and the last one is torn
    cache = cache_of(tmp_path)
    assert torch.allclose(cache(x), cache.teacher.inner(x), atol=2e-3)
    assert cache.teacher.rows == 2
    (tmp_path / "begun.answers").write_bytes(b"{")  # killed within the header
    assert len(cache_of(tmp_path)._store) == 5
    (tmp_path / "foreign.answers").write_bytes(b"x" * HEADER)
    with pytest.raises(ValueError, match=r"Expected a teacher's answers in .*foreign.answers, got another file"):
        cache_of(tmp_path)


def test_one_that_runs_already_reads_what_another_writes(tmp_path, x):
    first, second = cache_of(tmp_path), cache_of(tmp_path)
    first(x[:2])
    second(x[:4])
    first(x)
    assert (first.teacher.rows, second.teacher.rows) == (2 + 1, 2)


def _write(folder, seed, killed_after):
    torch.set_num_threads(1)
    cache = cache_of(folder)
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    for index, part in enumerate(x[torch.randperm(4000, generator=torch.Generator().manual_seed(seed))].split(8)):
        if index == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        cache(part)


def test_a_killed_writer_and_others_at_the_same_time_leave_only_whole_answers(tmp_path):
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    processes = multiprocessing.get_context("fork")  # without torch's long import
    writers = [
        processes.Process(target=_write, args=(tmp_path, 1, 60)),
        processes.Process(target=_write, args=(tmp_path, 2, None)),
    ]
    for writer in writers:
        writer.start()
    cache = cache_of(tmp_path)
    for part in x.split(500):  # reads and writes meanwhile
        assert torch.allclose(cache(part), cache.teacher.inner(part), atol=2e-3)
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [-signal.SIGKILL, 0]
    again = cache_of(tmp_path)
    assert torch.allclose(again(x), again.teacher.inner(x), atol=2e-3) and again.teacher.rows == 0


def test_a_student_trains_from_disk_as_from_the_rounded_teacher(tmp_path):
    x, y = torch.randn(32, 4), torch.randint(6, (32,))
    loader = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    students = []
    for _ in range(2):  # the second run reads all
        torch.manual_seed(1)
        student, cache = nn.Linear(4, 6), cache_of(tmp_path)
        torch.manual_seed(1)
        nn.init.normal_(student.weight)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        nn.init.zeros_(student.bias)
        Distiller(student, cache, KDLoss()).fit(loader, 2, optimizer)
        students.append((student.weight, cache.teacher.rows))
    assert torch.equal(students[0][0], students[1][0])
    assert [rows for _, rows in students] == [32, 0]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: TeacherCache(nn.Identity(), top_k=3), "Expected a folder for top_k=3, got none"),
        (lambda folder: cache_of(folder, top_k=0), "Expected top_k to be a whole number of at least 1 or None, got 0"),
        (lambda folder: cache_of(folder, dtype=torch.int8), "Expected dtype to be torch.float16 or torch.float32"),
        (lambda folder: cache_of(folder, temperature=0), "Expected temperature to be positive and finite, got 0"),
        (lambda folder: cache_of(folder, top_k=7)(torch.ones(1, 4)), r"of at least 7 classes for top_k, got \(6,\)"),
        (
            lambda folder: TeacherCache(nn.Identity().eval(), folder=folder)(torch.full((1, 2), 1e6)),
            "Expected answers within 65504, the range of torch.float16, got 1000000.0",
        ),
    ],
)
def test_what_it_refuses(tmp_path, make, said):
    with pytest.raises(ValueError, match=said):
        make(tmp_path)
    assert not list(tmp_path.glob("*.answers"))
