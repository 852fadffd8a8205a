"""Records of epochs in a CSV file and for TensorBoard."""

import csv

import pytest
import torch
from test_training_state import batches, network

from sparsekd.distillation import CSVLog, Distiller, TensorBoardLog
from sparsekd.pruning import Pruner

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(epochs, on_epoch, **more):
    torch.manual_seed(0)
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    pruner = Pruner(student, 0.5, "magnitude", importance_steps=6, ignored_layers=(), optimizer=optimizer)
    distiller = Distiller(student, None)
    return distiller.fit(batches(), epochs, optimizer, scheduler, pruner, batches(1), on_epoch=on_epoch, **more)


def lines(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_csv_has_each_epoch_once_also_when_resumed(tmp_path):
    file, options = tmp_path / "log.csv", {"checkpoint": tmp_path / "run"}
    history = fit(2, CSVLog(file), **options)
    assert len(lines(file)) == 2
    history = fit(3, CSVLog(file), **options)
    found = lines(file)
    assert [int(line["epoch"]) for line in found] == [0, 1, 2]
    assert [float(line["loss"]) for line in found] == [record.loss for record in history]
    assert [float(line["lr"]) for line in found] == [0.1, 0.05, 0.025]
    assert [round(float(line["sparsity"]), 1) for line in found] == [0.0, 0.5, 0.5]
    fit(1, CSVLog(file))  # a new training
    assert len(lines(file)) == 1


def test_csv_of_other_columns_is_left_alone(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="Expected columns epoch, loss"):
        CSVLog(file)
    assert file.read_text() == "a,b\n1,2\n"


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log, seen = TensorBoardLog(tmp_path), []
    history = fit(3, [log, seen.append])
    log.close()
    assert seen == history
    read = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "train/accuracy", "val/accuracy", "seconds", "lr", "sparsity"} == set(read.Tags()["scalars"])
    assert [event.value for event in read.Scalars("loss")] == pytest.approx([record.loss for record in history])
    assert [event.step for event in read.Scalars("sparsity")] == [0, 1, 2]
