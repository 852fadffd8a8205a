"""Which layers a Pruner takes, and what it refuses."""

import logging

import pytest
import torch
from test_pruner import Network, pruned, sgd
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparsekd.pruning import CubicSL, Pruner

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
    assert pruner.dense_layers == tuple(ALL[index].removesuffix(".weight") for index in dense)


def test_that_the_first_and_the_last_layer_stay_dense_by_default_is_said(caplog):
    with caplog.at_level(logging.INFO, "sparsekd"):
        pruner = Pruner(Network(), 0.5)
        assert "stem, head: stay dense, as the first convolution and the last linear layer" in caplog.text
        assert ", dense: stem, head, step 0" in repr(pruner)
        caplog.clear()
        assert "dense" not in repr(Pruner(Network(), 0.5, ignored_layers=())) and not caplog.records


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
    "pruned": (lambda m: prune.random_unstructured(m.hidden, "weight", 0.5), "nn.utils.prune's: adopt_masks"),
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
