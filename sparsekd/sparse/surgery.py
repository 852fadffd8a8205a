"""Takes models apart and puts them together: what flows through a layer, layers without their hooks, new for old."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .dispatch import KINDS, evaluating
from .modules import SparseModule

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def call(model: nn.Module, example_inputs: object) -> object:
    """The model on a tensor, a tuple or list of positional, or a dict of named arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def random_kept() -> AbstractContextManager:
    """Random numbers go on afterwards, on every device, as if nothing had been drawn or seeded within."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=gpus)


def record_inputs(model: nn.Module, example_inputs: object) -> dict[nn.Module, list[Tensor]]:
    """What each convolution, Linear and sparse module is given in one forward (eval mode, no gradients)."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def record(module, args):
        if args and isinstance(args[0], Tensor):
            seen.setdefault(module, []).append(args[0].detach())

    layers = [module for module in model.modules() if isinstance(module, (*KINDS, SparseModule))]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        with evaluating(model), random_kept():
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def bare(module: nn.Module) -> nn.Module:
    """The layer without its hooks, on the same tensors; what torch.nn.utils.prune removed is zeros in a new weight."""
    bare = copy.copy(module)
    bare.__dict__.update({name: OrderedDict() for name in HOOKS}, _is_full_backward_hook=None)
    bare._parameters, bare._buffers = dict(module._parameters), dict(module._buffers)
    for name in ("weight", "bias"):
        kept = bare._parameters.pop(f"{name}_orig", None)
        if kept is not None:
            mask = bare._buffers.pop(f"{name}_mask")
            bare.__dict__.pop(name, None)
            bare._parameters[name] = nn.Parameter((kept * mask).detach(), requires_grad=kept.requires_grad)
    return bare


def carry_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts the user's hooks of a layer on its twin; those of torch.nn.utils.prune have done their work."""
    for name in HOOKS:
        hooks = getattr(old, name, {})
        kept = {key: hook for key, hook in hooks.items() if not isinstance(hook, BasePruningMethod)}
        getattr(new, name).update(kept)
    new._is_full_backward_hook = old._is_full_backward_hook
    return new


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model with torch.nn.utils.prune on, whose computed weights torch refuses to copy."""
    memo = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def unhooked(module: nn.Module) -> nn.Module:
    for name in HOOKS:
        getattr(module, name).clear()
    return module


def put_in_place(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts every new module in all the places of its old one; returns the new root."""
    if model in swaps:
        return swaps[model]
    for parent in list(model.modules()):
        # Not named_children(), which names a module once: the same one may stand under several names.
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]
    return model
