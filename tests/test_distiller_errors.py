"""What a Distiller refuses, and that nothing is changed then."""

import math

import pytest
import torch
from test_distiller import Wrapped, batches, copies, equal, network, sgd
from torch import nn

from sparsekd.distillation import Distiller


@pytest.mark.parametrize(
    "batch, got",
    [
        ({"x": 1}, "dict"),
        (torch.zeros(2, 4), "Tensor"),
        ((torch.zeros(2, 4),), r"tuple of \(Tensor\)"),
        ((torch.zeros(2, 4), [0, 1]), r"tuple of \(Tensor, list\)"),
        ([torch.zeros(2, 4), torch.zeros(2), torch.zeros(2)], r"list of \(Tensor, Tensor, Tensor\)"),
    ],
)
def test_other_batches(batch, got):
    student = network()
    with pytest.raises(TypeError, match=rf"Expected batches \(x, y\) of two tensors, got a {got}"):
        Distiller(student, None).fit([batch], 1, sgd(student))


def test_other_outputs():
    student = Wrapped(network(), lambda logits: {"out": logits})
    with pytest.raises(TypeError, match="Expected the student to give logits .*, got dict"):
        Distiller(student, None).fit(batches(), 1, sgd(student))
    teacher = Wrapped(network(), lambda logits: None)
    with pytest.raises(TypeError, match="Expected the teacher to give logits .*, got NoneType"):
        student = network()
        Distiller(student, teacher).fit(batches(), 1, sgd(student))


def test_empty_loader(tmp_path):
    file, student = tmp_path / "run", network()
    for loader in ([], iter([])):
        with pytest.raises(ValueError, match="Expected train_loader to give at least one batch"):
            Distiller(student, None).fit(loader, 1, sgd(student), checkpoint=file)
    with pytest.raises(ValueError, match="Expected val_loader to give at least one batch"):
        Distiller(student, None).fit(batches(), 1, sgd(student), val_loader=[], checkpoint=file)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="Expected train_loader .* in each epoch, got none in epoch 1"):
        Distiller(student, None).fit(iter(batches()), 2, sgd(student))


def test_loss_that_is_not_finite_changes_nothing(tmp_path):
    file, student = tmp_path / "run", network()
    Distiller(student, None).fit(batches(), 1, sgd(student), checkpoint=file)
    saved, before = file.read_bytes(), copies(student[4])
    x, y = batches(1)[0]
    bad = [(torch.full_like(x, math.nan), y)]
    with pytest.raises(FloatingPointError, match="Expected a finite loss, got nan at epoch 1, batch 0$"):
        Distiller(student, None).fit(bad, 2, sgd(student), checkpoint=file)
    assert file.read_bytes() == saved and list(tmp_path.iterdir()) == [file]
    assert equal(copies(student[4]), before)
    unlabelled = [(x, torch.full_like(y, -100))]
    with pytest.raises(FloatingPointError, match="no labelled row"):
        Distiller(student, network()).fit(unlabelled, 1, sgd(student))


def test_settings_that_do_not_fit(tmp_path):
    student, teacher = network(), network()
    for arguments, error, said in (
        (("student", teacher), TypeError, "Expected student to be a torch.nn.Module, got str"),
        ((student, "teacher"), TypeError, "Expected teacher to be a torch.nn.Module or None, got str"),
        ((student, student), ValueError, "Expected teacher and student to be two modules"),
        ((student, teacher, 3), TypeError, "Expected loss to be callable, got int"),
        ((student, teacher, None, None, "l1", -1), ValueError, "Expected penalty_weight to be finite and at least 0"),
        ((student, teacher, None, None, None, 1), ValueError, "Expected a penalty for penalty_weight=1, got none"),
    ):
        with pytest.raises(error, match=said):
            Distiller(*arguments)
    distiller = Distiller(student, teacher)
    with pytest.raises(ValueError, match="Expected epochs to be an int of at least 1, got 0"):
        distiller.fit(batches(), 0, sgd(student))
    with pytest.raises(TypeError, match="Expected optimizer to be a torch.optim.Optimizer, got float"):
        distiller.fit(batches(), 1, 0.1)
    with pytest.raises(ValueError, match="Expected an optimizer over the student's parameters, got one over none"):
        distiller.fit(batches(), 1, sgd(network()))
    with pytest.raises(
        ValueError, match="Expected an optimizer that leaves the teacher alone, got one that holds its 0.w"
    ):
        distiller.fit(batches(), 1, sgd(nn.ModuleList([student, teacher])))
    with pytest.raises(ValueError, match="Expected a checkpoint in a folder that exists, got"):
        distiller.fit(batches(), 1, sgd(student), checkpoint=tmp_path / "no" / "run")
    with pytest.raises(ValueError, match=r"Expected loss to give a scalar tensor, got shape \(3,\)"):
        Distiller(student, teacher, lambda s, t, y: s.sum(0)).fit(batches(), 1, sgd(student))
    for features in (None, {"0": "0"}):  # a forgotten return must not fail at what is added to it
        with pytest.raises(ValueError, match="Expected loss to give a scalar tensor, got NoneType"):
            Distiller(student, teacher, lambda s, t, y: None, features).fit(batches(), 1, sgd(student))
    with pytest.raises(ValueError, match="Expected penalty to give a scalar tensor, got NoneType"):
        Distiller(student, None, penalty=lambda model: None, penalty_weight=1.0).fit(batches(), 1, sgd(student))
