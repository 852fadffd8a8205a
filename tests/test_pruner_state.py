"""A Pruner saved and resumed: bit for bit at any step, and nothing but its own states."""

import copy
import io
import math
import warnings

import numpy
import pytest
import torch
from test_pruner import Network, equal, sgd, step_of
from torch import nn

from sparsekd.pruning import CubicSL, LinearSL, Pruner


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, weight_decay=0.1)


TRAININGS = {
    "one shot": (sgd, {"importance_steps": 5}),
    "one shot, adamw": (adamw, {"importance_steps": 5, "budget": "uniform"}),
    "gradual": (adamw, {"schedule": CubicSL(2, 9, init_sparsity=0.2, update_frequency=3)}),
    "magnitude": (sgd, {"schedule": LinearSL(1, 8, update_frequency=2), "importance": "magnitude"}),
    "random": (sgd, {"schedule": CubicSL(1, 8), "importance": "random"}),
    "budget": (sgd, {"importance_steps": 4, "budget": {"blocks.*": numpy.float64(0.9), "h*": 0.5}}),
}


def fresh(kind, seed):
    """Another seed, so that what is not restored shows."""
    torch.manual_seed(seed)
    model = Network()
    optimizer = TRAININGS[kind][0](model)
    return model, optimizer, Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), **TRAININGS[kind][1])


def states(model, optimizer, pruner):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scale(step):
    return math.inf if step == 3 else 1.0  # a batch that overflows is left out of the means, and counted


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.filterwarnings("ignore:Expected finite gradients")
def test_resumed_at_any_step_bit_for_bit(kind, between):
    """Saved after the Pruner's step, or between the optimiser's and the Pruner's, when a batch is under way."""
    steps = 12

    def run(model, optimizer, pruner, begin, saved=None):
        for step in range(begin, steps):
            if saved is not None or not between or step > begin:
                x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (model(x).square().mean() * scale(step)).backward()
                for parameter in model.parameters():
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimizer.step()
            if saved is not None and between:
                saved.append(through_a_file(states(model, optimizer, pruner)))
            pruner.step()
            if saved is not None and not between:
                saved.append(through_a_file(states(model, optimizer, pruner)))
        return states(model, optimizer, pruner)

    saved = []
    first = fresh(kind, seed=0)
    want = run(*first, 0, saved)
    skipped = first[2].skipped_batches
    assert len(saved) == steps and want["pruner"]["finished"] and skipped <= 1
    for index, state in enumerate(saved):
        model, optimizer, pruner = fresh(kind, seed=100 + index)
        before = copy.deepcopy(state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        assert equal(states(model, optimizer, pruner), before)
        # `equal` goes by bits, so this is not a matter of luck with the rounding.
        assert equal(run(model, optimizer, pruner, index if between else index + 1), want), index
        assert pruner.skipped_batches == skipped
        assert equal(state["pruner"], before["pruner"])  # the state is copied, not shared


def test_lbfgs_resumed_bit_for_bit():
    def fresh():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
        schedule = CubicSL(1, 6, update_frequency=2)
        return model, optimizer, Pruner(model, 0.6, schedule=schedule, optimizer=optimizer, ignored_layers=())

    x, y = torch.randn(16, 6), torch.randn(16, 3)

    def run(model, optimizer, pruner, steps, saved=None):
        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
            pruner.step()
            if saved is not None:
                saved.append(through_a_file(states(model, optimizer, pruner)))
        return states(model, optimizer, pruner)

    saved = []
    want = run(*fresh(), 9, saved)
    for index, state in enumerate(saved):
        model, optimizer, pruner = fresh()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        assert equal(run(model, optimizer, pruner, 8 - index), want), index


def test_a_state_is_no_view_of_what_goes_on():
    model, optimizer, pruner = fresh("gradual", seed=0)
    step_of(model, optimizer, 0)
    pruner.step()
    step_of(model, optimizer, 1)  # a batch under way, and one behind it
    state = pruner.state_dict()
    assert state["gathered"]["sums"] and state["gathered"]["pending"]
    before = copy.deepcopy(state)
    pruner.step()
    for step in range(2, 8):
        step_of(model, optimizer, step)
        pruner.step()
    assert equal(state, before)


def test_an_earlier_state_gathers_again():
    """Back from the end to the middle in the same objects: the hooks are set anew."""
    model, optimizer, pruner = fresh("one shot", seed=0)
    saved, want = None, None
    for turn in range(2):
        for step in range(2 * turn, 8):
            step_of(model, optimizer, step)
            pruner.step()
            if step == 1:
                saved = copy.deepcopy(states(model, optimizer, pruner))
        if turn == 0:
            want = copy.deepcopy(states(model, optimizer, pruner))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            pruner.load_state_dict(saved["pruner"])
            assert pruner.sparsity() == 0 and not pruner.finished
    assert equal(states(model, optimizer, pruner), want)


def test_the_masks_of_a_state_are_applied_at_once():
    model, optimizer, pruner = fresh("magnitude", seed=0)
    for step in range(8):
        step_of(model, optimizer, step)
        pruner.step()
    other, others, its = fresh("magnitude", seed=1)
    step_of(other, others, 0)
    its.load_state_dict(pruner.state_dict())
    for name, mask in pruner.masks.items():
        weight = other.get_parameter(name)
        assert (
            not weight[~mask].any() and weight[mask].all() and not others.state[weight]["momentum_buffer"][~mask].any()
        )


def changed(**parts):
    return lambda state: state | parts


def inside(part, **parts):
    return lambda state: state | {part: state[part] | parts}


def without(part):
    return lambda state: {key: value for key, value in state.items() if key != part}


BROKEN = {
    "a list": lambda state: list(state.items()),
    "none": lambda state: None,
    "empty": lambda state: {},
    "a part less": without("masks"),
    "a part more": changed(version=2),
    "sparsity": inside("settings", sparsity=0.6),
    "importance": inside("settings", importance="magnitude"),
    "pattern": inside("settings", pattern="2:4"),
    "budget": inside("settings", budget="uniform"),
    "schedule": inside("settings", schedule=repr(CubicSL(2, 9))),
    "importance_steps": inside("settings", importance_steps=33),
    "settings": changed(settings=None),
    "a layer more": inside("masks", stranger=torch.ones(2, dtype=torch.bool)),
    "a layer less": lambda state: state | {"masks": without("stem.weight")(state["masks"])},
    "masks of another shape": inside("masks", **{"stem.weight": torch.ones(8, 3, 3, dtype=torch.bool)}),
    "masks of another dtype": inside("masks", **{"stem.weight": torch.ones(8, 3, 3, 3)}),
    "masks that are none": inside("masks", **{"stem.weight": None}),
    "masks": changed(masks=[torch.ones(3)]),
    "steps below 0": changed(steps=-1),
    "steps as text": changed(steps="3"),
    "finished as a number": changed(finished=1),
    "finished too early": changed(finished=True),
    "finished too late": changed(steps=9),
    "nothing gathered": changed(gathered=None),
    "regrown below 0": changed(regrown=-1),
    "a permutation of a stranger": changed(permutations={"stranger": {"order": torch.arange(2)}}),
    "permutations as a list": changed(permutations=[1]),
    "a permutation without an order": changed(permutations={"stem.weight": {}}),
    "layers of a stranger": changed(layers={"stranger": 0.5}),
    "layers as text": changed(layers="all"),
    "a snapshot as text": changed(snapshot="weights"),
    "a snapshot of a stranger": changed(snapshot={"stranger": torch.ones(2)}),
    "sums of a stranger": lambda state: inside("gathered", sums={"stranger": torch.ones(2)})(state),
    "sums of another shape": lambda state: inside("gathered", sums={"stem.weight": torch.ones(2)})(state),
    "sums of another dtype": lambda state: inside(
        "gathered", sums={"stem.weight": torch.ones(8, 3, 3, 3, dtype=torch.int64)}
    )(state),
    "sums missing": lambda state: inside("gathered", sums={})(state),
    "sums as a list": lambda state: inside("gathered", sums=[])(state),
    "pending of another shape": lambda state: inside("gathered", pending={"stem.weight": torch.ones(2)})(state),
    "batches below 0": lambda state: inside("gathered", batches=-1)(state),
    "batches fewer than seen": lambda state: inside("gathered", batches=0)(state),
    "batches skipped": lambda state: inside("gathered", skipped=1.5)(state),
    "seen by a stranger": lambda state: inside("gathered", seen={"stranger": 1})(state),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_states_of_something_else_change_nothing(kind):
    model, optimizer, pruner = fresh("gradual", seed=0)
    for step in range(4):
        step_of(model, optimizer, step)
        pruner.step()
    state = BROKEN[kind](pruner.state_dict())
    other, others, its = fresh("gradual", seed=1)
    for step in range(3):
        step_of(other, others, step)
        its.step()
    before = copy.deepcopy(states(other, others, its))
    with pytest.raises((TypeError, ValueError), match="^Expected [^\n]*$"):
        its.load_state_dict(state)
    assert equal(states(other, others, its), before)
    # And it goes on as if nothing had happened.
    twin, twins, theirs = fresh("gradual", seed=2)
    for target, part in ((twin, "model"), (twins, "optimizer"), (theirs, "pruner")):
        target.load_state_dict(before[part])
    for step in range(3, 11):
        step_of(other, others, step)
        its.step()
        step_of(twin, twins, step)
        theirs.step()
    assert equal(states(other, others, its), states(twin, twins, theirs))


def test_the_settings_that_differ_are_named():
    state = Pruner(Network(), 0.5, ignored_layers=()).state_dict()
    with pytest.raises(ValueError, match="^Expected the state of a Pruner with sparsity=0.6, got 0.5$"):
        Pruner(Network(), 0.6, ignored_layers=()).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"^Expected the same keys in masks, got \[\] missing and \['stem.weight', 'head"
    ):
        Pruner(Network(), 0.5).load_state_dict(state)


def test_no_warnings_in_an_ordinary_life():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, pruner = fresh("gradual", seed=0)
        for step in range(11):
            step_of(model, optimizer, step)
            pruner.step()
        pruner.squash_mask()
