"""Swaps the pruned layers of a model for sparse ones where that is faster, and back."""

from __future__ import annotations

import fnmatch
import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch._prims_common import suggest_memory_format
from torch.nn.utils import parametrize

from ..measure import machine, tuned
from ..measure.progress import track
from ..measure.timing import compare, device_of
from .dispatch import KINDS, MIN_SPARSITY, Choice, best_grouping, choose, evaluating, from_dense, kind_of, sparsity_of
from .modules import DTYPES, MaxPool2d, SparseModule, SqueezeExcite
from .ops import registered
from .problem import rounding_of
from .shapes import Shapes
from .surgery import bare, call, carry_hooks, copied, put_in_place, random_kept, record_inputs, unhooked

KEPT = "_sparsekd_choices"  # the attribute of a converted model
SETTINGS = {"kernel": ("auto", "sparse", "dense"), "vector": None}


def _check_settings(given: Mapping) -> None:
    unknown = set(given) - set(SETTINGS)
    if unknown:
        raise ValueError(f"Expected settings out of {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    if given.get("kernel", "auto") not in SETTINGS["kernel"]:
        raise ValueError(f"Expected kernel to be one of {', '.join(SETTINGS['kernel'])}, got {given['kernel']!r}")
    vector = given.get("vector", "auto")
    if vector != "auto" and (not isinstance(vector, int) or isinstance(vector, bool) or vector < 1):
        raise ValueError(f'Expected vector to be a whole number of at least 1 or "auto", got {vector!r}')


def _settings(name: str, mapping: Mapping[str, Mapping] | None) -> dict:
    settings = {"kernel": "auto", "vector": "auto"}
    for glob, given in (mapping or {}).items():
        if fnmatch.fnmatchcase(name, glob):
            settings.update(given)
    return settings


def _obstacle(module: nn.Module, owners: dict[int, list[str]], parents: dict, seen: dict) -> str | None:
    """Why a layer can't be swapped at all."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    if module not in seen:
        return "not called with example_inputs"
    if type(module) not in KINDS:
        return f"{type(module).__name__} is a class of its own"
    # In eval mode torch takes its weights past its forward, unless a hook listens, as one did for `seen`.
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents.get(module, ())):
        return "nn.TransformerEncoderLayer reads its weight directly"
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name, module._parameters.get(f"{name}_orig"))
        sharers = owners.get(id(parameter), [])
        if parameter is not None and len(sharers) > 1:
            return f"shares its {name} with {', '.join(sharers[1:])}"
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    if weight is None:
        return "its weight is no parameter"
    if (device := machine.place(weight).type) not in machine.TIMED:
        return f"only layers on the CPU and on CUDA are measured and swapped, got {device}: use from_dense"
    if device == "cuda" and ("linear" if isinstance(module, nn.Linear) else "conv2d") not in registered.ON_CUDA:
        return "no sparse kernel is built for CUDA"
    if weight.dtype not in DTYPES:
        return f"no sparse kernel is built for {weight.dtype}"
    return None


def _scripted(model: nn.Module) -> dict[str, Choice]:
    """Layers inside scripted and traced modules, which are left alone."""
    kinds = [kind.__name__ for kind in KINDS]
    found = {}
    for name, module in model.named_modules():
        kind = getattr(module, "original_name", "") if isinstance(module, torch.jit.ScriptModule) else ""
        if kind in kinds:
            found[name] = Choice(name, kind, "dense", "inside a scripted module")
    return found


def convert(
    model: nn.Module,
    example_inputs: object,
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mapping: Mapping[str, Mapping] | None = None,
    strict: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Swaps pruned ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Linear`` for sparse ones where that is measured to be faster.

    Each candidate (exact type, sparsity of at least 0.3) is timed on the inputs that ``example_inputs`` bring to it,
    where they lie (on a GPU by its events, ``dispatch.py``), dense against sparse, unless such a layer was before
    (``SPARSEKD_TUNE``, see ``measure/tuned.py``); then the whole network is, and goes back to dense when that is
    faster. Where pruned layers were timed and it helps, convolutions that stay dense are stored in channels_last, so
    that they answer in it. The choices, with reasons, are in ``choices(model)``; what swapped layers do at other shapes
    in ``choices_by_shape(model)``. ``SPARSEKD_TUNE=off`` measures nothing, nor the network: the cost model decides, and
    on a GPU, which it does not know, layers stay dense unless ``mapping`` asks for them.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        inplace: change ``model`` itself; otherwise a deep copy is converted.
        filter_fn: ``(module, name) -> bool``; layers for which it is False are left alone.
        mapping: name glob to ``{"kernel": "auto" | "sparse" | "dense", "vector": int | "auto"}``; later globs win.
            "auto" is the largest V that output channels fit as they come or, if that is more, in another order, which
            is then kept in the packed weight.
        strict: raise when a pruned layer stays dense.
        progress: show a bar on a terminal.

    Returns:
        The converted model. The given one is unchanged (unless ``inplace``) also when an error is raised.

    Raises:
        ValueError: unknown settings. RuntimeError: ``strict`` and a pruned layer stays dense, or results that differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    began = time.perf_counter()
    for settings in (mapping or {}).values():
        _check_settings(settings)
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()) and not inplace:
        model, inplace = copied(model), True  # the example makes its lazy layers, and the original stays lazy
    seen = record_inputs(model, example_inputs)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    owners = {key: list(dict.fromkeys(_without_aliases(model, names))) for key, names in owners.items()}
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            parents.setdefault(child, []).append(parent)
    before = choices(model)  # of layers that are sparse already, and stay
    made: dict[str, Choice] = _scripted(model)
    sparse: dict[str, SparseModule] = {}
    for name, module in track(list(model.named_modules()), "measuring layers", progress):
        if not isinstance(module, KINDS) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        settings = _settings(name, mapping)
        obstacle = _obstacle(module, owners, parents, seen)
        plain = None if obstacle else bare(module)
        sparsity = 0.0 if obstacle else sparsity_of(plain.weight.detach())
        kept = Choice(name, kind_of(module).__name__, "dense", obstacle or "", sparsity=sparsity)
        if not obstacle and settings["kernel"] == "dense":
            kept = kept.kept_dense("asked for by mapping")
        elif not obstacle and settings["kernel"] == "auto" and sparsity < MIN_SPARSITY:
            kept = kept.kept_dense(f"sparsity {sparsity:.2f} below {MIN_SPARSITY}: nothing to gain")
        if kept.reason:
            made[name] = kept
            continue
        vector, permute = settings["vector"], False
        if vector == "auto":
            vector, permute = best_grouping(plain)
        twin = from_dense(plain, vector=vector, permute=permute)
        with evaluating(plain), evaluating(twin):
            for x in seen[module]:
                _check_equal(plain(x), twin(x), name)
            if settings["kernel"] == "auto":
                choice = choose(name, plain, twin, seen[module])
            else:
                choice = replace(kept, kernel="sparse", reason="asked for by mapping", vector=twin.vector)
        made[name] = choice
        if choice.kernel == "sparse":
            sparse[name] = carry_hooks(module, twin)
            if settings["kernel"] == "auto":
                twin._shapes = Shapes(choice, twin, seen[module])
    del seen
    tuned.flush()
    channels_last = False
    if sparse or any(choice.sparse_ms for choice in made.values()):
        made, channels_last = _check_whole(model, example_inputs, sparse, made)
    dense_left = [c for c in made.values() if c.kernel == "dense" and c.sparsity >= MIN_SPARSITY]
    if dense_left:
        said = "; ".join(f"{c.name or 'the model'}: {c.reason}" for c in dense_left[:5])
        said = f"{len(dense_left)} of {len(made)} layers are pruned and stay dense ({said})"
        if strict:
            raise RuntimeError(f"Expected every pruned layer to become sparse, got: {said}")
        warnings.warn(said, stacklevel=2)
    target = model if inplace else copied(model)
    names = {name: target.get_submodule(name) for name in sparse if made[name].kernel == "sparse"}
    stay = {name for name, module in target.named_modules() if isinstance(module, SparseModule)} & before.keys()
    # Hooks of the copy, which may be bound to what was copied with it.
    target = put_in_place(target, {old: carry_hooks(old, unhooked(sparse[name])) for name, old in names.items()})
    turned = _to_channels_last(target) if channels_last else []
    made = {name: before[name] for name in before if name in stay} | made
    turned = [*before.turned, *turned]
    keep_choices(target, Choices(made, before.seconds + time.perf_counter() - began, turned))
    logging.getLogger("sparsekd").info("%s", choices(target).summary())
    return target


def _without_aliases(model: nn.Module, names: list[str]) -> list[str]:
    """Names of modules, those of one and the same module but once: a module in two places shares with nobody."""
    first = {id(model.get_submodule(name)): name for name in reversed(names)}
    return [name for name in names if first[id(model.get_submodule(name))] == name]


def _check_whole(
    model: nn.Module, example_inputs: object, sparse: dict[str, SparseModule], made: dict[str, Choice]
) -> tuple[dict[str, Choice], bool]:
    """Compares results and time of the whole network, dense and swapped, each as it is and in channels_last.

    Returns the choices, all dense where a dense network is the fastest, and whether convolutions that are dense then
    are to be in channels_last.
    """
    swapped = copied(model)
    swapped = put_in_place(swapped, {swapped.get_submodule(name): twin for name, twin in sparse.items()})
    networks = {("dense", False): model, ("sparse", False): swapped}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        networks["dense", True] = _in_channels_last(model)
        if any(isinstance(module, nn.Conv2d) for module in swapped.modules()):
            networks["sparse", True] = _in_channels_last(swapped)
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(evaluating(network))
        _check_outputs(model, swapped, example_inputs)
        # Where layers were asked for, or nothing is to be measured, time decides nothing.
        if tuned.mode() == "off" or not any(choice.sparse_ms for choice in made.values()):
            return made, False
        if not sparse:
            networks = {key: network for key, network in networks.items() if key[0] == "dense"}
        engines = {key: partial(call, network, example_inputs) for key, network in networks.items()}
        on = machine.timed_on(device_of(model, example_inputs))
        timings = compare(engines, rounds=7, min_time=0.005, warmup=2, **on)
    best = {
        kind: min((key for key in timings if key[0] == kind), key=lambda key: timings[key].min)
        for kind in ("dense", "sparse")[: 2 if sparse else 1]
    }
    lost = [name for name in sparse if made[name].sparse_ms > 0.0]  # layers that mapping asks for stay
    ms = {kind: timings[key].min * 1e3 for kind, key in best.items()}
    if not lost or ms["sparse"] < ms["dense"]:
        return made, best["sparse" if sparse else "dense"][1]
    layout = " (channels_last)" if best["dense"][1] else ""
    said = f"the whole network took {ms['sparse']:.3g} ms with sparse layers and {ms['dense']:.3g} ms dense{layout}"
    return {name: choice.kept_dense(said) if name in lost else choice for name, choice in made.items()}, best["dense"][
        1
    ]


def _in_channels_last(model: nn.Module) -> nn.Module:
    """A copy whose plain convolutions are stored, and hence answer, in channels_last, whatever their input is in."""
    model = copied(model)
    _to_channels_last(model)
    return model


def _to_channels_last(model: nn.Module) -> list[str]:
    """Stores plain convolutions in channels_last; the names of those that were not."""
    turned = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and not _last(module.weight):
            module.to(memory_format=torch.channels_last)
            turned.append(name)
    return turned


def _last(weight: Tensor) -> bool:
    return suggest_memory_format(weight) == torch.channels_last


def _check_outputs(model: nn.Module, swapped: nn.Module, example_inputs: object) -> None:
    """Raises unless both networks answer alike, to their rounding.

    Each layer's result was compared before. Where comparisons decide what comes next (boxes kept by a detector), the
    last bits of a layer may change the whole answer: then it is enough that they do so in the dense model as well.
    """

    def answer(network):
        with random_kept():
            torch.manual_seed(0)
            return call(network, example_inputs)

    expected = answer(model)
    try:
        _check_equal(expected, answer(swapped), "the whole network")
    except RuntimeError as error:
        layers = [module for module in model.modules() if isinstance(module, KINDS)]
        handles = [layer.register_forward_hook(_rounded_otherwise) for layer in layers]
        try:
            _check_equal(expected, answer(model), "the whole network")
        except RuntimeError:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise error


def _rounded_otherwise(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    noise = torch.empty_like(output).uniform_(-1, 1)
    return output + noise * (output.abs().amax() * 8 * rounding_of(output))


def _check_equal(expected: object, got: object, what: str) -> None:
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        if expected.shape != got.shape:
            raise RuntimeError(
                f"Expected sparse results of {what} of shape {list(expected.shape)}, got {list(got.shape)}"
            )
        if not expected.is_floating_point() or not expected.numel():
            return
        scale = float(expected.abs().max())
        error = float((expected - got).abs().max())
        # Rounding differs from layer to layer; a wrong kernel would be off by the size of the result.
        tolerance = 1e-2 if rounding_of(expected) > 1e-4 else 1e-3
        if error > tolerance * scale + 1e-6:
            raise RuntimeError(
                f"Expected sparse results of {what} within {tolerance:g} of dense ones, got {error / scale:.3g} off"
            )
    elif isinstance(expected, Mapping):
        for key in expected:
            _check_equal(expected[key], got[key], what)
    elif isinstance(expected, (tuple, list)):
        if len(expected) != len(got):
            raise RuntimeError(f"Expected {len(expected)} results of {what}, got {len(got)}")
        for one, other in zip(expected, got, strict=True):
            _check_equal(one, other, what)


class Choices(dict[str, Choice]):
    """What was chosen for each layer, by name, and what finding out cost in seconds of wall time.

    ``turned`` names the convolutions that stayed dense and were stored in channels_last.
    """

    def __init__(self, choices: Mapping[str, Choice] = (), seconds: float = 0.0, turned: Sequence[str] = ()) -> None:
        super().__init__(choices)
        self.seconds, self.turned = seconds, list(turned)

    def summary(self) -> str:
        sparse = sum(choice.kernel == "sparse" for choice in self.values())
        turned = f", {len(self.turned)} dense ones are stored in channels_last" if self.turned else ""
        return f"{sparse} of {len(self)} layers are sparse{turned}; measuring and swapping took {self.seconds:.1f} s"


def choices(model: nn.Module) -> Choices:
    """What :func:`convert` chose for each layer of this model, by name; empty for a model that it did not make."""
    return next((place[KEPT] for place in _places(model) if KEPT in place), Choices())


def keep_choices(model: nn.Module, made: Choices | None) -> None:
    """Puts what was chosen where :func:`choices` finds it; None: nothing."""
    for place in _places(model):
        place.pop(KEPT, None)
        if made is not None:
            place[KEPT] = made


def _places(model: nn.Module) -> list[dict]:
    # Of what hangs on a graph, a deep copy takes only the meta along, and a pickle all but that.
    return [vars(model), *([model.meta] if isinstance(model, fx.GraphModule) else [])]


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of the model with plain modules (zeros where pruned) in the place of sparse ones, stored as before.

    What :func:`optimize_for_inference` fused stays so, by torch's own operators.
    """
    target = copied(model)
    ours = [module for module in target.modules() if isinstance(module, (SparseModule, MaxPool2d))]
    swaps = {module: carry_hooks(module, module.to_dense()) for module in ours}
    target = put_in_place(target, swaps)
    for module in target.modules():
        if isinstance(module, SqueezeExcite):
            module.plain = True
    made = choices(target)
    for name in made.turned:
        target.get_submodule(name).to(memory_format=torch.contiguous_format)
    keep_choices(target, None)
    return target


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model: its keys, shapes and order, with zeros where pruned."""
    everywhere = model.named_modules(remove_duplicate=False)  # a shared layer has its keys under every name
    sparse = {name: module for name, module in everywhere if isinstance(module, SparseModule)}
    indices = ("crow_indices", "col_indices", "row_indices")
    own = model.state_dict()
    state: dict[str, Tensor] = OrderedDict()
    state._metadata = own._metadata  # versions, without which some models refuse their own state
    for key, tensor in own.items():
        prefix, _, last = key.rpartition(".")
        if prefix in sparse and last == "values":
            state[f"{prefix}.weight" if prefix else "weight"] = sparse[prefix].weight.detach()
        elif prefix not in sparse or last not in indices:
            state[key] = tensor
    return state
