"""Checkpoints within an epoch, on one rank and on two of which one is killed."""

import multiprocessing
import os
import random
import signal

import numpy
import pytest
import ranks
import torch
from test_training_state import Shuffled, assert_same, batches, content, network, training
from torch import nn

from sparsekd.distillation import Distiller
from sparsekd.measure.timing import threads
from sparsekd.pruning import CubicSL, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "run"
    with threads(1):  # made before any test's own fixture; on two threads the sums differ in their last bits
        training()[0](3, checkpoint=file)
    return content(file)


@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 0), (1, 2), (2, 3)], ids=str)
def test_interrupted_within_an_epoch_loses_nothing_that_was_done(tmp_path, whole, at):
    file = tmp_path / "run"
    fit, *_ = training(Shuffled(interrupt_at=at))
    with pytest.raises(KeyboardInterrupt):
        fit(3, checkpoint=file, checkpoint_steps=1)
    saved = content(file)
    assert (saved["epoch"], saved["begun"]["batches"] if saved["begun"] else 0) == at
    fit, *_, pruner = training(seed=99)
    begun = pruner.steps
    fit(3, checkpoint=file, checkpoint_steps=1)
    assert begun == 0 and pruner.steps == 12
    assert_same(content(file), whole)


@pytest.mark.parametrize("accumulate, every, last", [(2, 1, 2), (1, 2, 2), (3, 1, 3)])
def test_a_file_is_of_whole_steps(tmp_path, accumulate, every, last):
    options = {"checkpoint_steps": every, "accumulate": accumulate}
    training()[0](2, checkpoint=tmp_path / "whole", **options)
    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        training(Shuffled(interrupt_at=(1, 3)))[0](2, checkpoint=file, **options)
    assert content(file)["begun"]["batches"] == last
    training(seed=3)[0](2, checkpoint=file, **options)
    assert_same(content(file), content(tmp_path / "whole"))


class Noisy(nn.Module):
    """Draws on Python's and numpy's random numbers, as augmentations do."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        if self.training:
            x = x * (1 + random.random() / 10) + numpy.random.normal() / 10 + random.gauss(0, 0.1)
        return self.inner(x)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_order_and_all_random_numbers_go_on(tmp_path, own_generator, workers):
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))

    def run(name, seed, interrupt_at=None):
        for seeded in (torch.manual_seed, random.seed, numpy.random.seed):
            seeded(seed)
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), 6, shuffle=True, generator=generator, num_workers=workers
        )
        model, steps = Noisy(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)

        def count(*_):
            steps.append(1)
            if len(steps) == interrupt_at:
                raise KeyboardInterrupt

        optimizer.register_step_pre_hook(count)
        Distiller(model, None).fit(loader, 2, optimizer, checkpoint=tmp_path / name, checkpoint_steps=1)
        return len(steps)

    assert run("whole", 1) == 8
    with pytest.raises(KeyboardInterrupt):
        run("run", 1, interrupt_at=7)
    assert run("run", 2) == 8 - 6, "only the step in flight is done again"
    assert_same(content(tmp_path / "run"), content(tmp_path / "whole"))


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_steps_that_are_none(tmp_path, steps):
    with pytest.raises(ValueError, match="Expected checkpoint_steps to be an int of at least 1 or None, got"):
        training()[0](1, checkpoint=tmp_path / "run", checkpoint_steps=steps)
    with pytest.raises(ValueError, match="Expected a checkpoint for checkpoint_steps=2, got none"):
        training()[0](1, checkpoint_steps=2)


# --- two ranks --------------------------------------------------------------------------------------------------------


def one_rank(rank, folder, meeting, seed, kill):
    ranks.join(rank, f"{folder}/{meeting}")
    torch.manual_seed(seed)
    student = nn.parallel.DistributedDataParallel(network())
    torch.manual_seed(seed + 100 + rank)  # dropout
    random.seed(seed)  # a fork draws anew
    numpy.random.seed(seed)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9)
    schedule = CubicSL(start=0, end=10, update_frequency=2)
    pruner = Pruner(student, 0.5, "gradient", schedule=schedule, optimizer=optimizer, ignored_layers=())
    steps = []

    def count(*_):
        steps.append(1)
        if rank == 1 and kill == ("step", len(steps)):
            os.kill(os.getpid(), signal.SIGKILL)

    student.register_forward_pre_hook(count)
    replace, saves = os.replace, []

    def replaced(source, target):
        saves.append(1)
        if rank == 1 and kill == ("save", len(saves)):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replaced
    loader = batches()[rank::2] + batches(6)[4 + rank :: 2]  # 3 for each
    Distiller(student, None).fit(loader, 4, optimizer, pruner=pruner, checkpoint=folder / "run", checkpoint_steps=1)
    (folder / f"{meeting}.steps{rank}").write_text(str(len(steps)))
    ranks.leave()


def start(folder, meeting, seed, kill=None):
    # Forks, without torch's long import, but of a process in which autograd has started no thread yet.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "sparsekd"])
    both = [processes.Process(target=one_rank, args=(rank, folder, meeting, seed, kill)) for rank in range(2)]
    for rank in both:
        rank.start()
    for rank in both:
        rank.join(120)
    return [rank.exitcode for rank in both]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("never")
    assert start(folder, "meeting", seed=1) == [0, 0]
    return [content(folder / f"run.rank{rank}") for rank in range(2)]


KILLS = [("step", random.Random(5).randrange(2, 12)), ("step", 1), ("save", 2), ("save", 3), ("save", 12), ("save", 13)]


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_after_a_rank_was_killed_at_most_the_step_in_flight_is_lost(tmp_path, never_killed, kill):
    codes = start(tmp_path, "first", 1, kill)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    found = [content(file) for rank in range(2) if (file := tmp_path / f"run.rank{rank}").exists()]
    done = [3 * state["epoch"] + (state["begun"]["batches"] if state["begun"] else 0) for state in found]
    assert start(tmp_path, "second", 2) == [0, 0]
    again = [int((tmp_path / f"second.steps{rank}").read_text()) for rank in range(2)]
    assert again[0] == again[1]
    # Of the rank that was killed, what it had begun when it was.
    begun = kill[1] if kill[0] == "step" else max(done, default=0) + 1
    assert 12 - again[0] >= begun - 2 and (kill[0] == "save" or 12 - again[0] == begun - 1)
    for rank in range(2):
        if kill != ("step", 1):  # that one starts anew, from other weights
            assert_same(content(tmp_path / f"run.rank{rank}"), never_killed[rank])


def test_ranks_without_a_common_step_are_refused(tmp_path):
    assert start(tmp_path, "first", 1) == [0, 0]
    for name in ("run.rank1", "run.rank1.previous", "run.rank1.previous2"):
        (tmp_path / name).unlink()
    assert start(tmp_path, "second", 1) == [1, 1]
