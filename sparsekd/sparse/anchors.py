"""How fast a layer would be at any sparsity, from a few densities that were measured on this machine.

A layer's sparse time grows with its density, nearly on a line, so that four densities with positions at random tell
all others. They are measured together with the dense layer, once for each size and V, and kept (``measure/tuned.py``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..measure import machine, tuned
from ..measure.machine import identity, timed_on
from ..measure.timing import compare
from . import cost_model
from .cost_model import Prediction
from .dispatch import dense_engines, dense_settings, evaluating, from_dense
from .problem import Problem

DENSITIES = (0.02, 0.1, 0.2, 0.4)
# Half of the cases in benchmarks/results/cost_model-avx2.json were off by less, in their speed-up. The machine was
# shared: measuring the same twice was as far apart. On a quiet one it is 1.5% (cost_model-avx512.json).
ERROR = 0.12


def random_mask(weight: Tensor, sparsity: float, vector: int, groups: int, seed: int = 0) -> Tensor:
    """bool, the weight's shape: V x 1 vectors kept at random, exactly round(density * vectors) of them."""
    per_group = weight.shape[0] // groups
    packed = -(-per_group // vector)
    columns = weight[0].numel()
    keep = torch.zeros(groups * packed * columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    keep[torch.randperm(keep.numel(), generator=generator)[: round((1 - sparsity) * keep.numel())]] = True
    rows = keep.view(groups, packed, 1, columns).expand(-1, -1, vector, -1).reshape(groups, packed * vector, columns)
    return rows[:, :per_group].reshape(weight.shape).to(weight.device)


def predict(layer: nn.Module, inputs: Sequence[Tensor], vector: int, density: float) -> tuple[Prediction, str]:
    """What the layer takes on its inputs, dense and at a density in vectors of V, and how that is known.

    From densities that were measured, now or before; from the cost model where SPARSEKD_TUNE=off, and then ValueError
    on a device that it does not know.
    """
    problems = [Problem.of(layer, x) for x in inputs]
    if tuned.mode() == "off":
        if (unknown := cost_model.unknown(machine.place(inputs[0]))) is not None:
            raise ValueError(f"Expected layers that were measured, or may be, got: {unknown}")
        return cost_model.predict(problems, vector, density), "predicted"
    known = tuned.of(identity(machine.place(inputs[0])))
    key = f"{json.dumps([list(p.as_row().values()) for p in problems])} V={vector} anchors{dense_settings(inputs[0])}"
    figures = known.get(key)
    if figures is None or "dense_ms" not in figures:
        figures = measured(layer, inputs, vector)
        known.put(key, figures)
    error = ERROR if machine.place(inputs[0]).type == "cpu" else unevenness(figures)
    return read_off(figures, density, error), "measured"


def read_off(figures: tuned.Figures, density: float, error: float = ERROR) -> Prediction:
    """What figures of :func:`measured` say of a density."""
    return Prediction(figures["dense_ms"], _between(_points(figures), density), error)


def unevenness(figures: tuned.Figures) -> float:
    """How far, relatively, a density between others is off the line through its neighbours, at the most."""
    points = _points(figures)
    left_out = ((points[:at] + points[at + 1 :], *points[at]) for at in range(1, len(points) - 1))
    return max((abs(_between(others, density) / ms - 1) for others, density, ms in left_out), default=0.0)


def _points(figures: tuned.Figures) -> list[tuple[float, float]]:
    return sorted((float(name), ms) for name, ms in figures.items() if name != "dense_ms")


def measured(
    layer: nn.Module, inputs: Sequence[Tensor], vector: int, beside: Mapping[str, Callable] | None = None
) -> tuned.Figures:
    """Milliseconds of the dense layer, and of sparse ones by their densities; and of what takes turns with them."""
    dense = copy.deepcopy(layer).eval()
    engines, twins = dense_engines(dense, inputs), {}
    for density in DENSITIES:
        mask = random_mask(dense.weight, 1 - density, vector, getattr(dense, "groups", 1))
        if mask.any():
            twin = from_dense(dense, mask, vector).eval()
            twins[str(twin.density)] = twin
    for name, twin in twins.items():
        engines[name] = lambda twin=twin: [twin(x) for x in inputs]
    with evaluating(dense):
        on = timed_on(machine.place(inputs[0]))
        timings = compare({**engines, **(beside or {})}, rounds=9, min_time=0.002, warmup=2, **on)
    ms = {name: timing.min * 1e3 for name, timing in timings.items()}
    dense_ms = min(ms[name] for name in engines if name not in twins)
    return {"dense_ms": dense_ms, **{name: ms[name] for name in (*twins, *(beside or {}))}}


def _between(points: list[tuple[float, float]], density: float) -> float:
    """On the line through the two neighbours, beyond the ends on that through the last two."""
    if len(points) == 1:
        return points[0][1]
    densities, ms = np.array(points).T
    at = int(np.clip(np.searchsorted(densities, density), 1, len(points) - 1))
    slope = (ms[at] - ms[at - 1]) / (densities[at] - densities[at - 1])
    return max(float(ms[at - 1] + slope * (density - densities[at - 1])), float(ms[0]) / 2)
