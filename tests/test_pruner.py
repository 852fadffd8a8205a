"""The Pruner's life: made, gathering, pruning, resumed bit for bit, squashed; and the models that it takes."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from sparsekd.pruning import CubicSL, LinearSL, Pruner
from sparsekd.pruning.schedule import SparsitySchedule

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """Names as in torchvision's models: a stem, blocks, a head. 216 + 144 + 144 + 24 + 12 prunable weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
        self.norm = nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x).relu())).mean((2, 3))
        return self.head(self.hidden(x).relu())


def step_of(model, optimizer, step, scale=1.0):
    """A batch that depends on the step alone."""
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(x).square().mean() * scale).backward()
    optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def pruned(pruner):
    return sum(int((~mask).sum()) for mask in pruner.masks.values())


def equal(a, b):
    """Whether two states agree in every bit: tensors, numbers, and all that holds them."""
    if isinstance(a, torch.Tensor):
        # Through their bits, for NaN is not equal to itself, and -0.0 is to 0.0.
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- life ------------------------------------------------------------------------------------------------------------


def test_one_shot():
    model = Network()
    optimizer = sgd(model)
    pruner = Pruner(model, 0.75, optimizer=optimizer, ignored_layers=(), importance_steps=4)
    total = 216 + 144 + 144 + 24 + 12
    for step in range(7):
        assert pruner.finished == (step >= 4)
        assert pruned(pruner) == (round(0.75 * total) if step >= 4 else 0)
        assert all(mask.dtype == torch.bool for mask in pruner.masks.values())
        step_of(model, optimizer, step)
        pruner.step()
    assert pruner.sparsity() == round(0.75 * total) / total
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert pruner.sparsity(total=True) == round(0.75 * total) / parameters
    assert all(weight._post_accumulate_grad_hooks == {} for weight in pruner._weights.values())


@pytest.mark.parametrize("importance", ["gradient", "magnitude", "random"])
@pytest.mark.parametrize("budget", ["global", "uniform", {"blocks.*": 0.9, "hidden": 0.5}])
@pytest.mark.parametrize("kind", [CubicSL, LinearSL])
def test_gradual(kind, budget, importance):
    """Exact counts at every update, nothing between two of them, and what is pruned stays so."""
    model = Network()
    optimizer = sgd(model)
    schedule = kind(start=2, end=9, init_sparsity=0.3, update_frequency=3)
    pruner = Pruner(model, 0.8, importance, budget=budget, schedule=schedule, optimizer=optimizer)
    sizes = {name: mask.numel() for name, mask in pruner.masks.items()}
    assert list(sizes) == ["blocks.0.weight", "blocks.2.weight", "hidden.weight"]
    finals = {"blocks.0.weight": 0.9, "blocks.2.weight": 0.9, "hidden.weight": 0.5}
    now, before = 0.0, pruner.masks
    for step in range(1, 12):
        step_of(model, optimizer, step)
        pruner.step()
        if step in (2, 5, 8, 9):
            now = (step - 2) / 7
        left = (1 - now) ** 3 if kind is CubicSL else 1 - now

        def at(final, left=left, step=step):
            return final + (0.3 - final) * left if step >= 2 else 0.0

        if budget == "global":
            assert pruned(pruner) == round(at(0.8) * sum(sizes.values()))
        else:
            for name, mask in pruner.masks.items():
                final = 0.8 if budget == "uniform" else finals[name]
                assert int((~mask).sum()) == round(at(final) * sizes[name]), (step, name)
        assert all(not bool((mask & ~before[name]).any()) for name, mask in pruner.masks.items())
        if step not in (2, 5, 8, 9):
            assert equal(pruner.masks, before)
        before = pruner.masks
    assert pruner.finished


def test_what_is_pruned_stays_so_whatever_the_schedule_asks_for():
    """One layer's share falls while that of all rises: that layer keeps its mask."""

    class Seesaw(SparsitySchedule):
        def sparsity_at(self, step, final):
            return {1: 0.5, 2: 0.25 if final == 0.5 else 0.9}[step]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    pruner = Pruner(model, 0.9, "magnitude", budget={"0": 0.5, "1": 0.9}, schedule=Seesaw(0, 2), ignored_layers=())
    pruner.step()
    first = pruner.masks
    assert [int((~mask).sum()) for mask in first.values()] == [8, 10]
    pruner.step()
    assert torch.equal(pruner.masks["0.weight"], first["0.weight"])
    assert int((~pruner.masks["1.weight"]).sum()) == 18 and not bool(
        (pruner.masks["1.weight"] & ~first["1.weight"]).any()
    )


@pytest.mark.parametrize("schedule", [None, CubicSL(0, 4)])
def test_a_sparsity_of_zero_prunes_nothing(schedule):
    model = Network()
    optimizer = sgd(model)
    pruner = Pruner(model, 0, schedule=schedule, optimizer=optimizer, ignored_layers=(), importance_steps=4)
    for step in range(5):
        step_of(model, optimizer, step)
        pruner.step()
    assert pruner.finished and pruner.sparsity() == 0 and all(mask.all() for mask in pruner.masks.values())


def test_gathering_begins_anew_at_each_update():
    """Gradients (9, 1, 1, 0) rank the weights at the first update; at the second only those since then count."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    pruner = Pruner(model, 0.5, schedule=LinearSL(1, 3, init_sparsity=0.25, update_frequency=2), ignored_layers=())
    for x, want in (
        ([9.0, 1.0, 1.0, 0.0], [True, True, True, False]),
        ([0.0, 1.0, 2.0, 9.0], [True, True, True, False]),
        ([0.5, 1.0, 2.0, 9.0], [False, True, True, False]),
    ):
        model.zero_grad()
        model(torch.tensor([x])).sum().backward()
        pruner.step()
        assert pruner.masks["weight"][0].tolist() == want


def test_movement_is_of_the_whole_way():
    """w dL/dw of (9, 8, -1, 0) at first, (0, 1, 2, 1) then: since the last update the third moves most towards zero,
    in all it is the second."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    schedule = LinearSL(1, 3, init_sparsity=0.25, update_frequency=2)
    pruner = Pruner(model, 0.5, "movement", schedule=schedule, ignored_layers=())
    for x in ([9.0, 8.0, -1.0, 0.0], [0.0, 1.0, 2.0, 1.0], [0.0, 1.0, 2.0, 1.0]):
        model.zero_grad()
        model(torch.tensor([x])).sum().backward()
        pruner.step()
    assert pruner.masks["weight"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("kind", ["frozen", "NaN"])
def test_an_error_at_a_later_update_leaves_the_masks_of_the_earlier(kind):
    model = Network()
    optimizer = sgd(model)
    importance = {"frozen": "gradient", "NaN": "magnitude"}[kind]
    schedule = CubicSL(1, 4, init_sparsity=0.4, update_frequency=3)
    pruner = Pruner(
        model, 0.75, importance, budget="uniform", schedule=schedule, optimizer=optimizer, ignored_layers=()
    )
    step_of(model, optimizer, 1)
    pruner.step()
    masks, bias = pruner.masks, model.hidden.bias.clone()
    # What goes wrong here goes wrong after the first update and before the second, at step 4.
    model.hidden.weight.requires_grad_(kind != "frozen")
    for step in (2, 3, 4):
        step_of(model, optimizer, step)
        if step < 4:
            pruner.step()
    alive = masks["hidden.weight"].nonzero()[0]
    kept = model.hidden.weight[tuple(alive)].item()
    if kind == "NaN":
        model.hidden.weight.data[tuple(alive)] = math.nan
    message = {"frozen": "got none for hidden.weight$", "NaN": "got 1 of 24 NaN in hidden.weight$"}[kind]
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            pruner.step()
    assert equal(pruner.masks, masks) and not pruner.finished and not torch.equal(model.hidden.bias, bias)
    # Once it is put right the same step is done.
    model.hidden.weight.requires_grad_(True)
    model.hidden.weight.data[tuple(alive)] = kept
    step_of(model, optimizer, 4)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    pruner.step()
    assert pruner.finished and pruner.sparsity() == 0.75


def test_squash():
    model = Network()
    optimizer = sgd(model)
    keys, hooks = list(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    pruner = Pruner(model, 0.75, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    for step in range(3):
        step_of(model, optimizer, step)
        pruner.step()
    masks, sparsity, before = pruner.masks, pruner.sparsity(), copy.deepcopy(model.state_dict())
    pruner.squash_mask()
    pruner.squash_mask()
    assert pruner.masks == {} and pruner.sparsity() == sparsity
    # Nothing of ours is in the model, now or before.
    assert equal(model.state_dict(), before) and list(before) == keys
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not optimizer._optimizer_step_post_hooks
    for call in (pruner.step, pruner.apply_masks, pruner.state_dict, lambda: pruner.load_state_dict({})):
        with pytest.raises(
            RuntimeError, match=r"^Expected \w+\(\) before squash_mask\(\), got a Pruner without masks$"
        ):
            call()
    assert "Pruner(sparsity=0.75" in repr(pruner)
    step_of(model, optimizer, 9)
    assert all(bool(model.get_parameter(name)[~mask].count_nonzero()) for name, mask in masks.items())


def test_squash_while_gathering_drops_the_hooks():
    model = Network()
    optimizer = sgd(model)
    pruner = Pruner(model, 0.75, optimizer=optimizer)
    step_of(model, optimizer, 0)
    pruner.squash_mask()
    before = copy.deepcopy(pruner._gatherer.state_dict())
    step_of(model, optimizer, 1)
    assert equal(pruner._gatherer.state_dict(), before) and pruner.sparsity() == 0


def test_it_can_be_neither_copied_nor_pickled():
    pruner = Pruner(Network(), 0.5)
    for call in (copy.copy, copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
        with pytest.raises(
            TypeError, match=r"^Expected a Pruner to be saved by state_dict\(\), got copy or pickle: it"
        ):
            call(pruner)


def test_the_model_can_be_copied_pickled_and_saved_meanwhile():
    model = Network()
    optimizer = sgd(model)
    pruner = Pruner(model, 0.75, optimizer=optimizer, ignored_layers=(), importance_steps=2)
    for step in range(4):
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (twin, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert equal(other.state_dict(), model.state_dict())
            assert not other.stem.weight._post_accumulate_grad_hooks
        step_of(model, optimizer, step)
        pruner.step()
