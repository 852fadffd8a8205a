"""Sparsity as a function of the step, for gradual pruning; step k is the k-th call of ``Pruner.step()``, from 1 on."""

from __future__ import annotations

import math

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


class IterativeSL(SparsitySchedule):
    """Prune, train, prune again: ``rounds`` cuts, each of which leaves the same fraction of what was left before.

    Args:
        start, end: steps of the first and the last cut; those between are evenly spaced.
        rounds: how many cuts, at least 2.
        rewind_step: at each cut the weights that remain (and all else in the model's state) go back to their values of
            this step, at most ``start``, and the optimizer's state is dropped. None: training goes on from where it is.

    The learning rate is the scheduler's own: one whose period is ``(end - start) / (rounds - 1)`` steps rewinds it too.

    Source: Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019; Frankle et al., "Linear mode connectivity
    and the lottery ticket hypothesis", ICML 2020; for the learning rate: Renda et al., ICLR 2020.
    """

    def __init__(self, start: int, end: int, rounds: int, rewind_step: int | None = None) -> None:
        super().__init__(start, end)
        for name, value in (("rounds", rounds), ("rewind_step", 0 if rewind_step is None else rewind_step)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected {name} to be a whole number, got {value!r}")
        if not 2 <= rounds <= end - start + 1:
            raise ValueError(f"Expected from 2 rounds to one per step, {end - start + 1}, got {rounds}")
        if rewind_step is not None and not 0 <= rewind_step <= start:
            raise ValueError(f"Expected rewind_step in 0..start={start}, got {rewind_step}")
        self.rounds, self.rewind_step = rounds, rewind_step
        self._cuts = [start + round(k * (end - start) / (rounds - 1)) for k in range(rounds)]

    def is_update(self, step: int) -> bool:
        return step in self._cuts

    def sparsity_at(self, step: int, final: float) -> float:
        done = sum(cut <= step for cut in self._cuts)
        return final if done == self.rounds else 1 - (1 - final) ** (done / self.rounds)

    def __repr__(self) -> str:
        return f"IterativeSL(start={self.start}, end={self.end}, rounds={self.rounds}, rewind_step={self.rewind_step})"


class RigL(SparsitySchedule):
    """Sparse from ``start`` on, the mask moves: at each update the smallest weights go, others grow where |dL/dw| is.

    At ``start`` the model is cut to its final sparsity by the Pruner's importance ("random" in the paper, with the
    budget "erk"). Every ``update_frequency`` steps after that, and before ``end``, each layer loses the ``fraction_at``
    of its units with the smallest |w| and gains as many of those that were pruned, where the mean |gradient| since the
    last update is greatest. What grows starts at 0. From ``end`` on the mask is fixed.

    Args:
        start, end, update_frequency: in steps.
        fraction: of a layer's units that move at ``start``; it falls to 0 at ``end`` along half a cosine.

    Source: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, who grow by the gradient of one
    batch.
    """

    def __init__(self, start: int, end: int, update_frequency: int = 100, fraction: float = 0.3) -> None:
        super().__init__(start, end, update_frequency=update_frequency)
        self.fraction = check_sparsity(fraction, "fraction")

    def is_update(self, step: int) -> bool:
        return self.start <= step < self.end and (step - self.start) % self.update_frequency == 0

    def sparsity_at(self, step: int, final: float) -> float:
        return final if step >= self.start else 0.0

    def fraction_at(self, step: int) -> float:
        """Of a layer's units that move at this step; 0 at ``start``, where the first mask is made."""
        if not self.start < step < self.end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * (step - self.start) / (self.end - self.start)))

    def __repr__(self) -> str:
        return (
            f"RigL(start={self.start}, end={self.end}, update_frequency={self.update_frequency}, "
            f"fraction={self.fraction})"
        )
