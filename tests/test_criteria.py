"""Each importance against a brute-force computation: sample by sample, weight by weight, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.pruning import LinearSL, Pruner
from sparsekd.pruning.gatherers import mean_square_inputs
from sparsekd.pruning.importance import find_importance

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)
    )


def batches(count=3, rows=5):
    return [(torch.randn(rows, 2, 6, 6), torch.randint(3, (rows,))) for _ in range(count)]


def scores_of(importance, model, given, mixed=()):
    """What the Pruner hands on: seen through a pattern that keeps the scores."""
    seen = {}
    found = find_importance(importance)

    def watched(name, weight, statistic):
        seen[name] = found(name, weight, statistic)
        return seen[name]

    watched.statistic = getattr(found, "statistic", "|g|")
    pruner = Pruner(model, 0.5, watched, ignored_layers=(), importance_steps=len(given))
    for x, y in given:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step()
    return seen


BY_BATCH = {
    "gradient": lambda w, gradients: sum(g.abs() for g in gradients) / len(gradients),
    "taylor": lambda w, gradients: sum((w * g).abs() for g in gradients) / len(gradients),
    "snip": lambda w, gradients: (sum(w * g for g in gradients) / len(gradients)).abs(),
    "movement": lambda w, gradients: -sum(w * g for g in gradients) / len(gradients),
    "fisher": lambda w, gradients: w * w / 2 * sum(g * g for g in gradients) / len(gradients),
}


@pytest.mark.parametrize("importance", BY_BATCH)
def test_gradients_by_brute_force(importance):
    model, given = network(), batches()
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    twin = network().double()
    twin.load_state_dict(before)
    gradients = []
    for x, y in given:
        samples = []
        for row in range(len(y)):
            loss = F.cross_entropy(twin(x[row : row + 1].double()), y[row : row + 1])
            samples.append(torch.autograd.grad(loss, list(twin.parameters())))
        gradients.append([sum(parts) / len(y) for parts in zip(*samples, strict=True)])
    got = scores_of(importance, model, given)
    names = [name for name, _ in twin.named_parameters()]
    assert list(got) == ["0.weight", "2.weight", "4.weight"]
    for name in got:
        own = [parts[names.index(name)] for parts in gradients]
        want = BY_BATCH[importance](before[name], own)
        assert float((got[name].double() - want).abs().max()) < 1e-6


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 0), dilation=2), (2, 3, 9, 8)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 2, 3, 3, 3)),
    "one image": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_by_brute_force(kind):
    """What a weight multiplies: the derivative of each output with respect to it, one by one."""
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    got = mean_square_inputs(layer, x).expand(layer.weight.shape)
    out = layer(x)
    channel = -1 if isinstance(layer, nn.Linear) else out.dim() - (layer.weight.dim() - 2) - 1
    for k in range(layer.weight.shape[0]):
        met = [torch.autograd.grad(o, layer.weight, retain_graph=True)[0][k] for o in out.select(channel, k).flatten()]
        want = torch.stack(met).square().mean(0)
        assert float((got[k] - want).abs().max()) < 1e-10


def test_wanda_of_a_transposed_convolution_is_by_input_channel():
    layer, x = nn.ConvTranspose2d(3, 4, 2), torch.randn(2, 3, 4, 4)
    got = mean_square_inputs(layer, x).expand(layer.weight.shape)
    assert torch.allclose(got[1], x[:, 1].square().mean().expand(4, 2, 2))


def test_wanda_needs_forwards_only():
    """Means over batches, accumulated forwards as one batch; validation on the way is left out."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 2.0, 1.0]]))
    pruner = Pruner(model, 1 / 3, "wanda", ignored_layers=(), importance_steps=2)
    for x in (torch.tensor([[1.0, 1.0, 6.0]]), torch.tensor([[1.0, 1.0, 0.0]])):
        with torch.no_grad():
            model(x)
            model(x)
            model.eval()
            model(100 * torch.tensor([[0.0, 9.0, 0.0]]))
            model.train()
        pruner.step()
    # Root mean squares 1, 1 and sqrt(18): 3, 2, 4.2.
    assert model.weight.tolist() == [[3.0, 0.0, 1.0]]


def test_wanda_without_a_forward_is_an_error():
    pruner = Pruner(nn.Linear(3, 3), 0.5, "wanda", ignored_layers=(), importance_steps=1)
    with pytest.raises(RuntimeError, match="^Expected inputs of each layer to be pruned, got none for weight$"):
        pruner.step()


def test_a_scale_that_changes_on_the_way():
    """AMP: the scale grows between two batches; unscaled, the means are those of the gradients."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, 1 / 3, optimizer=optimizer, ignored_layers=(), importance_steps=2, scaler=scaler)
    for x in ([2.0, 5.0, 6.0], [4.0, 0.0, 3.0]):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([x])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    # Means 3, 2.5 and 4.5; with the scales 1024 and 2048 the first would be the lowest but for the unscaling: 10 < 13.
    assert pruner.masks["weight"].tolist() == [[True, False, True]] and scaler.get_scale() == 4096.0


@pytest.mark.filterwarnings("ignore:Expected finite gradients")
def test_an_overflow_puts_off_an_update():
    """GradScaler begins with a scale that overflows: no batch is in the means, and no mask is made of nothing."""
    model = nn.Linear(4, 1, bias=False)
    pruner = Pruner(model, 0.5, schedule=LinearSL(1, 3, init_sparsity=0.25), ignored_layers=())
    for x, kept in (([torch.inf, 1.0, 1.0, 1.0], 4), ([3.0, 1.0, 2.0, 4.0], 2)):
        model.zero_grad()
        model(torch.tensor([x])).sum().backward()
        pruner.step()
        assert int(pruner.masks["weight"].sum()) == kept
    # The last one can't wait.
    pruner = Pruner(nn.Linear(4, 1), 0.5, schedule=LinearSL(0, 1), ignored_layers=())
    pruner._model(torch.full((1, 4), torch.inf)).sum().backward()
    with pytest.raises(RuntimeError, match="^Expected a gradient of each weight to be pruned, got none"):
        pruner.step()


@pytest.mark.parametrize("statistic", ["g", "|x|", 3])
def test_unknown_statistics(statistic):
    def importance(name, weight, given):
        return given

    importance.statistic = statistic
    with pytest.raises(ValueError, match="^Expected the statistic of an importance to be one of"):
        Pruner(nn.Linear(3, 3), 0.5, importance, ignored_layers=())
