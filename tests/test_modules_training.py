"""SparseConv2d and SparseLinear in training: optimisers, averages, functional calls, several processes."""

import copy
import functools

import pytest
import torch
from conftest import assert_near
from test_modules import indices_of
from test_modules_state import KINDS, assert_same_state, input_of, made, snapshot
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("kind", KINDS)]

# --- optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
        functools.partial(torch.optim.Adam, lr=0.05, weight_decay=0.1, amsgrad=True),
    ],
    ids=["SGD", "AdamW", "Adam"],
)
@pytest.mark.parametrize("vector", [1, 4])
def test_training_is_that_of_a_dense_weight_with_its_mask_held(kind, vector, optimizer):
    module = made(kind, vector=vector, dtype=torch.float64)
    mask, plain = module.mask, module.to_dense()
    plain.weight.register_hook(lambda grad: grad * mask)
    ours, theirs = (optimizer(each.parameters()) for each in (module, plain))
    x = input_of(kind, dtype=torch.float64)
    for _ in range(6):
        for each, stepped in ((module, ours), (plain, theirs)):
            stepped.zero_grad()
            each(x).square().mean().backward()
            nn.utils.clip_grad_norm_(each.parameters(), 0.5)
            stepped.step()
        assert_near(module.weight, plain.weight)
        assert_near(module.bias, plain.bias)
    assert not module.weight[~mask].any()
    # Memory: gradient and state are as large as what is kept (and the padding of the last vectors).
    assert module.values.grad.shape == module.values.shape
    sizes = [tensor.shape for tensor in ours.state[module.values].values() if torch.is_tensor(tensor) and tensor.dim()]
    assert sizes and set(sizes) == {module.values.shape}
    if vector == 1:
        assert module.values.numel() == module.nnz == int(mask.sum()) < mask.numel() / 2


def test_frozen_weights_take_no_gradient(kind):
    module = made(kind)
    module.values.requires_grad_(False)
    x = input_of(kind, requires_grad=True)
    module(x).sum().backward()
    assert module.values.grad is None and module.bias.grad is not None and x.grad is not None


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(kind, use_buffers, decay):
    """0.9 and 0.9999 of an integer and the rest of it add up to less than it, in floating point."""
    model = nn.Sequential(
        made(kind, vector=2, permute=True), nn.BatchNorm2d(6) if kind == "conv" else nn.BatchNorm1d(6)
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = model[0].values.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        model(input_of(kind)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        want = model[0].values.detach().clone() if step == 0 else decay * want + (1 - decay) * model[0].values.detach()
        average.eval()  # an evaluation, while the model goes on training
        average(input_of(kind))
    assert_near(average.module[0].values, want)
    for left, right in zip(indices_of(average.module[0]), indices_of(model[0]), strict=True):
        assert torch.equal(left, right)
    assert average.module[1].running_var.ne(1).all()


def test_an_average_over_state_dicts(kind):
    """Written by hand, over everything, integers too."""
    model, average = made(kind), made(kind)
    with torch.no_grad():
        model.values.add_(1)
    want = 0.9 * average.values.detach() + 0.1 * model.values.detach()
    before = [tensor.clone() for tensor in indices_of(average)[:2]]
    with torch.no_grad():
        for left, right in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            left.copy_(0.9 * left + 0.1 * right)
    assert_near(average.values, want)
    assert all(torch.equal(left, right) for left, right in zip(indices_of(average)[:2], before, strict=True))


# --- functions and processes -----------------------------------------------------------------------------------------


def test_functional_call(kind):
    module, other = made(kind), made(kind)
    with torch.no_grad():
        other.values.mul_(2)
    x = input_of(kind, requires_grad=True)
    before = snapshot(module)
    for state in (dict(other.named_parameters()), other.state_dict()):
        assert torch.equal(functional_call(module, state, x), other(x))
    # Another pattern with as many weights: its input gradient does not follow the module's own plan.
    moved = made(kind)
    state = moved.state_dict()
    columns = moved.weight[0].numel()
    moved.load_state_dict(state | {"col_indices": columns - 1 - state["col_indices"]})
    got, want = functional_call(module, moved.state_dict(), x), moved(x)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(output.square().sum(), x)[0] for output in (got, want)))
    assert_same_state(module, before)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(kind, one_process):
    model = nn.Sequential(made(kind, vector=2), nn.Flatten())
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (parallel, alone)]
    for _ in range(3):
        x = input_of(kind)
        for each, optimizer in zip((parallel, alone), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    for left, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert_near(left, right)
    assert list(parallel.state_dict()) == ["module." + name for name in alone.state_dict()]
    parallel.load_state_dict({"module." + name: tensor for name, tensor in alone.state_dict().items()})
