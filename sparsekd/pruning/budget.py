"""How many weights each layer loses.

==================== =================================================================================================
``"global"``          all prunable weights compete: round(sparsity * n) of them go, wherever their scores are lowest
``"uniform"``         each layer loses round(sparsity * n) of its own weights
``"erk"``             Erdős-Rényi-Kernel: a layer's density is in proportion to (in + out + kernel sizes) / (their
                      product), at most 1 (Evci et al., "Rigging the lottery", ICML 2020, after Mocanu et al., 2018)
``{glob: sparsity}``  each layer loses the fraction given for its name; of several matching globs the last one counts;
                      layers that no glob matches stay dense, and the Pruner's ``sparsity`` is not used
``LatencyBudget``    what brings the network to a latency at the least loss of importance (``latency.py``), chosen
                      at the first pruning; the Pruner's ``sparsity`` is not used
==================== =================================================================================================

Globs match the layer's name (``layer1.0.conv1``) or its parameter's (``layer1.0.conv1.weight``). All but the globs take
``min_sparsity`` and ``max_sparsity`` of layers, a number or a dict of globs: what one layer may not lose, others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor

from .latency import LatencyBudget, Spending
from .patterns import Units, lowest_units

BUDGETS = ("global", "uniform", "erk")
Caps = float | Mapping[str, float] | None


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Returns ``sparsity``, the fraction removed; TypeError when it is no number, ValueError outside [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"Expected {name} to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected {name} in [0, 1), got {sparsity}")
    return float(sparsity)


def matches(parameter: str, glob: str) -> bool:
    """Whether a glob matches a parameter's name or that of the layer that owns it."""
    return fnmatchcase(parameter, glob) or fnmatchcase(parameter.rpartition(".")[0], glob)


def by_glob(values: Mapping[str, float], names: list[str], what: str) -> dict[str, float]:
    """Parameter name to sparsity, the last matching glob's; ValueError for a glob that matches none."""
    found: dict[str, float] = {}
    for glob, value in values.items():
        value = check_sparsity(value, f"sparsity of {glob!r}")
        matching = [name for name in names if matches(name, glob)]
        if not matching:
            raise ValueError(f"Expected {what} that match a prunable layer, got {glob!r} for {', '.join(names)}")
        found.update(dict.fromkeys(matching, value))
    return found


def shared_sparsity(
    raw: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    low: Mapping[str, float],
    high: Mapping[str, float],
) -> dict[str, float]:
    """Sparsities 1 - eps * raw of each layer, within low..high, with the one eps that gives ``sparsity`` of all."""
    total = sum(sizes.values())

    def at(eps: float) -> dict[str, float]:
        return {name: min(max(1 - eps * raw[name], low[name]), high[name]) for name in sizes}

    begin, end = 0.0, 1.0 / min(raw.values())  # everything pruned as far as it may be; nothing more than it has to
    for _ in range(200):  # halved until the ends meet
        middle = (begin + end) / 2
        if sum(value * sizes[name] for name, value in at(middle).items()) > sparsity * total:
            begin = middle
        else:
            end = middle
    return at(end)


class Budget:
    """Distributes a sparsity over layers.

    Args:
        budget: "global", "uniform", "erk", a mapping from name globs to sparsities, or a LatencyBudget.
        sparsity: of all prunable weights; a mapping brings its own.
        sizes: parameter name to its number of weights, or to its shape, which "erk" needs.
        min_sparsity, max_sparsity: of single layers; a number for all, a dict for those that its globs match.
        limits: parameter name to the number of weights that its pattern removes in the end, where it fixes that (N:M).

    Raises:
        TypeError: a sparsity is no number.
        ValueError: an unknown budget, a sparsity outside [0, 1), a glob that matches no prunable layer, or caps that
            leave no room for the sparsity.
    """

    def __init__(
        self,
        budget: str | Mapping[str, float] | LatencyBudget,
        sparsity: float,
        sizes: Mapping[str, int | torch.Size],
        min_sparsity: Caps = None,
        max_sparsity: Caps = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes = {name: size if isinstance(size, int) else math.prod(size) for name, size in sizes.items()}
        self.sparsity = check_sparsity(sparsity)
        self.layers: dict[str, float] | None = None  # final sparsity of each layer; None: they compete
        self.spending: Spending | None = None  # of a latency, until :meth:`decide` knows the layers
        names = list(self.sizes)
        explicit, timed = isinstance(budget, Mapping), isinstance(budget, LatencyBudget)
        if isinstance(budget, str) and budget == "latency":
            raise ValueError(
                "Expected a budget of latency with its times, sparsekd.latency_budget(model, example_inputs, target), "
                "got 'latency'"
            )
        if not explicit and not timed and budget not in BUDGETS:
            known = ", ".join(map(repr, BUDGETS))
            raise ValueError(f"Expected budget to be one of {known} or a dict of name globs, got {budget!r}")
        if explicit and not (min_sparsity is None and max_sparsity is None):
            raise ValueError(
                "Expected no min_sparsity and max_sparsity beside a budget of explicit sparsities, got some"
            )
        self.low, self.high = (
            self._caps(min_sparsity, 0.0, "min_sparsity"),
            self._caps(max_sparsity, 1.0, "max_sparsity"),
        )
        if limits is not None:
            if explicit or timed or self.capped:
                raise ValueError(
                    "Expected no budget of single layers with a pattern that fixes their sparsity, got one"
                )
            self.layers = {name: limits[name] / max(self.sizes[name], 1) for name in names}
        elif explicit:
            self.layers = dict.fromkeys(names, 0.0) | by_glob(budget, names, "budget globs")
        elif timed:
            self._check_caps()
            self.spending = Spending(budget, self.sizes, self.low, self.high)
        elif budget != "global" or self.capped:
            self._check_room()
        if self.layers is None and not timed and budget == "uniform":
            self.layers = dict.fromkeys(names, self.sparsity)
            if self.capped:
                self.layers = shared_sparsity(dict.fromkeys(names, 1.0), self.sizes, self.sparsity, self.low, self.high)
        elif self.layers is None and not timed and budget == "erk":
            raw = {name: sum(shape) / max(math.prod(shape), 1) for name, shape in sizes.items()}
            self.layers = shared_sparsity(raw, self.sizes, self.sparsity, self.low, self.high)

    @property
    def capped(self) -> bool:
        return any(self.low.values()) or any(value < 1 for value in self.high.values())

    def _caps(self, caps: Caps, default: float, name: str) -> dict[str, float]:
        found = dict.fromkeys(self.sizes, default)
        if isinstance(caps, Mapping):
            found |= by_glob(caps, list(self.sizes), f"{name} globs")
        elif caps is not None:
            found = dict.fromkeys(self.sizes, check_sparsity(caps, name))
        return found

    def _check_caps(self) -> None:
        crossed = [name for name in self.sizes if self.low[name] > self.high[name]]
        if crossed:
            raise ValueError(f"Expected min_sparsity of at most max_sparsity, got more for {', '.join(crossed)}")

    def _check_room(self) -> None:
        self._check_caps()
        total = max(sum(self.sizes.values()), 1)
        least, most = (sum(caps[n] * size for n, size in self.sizes.items()) / total for caps in (self.low, self.high))
        if not least - 1e-9 <= self.sparsity <= most + 1e-9:
            raise ValueError(
                f"Expected a sparsity that min_sparsity and max_sparsity allow, {least:.4f}..{most:.4f}, "
                f"got {self.sparsity}"
            )

    @property
    def undecided(self) -> bool:
        """Whether how much each layer loses waits for the first scores."""
        return self.spending is not None and self.layers is None

    def decide(self, units: Mapping[str, Units]) -> None:
        """What each layer loses under a latency, from now on."""
        if self.undecided:
            self.layers = self.spending.choose(units)

    def total(self, at: Callable[[float], float] = float) -> int:
        """How many weights go in all; ``at`` maps a final sparsity to that of the moment (a schedule). While it is
        undecided: 0."""
        if self.undecided:
            return 0
        if self.layers is None:
            return round(at(self.sparsity) * sum(self.sizes.values()))
        return sum(round(at(self.layers[name]) * size) for name, size in self.sizes.items())

    def choose(self, units: Mapping[str, Units], at: Callable[[float], float] = float) -> dict[str, Tensor]:
        """Which units of each layer go: bool ``[n]``.

        Args:
            units: of each layer; a score of -inf for what is pruned already.
            at: maps a final sparsity to that of the moment.
        """
        if self.layers is not None:
            return {
                name: lowest_units(made.scores, made.sizes, round(at(self.layers[name]) * self.sizes[name]))
                for name, made in units.items()
            }
        # Layers may lie on several devices.
        device = next(iter(units.values())).scores.device
        parts = []
        for name, made in units.items():
            scores = made.scores.to(device)
            if self.capped:
                # What has to go goes first, what has to stay takes no part; in between they compete.
                sizes = None if made.sizes is None else made.sizes.to(device)
                size = self.sizes[name]
                forced = lowest_units(scores, sizes, round(at(self.low[name]) * size) if self.low[name] else 0)
                allowed = lowest_units(scores, sizes, round(self.high[name] * size))
                scores = scores.masked_fill(forced, -math.inf).masked_fill(~allowed, math.inf)
            parts.append(scores)
        lengths = [len(part) for part in parts]
        sizes = None
        if any(made.sizes is not None for made in units.values()):
            sizes = torch.cat([made.sizes.to(device) for made in units.values()])
        chosen = lowest_units(torch.cat(parts), sizes, self.total(at)).split(lengths)
        return {name: part.to(made.scores.device) for (name, made), part in zip(units.items(), chosen, strict=True)}

    def counts(self, scores: Mapping[str, Tensor], at: Callable[[float], float] = float) -> dict[str, int]:
        """How many weights each layer loses when every weight is a unit of its own."""
        check_scores(scores)
        units = {name: Units(scores[name].flatten(), None, None) for name in self.sizes}
        if self.undecided:
            layers = self.spending.choose(units)
            return {name: round(at(layers[name]) * size) for name, size in self.sizes.items()}
        return {name: int(part.sum()) for name, part in self.choose(units, at).items()}


def plain(given: object) -> object:
    """A budget or caps as a checkpoint holds them: torch.load(weights_only=True) does not read numpy's floats."""
    if isinstance(given, Mapping):
        return {glob: float(value) for glob, value in given.items()}
    if isinstance(given, LatencyBudget):
        return str(given)
    return given if given is None or isinstance(given, str) else float(given)


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """ValueError for NaN, which no order has a place for."""
    for name, values in scores.items():
        missing = int(values.isnan().sum())
        if missing:
            raise ValueError(f"Expected scores without NaN, got {missing} of {values.numel()} NaN in {name}")
