"""How far a training is: a bar on a terminal, a line per epoch in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(loader: Iterable, done: int, epochs: int, progress: bool | None) -> Iterator[Callable]:
    """A function (loss, accuracy, batches done) that moves a bar on, writes a line per epoch, or does nothing."""
    terminal = sys.stdout.isatty()
    if not (terminal if progress is None else progress):
        yield lambda loss, accuracy, advance: None
    elif terminal:
        with _moving_bar(loader, done, epochs) as show:
            yield show
    else:
        yield _lines(done, epochs)


def _said(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.4f}")


def _lines(done: int, epochs: int) -> Callable:
    """For logs, which a bar would fill with its copies."""
    began, finished = time.perf_counter(), done

    def show(loss: float, accuracy: float | None, advance: int) -> None:
        nonlocal finished
        if advance == 0:  # the end of an epoch
            finished += 1
            left = (time.perf_counter() - began) / (finished - done) * (epochs - finished)
            print(f"  epoch {finished}/{epochs}: {_said(loss, accuracy)}, {left:.0f} s left", flush=True)

    return show


@contextmanager
def _moving_bar(loader: Iterable, done: int, epochs: int) -> Iterator[Callable]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    batches = len(loader) if hasattr(loader, "__len__") else None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(
            "", total=None if batches is None else epochs * batches, completed=0 if batches is None else done * batches
        )
        yield lambda loss, accuracy, advance: bar.update(task, advance=advance, description=_said(loss, accuracy))
