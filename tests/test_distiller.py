"""The training loop: one step by hand, what it does to each network and in which order, and what it refuses."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.distillation import Distiller, KDLoss, evaluate
from sparsekd.pruning import CubicSL, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def batches(count=4, rows=6):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randint(CLASSES, (rows,), generator=generator))
        for _ in range(count)
    ]


def network(width=6):
    """With dropout, so that the training draws random numbers, and batch statistics."""
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(width, CLASSES)
    )


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- one step by hand ------------------------------------------------------------------------------------------------


def test_one_step_by_hand():
    # The student gives (0, 0), the teacher's softened distribution is (3/4, 1/4) at T = 2, the label is 0: the gradient
    # at the logits is (-1/2, 1/2), see test_losses.py. With x = 1 and lr 0.1 each weight and bias moves by 0.05.
    student, teacher = nn.Linear(1, 2), nn.Linear(1, 2)
    with torch.no_grad():
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter.zero_()
        teacher.bias[0] = 2 * math.log(3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loader = [(torch.ones(1, 1), torch.tensor([0]))]
    (record,) = Distiller(student, teacher, KDLoss(temperature=2)).fit(loader, 1, optimizer, val_loader=loader)
    assert record.loss == pytest.approx(0.608198, abs=1e-6)
    assert student.weight.flatten().tolist() == pytest.approx([0.05, -0.05])
    assert student.bias.tolist() == pytest.approx([0.05, -0.05])
    assert (record.epoch, record.val_accuracy) == (0, 1.0) and record.seconds > 0


def test_epoch_loss_is_the_mean_over_rows():
    model = nn.Linear(4, CLASSES)
    big, small = batches(1, rows=6)[0], batches(1, rows=2)[0]
    want = (6 * F.cross_entropy(model(big[0]), big[1]) + 2 * F.cross_entropy(model(small[0]), small[1])) / 8
    (record,) = Distiller(model, None).fit([big, small], 1, sgd(model, lr=0.0))
    assert record.loss == pytest.approx(want.item(), rel=1e-5)


def test_student_learns_what_the_teacher_knows():
    # No label is given, so the teacher is the only source.
    teacher, student = nn.Linear(4, CLASSES), network(32)
    loader = [(x, torch.full_like(y, -100)) for x, y in batches(8, rows=32)]
    test = [(x, teacher(x).argmax(1)) for x, _ in batches(8, rows=32)]
    loss = KDLoss(distill_ignored=True)
    history = Distiller(student, teacher, loss).fit(loader, 15, sgd(student, 0.05), val_loader=test)
    assert history[-1].val_accuracy > 0.9
    assert all(record.train_accuracy is None for record in history)


def test_without_a_teacher_it_is_plain_training():
    torch.manual_seed(1)
    student, twin = network(), network()
    twin.load_state_dict(student.state_dict())
    (x, y), *_ = batches(1)
    y[0] = -100
    rng = torch.get_rng_state()
    (record,) = Distiller(student, None).fit([(x, y)], 1, sgd(student))
    torch.set_rng_state(rng)
    optimizer = sgd(twin)
    logits = twin(x)
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    assert equal(student.state_dict(), twin.state_dict())
    assert record.train_accuracy == pytest.approx((logits.argmax(1) == y)[1:].float().mean().item())


# --- the teacher, modes and outputs ----------------------------------------------------------------------------------


def test_teacher_is_left_as_it_was():
    # overhaul-distillation#37, CrossKD#13: a teacher in train mode drifts by its batch statistics.
    student, teacher = network(), network()
    teacher.train()
    teacher[1].eval()
    before, modes = copies(teacher), [module.training for module in teacher.modules()]
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append((module[3].training, output.requires_grad)))
    Distiller(student, teacher, features={"0": "0"}).fit(batches(), 2, sgd(student), val_loader=batches())
    assert seen == [(False, False)] * 8
    assert equal(copies(teacher), before) and [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def test_modes_come_back_after_an_error():
    student, teacher = network().eval(), network()
    student[3].train()
    with pytest.raises(TypeError):
        Distiller(student, teacher).fit(["ab"], 1, sgd(student))
    assert teacher[1].training and not student[1].training and student[3].training


def test_student_trains_after_each_validation():
    student, modes = network(), []
    student.register_forward_hook(lambda module, args, output: modes.append(module.training))
    Distiller(student, None).fit(batches(2), 2, sgd(student), val_loader=batches(1))
    assert modes == [True, True, False] * 2


class Wrapped(nn.Module):
    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


WRAPS = {
    "object": lambda logits: SimpleNamespace(loss=None, logits=logits),
    "tuple": lambda logits: (logits, None),
    "list": lambda logits: [logits],
    "dict": lambda logits: {"logits": logits},
}


@pytest.mark.parametrize("kind", WRAPS)
def test_outputs_that_hold_logits(kind):
    # KD_Lib#128
    wrap = WRAPS[kind]
    torch.manual_seed(2)
    plain, teacher = network(), network()
    student = network()
    student.load_state_dict(plain.state_dict())
    histories = []
    for model, taught in ((plain, teacher), (Wrapped(student, wrap), Wrapped(teacher, wrap))):
        torch.manual_seed(3)
        history = Distiller(model, taught).fit(batches(), 2, sgd(model), val_loader=batches())
        histories.append([(record.loss, record.val_accuracy) for record in history])
    assert histories[0] == histories[1]


def test_default_loss_is_not_shared():
    first, second = Distiller(network(), network()), Distiller(network(), network())
    first.loss.temperature = 1.0
    assert (second.loss.temperature, Distiller(network(), network()).loss.temperature) == (4.0, 4.0)


def test_evaluate():
    # The model says 1 where x > 0: rows 0 and 2 are right, row 1 is wrong, row 3 has no label.
    model = nn.Linear(1, 2, bias=False).train()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    x = torch.tensor([[2.0], [1.0], [-3.0], [4.0]])
    y = torch.tensor([1, 0, 0, -100])
    assert evaluate(model, [(x, y), [x[:1], y[:1]]]) == 3 / 4
    assert model.training
    for empty in ([], [(x, torch.full_like(y, -100))]):
        with pytest.raises(
            ValueError, match="Expected a loader with at least one labelled row to evaluate on, got none"
        ):
            evaluate(model, empty)


def test_accuracy_leaves_out_the_rows_that_the_loss_ignores():
    student, teacher = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)
    x, _ = batches(1)[0]
    y = student(x).argmax(1)
    y[:3] = 255
    loss = KDLoss(ignore_index=255)
    (record,) = Distiller(student, teacher, loss).fit([(x, y)], 1, sgd(student, 0.0), val_loader=[(x, y)])
    assert (record.train_accuracy, record.val_accuracy) == (1.0, 1.0)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_order_of_steps():
    student, said = nn.Linear(4, CLASSES), []
    optimizer = sgd(student)
    optimizer.register_step_post_hook(lambda *_: said.append("optimizer"))
    pruner = SimpleNamespace(step=lambda: said.append("pruner"))
    scheduler = SimpleNamespace(step=lambda: said.append("scheduler"))
    Distiller(student, None).fit(
        batches(2), 2, optimizer, scheduler, pruner, on_epoch=lambda record: said.append(record.epoch)
    )
    assert said == [*["optimizer", "pruner"] * 2, "scheduler", 0, *["optimizer", "pruner"] * 2, "scheduler", 1]


@pytest.mark.parametrize("schedule", [None, CubicSL(start=1, end=9)], ids=["once", "gradually"])
@pytest.mark.parametrize("stop_after", [2, 6, 9])
def test_pruned_on_the_way_and_resumed(tmp_path, schedule, stop_after):
    # Importance is gathered, the cut made, or the masks held when the interrupt comes.
    file, teacher = tmp_path / "run", network(10)

    def run(seed, loader, **rest):
        torch.manual_seed(seed)
        student = network()
        optimizer = sgd(student)
        settings = {"schedule": schedule, "optimizer": optimizer, "ignored_layers": (), "importance_steps": 5}
        pruner = Pruner(student, 0.5, **settings)
        try:
            Distiller(student, teacher).fit(loader, 3, optimizer, pruner=pruner, **rest)
        except KeyboardInterrupt:
            pass
        return student.state_dict(), pruner.masks

    def interrupted():
        for count in range(12):
            if count == stop_after:
                raise KeyboardInterrupt
            yield batches()[count % 4]

    class Interrupted:
        given = interrupted()

        def __iter__(self):
            return iter([next(self.given) for _ in range(4)])

    whole, masks = run(0, batches())
    run(0, Interrupted(), checkpoint=file)
    resumed, resumed_masks = run(9, batches(), checkpoint=file)
    assert equal(resumed, whole) and equal(resumed_masks, masks)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 21  # half of 4 x 6 + 6 x 3 weights
    assert all(not resumed[name][~mask].any() for name, mask in masks.items())


def test_plateau_scheduler_hears_the_loss():
    student = nn.Linear(4, CLASSES)
    optimizer = sgd(student, 0.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    history = Distiller(student, None).fit(batches(), 2, optimizer, scheduler)
    assert scheduler.best == pytest.approx(history[0].loss)


def test_loader_is_told_the_epoch():
    class Loader(list):
        epoch, given = 5, ()

        def __iter__(self):
            self.given += (self.epoch,)
            self.epoch += 7
            return super().__iter__()

    student, loader = network(), Loader(batches())
    Distiller(student, None).fit(loader, 3, sgd(student))
    assert loader.given == (0, 1, 2)


@pytest.mark.parametrize("terminal, progress, shown", [(False, None, 0), (True, None, 1), (True, False, 0)])
def test_bar_where_there_is_a_terminal(terminal, progress, shown, monkeypatch, capsys):
    import rich.progress

    made, bar = [], rich.progress.Progress
    monkeypatch.setattr(rich.progress, "Progress", lambda *args, **rest: made.append(1) or bar(*args, **rest))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    Distiller(student := network(), None).fit(batches(), 1, sgd(student), progress=progress)
    assert len(made) == shown
    if not shown:
        assert capsys.readouterr() == ("", "")


def test_progress_shows_loss_accuracy_and_time(monkeypatch):
    import rich.progress

    kept = []

    class Kept(rich.progress.Progress):
        def __exit__(self, *error):
            kept.append(self.tasks[0])
            kept.append([type(column).__name__ for column in self.columns])
            return super().__exit__(*error)

    monkeypatch.setattr(rich.progress, "Progress", Kept)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    student = network()
    history = Distiller(student, None).fit(batches(), 2, sgd(student), val_loader=batches(1), progress=True)
    task, columns = kept
    assert (task.completed, task.total) == (8, 8) and "TimeRemainingColumn" in columns
    assert task.description == f"loss {history[-1].loss:.4f}, accuracy {history[-1].val_accuracy:.4f}"


def test_progress_is_a_line_per_epoch_in_a_log(capsys):
    student = network()
    history = Distiller(student, None).fit(batches(), 2, sgd(student), val_loader=batches(1), progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1] == f"  epoch 2/2: loss {history[1].loss:.4f}, accuracy {history[1].val_accuracy:.4f}, 0 s left"
