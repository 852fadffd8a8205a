"""What a weight is worth: means of |gradient| over batches, taken as they are, or an error."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

from sparsekd.pruning import IMPORTANCES, CubicSL, Pruner
from sparsekd.pruning.gatherers import GradientGatherer
from sparsekd.pruning.importance import find_importance, score


def line(*weights):
    """y = w·x, whose gradient with respect to w is x."""
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


def feed(model, *values, scale=1.0):
    (model(torch.tensor([values])).sum() * scale).backward()


def gatherer(model):
    found = GradientGatherer({"weight": model.weight})
    found.attach()
    return found


def test_gradient_by_hand():
    """Gradients (1, -2, 0) and (-3, -4, 5): the means of their absolute values are (2, 3, 2.5)."""
    model = line(9.0, 9.0, 9.0)
    gathered = gatherer(model)
    feed(model, 1.0, -2.0, 0.0)
    gathered.take_in()
    model.zero_grad()
    feed(model, -3.0, -4.0, 5.0)
    gathered.take_in()
    assert gathered.means()["weight"].tolist() == [[2.0, 3.0, 2.5]]


def test_pruning_by_gradient_by_hand():
    """The lowest of the means (2, 3, 2.5) goes, though its weight is the largest."""
    model = line(9.0, 1.0, 2.0)
    pruner = Pruner(model, 1 / 3, ignored_layers=(), importance_steps=2)
    for batch in ([1.0, -2.0, 0.0], [-3.0, -4.0, 5.0]):
        feed(model, *batch)
        model.zero_grad()
        pruner.step()
    assert model.weight.tolist() == [[0.0, 1.0, 2.0]]
    assert pruner.masks["weight"].tolist() == [[False, True, True]]


def test_magnitude_by_hand():
    model = line(-9.0, 1.0, -2.0)
    Pruner(model, 0.5, "magnitude", ignored_layers=(), importance_steps=1).step()  # round(1.5) is 2, to the even one
    assert model.weight.tolist() == [[-9.0, 0.0, 0.0]]


def test_accumulation_makes_one_batch():
    """Two halves of a batch add up before the absolute value is taken: 1 - 3 and -2 + 6."""
    model = line(1.0, 1.0)
    gathered = gatherer(model)
    feed(model, 1.0, -2.0)
    feed(model, -3.0, 6.0)
    gathered.take_in()
    assert gathered.means()["weight"].tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("after", ["set_to_none", "zero", "clip", "replace"])
def test_what_becomes_of_the_gradients_afterwards_does_not_matter(after):
    model = line(1.0, 1.0)
    gathered = gatherer(model)
    feed(model, 3.0, -4.0)
    if after == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif after == "replace":
        model.weight.grad = torch.full_like(model.weight, math.nan)
    else:
        model.zero_grad(set_to_none=after == "set_to_none")
    gathered.take_in()
    assert gathered.means()["weight"].tolist() == [[3.0, 4.0]]


def test_a_closure_counts_as_one_batch():
    """LBFGS calls the closure several times for one step; the last gradient is taken."""
    model, calls = line(1.0, 1.0), []
    gathered = gatherer(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 2)) - 5).square().sum()
        loss.backward()
        calls.append(model.weight.grad.abs())
        return loss

    optimizer.step(closure)
    gathered.take_in()
    assert len(calls) > 1 and gathered.batches == 1
    assert torch.equal(gathered.means()["weight"], calls[-1])


def test_a_common_scale_cancels():
    """GradScaler multiplies the loss: the masks stay the same, though the gradients are of another size."""
    masks = []
    for scale in (1.0, 65536.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
        pruner = Pruner(model, 0.6, ignored_layers=(), importance_steps=3)
        for _ in range(3):
            model.zero_grad()
            (model(torch.randn(5, 12)).square().mean() * scale).backward()
            pruner.step()
        masks.append(pruner.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_batch_that_overflows_is_left_out_and_said_once():
    model = line(1.0, 1.0)
    gathered = gatherer(model)
    with pytest.warns(UserWarning, match="^Expected finite gradients, got a batch with non-finite ones") as said:
        for batch in ((2.0, 4.0), (math.inf, 1.0), (1.0, math.nan), (4.0, 2.0)):
            model.zero_grad()
            feed(model, *batch)
            gathered.take_in()
    assert len(said) == 1
    assert (gathered.batches, gathered.skipped) == (2, 2)
    assert gathered.means()["weight"].tolist() == [[3.0, 3.0]]


def test_when_all_batches_overflow_that_is_an_error():
    model = line(1.0, 2.0)
    pruner = Pruner(model, 0.5, ignored_layers=(), importance_steps=1)
    feed(model, math.inf, 1.0)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"got none for weight \(1 batches with non-fin"):
        pruner.step()
    assert model.weight.tolist() == [[1.0, 2.0]]


def test_missing_gradients_are_an_error_not_another_criterion():
    """fasterai's grad_crit and pytorch PR#157620 fall back to magnitude, silently, when .grad is None."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    pruner = Pruner(model, 0.5, ignored_layers=(), importance_steps=2)
    for step in range(2):
        model[0](torch.ones(1, 4)).sum().backward()  # the second layer has no part in it
        if step == 0:
            pruner.step()
    with pytest.raises(RuntimeError, match="^Expected a gradient of each weight to be pruned, got none for 1.weight$"):
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(mask.all() for mask in pruner.masks.values())
    # The step is not over: as soon as there are gradients, the masks are made.
    model(torch.ones(1, 4)).sum().backward()
    pruner.step()
    assert pruner.sparsity() == 0.5 and pruner.finished


def test_steps_without_a_backward_are_an_error():
    pruner = Pruner(line(1.0, 2.0), 0.5, ignored_layers=(), schedule=CubicSL(0, 10))
    with pytest.raises(RuntimeError, match="got none for weight$"):
        for _ in range(10):
            pruner.step()


def test_a_frozen_weight_is_an_error_at_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"got requires_grad=False for 1.weight: name these in ignored_layers"):
        Pruner(model, 0.5, ignored_layers=())
    assert model[0].weight._post_accumulate_grad_hooks is None  # no hook stays behind
    Pruner(model, 0.5, ignored_layers="1")
    Pruner(model, 0.5, "magnitude", ignored_layers=())


def test_a_weight_without_a_part_in_a_batch_has_a_gradient_of_zero_there():
    first, second = line(1.0), line(1.0)
    gathered = GradientGatherer({"first": first.weight, "second": second.weight})
    gathered.attach()
    for step in range(4):
        feed(first, 2.0)
        if step == 0:
            feed(second, 6.0)
        gathered.take_in()
        first.zero_grad()
    assert {name: mean.item() for name, mean in gathered.means().items()} == {"first": 2.0, "second": 1.5}


def test_sums_of_half_precision_do_not_stall():
    """In bfloat16 a sum of ones stops at 256: later batches would count for nothing."""
    model = line(1.0, 1.0).bfloat16()
    gathered = gatherer(model)
    for step in range(600):
        model.zero_grad()
        model(torch.tensor([[1.0, float(step >= 300)]]).bfloat16()).sum().backward()
        gathered.take_in()
    assert gathered.means()["weight"].dtype == torch.float32
    assert gathered.means()["weight"].tolist() == [[1.0, 0.5]]


def test_random_is_the_same_everywhere_and_leaves_torchs_generator_alone():
    """neuralmagic/sparseml#429: processes with different seeds end up with different masks."""
    weights = {"a": nn.Parameter(torch.ones(5, 7)), "b": nn.Parameter(torch.ones(5, 7))}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(score(find_importance("random"), weights, None))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in weights)
    assert not torch.equal(found[0]["a"], found[0]["b"])
    other = score(IMPORTANCES["random"](seed=1), weights, None)
    assert not torch.equal(other["a"], found[0]["a"])


def test_a_callable_gets_name_weight_and_mean_gradient():
    """VainF/Torch-Pruning's Taylor criterion, |w · dL/dw|, in one line of the user's."""
    model, got = line(-9.0, 1.0, 4.0), []

    def taylor(name, weight, gradient):
        got.append((name, weight.requires_grad))
        return (weight * gradient).abs()

    pruner = Pruner(model, 1 / 3, taylor, ignored_layers=(), importance_steps=1)
    feed(model, 1.0, 5.0, 1.0)
    pruner.step()
    assert model.weight.tolist() == [[-9.0, 1.0, 0.0]]
    assert got == [("weight", False)]


def test_a_callable_may_do_without_gradients():
    def negative(name, weight, gradient):
        assert gradient is None
        return -weight

    negative.needs_gradient = False
    model = line(3.0, 1.0, 2.0)
    Pruner(model, 1 / 3, negative, ignored_layers=(), importance_steps=1).step()
    assert model.weight.tolist() == [[0.0, 1.0, 2.0]]


def test_infinite_scores_are_an_order_like_any_other():
    """A callable may protect weights by +inf and give up others by -inf, but what is pruned already goes first."""
    model = line(1.0, 2.0, 3.0, 4.0)
    turns = iter([[5.0, 1.0, math.inf, 2.0], [-math.inf, 9.0, math.inf, 9.0]])

    def importance(name, weight, gradient):
        return torch.tensor([next(turns)])

    importance.needs_gradient = False
    pruner = Pruner(model, 0.5, importance, ignored_layers=(), schedule=CubicSL(1, 2, init_sparsity=0.25))
    pruner.step()
    assert model.weight.tolist() == [[1.0, 0.0, 3.0, 4.0]]
    pruner.step()
    assert model.weight.tolist() == [[0.0, 0.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(3), r"^Expected scores of shape \(1, 3\) for weight, got \(3,\)$"),
        (1.0, r"^Expected scores of shape \(1, 3\) for weight, got float$"),
        (torch.tensor([[1.0, math.nan, 2.0]]), "^Expected scores without NaN, got 1 of 3 NaN in weight$"),
    ],
)
def test_scores_that_are_none_change_nothing(scores, message):
    model = line(1.0, 2.0, 3.0)
    pruner = Pruner(model, 0.5, lambda *_: scores, ignored_layers=(), importance_steps=1)
    feed(model, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=message):
        pruner.step()
    assert model.weight.tolist() == [[1.0, 2.0, 3.0]] and pruner.masks["weight"].all() and not pruner.finished


@pytest.mark.parametrize("importance", ["tailor", "", None, 3, IMPORTANCES["gradient"]])
def test_an_unknown_importance_is_an_error(importance):
    message = "^Expected importance to be one of 'gradient', 'magnitude', 'random', .*'wanda' or a callable, got "
    with pytest.raises(ValueError, match=message):
        Pruner(line(1.0, 2.0), 0.5, importance, ignored_layers=())


def test_the_model_does_not_keep_the_gatherer():
    """A Pruner that is forgotten frees its sums; its hooks then do nothing."""
    model = line(1.0, 2.0)
    pruner = Pruner(model, 0.5, ignored_layers=())
    feed(model, 1.0, 1.0)
    pruner.step()
    kept = weakref.ref(pruner._gatherer)
    del pruner
    gc.collect()
    assert kept() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(model, 1.0, 1.0)
