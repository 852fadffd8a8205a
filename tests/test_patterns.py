"""The shapes of holes: each pattern against all masks that it allows, on layers of every kind."""

import itertools

import pytest
import torch
from torch import nn

from sparsekd import SparseConv2d
from sparsekd.pruning import CubicSL, Pruner
from sparsekd.pruning.patterns import Layout, find_pattern, lowest_units

pytestmark = pytest.mark.usefixtures("one_thread")


def mask_of(pattern, scores, count, layout=None):
    found = find_pattern(pattern)
    units = found.units(scores, layout or Layout())
    return units.mask(lowest_units(units.scores, units.sizes, count), scores.shape)


def kept(scores, mask):
    return float(scores[mask].sum())


def cut(model, sparsity, pattern, importance="magnitude", **rest):
    pruner = Pruner(model, sparsity, importance, pattern, ignored_layers=(), importance_steps=1, **rest)
    pruner.step()
    return pruner


# --- by hand and by enumeration --------------------------------------------------------------------------------------


def test_2_to_4_by_hand():
    scores = torch.tensor([[4.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 2.0]])
    assert mask_of("2:4", scores, 4).int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]


def test_2x1_by_hand():
    """Means of the vectors: 3, 1, 2 and, in the last group of one channel, 1, 5, 0."""
    scores = torch.tensor([[1.0, 1.0, 4.0], [5.0, 1.0, 0.0], [1.0, 5.0, 0.0]])
    assert mask_of("2x1", scores, 4).int().tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 5), (1, 2)])
def test_n_of_m_is_the_best_of_all_masks(n, m):
    scores = torch.rand(3, m, 2, 2)
    mask = mask_of(f"{n}:{m}", scores, scores.numel())
    for k, r, s in itertools.product(range(3), range(2), range(2)):
        group = scores[k, :, r, s]
        best = max(float(group[list(places)].sum()) for places in itertools.combinations(range(m), n))
        assert kept(group, mask[k, :, r, s]) == pytest.approx(best) and int(mask[k, :, r, s].sum()) == n


@pytest.mark.parametrize("pattern, units", [("2x1", 6), ("2x2", 4), ("filter", 4), ("channel", 3), ("1x3", 4)])
def test_blocks_are_the_best_of_all_masks(pattern, units):
    """Of units of one size; ragged ones are taken by what they hold in the mean."""
    scores = torch.rand(4, 3) if pattern != "2x2" else torch.rand(4, 4)
    found = find_pattern(pattern).units(scores, Layout())
    assert len(found.scores) == units and len(set(found.sizes.tolist())) == 1
    for pruned in range(units + 1):
        mask = mask_of(pattern, scores, pruned * int(found.sizes[0]))
        best = max(
            kept(scores, found.mask(torch.tensor([unit in chosen for unit in range(units)]), scores.shape))
            for chosen in itertools.combinations(range(units), pruned)
        )
        assert kept(scores, mask) == pytest.approx(best, rel=1e-5)


def check_n_of_m(mask, n, m):
    """At most n in each m input channels, exactly n where the group is whole."""
    rows = mask.flatten(2) if mask.dim() > 2 else mask[:, :, None]
    for begin in range(0, rows.shape[1], m):
        counts = rows[:, begin : begin + m].sum(1)
        assert bool((counts == min(n, rows.shape[1] - begin)).all())


@pytest.mark.parametrize("vector, m, shape", [(4, 10, (8, 20, 3, 3)), (4, 20, (6, 30, 1, 1)), (16, 4, (16, 10)),
                                              (1, 8, (3, 16))])  # fmt: skip
def test_v_n_m_by_construction(vector, m, shape):
    scores = torch.rand(shape)
    pattern = find_pattern(f"{vector}:2:{m}")
    mask = mask_of(pattern, scores, scores.numel())
    check_n_of_m(mask, 2, m)
    assert int((~mask).sum()) == pattern.limit(torch.Size(shape), Layout())
    rows = mask.reshape(shape[0], shape[1], -1)
    for group in rows.split(vector):
        for begin in range(0, shape[1], m):
            assert int(group[:, begin : begin + m].any(0).sum(0).max()) <= 4


def test_v_n_m_chooses_the_columns_that_hold_most():
    scores = torch.tensor([[1.0, 9.0, 2.0, 8.0, 0.0, 7.0, 6.0, 0.0], [9.0, 1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0]])
    # Sums 10, 10, 2, 10, 0, 10, 10, 0: of the five tens the later four.
    assert mask_of("2:2:8", scores, 16).int().tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    "pattern", ["", "4", "x1", "0x1", "4:2", "2:2", "0:4", "4:2:3", "0:2:8", "2:4x", "4x2-permuted", None, 4, "V x 1"]
)
def test_unknown_patterns(pattern):
    with pytest.raises(ValueError, match='^Expected pattern to be one of "unstructured", "Vx1"'):
        find_pattern(pattern)


# --- on layers -------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), 0),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), 0),
    "conv2d": (lambda: nn.Conv2d(8, 10, 3), 0),
    "grouped": (lambda: nn.Conv2d(8, 12, (1, 3), groups=2), 0),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), 0),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), 0),
    "transposed": (lambda: nn.ConvTranspose2d(8, 10, 3), 1),
    "transposed groups": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), 1),
}
PATTERNS = ["unstructured", "4x1", "4x1-permuted", "2x2", "filter", "channel"]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layer_takes_every_pattern(kind, pattern):
    layer = LAYERS[kind][0]()
    pruner = cut(layer, 0.5, pattern)
    (mask,) = pruner.masks.values()
    assert abs(pruner.sparsity() - 0.5) <= 0.26 and torch.equal(layer.weight != 0, mask)
    layout = Layout.of(layer)
    rows = layout.rows(mask)  # [K, C/g, taps]
    assert torch.equal(layout.weight(rows, layer.weight.shape), mask)
    per_group = rows.shape[0] // layout.groups
    if pattern.startswith("4x1"):
        order = pruner.permutations["weight"].order if pattern.endswith("permuted") else torch.arange(len(rows))
        for group in order.split(per_group):
            assert sorted(group.tolist()) == list(range(int(group.min()), int(group.min()) + per_group))
            for part in group.split(4):
                assert bool((rows[part] == rows[part[:1]]).all())
    if pattern == "filter":
        assert bool((rows.flatten(1).all(1) | ~rows.flatten(1).any(1)).all())
    if pattern == "channel":
        for group in rows.split(per_group):
            assert bool((group.transpose(0, 1).flatten(1).all(1) | ~group.transpose(0, 1).flatten(1).any(1)).all())


def test_a_transposed_convolution_has_its_output_channels_second():
    layer = nn.ConvTranspose2d(2, 4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 9.0, 5.0, 2.0], [1.0, 9.0, 2.0, 3.0]])[:, :, None, None])
    cut(layer, 0.5, "filter")
    assert layer.weight[:, :, 0, 0].tolist() == [[0.0, 9.0, 5.0, 0.0], [0.0, 9.0, 2.0, 0.0]]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "depthwise", "conv3d", "transposed"])
def test_2_to_4_on_layers(kind):
    layer = LAYERS[kind][0]()
    pruner = cut(layer, 0.5, "2:4")
    check_n_of_m(Layout.of(layer).rows(pruner.masks["weight"]), 2, 4)


@pytest.mark.parametrize("pattern", ["2:4", "4:2:8", "4:1:8", "4x1", "4x1-permuted", "2x4", "unstructured"])
@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_gradually_to_the_same_shape(pattern, budget):
    """What is pruned on the way stays so, and the end is as if it had been one cut."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 24))
    sparsity = find_pattern(pattern).sparsity or 0.6
    pruner = Pruner(model, sparsity, "magnitude", pattern, budget, CubicSL(1, 6), ignored_layers=())
    before, seen = pruner.masks, []
    for _ in range(6):
        with torch.no_grad():  # scores change on the way
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        pruner.apply_masks()
        pruner.step()
        assert all(not bool((mask & ~before[name]).any()) for name, mask in pruner.masks.items())
        before = pruner.masks
        seen.append(pruner.sparsity())
    assert seen == sorted(seen) and seen[-1] == pytest.approx(sparsity, abs=0 if ":" in pattern else 0.01)
    if ":" in pattern:
        n, m = (int(part) for part in pattern.split(":")[-2:])
        for mask in pruner.masks.values():
            rows = mask.flatten(2) if mask.dim() > 2 else mask[:, :, None]
            assert int(rows.view(rows.shape[0], -1, m, rows.shape[2]).sum(2).max()) <= n


def test_masks_are_what_the_packed_format_takes():
    """Permuted ones with their order: the store undoes it."""
    conv = nn.Conv2d(8, 18, 3)
    x = torch.randn(1, 8, 5, 5)
    for pattern in ("4x1", "4x1-permuted"):
        pruner = cut(conv, 0.4, pattern)
        order = pruner.permutations["weight"].order if "permuted" in pattern else False
        packed = SparseConv2d.from_dense(conv, pruner.masks["weight"], 4, permute=order)
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-4, atol=1e-5)
        pruner.squash_mask()
        nn.init.normal_(conv.weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 0.9, "pattern": "2:4"}, "Expected sparsity=0.5 with pattern '2:4', got 0.9"),
        (
            {"sparsity": 0.5, "pattern": "2:4", "budget": {"0": 0.5}},
            "Expected no budget of single layers with a pattern",
        ),
        (
            {"sparsity": 0.5, "pattern": "2:4", "max_sparsity": 0.4},
            "Expected no budget of single layers with a pattern",
        ),
    ],
)
def test_sparsities_that_a_pattern_does_not_allow(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Pruner(nn.Sequential(nn.Linear(8, 8)), importance="magnitude", ignored_layers=(), **arguments)


def test_an_infinite_or_huge_score_does_not_hide_what_is_pruned():
    scores = torch.full((4, 2), 3e38)
    scores[:2, 0] = -torch.inf
    units = find_pattern("2x1").units(scores, Layout())
    assert units.scores.isinf().tolist() == [True, False, False, False] and bool((units.scores[1:] > 1e38).all())
