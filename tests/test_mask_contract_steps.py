"""The mask contract through what happens between two steps: accumulation, scalers, precisions, averages, moves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_mask_contract import backward, batch, check_contract, is_zero, network, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsekd.pruning import CubicSL, Pruner


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_clipping_and_zero_grad(set_to_none):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(model, 0.7, optimizer=optimizer, schedule=CubicSL(1, 4), ignored_layers=())
    for step in range(6):
        optimizer.zero_grad(set_to_none=set_to_none)
        for part in range(3):
            backward(model, 3 * step + part)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        check_contract(pruner, model, optimizer)
        pruner.step()
        check_contract(pruner, model, optimizer)
    assert pruner.finished


def test_steps_without_a_gradient():
    """Where a weight has no part in a batch its momentum stays, or decays; the pruned ones have none."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 2)
    for set_to_none in (False, True):
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        pruner.step()
        check_contract(pruner, model, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_a_skipped_step(fused):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pruner = Pruner(model, 0.7, optimizer=optimizer, schedule=CubicSL(2, 6, update_frequency=2), ignored_layers=())
    before = None
    for step in range(8):
        optimizer.zero_grad()
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y) * (math.inf if step == 4 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == 4:
            before = [parameter.clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        check_contract(pruner, model, optimizer)
        if step == 4:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            with pytest.warns(UserWarning, match="^Expected finite gradients"):
                pruner.step()
        else:
            pruner.step()
        assert check_contract(pruner, model, optimizer) == 6
    assert scaler.get_scale() == 512.0 and pruner.skipped_batches == 1
    assert pruner.finished and pruner.sparsity() == pytest.approx(0.7, abs=0.001)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    """None is autocast to bfloat16 of float32 weights, the others are weights in that precision."""
    model = network() if dtype is None else network().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(model, 0.7, optimizer=optimizer, schedule=CubicSL(1, 5), ignored_layers=())
    for step in range(7):
        optimizer.zero_grad()
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            logits = model(x if dtype is None else x.to(dtype))
            assert logits.dtype == (dtype or torch.bfloat16)
            loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        pruner.step()
        assert check_contract(pruner, model, optimizer) == 3
    assert pruner.finished and model[0].weight.dtype == (dtype or torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(value):
    """NaN times a mask of 0 is NaN. What remains may be lost, what is pruned stays 0."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 2)
    for parameter in model.parameters():
        parameter.grad.fill_(value)
    optimizer.step()
    assert check_contract(pruner, model, optimizer) == 3
    for name, mask in pruner.masks.items():
        assert not model.get_parameter(name)[mask].isfinite().any()


def test_weights_become_plus_zero():
    """-0.0 shows in comparisons of bits, in 1 / w, and in files."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, -1.0, -5.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 2 / 3, "magnitude", optimizer=optimizer, ignored_layers=(), importance_steps=1)
    for _ in range(3):
        model(torch.tensor([[-1.0, -1.0, -1.0]])).sum().backward()
        optimizer.step()
        pruner.step()
        assert model.weight.signbit().tolist() == [[False, False, True]]
        check_contract(pruner, model, optimizer)


def test_weights_loaded_or_moved_behind_its_back():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 1)
    model.load_state_dict(dense)
    pruner.apply_masks()
    check_contract(pruner, model, optimizer)
    model.double()  # the same Parameters with other data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        assert check_contract(pruner, model, optimizer) == 3


@pytest.mark.parametrize("kind", ["mean", "ema", "its module", "its copy in double"])
def test_averaged_models(kind):
    """An average over steps before the pruning is not zero, until the masks are applied to it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 0.7, optimizer=optimizer, schedule=CubicSL(1, 4), ignored_layers=())
    average = AveragedModel(model, multi_avg_fn=None if kind == "mean" else get_ema_multi_avg_fn(0.9))
    for step in range(5):
        train(pruner, model, optimizer, 1, begin=step)
        average.update_parameters(model)
    given = average.module if kind == "its module" else average
    if kind == "its copy in double":
        given = copy.deepcopy(average).double()
    weights = dict((given.module if isinstance(given, AveragedModel) else given).named_parameters())
    assert not any(is_zero(weights[name].detach(), ~mask) for name, mask in pruner.masks.items())
    kept = {name: weights[name][mask].clone() for name, mask in pruner.masks.items()}
    pruner.apply_masks(given)
    assert all(is_zero(weights[name].detach(), ~mask) for name, mask in pruner.masks.items())
    assert all(torch.equal(weights[name][mask], kept[name]) for name, mask in pruner.masks.items())
    if kind != "its copy in double":
        average.update_parameters(model)
        check_contract(pruner, average.module)  # from now on it stays so, as the model has zeros there


def test_averages_of_another_architecture_are_left_as_they_were():
    model = network()
    pruner = Pruner(model, 0.5, "magnitude", ignored_layers=(), importance_steps=1)
    pruner.step()
    other = network()
    other[6] = nn.Linear(8 * 4 * 4, 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"^Expected a model with a parameter 6.weight of shape \(5, 128\), got \(7, "):
        pruner.apply_masks(other)
    del other[6]
    with pytest.raises(ValueError, match=r"parameter 6.weight of shape \(5, 128\), got none$"):
        pruner.apply_masks(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(TypeError, match="^Expected model to be a torch.nn.Module, got OrderedDict$"):
        pruner.apply_masks(before)
