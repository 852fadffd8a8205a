"""The Pruner: gathers importance while the model trains, makes masks, and holds them through every optimiser step.

The model keeps its own ``weight`` Parameters; masks live here. After each step of the optimiser the pruned weights and
the optimiser's state at them are exactly zero, so neither momentum nor weight decay revives a weight.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .budget import check_budget, check_sparsity, prune_counts
from .importance import Criterion, criterion_of
from .patterns import pattern_of
from .schedule import SparsitySchedule

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel or torch.compile, so that names stay its own."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def _ignored(model: nn.Module, layers: dict[str, nn.Module], ignored_layers: object) -> set[str]:
    if ignored_layers == "first_last":
        convolutions = [name for name, module in layers.items() if not isinstance(module, nn.Linear)]
        linears = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        return {*convolutions[:1], *linears[-1:]}
    if isinstance(ignored_layers, (str, nn.Module)):
        ignored_layers = (ignored_layers,)
    if not isinstance(ignored_layers, Iterable):
        raise TypeError(f'Expected ignored_layers to be "first_last", modules, names or globs, got {ignored_layers!r}')
    found: set[str] = set()
    for item in ignored_layers:
        if isinstance(item, nn.Module):
            inside = {id(module) for module in item.modules()}
            matches = {name for name, module in layers.items() if id(module) in inside}
        elif isinstance(item, str):
            matches = set(fnmatch.filter(layers, item)) | {name for name in layers if name.startswith(f"{item}.")}
        else:
            raise TypeError(f"Expected ignored_layers to hold modules, names or globs, got {item!r}")
        if not matches:
            said = item if isinstance(item, str) else type(item).__name__
            raise ValueError(f"Expected ignored_layers to name layers of the model, got {said!r}, which matches none")
        found |= matches
    return found


def _prunable(model: nn.Module, ignored_layers: object) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Layer name to weight, each once; and the names of the layers left dense."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    ignored = _ignored(model, layers, ignored_layers)
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in layers.items():
        if name in ignored:
            continue
        called = name or type(module).__name__
        if "weight_orig" in module._parameters:
            raise ValueError(f"Expected a plain weight in {called}, got torch.nn.utils.prune's: call prune.remove first")
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"Expected a plain weight in {called}, got a parametrised one")
        if isinstance(module.weight, nn.UninitializedParameter):
            raise ValueError(f"Expected a weight with a shape in {called}, got a lazy one: run the model once first")
        if id(module.weight) not in seen and module.weight.requires_grad:
            seen.add(id(module.weight))
            weights[name] = module.weight
    if not weights:
        raise ValueError("Expected a model with prunable layers (convolutions, linear), got none that is not ignored or frozen")
    return weights, sorted(ignored)


class Pruner:
    """Prunes a model while it trains; call :meth:`step` once after each ``optimizer.step()``.

    Without a schedule it gathers importance over the first ``importance_steps`` calls and then prunes once. With one it
    gathers between the schedule's updates. Pruned weights stay pruned.

    Args:
        model: its convolutions and linear layers are pruned; parameters stay where they are.
        sparsity: fraction of the prunable weights to remove, in [0, 1).
        importance: "gradient" (mean over batches of |dL/dw|), "magnitude", "random", or a callable
            (:mod:`sparsekd.pruning.importance`).
        pattern: "unstructured".
        budget: "global", "uniform" or a dict from layer-name globs to sparsities (:mod:`sparsekd.pruning.budget`).
        schedule: :class:`CubicSL`, :class:`LinearSL` or None.
        optimizer: its state is zeroed at pruned weights after each of its steps. Without one, :meth:`step` zeroes the
            weights alone.
        ignored_layers: modules, names or globs that stay dense; "first_last" is the first convolution and the last
            linear layer, ``()`` is none.
        importance_steps: batches to gather when there is no schedule.

    Gradients are taken when autograd has accumulated them, so ``zero_grad(set_to_none=True)``, closures, gradient
    accumulation and clipping make no difference, and a common scale (GradScaler) cancels. A batch with a non-finite
    gradient is left out. Under torch.distributed the gathered sums are added over all ranks, so masks are the same.

    Raises:
        ValueError, TypeError: settings that do not fit. RuntimeError from :meth:`step`: gradients are missing.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        importance: str | Criterion = "gradient",
        pattern: str = "unstructured",
        budget: str | Mapping[str, float] = "global",
        schedule: SparsitySchedule | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        ignored_layers: object = "first_last",
        importance_steps: int = 32,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
        self._final = check_sparsity(sparsity)
        self._criterion, self._pattern = criterion_of(importance), pattern_of(pattern)
        if schedule is not None and not isinstance(schedule, SparsitySchedule):
            raise TypeError(f"Expected schedule to be CubicSL, LinearSL or None, got {type(schedule).__name__}")
        if schedule is not None and schedule.init_sparsity > self._final:
            raise ValueError(f"Expected init_sparsity up to the sparsity {sparsity}, got {schedule.init_sparsity}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        if isinstance(importance_steps, bool) or not isinstance(importance_steps, int) or importance_steps < 1:
            raise ValueError(f"Expected importance_steps of at least 1, got {importance_steps!r}")
        self._model = _unwrapped(model)
        self._weights, self.ignored = _prunable(self._model, ignored_layers)
        check_budget(budget, list(self._weights))
        self._budget, self._schedule, self._optimizer = budget, schedule, optimizer
        self._importance_steps = importance_steps
        self._masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self._weights.items()}
        self._pruned: dict[str, Tensor] = {}  # the masks' complements, of layers that have lost weights
        self._steps, self._skipped, self._finished, self._squashed = 0, 0, False, False
        self._forget()
        self._hooks = []
        if getattr(self._criterion, "needs_gradients", False):
            for name, weight in self._weights.items():
                self._hooks.append(weight.register_post_accumulate_grad_hook(_snapshot_hook(weakref.ref(self), name)))
        # Strong: the masks hold as long as the optimiser lives, also when the caller keeps only that.
        self._after_step = optimizer.register_step_post_hook(lambda *_: self._hold()) if optimizer is not None else None

    def _forget(self) -> None:
        """Starts gathering anew."""
        self._snapshots: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._batches = dict.fromkeys(self._weights, 0)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name to bool mask of its weight's shape, True = keep; all True before pruning."""
        return dict(self._masks)

    @property
    def finished(self) -> bool:
        """Whether the final masks are made."""
        return self._finished

    def sparsity(self, total: bool = False) -> float:
        """Fraction of the prunable weights that is pruned; with ``total``, of all the model's parameters."""
        pruned = sum(int((~mask).sum()) for mask in self._masks.values())
        if total:
            return pruned / sum(parameter.numel() for parameter in self._model.parameters())
        return pruned / sum(mask.numel() for mask in self._masks.values())

    def step(self) -> None:
        """Takes in one batch; prunes when it is time; zeroes the pruned weights."""
        if self._squashed:
            raise RuntimeError("Expected a pruner in use, got one after squash_mask()")
        if not self._finished:
            self._take_in()
            step = self._steps + 1
            if self._schedule is None:
                if step == self._importance_steps:
                    self._prune(self._final, 1.0)
                    self._finished = True
            elif self._schedule.is_update(step):
                target = self._schedule.sparsity_at(step, self._final)
                self._prune(target, target / self._final if self._final else 1.0)
                self._finished = step == self._schedule.end
        self._steps += 1
        if self._finished:
            self._release_gradient_hooks()
        self._hold()

    def _take_in(self) -> None:
        snapshots, self._snapshots = self._snapshots, {}
        if not snapshots:
            return
        if not all(bool(torch.isfinite(s).all()) for s in snapshots.values()):
            self._skipped += 1
            if self._skipped == 1:
                warnings.warn("a batch with non-finite gradients is left out of the importance", stacklevel=3)
            return
        for name, snapshot in snapshots.items():
            # Sums in float32 at least: half would lose small gradients.
            wide = snapshot if snapshot.dtype == torch.float64 else snapshot.float()
            self._sums[name] = wide if name not in self._sums else self._sums[name] + wide
            self._batches[name] += 1

    def _scores(self) -> dict[str, Tensor]:
        gathered: dict[str, Tensor | None] = dict.fromkeys(self._weights)
        if getattr(self._criterion, "needs_gradients", False):
            sums, batches = self._reduced()
            missing = [name for name, count in batches.items() if count == 0]
            if missing:
                left_out = f" ({self._skipped} batches had non-finite gradients)" if self._skipped else ""
                raise RuntimeError(
                    f"Expected gradients of every prunable layer, got none for {', '.join(missing[:5])}{left_out}: call "
                    "loss.backward() before step(), or name these layers in ignored_layers"
                )
            gathered = {name: sums[name] / batches[name] for name in self._weights}
        scores = {}
        for name, weight in self._weights.items():
            values = self._criterion(weight.detach(), gathered[name])
            if not isinstance(values, Tensor) or values.shape != weight.shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"Expected scores of shape {tuple(weight.shape)} for {name}, got {got}")
            # What is pruned stays pruned.
            scores[name] = values.detach().masked_fill(~self._masks[name], -math.inf)
        return scores

    def _reduced(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and batches over all ranks."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._sums, self._batches
        device = next(iter(self._weights.values())).device
        counts = torch.tensor([self._batches[name] for name in self._weights], device=device)
        dist.all_reduce(counts)
        sums = {}
        for name, weight in self._weights.items():
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            sums[name] = self._sums[name].clone() if name in self._sums else torch.zeros_like(weight, dtype=dtype)
            dist.all_reduce(sums[name])
        return sums, dict(zip(self._weights, counts.tolist(), strict=True))

    def _prune(self, sparsity: float, progress: float) -> None:
        scores = self._scores()
        counts = prune_counts(scores, sparsity, self._budget, progress)
        # All masks are made before any is taken, so that an error leaves everything as it was.
        masks = {}
        for name, values in scores.items():
            count = max(counts[name], int((~self._masks[name]).sum()))
            masks[name] = self._pattern(values, count)
        for name, mask in masks.items():
            if not bool(mask.any()) and bool(self._masks[name].any()):
                warnings.warn(f"{name} loses all its weights at this budget", stacklevel=4)
        self._take_masks(masks)
        self._forget()

    def _take_masks(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks
        self._pruned = {name: ~mask for name, mask in masks.items() if not bool(mask.all())}

    @torch.no_grad()
    def _hold(self) -> None:
        """Zeroes weights, and the optimiser's state, where pruned."""
        state = {} if self._optimizer is None else self._optimizer.state
        for name, pruned in self._pruned.items():
            weight = self._weights[name]
            # Filled, not multiplied: NaN times 0 is NaN.
            weight.masked_fill_(pruned, 0)
            for value in state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned, 0)

    @torch.no_grad()
    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Zeroes the pruned weights of the model, or of another of the same architecture (an EMA copy)."""
        if model is None:
            return self._hold()
        other = _unwrapped(model)
        for name, mask in self._masks.items():
            try:
                weight = other.get_submodule(name).weight
            except AttributeError:
                raise ValueError(f"Expected a model with a layer {name!r}, got one without") from None
            if weight.shape != mask.shape:
                raise ValueError(f"Expected {name} of shape {tuple(mask.shape)}, got {tuple(weight.shape)}")
            weight.masked_fill_(~mask.to(weight.device), 0)

    def _release_gradient_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._snapshots = {}

    def squash_mask(self) -> None:
        """Drops masks and hooks; the zeros stay in the weights and nothing holds them any more."""
        self._hold()
        self._release_gradient_hooks()
        if self._after_step is not None:
            self._after_step.remove()
            self._after_step = None
        self._squashed = True

    def state_dict(self) -> dict:
        """What a bit-exact continuation needs: masks, gathered sums, position. Save the model and optimiser beside it."""
        generator = getattr(self._criterion, "generator", None)
        return {
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
            "sums": {name: value.clone() for name, value in self._sums.items()},
            "batches": dict(self._batches),
            "steps": self._steps,
            "skipped": self._skipped,
            "finished": self._finished,
            "sparsity": self._final,
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues from :meth:`state_dict` of a pruner with the same settings; on an error nothing is changed."""
        expected = ("masks", "sums", "batches", "steps", "skipped", "finished", "sparsity", "generator")
        missing = [key for key in expected if key not in state]
        if missing:
            raise ValueError(f"Expected a Pruner's state_dict, got one without {', '.join(missing)}")
        if state["sparsity"] != self._final:
            raise ValueError(f"Expected the state of a pruner to sparsity {self._final}, got {state['sparsity']}")
        names = set(self._weights)
        if set(state["masks"]) != names:
            odd = sorted(names ^ set(state["masks"]))
            raise ValueError(f"Expected masks of the {len(names)} prunable layers, got a difference in {', '.join(odd[:5])}")
        for name, weight in self._weights.items():
            mask = state["masks"][name]
            if mask.shape != weight.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"Expected a bool mask of shape {tuple(weight.shape)} for {name}, got {mask.dtype} {tuple(mask.shape)}"
                )
        devices = {name: weight.device for name, weight in self._weights.items()}
        self._take_masks({name: mask.clone().to(devices[name]) for name, mask in state["masks"].items()})
        self._snapshots = {}
        self._sums = {name: value.clone().to(devices[name]) for name, value in state["sums"].items()}
        self._batches = dict(state["batches"])
        self._steps, self._skipped, self._finished = state["steps"], state["skipped"], state["finished"]
        if state["generator"] is not None and hasattr(self._criterion, "generator"):
            self._criterion.generator.set_state(state["generator"])
        if self._finished:
            self._release_gradient_hooks()
        self._hold()

    def __repr__(self) -> str:
        return (
            f"Pruner({len(self._weights)} layers, sparsity {self.sparsity():.4f} of {self._final}, step {self._steps}, "
            f"left dense: {', '.join(self.ignored) or 'none'})"
        )


def _snapshot_hook(pruner: weakref.ref, name: str):
    """Keeps |gradient| as accumulated so far; a later backward before step() overwrites it."""

    def hook(parameter: nn.Parameter) -> None:
        owner = pruner()
        if owner is not None and parameter.grad is not None:
            owner._snapshots[name] = parameter.grad.detach().abs()

    return hook
