"""Shortcuts without parameters, which become modules of a fused network."""

from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.sparse import fusion
from sparsekd.sparse.modules import Shortcut

SIZE = (2, 3, 12, 11)


class Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.first, self.conv, self.shortcut = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1), shortcut

    def forward(self, x):
        x = F.relu(self.first(x))
        return F.relu(self.conv(x) + self.shortcut(x))


def optimized(monkeypatch, shortcut):
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {name: Namespace(min=name != "lines") for name in names})
    model, x = Block(shortcut).eval(), torch.randn(SIZE)
    with torch.no_grad():
        for conv in (model.first, model.conv):
            conv.weight *= torch.rand_like(conv.weight) < 0.3
        network = sparsekd.optimize_for_inference(model, x, mapping={"*": {"kernel": "sparse"}})
        for _ in range(3):
            assert (network(x) - model(x)).abs().max() < 1e-5
    return [module for module in network.modules() if isinstance(module, Shortcut)], network, x


@pytest.mark.parametrize(
    "shortcut, stride, new_channels",
    [
        (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), (2, 2), (2, 2)),
        (lambda x: F.pad(x[:, :, 0::2, ::2], [0, 0, 0, 0, 0, 4], "constant", 0), (2, 2), (0, 4)),
        (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 0), mode="constant", value=0.0), (2, 2), (4, 0)),
        (lambda x: F.pad(x[::1, :, 0::2, ::2], (0, 0, 0, 0, 4, 0)), (2, 2), (4, 0)),
        (lambda x: F.pad(x, (0, 0, 0, 0, 4, 0))[:, :, ::2, ::2], (1, 1), (4, 0)),
        (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 0), value=1.0), None, None),
        (lambda x: F.pad(x[:, :, ::2, ::2], (1, -1, 0, 0, 4, 0)), None, None),
        (lambda x: F.pad(x[:, :4, ::2, ::2], (0, 0, 0, 0, 4, 4)), None, None),
        (lambda x: F.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 4, 0)), None, None),
        (lambda x: F.pad(x[:, ::2, ::2, ::2], (0, 0, 0, 0, 4, 4)), None, None),
        (lambda x: F.pad(F.max_pool2d(x, 1, 2), (0, 0, 0, 0, 4, 0)), None, None),
    ],
)
def test_what_is_one_becomes_a_module(monkeypatch, shortcut, stride, new_channels):
    found, _, _ = optimized(monkeypatch, shortcut)
    assert [(module.stride, module.new_channels) for module in found] == (
        [] if stride is None else [(stride, new_channels)]
    )


def test_a_change_of_it_is_seen(monkeypatch):
    (module,), network, x = optimized(monkeypatch, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    module.new_channels = (4, 0)
    with torch.no_grad():
        moved = F.relu(network.conv.conv(network.first(x)) + module(network.first(x)))
        assert torch.allclose(network(x), moved, atol=1e-5)


def test_it_is_what_torch_makes():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(Shortcut((2, 3), (1, 2))(x), F.pad(x[:, :, ::2, ::3], (0, 0, 0, 0, 1, 2)))
    assert "stride=(2, 3)" in repr(Shortcut((2, 3), (1, 2)))
