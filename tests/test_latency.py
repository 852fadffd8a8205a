"""The budget of time: the best choice of all, no sparsity where it buys nothing, and what it refuses."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.latency import LatencyTable, latency_budget, parse_target
from sparsekd.pruning import CubicSL, LatencyBudget, Pruner
from sparsekd.pruning.latency import LEVELS, SLOTS, cheapest

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def line(dense=1.0, least=0.1):
    """From ``dense`` ms on, in proportion to the density, down to ``least``."""
    return lambda sparsity: least + (dense - least) * (1 - sparsity)


TIMES = {"0": line(), "2": line(4.0, 0.2), "4": lambda sparsity: 3.0, "6": line()}


def latency(layer, sparsity):
    return TIMES[layer](sparsity)


def pruned(target, network_ms=None, model=None, **settings):
    budget = LatencyBudget(latency, target, network_ms)
    settings = {"importance": "magnitude", "ignored_layers": (), "importance_steps": 1} | settings
    return Pruner(network() if model is None else model, 0.9, budget=budget, **settings)


def sparsities(pruner):
    return {name.removesuffix(".weight"): 1 - float(mask.float().mean()) for name, mask in pruner.masks.items()}


def taken(pruner):
    return sum(latency(name, sparsity) for name, sparsity in sparsities(pruner).items())


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_choices(seed):
    draw = np.random.default_rng(seed)
    losses = [np.sort(draw.random(5)) for _ in range(4)]
    times = [draw.random(5) + 0.1 for _ in range(4)]  # in no order: more sparsity may cost time
    fastest, slowest = sum(own.min() for own in times), sum(own.max() for own in times)
    room = fastest + draw.uniform(0.05, 0.9) * (slowest - fastest)
    got = cheapest(losses, times, room)

    def total(of, choice):
        return sum(own[index] for own, index in zip(of, choice, strict=True))

    assert total(times, got) <= room + 1e-12
    # Rounded up, the times of four layers lose four slots at most.
    tight = room - 4 * (room - fastest) / SLOTS
    best = min(total(losses, c) for c in itertools.product(range(5), repeat=4) if total(times, c) <= tight)
    assert total(losses, got) <= best + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_time_is_never_exceeded_however_many_layers(seed):
    """Rounding down a slot in each would."""
    draw = np.random.default_rng(seed)
    times = [np.sort(draw.random(20))[::-1] for _ in range(200)]
    losses = [np.sort(draw.random(20)) for _ in range(200)]
    room = 0.5 * sum(own[0] for own in times) + 0.5 * sum(own[-1] for own in times)
    got = cheapest(losses, times, room)
    taken = sum(own[index] for own, index in zip(times, got, strict=True))
    assert 0.98 * room < taken <= room + 1e-9


def test_nothing_to_spare_is_the_fastest_choice():
    times = [np.array([2.0, 1.0]), np.array([1.0, 3.0])]
    assert cheapest([np.array([0.0, 9.0]), np.array([0.0, 9.0])], times, 2.0) == [1, 0]


def test_by_hand():
    """Of 9 ms the first and last layer could save 0.9 each, the second 3.8, the third none, whatever it loses."""
    pruner = pruned(6.0, network_ms=10.0)  # one more is fixed, so that the others have to save 4
    pruner.step()
    found = sparsities(pruner)
    assert found["4"] == 0 and all(found[name] > 0.3 for name in "026") and found["2"] > found["0"]
    assert 5.0 - 0.2 < taken(pruner) <= 5.0 + 0.01
    # A target that dense layers meet removes nothing.
    easy = pruned(10.0, network_ms=10.0)
    easy.step()
    assert easy.finished and easy.sparsity() == 0


def test_layers_that_the_times_do_not_know_stay_dense():
    pruner = Pruner(
        network(), 0.9, "magnitude", budget=LatencyBudget(LatencyTable((0.0, 1.0), {"2": [4.0, 0.2]}), 2.0, 4.0),
        ignored_layers=(), importance_steps=1,
    )  # fmt: skip
    pruner.step()
    assert {name for name, sparsity in sparsities(pruner).items() if sparsity} == {"2"}


def test_scales_of_scores_do_not_matter_and_no_layer_is_emptied():
    """VainF/Torch-Pruning#111: under a global budget a layer of small weights goes whole."""
    model = network()
    pruner = pruned(5.5, model=model)
    pruner.step()
    want, other = sparsities(pruner), network()
    with torch.no_grad():
        other[2].weight.mul_(1e-6)
    pruner = pruned(5.5, model=other)
    pruner.step()
    assert sparsities(pruner) == want and max(want.values()) <= LEVELS[-1]


def test_layers_timed_alone_that_take_more_than_their_network():
    """9 ms of layers in a network of 4.5: half of their times count."""
    alone, scaled = pruned(2.5, network_ms=4.5), pruned(5.0)
    alone.step(), scaled.step()
    assert sparsities(alone) == sparsities(scaled)


def test_a_layer_that_has_to_be_sparse_and_is_slower_so_stays_dense():
    """As convert will leave it, so that it takes 1 ms, not 2."""
    budget = LatencyBudget(lambda layer, sparsity: 1.0 + (sparsity > 0) * (layer == "4"), 4.0)
    Pruner(network(), 0.9, "magnitude", budget=budget, ignored_layers=(), min_sparsity={"4": 0.5})


def test_caps():
    pruner = pruned(5.5, max_sparsity={"2": 0.5}, min_sparsity={"6": 0.7})
    pruner.step()
    found = sparsities(pruner)
    assert found["2"] <= 0.5 and found["6"] >= 0.69 and taken(pruner) <= 5.5 + 0.02
    with pytest.raises(
        ValueError, match=r"^Expected a target within reach, at least 7.88 ms .* got latency 5 ms: 5 ms"
    ):
        pruned(5.0, max_sparsity=0.2)


@pytest.mark.parametrize("pattern", ["4x1", "4x1-permuted", "filter", "4x4"])
def test_patterns(pattern):
    pruner = pruned(5.5, pattern=pattern)
    pruner.step()
    assert taken(pruner) <= 5.5 + 0.15  # whole units
    assert sparsities(pruner)["4"] == 0 and sparsities(pruner)["2"] > 0.3


def test_gradually_and_resumed_with_other_times():
    """The layers' shares are chosen once; a run that goes on keeps them, whatever is measured then."""

    def run(steps, state=None, times=latency, weights=None):
        model = network()
        if weights is not None:
            model.load_state_dict(weights)
        budget = LatencyBudget(times, 5.5, asked="1.5x")
        pruner = Pruner(model, 0.5, "magnitude", budget=budget, schedule=CubicSL(1, 6), ignored_layers=())
        if state is not None:
            pruner.load_state_dict(state)
        seen = []
        for _ in range(steps):
            pruner.step()
            seen.append(pruner.sparsity())
        return pruner, seen, model

    whole, seen, _ = run(8)
    assert seen[0] == 0 < seen[1] < seen[3] < seen[5] == seen[7] and whole.finished
    half, _, model = run(4)
    state = half.state_dict()
    assert set(state["layers"]) == set(whole.masks) and state["settings"]["budget"] == "latency 1.5x"
    slow = {"6": 0.5}
    again, _, _ = run(4, state, lambda name, s: latency(name, s) * slow.get(name, 1.0), model.state_dict())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in whole.masks.items())
    state["layers"]["2.weight"] = 1.5
    with pytest.raises(ValueError, match=r"^Expected the sparsity of 2.weight in \[0, 1\), got 1.5$"):
        run(1, state)


def test_all_ranks_take_the_choice_of_the_first(monkeypatch):
    """Each has times of its own (VainF/Torch-Pruning#281, neuralmagic/sparseml#429: masks that differ by rank)."""
    module, sent = sys.modules["sparsekd.pruning.latency"], []
    first = {"0": 0.0, "2": LEVELS[9], "4": 0.0, "6": LEVELS[3]}

    def broadcast(values, src):
        sent.append((list(values), src))
        values[:] = list(first.values())

    pruner = pruned(5.5)
    monkeypatch.setattr(module, "is_distributed", lambda: True)
    monkeypatch.setattr(module.dist, "broadcast_object_list", broadcast)
    pruner.step()
    assert len(sent) == 1 and sent[0][1] == 0 and sent[0][0] != list(first.values())
    assert sparsities(pruner) == pytest.approx(first, abs=2e-3)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LatencyBudget(3, 1.0), TypeError, "Expected latency to be callable, got int"),
        (lambda: LatencyBudget(latency, 0.0), ValueError, "Expected target_ms above 0 and finite, got 0.0"),
        (lambda: LatencyBudget(latency, "2x"), TypeError, "Expected target_ms to be a number of milliseconds, got '2x"),
        (lambda: LatencyBudget(latency, 1.0, math.inf), ValueError, "Expected network_ms above 0 and finite, got inf"),
        (
            lambda: pruned(3.2),
            ValueError,
            "Expected a target within reach, at least 3.456 ms of 9 ms dense .2.60x., g",
        ),
        (lambda: pruned(0.5, network_ms=20.0), ValueError, "Expected a target within reach, at least 14.4.* ms of 20 "),
        (lambda: pruned(5.0, pattern="2:4"), ValueError, "Expected sparsity=0.5 with pattern '2:4', got 0.9"),
        (
            lambda: Pruner(network(), 0.5, pattern="2:4", budget=LatencyBudget(latency, 5.0), ignored_layers=()),
            ValueError,
            "Expected no budget of single layers with a pattern that fixes their sparsity, got one",
        ),
        (lambda: Pruner(network(), 0.5, budget="latency"), ValueError, "Expected a budget of latency with its times, "),
        (
            lambda: Pruner(network(), 0.5, budget=LatencyBudget(lambda n, s: math.nan, 1.0)),
            ValueError,
            r"Expected latency\('0', 0\) to be milliseconds of at least 0, got nan",
        ),
    ],
)
def test_what_it_refuses(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (0.9, ("sparsity", 0.9)), (0, ("sparsity", 0.0)), ("0.8", ("sparsity", 0.8)), ("2x", ("speed-up", 2.0)),
        (" 1.5 X", ("speed-up", 1.5)), ("3.5ms", ("ms", 3.5)), ("0.5 ms", ("ms", 0.5)), (12, ("ms", 12.0)),
    ],
)  # fmt: skip
def test_targets(given, want):
    assert parse_target(given) == want


@pytest.mark.parametrize("given", ["", "x", "0.5x", "-2x", "infx", "nanms", "2", "-1", -1, math.nan, "fast", "0ms"])
def test_targets_that_are_none(given):
    with pytest.raises(ValueError, match='^Expected target to be a sparsity in .*, a speed-up "2x" or "3.5ms", got '):
        parse_target(given)
    for none in (None, True, [2]):
        with pytest.raises(TypeError, match='^Expected target to be a sparsity, "2x" or "3.5ms", got '):
            parse_target(none)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def test_by_the_cost_model(monkeypatch):
    """Nothing is measured: as would_it_be_faster says at the same sparsities; the network is the sum of its layers."""
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    model, shape = convolutions().train(), (2, 3, 16, 16)
    budget = latency_budget(model, torch.randn(shape), "1.4x")
    assert model.training and str(budget) == "latency 1.4x"
    dense = {name: made.dense_ms for name, made in sparsekd.would_it_be_faster(model, 0.0, shape).items()}
    assert {name: budget.latency(name, 0.0) for name in dense} == pytest.approx(dense)
    assert budget.network_ms == pytest.approx(sum(dense.values())) == pytest.approx(1.4 * budget.target_ms)
    for level in (LEVELS[3], LEVELS[12], LEVELS[20]):
        for name, made in sparsekd.would_it_be_faster(model, level, shape).items():
            assert budget.latency(name, level) == pytest.approx(min(made.sparse_ms, made.dense_ms))
    assert budget.latency("3", 0.5) == 0.0
    pruner = Pruner(model, 0.0, "magnitude", budget=budget, importance_steps=1)
    pruner.step()
    found = sparsities(pruner)
    left = budget.network_ms - sum(dense[name] - budget.latency(name, found[name]) for name in found)
    assert 0.9 * budget.target_ms < left < 1.02 * budget.target_ms
    with pytest.raises(ValueError, match="^Expected a target within reach"):
        latency_budget(model, torch.randn(shape), "100x")
    with pytest.raises(ValueError, match="^Expected a model with a Conv1d, Conv2d or Linear that the example reaches"):
        latency_budget(nn.ReLU(), torch.randn(2), "2x")


@pytest.mark.parametrize(("took", "want"), [(1.5, 1.5), (1.0, 1.0), (9.0, 2.0)])
def test_layers_that_take_longer_in_their_network(monkeypatch, took, want):
    """The trial's time over what was foretold scales sparse times, at most twofold."""
    module, model, x = sys.modules["sparsekd.latency"], convolutions(), torch.randn(2, 3, 16, 16)
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    table, tried = module.measure_layers(model, x), []
    dense = sum(times[0] for times in table.ms.values())
    monkeypatch.setenv("SPARSEKD_TUNE", "cached")
    monkeypatch.setattr(module, "measure_layers", lambda *arguments: table)
    monkeypatch.setattr(module, "time_dense", lambda *arguments: dense + 1.0)

    def trial(model, x, layers, vector):
        tried.append(vector)
        inside = sum(table(name.removesuffix(".weight"), sparsity) for name, sparsity in layers.items())
        return dense + 1.0 - sum(table(name.removesuffix(".weight"), 0) for name in layers) + took * inside

    monkeypatch.setattr(module, "_try", trial)
    budget = latency_budget(model, x, f"{(dense + 1) * 0.95}ms", "4x1-permuted")
    assert tried == [4] and budget.network_ms == dense + 1.0
    for level in LEVELS[5:]:
        assert budget.latency("5", level) == pytest.approx(min(want * table("5", level), table("5", 0)))
    assert budget.latency("5", 0.0) == table("5", 0.0)


@pytest.mark.slow
def test_a_target_is_met():
    """Measured end to end, on layers where sparse kernels leave no doubt; a third of tolerance for a busy machine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)).eval()
    x = torch.randn(4, 64)
    pruner = Pruner(model, 0.0, "magnitude", budget=latency_budget(model, x, "2x"), importance_steps=1)
    pruner.step()
    pruner.squash_mask()
    assert sparsekd.reporting.compare_networks(model, sparsekd.convert(model, x), x).speedup > 2 / 1.33
