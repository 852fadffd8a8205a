"""Two processes: DDP and FSDP2 make the masks of a single one and hold them."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from sparsekd.pruning import CubicSL, Pruner, RigL

STEPS = 7


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(5, (8,), generator=generator)


KINDS = {
    "gradient": {"importance": "gradient", "schedule": CubicSL(1, 6, update_frequency=2)},
    "taylor": {"importance": "taylor", "pattern": "4x1"},
    "magnitude": {"importance": "magnitude", "pattern": "2x1-permuted"},
    "regrowth": {"importance": "magnitude", "schedule": RigL(1, 6, 2), "budget": "erk"},
    "wanda": {"importance": "wanda", "schedule": CubicSL(1, 6, update_frequency=2)},
}


def trained(kind, model, rows=slice(None)):
    """Losses of each step, the masks and the whole weights; a rank sees its rows of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    settings = {"importance_steps": 3, "ignored_layers": (), "optimizer": optimizer} | KINDS[kind]
    pruner, losses = Pruner(model, 0.6, **settings), []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.detach())
        for name, mask in pruner.masks.items():
            weight = getattr(model, "module", model).get_parameter(name)
            full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            assert not full.detach()[~mask].any(), "pruned weights are zero"
            for value in optimizer.state[weight].values():
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                assert value.dim() == 0 or not value[~mask].any(), "and so is the optimizer's state"
    weights = {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return torch.stack(losses), pruner.masks, weights, pruner


def check_same_on_both_ranks(masks):
    everyone = [None, None]
    dist.all_gather_object(everyone, masks)
    assert all(torch.equal(other[name], mask) for other in everyone for name, mask in masks.items())


def check_same_as_alone(got, want):
    assert all(torch.equal(mask, want[1][name]) for name, mask in got[1].items()), got[3]
    losses = got[0].clone()
    dist.all_reduce(losses)
    assert torch.allclose(losses / 2, want[0], rtol=0, atol=1e-6), "the mean loss of both ranks is the whole batch's"
    assert all(torch.allclose(got[2][name], weight, rtol=0, atol=1e-9) for name, weight in want[2].items())


def one_rank(rank, folder):
    torch.set_num_threads(1)
    # Alone, and before the others are there: nothing is reduced.
    alone = {kind: trained(kind, network()) for kind in KINDS}
    ranks.join(rank, f"{folder}/meeting")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, half = init_device_mesh("cpu", (2,)), slice(4 * rank, 4 * rank + 4)
    for kind in KINDS:
        model = network()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = trained(kind, model, half)
        check_same_on_both_ranks(found[1])
        # FSDP2 averages gradients before they are seen: they are those of the whole batch.
        check_same_as_alone(found, alone[kind])
        found[3].load_state_dict(copy.deepcopy(found[3].state_dict()))
        check_same_on_both_ranks(found[3].masks)
        # Under DDP a rank sees its own gradients: means of |g| over twice as many batches of half the size.
        found = trained(kind, nn.parallel.DistributedDataParallel(network()), half)
        check_same_on_both_ranks(found[1])
        if KINDS[kind]["importance"] == "magnitude" and kind != "regrowth":
            check_same_as_alone(found, alone[kind])
    ranks.leave()


def test_masks_and_losses_of_two_processes(tmp_path):
    """Model-Optimizer PR#2370, sparseml PR#1807: masks of sharded weights that went stale, a sparsity of 0.0."""
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_process_prunes(kind):
    assert trained(kind, network())[3].sparsity() == pytest.approx(0.6, abs=0.03)
