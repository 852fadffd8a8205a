"""The mask contract over 200 steps: every optimiser, every option of a loop, every type of module."""

import pytest
import torch
from test_mask_contract import OPTIMIZERS, check_contract
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsekd.pruning import CubicSL, Pruner, RigL

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SPARSITY = 200, 0.7
THIRD_PARTY = ("lion", "lion decoupled")


class EveryModule(nn.Module):
    """One of each type of layer that can be pruned; ``[N, 2, 6]`` to ``[N]``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.conv1, self.back1 = nn.Conv1d(2, 4, 3, padding=1), nn.ConvTranspose1d(4, 2, 2, stride=2)
        self.conv2, self.back2 = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.conv3, self.back3 = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), nn.ConvTranspose3d(4, 2, 1)
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        rows = torch.tanh(self.first(x))  # [N, 2, 8]
        one = self.back1(torch.relu(self.conv1(rows)))  # [N, 2, 16]
        square = rows.view(-1, 2, 2, 4)
        two = self.back2(torch.relu(self.conv2(square)))  # [N, 2, 4, 8]
        three = self.back3(torch.relu(self.conv3(square[:, :, None])))  # [N, 2, 1, 2, 4]
        found = [one.mean((1, 2)), two.mean((1, 2, 3)), three.mean((1, 2, 3, 4))]
        found += [one.square().mean((1, 2)), two.square().mean((1, 2, 3)), three.square().mean((1, 2, 3, 4))]
        return self.last(torch.stack(found, 1))[:, 0]


def batch(step):
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step))
    return x, x.mean((1, 2)) + x.square().mean((1, 2))


OPTIONS = ("plain", "amp", "scaler", "accumulate", "clip", "ema", "groups", "closure", "keep grads", "regrow")


def optimizer_of(name, parameters):
    if name not in THIRD_PARTY:
        return OPTIMIZERS[name](parameters)
    lion = pytest.importorskip("lion_pytorch", reason="lion-pytorch is not installed")
    return lion.Lion(parameters, lr=3e-3, weight_decay=0.5, decoupled_weight_decay=name == "lion decoupled")


def run(name, option):
    torch.manual_seed(0)
    model = EveryModule()
    parameters = list(model.parameters())
    if option == "groups":
        parameters = [
            {"params": [p for p in parameters if p.dim() < 3]},
            {"params": [p for p in parameters if p.dim() >= 3], "weight_decay": 0.01},
        ]
    optimizer = optimizer_of(name, parameters)
    schedule = CubicSL(5, 60, update_frequency=5)
    if option == "regrow":
        schedule = RigL(5, 150, update_frequency=20)
    pruner = Pruner(model, SPARSITY, "gradient", "unstructured", "uniform", schedule, optimizer, ())
    assert len(pruner.masks) == 8, "each type of layer is pruned"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=50) if option == "scaler" else None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if option == "ema" else None
    dtype = torch.float16 if option == "scaler" else torch.bfloat16
    before, looked_at, skipped = {name: mask.clone() for name, mask in pruner.masks.items()}, 0, 0

    def backward(step):
        x, y = batch(step)
        with torch.autocast("cpu", dtype, enabled=option in ("amp", "scaler")):
            loss = (model(x).float() - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return backward(step)

    for step in range(STEPS):
        if option == "closure":
            optimizer.step(closure)
        else:
            backward(step)
            if option == "accumulate":
                backward(step + STEPS)
            if option == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if scaler is None:
                optimizer.step()
            else:
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped += scaler.get_scale() < scale
        looked_at += check_contract(pruner, model, optimizer)
        pruner.step()
        changes = step % 5 == 4  # with no other step do the masks
        if changes:
            looked_at += check_contract(pruner, model, optimizer)
        optimizer.zero_grad(set_to_none=option != "keep grads")
        if average is not None:
            average.update_parameters(model)
            pruner.apply_masks(average)
            check_contract(pruner, average.module)
        if option != "regrow" and changes:
            for key, mask in pruner.masks.items():
                assert not (mask & ~before[key]).any(), "nothing that is pruned comes back"
            before = {key: mask.clone() for key, mask in pruner.masks.items()}
    assert pruner.finished and pruner.sparsity() == pytest.approx(SPARSITY, abs=0.01)
    assert (pruner.regrown > 0) == (option == "regrow")
    assert (skipped > 0) == (option == "scaler"), "the first scales overflow"
    assert looked_at > 0 or not any(optimizer.state.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model, pruner


# What every change is tested by.
SAMPLE = [
    ("nesterov", "accumulate"), ("adam fused", "scaler"), ("adamw", "regrow"), ("rmsprop", "clip"), ("lion", "ema"),
]  # fmt: skip


@pytest.mark.parametrize("name, option", SAMPLE, ids=[" ".join(pair) for pair in SAMPLE])
def test_sample(name, option):
    run(name, option)


MAIN = ("nesterov", "adam", "adamw", "rmsprop", "lion")
WHOLE = [(name, "plain") for name in (*OPTIMIZERS, *THIRD_PARTY)]
WHOLE += [(name, option) for name in MAIN for option in OPTIONS[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name, option", WHOLE, ids=[" ".join(pair) for pair in WHOLE])
def test_every_optimizer_and_every_option(name, option):
    run(name, option)
