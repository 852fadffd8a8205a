"""Convolutions of an image's few channels, packed with all their weights (sparsekd/sparse/few_channels.py)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.sparse import fusion
from sparsekd.sparse.few_channels import packed_whole, packs_whole
from sparsekd.sparse.modules import FusedConv2d, SparseConv2d

pytestmark = pytest.mark.usefixtures("one_thread")


def network(first):
    body = nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        body.weight.mul_(torch.rand_like(body.weight) < 0.1)
    return nn.Sequential(first, nn.ReLU(), body, nn.ReLU()).eval()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 3}, {"bias": False, "dilation": 2}])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_whole_weight_is_kept(options, channels_last):
    x = torch.randn(2, 3, 20, 17)
    model = network(nn.Conv2d(3, 16, 5, **options))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 0.0  # and zeros of it, too
    given = model.to(memory_format=torch.channels_last) if channels_last else model
    packed = packed_whole(given)
    assert isinstance(packed[0], SparseConv2d) and packed[0].density == 1 and type(given[0]) is nn.Conv2d
    assert "3 input channels" in sparsekd.choices(packed)["0"].reason
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(sparsekd.to_dense(packed)[0].weight, model[0].weight)


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(4, 16, 3, groups=4),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 16, 3, padding="same"),
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 16, 3, dtype=torch.float64),
        nn.Conv2d(3, 16, 3, device="meta"),
        nn.Conv1d(3, 16, 3),
    ],
)
def test_others_are_left_alone(first):
    assert not packs_whole(first) and packed_whole(nn.Sequential(first)) is None


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_depthwise_layers_are_packed_if_asked_for(density):
    depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
    with torch.no_grad():
        depthwise.weight.mul_(torch.rand_like(depthwise.weight) < density)
    x, model = torch.randn(2, 3, 20, 17), network(nn.Conv2d(3, 16, 3))
    model.append(depthwise)
    assert type(packed_whole(model)[4]) is nn.Conv2d
    packed = packed_whole(model, groups=True)
    assert packed[0].density == 1 and packed[4].vector == 1
    assert packed[4].density == pytest.approx(float((depthwise.weight != 0).float().mean()))
    assert "1 channels in a group" in sparsekd.choices(packed)["4"].reason
    assert packed_whole(nn.Sequential(nn.Conv2d(3, 16, 3)), groups=True) is None
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(sparsekd.to_dense(packed)[4].weight, depthwise.weight)


def test_it_is_fused_where_the_network_is_faster_so(monkeypatch):
    """Times are made up: only the choice is looked at."""

    def compare(engines, **_):
        return {name: type("Timing", (), {"min": 1.0 if name == "packed" else 2.0}) for name in engines}

    monkeypatch.setattr(fusion, "compare", compare)
    x, model = torch.randn(1, 3, 9, 9), network(nn.Conv2d(3, 16, 3))
    fast = sparsekd.optimize_for_inference(model, x, mapping={"2": {"kernel": "sparse"}})
    first = next(module for module in fast.modules() if isinstance(module, FusedConv2d))
    assert first.activation == "relu" and first.conv.in_channels == 3 and first.conv.density == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    chosen = {name: choice.kernel for name, choice in sparsekd.choices(fast).items()}
    assert set(chosen.values()) == {"sparse"} and len(chosen) == 2
    assert F.mse_loss(sparsekd.to_dense(fast)(x), model(x)) < 1e-10
    # Nothing is sparse without it: then the network is left as it is.
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()
    assert not any(isinstance(m, SparseConv2d) for m in sparsekd.optimize_for_inference(plain, x).modules())
