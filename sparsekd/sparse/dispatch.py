"""Which kernel for which layer: measured on the shapes that flow through it, with the reason.

Dense as the model runs it, dense in channels_last (layout changes counted in), and sparse take turns in one run. Sparse
is chosen when it beats both. What was measured is kept on disk (``measure/tuned.py``) under the layer's sizes, V and
density to two digits, for each GPU by its name. Where nothing may be measured, the cost model decides on the CPU
(``cost_model.py``); of GPUs it knows nothing, and layers stay as they are.

On a GPU the clock is its events around many calls in a row, as eager code makes them: a layer so small that its launch
takes longer than its work counts by its launch, dense as sparse. fp32 is TF32 where the user's settings say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..measure import machine, tuned
from ..measure.machine import identity, timed_on
from ..measure.report import LayerTimes
from ..measure.timing import compare, speedup
from . import cost_model, formats
from .modules import SparseConv1d, SparseConv2d, SparseLinear, SparseModule
from .ops import tuning_tiles
from .problem import Problem

# No kernel here has beaten dense below this sparsity; measuring would only take time.
MIN_SPARSITY = 0.3

# The layers that have sparse twins.
KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Choice(LayerTimes):
    """What was chosen for one layer."""

    def kept_dense(self, reason: str) -> Choice:
        return replace(self, kernel="dense", reason=reason)


def sparsity_of(weight: Tensor) -> float:
    """Fraction of zeros, 0..1."""
    return 1.0 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)


def from_dense(
    module: nn.Module, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
) -> SparseModule:
    """The sparse twin of an nn.Conv1d, nn.Conv2d or nn.Linear."""
    twins = {nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
    return twins[kind_of(module)].from_dense(module, mask, vector, permute)


def best_grouping(module: nn.Module) -> tuple[int, bool]:
    """V of a plain layer's zeros, and whether its output channels have to be put in another order for that."""
    keep, groups = module.weight.detach() != 0, getattr(module, "groups", 1)
    consecutive, ordered = formats.largest_vector(keep, groups), formats.largest_grouping(keep, groups)
    return (ordered, True) if ordered > consecutive else (consecutive, False)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """nn.Conv1d, nn.Conv2d or nn.Linear, whichever the layer is."""
    return next(kind for kind in KINDS if isinstance(module, kind))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _dense_bytes(sparse: SparseModule) -> int:
    bias = 0 if sparse.bias is None else sparse.bias.numel()
    return (math.prod(sparse.weight_shape) + bias) * sparse.values.element_size()


def dense_engines(dense: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The dense ways to run one layer on its inputs, by name: as it is, and in channels_last."""
    engines = {"as it is": lambda: [dense(x) for x in inputs]}
    if isinstance(dense, nn.Conv2d) and any(x.dim() == 4 and not _channels_last(x) for x in inputs):
        turned = _copy_channels_last(dense)

        def channels_last():
            for x in inputs:
                turned(x.contiguous(memory_format=torch.channels_last)).contiguous()

        engines["channels_last"] = channels_last
    return engines


def measure_layer(
    name: str, dense: nn.Module, sparse: SparseModule, inputs: Sequence[Tensor], rounds: int = 7
) -> Choice:
    """Times one layer on the inputs that it meets (all of them in each call) and chooses."""
    return _choice(name, sparse, inputs, _measured(name, dense, sparse, inputs, rounds), "measured")


def choose(name: str, dense: nn.Module, sparse: SparseModule, inputs: Sequence[Tensor]) -> Choice:
    """The same by what SPARSEKD_TUNE allows: times kept on disk, or measured and kept, or predicted ones."""
    if tuned.mode() == "off":
        return predict_layer(name, sparse, inputs)
    known, key = tuned.of(identity(machine.place(inputs[0]))), _key(dense, sparse, inputs)
    figures = known.get(key)
    if figures is not None and figures.keys() >= FIGURES:
        return _choice(name, sparse, inputs, figures, "kept")
    figures = _measured(name, dense, sparse, inputs)
    known.put(key, figures)
    return _choice(name, sparse, inputs, figures, "measured")


def predict_layer(name: str, sparse: SparseModule, inputs: Sequence[Tensor]) -> Choice:
    """The same without measuring, by the cost model; dense, without times, on a device that it does not know."""
    if (unknown := cost_model.unknown(machine.place(inputs[0]))) is not None:
        return _unknown(name, sparse, inputs, unknown)
    problems = [Problem.of(sparse, x) for x in inputs]
    found = cost_model.predict(problems, sparse.vector, sparse.density)
    figures = {
        "dense_ms": found.dense_ms,
        "dense_as": "best",
        "sparse_ms": found.sparse_ms,
        **dict.fromkeys(("speedup", "median"), found.speedup),
        "low": found.speedup / (1 + found.error),
        "high": found.speedup * (1 + found.error),
    }
    return replace(_choice(name, sparse, inputs, figures, "predicted"), error=found.error)


def _unknown(name: str, sparse: SparseModule, inputs: Sequence[Tensor], reason: str) -> Choice:
    return replace(
        Choice(name, type(sparse).__name__.removeprefix("Sparse"), "dense", reason),
        shape=tuple(inputs[0].shape),
        sparsity=sparse.sparsity,
        vector=sparse.vector,
        dense_bytes=_dense_bytes(sparse),
        sparse_bytes=_bytes(sparse),
    )


FIGURES = {"dense_ms", "dense_as", "sparse_ms", "speedup", "median", "low", "high"}


def dense_settings(x: Tensor) -> str:
    """What else the dense time depends on: whether cuDNN tries its algorithms, by the user's setting."""
    return ", cudnn.benchmark" if machine.place(x).type == "cuda" and torch.backends.cudnn.benchmark else ""


def _key(dense: nn.Module, sparse: SparseModule, inputs: Sequence[Tensor]) -> str:
    permuted = "" if sparse.row_indices is None else ", permuted"
    calls = [list(Problem.of(dense, x).as_row().values()) for x in inputs]
    return f"{json.dumps(calls)} V={sparse.vector} density={sparse.density:.2g}{permuted}{dense_settings(inputs[0])}"


def _measured(
    name: str, dense: nn.Module, sparse: SparseModule, inputs: Sequence[Tensor], rounds: int = 7
) -> tuned.Figures:
    if dense.training or sparse.training:
        raise ValueError(f"Expected layers in eval mode to be timed, got {name} in training mode")
    engines = {**dense_engines(dense, inputs), "sparse": lambda: [sparse(x) for x in inputs]}
    timed = dict(min_time=0.002, **timed_on(machine.place(inputs[0])))
    with torch.no_grad():
        with tuning_tiles(lambda call: compare({"": call}, rounds=3, warmup=1, **timed)[""].min):
            engines["sparse"]()
        timings = compare(engines, rounds=rounds, warmup=2, **timed)
    best = min((key for key in timings if key != "sparse"), key=lambda key: timings[key].min)
    gain = speedup(timings[best], timings["sparse"])
    return {
        "dense_ms": timings[best].min * 1e3,
        "dense_as": best,
        "sparse_ms": timings["sparse"].min * 1e3,
        "speedup": gain.value,
        "median": gain.median,
        "low": gain.low,
        "high": gain.high,
    }


def _choice(name: str, sparse: SparseModule, inputs: Sequence[Tensor], figures: tuned.Figures, source: str) -> Choice:
    faster = figures["speedup"] > 1 and figures["median"] > 1
    said = (
        f"sparse {figures['sparse_ms']:.3g} ms {'beats' if faster else 'does not beat'} dense "
        f"{figures['dense_ms']:.3g} ms ({figures['dense_as']}) at sparsity {sparse.sparsity:.2f}"
    )
    return Choice(
        name=name,
        kind=type(sparse).__name__.removeprefix("Sparse"),
        kernel="sparse" if faster else "dense",
        reason=said if source == "measured" else f"{said}, {'measured before' if source == 'kept' else source}",
        shape=tuple(inputs[0].shape),
        sparsity=sparse.sparsity,
        vector=sparse.vector,
        dense_ms=figures["dense_ms"],
        dense_as=figures["dense_as"],
        sparse_ms=figures["sparse_ms"],
        speedup=figures["speedup"],
        speedup_low=figures["low"],
        speedup_high=figures["high"],
        dense_bytes=_dense_bytes(sparse),
        sparse_bytes=_bytes(sparse),
        source=source,
    )


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _copy_channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    twin = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    twin.load_state_dict({"weight": conv.weight, **({} if conv.bias is None else {"bias": conv.bias})})
    return twin.to(memory_format=torch.channels_last).eval()
