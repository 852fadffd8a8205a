"""Masks of torch.nn.utils.prune and torch.ao.pruning, and the names of torch.ao and torchao."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekd
from sparsekd.interop import (
    BlockSparseConfig,
    NMSparseConfig,
    SparseConfig,
    adopt_masks,
    hold_masks,
    prepare,
    read_masks,
    sparsify_,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_utils(model):
    prune.l1_unstructured(model[2], "weight", 0.75)
    prune.random_structured(model[4], "weight", 0.5, dim=1)


def by_ao(model):
    ao = pytest.importorskip("torch.ao.pruning")
    sparsifier = ao.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(model, [{"tensor_fqn": "4.weight"}])
    sparsifier.step()


def by_both(model):
    prune.l1_unstructured(model[2], "weight", 0.75)
    by_ao(model)


@pytest.mark.parametrize("pruned_by", [by_utils, by_ao, by_both])
def test_masks_are_taken_over_with_the_parameters_of_the_optimizer(model, pruned_by):
    before = {id(parameter) for parameter in model.parameters()}
    pruned_by(model)
    masks = read_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    model(X).sum().backward()
    optimizer.step()  # under the other tool, which leaves momentum at what it pruned
    want = model(X)
    pruner = adopt_masks(model, optimizer)
    assert torch.equal(model(X), want)
    assert {id(parameter) for parameter in model.parameters()} == before
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}
    assert pruner.finished and {name for name, mask in pruner.masks.items() if not mask.all()} == set(masks)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        pruner.step()
    for name, mask in masks.items():
        assert 0 < mask.float().mean() < 1
        weight = model.get_parameter(name)
        assert torch.equal(pruner.masks[name], mask) and not weight[~mask].any() and weight[mask].all()
        assert not optimizer.state[weight]["momentum_buffer"][~mask].any()


def test_reading_changes_nothing(model):
    by_utils(model)
    keys = set(model.state_dict())
    assert set(read_masks(model)) == {"2.weight", "4.weight"} and set(model.state_dict()) == keys
    assert read_masks(nn.Linear(2, 2)) == {}


def test_several_masks_of_torch_on_one_weight_are_one(model):
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    mask = read_masks(model)["2.weight"]
    assert torch.equal(mask, model[2].weight_mask.bool())
    assert torch.equal(adopt_masks(model).masks["2.weight"], mask)


def bias(model):
    prune.random_unstructured(model[2], "bias", 0.5)


def half(model):
    prune.custom_from_mask(model[2], "weight", torch.full_like(model[2].weight, 0.5))


def normed(model):
    by_ao(model)
    parametrizations.spectral_norm(model[4])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda model: None, "Expected a model with masks .*, got none"),
        (bias, "Expected masks on weights of convolutions and linear layers, got one on 2.bias"),
        (half, "Expected a mask of zeros and ones on 2.weight, got other numbers"),
        (normed, "Expected no other parametrisation of 4.weight, got _SpectralNorm"),
    ],
)
def test_what_can_not_be_taken_over_is_left_as_it_was(model, change, said):
    change(model)
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=said):
        adopt_masks(model)
    assert set(model.state_dict()) == keys


def test_masks_from_a_file_are_held(model, tmp_path):
    # VainF/Torch-Pruning#428, microsoft/nni#4422: how to save and load a binary mask.
    masks = {"2.weight": torch.rand(8, 8, 3, 3) < 0.3}
    torch.save(masks, tmp_path / "mask.pth")
    pruner = hold_masks(model, torch.load(tmp_path / "mask.pth", weights_only=True))
    assert torch.equal(pruner.masks["2.weight"], masks["2.weight"])
    assert not model[2].weight[~masks["2.weight"]].any() and model[4].weight.all()
    with pytest.warns(UserWarning, match="got none left in 4.weight"):
        assert not hold_masks(model, {"4.weight": torch.zeros(4, 128).bool()}).masks["4.weight"].any()
    for wrong, said in (
        (
            {"9.weight": torch.ones(2, 2).bool()},
            "Expected masks of weights of .* layers, got one of 9.weight",
        ),
        ({"2.weight": torch.ones(8, 8).bool()}, r"Expected the mask of 2.weight to be \(8, 8, 3, 3\) torch.bool"),
    ):
        with pytest.raises(ValueError, match=said):
            hold_masks(model, wrong)


# --- prepare, step, squash_mask ---


def test_life_cycle_of_torch_ao(model):
    pruner = prepare(
        model, [{"tensor_fqn": "2.weight"}, {"tensor_fqn": ".4.weight", "sparsity_level": 0.75}],
        importance="magnitude", importance_steps=1,
    )  # fmt: skip
    pruner.step()
    pruner.squash_mask()
    assert [float((model[i].weight == 0).float().mean()) for i in (0, 2, 4)] == [0.0, 0.5, 0.75]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}


def test_prepare_without_config_is_the_pruner(model):
    assert set(prepare(model, sparsity=0.8, importance="magnitude").masks) == {"2.weight"}


@pytest.mark.parametrize(
    "config, error, said",
    [
        (["2.weight"], TypeError, "Expected config to hold dicts with a tensor_fqn, got '2.weight'"),
        ([{"tensor_fqn": "2.weight", "zeros_per_block": 4}], ValueError, "got zeros_per_block"),
        ([{"tensor_fqn": "7.weight"}], ValueError, "7.weight"),
    ],
)
def test_prepare_refuses(model, config, error, said):
    with pytest.raises(error, match=said):
        prepare(model, config)


# --- sparsify_ ---


@pytest.mark.parametrize(
    "config, vector",
    [
        (SparseConfig(0.75), 1),
        (SparseConfig(0.75, "4x1"), 4),
        (SparseConfig(0.75, "4x1-permuted"), 4),
        (NMSparseConfig(2, 4), 1),
        (BlockSparseConfig(4, sparsity=0.5), 4),
    ],
)
def test_sparsify_is_in_place_and_gives_what_the_zeros_give(model, config, vector):
    original = model[2].weight.detach().clone()
    got = sparsify_(model, config)
    assert got is model and isinstance(model[2], sparsekd.SparseConv2d) and isinstance(model[0], nn.Conv2d)
    assert model[2].vector == vector and isinstance(model[4], nn.Linear)
    plain = sparsekd.to_dense(model)
    assert float((plain[2].weight == 0).float().mean()) == config.sparsity
    assert torch.equal(plain[2].weight, original * (plain[2].weight != 0))
    assert torch.allclose(model(X), plain(X), atol=1e-5)


def test_filter_fn_is_given_module_and_name(model):
    seen = []

    def linear(module, fqn):
        seen.append((type(module).__name__, fqn))
        return isinstance(module, nn.Linear)

    sparsify_(model, SparseConfig(0.5, swap=False), linear)
    assert seen == [("Conv2d", "0"), ("Conv2d", "2"), ("Linear", "4")]
    assert [float((model[i].weight == 0).float().mean()) for i in (0, 2, 4)] == [0.0, 0.0, 0.5]
    assert type(model[4]) is nn.Linear


def test_zeros_that_are_there_are_those_that_go(model):
    """torchao's own way: prune first, then sparsify_."""
    with torch.no_grad():
        model[4].weight.view(4, 32, 4)[..., :2] = 0
    kept = model[4].weight.detach().clone()
    model = sparsify_(model, NMSparseConfig(2, 4), lambda module, fqn: fqn == "4")
    assert torch.equal(model[4].weight, kept)


@pytest.mark.parametrize(
    "config, error, said",
    [
        ("2:4", TypeError, "Expected config to be a SparseConfig, got str"),
        (
            SparseConfig(importance="gradient"),
            ValueError,
            "Expected an importance of the weights alone, got 'gradient'",
        ),
        (SparseConfig(0.5, "1:4"), ValueError, "Expected sparsity=0.75 with pattern '1:4', got 0.5"),
    ],
)
def test_sparsify_refuses_and_changes_nothing(model, config, error, said):
    before = model[2].weight.detach().clone()
    with pytest.raises(error, match=said):
        sparsify_(model, config)
    assert torch.equal(model[2].weight, before)
