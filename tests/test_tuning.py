"""SPARSEKD_TUNE: what convert measures, keeps, looks up and predicts, and what swapped layers do at other shapes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.measure import tuned
from sparsekd.measure.timing import Speedup
from sparsekd.sparse import dispatch, fusion
from sparsekd.sparse.modules import FusedConv2d
from sparsekd.sparse.shapes import Shapes

pytestmark = pytest.mark.filterwarnings("ignore:a sparse layer runs dense:UserWarning")


def figures(speedup):
    sparse = {"dense_ms": speedup, "dense_as": "as it is", "sparse_ms": 1.0}
    return {**sparse, **dict.fromkeys(("speedup", "median", "low", "high"), speedup)}


class Measured:
    """Stands in for the measurement of a layer; counts."""

    def __init__(self):
        self.shapes, self.speedups = [], {}

    def __call__(self, name, dense, sparse, inputs, rounds=7):
        assert not dense.training and not sparse.training
        self.shapes.append(tuple(inputs[0].shape))
        return figures(self.speedups.get(inputs[0].shape[0], 2.0))


@pytest.fixture
def measured(monkeypatch):
    made = Measured()
    monkeypatch.setattr(dispatch, "_measured", made)
    # The network's own time decides nothing here.
    monkeypatch.setattr("sparsekd.sparse.convert._check_whole", lambda model, inputs, sparse, choices: (choices, False))
    return made


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Linear(36, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand_like(module.weight) < 0.8] = 0
    return model


def images(batch=1, size=12):
    torch.manual_seed(2)
    return torch.randn(batch, 3, size, size)


def sources(model):
    return [choice.source for choice in sparsekd.choices(model).values()]


def test_measured_once_and_kept(net, measured):
    assert sources(sparsekd.convert(net, images())) == ["measured"] * 4
    assert len(measured.shapes) == 4
    assert sources(sparsekd.convert(net, images())) == ["kept"] * 4
    tuned._open.clear()  # as another process
    again = sparsekd.convert(net, images())
    assert sources(again) == ["kept"] * 4 and len(measured.shapes) == 4
    assert "measured before" in sparsekd.choices(again)["0"].reason and sparsekd.choices(again)["0"].speedup == 2.0


def change_dtype(net):
    return net.double(), images().double()


def change_threads(net):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return net, images()


def change_batch(net):
    return net, images(2)


def change_density(net):
    for layer in (net[0], net[2], net[3], net[5]):
        layer.weight.data[0] = 0
    return net, images()


def change_layout(net):
    return net.to(memory_format=torch.channels_last), images().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [change_dtype, change_threads, change_batch, change_density, change_layout])
def test_what_is_kept_is_for_the_same_only(net, measured, change):
    sparsekd.convert(net, images())
    threads = torch.get_num_threads()
    try:
        sparsekd.convert(*change(net))
    finally:
        torch.set_num_threads(threads)
    assert len(measured.shapes) >= 7  # the linear layer has no layout


def test_autocast_is_measured_by_itself(net, measured):
    sparsekd.convert(net, images())
    with torch.autocast("cpu", torch.bfloat16):
        assert sources(sparsekd.convert(net, images())) == ["measured"] * 4


def test_alike_layers_are_measured_once(measured):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, 3) * (torch.rand(4, 4, 3, 3) < 0.2)
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
    for layer in model:
        layer.weight.data.copy_(weight)
    assert sources(sparsekd.convert(model, torch.randn(1, 4, 6, 6))) == ["measured", "kept", "kept"]


def test_off_measures_nothing(net, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "off")

    def never(*args, **kwargs):
        raise AssertionError("timed")

    monkeypatch.setattr("sparsekd.sparse.dispatch.compare", never)
    monkeypatch.setattr("sparsekd.sparse.convert.compare", never)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparsekd.convert(net, images())
    assert sources(fast) == ["predicted"] * 4
    assert all(0 < choice.error < 1 for choice in sparsekd.choices(fast).values())
    assert torch.allclose(fast(images()), net(images()), atol=1e-5)
    assert not list(tuned.folder().glob("*"))


def test_an_unknown_mode(net, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "always")
    with pytest.raises(ValueError, match="Expected SPARSEKD_TUNE to be off, cached or full, got 'always'"):
        sparsekd.convert(net, images())


# ---- other shapes ----


@pytest.fixture
def linear(measured):
    """A layer that is sparse at one row."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).eval()
    layer.weight.data[torch.rand(32, 64) < 0.8] = 0
    fast = sparsekd.convert(layer, torch.randn(1, 64))
    assert isinstance(fast, sparsekd.SparseLinear)
    return layer, fast


def met(fast):
    return [(choice.shape[0], choice.kernel, choice.source) for choice in sparsekd.choices_by_shape(fast)[""]]


@torch.no_grad()
def test_full_measures_a_shape_when_it_comes(linear, measured, monkeypatch):
    layer, fast = linear
    monkeypatch.setenv("SPARSEKD_TUNE", "full")
    measured.speedups = {5: 0.5}
    with pytest.warns(UserWarning, match="runs dense at a shape that it was not converted with"):
        for rows in (1, 5, 7, 5, 7):
            x = torch.randn(rows, 64)
            assert torch.allclose(fast(x), layer(x), atol=1e-5)
    assert met(fast) == [(1, "sparse", "measured"), (5, "dense", "measured"), (7, "sparse", "measured")]
    assert measured.shapes == [(1, 64), (5, 64), (7, 64)]
    x = torch.randn(5, 64)
    assert torch.equal(fast(x), layer(x))  # by the same dense product
    tuned._open.clear()
    other = sparsekd.convert(layer, torch.randn(1, 64))
    other(x)
    assert len(measured.shapes) == 3 and met(other)[-1] == (5, "dense", "kept")


@torch.no_grad()
@pytest.mark.parametrize("gain, kernel", [(0.5, "dense"), (2.0, "sparse")])
def test_what_is_measured_when_it_comes_is_the_sparse_layer(monkeypatch, tmp_path, gain, kernel):
    monkeypatch.setenv("SPARSEKD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SPARSEKD_TUNE", "full")
    layer = nn.Conv2d(4, 4, 3).eval()
    layer.weight[torch.rand_like(layer.weight) < 0.8] = 0
    monkeypatch.setattr("sparsekd.sparse.convert._check_whole", lambda model, inputs, sparse, made: (made, False))
    said = iter([2.0, gain])
    monkeypatch.setattr(dispatch, "speedup", lambda *_: Speedup(value := next(said), value, value, value, 0.95))
    fast = sparsekd.convert(layer, torch.randn(1, 4, 8, 8))
    x = torch.randn(2, 4, 8, 8)
    first, second = fast(x), fast(x)
    assert met(fast)[1] == (2, kernel, "measured")
    assert torch.equal(first, second) and torch.equal(first, layer(x)) == (kernel == "dense")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["cached", "off"])
def test_else_the_cost_model_says(linear, measured, monkeypatch, mode):
    layer, fast = linear
    monkeypatch.setenv("SPARSEKD_TUNE", mode)
    chooser = fast._shapes
    for rows, gain in ((5, 0.5), (7, 3.0)):
        monkeypatch.setattr(chooser, "_right", gain / dispatch.predict_layer("", fast, [torch.randn(rows, 64)]).speedup)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(torch.randn(rows, 64))
    assert met(fast) == [(1, "sparse", "measured"), (5, "dense", "predicted"), (7, "sparse", "predicted")]
    assert measured.shapes == [(1, 64)]


@pytest.fixture
def dense_at_five(linear, measured, monkeypatch):
    layer, fast = linear
    monkeypatch.setenv("SPARSEKD_TUNE", "full")
    measured.speedups = {5: 0.5}
    x = torch.randn(5, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast(x)
    return layer, fast, x


@torch.no_grad()
def test_values_that_change_behind_are_seen(dense_at_five):
    layer, fast, x = dense_at_five
    fast.values.data.mul_(2)
    fast.bias.data.add_(1)
    assert torch.allclose(fast(x), 2 * (layer(x) - layer.bias) + layer.bias + 1, atol=1e-5)
    fast.double()
    assert fast(x.double()).dtype == torch.float64


def test_training_and_gradients_stay_sparse(dense_at_five):
    layer, fast, x = dense_at_five
    assert not fast.runs_dense(x)  # gradients are on
    fast(x).sum().backward()
    assert fast.values.grad.shape == fast.values.shape
    with torch.no_grad():
        assert fast.runs_dense(x) and not fast.train().runs_dense(x)


@torch.no_grad()
def test_copies_state_and_compilers(dense_at_five):
    layer, fast, x = dense_at_five
    assert fast._shapes._dense is not None
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin._shapes._dense is None and torch.equal(twin(x), fast(x))
    assert set(fast.state_dict()) == {"values", "bias", "crow_indices", "col_indices"}
    exported = torch.export.export(fast, (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-5)
    assert any("sparsekd" in str(node.target) for node in exported.graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "channels_last", "fused"])
def test_convolutions_choose_too(measured, monkeypatch, kind):
    torch.manual_seed(0)
    flat = kind == "Conv1d"
    layer = (nn.Conv1d if flat else nn.Conv2d)(4, 6, 3, padding=1).eval()
    layer.weight[torch.rand_like(layer.weight) < 0.8] = 0
    plain = nn.Sequential(layer, nn.ReLU()) if kind == "fused" else layer
    shape = (3, 4, 9) if flat else (3, 4, 9, 9)
    x, other = torch.randn(shape), torch.randn(5, *shape[1:])
    if kind == "channels_last":
        plain, x, other = (t.to(memory_format=torch.channels_last) for t in (plain, x, other))
    if kind == "fused":
        monkeypatch.setattr("sparsekd.sparse.fusion._fastest", lambda model, inputs: fusion._fused(model, False, False))
        fast = sparsekd.optimize_for_inference(plain, x)
        assert any(isinstance(module, FusedConv2d) for module in fast.modules())
    else:
        fast = sparsekd.convert(plain, x)
    monkeypatch.setenv("SPARSEKD_TUNE", "full")
    measured.speedups = {5: 0.5}
    for images in (x, other, other[:2]):
        got = fast(images)
        torch.testing.assert_close(got, plain(images))
        assert got.stride() == plain(images).stride()
    (made,) = sparsekd.choices_by_shape(fast).values()
    assert [choice.kernel for choice in made] == ["sparse", "dense", "sparse"]


@torch.no_grad()
def test_shapes_are_forgotten_in_the_end(linear, monkeypatch):
    layer, fast = linear
    monkeypatch.setattr("sparsekd.sparse.shapes.MOST", 3)
    for rows in range(2, 12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(torch.randn(rows, 64))
        assert len(fast._shapes.made) <= 3


def test_a_layer_that_was_asked_for_does_not_choose(net, measured):
    fast = sparsekd.convert(net, images(), mapping={"*": {"kernel": "sparse"}})
    assert not any(isinstance(getattr(module, "_shapes", None), Shapes) for module in fast.modules())
    assert sparsekd.choices_by_shape(fast) == {}
