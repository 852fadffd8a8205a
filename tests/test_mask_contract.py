"""The mask contract: after every step of an optimiser pruned weights are +0.0, and so is its state at them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.pruning import CubicSL, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5),
    )  # fmt: skip


def batch(step, rows=4):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 3, 6, 6, generator=generator), torch.randint(5, (rows,), generator=generator)


def backward(model, step, scale=1.0):
    x, y = batch(step)
    (F.cross_entropy(model(x), y) * scale).backward()


def is_zero(value, where):
    """+0.0, not -0.0, in all those places."""
    return bool((value[where] == 0).all()) and not bool(value[where].signbit().any())


def check_contract(pruner, model, *optimizers):
    """How many tensors of the optimisers' states were looked at: none would prove nothing."""
    weights, looked_at = dict(model.named_parameters(remove_duplicate=False)), 0
    for name, mask in pruner.masks.items():
        weight = weights[name]
        assert is_zero(weight.detach(), ~mask), name
        for optimizer in optimizers:
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert is_zero(value, ~mask), f"{key} of {name}"
                    looked_at += 1
    return looked_at


def train(pruner, model, optimizer, steps, begin=0):
    """Checks the contract after each step of the optimizer, before the Pruner has its turn, and after that."""
    looked_at = 0
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        looked_at += check_contract(pruner, model, optimizer)
        pruner.step()
        looked_at += check_contract(pruner, model, optimizer)
    return looked_at


def live(pruner):
    return {name: int(mask.sum()) for name, mask in pruner.masks.items()}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1, weight_decay=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, t0=2, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


@pytest.fixture(params=OPTIMIZERS)
def optimizer_of(request):
    return OPTIMIZERS[request.param]


# --- optimisers ------------------------------------------------------------------------------------------------------


def test_by_hand():
    """A momentum of 2 would move the pruned weight on (he-y/FPGM#47, jacobgil/pytorch-pruning#41)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 4.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    pruner = Pruner(model, 0.5, "magnitude", optimizer=optimizer, ignored_layers=(), importance_steps=1)
    model(torch.tensor([[2.0, 2.0]])).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[0.0, 3.0]]
    pruner.step()
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[0.0, 2.0]]
    optimizer.step()  # the momentum is 0.5 * 2 + 2
    assert model.weight.tolist() == [[0.0, 1.5]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[0.0, 3.0]]


def test_holds_through_gradual_pruning(optimizer_of):
    """OPTML-Group/Unlearn-Saliency#32: weight decay and momentum change masked parameters, until both are cleared."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    pruner = Pruner(model, 0.8, optimizer=optimizer, schedule=CubicSL(2, 8, update_frequency=2), ignored_layers=())
    looked_at = train(pruner, model, optimizer, 10)
    total = sum(mask.numel() for mask in pruner.masks.values())
    assert sum(live(pruner).values()) == total - round(0.8 * total)
    assert looked_at > 0 or not any(optimizer.state.values())


def test_what_remains_trains_as_if_the_others_were_not_there(optimizer_of):
    """Bit for bit as with gradients of zero at pruned weights, where nothing has to be held."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    pruner = Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    train(pruner, model, optimizer, 2)
    twin = copy.deepcopy(model)
    twins = optimizer_of(twin.parameters())
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(pruner, model, optimizer, 3, begin=2)
    weights = dict(twin.named_parameters())
    for step in range(2, 5):
        twins.zero_grad()
        backward(twin, step)
        for name, mask in pruner.masks.items():
            weights[name].grad[~mask] = 0
        twins.step()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", ["Adafactor", "Muon"])
def test_weights_stay_zero_where_the_state_has_no_entries_of_theirs(kind):
    """Adafactor keeps sums of rows and columns, Muon's update mixes all entries."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    pruner = Pruner(model, 0.6, "magnitude", optimizer=optimizer, ignored_layers=(), importance_steps=1)
    for step in range(4):
        model.zero_grad()
        model(batch(step)[0][:, 0]).square().mean().backward()
        optimizer.step()
        pruner.step()
        check_contract(pruner, model, optimizer)
        assert pruner.sparsity() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("known", [True, False])
def test_lbfgs(line_search, known):
    """Its state is in flat vectors over all parameters; here [bias 2 | first 4 x 6 | second 3 x 4]."""
    first, second = nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)
    bias = nn.Parameter(torch.zeros(2))
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer = torch.optim.LBFGS([bias, *model.parameters()], lr=0.2, max_iter=4, line_search_fn=line_search)
    given = optimizer if known else None
    pruner = Pruner(model, 0.5, schedule=CubicSL(1, 5, update_frequency=2), optimizer=given, ignored_layers=())
    x, y, vectors = torch.randn(16, 6), torch.randn(16, 3), 0

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() + (bias - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(9):
        optimizer.step(closure)
        pruner.step()
        check_contract(pruner, model)
        begin = 2
        for layer, name in ((first, "0.weight"), (second, "2.weight")):
            pruned = ~pruner.masks[name].flatten()
            state = optimizer.state[bias]
            for vector in (state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]):
                assert vector.shape == (38,)
                assert is_zero(vector[begin : begin + layer.weight.numel()], pruned)
                vectors += int(pruned.any())
            begin += layer.weight.numel()
    assert pruner.sparsity() == 0.5 and vectors > 20


def test_lbfgs_finds_the_minimum_over_what_remains():
    """It searches where the pruned weights are 0: elsewhere lies a lower minimum, that the mask would then spoil."""
    model = nn.Linear(6, 1, bias=False).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    y = torch.randn(20, 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    pruner = Pruner(model, 0.5, "magnitude", optimizer=optimizer, ignored_layers=(), importance_steps=2)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
        pruner.step()
    kept = pruner.masks["weight"][0]
    want = torch.linalg.lstsq(x[:, kept], y).solution[:, 0]
    # As near as its own tolerance_change of 1e-9 lets it come.
    torch.testing.assert_close(model.weight[0, kept].detach(), want, rtol=0, atol=1e-6)


def test_lbfgs_begins_anew_after_pruning():
    """What it learnt of the curvature was that of another function: from here on it steps as a new one does."""
    model, x, y = nn.Linear(6, 1, bias=False), torch.randn(20, 6), torch.randn(20, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    pruner = Pruner(model, 0.5, "magnitude", optimizer=optimizer, ignored_layers=(), importance_steps=2)

    def closure(model, optimizer, mask):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        loss.backward()
        model.weight.grad[~mask] = 0
        return loss

    for _ in range(2):
        optimizer.step(lambda: closure(model, optimizer, torch.ones(1, 6, dtype=torch.bool)))
        pruner.step()
    twin, mask = copy.deepcopy(model), pruner.masks["weight"]
    twins = torch.optim.LBFGS(twin.parameters(), max_iter=3)
    for _ in range(2):
        optimizer.step(lambda: closure(model, optimizer, torch.ones(1, 6, dtype=torch.bool)))
        pruner.step()
        twins.step(lambda: closure(twin, twins, mask))
        assert torch.equal(model.weight, twin.weight)


# --- several optimisers, groups, weights in many places ---------------------------------------------------------------


def test_parameter_groups():
    model = network()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[3].parameters(), "weight_decay": 0.5}], lr=0.01
    )
    pruner = Pruner(model, 0.6, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    train(pruner, model, optimizer, 3)
    optimizer.add_param_group({"params": list(model[6].parameters()), "lr": 0.1})
    assert train(pruner, model, optimizer, 3, begin=3) == 6 * 3 * 2


@pytest.mark.parametrize("known", [0, 1, None])
def test_weights_of_two_optimizers(known):
    """Those that the Pruner was not given are held too, whichever steps last."""
    model = network()
    pair = (
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam([*model[3].parameters(), *model[6].parameters()], lr=0.01),
    )
    optimizer = None if known is None else pair[known]
    pruner = Pruner(model, 0.6, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    for step in range(5):
        model.zero_grad()
        backward(model, step)
        for one in pair:
            one.step()
            check_contract(pruner, model, one)
        pruner.step()
        assert check_contract(pruner, model, *pair) == 1 + 2 * 2
    assert pruner.finished


def test_two_optimizers_of_the_same_weights():
    model = network()
    pair = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2)]
    pruner = Pruner(model, 0.6, optimizer=pair[0], ignored_layers=(), importance_steps=1)
    for step in range(3):
        for one in pair:
            one.zero_grad()
            backward(model, step)
            one.step()
            check_contract(pruner, model, one)
        pruner.step()
        assert check_contract(pruner, model, *pair) == 6


def test_an_optimizer_made_after_pruning():
    """Another phase of the training, with another optimizer."""
    model = network()
    first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 0.6, optimizer=first, ignored_layers=(), importance_steps=1)
    train(pruner, model, first, 2)
    second = torch.optim.Adam(model.parameters(), lr=0.01)
    assert train(pruner, model, second, 3, begin=2) == 3 * 2 * 3 * 2


def test_weights_moved_without_an_optimizer_of_torchs():
    model = network()
    pruner = Pruner(model, 0.6, ignored_layers=(), importance_steps=1)
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        pruner.step()
        check_contract(pruner, model)
    assert pruner.sparsity() == pytest.approx(0.6, abs=0.001)


def test_optimizers_of_other_models_are_left_alone():
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, 0.6, optimizer=optimizer, ignored_layers=(), importance_steps=1)
    train(pruner, model, optimizer, 1)
    others = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    backward(other, 0)
    others.step()
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    assert not any(bool((parameter == 0).any()) for parameter in other[0].parameters())


def test_shared_weights_are_pruned_once_and_held():
    """pytorch/pytorch#61112: prune gives each module that shares a weight a copy of its own."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[4].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, 0.5, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step)[0][:, 0]).square().mean().backward()
        optimizer.step()
        pruner.step()
        check_contract(pruner, model, optimizer)
    assert list(pruner.masks) == ["0.weight", "2.weight"] and pruner.sparsity() == 0.5
    assert model[4].weight is model[0].weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_weights(when):
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    if when == "before":
        model.to(memory_format=torch.channels_last)
    pruners = []
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        pruners.append(Pruner(one, 0.6, "random", optimizer=optimizer, ignored_layers=(), importance_steps=1))
        if one is model and when == "after":
            one.to(memory_format=torch.channels_last)
        assert train(pruners[-1], one, optimizer, 3) == 3 * 3 * 2 * 2
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    if when == "before":
        assert pruners[0].masks["3.weight"].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(pruners[0].masks[name], pruners[1].masks[name]) for name in pruners[0].masks)


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_one_and_three_dimensions(dims):
    conv = (nn.Conv1d, nn.Conv3d)[dims == 3]
    model = nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 3, 2))
    if dims == 3:
        model.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, 0.75, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 2, *[6] * dims)).square().mean().backward()
        optimizer.step()
        pruner.step()
        check_contract(pruner, model, optimizer)
    assert pruner.sparsity() == 0.75
