"""The whole recipe in one call: what it gives, what it leaves alone, how it goes on, and what it refuses."""

import copy
import dataclasses
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sparsekd
from sparsekd import KDLoss, SparseLinear
from sparsekd.distillation import Distiller
from sparsekd.distillation.losses import group_lasso

CLASSES = 3


# Layers as small as these stay dense, which convert says.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* pruned and stay dense"),
]


@pytest.fixture
def unmeasured(monkeypatch):
    """Without the measurements of convert, which take longer than the training and have their own tests."""
    monkeypatch.setattr(sys.modules["sparsekd.compress"], "convert", lambda model, inputs: copy.deepcopy(model))


def network(seed=0, width=8):
    """With dropout, so that the training draws random numbers, and batch statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(16 * width, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def loader(batches=4, rows=6):
    """Shuffled by a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(batches * rows, 2, 6, 6, generator=generator), torch.arange(batches * rows) % CLASSES
    return DataLoader(TensorDataset(x, y), rows, shuffle=True, generator=torch.Generator().manual_seed(5))


def copies(module):
    return copy.deepcopy(module.state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def zeros(model, layers=(2, 7)):
    return {index: int((model[index].weight == 0).sum()) for index in layers}


# --- what it gives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taught", [True, False])
def test_the_whole_recipe(taught):
    """Syencil/mobile-yolov5-pruning-distillation#3, heyongxin233/YOLO-Pruning-RKNN#23, VainF/Torch-Pruning#186: both in
    one."""
    student, teacher = network(), network(seed=1, width=16) if taught else None
    student.eval()
    student[5].train()
    modes = [module.training for module in student.modules()]
    before, teachers = copies(student), copies(teacher) if taught else None
    fast = sparsekd.compress(student, teacher, loader(), sparsity=0.9, epochs=4)
    # The prunable weights are those between the first convolution and the last linear layer.
    total = 8 * 8 * 9 + 12 * 16 * 8
    assert sum(zeros(student).values()) == round(0.9 * total)
    assert student[0].weight.count_nonzero() == student[0].weight.numel()
    assert not equal(copies(student), before) and [module.training for module in student.modules()] == modes
    assert type(student[2]) is nn.Conv2d and type(student[7]) is nn.Linear
    if taught:
        assert equal(copies(teacher), teachers) and teacher.training
        assert all(parameter.grad is None for parameter in teacher.parameters())
    # A copy, that computes the same; which layers were swapped is up to the clock.
    assert fast is not student and sparsekd.choices(fast).keys() >= {"2", "7"}
    assert equal(sparsekd.dense_state_dict(fast), copies(student))
    x = next(iter(loader()))[0]
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), student.eval()(x), rtol=1e-4, atol=1e-5)


def test_large_sparse_layers_are_swapped():
    """Where the machine leaves no doubt: 128 x 4096 weights of which a hundredth remains."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(72, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.Linear(128, CLASSES))
    fast = sparsekd.compress(student, None, loader(), 0.99, epochs=4, ignored_layers=["1", "4"])
    assert isinstance(fast[3], SparseLinear), sparsekd.choices(fast)["3"]
    assert type(student[3]) is nn.Linear and zeros(student, [3])[3] == round(0.99 * 128 * 4096)


def test_zeros_stay_and_nothing_holds_them(unmeasured):
    """The masks are held to the last step; afterwards the student and its optimizer are the user's again."""
    student = network()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    sparsekd.compress(student, network(1), loader(), 0.8, epochs=4, optimizer=optimizer)
    found = zeros(student)
    for index in (2, 7):
        state, where = optimizer.state[student[index].weight], student[index].weight == 0
        assert not state["exp_avg"][where].any() and not state["exp_avg_sq"][where].any()
    assert not optimizer._optimizer_step_post_hooks
    Distiller(student, None).fit(loader(), 1, optimizer)
    assert found[2] > zeros(student)[2] == 0  # all of the convolution's inputs are alive


def test_its_parts_get_what_they_are_given():
    student, asked = network(), []

    def importance(name, weight, gradient):
        asked.append(name)
        return weight.abs()

    def loss(student_logits, teacher_logits, target):
        asked.append("loss")
        return KDLoss()(student_logits, teacher_logits, target)

    importance.needs_gradient = False
    x = torch.randn(2, 2, 6, 6)
    sparsekd.compress(
        student, network(1), loader(), 0.5, "unstructured", 4, importance=importance, loss=loss, example_inputs=x,
        budget={"7": 0.75, "9": 0.25}, ignored_layers="0", val_loader=loader(),
    )  # fmt: skip
    assert zeros(student, [0, 2, 7, 9]) == {0: 0, 2: 0, 7: round(0.75 * 12 * 128), 9: round(0.25 * 12 * 3)}
    assert asked.count("loss") == 16 and {"2.weight", "7.weight", "9.weight"} <= set(asked)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("epochs", [4, 5])
def test_short_trainings_reach_the_sparsity_too(unmeasured, batches, epochs):
    student = network()
    sparsekd.compress(student, None, loader(batches), 0.7, epochs=epochs)
    assert sum(zeros(student).values()) == round(0.7 * (8 * 8 * 9 + 12 * 16 * 8))


def test_the_schedule(unmeasured, monkeypatch):
    """Dense for the first quarter, at the final masks for the last."""
    seen, student = [], network()
    step = sparsekd.Pruner.step
    monkeypatch.setattr(sparsekd.Pruner, "step", lambda self: (step(self), seen.append(self.sparsity()))[0])
    sparsekd.compress(student, None, loader(4), 0.75, epochs=8)
    assert len(seen) == 32
    assert not any(seen[:8]) and 0 < seen[8] < seen[15] < seen[19] < 0.75 and seen[23:] == [0.75] * 9


# --- a target of time ------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """By the cost model, so that nothing is measured."""
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 36, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def foretold(student, x):
    """Dense and sparse milliseconds by the cost model, of the layers' own sparsities."""
    dense = {name: made.dense_ms for name, made in sparsekd.would_it_be_faster(student, 0.0, x.shape).items()}
    sparse = 0.0
    for name, ms in dense.items():
        sparsity = float((student.get_submodule(name).weight == 0).float().mean())
        sparse += min(ms, sparsekd.would_it_be_faster(student, sparsity, x.shape)[name].sparse_ms) if sparsity else ms
    return sum(dense.values()), sparse


@pytest.mark.parametrize("how", ["speed-up", "ms"])
def test_to_a_time(unmeasured, timed, how):
    x = torch.randn(16, 2, 6, 6)
    dense, _ = foretold(timed, x)
    target = "1.25x" if how == "speed-up" else f"{dense / 1.25}ms"
    sparsekd.compress(timed, None, loader(), target=target, epochs=4, importance="magnitude", example_inputs=x)
    after = foretold(timed, x)
    assert 1.24 < after[0] / after[1] < 1.35
    assert timed[0].weight.count_nonzero() == timed[0].weight.numel()


def test_a_target_may_be_a_sparsity(unmeasured):
    one = network()
    sparsekd.compress(one, None, loader(), target=0.8, epochs=4)
    other = network()
    sparsekd.compress(other, None, loader(), 0.8, epochs=4)
    assert equal(copies(one), copies(other)) and sum(zeros(one).values()) == round(0.8 * (8 * 8 * 9 + 12 * 16 * 8))


def test_a_time_that_is_missed_is_said(monkeypatch):
    module = sys.modules["sparsekd.compress"]
    found = module.compare_networks(network(), network(), torch.randn(2, 2, 6, 6), rounds=2)
    for speedup, ms, target, missed in ((1.9, 1.0, "2x", True), (2.1, 1.0, "2x", False), (9.0, 2.0, "1.5ms", True)):
        made = dataclasses.replace(found, speedup=speedup, sparse_ms=ms, dense_ms=speedup * ms)
        monkeypatch.setattr(module, "compare_networks", lambda *arguments, made=made: made)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            module._check_time(None, None, None, target)
        assert [str(w.message) for w in said] == [
            f"Expected {target} after pruning, got {speedup:.2f}x ({ms:.3g} ms, dense {speedup * ms:.3g} ms)"
        ] * missed


# --- resumed ---------------------------------------------------------------------------------------------------------


class Interrupted(DataLoader):
    """Ctrl-C before a batch of its own count."""

    left = 10**9

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def interrupted(left):
    plain = loader()
    found = Interrupted(plain.dataset, plain.batch_size, shuffle=True, generator=plain.generator)
    found.left = left
    return found


@pytest.mark.parametrize("left", [2, 9, 14, 22])
@pytest.mark.parametrize("again", [True, False])
def test_resumed_bit_for_bit(unmeasured, left, again, tmp_path):
    """Interrupted in any phase; in the same process with the same objects, or in another with fresh ones."""
    want = network()
    sparsekd.compress(want, network(1), loader(), 0.8, epochs=6)
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    file = tmp_path / "run"
    arguments = {"sparsity": 0.8, "epochs": 6, "checkpoint": file, "optimizer": optimizer}
    with pytest.raises(KeyboardInterrupt):
        sparsekd.compress(student, network(1), interrupted(left), **arguments)
    # An epoch under way was cut off: masks of its steps must not hold what the file brings back.
    assert file.exists() and not optimizer._optimizer_step_post_hooks
    if not again:
        student = network(seed=99)
        arguments["optimizer"] = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    sparsekd.compress(student, network(1), loader(), **arguments)
    assert equal(copies(student), copies(want))


def test_a_finished_run_is_not_trained_again(tmp_path):
    student, again = network(), network(seed=99)
    arguments = {"sparsity": 0.8, "epochs": 4, "checkpoint": tmp_path / "run"}
    sparsekd.compress(student, network(1), loader(), **arguments)
    fast = sparsekd.compress(again, network(1), loader(), **arguments)
    assert equal(copies(again), copies(student)) and equal(sparsekd.dense_state_dict(fast), copies(student))


def test_a_checkpoint_of_another_sparsity_is_refused(unmeasured, tmp_path):
    sparsekd.compress(network(), None, loader(), 0.8, epochs=4, checkpoint=tmp_path / "run")
    student, content = network(seed=99), (tmp_path / "run").read_bytes()
    before = copies(student)
    with pytest.raises(ValueError, match="^Expected a checkpoint of this training .*sparsity=0.7, got 0.8$"):
        sparsekd.compress(student, None, loader(), 0.7, epochs=4, checkpoint=tmp_path / "run")
    assert equal(copies(student), before) and (tmp_path / "run").read_bytes() == content


# --- refused ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


class Short(list):
    """Says that it has more batches than it gives."""

    def __len__(self):
        return 3 * super().__len__()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"epochs": 3}, ValueError, r"Expected at least 4 epochs \(distil, prune over two quarters, retrain\), got 3$"),
        ({"epochs": 0}, ValueError, "Expected at least 4 epochs .* got 0$"),
        ({"epochs": 8.0}, ValueError, "Expected at least 4 epochs .* got 8.0$"),
        ({"epochs": "10"}, ValueError, "Expected at least 4 epochs .* got '10'$"),
        ({"train_loader": []}, ValueError, "Expected a train_loader with at least one batch, got none$"),
        ({"train_loader": iter(())}, TypeError, "Expected a train_loader with a length, got tuple_iterator$"),
        ({"train_loader": DataLoader(Stream())}, TypeError, "Expected a train_loader with a length, got DataLoader$"),
        ({"train_loader": 3}, TypeError, "Expected a train_loader with a length, got int$"),
        ({"val_loader": []}, ValueError, "Expected val_loader to give at least one batch, got an empty one$"),
        ({"sparsity": 90}, ValueError, r"Expected sparsity in \[0, 1\), got 90$"),
        ({"pattern": "2:1"}, ValueError, "Expected pattern to be one of "),
        ({"pattern": "2:4", "sparsity": 0.9}, ValueError, "Expected sparsity=0.5 with pattern '2:4', got 0.9$"),
        ({"importance": "tailor"}, ValueError, "Expected importance to be one of "),
        (
            {"budget": "latency"},
            ValueError,
            "Expected a target of time, .2x. or .3.5ms., with budget=.latency., got 0.5",
        ),
        ({"budget": "least"}, ValueError, "Expected budget to be one of "),
        ({"target": 0.5}, ValueError, "Expected either a sparsity or a target, got sparsity=0.5 and target=0.5$"),
        ({"sparsity": None}, ValueError, "Expected either a sparsity or a target, got sparsity=None and target=None$"),
        ({"sparsity": None, "target": "2"}, ValueError, "Expected target to be a sparsity in "),
        ({"sparsity": None, "target": "1e9x"}, ValueError, "Expected a target within reach, at least "),
        ({"sparsity": None, "target": "2x", "budget": "erk"}, ValueError, "Expected budget=.latency. with a target of"),
        ({"sparsity": None, "target": "2x", "pattern": "2:4"}, ValueError, "Expected pattern to be .unstructured. or "),
        ({"ignored_layers": "fc"}, ValueError, "Expected ignored_layers to be in the model, got 'fc'$"),
        ({"student": nn.ReLU()}, ValueError, "Expected a student with parameters to train, got a ReLU without$"),
        ({"student": "resnet18"}, TypeError, "Expected student to be a torch.nn.Module, got str$"),
        ({"teacher": "resnet18"}, TypeError, "Expected teacher to be a torch.nn.Module or None, got str$"),
        ({"loss": "kd"}, TypeError, "Expected loss to be callable, got str$"),
        ({"optimizer": "sgd"}, TypeError, "Expected optimizer to be a torch.optim.Optimizer, got str$"),
    ],
)
def test_refused_before_anything_is_trained(changed, error, message, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    student = network()
    before = copies(student)
    arguments = {"student": student, "teacher": network(1), "train_loader": loader(), "sparsity": 0.5, "epochs": 4}
    with pytest.raises(error, match=f"^{message}"):
        sparsekd.compress(**arguments | changed)
    assert equal(copies(student), before)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in student.parameters())


def test_the_teacher_is_not_the_student():
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^Expected teacher and student to be two modules"):
        sparsekd.compress(student, student, loader(), 0.5, epochs=4, optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_a_loader_that_gives_fewer_batches_than_it_says():
    """The schedule would not come to its end, and the sparsity would be missed without a word."""
    message = "^Expected a train_loader that gives its 12 batches in each epoch, got fewer$"
    with pytest.raises(ValueError, match=message):
        sparsekd.compress(network(), None, Short(loader()), 0.5, epochs=4)


def test_an_error_on_the_way_leaves_the_optimizer_free():
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradients that overflow
        with pytest.raises(FloatingPointError, match="^Expected a finite loss"):
            sparsekd.compress(student, None, loader(), 0.5, epochs=4, optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in student.parameters())


def test_a_group_penalty_is_over_the_vectors_of_the_pattern(unmeasured, monkeypatch):
    seen = []
    made = lambda vector: seen.append(vector) or group_lasso(vector)  # noqa: E731
    monkeypatch.setattr(sys.modules["sparsekd.compress"], "group_lasso", made)
    for pattern in ("8x1", "2x1-permuted", "unstructured"):  # the last one keeps the default's 4
        sparsekd.compress(network(), None, loader(), 0.5, pattern, 4, penalty="group_lasso", penalty_weight=1e-3)
    assert seen == [8, 2]
