"""Swaps the pruned layers of a model for sparse ones where that is faster, and back."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..measure.timing import compare
from .dispatch import MIN_SPARSITY, Choice, clock, evaluating, from_dense, measure_layer, sparsity_of
from .packed_module import SparseModule

SETTINGS = {"kernel": ("auto", "sparse", "dense"), "vector": None}


def call(model: nn.Module, example_inputs: object) -> object:
    """The model on a tensor, a tuple or list of positional, or a dict of named arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def record_inputs(model: nn.Module, example_inputs: object) -> dict[nn.Module, list[Tensor]]:
    """What each Conv2d, Linear and sparse module is given in one forward (eval mode, no gradients)."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def record(module, args):
        if args and isinstance(args[0], Tensor):
            seen.setdefault(module, []).append(args[0].detach())

    kinds = (nn.Conv2d, nn.Linear, SparseModule)
    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, kinds)]
    try:
        with evaluating(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _settings(name: str, mapping: Mapping[str, Mapping] | None) -> dict:
    settings = {"kernel": "auto", "vector": "auto"}
    for glob, given in (mapping or {}).items():
        unknown = set(given) - set(SETTINGS)
        if unknown:
            raise ValueError(
                f"Expected settings out of {', '.join(SETTINGS)} for {glob!r}, got {', '.join(sorted(unknown))}"
            )
        if given.get("kernel", "auto") not in SETTINGS["kernel"]:
            raise ValueError(f"Expected kernel to be one of {', '.join(SETTINGS['kernel'])}, got {given['kernel']!r}")
        if fnmatch.fnmatchcase(name, glob):
            settings.update(given)
    return settings


def _obstacle(module: nn.Module, owners: dict[int, list[str]], seen: dict) -> str | None:
    """Why a layer can't be swapped at all."""
    if "weight_orig" in dict(module.named_parameters(recurse=False)):
        return "torch.nn.utils.prune is still on: call prune.remove first"
    if parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "its weight is not made yet"
    sharers = owners[id(module._parameters["weight"])]
    if len(sharers) > 1:
        return f"shares its weight with {', '.join(sharers[1:])}"
    if module not in seen:
        return "not called with example_inputs"
    return None


def _replace(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts every new module in all the places of its old one; returns the new root."""
    if model in swaps:
        return swaps[model]
    for parent in list(model.modules()):
        # Not named_children(), which names a module once: the same one may stand under several names.
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]
    return model


def convert(
    model: nn.Module,
    example_inputs: object,
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mapping: Mapping[str, Mapping] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Swaps pruned ``nn.Conv2d`` and ``nn.Linear`` for sparse modules where that is measured to be faster.

    Each candidate (exact type, sparsity of at least 0.3) is timed on the inputs that ``example_inputs`` bring to it,
    dense against sparse; then the whole network is, and goes back to dense when that is faster. Where it helps, dense
    convolutions that are left are stored in channels_last, so that they answer in it. The choices, with reasons, are in
    ``choices(model)``.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        inplace: change ``model`` itself; otherwise a deep copy is converted.
        filter_fn: ``(module, name) -> bool``; layers for which it is False are left alone.
        mapping: name glob to ``{"kernel": "auto" | "sparse" | "dense", "vector": int | "auto"}``; later globs win.
        strict: raise when a pruned layer stays dense.

    Returns:
        The converted model. The given one is unchanged (unless ``inplace``) also when an error is raised.

    Raises:
        ValueError: unknown settings. RuntimeError: ``strict`` and a pruned layer stays dense, or results that differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    seen = record_inputs(model, example_inputs)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    made: dict[str, Choice] = {}
    sparse: dict[str, SparseModule] = {}
    forced = False
    for name, module in model.named_modules():
        # Subclasses may compute something else; a parametrised layer is one only in name, and its obstacle is told.
        plain = type(module) in (nn.Conv2d, nn.Linear)
        parametrised = isinstance(module, (nn.Conv2d, nn.Linear)) and parametrize.is_parametrized(module)
        if not (plain or parametrised) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        settings = _settings(name, mapping)
        kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        obstacle = _obstacle(module, owners, seen)
        sparsity = 0.0 if obstacle else sparsity_of(module.weight.detach())
        kept = Choice(name, kind, "dense", obstacle or "", sparsity=sparsity)
        if not obstacle and settings["kernel"] == "dense":
            kept = kept.kept_dense("asked for by mapping")
        elif not obstacle and settings["kernel"] == "auto" and sparsity < MIN_SPARSITY:
            kept = kept.kept_dense(f"sparsity {sparsity:.2f} below {MIN_SPARSITY}: nothing to gain")
        if kept.reason:
            made[name] = kept
            continue
        twin = from_dense(module, vector=settings["vector"])
        with evaluating(module), evaluating(twin):
            choice = measure_layer(name, module, twin, seen[module])
        if settings["kernel"] == "sparse":
            choice = Choice(**{**vars(choice), "kernel": "sparse", "reason": "asked for by mapping; " + choice.reason})
            forced = True
        made[name] = choice
        if choice.kernel == "sparse":
            sparse[name] = twin
    del seen
    channels_last = False
    if sparse:
        made, channels_last = _check_whole(model, example_inputs, sparse, made, forced)
    dense_left = [c for c in made.values() if c.kernel == "dense" and c.sparsity >= MIN_SPARSITY]
    if dense_left:
        said = "; ".join(f"{c.name or 'the model'}: {c.reason}" for c in dense_left[:5])
        said = f"{len(dense_left)} of {len(made)} layers are pruned and stay dense ({said})"
        if strict:
            raise RuntimeError(f"Expected every pruned layer to become sparse, got: {said}")
        warnings.warn(said, stacklevel=2)
    target = model if inplace else copy.deepcopy(model)
    names = {name: target.get_submodule(name) for name, choice in made.items() if choice.kernel == "sparse"}
    target = _replace(target, {module: sparse[name] for name, module in names.items()})
    if channels_last:
        _to_channels_last(target)
    target._sparsekd_choices = made
    return target


def _check_whole(
    model: nn.Module, example_inputs: object, sparse: dict[str, SparseModule], made: dict[str, Choice], forced: bool
) -> tuple[dict[str, Choice], bool]:
    """Compares results and time of the whole network, dense and swapped, each as it is and in channels_last.

    Returns the choices, all dense where a dense network is the fastest, and whether the dense convolutions left are to
    be in channels_last.
    """
    swapped = copy.deepcopy(model)
    swapped = _replace(swapped, {swapped.get_submodule(name): twin for name, twin in sparse.items()})
    networks = {("dense", False): model, ("sparse", False): swapped}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        networks["dense", True] = _in_channels_last(model)
        if any(isinstance(module, nn.Conv2d) for module in swapped.modules()):
            networks["sparse", True] = _in_channels_last(swapped)
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(evaluating(network))
        expected = call(model, example_inputs)
        for key, network in networks.items():
            if key[0] == "sparse":
                _check_equal(expected, call(network, example_inputs))
        engines = {key: partial(call, network, example_inputs) for key, network in networks.items()}
        timings = compare(engines, rounds=7, min_time=0.005, warmup=2, clock=clock())
    best = {
        kind: min((key for key in timings if key[0] == kind), key=lambda key: timings[key].min)
        for kind in ("dense", "sparse")
    }
    ms = {kind: timings[key].min * 1e3 for kind, key in best.items()}
    if ms["sparse"] < ms["dense"] or forced:
        return made, best["sparse"][1]
    layout = " (channels_last)" if best["dense"][1] else ""
    said = f"the whole network took {ms['sparse']:.3g} ms with sparse layers and {ms['dense']:.3g} ms dense{layout}"
    return {name: choice.kept_dense(said) if name in sparse else choice for name, choice in made.items()}, False


def _in_channels_last(model: nn.Module) -> nn.Module:
    """A copy whose plain convolutions are stored, and hence answer, in channels_last, whatever their input is in."""
    return _to_channels_last(copy.deepcopy(model))


def _to_channels_last(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.to(memory_format=torch.channels_last)
    return model


def _check_equal(expected: object, got: object) -> None:
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        if not expected.is_floating_point():
            return
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        error = float((expected - got).abs().max()) if expected.numel() else 0.0
        # Rounding differs from layer to layer; a wrong kernel would be off by the size of the result.
        tolerance = 1e-2 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if error > tolerance * scale + 1e-6:
            raise RuntimeError(
                f"Expected sparse results within {tolerance:g} of dense ones, got {error / scale:.3g} off"
            )
    elif isinstance(expected, Mapping):
        for key in expected:
            _check_equal(expected[key], got[key])
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(expected, got, strict=True):
            _check_equal(one, other)


def choices(model: nn.Module) -> dict[str, Choice]:
    """What :func:`convert` chose for each layer of this model, by name; empty for a model that it did not make."""
    return getattr(model, "_sparsekd_choices", {})


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of the model with plain modules (zeros where pruned) in the place of sparse ones."""
    target = copy.deepcopy(model)
    swaps = {module: module.to_dense() for module in target.modules() if isinstance(module, SparseModule)}
    target = _replace(target, swaps)
    if hasattr(target, "_sparsekd_choices"):
        del target._sparsekd_choices
    return target


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model: its keys, shapes and order, with zeros where pruned."""
    everywhere = model.named_modules(remove_duplicate=False)  # a shared layer has its keys under every name
    sparse = {name: module for name, module in everywhere if isinstance(module, SparseModule)}
    indices = ("crow_indices", "col_indices", "row_indices")
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        prefix, _, last = key.rpartition(".")
        if prefix in sparse and last == "values":
            state[f"{prefix}.weight" if prefix else "weight"] = sparse[prefix].weight.detach()
        elif prefix not in sparse or last not in indices:
            state[key] = tensor
    return state
