"""How many weights each layer loses, and which: exact counts, ties in a fixed order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekd.pruning import LinearSL, Pruner
from sparsekd.pruning.budget import Budget, check_sparsity
from sparsekd.pruning.patterns import lowest

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
    mask = ~lowest(SCORES["a.weight"], 3)
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
    with pytest.raises(
        ValueError, match="^Expected budget to be one of 'global', 'uniform', 'erk' or a dict.*got 'gobal'"
    ):
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
    masks = [~lowest(scores[name], count) for name, count in together.items()]
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
        mask = ~lowest(layout, 5)
        assert mask.shape == layout.shape
        assert mask.flatten().tolist() == [False] * 5 + [True] * (layout.numel() - 5)


def two_layers():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.01)  # the lowest of all
        model[1].weight.copy_(1.0 + torch.arange(12.0).view(4, 3))
    return model


def test_a_layer_that_loses_all_is_said_once():
    """VainF/Torch-Pruning#111, #204, #479: a global budget that empties layers confuses, or crashes."""
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


# --- ERK, caps -------------------------------------------------------------------------------------------------------


def resnet50():
    """Output height and width of each convolution and linear layer of ResNet-50 at 224 x 224, without running it."""
    import torchvision

    with torch.device("meta"):
        model, places = torchvision.models.resnet50(), {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda m, _, out, name=name: places.update({name: out[0, 0].numel()}))
        model(torch.empty(1, 3, 224, 224))
    return {f"{name}.weight": (model.get_submodule(name).weight.shape, places[name]) for name in places}


def test_erk_gives_the_published_figures_of_resnet_50():
    """github.com/google-research/rigl: FLOPs of 0.42, 0.24 and 0.12 of the dense 8.2e9 at 80, 90 and 95%."""
    layers = resnet50()
    shapes = {name: shape for name, (shape, _) in layers.items()}
    work = {name: shape.numel() * (1 if "fc" in name else places) for name, (shape, places) in layers.items()}
    assert 2 * sum(work.values()) == pytest.approx(8.2e9, abs=0.05e9)
    for sparsity, published in ((0.8, 0.42), (0.9, 0.24), (0.95, 0.12)):
        found = Budget("erk", sparsity, shapes).layers
        total = sum(found[name] * shape.numel() for name, shape in shapes.items())
        assert total / sum(map(math.prod, shapes.values())) == pytest.approx(sparsity, abs=1e-9)
        share = sum((1 - found[name]) * work[name] for name in work) / sum(work.values())
        # Theirs are rounded to two digits, and count what is no layer of this list, too.
        assert share == pytest.approx(published, abs=0.0075)


def test_erk_by_hand():
    """Densities in proportion to 20/100 = 0.2, 110/1000 and 12/20 = 0.6, of which the last is capped at 1."""
    shapes = {"a.weight": (10, 10), "b.weight": (100, 10), "c.weight": (10, 2)}
    found = Budget("erk", 0.75, {name: torch.Size(shape) for name, shape in shapes.items()}).layers
    # 0.25 * 1120 = 280 weights remain: 20 of c, and eps (20 + 110) = 260 of the others: eps = 2.
    assert found == pytest.approx({"a.weight": 0.6, "b.weight": 0.78, "c.weight": 0.0})


def test_caps_by_hand():
    """Of ten weights five go; without caps three of a and two of b, the scores 0 to 4."""
    assert capped(max_sparsity=0.5) == {"a.weight": 2, "b.weight": 3}
    assert capped(max_sparsity={"a": 0.25}) == {"a.weight": 1, "b.weight": 4}
    assert capped(min_sparsity={"b": 0.6}) == {"a.weight": 1, "b.weight": 4}
    assert capped("uniform", min_sparsity={"b": 0.7}) == {"a.weight": 1, "b.weight": 4}
    assert capped("erk", max_sparsity={"a": 0.25}) == {"a.weight": 1, "b.weight": 4}


def capped(budget="global", **caps):
    sizes = {"a.weight": torch.Size((2, 2)), "b.weight": torch.Size((6,))}
    return Budget(budget, 0.5, sizes, **caps).counts(SCORES)


@pytest.mark.parametrize(
    "caps, message",
    [
        (
            {"max_sparsity": 0.4},
            "Expected a sparsity that min_sparsity and max_sparsity allow, 0.0000..0.4000, got 0.5",
        ),
        (
            {"min_sparsity": 0.6},
            "Expected a sparsity that min_sparsity and max_sparsity allow, 0.6000..1.0000, got 0.5",
        ),
        ({"max_sparsity": {"z": 0.4}}, "Expected max_sparsity globs that match a prunable layer, got 'z' for a.weight"),
        (
            {"min_sparsity": {"a": 0.6}, "max_sparsity": {"a": 0.5}},
            "Expected min_sparsity of at most max_sparsity, got",
        ),
        ({"budget": {"a": 0.5}, "max_sparsity": 0.9}, "Expected no min_sparsity and max_sparsity beside a budget of"),
    ],
)
def test_caps_that_leave_no_room(caps, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        capped(**caps)


def test_no_layer_is_emptied_under_a_cap():
    """VainF/Torch-Pruning#111: a global budget takes whole layers away; max_sparsity holds it back, exactly."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    pruner = Pruner(model, 0.6, "magnitude", ignored_layers=(), importance_steps=1, max_sparsity=0.8)
    pruner.step()
    assert pruner.sparsity() == 0.6 and int((~pruner.masks["1.weight"]).sum()) == round(0.8 * 400)
