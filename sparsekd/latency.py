"""latency_budget: what each layer would take at every sparsity, measured here, for a Pruner that prunes to a time.

Layers take longer in their network, where caches are cold, than alone. So a network with zeros at random places, at the
sparsities that would reach the target, is swapped and timed once, and the layers' sparse times are scaled by what it
took more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from torch import nn

from .measure import tuned
from .measure.machine import TIMED
from .measure.timing import device_of
from .pruning.latency import LEVELS, LatencyBudget, Spending
from .pruning.layers import Ignored, find_prunable
from .pruning.patterns import Units
from .reporting import compare_networks, time_dense, vector_of
from .sparse import anchors
from .sparse.convert import convert
from .sparse.dispatch import KINDS, MIN_SPARSITY
from .sparse.surgery import copied, record_inputs


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each layer by its sparsity; call it with a layer's name and a sparsity."""

    sparsities: Sequence[float]  # rising, from 0 (dense) on
    ms: dict[str, list[float]]  # layer's name to its times at these

    def __call__(self, layer: str, sparsity: float) -> float:
        """0.0 for a layer that is not in it; a straight line between two sparsities."""
        return float(np.interp(sparsity, self.sparsities, self.ms[layer])) if layer in self.ms else 0.0

    def scaled(self, factor: float) -> LatencyTable:
        """With sparse times ``factor`` as long, yet no longer than dense ones."""
        return replace(
            self, ms={name: [ms[0], *(min(ms[0], factor * t) for t in ms[1:])] for name, ms in self.ms.items()}
        )


def measure_layers(model: nn.Module, example_inputs: object, pattern: str = "unstructured") -> LatencyTable:
    """Times of the Conv1d, Conv2d and Linear layers of a model, at the inputs that reach them.

    As :func:`sparsekd.would_it_be_faster` tells them: from four densities measured here and kept on disk, or by the
    cost model under ``SPARSEKD_TUNE=off`` (ValueError on a GPU, which it does not know).
    """
    vector = vector_of(pattern.removesuffix("-permuted"))
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    found = {}
    for module, inputs in record_inputs(model, example_inputs).items():
        if type(module) not in KINDS or module.weight.numel() == 0:
            continue
        if (device := device_of(module, inputs)).type not in TIMED:
            raise ValueError(f"Expected a model on the CPU or on CUDA, where sparse layers are timed, got {device}")
        made = [anchors.predict(module, inputs, vector, 1 - level)[0] for level in LEVELS]
        dense = made[0].dense_ms
        found[names[module]] = [
            dense if level < MIN_SPARSITY else min(dense, of.sparse_ms) for level, of in zip(LEVELS, made, strict=True)
        ]
    tuned.flush()
    return LatencyTable(LEVELS, found)


def latency_budget(
    model: nn.Module,
    example_inputs: object,
    target: str | float,
    pattern: str = "unstructured",
    ignored_layers: Ignored = "first_last",
) -> LatencyBudget:
    """A budget for :class:`sparsekd.Pruner` that spends sparsity where it buys time on this machine, or on its GPU.

    Each layer is timed (:func:`measure_layers`), and so is the whole network, dense and with zeros at random places:
    what is not in its layers counts as fixed. Under ``SPARSEKD_TUNE=off`` nothing is measured; the network then is its
    layers, by the cost model.

    Args:
        example_inputs: of the batch size that counts: a tensor, a tuple of positional or a dict of named arguments.
        target: of the whole network: a speed-up over the better of its dense ways, ``"2x"``, or milliseconds,
            ``"3.5ms"`` or 3.5.
        pattern: the Pruner's: "unstructured", "Vx1" or "Vx1-permuted".
        ignored_layers: as in the Pruner.

    Raises:
        TypeError, ValueError: another target or pattern; a model without layers that have sparse twins, or elsewhere
            than on the CPU and on CUDA; a target out of reach; SPARSEKD_TUNE=off on CUDA.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    kind, value = parse_target(target)
    if kind == "sparsity":
        kind = "ms"  # 0.5 alone are milliseconds here
    table = measure_layers(model, example_inputs, pattern)
    if not table.ms:
        raise ValueError("Expected a model with a Conv1d, Conv2d or Linear that the example reaches, got none")
    measured = tuned.mode() != "off"
    network_ms = time_dense(model, example_inputs) if measured else sum(times[0] for times in table.ms.values())
    asked = f"{value:g}x" if kind == "speed-up" else f"{value:g} ms"
    budget = LatencyBudget(table, network_ms / value if kind == "speed-up" else value, network_ms, asked)
    weights = {name: layer.weight for name, layer in find_prunable(model, ignored_layers).items()}
    spending = _spending(budget, weights)
    if not measured:
        return budget
    # Uniform scores: a layer keeps the share of its importance that it keeps of its weights.
    layers = spending.choose({name: Units(torch.ones(weight.numel()), None, None) for name, weight in weights.items()})
    foretold = spending.ms(layers) - spending.fixed
    if not foretold or not any(layers.values()):
        return budget
    taken = _try(model, example_inputs, layers, vector_of(pattern.removesuffix("-permuted"))) - spending.fixed
    budget = replace(budget, latency=table.scaled(min(max(taken / foretold, 0.5), 2.0)))
    _spending(budget, weights)
    return budget


def _spending(budget: LatencyBudget, weights: dict[str, nn.Parameter]) -> Spending:
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return Spending(budget, sizes, dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 1.0))


def _try(model: nn.Module, example_inputs: object, layers: dict[str, float], vector: int) -> float:
    """Milliseconds of the swapped network with zeros at random places of its layers."""
    trial = copied(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays dense is no news here
        for name, sparsity in layers.items():
            layer = trial.get_submodule(name.rpartition(".")[0])
            if sparsity and type(layer) in KINDS:
                mask = anchors.random_mask(layer.weight, sparsity, vector, getattr(layer, "groups", 1))
                # What is left carries a signal to the end, by which outputs are compared.
                layer.weight.mul_(mask).div_((1 - sparsity) ** 0.5)
        return compare_networks(model, convert(trial, example_inputs, inplace=True), example_inputs).sparse_ms


def parse_target(target: str | float) -> tuple[str, float]:
    """("sparsity", 0.9), ("speed-up", 2.0) of "2x" or ("ms", 3.5) of "3.5ms"; a number from 1 on is milliseconds too.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(target, str):
        text = target.strip().lower()
        unit = next((unit for unit in ("ms", "x") if text.endswith(unit)), "")
        try:
            value = float(text.removesuffix(unit))
        except ValueError:
            value = math.nan
    elif isinstance(target, Real) and not isinstance(target, bool):
        unit, value = "", float(target)
    else:
        raise TypeError(f'Expected target to be a sparsity, "2x" or "3.5ms", got {target!r}')
    if unit == "" and 0 <= value < 1:
        return "sparsity", value
    if unit == "x" and 1 <= value < math.inf:
        return "speed-up", value
    if unit != "x" and 0 < value < math.inf and (unit == "ms" or not isinstance(target, str)):
        return "ms", value
    raise ValueError(f'Expected target to be a sparsity in [0, 1), a speed-up "2x" or "3.5ms", got {target!r}')
