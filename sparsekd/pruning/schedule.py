"""Sparsity as a function of the step, for gradual pruning; step k is the k-th call of ``Pruner.step()``, from 1 on."""

from __future__ import annotations

from .budget import check_sparsity


class SparsitySchedule:
    """Rises from ``init_sparsity`` at step ``start`` to the final sparsity at step ``end``.

    Args:
        start, end: steps, 0 <= start < end.
        init_sparsity: pruned at ``start``, in [0, 1).
        update_frequency: masks change every so many steps after ``start``, and at ``end`` in any case.

    Raises:
        TypeError: steps that are no whole numbers.
        ValueError: values out of range.
    """

    def __init__(self, start: int, end: int, init_sparsity: float = 0.0, update_frequency: int = 1) -> None:
        for name, value in (("start", start), ("end", end), ("update_frequency", update_frequency)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected {name} to be a whole number of steps, got {value!r}")
        if not 0 <= start < end:
            raise ValueError(f"Expected 0 <= start < end, got start={start}, end={end}")
        if update_frequency < 1:
            raise ValueError(f"Expected update_frequency of at least 1, got {update_frequency}")
        self.start = start
        self.end = end
        self.init_sparsity = check_sparsity(init_sparsity, "init_sparsity")
        self.update_frequency = update_frequency

    def remaining(self, progress: float) -> float:
        """What is left of the way from the initial to the final sparsity: 1 at progress 0, 0 at progress 1."""
        raise NotImplementedError

    def is_update(self, step: int) -> bool:
        """Whether the masks change at this step."""
        inside = self.start <= step < self.end
        return step == self.end or (inside and (step - self.start) % self.update_frequency == 0)

    def sparsity_at(self, step: int, final: float) -> float:
        """The sparsity at this step on the way to ``final``: 0 before ``start``, exactly ``final`` from ``end`` on.

        A layer whose own ``final`` lies below ``init_sparsity`` starts at its ``final``.
        """
        if step < self.start:
            return 0.0
        if step >= self.end:
            return final
        first = min(self.init_sparsity, final)
        return final + (first - final) * self.remaining((step - self.start) / (self.end - self.start))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(start={self.start}, end={self.end}, init_sparsity={self.init_sparsity}, "
            f"update_frequency={self.update_frequency})"
        )


class CubicSL(SparsitySchedule):
    """Fast while many weights are redundant, slow towards the end: s = s_f + (s_i - s_f) (1 - t)^3.

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    def remaining(self, progress: float) -> float:
        return (1.0 - progress) ** 3


class LinearSL(SparsitySchedule):
    """At a constant rate: s = s_f + (s_i - s_f) (1 - t)."""

    def remaining(self, progress: float) -> float:
        return 1.0 - progress
