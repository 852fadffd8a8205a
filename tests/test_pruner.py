"""The Pruner's life: made, gathering, pruning, resumed bit for bit, squashed; and the models that it takes."""

import copy
import io
import math
import pickle
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


# --- which layers ----------------------------------------------------------------------------------------------------

ALL = ["stem.weight", "blocks.0.weight", "blocks.2.weight", "hidden.weight", "head.weight"]


@pytest.mark.parametrize(
    ("ignored", "dense"),
    [
        ("first_last", [0, 4]),
        ((), []),
        ([], []),
        ("stem", [0]),
        ("stem.weight", [0]),
        ("blocks", [1, 2]),
        ("blocks.*", [1, 2]),
        ("*.0", [1]),
        (["head", "blocks.2"], [2, 4]),
        (("h*",), [3, 4]),
        (lambda model: model.hidden, [3]),
        (lambda model: model.blocks, [1, 2]),
        (lambda model: [model.head, "stem"], [0, 4]),
        (lambda model: (layer for layer in (model.stem, model.norm)), [0]),
    ],
)
def test_ignored_layers(ignored, dense):
    model = Network()
    pruner = Pruner(model, 0.5, ignored_layers=ignored(model) if callable(ignored) else ignored)
    assert list(pruner.masks) == [name for index, name in enumerate(ALL) if index not in dense]


@pytest.mark.parametrize(
    ("ignored", "error", "message"),
    [
        ("steam", ValueError, "Expected ignored_layers to be in the model, got 'steam'"),
        (["stem", "layer*"], ValueError, r"Expected ignored_layers to be in the model, got 'layer\*'"),
        ("", ValueError, "Expected ignored_layers to be in the model, got ''"),
        (nn.Conv2d(3, 8, 3), ValueError, "Expected ignored_layers to be in the model, got a Conv2d of another model"),
        (None, TypeError, "Expected ignored_layers to be modules, names or globs, got NoneType"),
        (3, TypeError, "Expected ignored_layers to be modules, names or globs, got int"),
        ([None], TypeError, "Expected ignored_layers to hold modules, names or globs, got NoneType"),
        (
            "*",
            ValueError,
            r"Expected a model with prunable .* got none \(ignored: blocks.0, blocks.2, head, hidden, st",
        ),
    ],
)
def test_ignored_layers_that_are_none(ignored, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Pruner(Network(), 0.5, ignored_layers=ignored)


def test_the_model_itself_may_be_the_layer():
    model = nn.Linear(4, 5)
    assert list(Pruner(model, 0.5, ignored_layers=()).masks) == ["weight"]
    with pytest.raises(
        ValueError, match=r"^Expected a model with prunable convolutions or linear layers, got none \(ig"
    ):
        Pruner(model, 0.5)  # it is the last linear layer


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.BatchNorm2d(4), nn.Embedding(3, 4)])
def test_models_without_prunable_weights(model):
    with pytest.raises(ValueError, match=r"or linear layers, got none \(ignored: none\)$"):
        Pruner(model, 0.5, ignored_layers=())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_passed_over():
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 2))
    pruner = Pruner(model, 0.5, ignored_layers=(), importance_steps=1)
    model(torch.ones(2, 4)).sum().backward()
    pruner.step()
    assert list(pruner.masks) == ["2.weight"] and pruner.sparsity() == 0.5
    with pytest.raises(ValueError, match=r"or linear layers, got none \(ignored: none\)$"):
        Pruner(model[:2], 0.5, ignored_layers=())


def test_a_weight_that_an_ignored_layer_shares_stays_dense():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = model[2].weight
    assert list(Pruner(model, 0.5).masks) == ["1.weight"]
    assert list(Pruner(model, 0.5, ignored_layers="0").masks) == ["1.weight"]


def computed(model):
    del model.hidden.weight
    model.hidden.weight = torch.ones(6, 4)


def lazy(model):
    model.hidden = nn.LazyLinear(6)


WRONG = {
    "parametrised": (lambda m: parametrizations.weight_norm(m.hidden), "parametrised one: remove_parametrizations"),
    "pruned": (lambda m: prune.random_unstructured(m.hidden, "weight", 0.5), "nn.utils.prune's: call prune.remove"),
    "spectral": (lambda m: nn.utils.spectral_norm(m.hidden), "Linear that computes it"),
    "computed": (computed, "Linear that computes it"),
    "lazy": (lazy, "a lazy one: run the model on a batch first"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_are_no_plain_parameters(kind):
    change, message = WRONG[kind]
    model = Network()
    change(model)
    with pytest.raises(ValueError, match=rf"^Expected .*hidden.weight.* got .*{message}"):
        Pruner(model, 0.5)
    assert list(Pruner(model, 0.5, ignored_layers="hidden").masks) == [name for name in ALL if "hidden" not in name]


def test_lazy_and_pruned_layers_once_they_are_ready():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.ones(1, 2, 4, 4))
    prune.random_unstructured(model[2], "weight", 0.5)
    prune.random_unstructured(model[2], "bias", 0.5)
    prune.remove(model[2], "weight")  # the bias may stay as it is
    assert list(Pruner(model, 0.5, ignored_layers=()).masks) == ["0.weight", "2.weight"]


def test_frozen_weights_have_a_magnitude():
    model = Network().requires_grad_(False)
    pruner = Pruner(model, 0.5, "magnitude", importance_steps=1)
    pruner.step()
    assert pruner.sparsity() == 0.5 == pruned(pruner) / sum(mask.numel() for mask in pruner.masks.values())


def test_wrappers_are_looked_through():
    model = Network()
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel(model),
        nn.DataParallel(torch.compile(model, backend="eager")),
    ):
        pruner = Pruner(wrapped, 0.5)
        assert list(pruner.masks) == ALL[1:4]


def test_a_block_may_be_wrapped_afterwards():
    model = Network()
    pruner = Pruner(model, 0.5, "magnitude", importance_steps=1)
    model.blocks = torch.compile(model.blocks, backend="eager")
    pruner.step()
    pruner.squash_mask()
    assert pruner.sparsity() == 0.5


REPLACED = {
    "its weight": lambda m: setattr(m.hidden, "weight", nn.Parameter(torch.ones(6, 4))),
    "its layer": lambda m: setattr(m, "hidden", nn.Linear(4, 6)),
    "its block": lambda m: setattr(m, "blocks", nn.Sequential(nn.Conv2d(8, 4, 3))),
    "a layer taken out": lambda m: delattr(m, "hidden"),
    "assign": lambda m: m.load_state_dict(Network().state_dict(), assign=True),
    "parametrised": lambda m: parametrizations.weight_norm(m.hidden),
    "own parametrisation": lambda m: parametrize.register_parametrization(m.hidden, "weight", nn.Identity()),
    "pruned": lambda m: prune.random_unstructured(m.hidden, "weight", 0.5),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_weights_replaced_after_construction(kind):
    """Its masks would hold what the model no longer uses: a dense model, and nobody says so."""
    model = Network()
    pruner = Pruner(model, 0.5, "magnitude", importance_steps=1)
    pruner.step()
    state = pruner.state_dict()
    REPLACED[kind](model)
    for call in (pruner.step, pruner.apply_masks, pruner.squash_mask, lambda: pruner.load_state_dict(state)):
        with pytest.raises(
            RuntimeError, match=r"^Expected \S+.weight to be the Parameter that the Pruner was made with,"
        ):
            call()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "Expected model to be a torch.nn.Module, got NoneType"),
        ({"model": Network().state_dict()}, TypeError, "Expected model to be a torch.nn.Module, got OrderedDict"),
        ({"importance_steps": 0}, ValueError, "Expected importance_steps to be a whole number from 1 on, got 0"),
        ({"importance_steps": True}, ValueError, "Expected importance_steps to be a whole number from 1 on, got True"),
        ({"importance_steps": 2.0}, ValueError, "Expected importance_steps to be a whole number from 1 on, got 2.0"),
        (
            {"schedule": "cubic"},
            TypeError,
            "Expected schedule to be CubicSL, LinearSL, IterativeSL, RigL or None, got str",
        ),
        (
            {"schedule": CubicSL},
            TypeError,
            "Expected schedule to be CubicSL, LinearSL, IterativeSL, RigL or None, got type",
        ),
        (
            {"schedule": CubicSL(0, 5, init_sparsity=0.6)},
            ValueError,
            "Expected init_sparsity of at most sparsity=0.5, got 0.6",
        ),
        ({"optimizer": "sgd"}, TypeError, "Expected optimizer to be a torch.optim.Optimizer, got str"),
        (
            {"optimizer": sgd(Network())},
            ValueError,
            "Expected an optimizer of the prunable weights, got one that holds none of them",
        ),
        (
            {"budget": {"layer9.*": 0.5}},
            ValueError,
            "Expected budget globs that match a prunable layer, got 'layer9.*'",
        ),
        (
            {"budget": ["global"]},
            ValueError,
            "Expected budget to be one of 'global', 'uniform', 'erk' or a dict of name globs",
        ),
        ({"pattern": None}, ValueError, 'Expected pattern to be one of "unstructured", "Vx1"'),
    ],
)
def test_arguments_that_are_refused_leave_nothing_behind(arguments, error, message):
    model = Network()
    with pytest.raises(error) as raised:
        Pruner(**{"model": model, "sparsity": 0.5} | arguments)
    assert str(raised.value).startswith(message)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


# --- resumed ---------------------------------------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, weight_decay=0.1)


TRAININGS = {
    "one shot": (sgd, {"importance_steps": 5}),
    "one shot, adamw": (adamw, {"importance_steps": 5, "budget": "uniform"}),
    "gradual": (adamw, {"schedule": CubicSL(2, 9, init_sparsity=0.2, update_frequency=3)}),
    "magnitude": (sgd, {"schedule": LinearSL(1, 8, update_frequency=2), "importance": "magnitude"}),
    "random": (sgd, {"schedule": CubicSL(1, 8), "importance": "random"}),
    "budget": (sgd, {"importance_steps": 4, "budget": {"blocks.*": numpy.float64(0.9), "h*": 0.5}}),
}


def fresh(kind, seed):
    """Another seed, so that what is not restored shows."""
    torch.manual_seed(seed)
    model = Network()
    optimizer = TRAININGS[kind][0](model)
    return model, optimizer, Pruner(model, 0.7, optimizer=optimizer, ignored_layers=(), **TRAININGS[kind][1])


def states(model, optimizer, pruner):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scale(step):
    return math.inf if step == 3 else 1.0  # a batch that overflows is left out of the means, and counted


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.filterwarnings("ignore:Expected finite gradients")
def test_resumed_at_any_step_bit_for_bit(kind, between):
    """Saved after the Pruner's step, or between the optimiser's and the Pruner's, when a batch is under way."""
    steps = 12

    def run(model, optimizer, pruner, begin, saved=None):
        for step in range(begin, steps):
            if saved is not None or not between or step > begin:
                x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (model(x).square().mean() * scale(step)).backward()
                for parameter in model.parameters():
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimizer.step()
            if saved is not None and between:
                saved.append(through_a_file(states(model, optimizer, pruner)))
            pruner.step()
            if saved is not None and not between:
                saved.append(through_a_file(states(model, optimizer, pruner)))
        return states(model, optimizer, pruner)

    saved = []
    first = fresh(kind, seed=0)
    want = run(*first, 0, saved)
    skipped = first[2].skipped_batches
    assert len(saved) == steps and want["pruner"]["finished"] and skipped <= 1
    for index, state in enumerate(saved):
        model, optimizer, pruner = fresh(kind, seed=100 + index)
        before = copy.deepcopy(state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        assert equal(states(model, optimizer, pruner), before)
        # `equal` goes by bits, so this is not a matter of luck with the rounding.
        assert equal(run(model, optimizer, pruner, index if between else index + 1), want), index
        assert pruner.skipped_batches == skipped
        assert equal(state["pruner"], before["pruner"])  # the state is copied, not shared


def test_lbfgs_resumed_bit_for_bit():
    def fresh():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
        schedule = CubicSL(1, 6, update_frequency=2)
        return model, optimizer, Pruner(model, 0.6, schedule=schedule, optimizer=optimizer, ignored_layers=())

    x, y = torch.randn(16, 6), torch.randn(16, 3)

    def run(model, optimizer, pruner, steps, saved=None):
        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
            pruner.step()
            if saved is not None:
                saved.append(through_a_file(states(model, optimizer, pruner)))
        return states(model, optimizer, pruner)

    saved = []
    want = run(*fresh(), 9, saved)
    for index, state in enumerate(saved):
        model, optimizer, pruner = fresh()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        assert equal(run(model, optimizer, pruner, 8 - index), want), index


def test_a_state_is_no_view_of_what_goes_on():
    model, optimizer, pruner = fresh("gradual", seed=0)
    step_of(model, optimizer, 0)
    pruner.step()
    step_of(model, optimizer, 1)  # a batch under way, and one behind it
    state = pruner.state_dict()
    assert state["gathered"]["sums"] and state["gathered"]["pending"]
    before = copy.deepcopy(state)
    pruner.step()
    for step in range(2, 8):
        step_of(model, optimizer, step)
        pruner.step()
    assert equal(state, before)


def test_an_earlier_state_gathers_again():
    """Back from the end to the middle in the same objects: the hooks are set anew."""
    model, optimizer, pruner = fresh("one shot", seed=0)
    saved, want = None, None
    for turn in range(2):
        for step in range(2 * turn, 8):
            step_of(model, optimizer, step)
            pruner.step()
            if step == 1:
                saved = copy.deepcopy(states(model, optimizer, pruner))
        if turn == 0:
            want = copy.deepcopy(states(model, optimizer, pruner))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            pruner.load_state_dict(saved["pruner"])
            assert pruner.sparsity() == 0 and not pruner.finished
    assert equal(states(model, optimizer, pruner), want)


def test_the_masks_of_a_state_are_applied_at_once():
    model, optimizer, pruner = fresh("magnitude", seed=0)
    for step in range(8):
        step_of(model, optimizer, step)
        pruner.step()
    other, others, its = fresh("magnitude", seed=1)
    step_of(other, others, 0)
    its.load_state_dict(pruner.state_dict())
    for name, mask in pruner.masks.items():
        weight = other.get_parameter(name)
        assert (
            not weight[~mask].any() and weight[mask].all() and not others.state[weight]["momentum_buffer"][~mask].any()
        )


def changed(**parts):
    return lambda state: state | parts


def inside(part, **parts):
    return lambda state: state | {part: state[part] | parts}


def without(part):
    return lambda state: {key: value for key, value in state.items() if key != part}


BROKEN = {
    "a list": lambda state: list(state.items()),
    "none": lambda state: None,
    "empty": lambda state: {},
    "a part less": without("masks"),
    "a part more": changed(version=2),
    "sparsity": inside("settings", sparsity=0.6),
    "importance": inside("settings", importance="magnitude"),
    "pattern": inside("settings", pattern="2:4"),
    "budget": inside("settings", budget="uniform"),
    "schedule": inside("settings", schedule=repr(CubicSL(2, 9))),
    "importance_steps": inside("settings", importance_steps=33),
    "settings": changed(settings=None),
    "a layer more": inside("masks", stranger=torch.ones(2, dtype=torch.bool)),
    "a layer less": lambda state: state | {"masks": without("stem.weight")(state["masks"])},
    "masks of another shape": inside("masks", **{"stem.weight": torch.ones(8, 3, 3, dtype=torch.bool)}),
    "masks of another dtype": inside("masks", **{"stem.weight": torch.ones(8, 3, 3, 3)}),
    "masks that are none": inside("masks", **{"stem.weight": None}),
    "masks": changed(masks=[torch.ones(3)]),
    "steps below 0": changed(steps=-1),
    "steps as text": changed(steps="3"),
    "finished as a number": changed(finished=1),
    "finished too early": changed(finished=True),
    "finished too late": changed(steps=9),
    "nothing gathered": changed(gathered=None),
    "regrown below 0": changed(regrown=-1),
    "a permutation of a stranger": changed(permutations={"stranger": {"order": torch.arange(2)}}),
    "sums of a stranger": lambda state: inside("gathered", sums={"stranger": torch.ones(2)})(state),
    "sums of another shape": lambda state: inside("gathered", sums={"stem.weight": torch.ones(2)})(state),
    "sums of another dtype": lambda state: inside(
        "gathered", sums={"stem.weight": torch.ones(8, 3, 3, 3, dtype=torch.int64)}
    )(state),
    "sums missing": lambda state: inside("gathered", sums={})(state),
    "sums as a list": lambda state: inside("gathered", sums=[])(state),
    "pending of another shape": lambda state: inside("gathered", pending={"stem.weight": torch.ones(2)})(state),
    "batches below 0": lambda state: inside("gathered", batches=-1)(state),
    "batches fewer than seen": lambda state: inside("gathered", batches=0)(state),
    "batches skipped": lambda state: inside("gathered", skipped=1.5)(state),
    "seen by a stranger": lambda state: inside("gathered", seen={"stranger": 1})(state),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_states_of_something_else_change_nothing(kind):
    model, optimizer, pruner = fresh("gradual", seed=0)
    for step in range(4):
        step_of(model, optimizer, step)
        pruner.step()
    state = BROKEN[kind](pruner.state_dict())
    other, others, its = fresh("gradual", seed=1)
    for step in range(3):
        step_of(other, others, step)
        its.step()
    before = copy.deepcopy(states(other, others, its))
    with pytest.raises((TypeError, ValueError), match="^Expected [^\n]*$"):
        its.load_state_dict(state)
    assert equal(states(other, others, its), before)
    # And it goes on as if nothing had happened.
    twin, twins, theirs = fresh("gradual", seed=2)
    for target, part in ((twin, "model"), (twins, "optimizer"), (theirs, "pruner")):
        target.load_state_dict(before[part])
    for step in range(3, 11):
        step_of(other, others, step)
        its.step()
        step_of(twin, twins, step)
        theirs.step()
    assert equal(states(other, others, its), states(twin, twins, theirs))


def test_the_settings_that_differ_are_named():
    state = Pruner(Network(), 0.5, ignored_layers=()).state_dict()
    with pytest.raises(ValueError, match="^Expected the state of a Pruner with sparsity=0.6, got 0.5$"):
        Pruner(Network(), 0.6, ignored_layers=()).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"^Expected the same keys in masks, got \[\] missing and \['stem.weight', 'head"
    ):
        Pruner(Network(), 0.5).load_state_dict(state)


def test_no_warnings_in_an_ordinary_life():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, pruner = fresh("gradual", seed=0)
        for step in range(11):
            step_of(model, optimizer, step)
            pruner.step()
        pruner.squash_mask()
