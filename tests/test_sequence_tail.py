"""What follows the convolutions in a sequence: pooling, flattening and linear layers, as torch itself does them."""

from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F
from test_sequence import fresh, met, own_ways, same  # noqa: F401  (a fixture)
from torch import nn

import sparsekd
from sparsekd.sparse import fusion
from sparsekd.sparse.modules import SparseLinear
from sparsekd.sparse.sequence import _programs


class Classifier(nn.Module):
    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()
        self.hidden, self.fc = nn.Linear(24, 32), nn.Linear(32, 5, bias=False)

    def forward(self, x):
        x = self.body(x)
        if self.functions:
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        else:
            x = self.flatten(self.pool(x))
        return self.fc(self.hidden(x)), x


@pytest.fixture(params=[False, True], ids=["modules", "functions"])
def network(monkeypatch, request):
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {name: Namespace(min=name != "lines") for name in names})
    model = Classifier(request.param).eval()
    for module in (*model.body, model.hidden):
        if hasattr(module, "weight"):
            module.weight.data *= torch.rand_like(module.weight) < 0.3
    mapping = {"*": {"kernel": "sparse"}, "fc": {"kernel": "dense"}}
    network = sparsekd.optimize_for_inference(model, torch.randn(2, 3, 9, 8), mapping=mapping)
    assert type(network.hidden) is SparseLinear and type(network.fc) is nn.Linear
    return network


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 8)


def test_all_of_it_is_one_call(network, x, own_ways):  # noqa: F811
    met(network, x)
    before = len(own_ways)
    same(met(network, x), fresh(network, x))
    same(met(network, x + 1), fresh(network, x + 1))
    assert len(own_ways) == before
    program = next(program for programs in _programs(network) for program in programs.by_size.values())
    assert not [node for node in program.run.graph.nodes if node.op == "call_module"]


def change_values(network):
    network.hidden.values.mul_(2)


def replace_weight(network):
    network.fc.weight = nn.Parameter(network.fc.weight * 2, requires_grad=False)


def give_a_bias(network):
    network.fc.bias = nn.Parameter(torch.ones(5), requires_grad=False)


def take_the_bias(network):
    network.hidden.bias = None


def replace_layer(network):
    network.fc = nn.Linear(32, 5).requires_grad_(False)


def replace_forward(network):
    network.fc.forward = lambda x: x[:, :5]


def other_pattern(network):
    network.hidden.load_state_dict(network.hidden.state_dict())
    network.hidden.col_indices = network.hidden.col_indices.flip(0).sort().values.clamp(max=3)


CHANGES = (change_values, replace_weight, give_a_bias, take_the_bias, replace_layer, replace_forward, other_pattern)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(network, x, change):
    before = [result.clone() for result in met(network, x)]
    with torch.no_grad():
        change(network)
        after = network(x)
    assert not torch.equal(after[0], before[0])
    same(after, fresh(network, x))


@pytest.mark.parametrize("layer", ["hidden", "fc"])
def test_hooks_are_called(network, x, layer):
    met(network, x)
    seen = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
    met(network, x)
    handle.remove()
    met(network, x)
    assert len(seen) == 3


def test_other_batches_have_programs_of_their_own(network, x):
    for batch in (1, 3, 2, 0):
        given = torch.randn(batch, 3, 9, 8)
        same(met(network, given), fresh(network, given))
