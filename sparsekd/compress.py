"""The whole recipe in one call: distil, prune gradually while distilling, retrain what remains, swap."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .distillation import Distiller
from .pruning import CubicSL, Pruner
from .sparse.convert import convert


def compress(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Iterable,
    sparsity: float,
    pattern: str = "unstructured",
    epochs: int = 10,
    *,
    importance: str | Callable = "gradient",
    budget: str | dict = "global",
    ignored_layers: object = "first_last",
    loss: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    val_loader: Iterable | None = None,
    example_inputs: object = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = False,
) -> nn.Module:
    """Distils ``teacher`` into ``student`` for ``epochs``; the sparsity rises on a cubic schedule over the second
    quarter and the third of them, the last quarter retrains at the final masks. Then pruned layers are swapped where
    faster.

    Args:
        student: trained in place; keeps its dense shape, with zeros where pruned.
        teacher: frozen; None trains the student by cross entropy instead.
        train_loader: batches ``(x, y)``; needs a length.
        sparsity, pattern, importance, budget, ignored_layers: as in :class:`sparsekd.Pruner`.
        loss: a :class:`sparsekd.KDLoss` or a callable like it; by default its defaults.
        optimizer: of the student's parameters; by default SGD, lr 0.01, momentum 0.9.
        example_inputs: for :func:`sparsekd.convert`; by default the first batch's inputs.
        checkpoint: resumes from this file when it exists.

    Returns:
        A converted copy of the student.

    Raises:
        ValueError: fewer than 4 epochs, an empty loader, one that gives fewer batches than its length says, or what the
            parts raise. TypeError: a loader without a length, or what the parts raise.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 4:
        raise ValueError(f"Expected at least 4 epochs (distil, prune over two quarters, retrain), got {epochs!r}")
    try:
        batches = len(train_loader)
    except TypeError:  # a DataLoader of an IterableDataset has __len__, which raises
        raise TypeError(f"Expected a train_loader with a length, got {type(train_loader).__name__}") from None
    steps = batches * epochs
    if steps == 0:
        raise ValueError("Expected a train_loader with at least one batch, got none")
    distiller = Distiller(student, teacher, **({} if teacher is None or loss is None else {"loss": loss}))
    parameters = list(student.parameters())
    if not parameters:
        raise ValueError(f"Expected a student with parameters to train, got a {type(student).__name__} without")
    if optimizer is None:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    schedule = CubicSL(start=steps // 4, end=3 * steps // 4, update_frequency=max(steps // 40, 1))
    pruner = Pruner(student, sparsity, importance, pattern, budget, schedule, optimizer, ignored_layers)
    try:
        distiller.fit(
            train_loader,
            epochs,
            optimizer,
            pruner=pruner,
            val_loader=val_loader,
            checkpoint=checkpoint,
            progress=progress,
        )
        if not pruner.finished:
            raise ValueError(f"Expected a train_loader that gives its {batches} batches in each epoch, got fewer")
    finally:
        # Also after an error or an interrupt: its hook on the optimizer would hold these masks through the next run.
        pruner.squash_mask()
    if example_inputs is None:
        example_inputs = next(iter(train_loader))[0].to(parameters[0].device)
    return convert(student, example_inputs)
