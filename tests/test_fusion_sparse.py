"""optimize_for_inference of what is a matter of GPUs: layers that are sparse already, and the clock."""

import pytest
import torch
from test_fusion import FORCED, conv, epilogues, fused, pruned, x  # noqa: F401
from torch import nn

import sparsekd
from sparsekd.sparse import fusion
from sparsekd.sparse.modules import SparseConv2d


@pytest.mark.parametrize("settings", [{}, {"vector": 2, "permute": True}, {"pattern": "2:4"}], ids=str)
def test_layers_that_are_sparse_take_their_batch_norm(settings):
    """As on a GPU, where layers are made sparse by from_dense and not by measurement."""
    dense = pruned(nn.Sequential(nn.Conv2d(16, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    mask = (torch.rand(3, 16, 3, 3) < 0.4).repeat(2, 1, 1, 1)  # channels i and i + 3 share their columns
    if settings.get("pattern"):
        mask = torch.arange(16).remainder(4).lt(2)[:, None, None].expand(6, 16, 3, 3)
    layer = SparseConv2d.from_dense(dense[0], mask, **settings)
    model = nn.Sequential(layer, *dense[1:]).eval()
    result = fused(model, torch.randn(2, 16, 9, 9))
    assert list(epilogues(result).values()) == [("relu", False)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.modules())
    assert layer.bias is None  # of the original


def test_networks_on_a_gpu_are_timed_by_its_own_clock(x, monkeypatch):  # noqa: F811
    """The host returns before a GPU has computed: by its clocks a network with fewer calls of Python would win."""
    timed = []

    def compare(engines, **settings):
        timed.append(settings)
        return timings(engines, **{**settings, "device": "cpu", "clock": "wall"})

    timings = fusion.compare
    monkeypatch.setattr(fusion, "compare", compare)
    model = pruned(nn.Sequential(conv(), nn.ReLU()))
    sparsekd.optimize_for_inference(model, x, mapping=FORCED)
    assert {settings["clock"] for settings in timed} <= {"cpu", "wall"} and timed
    timed.clear()
    monkeypatch.setattr(fusion, "device_of", lambda model, inputs: torch.device("cuda"))
    sparsekd.optimize_for_inference(model, x, mapping=FORCED)
    assert timed and all(settings["device"].type == "cuda" and settings["clock"] == "cuda" for settings in timed)
