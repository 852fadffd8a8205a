"""Sparsity over steps (one step = one call of ``Pruner.step``)."""

from __future__ import annotations

from .budget import check_sparsity


class SparsitySchedule:
    """Rises from ``init_sparsity`` at step ``start`` to the final sparsity at step ``end``, every ``update_frequency`` steps.

    Raises:
        ValueError: start below 0, end not after start, an update frequency below 1, a sparsity outside [0, 1).
    """

    def __init__(self, start: int, end: int, init_sparsity: float = 0.0, update_frequency: int = 1) -> None:
        for name, value in (("start", start), ("end", end), ("update_frequency", update_frequency)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected {name} to be a whole number of steps, got {value!r}")
        if not 0 <= start < end:
            raise ValueError(f"Expected 0 <= start < end, got start={start} and end={end}")
        if update_frequency < 1:
            raise ValueError(f"Expected update_frequency of at least 1, got {update_frequency}")
        self.start, self.end = start, end
        self.init_sparsity = check_sparsity(init_sparsity, "init_sparsity")
        self.update_frequency = update_frequency

    def is_update(self, step: int) -> bool:
        """Whether masks change at this step; always at ``end``."""
        if not self.start <= step <= self.end:
            return False
        return step == self.end or (step - self.start) % self.update_frequency == 0

    def sparsity_at(self, step: int, final: float) -> float:
        """The sparsity at this step; 0 before ``start``, ``final`` exactly from ``end`` on."""
        if step < self.start:
            return 0.0
        if step >= self.end:
            return final
        return final + (self.init_sparsity - final) * self._left((step - self.start) / (self.end - self.start))

    def _left(self, progress: float) -> float:
        """What is left of the way, 1 at progress 0 and 0 at 1."""
        raise NotImplementedError

    def __repr__(self) -> str:
        settings = f"init_sparsity={self.init_sparsity}, update_frequency={self.update_frequency}"
        return f"{type(self).__name__}(start={self.start}, end={self.end}, {settings})"


class CubicSL(SparsitySchedule):
    """Fast at first, slow at the end: s = s_f + (s_i - s_f) (1 - t)^3.

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    def _left(self, progress: float) -> float:
        return (1.0 - progress) ** 3


class LinearSL(SparsitySchedule):
    """The same step each time."""

    def _left(self, progress: float) -> float:
        return 1.0 - progress
