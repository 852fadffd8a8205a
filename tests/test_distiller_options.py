"""AMP, accumulation, clipping and an average of the weights: what each does to a step, and all of them resumed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.distillation import Distiller, KDLoss
from sparsekd.pruning import CubicSL, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def batches(count=5, rows=8):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator))
        for _ in range(count)
    ]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_accumulated_batches_are_one_step():
    """Two batches of four are one of eight; the fifth is a step of its own."""
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    given = batches(5, 4)
    joined = [tuple(torch.cat(parts) for parts in zip(*given[i : i + 2], strict=True)) for i in (0, 2, 4)]
    Distiller(models[0], None).fit(given, 2, sgd(models[0]), accumulate=2)
    Distiller(models[1], None).fit(joined, 2, sgd(models[1]))
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_clipping_by_hand():
    model = nn.Linear(4, 3)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    want = [p.detach() - 0.1 * 0.01 * g / norm for p, g in zip(model.parameters(), gradients, strict=True)]
    Distiller(model, None).fit([(x, y)], 1, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=0.01)
    torch.testing.assert_close(list(model.parameters()), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, teacher, seen = network(), network(1), []
    for one in (model, teacher):
        one.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = copy.deepcopy(model.state_dict())
    history = Distiller(model, teacher).fit(batches(), 2, sgd(model), amp=dtype)
    assert set(seen) == {dtype} and history[1].loss < history[0].loss
    assert model[0].weight.dtype == torch.float32 and not torch.equal(model[0].weight, before["0.weight"])


def test_average_by_hand():
    model, weights = nn.Linear(4, 3), []
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: weights.append(model.weight.detach().clone()))
    distiller = Distiller(model, None)
    (record,) = distiller.fit(batches(3), 1, optimizer, val_loader=batches(3), ema=0.9)
    want = weights[0]
    for weight in weights[1:]:
        want = 0.9 * want + 0.1 * weight
    torch.testing.assert_close(distiller.average.module.weight.detach(), want)
    right = [(distiller.average(x).argmax(1) == y).float().mean() for x, y in batches(3)]
    assert record.val_accuracy == pytest.approx(float(sum(right) / 3))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_all_of_it_resumed_bit_for_bit(tmp_path, dtype):
    file, options = tmp_path / "run", {"amp": dtype, "accumulate": 2, "clip_norm": 0.5, "ema": 0.8}

    def run(seed, epochs, **rest):
        student, teacher = network(seed), network(5)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        pruner = Pruner(student, 0.6, schedule=CubicSL(2, 8), optimizer=optimizer, ignored_layers=())
        distiller = Distiller(student, teacher, KDLoss(2.0), features={"0": "0"})
        torch.manual_seed(seed)
        distiller.fit(batches(), epochs, optimizer, scheduler, pruner, **options, **rest)
        for name, mask in pruner.masks.items():
            for model in (student, distiller.average.module):
                assert not model.get_parameter(name)[~mask].any(), "zeros are zeros, in the average too"
            for value in optimizer.state[student.get_parameter(name)].values():
                assert value.dim() == 0 or not value[~mask].any()
        return student.state_dict(), distiller.average.state_dict(), pruner.sparsity()

    want = run(0, 4)
    run(0, 2, checkpoint=file)
    got = run(9, 4, checkpoint=file)
    assert want[2] == got[2] == pytest.approx(0.6, abs=0.01)
    for part in (0, 1):
        assert all(torch.equal(want[part][name], value) for name, value in got[part].items())
    with pytest.raises(ValueError, match="got one with average AveragedModel, not None"):
        options["ema"] = None
        student = network()
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        pruner = Pruner(student, 0.6, schedule=CubicSL(2, 8), optimizer=optimizer, ignored_layers=())
        Distiller(student, network(5), features={"0": "0"}).fit(
            batches(), 4, optimizer, scheduler, pruner, checkpoint=file, **options
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"amp": torch.float32}, "Expected amp to be torch.bfloat16, torch.float16 or None, got torch.float32"),
        ({"accumulate": 0}, "Expected accumulate to be an int of at least 1, got 0"),
        ({"clip_norm": 0.0}, "Expected clip_norm to be positive and finite, got 0.0"),
        ({"ema": 1.0}, r"Expected ema in \(0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range(options, message):
    student = network()
    with pytest.raises(ValueError, match=f"^{message}$"):
        Distiller(student, None).fit(batches(), 1, sgd(student), **options)
