"""Sensitivity by really pruning, and statistics taken anew."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.distillation.losses import group_lasso, penalty
from sparsekd.pruning import Pruner, recalibrate_batch_norm, sensitivity
from sparsekd.sparse.modules import SparseConv2d

pytestmark = pytest.mark.usefixtures("one_thread")
X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def minus_loss(model):
    with torch.no_grad():
        return -float(F.cross_entropy(model(X), Y))


@pytest.mark.parametrize("importance", ["magnitude", "gradient", "wanda", "random"])
def test_deltas_are_those_of_really_pruning(importance):
    """fasterai PR#40: an analyser by proxy ranked the stem as the most robust."""
    model = network().eval()
    before, batches = copy.deepcopy(model.state_dict()), [(X[:20], Y[:20]), (X[20:], Y[20:])]
    found = sensitivity(model, minus_loss, (0.5, 0.8), importance, batches=batches, ignored_layers="5")
    assert list(found.layers) == ["0.weight", "3.weight"] and found.baseline == minus_loss(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for layer in ("0", "3"):
        for sparsity, value in zip((0.5, 0.8), found.layers[f"{layer}.weight"], strict=True):
            twin = copy.deepcopy(model)
            others = [name for name in ("0", "3", "5") if name != layer]
            pruner = Pruner(twin, sparsity, importance, ignored_layers=others, importance_steps=2)
            for x, y in batches:
                F.cross_entropy(twin(x), y).backward()
                twin.zero_grad()
                pruner.step()
            assert value == minus_loss(twin), (layer, sparsity)


def test_what_is_made_of_it(tmp_path):
    model = network()
    with torch.no_grad():
        model[3].weight[:, 1:] = 0  # half of these can go for nothing
    found = sensitivity(model.eval(), minus_loss, [0.5], pattern="2x1")
    assert found.deltas()["3.weight"] == [0.0] and found.ranking()[-1] != found.ranking()[0]
    assert json.loads(found.to_json())["layers"] == found.layers
    found.save_png(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000


def test_the_model_comes_back_after_an_error():
    model, calls = network(), []

    def fails(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="^Expected a gradient of each weight to be pruned, got none"):
        sensitivity(model, minus_loss, importance="gradient")
    with pytest.raises(ValueError, match=r"^Expected sparsity in \[0, 1\), got 90"):
        sensitivity(model, minus_loss, [90])


# --- batch norm ------------------------------------------------------------------------------------------------------


def test_statistics_are_the_mean_over_the_batches():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[1].eval()
    with torch.no_grad():
        model[2](100 * torch.randn(8, 4))
        parts = [model[0](x) for x in X.split(10)]
    assert recalibrate_batch_norm(model, [(x, None) for x in X.split(10)]) == 1
    torch.testing.assert_close(model[2].running_mean, torch.stack([p.mean(0) for p in parts]).mean(0))
    torch.testing.assert_close(model[2].running_var, torch.stack([p.var(0) for p in parts]).mean(0))
    assert model[2].momentum == 0.1 and model[2].training and not model[1].training
    recalibrate_batch_norm(model, X.split(10), batches=2)
    torch.testing.assert_close(model[2].running_mean, torch.stack([p.mean(0) for p in parts[:2]]).mean(0))
    before = model[2].running_mean.clone()
    with pytest.raises(ValueError, match="^Expected a loader with at least one batch to recalibrate on, got none$"):
        recalibrate_batch_norm(model, [])
    assert torch.equal(model[2].running_mean, before) and recalibrate_batch_norm(nn.Linear(2, 2), []) == 0


# --- group lasso -----------------------------------------------------------------------------------------------------


def test_group_lasso_by_hand():
    """Vectors (3, 4), (0, 0) and, in the last group of one channel, (2) and (0)."""
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 0.0], [2.0, 0.0]]))
    loss = group_lasso(2)(model)
    loss.backward()
    assert loss.item() == pytest.approx(2**0.5 * 5 + 2)
    want = torch.tensor([[2**0.5 * 0.6, 0.0], [2**0.5 * 0.8, 0.0], [1.0, 0.0]])
    assert torch.allclose(model.weight.grad, want)
    assert penalty("group_lasso")(model).item() == pytest.approx(3**0.5 * 29**0.5)


def test_group_lasso_of_packed_and_plain_layers_is_the_same():
    conv = nn.Conv2d(4, 8, 3, groups=2)
    Pruner(conv, 0.5, "magnitude", "4x1", ignored_layers=(), importance_steps=1).step()
    packed = SparseConv2d.from_dense(conv, vector=4)
    assert group_lasso(4)(packed).item() == pytest.approx(group_lasso(4)(conv).item(), rel=1e-5)


def test_group_lasso_of_a_transposed_convolution():
    conv, turned = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(3, 8, 1)
    turned.weight.data.copy_(conv.weight.data.transpose(0, 1))
    assert group_lasso(4)(turned).item() == pytest.approx(group_lasso(4)(conv).item(), rel=1e-6)
