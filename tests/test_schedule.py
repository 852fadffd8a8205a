"""Sparsity as a function of the step."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.pruning import CubicSL, LinearSL

SCHEDULES = (CubicSL, LinearSL)


def test_by_hand():
    """From 0 to 0.8 in 4 steps: the cube of what is left of the way is 27/64 after a quarter, 1/8 after half."""
    cubic, linear = CubicSL(start=10, end=14), LinearSL(start=10, end=14)
    assert [round(cubic.sparsity_at(step, 0.8), 6) for step in range(9, 16)] == [0, 0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    assert [round(linear.sparsity_at(step, 0.8), 6) for step in range(9, 16)] == [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8]


def test_initial_sparsity_by_hand():
    """From 0.5 to 0.9: what is left of the difference of 0.4 is 1/8 after half of the way."""
    schedule = CubicSL(0, 10, init_sparsity=0.5)
    assert schedule.sparsity_at(0, 0.9) == 0.5
    assert schedule.sparsity_at(5, 0.9) == pytest.approx(0.85)
    # A layer of its own budget may want less than the initial sparsity.
    assert schedule.sparsity_at(0, 0.3) == schedule.sparsity_at(5, 0.3) == 0.3


def test_updates_by_hand():
    """Every third step from the start on, and at the end in any case."""
    schedule = CubicSL(2, 10, update_frequency=3)
    assert [step for step in range(20) if schedule.is_update(step)] == [2, 5, 8, 10]


@pytest.mark.parametrize("kind", SCHEDULES)
@given(
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    final=st.floats(0, 0.999),
    first=st.floats(0, 0.999),
    frequency=st.integers(1, 300),
)
def test_rises_to_exactly_the_final_sparsity(kind, start, length, final, first, frequency):
    schedule = kind(start, start + length, first, frequency)
    values = [schedule.sparsity_at(step, final) for step in range(start, start + length + 2)]
    assert values[-2] == values[-1] == final
    assert all(0 <= value <= final for value in values)
    # Rounding may lose the last digit between two steps, which no count of weights can tell.
    assert all(low <= high + 1e-12 for low, high in zip(values, values[1:], strict=False))
    assert schedule.is_update(start + length) and not schedule.is_update(start + length + 1)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 5, "end": 5}, ValueError, "Expected 0 <= start < end, got start=5, end=5"),
        ({"start": -1, "end": 5}, ValueError, "Expected 0 <= start < end, got start=-1, end=5"),
        ({"start": 0, "end": 5, "update_frequency": 0}, ValueError, "Expected update_frequency of at least 1, got 0"),
        ({"start": 0, "end": 5, "init_sparsity": 1.5}, ValueError, r"Expected init_sparsity in \[0, 1\), got 1.5"),
        ({"start": 0, "end": 5, "init_sparsity": -0.1}, ValueError, r"Expected init_sparsity in \[0, 1\), got -0.1"),
        ({"start": 0, "end": 5.0}, TypeError, "Expected end to be a whole number of steps, got 5.0"),
        ({"start": True, "end": 5}, TypeError, "Expected start to be a whole number of steps, got True"),
        ({"start": 0, "end": 5, "init_sparsity": "low"}, TypeError, "Expected init_sparsity to be a number"),
    ],
)
def test_refuses_what_makes_no_schedule(kind, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kind(**arguments)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_has_no_state(kind):
    """It is a function of the step alone, so a resumed training needs the same arguments and nothing else."""
    schedule = kind(3, 20, 0.25, 4)
    again = pickle.loads(pickle.dumps(schedule))
    schedule.sparsity_at(7, 0.9)
    assert [again.sparsity_at(step, 0.9) for step in range(25)] == [schedule.sparsity_at(s, 0.9) for s in range(25)]
    assert repr(again) == f"{kind.__name__}(start=3, end=20, init_sparsity=0.25, update_frequency=4)" == repr(schedule)
