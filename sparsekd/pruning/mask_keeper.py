"""Holds masks through every step of the optimizers that move the weights.

After a step pruned weights are exactly 0, and so is the optimiser's state at them: a momentum left there would move the
weight again, weight decay would have something to decay.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .optimizers import begin_anew, entries_of, moved_by
from .sharding import local, new_whole, part_like

_KEEPERS: weakref.WeakSet[MaskKeeper] = weakref.WeakSet()  # those in use, which meet optimizers they were not given


class MaskKeeper:
    """The masks of some weights, all True at first.

    Args:
        weights: parameter name to parameter.
        optimizer: one that keeps this alive for as long as it lives. Others that step with these weights are met when
            they do, for as long as something else keeps this alive.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        self.weights, self._own = dict(weights), optimizer
        self.masks = {name: new_whole(w, torch.bool).fill_(True) for name, w in self.weights.items()}
        self.pruned: dict[str, Tensor] = {}  # the inverse masks of layers that have lost weights
        self._parts: dict[str, Tensor] = {}  # of those, what this rank holds of a sharded weight; else the same tensors
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that move these weights
        self._hooks: list = []
        _watch_all_optimizers()
        _KEEPERS.add(self)
        if optimizer is not None:
            self._meet(optimizer)
            # Strong: the masks hold as long as the optimizer steps, whoever forgets them. An optimizer's own copy and
            # pickle leave hooks out.
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.hold([optimizer])))

    def take(self, masks: dict[str, Tensor]) -> None:
        """New masks; nothing is zeroed yet."""
        self.masks = masks
        self.pruned = {name: ~mask for name, mask in masks.items() if not mask.all()}
        self._parts = {name: part_like(pruned, self.weights[name]) for name, pruned in self.pruned.items()}

    @torch.no_grad()
    def hold(self, optimizers: Iterable[Optimizer] | None = None) -> None:
        """Zero at each pruned weight, and in the state that the optimizers (all that are known) keep for it."""
        for name, pruned in self._parts.items():
            weight = local(self.weights[name])
            if pruned.device != weight.device:  # the model has moved
                pruned = self._parts[name] = pruned.to(weight.device)
                self.pruned[name] = self.pruned[name].to(weight.device)
                self.masks[name] = self.masks[name].to(weight.device)
            # Filled, not multiplied: NaN times 0 is NaN, and a negative number times 0 is -0.
            weight.masked_fill_(pruned, 0)
            for optimizer in self._optimizers if optimizers is None else optimizers:
                for value in entries_of(optimizer, self.weights[name]):
                    value.masked_fill_(pruned.to(value.device), 0)

    @torch.no_grad()
    def hold_in(self, others: Mapping[str, Tensor]) -> None:
        """Zero at each pruned weight of others, by name.

        Raises:
            ValueError: there is none of that name and shape; all are then left as they were.
        """
        for name, mask in self.masks.items():
            got = tuple(others[name].shape) if name in others else "none"
            if got != tuple(mask.shape):
                raise ValueError(f"Expected a model with a parameter {name} of shape {tuple(mask.shape)}, got {got}")
        for name, pruned in self.pruned.items():
            weight = others[name]
            local(weight).masked_fill_(part_like(pruned.to(local(weight).device), weight), 0)

    def all_moved(self) -> bool:
        """Whether known optimizers move every weight that is pruned, so that their steps hold the masks."""
        return self.pruned.keys() <= moved_by(self._optimizers, self.weights)

    def begin_anew(self) -> None:
        """After new masks, for optimizers that model the loss."""
        for optimizer in self._optimizers:
            begin_anew(optimizer)

    def drop_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """The optimizers forget what they know of these parameters."""
        parameters = list(parameters)
        for optimizer in self._optimizers:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)

    def release(self) -> None:
        """Drops masks and hooks; what is zero stays so until somebody changes it."""
        for hook in self._hooks:
            hook.remove()
        _KEEPERS.discard(self)
        self.masks, self.pruned, self._parts = {}, {}, {}

    def _meet(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer moves these weights; from now on it is one of those that do."""
        if optimizer in self._optimizers:
            return True
        moved = moved_by([optimizer], self.weights)
        if moved:
            self._optimizers.add(optimizer)
        if isinstance(optimizer, LBFGS):
            # It evaluates the loss many times in a step. Without gradients at pruned weights all of that happens where
            # they are 0; else it would find a minimum elsewhere, that the mask then spoils.
            for name in moved:
                if self.weights[name].requires_grad:
                    hook = _mask_gradient(weakref.ref(self), name)
                    self._hooks.append(self.weights[name].register_post_accumulate_grad_hook(hook))
        return bool(moved)


@functools.cache  # once; a hook per keeper, that goes with it, could go while an optimizer iterates over them
def _watch_all_optimizers() -> None:
    def hold(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for keeper in list(_KEEPERS):
            # The keeper's own optimizer has a hook for it, which needs nobody else to keep the keeper.
            if optimizer is not keeper._own and keeper._meet(optimizer):
                keeper.hold([optimizer])

    register_optimizer_step_post_hook(hold)


def _mask_gradient(keeper: weakref.ref, name: str) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def mask(parameter: Tensor) -> None:
        owner = keeper()
        if owner is not None and name in owner.pruned and parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.masked_fill_(owner._parts[name].to(gradient.device), 0)

    return mask
