"""The whole recipe in one call: distil, prune gradually while distilling, retrain what remains, swap."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .distillation import Distiller
from .distillation.losses import group_lasso
from .latency import latency_budget, parse_target
from .measure import tuned
from .pruning import CubicSL, LatencyBudget, Pruner
from .pruning.patterns import find_pattern
from .reporting import compare_networks
from .sparse.convert import convert


def compress(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Iterable,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    epochs: int = 10,
    *,
    target: float | str | None = None,
    importance: str | Callable = "gradient",
    budget: str | dict | LatencyBudget | None = None,
    ignored_layers: object = "first_last",
    loss: nn.Module | None = None,
    penalty: str | Callable | None = None,
    penalty_weight: float = 0.0,
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
        sparsity, pattern, importance, ignored_layers: as in :class:`sparsekd.Pruner`.
        target: in the place of ``sparsity``: a fraction like it, or a speed-up ``"2x"`` or a time ``"3.5ms"`` of the
            whole network on ``example_inputs``, reached by ``budget="latency"``.
        budget: as in :class:`sparsekd.Pruner`, or "latency"; by default "latency" where the target is one of time,
            else "global".
        loss: a :class:`sparsekd.KDLoss` or a callable like it; by default its defaults.
        penalty, penalty_weight: R(W) and lambda, as in :class:`sparsekd.Distiller`; "group_lasso" has the pattern's V,
            where it has one.
        optimizer: of the student's parameters; by default SGD, lr 0.01, momentum 0.9.
        example_inputs: for :func:`sparsekd.convert` and a target of time; by default the first batch's inputs.
        checkpoint: resumes from this file when it exists.

    Returns:
        A converted copy of the student. A warning says by how much a target of time is missed.

    Raises:
        ValueError: neither or both of sparsity and target, a target out of reach, fewer than 4 epochs, an empty loader,
            one that gives fewer batches than its length says, or what the parts raise. TypeError: a loader without a
            length, or what the parts raise.
    """
    sparsity, timed = find_target(sparsity, target, budget)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 4:
        raise ValueError(f"Expected at least 4 epochs (distil, prune over two quarters, retrain), got {epochs!r}")
    try:
        batches = len(train_loader)
    except TypeError:  # a DataLoader of an IterableDataset has __len__, which raises
        raise TypeError(f"Expected a train_loader with a length, got {type(train_loader).__name__}") from None
    steps = batches * epochs
    if steps == 0:
        raise ValueError("Expected a train_loader with at least one batch, got none")
    if example_inputs is None and timed is not None:
        example_inputs = _first_inputs(student, train_loader)
    settings = {} if teacher is None or loss is None else {"loss": loss}
    penalty = penalty_of_pattern(penalty, pattern)
    distiller = Distiller(student, teacher, penalty=penalty, penalty_weight=penalty_weight, **settings)
    parameters = list(student.parameters())
    if not parameters:
        raise ValueError(f"Expected a student with parameters to train, got a {type(student).__name__} without")
    if optimizer is None:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    if timed is not None:
        budget = latency_budget(student, example_inputs, timed, pattern, ignored_layers)
    schedule = CubicSL(start=steps // 4, end=3 * steps // 4, update_frequency=max(steps // 40, 1))
    pruner = Pruner(student, sparsity, importance, pattern, budget or "global", schedule, optimizer, ignored_layers)
    if progress:
        print(f"dense: {', '.join(pruner.dense_layers) or 'no layer'}")
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
        example_inputs = _first_inputs(student, train_loader)
    fast = convert(student, example_inputs)
    if timed is not None and tuned.mode() != "off":
        _check_time(student, fast, example_inputs, timed)
    return fast


def penalty_of_pattern(penalty: str | Callable | None, pattern: str) -> str | Callable | None:
    """The penalty; a group lasso over the vectors that the pattern prunes as one, consecutive ones if permuted."""
    vector = find_pattern(pattern).vector
    return group_lasso(vector) if penalty == "group_lasso" and vector > 1 else penalty


def find_target(
    sparsity: float | None, target: float | str | None, budget: object
) -> tuple[float | None, float | str | None]:
    """The sparsity for a Pruner, and the target of time or None; ValueError where arguments contradict each other."""
    if (sparsity is None) == (target is None):
        raise ValueError(f"Expected either a sparsity or a target, got sparsity={sparsity!r} and target={target!r}")
    kind, value = ("sparsity", sparsity) if target is None else parse_target(target)
    if kind == "sparsity":
        if budget == "latency":
            raise ValueError(f'Expected a target of time, "2x" or "3.5ms", with budget="latency", got {value!r}')
        return value, None
    if budget not in (None, "latency"):
        raise ValueError(f'Expected budget="latency" with a target of time, got {budget!r}')
    return 0.0, target


def _first_inputs(student: nn.Module, train_loader: Iterable) -> torch.Tensor:
    parameter = next(student.parameters(), torch.empty(0))
    return next(iter(train_loader))[0].to(parameter.device)


def _check_time(student: nn.Module, fast: nn.Module, example_inputs: object, timed: float | str) -> None:
    """Warns where the swapped network misses what was asked for."""
    found, (kind, asked) = compare_networks(student, fast, example_inputs), parse_target(timed)
    if found.speedup < asked if kind == "speed-up" else found.sparse_ms > asked:
        warnings.warn(
            f"Expected {timed if isinstance(timed, str) else f'{timed} ms'} after pruning, got {found.speedup:.2f}x "
            f"({found.sparse_ms:.3g} ms, dense {found.dense_ms:.3g} ms)",
            stacklevel=3,
        )
