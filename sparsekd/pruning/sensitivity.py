"""How much accuracy each layer costs, by really pruning it: one layer at a time, all others as they are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .budget import check_sparsity
from .importance import Importance, find_importance, statistic_of
from .layers import Ignored
from .pruner import Pruner


@dataclass(frozen=True)
class Sensitivity:
    """What ``eval_fn`` gave: of the model as it is, and with single layers pruned."""

    baseline: float
    sparsities: list[float]
    layers: dict[str, list[float]]  # parameter name to the value at each sparsity

    def deltas(self) -> dict[str, list[float]]:
        """Value less the baseline; negative where pruning costs."""
        return {name: [value - self.baseline for value in values] for name, values in self.layers.items()}

    def ranking(self) -> list[str]:
        """Parameter names, the most sensitive first, by the mean delta."""
        return sorted(self.layers, key=lambda name: sum(self.layers[name]))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save_png(self, path: str | os.PathLike) -> None:
        """A line per layer: value against sparsity."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, values in self.layers.items():
            axes.plot(self.sparsities, values, marker="o", label=name.removesuffix(".weight"))
        axes.axhline(self.baseline, color="black", linestyle=":", label="as it is")
        axes.set_xlabel("sparsity of the layer")
        axes.set_ylabel("eval_fn")
        axes.legend(fontsize="small")
        figure.savefig(path)


def sensitivity(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    importance: str | Importance = "magnitude",
    pattern: str = "unstructured",
    ignored_layers: Ignored = (),
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    progress: bool | None = None,
) -> Sensitivity:
    """Prunes each layer alone to each sparsity, evaluates, and puts it back, bit for bit.

    Args:
        eval_fn: from the model to a number of which more is better, such as accuracy.
        importance, pattern: as in :class:`Pruner`. The first and the last layer are measured too, unless ignored.
        batches: ``(x, y)``, for an importance that needs gradients: those of ``loss_fn(model(x), y)``, taken in the
            mode that the model is in; without them such an importance is an error.
        progress: a bar; None shows it on a terminal only.

    Raises:
        ValueError, TypeError, RuntimeError: what the Pruner raises; a pattern that fixes its sparsity wants just that.
    """
    sparsities = [check_sparsity(value) for value in sparsities]
    with _put_back(model) as restore:
        scores = _scores(model, importance, ignored_layers, list(batches), loss_fn)
        restore()  # forwards in train mode have moved the statistics
        baseline = float(eval_fn(model))
        found: dict[str, list[float]] = {name: [] for name in scores}

        def known(name: str, weight: Tensor, gradient: None) -> Tensor:
            return scores[name]

        known.statistic = None
        with _bar(len(scores) * len(sparsities), progress) as done:
            for name in scores:
                others = [other.removesuffix(".weight") for other in scores if other != name]
                for sparsity in sparsities:
                    dense = [layer for layer in others if layer]
                    ignored = [*dense, *_as_list(ignored_layers)]
                    pruner = Pruner(model, sparsity, known, pattern, ignored_layers=ignored, importance_steps=1)
                    pruner.step()
                    pruner.squash_mask()
                    found[name].append(float(eval_fn(model)))
                    restore()
                    done(name)
        return Sensitivity(baseline, sparsities, found)


def gather_importance(
    model: nn.Module,
    importance: str | Importance = "gradient",
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    ignored_layers: Ignored = (),
) -> dict[str, Tensor]:
    """Parameter name to the scores of its weights, over all batches; nothing is pruned.

    Args:
        importance, batches, loss_fn, ignored_layers: as in :func:`sensitivity`.

    Raises:
        ValueError, TypeError, RuntimeError: what the Pruner raises, as for an importance without its data.
    """
    with _put_back(model):
        return _scores(model, importance, ignored_layers, list(batches), loss_fn)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """A function that puts the model's state back, bit for bit; at the end that, and its gradients."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]

    def restore() -> None:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(state[name])

    try:
        yield restore
    finally:
        restore()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def _as_list(ignored: Ignored) -> list:
    return [ignored] if isinstance(ignored, (str, nn.Module)) else list(ignored)


def _scores(model, importance, ignored_layers, given, loss_fn) -> dict[str, Tensor]:
    """The importance of every layer."""
    found, kept = find_importance(importance), {}

    def keeping(name: str, weight: Tensor, statistic: Tensor | None) -> Tensor:
        kept[name] = found(name, weight, statistic).detach().clone()
        return kept[name]

    keeping.statistic = statistic_of(found)
    steps = max(len(given), 1)
    # The weights that it removes are put back by the caller; scores are asked for only when something goes.
    pruner = Pruner(model, 0.5, keeping, ignored_layers=ignored_layers, importance_steps=steps)
    for index in range(steps):
        if keeping.statistic is not None and given:
            x, y = given[index]
            model.zero_grad(set_to_none=True)
            loss_fn(model(x), y).backward()
        pruner.step()
    pruner.squash_mask()
    return {name: kept[name] for name in kept}


class _bar:
    def __init__(self, total: int, progress: bool | None) -> None:
        self._bar = None
        if sys.stdout.isatty() if progress is None else progress:
            from rich.progress import Progress

            self._bar = Progress(transient=True)
            self._task = self._bar.add_task("sensitivity", total=total)

    def __enter__(self) -> Callable[[str], None]:
        if self._bar is None:
            return lambda name: None
        self._bar.start()
        return lambda name: self._bar.update(self._task, advance=1, description=name)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
