"""Schedules under which weights come back: RigL, and rewinding."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsekd.pruning import CubicSL, IterativeSL, Pruner, RigL

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def step_of(model, optimizer, step):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def test_rigl_by_hand():
    """Of four weights two are kept; one moves: the smaller goes, the pruned one of the greater gradient comes."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0, 4.0, 1.0, 2.0]]))
    schedule = RigL(1, 4, update_frequency=1, fraction=0.7)
    pruner = Pruner(model, 0.5, "magnitude", schedule=schedule, ignored_layers=())
    for gradients, mask in (
        ([0.0, 0.0, 0.0, 0.0], [True, True, False, False]),
        ([9.0, 0.0, 3.0, 1.0], [True, False, True, False]),
        ([1.0, 1.0, 1.0, 9.0], [True, False, True, False]),  # at step 3 a quarter of 0.7, of two units: none
        ([1.0, 1.0, 1.0, 9.0], [True, False, True, False]),
    ):
        model.zero_grad()
        model(torch.tensor([gradients])).sum().backward()
        pruner.step()
        assert pruner.masks["weight"][0].tolist() == mask
    assert model.weight.tolist() == [[5.0, 0.0, 0.0, 0.0]] and pruner.finished and pruner.regrown == 1


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x2"])
def test_rigl_keeps_the_sparsity_of_each_layer(pattern):
    model = network()
    optimizer = adam(model)
    pruner = Pruner(model, 0.5, "random", pattern, "erk", RigL(1, 12, 2), optimizer, ignored_layers=())
    for step in range(14):
        step_of(model, optimizer, step)
        before = pruner.masks
        pruner.step()
        if step == 0:
            counts = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
            assert pruner.sparsity() == pytest.approx(0.5, abs=0.03)
        assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == counts
        for name, mask in pruner.masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            if step > 0:
                # What has grown begins at zero, its momentum too.
                grown = mask & ~before[name]
                assert not weight[grown].any() and not optimizer.state[weight]["exp_avg"][grown].any()
    assert pruner.finished and pruner.regrown > 0


def test_nothing_grows_without_being_asked_for():
    model = network()
    optimizer = adam(model)
    pruner = Pruner(model, 0.6, schedule=CubicSL(1, 8), optimizer=optimizer, ignored_layers=())
    for step in range(10):
        step_of(model, optimizer, step)
        pruner.step()
    assert pruner.regrown == 0 and pruner.finished


def test_rigl_falls_along_half_a_cosine():
    schedule = RigL(10, 30, 5, 0.4)
    assert [schedule.fraction_at(step) for step in (9, 10, 30)] == [0, 0, 0]
    assert schedule.fraction_at(20) == pytest.approx(0.2)
    assert schedule.fraction_at(15) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert [step for step in range(40) if schedule.is_update(step)] == [10, 15, 20, 25]


def test_iterative_cuts_by_hand():
    """Each of three cuts leaves the same share: a tenth in the end, 10^(-1/3) after the first."""
    schedule = IterativeSL(4, 10, 3)
    assert [step for step in range(20) if schedule.is_update(step)] == [4, 7, 10]
    assert [round(schedule.sparsity_at(step, 0.9), 4) for step in (3, 4, 6, 7, 10)] == [0, 0.5358, 0.5358, 0.7846, 0.9]


@pytest.mark.parametrize("rewind_step", [0, 2])
def test_rewinding(rewind_step):
    """What remains goes back to where it was at that step, statistics too, and the optimizer forgets."""
    model = network()
    optimizer = adam(model)
    schedule = IterativeSL(4, 10, 3, rewind_step)
    begin = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, 0.8, "magnitude", schedule=schedule, optimizer=optimizer, ignored_layers=())
    for step in range(1, 13):
        step_of(model, optimizer, step)
        pruner.step()
        if step == rewind_step:
            begin = copy.deepcopy(model.state_dict())
        if step in (4, 7, 10):
            masks = pruner.masks
            for name, value in model.state_dict().items():
                want = begin[name] * masks[name] if name in masks else begin[name]
                assert torch.equal(value, want), (step, name)
            assert not optimizer.state
    assert (
        pruner.finished
        and pruner.sparsity() == pytest.approx(0.8, abs=0.002)
        and pruner.state_dict()["snapshot"] is None
    )


@pytest.mark.parametrize("kind", ["rigl", "iterative"])
def test_resumed_bit_for_bit(kind):
    def fresh(seed):
        torch.manual_seed(seed)
        model = network()
        optimizer = adam(model)
        schedule = RigL(1, 9, 2) if kind == "rigl" else IterativeSL(3, 9, 3, rewind_step=2)
        return (
            model,
            optimizer,
            Pruner(model, 0.6, "magnitude", "2x1-permuted", "uniform", schedule, optimizer, ignored_layers=()),
        )

    def run(parts, begin, saved=None):
        model, optimizer, pruner = parts
        for step in range(begin, 12):
            step_of(model, optimizer, step)
            pruner.step()
            if saved is not None:
                saved.append(copy.deepcopy([part.state_dict() for part in parts]))
        return model.state_dict(), pruner.masks, pruner.regrown

    saved = []
    want = run(fresh(0), 0, saved)
    for index, states in enumerate(saved):
        parts = fresh(9)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        got = run(parts, index + 1)
        assert all(torch.equal(got[0][name], value) for name, value in want[0].items()), index
        assert all(torch.equal(got[1][name], value) for name, value in want[1].items()) and got[2] == want[2]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: IterativeSL(4, 10, 1), ValueError, "Expected from 2 rounds to one per step, 7, got 1"),
        (lambda: IterativeSL(4, 10, 8), ValueError, "Expected from 2 rounds to one per step, 7, got 8"),
        (lambda: IterativeSL(4, 10, 2.0), TypeError, "Expected rounds to be a whole number, got 2.0"),
        (lambda: IterativeSL(4, 10, 2, 5), ValueError, r"Expected rewind_step in 0..start=4, got 5"),
        (lambda: RigL(0, 10, fraction=1.5), ValueError, r"Expected fraction in \[0, 1\), got 1.5"),
        (
            lambda: Pruner(nn.Linear(4, 4), 0.5, "taylor", schedule=RigL(1, 9), ignored_layers=()),
            ValueError,
            "Expected an importance of |g| or of the weights alone with RigL, got 'taylor'".replace("|", r"\|"),
        ),
        (
            lambda: Pruner(nn.Linear(4, 4), 0.5, "random", "2:4", schedule=RigL(1, 9), ignored_layers=()),
            ValueError,
            "Expected a pattern other than N:M and V:N:M with RigL, got '2:4'",
        ),
    ],
)
def test_what_makes_no_schedule(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()
