"""The Pruner gathers importance while a model trains, makes the masks, and holds them through every optimiser step.

The model keeps its own ``weight`` Parameters; nothing is added to its modules or its state_dict, the masks live in a
MaskKeeper.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import Budget, Caps, check_scores, check_sparsity, plain
from .gatherers import GradientGatherer, InputGatherer
from .importance import Importance, find_importance, score, statistic_of
from .latency import LatencyBudget
from .layers import Ignored, check_kept, find_prunable, layers_left_dense, unwrap
from .mask_keeper import MaskKeeper
from .optimizers import moved_by
from .patterns import Layout, Units, find_pattern
from .permutation import Permutation, choose_permutation
from .regrowth import moved_masks
from .rewind import Rewind
from .saved_state import check_state
from .schedule import IterativeSL, RigL, SparsitySchedule
from .sharding import new_whole, whole

_log = logging.getLogger(__name__)


class Pruner:
    """Prunes a model while it trains; call :meth:`step` once after each ``optimizer.step()``.

    Without a schedule, importance is gathered over the first ``importance_steps`` calls, then the model is pruned once.
    With one, importance is gathered between the schedule's updates ("movement": from the start on). What is pruned
    stays pruned.

    Args:
        model: the weights of its convolutions and linear layers are pruned, a shared one once. Wrappers
            (DistributedDataParallel, DataParallel, torch.compile, AveragedModel) are looked through.
        sparsity: fraction of the prunable weights to remove, in [0, 1).
        importance: "gradient" (mean over batches of |dL/dw|), "magnitude", "random", "taylor", "snip", "movement",
            "fisher", "wanda", or a callable ``(name, weight, gradient) -> scores``, see
            :mod:`sparsekd.pruning.importance`.
        pattern: "unstructured", "4x1", "4x1-permuted", "2:4", ..., see :mod:`sparsekd.pruning.patterns`. N:M and V:N:M
            fix each layer's sparsity, whatever the budget; ``sparsity`` has to be 1 - N/M then.
        budget: "global", "uniform", "erk", a dict from name globs to sparsities, or what
            :func:`sparsekd.latency_budget` makes, see :mod:`sparsekd.pruning.budget`.
        schedule: :class:`CubicSL`, :class:`LinearSL`, :class:`IterativeSL`, :class:`RigL` or None.
        optimizer: held to the mask contract after each of its steps, for as long as it lives. Other optimizers of
            ``torch.optim`` that step with prunable weights are held to it too, for as long as the Pruner lives; weights
            that none of them moves are set to zero by :meth:`step`.
        ignored_layers: modules, names or globs, one or several, that stay dense; "first_last" is the first convolution
            and the last linear layer, named in the log (INFO); ``()`` is none. A container stands for all that it
            holds.
        importance_steps: calls of :meth:`step` before the only pruning when there is no schedule.
        min_sparsity, max_sparsity: of single layers; a number for all, a dict from name globs for some.
        scaler: a GradScaler, by whose scale gradients are divided; needed only where the scale changes on the way.

    Gradients are copied when autograd has accumulated them, so accumulation, clipping, closures and
    ``zero_grad(set_to_none=True)`` make no difference, and a common scale (GradScaler) cancels. Under torch.distributed
    importance is reduced over all ranks, so that all make the same masks.

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: arguments out of range; a prunable weight that is parametrised or lazy.
        RuntimeError: gradients are asked for, and a prunable weight is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        importance: str | Importance = "gradient",
        pattern: str = "unstructured",
        budget: str | Mapping[str, float] | LatencyBudget = "global",
        schedule: SparsitySchedule | None = None,
        optimizer: Optimizer | None = None,
        ignored_layers: Ignored = "first_last",
        importance_steps: int = 32,
        *,
        min_sparsity: Caps = None,
        max_sparsity: Caps = None,
        scaler: object = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
        sparsity = check_sparsity(sparsity)
        self._importance, self._pattern = find_importance(importance), find_pattern(pattern)
        if schedule is not None and not isinstance(schedule, SparsitySchedule):
            raise TypeError(
                f"Expected schedule to be CubicSL, LinearSL, IterativeSL, RigL or None, got {type(schedule).__name__}"
            )
        if isinstance(schedule, RigL) and self._pattern.sparsity is not None:
            raise ValueError(f"Expected a pattern other than N:M and V:N:M with RigL, got {self._pattern.name!r}")
        own = isinstance(budget, (Mapping, LatencyBudget))  # which do without `sparsity`
        if schedule is not None and not own and schedule.init_sparsity > sparsity:
            raise ValueError(f"Expected init_sparsity of at most sparsity={sparsity}, got {schedule.init_sparsity}")
        if isinstance(importance_steps, bool) or not isinstance(importance_steps, int) or importance_steps < 1:
            raise ValueError(f"Expected importance_steps to be a whole number from 1 on, got {importance_steps!r}")
        self._model = unwrap(model)
        self._owners = find_prunable(self._model, ignored_layers)
        self._weights = {name: module.weight for name, module in self._owners.items()}
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"Expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if optimizer is not None and not moved_by([optimizer], self._weights):
            raise ValueError("Expected an optimizer of the prunable weights, got one that holds none of them")
        self._schedule, self._importance_steps = schedule, importance_steps
        self._layouts = {name: Layout.of(module) for name, module in self._owners.items()}
        self._budget = self._make_budget(budget, sparsity, min_sparsity, max_sparsity)
        label = importance if isinstance(importance, str) else getattr(importance, "__qualname__", None)
        self._settings = {
            "sparsity": sparsity,
            "importance": label or type(importance).__name__,
            "pattern": self._pattern.name,
            "budget": plain(budget),
            "min_sparsity": plain(min_sparsity),
            "max_sparsity": plain(max_sparsity),
            "schedule": repr(schedule),
            "importance_steps": importance_steps,
        }
        self._permutations: dict[str, Permutation] = {}
        self._regrown = 0
        self._steps, self._finished, self._squashed = 0, False, False
        statistic = "|g|" if isinstance(schedule, RigL) else statistic_of(self._importance)
        if isinstance(schedule, RigL) and statistic_of(self._importance) not in (None, "|g|"):
            raise ValueError(f"Expected an importance of |g| or of the weights alone with RigL, got {importance!r}")
        self._gatherer = None
        if statistic == "x^2":
            self._gatherer = InputGatherer(self._owners)
        elif statistic is not None:
            self._gatherer = GradientGatherer(self._weights, statistic, scaler)
        if self._gatherer is not None:
            self._gatherer.attach()
        self._keeper = MaskKeeper(self._weights, optimizer)
        rewinds = isinstance(schedule, IterativeSL) and schedule.rewind_step is not None
        self._rewind = Rewind(self._model, self._keeper, schedule.rewind_step) if rewinds else None
        if isinstance(ignored_layers, str) and ignored_layers == "first_last" and self.dense_layers:
            said = "stay dense, as the first convolution and the last linear layer: ignored_layers=() prunes all"
            _log.info("%s: %s", ", ".join(self.dense_layers), said)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name to its bool mask, True = keep: all True before pruning, empty after :meth:`squash_mask`."""
        return dict(self._keeper.masks)

    @property
    def dense_layers(self) -> tuple[str, ...]:
        """Names of the convolutions and linear layers that are not pruned, by ``ignored_layers``."""
        return layers_left_dense(self._model, self._weights)

    @property
    def permutations(self) -> dict[str, Permutation]:
        """Parameter name to the grouping of its output channels, of a permuted pattern, once it is chosen."""
        return dict(self._permutations)

    @property
    def regrown(self) -> int:
        """How many pruned weights have come back; 0 under every schedule but :class:`RigL`."""
        return self._regrown

    @property
    def finished(self) -> bool:
        """Whether the final masks are made."""
        return self._finished

    @property
    def skipped_batches(self) -> int:
        """How many batches were left out of the importance because a gradient was not finite."""
        return 0 if self._gatherer is None else self._gatherer.skipped

    def sparsity(self, total: bool = False) -> float:
        """Fraction of the prunable weights that is pruned; with ``total``, of all parameters of the model.

        By the masks; after :meth:`squash_mask` by the zeros that remain in the prunable weights.
        """
        if self._squashed:
            pruned = sum(int((whole(weight.detach()) == 0).sum()) for weight in self._weights.values())
        else:
            pruned = sum(int(mask.sum()) for mask in self._keeper.pruned.values())
        return pruned / sum(p.numel() for p in (self._model.parameters() if total else self._weights.values()))

    def step(self) -> None:
        """Takes in one batch; makes new masks when it is time for that.

        Raises:
            RuntimeError: gradients are missing at pruning time; the weights are no longer those of the constructor;
                the masks are squashed.
            ValueError: scores are NaN or of another shape than the weight. The masks are then as before.
        """
        self._check_in_use("step")
        check_kept(self._model, self._owners, self._weights)
        changed = False
        if not self._finished:
            step = self._steps + 1
            if self._gatherer is not None:
                self._gatherer.take_in()
            if self._schedule is None:
                if step == self._importance_steps:
                    changed = self._prune(float)
                    self._finished = True
            else:
                last = step >= self._schedule.end
                # A GradScaler finds its scale by overflows: masks then change at the next update, not at this one.
                if self._schedule.is_update(step) and (last or not self._only_overflows()):
                    regrow = self._schedule.fraction_at(step) if isinstance(self._schedule, RigL) else 0.0
                    if regrow:
                        changed = self._regrow(regrow)
                    else:
                        changed = self._prune(lambda final: self._schedule.sparsity_at(step, final))
                self._finished = last
            if self._finished and self._gatherer is not None:
                self._gatherer.detach()
        # Only now: after an error the next call is this step again.
        self._steps += 1
        if self._rewind is not None:
            self._rewind.after(self._steps, changed, self._finished)
        if changed:
            self._keeper.begin_anew()
        if changed or not self._keeper.all_moved():
            self._keeper.hold()

    def _only_overflows(self) -> bool:
        return self._gatherer is not None and self._gatherer.only_overflows()

    def _prune(self, at: Callable[[float], float]) -> bool:
        """Makes all masks, then takes them; False when no further weight has to go."""
        total = self._budget.total(at)
        changed = total > sum(int(pruned.sum()) for pruned in self._keeper.pruned.values())
        if self._pattern.sparsity is not None:
            # As many may be gone already, though not in the right places: the shape is complete only at the end.
            changed = total > 0
        changed = changed or (self._budget.undecided and at(1.0) > 0)
        if changed:
            gradients = None if self._gatherer is None else self._gatherer.means()
            scores = score(self._importance, self._weights, gradients)
            for name, pruned in self._keeper.pruned.items():
                # What is pruned stays pruned; the masks may not have followed a model that has moved.
                scores[name] = scores[name].masked_fill(pruned.to(scores[name].device), -math.inf)
            check_scores(scores)
            self._choose_permutations(scores)
            units = {name: self._units(name, values) for name, values in scores.items()}
            self._budget.decide(units)
            masks = {}
            for name, gone in self._budget.choose(units, at).items():
                masks[name] = new_whole(self._weights[name], torch.bool)  # in the weight's memory format
                masks[name].copy_(units[name].mask(gone, scores[name].shape))
                if name in self._keeper.pruned:
                    # A schedule may ask for less in one layer while it asks for more in all.
                    masks[name] &= self._keeper.masks[name].to(masks[name].device)
            emptied = [name for name in masks if self._keeper.masks[name].any() and not masks[name].any()]
            if emptied:
                warnings.warn(
                    f"Expected each layer to keep some weights, got none left in {', '.join(emptied)}: lower the "
                    'sparsity, name these in ignored_layers, or take budget="uniform"',
                    stacklevel=3,
                )
            self._keeper.take(masks)
        if self._gatherer is not None and not getattr(self._importance, "cumulative", False):
            self._gatherer.forget()
        return changed

    def _make_budget(self, budget: str | Mapping | LatencyBudget, sparsity: float, low: Caps, high: Caps) -> Budget:
        shapes, fixed = {name: weight.shape for name, weight in self._weights.items()}, self._pattern.sparsity
        if fixed is None:
            return Budget(budget, sparsity, shapes, low, high)
        if abs(sparsity - fixed) > 1e-9:
            raise ValueError(f"Expected sparsity={fixed:g} with pattern {self._pattern.name!r}, got {sparsity}")
        limits = {name: self._pattern.limit(shape, self._layouts[name]) for name, shape in shapes.items()}
        return Budget(budget, sparsity, shapes, low, high, limits)

    def _units(self, name: str, scores: Tensor) -> Units:
        order = self._permutations[name].order if name in self._permutations else None
        return self._pattern.units(scores, self._layouts[name], order)

    def _choose_permutations(self, scores: Mapping[str, Tensor]) -> None:
        """Once, before the first weights go: afterwards whole vectors are zero, which no other grouping would keep."""
        if not self._pattern.permuted or self._permutations:
            return
        # Each layer's share as if single weights competed, at the final sparsity.
        counts = self._budget.counts(scores)
        for name, values in scores.items():
            sparsity = counts[name] / max(values.numel(), 1)
            self._permutations[name] = choose_permutation(values, self._pattern.vector, sparsity, self._layouts[name])

    def _regrow(self, fraction: float) -> bool:
        gradients = score(lambda name, weight, gradient: gradient, self._weights, self._gatherer.means())
        masks, regrown = moved_masks(
            self._weights, self._keeper.masks, set(self._keeper.pruned), gradients, fraction, self._units
        )
        self._gatherer.forget()
        self._keeper.take(masks)
        self._regrown += regrown
        return True

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Sets pruned weights to zero, here or, by name, in another model of the same architecture (an EMA copy).

        Raises:
            TypeError, ValueError: the other model is none, or has no parameter of that name and shape; it is then left
                as it was.
            RuntimeError: the masks are squashed.
        """
        self._check_in_use("apply_masks")
        if model is None:
            check_kept(self._model, self._owners, self._weights)
            return self._keeper.hold()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
        self._keeper.hold_in(dict(unwrap(model).named_parameters(remove_duplicate=False)))

    def squash_mask(self) -> None:
        """Drops masks and hooks. The zeros stay in the weights, and nothing holds them any longer.

        Raises:
            RuntimeError: the weights are no longer those of the constructor, so that there may be no zeros.
        """
        if self._squashed:
            return
        check_kept(self._model, self._owners, self._weights)
        self._keeper.hold()
        if self._gatherer is not None:
            self._gatherer.detach()
        self._keeper.release()
        self._squashed = True

    def state_dict(self) -> dict:
        """All that a bit-exact continuation needs, beside the state_dict of the model and of the optimiser.

        ``torch.load(weights_only=True)`` reads it. What is gathered belongs to this
        rank: under torch.distributed each rank saves and loads its own while gathering goes on.
        """
        self._check_in_use("state_dict")
        return {
            "settings": dict(self._settings),
            "masks": {name: mask.clone() for name, mask in self._keeper.masks.items()},
            "steps": self._steps,
            "finished": self._finished,
            "gathered": None if self._gatherer is None else self._gatherer.state_dict(),
            # Of a latency: measured again, it might be spent otherwise.
            "layers": dict(self._budget.layers) if self._budget.spending and self._budget.layers else None,
            "permutations": {name: vars(made) | {"order": made.order} for name, made in self._permutations.items()},
            "regrown": self._regrown,
            "snapshot": None if self._rewind is None else self._rewind.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` of a Pruner with the same settings was taken, and applies its masks.

        Raises:
            TypeError, ValueError: the state is of something else; nothing is changed then.
            RuntimeError: the weights are no longer those of the constructor; the masks are squashed.
        """
        self._check_in_use("load_state_dict")
        check_kept(self._model, self._owners, self._weights)
        last = self._importance_steps if self._schedule is None else self._schedule.end
        permutations = check_state(state, self._settings, self._weights, self._layouts, self._model.state_dict(), last)
        if self._gatherer is not None:
            self._gatherer.check_state(state["gathered"])
        if self._gatherer is not None:
            self._gatherer.load_state_dict(state["gathered"])
            if state["finished"]:
                self._gatherer.detach()
            else:
                self._gatherer.attach()
        self._keeper.take(
            {name: torch.empty_like(m).copy_(state["masks"][name]) for name, m in self._keeper.masks.items()}
        )
        self._steps, self._finished, self._regrown = state["steps"], state["finished"], state["regrown"]
        self._permutations = permutations
        if self._budget.spending is not None:
            self._budget.layers = None if state["layers"] is None else dict(state["layers"])
        if self._rewind is not None:
            self._rewind.load_state_dict(state["snapshot"])
        self._keeper.hold()

    def _check_in_use(self, method: str) -> None:
        if self._squashed:
            raise RuntimeError(f"Expected {method}() before squash_mask(), got a Pruner without masks")

    def __reduce_ex__(self, protocol: int) -> object:
        raise TypeError("Expected a Pruner to be saved by state_dict(), got copy or pickle: it is bound to its model")

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self._settings.items())
        dense = f", dense: {', '.join(self.dense_layers)}" if self.dense_layers else ""
        return f"Pruner({settings}; {len(self._weights)} layers{dense}, step {self._steps}, now {self.sparsity():.4f})"
