"""Checkpoints: an interrupted training that is resumed ends bit for bit as an uninterrupted one."""

import io
import os

import pytest
import torch
from torch import nn

from sparsekd.distillation import Distiller

CLASSES = 3


def batches(count=4):
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def network(width=6):
    """With dropout, so that the training draws random numbers, and batch statistics."""
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(width, CLASSES)
    )


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Shuffled:
    """Batches whose order is a function of ``epoch``, which it counts up itself."""

    def __init__(self, interrupt_at=None):
        self.epoch, self.given, self.interrupt_at = 0, [], interrupt_at

    def __iter__(self):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.given.append((self.epoch, order))
        self.epoch += 1
        for place, index in enumerate(order):
            if (self.epoch - 1, place) == self.interrupt_at:
                raise KeyboardInterrupt
            yield batches()[index]


class FakePruner:
    """Zeroes one more weight of the first layer every third step, so that its count of steps matters."""

    def __init__(self, model):
        self.weight, self.steps = model[0].weight, 0

    def step(self):
        self.steps += 1
        with torch.no_grad():
            self.weight.view(-1)[: self.steps // 3] = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def training(loader=None, seed=0, width=6, **settings):
    """Everything of a fresh run: (fit, student, optimizer, pruner); ``fit`` takes what Distiller.fit takes besides."""
    torch.manual_seed(0)
    teacher = network(10)
    torch.manual_seed(seed)
    student = network(width)
    optimizer = sgd(student)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    pruner = FakePruner(student)
    settings.setdefault("features", {"0": "0"})
    distiller = Distiller(student, teacher, penalty="l1", penalty_weight=1e-3, **settings)
    given = Shuffled() if loader is None else loader

    def fit(epochs, **more):
        return distiller.fit(given, epochs, optimizer, scheduler, pruner, val_loader=batches(2), **more)

    return fit, student, optimizer, pruner


def tensors_of(value, name=""):
    """All tensors and numbers in nested dicts and lists, by path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in tensors_of(part, f"{name}/{key}").items()}
    return {name: value}


def assert_same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        if not path.endswith("/seconds"):
            same = torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path]
            assert same, f"{path}: {value} and {b[path]}"


def content(file):
    return torch.load(file, weights_only=True)


# --- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted training of 4 epochs leaves."""
    file = tmp_path_factory.mktemp("whole") / "run"
    history = training()[0](4, checkpoint=file)
    return content(file), history


def test_a_file_changes_nothing_of_the_training(whole):
    fit, student, *_ = training()
    history = fit(4)
    assert_same(whole[0]["student"], student.state_dict())
    assert [record.loss for record in history] == [record.loss for record in whole[1]]


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 0), (2, 3)], ids=str)
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, whole, at):
    file = tmp_path / "run"
    fit, *_ = training(Shuffled(interrupt_at=at))
    with pytest.raises(KeyboardInterrupt):
        fit(4, checkpoint=file)
    assert content(file)["epoch"] == at[0]  # that of the last finished epoch
    # Another process starts with other weights and other random numbers.
    loader = Shuffled()
    fit, student, optimizer, pruner = training(loader, seed=99)
    history = fit(4, checkpoint=file)
    assert [epoch for epoch, _ in loader.given] == list(range(at[0], 4))
    assert_same(content(file), whole[0])
    assert_same(student.state_dict(), whole[0]["student"])
    assert [(r.epoch, r.loss, r.train_accuracy, r.val_accuracy) for r in history] == [
        (r.epoch, r.loss, r.train_accuracy, r.val_accuracy) for r in whole[1]
    ]
    assert pruner.steps == 16
    assert list(tmp_path.iterdir()) == [file]


def test_resumed_in_the_same_process(tmp_path, whole):
    file, loader = tmp_path / "run", Shuffled(interrupt_at=(1, 2))
    fit, student, *_ = training(loader)
    with pytest.raises(KeyboardInterrupt):
        fit(4, checkpoint=file)
    loader.interrupt_at = None
    fit(4, checkpoint=file)
    assert_same(content(file), whole[0])


def test_more_epochs_later(tmp_path, whole):
    file = tmp_path / "run"
    training()[0](2, checkpoint=file)
    training(seed=5)[0](4, checkpoint=file)
    assert_same(content(file), whole[0])


def test_a_finished_training_is_only_read(tmp_path):
    file = tmp_path / "run"
    fit, student, *_ = training()
    history = fit(2, checkpoint=file)
    loader = Shuffled()
    fit, again, *_ = training(loader, seed=5)
    assert fit(2, checkpoint=file) == history and loader.given == []
    assert_same(again.state_dict(), student.state_dict())


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_data_loader(tmp_path, own_generator):
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))

    def loader(seed):
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        data = torch.utils.data.TensorDataset(x, y)
        return torch.utils.data.DataLoader(data, batch_size=6, shuffle=True, generator=generator)

    training(loader(1))[0](3, checkpoint=tmp_path / "whole")
    training(loader(1))[0](1, checkpoint=tmp_path / "run")
    training(loader(2), seed=9)[0](3, checkpoint=tmp_path / "run")
    assert_same(content(tmp_path / "run"), content(tmp_path / "whole"))


def test_an_interrupt_of_on_epoch_finds_the_epoch_saved(tmp_path, whole):
    file = tmp_path / "run"

    def stop(record):
        torch.rand(3)
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()[0](4, checkpoint=file, on_epoch=stop)
    assert content(file)["epoch"] == 2
    training(seed=9)[0](4, checkpoint=file, on_epoch=lambda record: torch.rand(3))
    assert_same(content(file), whole[0])


def test_an_interrupt_while_writing(tmp_path, whole, monkeypatch):
    file, replaced = tmp_path / "run", []

    def replace(source, target):
        replaced.append(source)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        return os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        training()[0](4, checkpoint=file)
    # Taken but not yet in place: the interrupted write is made good.
    assert content(file)["epoch"] == 2 and len(replaced) == 3
    assert all(source.parent == tmp_path for source in replaced) and not any(source.exists() for source in replaced)
    training(seed=9)[0](4, checkpoint=file)
    assert_same(content(file), whole[0])


def test_a_write_that_fails_leaves_the_last_file_alone(tmp_path, monkeypatch):
    file, (fit, *_) = tmp_path / "run", training()
    fit(1, checkpoint=file)
    saved = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: os.close(-1))
    with pytest.raises(OSError):
        fit(2, checkpoint=file)
    assert file.read_bytes() == saved and list(tmp_path.iterdir()) == [file]


def test_content_is_of_plain_types(whole):
    state, _ = whole
    assert state["epoch"] == len(state["history"]) == 4
    assert state["student"].keys() == network().state_dict().keys()
    assert {"0.weight", "0.bias"} == state["adapters"].keys()
    kinds = {"optimizer": "SGD", "scheduler": "StepLR", "pruner": "FakePruner"}
    assert state["kinds"] == kinds | {"features": {"0": "0"}, "feature_loss": "fitnet", "scaler": None, "average": None}


# --- files and parts that do not fit ---------------------------------------------------------------------------------


def flipped(data):
    """One bit of one weight."""
    weight = torch.load(io.BytesIO(data), weights_only=True)["student"]["0.weight"]
    place = data.index(weight.numpy().tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "torn": lambda data: data[: len(data) // 2],
    "end lost": lambda data: data[:-40],
    "empty": lambda data: b"",
    "text": lambda data: b"text",
    "flipped": flipped,  # torch.load alone would take it
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(tmp_path, damage):
    file = tmp_path / "run"
    training()[0](1, checkpoint=file)
    damaged = DAMAGES[damage](file.read_bytes())
    file.write_bytes(damaged)
    assert_refused(file, "Expected a checkpoint of this training of Sequential in .*, got a file that can't be read: .")
    assert file.read_bytes() == damaged


def assert_refused(file, said, **settings):
    """One error, and every part and the random numbers stay as they were."""
    loader = Shuffled()
    fit, student, optimizer, pruner = training(loader, seed=3, **settings)

    def everything():
        return {
            "student": {name: value.clone() for name, value in student.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "pruner": pruner.steps,
            "rng": torch.get_rng_state(),
        }

    before = everything()
    with pytest.raises(ValueError, match=said):
        fit(2, checkpoint=file)
    assert_same(everything(), before)
    assert loader.given == []


def test_a_file_of_another_model(tmp_path):
    file = tmp_path / "run"
    training(width=8)[0](1, checkpoint=file)
    saved = file.read_bytes()
    assert_refused(
        file, r"Expected a checkpoint of .*, got one of another model: 0.bias is \(8,\) torch.float32, not \(6,\)"
    )
    assert file.read_bytes() == saved


def test_a_file_of_another_training(tmp_path):
    file = tmp_path / "run"
    training()[0](1, checkpoint=file)
    assert_refused(file, "Expected a checkpoint of .*, got one with features {'0': '0'}, not None", features=None)
    student = network()
    with pytest.raises(ValueError, match="got one with optimizer SGD, not Adam"):
        Distiller(student, None).fit(batches(), 2, torch.optim.Adam(student.parameters()), checkpoint=file)
    torch.save(student.state_dict(), file)
    assert_refused(file, "Expected a checkpoint of .*, got another kind of file")


@pytest.mark.parametrize(
    "part, broken",
    [
        ("optimizer", {"state": {}, "param_groups": []}),
        ("scheduler", None),
        ("pruner", {}),
        ("adapters", {"0.weight": torch.zeros(10, 6)}),
        ("rng", {"torch": torch.zeros(3, dtype=torch.uint8)}),
        ("begun", {"batches": 1, "other": 2}),
        ("history", [{"epoch": 0}]),
    ],
)
def test_a_part_that_is_refused_takes_all_back(tmp_path, part, broken):
    file = tmp_path / "run"
    training()[0](1, checkpoint=file)
    torch.save(content(file) | {part: broken}, file)
    assert_refused(file, "Expected a checkpoint of .*, got one that does not fit: .")


def test_states_that_cannot_be_kept(tmp_path):
    class Odd(FakePruner):
        def state_dict(self):
            return {"made by": Odd.step}

    class Stateless:
        def step(self):
            pass

    student = network()
    for pruner, error, said in (
        (Odd(student), ValueError, "Expected optimizer, scheduler and pruner states of tensors and plain types"),
        (
            Stateless(),
            TypeError,
            "Expected a pruner with state_dict and load_state_dict to keep a checkpoint, got Stateless",
        ),
    ):
        with pytest.raises(error, match=said):
            Distiller(student, None).fit(batches(), 1, sgd(student), pruner=pruner, checkpoint=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
