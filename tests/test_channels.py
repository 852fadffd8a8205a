"""Channels that are cut out and channels that change places: through every kind of neighbour, and where it can't be."""

import logging
import sys

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import Pruner, fold_permutations, remove_channels
from sparsekd.pruning.patterns import Layout
from sparsekd.sparse.formats import largest_grouping, largest_vector

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* pruned and stay dense"),  # layers as small as these
]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A shortcut, a depthwise convolution, batch-norms, channels side by side, and a flatten before the last layer."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.one, self.bn = nn.Conv2d(8, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=bias)
        self.two = nn.Conv2d(16, 8, 1, bias=bias)
        self.side = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=bias)
        self.join = nn.Conv2d(8 + 12, 8, 1, bias=bias)
        self.flat = nn.Linear(8 * 16, 24, bias=bias)
        self.last = nn.Linear(24, 5, bias=bias)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.deep(torch.relu(self.bn(self.one(x))))))  # stem and two share their channels
        x = torch.cat([nn.functional.max_pool2d(x, 2), torch.relu(self.side(x))], 1)
        return self.last(torch.relu(self.flat(torch.relu(self.join(x)).flatten(1))))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# --- removed ---------------------------------------------------------------------------------------------------------


def test_pruned_filters_are_cut_out_and_nothing_else_changes():
    """VainF/Torch-Pruning#428: masks are one thing, a smaller model another; here one comes out of the other."""
    model = Net(bias=False).eval()
    nn.init.zeros_(model.bn.bias), model.bn.running_mean.zero_()  # a channel of zeros then is zero behind it, too
    dense = ["stem", "two", "deep", "join", "last"]
    pruner = Pruner(model, 0.5, "magnitude", "filter", "uniform", ignored_layers=dense, importance_steps=1)
    pruner.step(), pruner.squash_mask()
    with torch.no_grad():
        want = model(X)
    before, state = parameters(model), {name: value.clone() for name, value in model.state_dict().items()}
    smaller = remove_channels(model, X)
    assert (smaller.one.out_channels, smaller.side.out_channels, smaller.flat.out_features) == (8, 6, 12)
    assert smaller.two.in_channels == smaller.deep.groups == smaller.bn.num_features == 8
    assert smaller.stem.out_channels == smaller.two.out_channels == 8
    assert smaller.join.in_channels == 8 + 6 and smaller.flat.in_features == 8 * 16
    assert parameters(smaller) < 0.6 * before
    torch.testing.assert_close(smaller(X), want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # It is a model like any other: trained, pruned and swapped.
    nn.functional.cross_entropy(smaller.train()(X), torch.tensor([0, 1])).backward()
    Pruner(smaller, 0.5, "magnitude", importance_steps=1).step()


def test_channels_that_are_added_go_together(caplog):
    model = Net(bias=False).eval()
    with torch.no_grad():
        model.two.weight[:6] = 0  # of these the stem, which they are added to, has lost two
        model.stem.weight[4:6] = 0
    with caplog.at_level(logging.INFO, "sparsekd.channels"):
        smaller = remove_channels(model, X, ignored_layers="last")
    assert smaller.two.out_channels == smaller.stem.out_channels == 6
    assert "two: 4 pruned channels stay, as they are added to others that are not" in caplog.text
    torch.testing.assert_close(smaller(X), model(X), rtol=1e-5, atol=1e-5)


def test_by_scores():
    model, scores = Net(), {name: torch.ones_like(layer) for name, layer in Net().named_parameters() if layer.dim() > 1}
    scores["side.weight"][torch.tensor([1, 5, 7])] = 0.0
    smaller = remove_channels(model, X, 0.25, scores, ignored_layers=["stem", "last"])
    assert torch.equal(smaller.side.weight, model.side.weight[torch.tensor([0, 2, 3, 4, 6, 8, 9, 10, 11])])
    assert smaller.flat.out_features == 18 and smaller.one.out_channels == 12 and smaller.training
    assert smaller.two.out_channels == 8  # added to the stem's, which stay


@pytest.mark.parametrize(
    ("round_to", "want"), [(1, (8, 6, 12)), (4, (8, 8, 12)), (5, (10, 10, 15)), (99, (16, 12, 24))]
)
def test_round_to(round_to, want):
    smaller = remove_channels(Net(), X, 0.5, round_to=round_to)
    assert (smaller.one.out_channels, smaller.side.out_channels, smaller.flat.out_features) == want


def test_gathered_importance_is_what_scores_are():
    """VainF/Torch-Pruning#264: scores from a loader, over many batches; without data they are an error."""
    model = Net()
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scores = sparsekd.gather_importance(model, "gradient", batches)
    want = torch.zeros_like(model.one.weight)
    other = Net()
    for x, y in batches:
        other.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        want += other.one.weight.grad.abs() / 3
    torch.testing.assert_close(scores["one.weight"], want)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    remove_channels(model, X, 0.5, scores)
    with pytest.raises(
        RuntimeError, match="^Expected a gradient of each weight to be pruned, got none for stem.weight"
    ):
        sparsekd.gather_importance(model, "gradient")


# --- folded ----------------------------------------------------------------------------------------------------------


def grouped(model, vector, skip=()):
    """Zeros in groups of output channels of a random order; the orders."""
    generator, orders = torch.Generator().manual_seed(3), {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or name in ("stem", "deep", *skip):
            continue
        rows = module.weight.shape[0]
        orders[f"{name}.weight"] = order = torch.randperm(rows, generator=generator)
        keep = torch.rand(-(-rows // vector), module.weight[0].numel(), generator=generator) < 0.4
        mask = torch.empty(rows, keep.shape[1], dtype=torch.bool)
        mask[order] = keep.repeat_interleave(vector, 0)[:rows]
        with torch.no_grad():
            module.weight.mul_(mask.view_as(module.weight))
    return orders


def vectors(model):
    return {
        name: largest_vector(module.weight.detach() != 0)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in ("stem", "deep")
    }


def test_neighbours_take_the_order_and_the_model_computes_the_same():
    model = Net().eval()
    orders = grouped(model, 4)
    assert set(vectors(model).values()) == {1}
    with torch.no_grad():
        want = model(X)
    folded = fold_permutations(model, X, orders)
    found = vectors(folded)
    assert {name: found[name] for name in ("one", "two", "side", "flat")} == dict.fromkeys(
        ("one", "two", "side", "flat"), 4
    )
    assert found["last"] == 1, "the outputs of the model keep their order"
    torch.testing.assert_close(folded(X), want, rtol=1e-4, atol=1e-5)
    assert set(vectors(model).values()) == {1}, "the model itself is as it was"
    assert torch.equal(folded.one.weight, model.one.weight[orders["one.weight"]][:, orders["two.weight"]])
    # Batch statistics and the affine part of the norm have moved with them.
    assert torch.equal(folded.bn.running_var, model.bn.running_var[orders["one.weight"]])


def test_layers_that_are_added_share_one_order():
    """The first one's; the other keeps its own in the packed weight."""
    model = Net().eval()
    orders = grouped(model, 4)
    torch.manual_seed(5)
    stem = torch.randperm(8)
    keep = torch.rand(2, 27).lt(0.4).repeat_interleave(4, 0)
    with torch.no_grad():
        model.stem.weight.mul_(torch.empty_like(keep).index_copy_(0, stem, keep).view_as(model.stem.weight))
        want = model(X)
    for first, second in (("stem", "two"), ("two", "stem")):
        given = {"stem.weight": stem, "two.weight": orders["two.weight"]}
        folded = fold_permutations(model, X, {f"{name}.weight": given[f"{name}.weight"] for name in (first, second)})
        torch.testing.assert_close(folded(X), want, rtol=1e-4, atol=1e-5)
        found = {name: getattr(folded, name).weight.detach() != 0 for name in (first, second)}
        assert largest_vector(found[first]) == 4 and largest_vector(found[second]) == 1
        assert largest_grouping(found[second]) == 4


def test_frozen_layers_stay_frozen():
    model = Net()
    for parameter in model.side.parameters():
        parameter.requires_grad_(False)
    order = {"side.weight": torch.arange(12).flip(0)}
    for made in (remove_channels(model, X, 0.5), fold_permutations(model, X, order)):
        assert not any(parameter.requires_grad for parameter in made.side.parameters())
        assert all(p.requires_grad for name, p in made.named_parameters() if not name.startswith("side"))
    assert not model.side.weight.requires_grad and model.one.weight.requires_grad


def test_what_is_not_folded_is_kept_in_the_packed_weight(monkeypatch):
    """Its order is undone by the store: of the last layer, whose outputs are the model's, as of any other."""
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    model = Net().eval()
    grouped(model, 4, skip=("two", "one", "side", "join"))
    fast = sparsekd.convert(model, X, mapping={"last": {"kernel": "sparse"}, "flat": {"kernel": "sparse"}})
    assert fast.flat.vector == fast.last.vector == 4
    assert fast.flat.row_indices is not None and fast.last.row_indices is not None
    torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)
    consecutive = sparsekd.convert(model, X, mapping={"flat": {"kernel": "sparse", "vector": 1}})
    assert consecutive.flat.vector == 1 and consecutive.flat.row_indices is None


def test_pruned_folded_and_packed(monkeypatch):
    """The whole way: the Pruner's own grouping, folded, packed without an order."""
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    monkeypatch.setattr("sparsekd.pruning.permutation.ROUNDS", 2)  # any grouping will do
    model = Net().eval()
    dense = ["stem", "deep", "last"]
    pruner = Pruner(model, 0.6, "magnitude", "4x1-permuted", "uniform", ignored_layers=dense, importance_steps=1)
    pruner.step(), pruner.squash_mask()
    folded = fold_permutations(model, X, pruner.permutations)
    fast = sparsekd.convert(folded, X, mapping={name: {"kernel": "sparse"} for name in ("one", "two", "side", "flat")})
    for name in ("one", "two", "side", "flat"):
        layer = getattr(fast, name)
        assert layer.vector % 4 == 0 and layer.row_indices is None
    torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """Channels whose places matter: a group norm, a grouped convolution, a shuffle that no graph shows."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.one = kind, nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8) if kind == "group norm" else nn.Identity()
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=2 if kind == "groups" else 1)
        self.last = nn.Linear(8 if kind != "flattened" else 16 * 64, 4)

    def forward(self, x):
        x = self.norm(self.one(x))
        if self.kind == "flattened":
            return self.last(torch.cat([x, self.two(x)], 1).flatten(1))
        if self.kind == "slices":
            x = torch.cat([x[:, 4:], 2 * x[:, :4]], 1)
        if self.kind == "shuffle":
            x = x.view(len(x), 2, 4, 8, 8).transpose(1, 2).flatten(1, 2) * torch.arange(8.0).view(1, 8, 1, 1)
        return self.last(self.two(x).mean((2, 3)))


@pytest.mark.parametrize("kind", ["group norm", "groups", "slices", "shuffle", "flattened", "plain"])
def test_where_the_graph_does_not_allow_it(kind):
    model = Mixed(kind).eval()
    orders = grouped(model, 4, skip=("two", "last"))
    folded = fold_permutations(model, X, {"one.weight": orders["one.weight"]})
    assert (vectors(folded)["one"] == 4) == (kind == "plain")
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_channels_whose_graph_contradicts_itself_stay():
    """Behind a concatenation that is flattened Torch-Pruning does not know whose channel is whose."""
    model = Mixed("flattened").eval()
    smaller = remove_channels(model, X, 0.5, ignored_layers="last")
    assert parameters(smaller) == parameters(model)
    torch.testing.assert_close(smaller(X), model(X))


def test_a_transposed_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    orders = {"0.weight": torch.randperm(8), "1.weight": torch.randperm(4)}
    folded = fold_permutations(model, X, orders)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)
    rows = Layout.of(model[1]).rows(model[1].weight)
    moved = rows[orders["1.weight"]][:, orders["0.weight"]]
    assert torch.equal(Layout.of(folded[1]).rows(folded[1].weight), moved)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: remove_channels("net", X), TypeError, "Expected model to be a torch.nn.Module, got str"),
        (lambda m: remove_channels(m, X, 50), ValueError, r"Expected sparsity in \[0, 1\), got 50"),
        (lambda m: remove_channels(m, X, 0.5, round_to=0), ValueError, "Expected round_to to be a whole number from 1"),
        (lambda m: remove_channels(m, X, scores={}), ValueError, "Expected a sparsity with scores, got none"),
        (
            lambda m: remove_channels(m, X, 0.5, {}),
            ValueError,
            "Expected scores of shape .16, 8, 3, 3. for one.wei",
        ),
        (
            lambda m: remove_channels(m, X, 0.5, ignored_layers=()),
            ValueError,
            r"Expected outputs of shape \(2, 5\) w",
        ),
        (
            lambda m: fold_permutations(m, X, {"bn.weight": torch.arange(16)}),
            ValueError,
            "Expected permutations of w",
        ),
        (
            lambda m: fold_permutations(m, X, {"one.weight": torch.zeros(16)}),
            ValueError,
            "Expected an order of the 16",
        ),
        (
            lambda m: fold_permutations(m, X, {"one.weight": torch.arange(8)}),
            ValueError,
            "Expected an order of the 16",
        ),
    ],
)
def test_what_they_refuse(call, error, message):
    model = Net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=f"^{message}"):
        call(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r"^Expected the package torch-pruning \(pip install torch-pruning\), got"):
        remove_channels(Net(), X, 0.5)
