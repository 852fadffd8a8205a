"""How many weights each layer loses, and which: exact counts, ties in a fixed order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekd.pruning import LinearSL, Pruner
from sparsekd.pruning.budget import Budget, check_sparsity
from sparsekd.pruning.patterns import PATTERNS, lowest

SIZES = {"a.weight": 4, "b.weight": 6}
SCORES = {
    "a.weight": torch.tensor([[1.0, 2.0], [3.0, 9.0]]),
    "b.weight": torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0, 0.0]),
}


def counts(budget, sparsity=0.5, scores=SCORES):
    return Budget(budget, sparsity, {name: value.numel() for name, value in scores.items()}).counts(scores)


def test_by_hand():
    """Half of ten weights: of all the scores 0, 1, 2, 3 and 4 are the lowest, three of them in the first layer."""
    assert counts("global") == {"a.weight": 3, "b.weight": 2}
    assert counts("uniform") == {"a.weight": 2, "b.weight": 3}
    assert counts({"b": 0.5}) == {"a.weight": 0, "b.weight": 3}
    mask = PATTERNS["unstructured"](SCORES["a.weight"], 3)
    assert mask.tolist() == [[False, False], [False, True]]


def test_globs_match_layers_and_parameters_the_last_one_counts():
    scores = {f"{name}.weight": torch.arange(10.0) for name in ("stem", "layer1.0.conv1", "layer1.0.conv2", "fc")}
    budget = {"layer1.*": 0.5, "*.conv2": 0.8, "fc.weight": 0.1}
    assert list(counts(budget, 0.9, scores).values()) == [0, 5, 8, 1]


def test_a_glob_for_no_layer_is_an_error():
    with pytest.raises(
        ValueError, match="^Expected budget globs that match a prunable layer, got 'layer9.*' for a.wei"
    ):
        counts({"a": 0.5, "layer9.*": 0.5})


def test_an_unknown_budget_is_an_error():
    with pytest.raises(ValueError, match="^Expected budget to be one of 'global', 'uniform' or a dict.*got 'gobal'"):
        counts("gobal")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, ValueError, r"Expected sparsity in \[0, 1\), got 1.5"),
        (1, ValueError, r"Expected sparsity in \[0, 1\), got 1"),
        (-0.1, ValueError, r"Expected sparsity in \[0, 1\), got -0.1"),
        (90, ValueError, r"Expected sparsity in \[0, 1\), got 90"),
        (math.nan, ValueError, r"Expected sparsity in \[0, 1\), got nan"),
        ("0.9", TypeError, r"Expected sparsity to be a number in \[0, 1\), got '0.9'"),
        (True, TypeError, r"Expected sparsity to be a number in \[0, 1\), got True"),
        (None, TypeError, r"Expected sparsity to be a number in \[0, 1\), got None"),
    ],
)
def test_sparsity_is_a_fraction(value, error, message):
    """PEERS, conventions: a fraction removed; neither percents nor what is kept."""
    with pytest.raises(error, match=f"^{message}$"):
        check_sparsity(value)
    with pytest.raises(error):
        Pruner(nn.Linear(4, 4), value, ignored_layers=())
    with pytest.raises(error, match="sparsity of 'b'"):
        counts({"b": value})


@pytest.mark.parametrize("budget", ["global", "uniform", {"b": 0.5}])
def test_nan_scores_are_an_error_that_names_the_layer(budget):
    scores = {**SCORES, "b.weight": torch.tensor([1.0, math.nan, 3.0, 4.0, math.nan, 6.0])}
    with pytest.raises(ValueError, match="^Expected scores without NaN, got 2 of 6 NaN in b.weight$"):
        counts(budget, scores=scores)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_however_many_ties(sizes, sparsity, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}.weight": torch.randint(levels, (n,), generator=generator) * 1.0 for i, n in enumerate(sizes)}
    together = counts("global", sparsity, scores)
    assert sum(together.values()) == round(sparsity * sum(sizes))
    assert list(counts("uniform", sparsity, scores).values()) == [round(sparsity * size) for size in sizes]
    # Layer by layer, the pattern takes just what the competition of all has chosen: the oracle is one stable sort.
    order = torch.cat(list(scores.values())).sort(stable=True).indices[: sum(together.values())]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[order] = True
    masks = [PATTERNS["unstructured"](scores[name], count) for name, count in together.items()]
    assert torch.equal(~torch.cat(masks), chosen)


@given(
    values=st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 2.0, math.inf]), max_size=12),
    count=st.integers(-1, 13),
)
def test_lowest_is_a_stable_sort(values, count):
    scores = torch.tensor(values)
    want = torch.zeros(len(values), dtype=torch.bool)
    want[scores.sort(stable=True).indices[: max(count, 0)]] = True
    assert torch.equal(lowest(scores, count), want)


def test_ties_go_in_row_major_order_whatever_the_memory_format():
    scores = torch.ones(2, 3, 2, 2)
    for layout in (scores, scores.to(memory_format=torch.channels_last), scores.transpose(0, 1)):
        mask = PATTERNS["unstructured"](layout, 5)
        assert mask.shape == layout.shape
        assert mask.flatten().tolist() == [False] * 5 + [True] * (layout.numel() - 5)


def test_an_unknown_pattern_is_an_error():
    with pytest.raises(ValueError, match="^Expected pattern to be one of 'unstructured', got '2:4'$"):
        Pruner(nn.Linear(4, 4), 0.5, "magnitude", pattern="2:4", ignored_layers=())


def two_layers():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.01)  # the lowest of all
        model[1].weight.copy_(1.0 + torch.arange(12.0).view(4, 3))
    return model


def test_a_layer_that_loses_all_is_said_once():
    """VainF/Torch-Pruning#111, #204: a global budget that empties layers confuses, or crashes."""
    model = two_layers()
    pruner = Pruner(model, 0.75, "magnitude", schedule=LinearSL(0, 3), ignored_layers=())
    with pytest.warns(UserWarning) as said:
        for _ in range(4):
            pruner.step()
    assert [str(warning.message) for warning in said] == [
        "Expected each layer to keep some weights, got none left in 0.weight: lower the sparsity, name these in "
        'ignored_layers, or take budget="uniform"'
    ]
    assert [layer.weight.count_nonzero().item() for layer in model] == [0, 6]
    assert model(torch.ones(2, 4)).eq(0).all()


def test_each_layer_keeps_some_under_a_uniform_budget(recwarn):
    model = two_layers()
    Pruner(model, 0.5, "magnitude", budget="uniform", ignored_layers=(), importance_steps=1).step()
    assert [layer.weight.count_nonzero().item() for layer in model] == [6, 6]
    assert not recwarn
