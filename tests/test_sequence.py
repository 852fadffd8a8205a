"""Sequences of remembered layers: taken where they do what the network's own code does, and by nothing else."""

import copy
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from torch import nn
from torch.func import functional_call
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd
from sparsekd.sparse import fusion, sequence
from sparsekd.sparse.modules import FusedConv2d, MaxPool2d, SparseConv2d
from sparsekd.sparse.sequence import Programs

SIZE = (2, 3, 12, 11)
LINES = ("lines", "strips")  # the fused network, and its activations in strips


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.ones(1))
        self.short, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, stride=2)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.two(F.relu(self.one(x))) + self.short(x))
        return self.last(y).mean((2, 3)) * self.scale + self.offset, y


@pytest.fixture
def network(monkeypatch):
    # The fused one, whichever was faster at the moment.
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {name: Namespace(min=name != "lines") for name in names})
    model = Network().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < 0.3
    mapping = {"*": {"kernel": "sparse"}}
    return sparsekd.optimize_for_inference(model, torch.randn(SIZE), mapping=mapping)


@pytest.fixture
def x():
    return torch.randn(SIZE)


@pytest.fixture
def own_ways(monkeypatch):
    """Forwards that went through the network's own code."""
    seen, run = [], Programs.run

    def counted(self, network, own, args):
        return run(self, network, lambda *args: seen.append(args) or own(*args), args)

    monkeypatch.setattr(Programs, "run", counted)
    return seen


def met(network, x):
    with torch.no_grad():
        for _ in range(3):
            result = network(x)
    return result


def fresh(network, x):
    """The result of the network's own code."""
    with torch.no_grad(), BaseTorchFunctionMode():
        return network(x)


def same(got, want):
    """But for the order of sums: under a mode the kernels interpret the pattern, of which there is code otherwise."""
    for one, other in zip(got, want, strict=True):
        assert_near(one, other)


def first(network, kind):
    return next(module for module in network.modules() if isinstance(module, kind))


def test_the_third_forward_runs_in_sequence(network, x, own_ways):
    met(network, x)
    before = len(own_ways)
    same(met(network, x), fresh(network, x))
    same(met(network, x + 1), fresh(network, x + 1))
    assert len(own_ways) == before


@pytest.mark.parametrize("kind", [FusedConv2d, SparseConv2d, MaxPool2d])
def test_hooks_are_called(network, x, kind):
    met(network, x)
    seen = []
    module = network.last if kind is SparseConv2d else first(network, kind)
    handles = [
        module.register_forward_hook(lambda *_: seen.append("after")),
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    with torch.no_grad():
        network(x)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    met(network, x)
    assert len(seen) == 2


def test_layers_without_bias(monkeypatch, x, own_ways):
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {name: Namespace(min=name != "lines") for name in names})
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)]).eval()
    network = sparsekd.optimize_for_inference(model, x, mapping={"*": {"kernel": "sparse"}})
    met(network, x)
    before = len(own_ways)
    same(met(network, x), fresh(network, x))
    assert len(own_ways) == before


def test_hooks_of_all_modules_are_called(network, x):
    met(network, x)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)), torch.no_grad():
        network(x)
    assert len(seen) > 5


def test_a_standing_hook_makes_no_programs(network, x, monkeypatch):
    first(network, FusedConv2d).register_forward_hook(lambda *_: None)
    met(network, x)
    monkeypatch.setattr(sequence.Program, "of", lambda *_: pytest.fail("Expected no program to be made again"))
    met(network, x)


def change_values(network):
    first(network, SparseConv2d).values.mul_(2)


def replace_values(network):
    conv = first(network, SparseConv2d)
    conv.values = nn.Parameter(conv.values * 2, requires_grad=False)


def replace_own_parameter(network):
    network.scale = nn.Parameter(network.scale * 2, requires_grad=False)


def replace_own_buffer(network):
    network.offset = network.offset + 1


def change_activation(network):
    first(network, FusedConv2d).activation = "none"


def replace_module(network):
    network.two = nn.Conv2d(16, 16, 1).eval().requires_grad_(False)


def replace_inside(network):
    fused = first(network, FusedConv2d)
    conv = fused.conv.to_dense()
    fused.conv = SparseConv2d.from_dense(nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)).eval()


def change_pool(network):
    first(network, MaxPool2d).kernel_size = (2, 2)


def replace_forward(network):
    fused = first(network, FusedConv2d)
    fused.forward = lambda *args: type(fused).forward(fused, *args) * 2


@pytest.mark.parametrize("change", [replace_own_parameter, replace_own_buffer], ids=lambda change: change.__name__)
def test_changes_of_the_networks_own_tensors_are_seen(network, x, change):
    before = met(network, x)[0].clone()
    change(network)
    with torch.no_grad():
        after = network(x)
    assert not torch.equal(after[0], before)
    same(after, fresh(network, x))


@pytest.mark.parametrize(
    "change",
    [change_values, replace_values, change_activation, replace_inside, change_pool, replace_forward],
    ids=lambda change: change.__name__,
)
def test_changes_are_seen(network, x, change):
    before = [result.clone() for result in met(network, x)]
    with torch.no_grad():
        change(network)
        after = network(x)
    assert not any(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    same(after, fresh(network, x))
    same(met(network, x), after)


def test_a_replaced_module_is_called(network, x):
    met(network, x)
    name = next(
        name for name, module in network.named_modules() if isinstance(module, FusedConv2d) and name != "stem.0"
    )
    network.set_submodule(name, Constant())
    with torch.no_grad(), pytest.raises(RuntimeError, match="called"):
        network(x)


class Constant(nn.Module):
    def forward(self, *_):
        raise RuntimeError("called")


def test_other_parameters_are_put_in(network, x):
    before = met(network, x)
    doubled = {name: parameter * 2 for name, parameter in network.named_parameters()}
    for given in (doubled, {"scale": doubled["scale"]}):
        with torch.no_grad():
            got = functional_call(network, given, (x,))
        assert not torch.equal(got[0], before[0])
    same(met(network, x), before)


def test_modes_go_the_long_way(network, x):
    want = met(network, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (network(x)[1].float() - want[1]).abs().max() < 0.1 * want[1].abs().max()  # of bfloat16
    given = x.clone().requires_grad_(True)
    assert_near(network(given.detach())[1], want[1])
    with torch.no_grad():
        assert_near(network(x.double().float())[1], want[1])
        other = torch.randn(1, 3, 9, 9)
        same(met(network, other), fresh(network, other))


def test_modes_of_dispatch_see_every_layer(monkeypatch):
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {n: Namespace(min=n not in LINES) for n in names})
    layers = [nn.Conv2d(48, 48, 3, padding=1) for _ in range(4)]
    for layer in layers:
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    x, seen = torch.randn(1, 48, 40, 40), []
    network = sparsekd.optimize_for_inference(nn.Sequential(*layers), x, mapping={"*": {"kernel": "sparse"}})
    want = met(network, x)
    assert sequence.in_strips(network)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Seen():
        assert_near(network(x), want)
    assert seen.count(torch.ops.sparsekd.conv2d_planned.default) == len(layers)


def test_copies_have_their_own_weights(network, x, own_ways):
    before = met(network, x)
    other = copy.deepcopy(copy.deepcopy(network))
    with torch.no_grad():
        change_values(other)
    got = met(other, x)
    count = len(own_ways)
    same(met(other, x), got)
    assert len(own_ways) == count
    same(met(network, x), before)
    assert not torch.equal(got[0], before[0])


def test_places_are_checked():
    made = torch.classes.sparsekd.PlannedSequence(1)
    with pytest.raises(ValueError, match=r"Expected a place in 0\.\.0, got 1"):
        made.max_pool2d(1, [2, 2], [2, 2], [0, 0])
    made.output([made.max_pool2d(0, [2, 2], [2, 2], [0, 0])])
    (got,) = made.run([torch.arange(16.0).view(1, 1, 4, 4)])
    assert got.flatten().tolist() == [5, 7, 13, 15]
    with pytest.raises(ValueError, match="Expected 1 inputs, got 2"):
        made.run([torch.zeros(1), torch.zeros(1)])
