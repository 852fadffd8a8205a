"""For models and code that come from other tools: their masks, and their names for what this package does.

============================================ =========================================================================
``torch.nn.utils.prune`` (``weight_mask``)    :func:`read_masks`, :func:`adopt_masks`
``torch.ao.pruning`` (``FakeSparsity``)       the same, and :func:`prepare` with its ``config`` of ``tensor_fqn``
torchao (``sparsify_(model, config, filter)``) :func:`sparsify_`, whose configs are :class:`SparseConfig` and its kin
============================================ =========================================================================

MIGRATION.md shows each side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from glob import escape

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .pruning import Pruner
from .pruning.importance import find_importance, statistic_of
from .pruning.layers import PRUNABLE, Ignored, check_like, find_prunable, unwrap
from .pruning.patterns import find_pattern
from .sparse.dispatch import KINDS, from_dense
from .sparse.surgery import carry_hooks, put_in_place

# --- masks of other tools ---------------------------------------------------------------------------------------------


def read_masks(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name (``conv1.weight``) to the bool mask, True = keep, that torch.nn.utils.prune or torch.ao.pruning
    has put on it. The model stays as it is.

    Raises:
        ValueError: a mask of anything but zeros and ones.
    """
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name in [n.removesuffix("_mask") for n in module._buffers if n.endswith("_mask")]:
            if f"{name}_orig" in module._parameters:
                found[prefix + name] = module._buffers[f"{name}_mask"]
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                for mask in (link.mask for link in chain if _is_fake_sparsity(link)):
                    found[prefix + name] = found[prefix + name] * mask if prefix + name in found else mask
    for name, mask in found.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"Expected a mask of zeros and ones on {name}, got other numbers")
    return {name: mask.detach().bool() for name, mask in found.items()}


def adopt_masks(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Pruner:
    """Takes masks over from torch.nn.utils.prune or torch.ao.pruning: the weights become plain Parameters again, the
    very ones that the optimizer holds, and a :class:`sparsekd.Pruner` holds the same masks from now on.

    Args:
        model: changed in place. A sparsifier of torch.ao.pruning must not be used on it afterwards.
        optimizer: as in :class:`sparsekd.Pruner`, whose contract then holds for its state too.

    Returns:
        A Pruner that is ``finished``.

    Raises:
        ValueError: no masks; a mask on anything but the weight of a convolution or linear layer, or of other numbers
            than zeros and ones; further parametrisations beside the mask. The model is then as it was.
    """
    masks = read_masks(model)
    if not masks:
        raise ValueError("Expected a model with masks of torch.nn.utils.prune or torch.ao.pruning, got none")
    for name in masks:
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith("weight") or not hasattr(module, "weight") or not isinstance(module, PRUNABLE):
            raise ValueError(f"Expected masks on weights of convolutions and linear layers, got one on {name}")
        if parametrize.is_parametrized(module, "weight"):
            others = [type(link).__name__ for link in module.parametrizations.weight if not _is_fake_sparsity(link)]
            if others:
                raise ValueError(f"Expected no other parametrisation of {name}, got {', '.join(others)}")
    for name in masks:
        module = model.get_submodule(name.rpartition(".")[0])
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        else:
            prune.remove(module, "weight")
    return hold_masks(model, masks, optimizer)


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> Pruner:
    """A finished :class:`sparsekd.Pruner` with these very masks, from a file or another tool; weights without one stay
    dense.

    Args:
        masks: parameter name to a bool mask of its shape, True = keep.

    Raises:
        ValueError: a name that is no prunable weight of the model, a mask of another shape or dtype.
    """
    weights = {name: module.weight for name, module in find_prunable(unwrap(model), ()).items()}
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"Expected masks of weights of convolutions and linear layers, got one of {name}")
        check_like(f"the mask of {name}", mask, weights[name], (torch.bool,))
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    sparsity = pruned / sum(weight.numel() for weight in weights.values())
    pruner = Pruner(model, sparsity, _Given(masks), optimizer=optimizer, ignored_layers=(), importance_steps=1)
    pruner.step()
    return pruner


class _Given:
    """Scores that are lowest exactly where a mask is False."""

    needs_gradient = False

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks

    def __call__(self, name: str, weight: Tensor, gradient: None) -> Tensor:
        return self.masks[name].to(weight.device).float() if name in self.masks else torch.ones_like(weight)


def _is_fake_sparsity(link: nn.Module) -> bool:
    # By name: torch.ao may leave torch one day, and models that use it have imported it.
    return type(link).__name__ == "FakeSparsity" and type(link).__module__.startswith("torch")


# --- torch.ao.pruning's life cycle ------------------------------------------------------------------------------------


def prepare(
    model: nn.Module,
    config: Iterable[Mapping[str, object]] | None = None,
    sparsity: float = 0.5,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: object,
) -> Pruner:
    """``sparsifier.prepare(model, config)``: the Pruner whose ``step()`` and ``squash_mask()`` are the rest of it.

    Args:
        config: dicts with ``tensor_fqn`` (``"conv1.weight"``) and, where it is not ``sparsity``, ``sparsity_level``;
            other weights stay dense. None: every prunable weight but the first convolution and the last linear layer.
        settings: further arguments of :class:`sparsekd.Pruner`, as ``importance``, ``pattern``, ``schedule``.

    Raises:
        TypeError, ValueError: a config of another form, or what the Pruner raises.
    """
    if config is None:
        return Pruner(model, sparsity, optimizer=optimizer, **settings)
    budget = {}
    for entry in config:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("tensor_fqn"), str):
            raise TypeError(f"Expected config to hold dicts with a tensor_fqn, got {entry!r}")
        unknown = sorted(set(entry) - {"tensor_fqn", "sparsity_level"})
        if unknown:
            raise ValueError(f"Expected tensor_fqn and sparsity_level in config, got {', '.join(unknown)}")
        budget[escape(entry["tensor_fqn"].removeprefix("."))] = float(entry.get("sparsity_level", sparsity))
    return Pruner(model, sparsity, budget=budget, optimizer=optimizer, **{"ignored_layers": (), **settings})


# --- torchao's entry point --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseConfig:
    """What :func:`sparsify_` does with a layer.

    Args:
        sparsity, pattern, importance: as in :class:`sparsekd.Pruner`; importances of the weights alone ("magnitude",
            "random" or a callable that needs no gradient).
        budget: over the layers that are chosen.
        swap: put :class:`sparsekd.SparseConv2d` and its kin in the layers' places, unmeasured; else leave zeros, for
            :func:`sparsekd.convert` to measure.
    """

    sparsity: float = 0.9
    pattern: str = "unstructured"
    importance: str | Callable = "magnitude"
    budget: str = "uniform"
    swap: bool = True


def NMSparseConfig(n: int = 2, m: int = 4, **settings: object) -> SparseConfig:  # noqa: N802
    """N of each M input channels remain; 2:4 is torchao's ``SemiSparseWeightConfig``."""
    return SparseConfig(1 - n / m, f"{n}:{m}", **settings)


def BlockSparseConfig(blocksize: int = 64, sparsity: float = 0.9, **settings: object) -> SparseConfig:  # noqa: N802
    """Blocks of ``blocksize`` output by as many input channels; torchao's ``BlockSparseWeightConfig``, which takes the
    zeros that are there: those have the lowest magnitude here too."""
    return SparseConfig(sparsity, f"{blocksize}x{blocksize}", **settings)


def sparsify_(
    model: nn.Module, config: SparseConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Prunes a trained model in place, at once, by its weights alone, and swaps its layers for sparse ones.

    Args:
        filter_fn: ``(module, fqn) -> bool``, whether to take a convolution or linear layer; by default all but the
            first convolution and the last linear layer.

    Returns:
        The model; another object only where the model is itself the one layer that is swapped.

    Raises:
        TypeError: arguments of the wrong type. ValueError: an importance that needs data, or what
            :class:`sparsekd.Pruner` raises. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, SparseConfig):
        raise TypeError(f"Expected config to be a SparseConfig, got {type(config).__name__}")
    if statistic_of(find_importance(config.importance)) is not None:
        raise ValueError(
            f"Expected an importance of the weights alone, got {config.importance!r}: prune by sparsekd.Pruner instead"
        )
    ignored: Ignored = "first_last"
    if filter_fn is not None:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
        ignored = [module for name, module in layers if not filter_fn(module, name)]
    pruner = Pruner(
        model, config.sparsity, config.importance, config.pattern, config.budget, None, None, ignored, 1
    )  # fmt: skip
    pruner.step()
    permutations, masks = pruner.permutations, pruner.masks
    pruner.squash_mask()
    if not config.swap:
        return model
    vector, swaps = find_pattern(config.pattern).vector, {}
    for name, module in model.named_modules():
        key = f"{name}.weight" if name else "weight"
        if type(module) not in KINDS or key not in masks:
            continue
        shared = [other for other in model.modules() if getattr(other, "weight", None) is module.weight]
        if len(shared) == 1:
            order = permutations[key].order if key in permutations else False
            fits = vector if config.pattern.endswith(("x1", "x1-permuted")) else "auto"
            swaps[module] = carry_hooks(module, from_dense(module, None, fits, order))
    return put_in_place(model, swaps)
