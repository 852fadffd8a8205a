"""A budget of time: what brings a network to a latency at the least loss of importance.

    maximise   product over layers of the share of their importance that remains
    so that    fixed + sum over layers of ms(layer, sparsity)  <=  target

Where sparsity buys no time a layer stays dense; where it buys much it loses much, but none loses nearly all, and the
scales of scores, which differ between layers, do not matter. The times come from outside, as a callable. Each layer has
LEVELS to choose from; at each the lowest of its scores go. The choice is exact but for the rounding of times to SLOTS:
dynamic programming over the time that is spent, as in Frantar and Alistarh, "SPDY: accurate pruning with speedup
guarantees", ICML 2022, whose losses of layers are searched for by calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.distributed as dist

from .patterns import Units
from .sharding import is_distributed

# 0, and densities from 0.7 down to 0.01 by equal ratios.
LEVELS = (0.0, *(1 - 0.7 * (0.01 / 0.7) ** (step / 29) for step in range(30)))
SLOTS = 20_000  # of the time that may be spent


@dataclass(frozen=True)
class LatencyBudget:
    """What a network may take, and what its layers take. ``sparsekd.latency_budget`` makes one by measurement.

    Args:
        latency: ``(layer's name, sparsity) -> ms``; at 0 the dense layer, 0.0 for a layer that it does not know.
        target_ms: of the whole network.
        network_ms: of the dense network; what its prunable layers do not account for counts as fixed. None: they are
            all that counts.
        asked: the target in words, by which a resumed run is known.

    Raises:
        TypeError, ValueError: not a callable; times that are no finite numbers above 0.
    """

    latency: Callable[[str, float], float]
    target_ms: float
    network_ms: float | None = None
    asked: str = ""

    def __post_init__(self) -> None:
        if not callable(self.latency):
            raise TypeError(f"Expected latency to be callable, got {type(self.latency).__name__}")
        for name, value in (("target_ms", self.target_ms), ("network_ms", self.network_ms)):
            if value is None and name == "network_ms":
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"Expected {name} to be a number of milliseconds, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"Expected {name} above 0 and finite, got {value}")

    def __str__(self) -> str:
        return f"latency {self.asked or f'{self.target_ms:g} ms'}"


class Spending:
    """A LatencyBudget over the layers of a model.

    Args:
        sizes: parameter name to its number of weights.
        low, high: parameter name to the least and the most that a layer may lose.

    Raises:
        ValueError: times that are none, or a target that no choice reaches.
    """

    def __init__(
        self, budget: LatencyBudget, sizes: Mapping[str, int], low: Mapping[str, float], high: Mapping[str, float]
    ) -> None:
        self.sizes, self.levels, self.times = dict(sizes), {}, {}
        dense = 0.0
        for name in sizes:
            layer = name.rpartition(".")[0]
            within = [level for level in LEVELS if low[name] < level < high[name]]
            self.levels[name] = [low[name], *within, *([high[name]] if low[name] < high[name] < 1 else [])]
            unpruned = _ms(budget.latency, layer, 0.0)
            # A sparse layer that is slower stays dense when it is swapped.
            self.times[name] = [min(_ms(budget.latency, layer, level), unpruned) for level in self.levels[name]]
            dense += unpruned
        whole = dense if budget.network_ms is None else budget.network_ms
        # Layers timed alone may take more than the network that holds them.
        scale = min(whole / dense, 1.0) if dense else 1.0
        self.times = {name: [ms * scale for ms in times] for name, times in self.times.items()}
        fixed = max(whole - dense, 0.0)
        self.room, self.fixed = budget.target_ms - fixed, fixed
        least = sum(map(min, self.times.values()))
        if least > self.room:
            raise ValueError(
                f"Expected a target within reach, at least {fixed + least:.4g} ms of {whole:.4g} ms dense "
                f"({whole / (fixed + least):.2f}x), got {budget}: {budget.target_ms:.4g} ms"
            )

    def choose(self, units: Mapping[str, Units]) -> dict[str, float]:
        """The sparsity of each layer, the same on every rank."""
        losses = [self._losses(name, units[name]) for name in self.sizes]
        chosen = cheapest(losses, [np.array(self.times[name]) for name in self.sizes], self.room)
        found = [self.levels[name][index] for name, index in zip(self.sizes, chosen, strict=True)]
        if is_distributed():  # each rank has measured times of its own
            dist.broadcast_object_list(found, src=0)
        return dict(zip(self.sizes, found, strict=True))

    def ms(self, layers: Mapping[str, float]) -> float:
        """What the network takes with layers at these of their levels."""
        return self.fixed + sum(self.times[name][self.levels[name].index(layers[name])] for name in self.sizes)

    def _losses(self, name: str, units: Units) -> np.ndarray:
        """-log of the share of importance that remains at each level; scores below 0 count as 0."""
        scores = units.scores.double().cpu().clamp(0, 1e30)
        weights = torch.ones_like(scores) if units.sizes is None else units.sizes.double().cpu()
        order = scores.argsort(stable=True)
        gone = torch.cat([scores.new_zeros(1), (scores * weights)[order].cumsum(0)])
        held = torch.cat([gone.new_zeros(1), weights[order].cumsum(0)])
        counts = torch.tensor([round(level * self.sizes[name]) for level in self.levels[name]]).double()
        gone, total = gone[torch.searchsorted(held, counts).clamp(max=len(gone) - 1)], gone[-1]
        return -(1 - gone / total if total else 1 - counts / max(self.sizes[name], 1)).clamp(min=1e-9).log().numpy()


def cheapest(losses: Sequence[np.ndarray], times: Sequence[np.ndarray], room: float) -> list[int]:
    """One choice per layer: the least sum of losses whose times add up to ``room`` at most.

    Times are rounded up to a SLOTS-th of the room, so that the sum never exceeds it.
    """
    free = [int(np.argmin(loss)) for loss in losses]
    if sum(own[index] for own, index in zip(times, free, strict=True)) <= room:
        return free
    fastest = [int(np.argmin(own)) for own in times]
    left = room - sum(own[index] for own, index in zip(times, fastest, strict=True))
    if left <= 0:
        return fastest
    best = np.zeros(SLOTS + 1)  # least loss of the layers so far, by slots spent beyond their fastest choices
    taken = []
    for loss, own in zip(losses, times, strict=True):
        costs = np.ceil((own - own.min()) / left * SLOTS - 1e-9).astype(np.int64)
        now, choice = np.full(SLOTS + 1, np.inf), np.zeros(SLOTS + 1, dtype=np.int64)
        for index in np.lexsort((loss, costs)):
            if costs[index] > SLOTS:
                continue
            moved = np.concatenate([np.full(costs[index], np.inf), best[: SLOTS + 1 - costs[index]] + loss[index]])
            better = moved < now
            now[better], choice[better] = moved[better], index
        best = now
        taken.append((choice, costs))
    found, spent = [], int(np.argmin(best))
    for choice, costs in reversed(taken):
        index = int(choice[spent])
        found.append(index)
        spent -= int(costs[index])
    return found[::-1]


def _ms(latency: Callable[[str, float], float], layer: str, sparsity: float) -> float:
    ms = float(latency(layer, sparsity))
    if not 0 <= ms < math.inf:
        raise ValueError(f"Expected latency({layer!r}, {sparsity:.3g}) to be milliseconds of at least 0, got {ms}")
    return ms
