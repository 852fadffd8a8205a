"""Calls that a sparse convolution remembers: taken where they are right, and by nothing else."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.sparse.modules import FusedConv2d, SparseConv2d
from sparsekd.sparse.modules.plans import MOST_PLANS

SIZE = (2, 6, 9, 7)


@pytest.fixture(params=["alone", "fused"])
def layer(request):
    conv = nn.Conv2d(6, 8, 3, padding=1, stride=2).eval().requires_grad_(False)
    conv = SparseConv2d.from_dense(conv, torch.rand(conv.weight.shape) < 0.4)
    return conv if request.param == "alone" else FusedConv2d(conv, "relu")


@pytest.fixture
def x():
    return torch.randn(SIZE)


@pytest.fixture
def long_ways(monkeypatch):
    """The sizes of calls for which everything was looked at."""
    seen, plan_for = [], SparseConv2d.plan_for
    monkeypatch.setattr(SparseConv2d, "plan_for", lambda *args: seen.append(args[2]) or plan_for(*args))
    return seen


def conv_of(layer):
    return getattr(layer, "conv", layer)


def met(layer, *args):
    with torch.no_grad():
        layer(*args)
        return layer(*args)


def fresh(layer, *args):
    """The result of the layer when it remembers nothing."""
    conv_of(layer)._plans = None
    with torch.no_grad():
        return layer(*args)


def test_the_second_call_is_short(layer, x, long_ways):
    for _ in range(3):
        with torch.no_grad():
            got = layer(x)
        assert len(long_ways) == 1
    assert torch.equal(got, fresh(layer, x)) and got.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(layer(x), got)
    assert len(long_ways) == 2  # the fresh one's


def test_a_residual_is_added_if_it_fits(x, layer, long_ways):
    if not isinstance(layer, FusedConv2d):
        return
    whole = torch.randn(2, 8, 5, 4)
    assert torch.equal(met(layer, x, whole), fresh(layer, x, whole))
    assert len(long_ways) == 2
    for residual in (whole[:1], whole[:, :, :1], whole.double(), 0.5, whole.as_subclass(Tagged)):
        assert torch.equal(met(layer, x, residual), fresh(layer, x, residual))


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(layer, x, format, long_ways):
    met(layer, x)
    conv = conv_of(layer)
    for given in (x.contiguous(memory_format=format), x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = met(layer, given)
        assert len(long_ways) == 1
        with torch.no_grad():
            want = F.conv2d(given, conv.weight, conv.bias, conv.stride, conv.padding)
        assert_near(got, want.relu() if isinstance(layer, FusedConv2d) else want)
        assert got.stride() == want.stride()


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


CHANGES = {
    "values in place": lambda conv: conv.values.mul_(-2),
    "values": lambda conv: setattr(conv, "values", nn.Parameter(-2 * conv.values, False)),
    "bias": lambda conv: setattr(conv, "bias", nn.Parameter(conv.bias + 1, False)),
    "no bias": lambda conv: setattr(conv, "bias", None),
    "stride": lambda conv: setattr(conv, "stride", (1, 1)),
    "padding": lambda conv: setattr(conv, "padding", (2, 0)),
    "padding mode": lambda conv: setattr(conv, "padding_mode", "circular"),
    "another pattern": lambda conv: conv.load_state_dict(
        SparseConv2d.from_dense(nn.Conv2d(6, 8, 3), torch.rand(8, 6, 3, 3) < 0.2).state_dict()
    ),
    "parametrized bias": lambda conv: parametrize.register_parametrization(conv, "bias", Doubled()),
    "channels_last": lambda conv: conv.to(memory_format=torch.channels_last),
    "float64 and back": lambda conv: conv.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen(layer, x, change):
    before = met(layer, x)
    with torch.no_grad():
        change(conv_of(layer))
    got, want = met(layer, x), fresh(layer, x)
    assert torch.equal(got, want) and got.stride() == want.stride()
    assert change in (CHANGES["channels_last"], CHANGES["float64 and back"]) or not torch.equal(before, got)


def test_other_values_for_one_call(layer, x):
    before = met(layer, x)
    prefix = "conv." if isinstance(layer, FusedConv2d) else ""
    conv = conv_of(layer)
    with torch.no_grad():
        other = {prefix + "values": -conv.values, prefix + "bias": conv.bias + 1}
        got = torch.func.functional_call(layer, other, (x,))
        changed = copy.deepcopy(layer)
        conv_of(changed).values.neg_()
        conv_of(changed).bias.add_(1)
        assert torch.equal(got, changed(x)) and torch.equal(layer(x), before)


def test_what_wants_more_goes_the_long_way(layer, x):
    met(layer, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad(), pytest.raises(TypeError, match=r"Expected a dense input|Expected values of dtype"):
        layer(x.to_sparse())
    if isinstance(layer, SparseConv2d):
        layer.values.requires_grad_()
        layer(x).sum().backward()
        assert layer.values.grad.abs().sum() > 0
    else:
        layer.conv.values.requires_grad_()
        with pytest.raises(RuntimeError, match="as it is for inference"):
            layer(x)
    conv_of(layer).double()
    with torch.no_grad():
        assert layer(x.double()).dtype == torch.float64
        with pytest.raises(TypeError, match="Expected values of dtype"):
            layer(x)


def test_modes_see_the_operator(layer, x):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    want = met(layer, x)
    for mode in (Functions, Operators):
        seen = []
        with torch.no_grad(), mode():
            assert torch.equal(layer(x), want)
        assert torch.ops.sparsekd.conv2d_planned.default in seen
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(layer)(torch.stack([x, -x]))[0], want)


def test_copies_and_pickles_remember_nothing(layer, x):
    want = met(layer, x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert conv_of(copied)._plans is None and torch.equal(met(copied, x), want)


def test_few_sizes_are_remembered(layer, long_ways):
    for height in range(4, 4 + 3 * MOST_PLANS):
        met(layer, torch.randn(1, 6, height, 7))
    assert len(long_ways) == 3 * MOST_PLANS
    plans = conv_of(layer)._plans
    assert len(plans.by_size) == MOST_PLANS and 1 <= len(plans.calls) <= MOST_PLANS


def test_other_layers_go_the_long_way(x, long_ways):
    conv = nn.Conv2d(6, 8, 3, padding="same").eval().requires_grad_(False)
    for change in ({}, {"padding": (1, 1), "padding_mode": "reflect"}):
        sparse = SparseConv2d.from_dense(conv, torch.rand(conv.weight.shape) < 0.4)
        for name, value in change.items():
            setattr(sparse, name, value)
        assert torch.equal(met(sparse, x), fresh(sparse, x))
        assert len(long_ways) == 3
        long_ways.clear()
    image = x[0]
    plain = SparseConv2d.from_dense(nn.Conv2d(6, 8, 3).eval().requires_grad_(False))
    assert torch.equal(met(plain, image), fresh(plain, image)) and plain(image).dim() == 3


def test_errors_of_a_bound_call(x):
    made = torch.classes.sparsekd.PlannedConv2d
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    plan = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="Expected a padded input at least as large as the kernel"):
        made(plan, [0] * 10, None, None, "none", [1, 6, 0, 3], 8, *geometry)
    with pytest.raises(ValueError, match="Expected two values"):
        made(plan, [0] * 10, None, None, "none", list(SIZE), 8, [3], *geometry[1:])
    call = made(plan, [0, 0, 1] + [0] * 9, None, None, "none", list(SIZE), 8, *geometry).run
    with torch.no_grad(), pytest.raises(ValueError, match="Expected a plan of conv2d_plan with"):
        call(x, torch.randn(5, 1), None, None)
    assert call(x, torch.randn(5, 1), None, None) is None  # with gradients
