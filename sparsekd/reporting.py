"""report and would_it_be_faster: what a model gains from sparse layers, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .measure import tuned
from .measure.machine import clock, processor, timed_on
from .measure.progress import track
from .measure.report import AccuracyPoint, LayerReport, NetworkReport, Report
from .measure.timing import compare, device_of, peak_flops, speedup
from .measure.timing import threads as using_threads
from .sparse import anchors, cost_model, ops
from .sparse.convert import choices, to_dense
from .sparse.cost_model import Prediction
from .sparse.dispatch import KINDS, MIN_SPARSITY, Choice, evaluating, measure_layer, sparsity_of
from .sparse.modules import SparseModule
from .sparse.problem import Problem
from .sparse.surgery import call, copied, record_inputs

CLOCKS = {"cpu": "process CPU time", "wall": "wall time", "cuda": "CUDA events"}


def machine(device: torch.device | None = None) -> dict[str, str]:
    """Where figures come from: GPU, if the device is one, processor, instruction set, threads, torch."""
    on_gpu = device is not None and device.type == "cuda"
    return ({"GPU": torch.cuda.get_device_name(device)} if on_gpu else {}) | {
        "processor": processor(),
        "kernels": ops.cpu_isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "clock": CLOCKS[clock(device)],
        "precision": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def _resized(example_inputs: object, batch: int) -> object:
    """The same inputs with another batch size, repeated or cut in dimension 0."""
    if isinstance(example_inputs, Tensor):
        if example_inputs.dim() == 0 or example_inputs.shape[0] == 0:
            return example_inputs
        times = -(-batch // example_inputs.shape[0])
        whole = example_inputs.repeat(times, *[1] * (example_inputs.dim() - 1))[:batch]
        last = example_inputs.dim() == 4 and not example_inputs.is_contiguous()
        return whole.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if isinstance(example_inputs, Mapping):
        return {key: _resized(value, batch) for key, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(_resized(value, batch) for value in example_inputs)
    return example_inputs


def _dense_engines(dense: nn.Module, example_inputs: object) -> tuple[dict[str, Callable], nn.Module]:
    """The dense ways to run a network, as it is and in channels_last, and the copy that the second one runs."""
    engines = {"as it is": lambda: call(dense, example_inputs)}
    turned = dense
    if isinstance(example_inputs, Tensor) and example_inputs.dim() == 4:
        turned = copied(dense).to(memory_format=torch.channels_last)
        turned_inputs = example_inputs.contiguous(memory_format=torch.channels_last)
        engines["channels_last"] = lambda: turned(turned_inputs)
    return engines, turned


def _timed_on(model: nn.Module, example_inputs: object) -> dict[str, object]:
    return timed_on(device_of(model, example_inputs))


def time_dense(model: nn.Module, example_inputs: object, rounds: int = 9) -> float:
    """Milliseconds of a network as it is or in channels_last, whichever is faster."""
    engines, turned = _dense_engines(model, example_inputs)
    with evaluating(model), evaluating(turned):
        timings = compare(engines, rounds=rounds, min_time=0.005, warmup=2, **_timed_on(model, example_inputs))
    return min(timing.min for timing in timings.values()) * 1e3


def compare_networks(dense: nn.Module, sparse: nn.Module, example_inputs: object, rounds: int = 9) -> NetworkReport:
    """Times two networks in turn; dense counts as the better of as it is and in channels_last."""
    engines, turned = _dense_engines(dense, example_inputs)
    engines["sparse"] = lambda: call(sparse, example_inputs)
    with evaluating(dense), evaluating(sparse), evaluating(turned):
        timings = compare(engines, rounds=rounds, min_time=0.005, warmup=2, **_timed_on(dense, example_inputs))
    best = min((name for name in timings if name != "sparse"), key=lambda name: timings[name].min)
    gain = speedup(timings[best], timings["sparse"])
    first = example_inputs
    while isinstance(first, (tuple, list, Mapping)):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return NetworkReport(
        batch=first.shape[0] if isinstance(first, Tensor) and first.dim() else 1,
        threads=torch.get_num_threads(),
        dense_ms=timings[best].min * 1e3,
        dense_as=best,
        sparse_ms=timings["sparse"].min * 1e3,
        speedup=gain.value,
        speedup_low=gain.low,
        speedup_high=gain.high,
    )


def report(
    model: nn.Module,
    example_inputs: object,
    batch_sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    accuracy: Mapping[str, tuple[float, float]] | None = None,
    progress: bool = False,
) -> Report:
    """Dense and sparse times of a converted model, layer by layer and as a whole, with the reasons of each choice.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        batch_sizes: also time the whole network on the inputs repeated to these batch sizes; None: as given.
        threads: time the whole network on so many threads, one after the other; None: as many as torch uses now.
        accuracy: name to (accuracy, milliseconds), points to be drawn beside each other.
        progress: show a bar on a terminal.

    Returns:
        A :class:`sparsekd.measure.report.Report`: ``print`` it, ``.layers``, ``.network``, ``.to_json()``,
        ``.to_markdown()``, ``.to_csv()``, ``.save_html(path)``, ``.save_csv(path)``, ``.save_png(path)``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    seen = record_inputs(model, example_inputs)
    made: dict[str, Choice] = choices(model)
    device = device_of(model, example_inputs)
    peak = peak_flops() if device.type == "cpu" else peak_flops(device, _dtype(model), size=4096)
    points = [AccuracyPoint(name, float(value), float(ms)) for name, (value, ms) in (accuracy or {}).items()]
    found = Report({**machine(device), "FMA peak": f"{peak / 1e9:.0f} GFLOP/s"}, accuracy=points)
    for name, module in track(list(model.named_modules()), "timing layers", progress):
        if isinstance(module, SparseModule) and module in seen:
            dense = module.to_dense()
            with evaluating(dense), evaluating(module):
                choice = measure_layer(name, dense, module, seen[module])
            reason = made[name].reason if name in made else choice.reason
            choice = replace(choice, kernel="sparse", reason=reason)
        elif name in made:
            choice = made[name]
        elif type(module) in KINDS:
            sparsity = sparsity_of(module.weight.detach())
            choice = Choice(name, type(module).__name__, "dense", "not converted", sparsity=sparsity)
        else:
            continue
        found.layers.append(LayerReport(**vars(choice), **_shares(module, choice, seen.get(module, ()), peak)))
    dense = to_dense(model)
    for count in threads or [torch.get_num_threads()]:
        with using_threads(count):
            for batch in batch_sizes or [None]:
                inputs = example_inputs if batch is None else _resized(example_inputs, batch)
                found.network.append(compare_networks(dense, model, inputs))
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the layers, which are what is told of the peak."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _shares(module: nn.Module, choice: Choice, inputs: Sequence[Tensor], peak: float) -> dict[str, float]:
    """What part of the FMA peak the useful work of a layer's ways reaches."""
    if not inputs or not choice.sparse_ms:
        return {}
    seconds = 2 * sum(Problem.of(module, x).multiplications for x in inputs) / peak  # at the peak
    return {
        "dense_share": seconds / (choice.dense_ms / 1e3),
        "sparse_share": seconds * (1 - choice.sparsity) / (choice.sparse_ms / 1e3),
    }


def would_it_be_faster(
    layer_or_model: nn.Module, sparsity: float, input_shape: Sequence[int], pattern: str = "unstructured"
) -> dict[str, Choice]:
    """What each Conv1d, Conv2d and Linear would gain at a sparsity, told before pruning.

    From times of this machine: the first question about a layer's size measures the dense layer and four densities
    with positions at random, which are kept on disk, and every sparsity is read off them. Under ``SPARSEKD_TUNE=off``
    nothing is measured, and the cost model (``sparse/cost_model.py``) answers; of a GPU it knows nothing: choices there
    have no times.

    Args:
        layer_or_model: a plain layer or network; left as it is.
        sparsity: fraction removed, in [0, 1).
        input_shape: of the layer's or network's input, with the batch.
        pattern: "unstructured", or "Vx1" (such as "4x1"): V output channels share their columns.

    Returns:
        Name (``""`` for a layer given directly) to the choice: ``.kernel``, ``.speedup``, ``.dense_ms``,
        ``.sparse_ms``, ``.reason``. ``.error``: in half of the layers that ``benchmarks/cost_model.py`` checked, the
        speed-up was off by less, relatively; on a GPU, how far the layer's own densities are off the line through
        their neighbours.

    Raises:
        ValueError: a sparsity or pattern out of these.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity in [0, 1), got {sparsity}")
    vector = vector_of(pattern)
    parameter = next(layer_or_model.parameters(), torch.empty(0))
    example = torch.randn(*input_shape, device=parameter.device, dtype=parameter.dtype)
    names = {module: name for name, module in reversed(list(layer_or_model.named_modules()))}
    found = {}
    for module, inputs in record_inputs(layer_or_model, example).items():
        if type(module) in KINDS:
            name, unknown = names[module], cost_model.unknown(device_of(module, inputs))
            if tuned.mode() == "off" and unknown is not None:
                kind, shape = type(module).__name__, tuple(inputs[0].shape)
                found[name] = Choice(name, kind, "dense", unknown, shape, sparsity, vector)
                continue
            predicted, source = anchors.predict(module, inputs, vector, 1 - sparsity)
            found[name] = _foretold(name, module, inputs, sparsity, vector, predicted, source)
    tuned.flush()
    return found


def _foretold(
    name: str, layer: nn.Module, inputs: Sequence[Tensor], sparsity: float, vector: int, of: Prediction, source: str
) -> Choice:
    faster = of.speedup > 1 and sparsity >= MIN_SPARSITY
    known = "from densities measured here" if source == "measured" else "by the cost model"
    return Choice(
        name=name,
        kind=type(layer).__name__,
        kernel="sparse" if faster else "dense",
        reason=f"sparse {of.sparse_ms:.3g} ms, dense {of.dense_ms:.3g} ms, {known} (typically {of.error:.0%} off)",
        shape=tuple(inputs[0].shape),
        sparsity=sparsity,
        vector=vector,
        dense_ms=of.dense_ms,
        dense_as="best",
        sparse_ms=of.sparse_ms,
        speedup=of.speedup,
        speedup_low=of.speedup / (1 + of.error),
        speedup_high=of.speedup * (1 + of.error),
        source="predicted",
        error=of.error,
    )


def vector_of(pattern: str) -> int:
    """V of "unstructured", "4x1" or, in short, "v4"."""
    if pattern == "unstructured":
        return 1
    number = pattern[1:] if pattern[:1] == "v" else pattern.removesuffix("x1") if pattern.endswith("x1") else ""
    if not (number.isascii() and number.isdecimal()) or int(number) < 1:
        raise ValueError(f'Expected pattern to be "unstructured" or such as "4x1" or "v4", got {pattern!r}')
    return int(number)
