"""report and would_it_be_faster: what a model gains from sparse layers, measured on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .measure.machine import clock, processor
from .measure.report import LayerReport, NetworkReport, Report
from .measure.timing import compare, speedup
from .sparse import ops
from .sparse.convert import choices, to_dense
from .sparse.dispatch import Choice, evaluating, from_dense, measure_layer, sparsity_of
from .sparse.packed_module import SparseModule
from .sparse.surgery import call, record_inputs


def machine() -> dict[str, str]:
    """Where figures come from: processor, instruction set, threads, torch."""
    return {
        "processor": processor(),
        "kernels": ops.cpu_isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "clock": "process CPU time" if clock() == "cpu" else "wall time",
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


def compare_networks(dense: nn.Module, sparse: nn.Module, example_inputs: object, rounds: int = 9) -> NetworkReport:
    """Times two networks in turn; dense counts as the better of as it is and in channels_last."""
    engines = {"as it is": lambda: call(dense, example_inputs), "sparse": lambda: call(sparse, example_inputs)}
    if isinstance(example_inputs, Tensor) and example_inputs.dim() == 4:
        turned = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        turned_inputs = example_inputs.contiguous(memory_format=torch.channels_last)
        engines["channels_last"] = lambda: turned(turned_inputs)
    else:
        turned = dense
    with evaluating(dense), evaluating(sparse), evaluating(turned):
        timings = compare(engines, rounds=rounds, min_time=0.005, warmup=2, clock=clock())
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


def report(model: nn.Module, example_inputs: object, batch_sizes: Sequence[int] | None = None) -> Report:
    """Dense and sparse times of a converted model, layer by layer and as a whole, with the reasons of each choice.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        batch_sizes: also time the whole network on the inputs repeated to these batch sizes; None: as given.

    Returns:
        A :class:`sparsekd.measure.report.Report`: ``print`` it, ``.layers``, ``.network``, ``.to_json()``,
        ``.to_markdown()``, ``.save_html(path)``, ``.save_png(path)``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    seen = record_inputs(model, example_inputs)
    made: dict[str, Choice] = choices(model)
    found = Report(machine())
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) and module in seen:
            dense = module.to_dense()
            with evaluating(dense), evaluating(module):
                choice = measure_layer(name, dense, module, seen[module])
            reason = made[name].reason if name in made else choice.reason
            choice = Choice(**{**vars(choice), "kernel": "sparse", "reason": reason})
        elif name in made:
            choice = made[name]
        elif type(module) in (nn.Conv2d, nn.Linear):
            sparsity = sparsity_of(module.weight.detach())
            choice = Choice(name, type(module).__name__, "dense", "not converted", sparsity=sparsity)
        else:
            continue
        found.layers.append(LayerReport(**vars(choice)))
    dense = to_dense(model)
    for batch in batch_sizes or [None]:
        inputs = example_inputs if batch is None else _resized(example_inputs, batch)
        found.network.append(compare_networks(dense, model, inputs))
    return found


def would_it_be_faster(
    layer_or_model: nn.Module, sparsity: float, input_shape: Sequence[int], pattern: str = "unstructured"
) -> dict[str, Choice]:
    """Measures, before pruning, what each Conv2d and Linear would gain at a sparsity with random positions.

    Args:
        layer_or_model: a plain layer or network; left as it is.
        sparsity: fraction removed, in [0, 1).
        input_shape: of the layer's or network's input, with the batch.
        pattern: "unstructured", or "Vx1" (such as "4x1"): V output channels share their columns.

    Returns:
        Name (``""`` for a layer given directly) to the measured choice: ``.kernel``, ``.speedup``, ``.reason``.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity in [0, 1), got {sparsity}")
    vector = 1
    if pattern != "unstructured":
        number, _, one = pattern.partition("x")
        if one != "1" or not number.isdecimal() or int(number) < 1:
            raise ValueError(f'Expected pattern to be "unstructured" or "Vx1" such as "4x1", got {pattern!r}')
        vector = int(number)
    parameter = next(layer_or_model.parameters(), torch.empty(0))
    example = torch.randn(*input_shape, device=parameter.device, dtype=parameter.dtype)
    found = {}
    for module, inputs in record_inputs(layer_or_model, example).items():
        if type(module) not in (nn.Conv2d, nn.Linear):
            continue
        name = next(name for name, other in layer_or_model.named_modules() if other is module)
        mask = random_mask(module.weight, sparsity, vector, getattr(module, "groups", 1))
        dense = copy.deepcopy(module)
        with torch.no_grad():
            dense.weight.mul_(mask)
        twin = from_dense(dense, mask, vector)
        with evaluating(dense), evaluating(twin):
            found[name] = measure_layer(name, dense, twin, inputs)
    return found


def random_mask(weight: Tensor, sparsity: float, vector: int, groups: int) -> Tensor:
    """bool, the weight's shape: V x 1 vectors kept at random, exactly round(density * vectors) of them."""
    per_group = weight.shape[0] // groups
    packed = -(-per_group // vector)
    columns = weight[0].numel()
    keep = torch.zeros(groups * packed * columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    keep[torch.randperm(keep.numel(), generator=generator)[: round((1 - sparsity) * keep.numel())]] = True
    rows = keep.view(groups, packed, 1, columns).expand(-1, -1, vector, -1).reshape(groups, packed * vector, columns)
    return rows[:, :per_group].reshape(weight.shape).to(weight.device)
