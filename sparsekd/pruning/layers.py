"""Which weights of a model can be pruned, and which stay dense; and whether a saved state fits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .budget import matches

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
PRUNABLE = (*CONVOLUTIONS, nn.Linear)
Ignored = str | nn.Module | Iterable[str | nn.Module]
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers, so that names are the same with and without them."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model._modules["_orig_mod"]
        else:
            return model


def find_prunable(model: nn.Module, ignored_layers: Ignored) -> dict[str, nn.Module]:
    """Parameter name to the module that owns it, a shared weight once, in the order of the model.

    A weight that an ignored layer shares stays dense everywhere.

    Raises:
        TypeError: ``ignored_layers`` holds anything but modules, names and globs.
        ValueError: one of them is not in the model; a weight is parametrised or lazy; nothing is prunable.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    ignored = _ignored(model, layers, ignored_layers)
    seen = {id(module._parameters.get("weight")) for name, module in layers.items() if name in ignored}
    found = {}
    for name, module in layers.items():
        if name in ignored:
            continue
        parameter = f"{name}.weight" if name else "weight"
        if "weight_orig" in module._parameters and "weight_mask" in module._buffers:
            raise ValueError(f"Expected a plain {parameter}, got nn.utils.prune's: adopt_masks() takes them over")
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"Expected a plain {parameter}, got a parametrised one: remove_parametrizations() first")
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"Expected {parameter} to be a Parameter, got {type(module).__name__} that computes it")
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(f"Expected {parameter} with a shape, got a lazy one: run the model on a batch first")
        if id(weight) not in seen and weight.numel() > 0:
            seen.add(id(weight))
            found[parameter] = module
    if not found:
        dense = ", ".join(sorted(ignored)) or "none"
        raise ValueError(f"Expected a model with prunable convolutions or linear layers, got none (ignored: {dense})")
    return found


def layers_left_dense(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the convolutions and linear layers that have none of these weights."""
    pruned = {id(weight) for weight in weights.values()}
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE))
    return tuple(name for name, module in layers if id(module._parameters.get("weight")) not in pruned)


def _ignored(model: nn.Module, layers: Mapping[str, nn.Module], ignored_layers: Ignored) -> set[str]:
    """Names of the layers that stay dense."""
    if isinstance(ignored_layers, str) and ignored_layers == "first_last":
        convolutions = [name for name, module in layers.items() if isinstance(module, CONVOLUTIONS)]
        linears = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        return {*convolutions[:1], *linears[-1:]}
    if isinstance(ignored_layers, (str, nn.Module)):
        ignored_layers = (ignored_layers,)
    if not isinstance(ignored_layers, Iterable):
        raise TypeError(f"Expected ignored_layers to be modules, names or globs, got {type(ignored_layers).__name__}")
    modules = dict(model.named_modules())
    inside: set[int] = set()
    for item in ignored_layers:
        if isinstance(item, nn.Module):
            chosen = [module for module in modules.values() if module is item]
        elif isinstance(item, str):
            chosen = [module for name, module in modules.items() if name and matches(f"{name}.weight", item)]
        else:
            raise TypeError(f"Expected ignored_layers to hold modules, names or globs, got {type(item).__name__}")
        if not chosen:
            said = repr(item) if isinstance(item, str) else f"a {type(item).__name__} of another model"
            raise ValueError(f"Expected ignored_layers to be in the model, got {said}")
        inside.update(id(part) for module in chosen for part in module.modules())
    return {name for name, module in layers.items() if id(module) in inside}


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a dotted name, None where there is none."""
    for part in path.split(".") if path else ():
        found = model._modules.get(part)
        if found is None:
            return None
        model = found
    return model


def check_keys(what: str, got: object, expected: Iterable[str]) -> None:
    """ValueError unless ``got`` is a dict with exactly the expected keys."""
    if not isinstance(got, Mapping):
        raise ValueError(f"Expected {what} to be a dict, got {type(got).__name__}")
    missing, extra = [key for key in expected if key not in got], [str(key) for key in got if key not in set(expected)]
    if missing or extra:
        raise ValueError(f"Expected the same keys in {what}, got {missing} missing and {extra} too many")


def check_like(what: str, got: object, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless ``got`` is a tensor of the weight's shape and of one of the dtypes."""
    if not isinstance(got, Tensor) or got.shape != weight.shape or got.dtype not in dtypes:
        found = f"{tuple(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"Expected {what} to be {tuple(weight.shape)} {dtypes[0]}, got {found}")


def check_count(what: str, got: object) -> None:
    """ValueError unless ``got`` is a whole number from 0 on."""
    if isinstance(got, bool) or not isinstance(got, int) or got < 0:
        raise ValueError(f"Expected {what} to be a whole number from 0 on, got {got!r}")


def check_kept(model: nn.Module, owners: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """An error if a module, or the model, has one of these weights no longer: its mask would hold nothing, silently."""
    for name, module in owners.items():
        weight = weights[name]
        lost = module._parameters.get("weight") is not weight
        if not lost and module_at(model, name.rpartition(".")[0]) is not module:
            # A layer may go on under another name, for instance when torch.compile wraps a block.
            lost = not any(weight is parameter for parameter in model.parameters())
        if lost:
            raise RuntimeError(
                f"Expected {name} to be the Parameter that the Pruner was made with, got another: make the Pruner (and "
                "the optimizer) after the model is sharded, reparametrised, given other layers or loaded with "
                "assign=True"
            )
