"""Who keeps the masks alive, and that they are the same in several processes."""

import copy
import functools
import gc
import math
import warnings
import weakref

import pytest
import ranks
import torch
import torch.distributed as dist
from test_mask_contract import backward, check_contract, is_zero, network, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekd.pruning import CubicSL, Pruner


def test_the_optimizer_holds_the_masks_when_the_pruner_is_forgotten():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 1)
    masks = pruner.masks
    del pruner
    gc.collect()
    optimizer.step()
    assert all(is_zero(model.get_parameter(name).detach(), ~mask) for name, mask in masks.items())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_all_of_it_can_be_collected(known, kind):
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
    pruner = Pruner(model, 0.5, optimizer=optimizer if known else None, ignored_layers=(), importance_steps=2)

    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(functools.partial(closure, model, optimizer))
        pruner.step()
    kept = [weakref.ref(thing) for thing in (model, model[0].weight, optimizer, pruner)]
    del model, optimizer, pruner
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4


def test_a_pruner_may_be_collected_during_a_step_of_any_optimizer():
    """The collector runs when it likes, also between two of the hooks that torch calls after a step."""
    model = network()
    handles = []
    for _ in range(2):
        pruner = Pruner(model, 0.7, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        handles.append(register_optimizer_step_post_hook(lambda *_: gc.collect()))
    gone = weakref.ref(pruner)
    del pruner
    try:
        other = torch.optim.SGD(network().parameters(), lr=0.1)
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    assert gone() is None


def test_copies_of_the_optimizer_and_the_model_are_free():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 2)
    twin = copy.deepcopy(model)
    twins = torch.optim.SGD(twin.parameters(), lr=0.1)
    backward(twin, 5)
    twins.step()
    assert twin[0].weight.count_nonzero() > model[0].weight.count_nonzero()
    check_contract(pruner, model, copy.deepcopy(optimizer))


# --- several processes -----------------------------------------------------------------------------------------------


def same_on_all_ranks(pruner):
    """All masks of all ranks, compared on each of them."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: mask.clone() for name, mask in pruner.masks.items()})
    return all(torch.equal(masks[name], mask) for masks in everyone for name, mask in everyone[0].items())


def one_rank(rank, folder):
    """Its own seed, its own data; an AssertionError here fails the test."""
    ranks.join(rank, f"{folder}/meeting")
    warnings.simplefilter("ignore")  # of batches left out on purpose
    torch.manual_seed(100 + rank)
    for importance in ("gradient", "magnitude", "random", lambda name, weight, gradient: torch.rand_like(weight)):
        model = nn.parallel.DistributedDataParallel(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = CubicSL(1, 6, update_frequency=2)
        pruner = Pruner(model, 0.7, importance, schedule=schedule, optimizer=optimizer, ignored_layers=())
        assert list(pruner.masks) == ["0.weight", "3.weight", "6.weight"]
        for step in range(8):
            optimizer.zero_grad()
            # A batch that overflows on one rank only does so, averaged, on both; the local one is what is gathered.
            backward(model, 1000 * rank + step, scale=math.inf if (rank, step) == (1, 2) else 1.0)
            for parameter in model.parameters():
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
            check_contract(pruner, model.module, optimizer)
            pruner.step()
            check_contract(pruner, model.module, optimizer)
            assert same_on_all_ranks(pruner), (importance, step)
        total = sum(mask.numel() for mask in pruner.masks.values())
        assert pruner.sparsity() == round(0.7 * total) / total
    # Without DDP the weights differ too, and one rank's second layer has no gradients. microsoft/nni#5205: Taylor
    # scores of each rank's own.
    for importance in ("gradient", "magnitude", "taylor"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        pruner = Pruner(model, 0.5, importance, ignored_layers=(), importance_steps=2)
        for _ in range(2):
            x = torch.randn(4, 6)
            (model(x) if rank == 0 else model[0](x)).square().mean().backward()
            pruner.step()
        assert same_on_all_ranks(pruner) and pruner.sparsity() == 0.5
    # What is wrong on one rank is an error on all of them: none is left waiting (VainF/Torch-Pruning#281, #252).
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    pruner = Pruner(model, 0.5, "magnitude", ignored_layers=(), importance_steps=1)
    if rank == 0:
        model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="Expected scores without NaN, got 1 of 36 NaN in 1.weight"):
        pruner.step()
    assert pruner.masks["1.weight"].all()
    with pytest.raises(RuntimeError, match="got none for 0.weight, 1.weight"):
        Pruner(model, 0.5, ignored_layers=(), importance_steps=1).step()
    # The mean over both ranks by hand: |gradients| (1, 0, 2) and (0, 4, 1) rank the weights 0.5 < 1.5 < 2.
    model, x = nn.Linear(3, 1, bias=False), torch.tensor([[[1.0, 0.0, 2.0], [0.0, -4.0, 1.0]][rank]])
    for importance in ("gradient", lambda name, weight, gradient: x.abs()):
        pruner = Pruner(model, 1 / 3, importance, ignored_layers=(), importance_steps=1)
        model(x).sum().backward()
        pruner.step()
        assert pruner.masks["weight"].tolist() == [[False, True, True]]
        model.zero_grad()
    ranks.leave()


def test_masks_are_the_same_on_all_ranks(tmp_path):
    """huggingface/transformers#29227 asks for one mask of all ranks; neuralmagic/sparseml#429 got several."""
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
