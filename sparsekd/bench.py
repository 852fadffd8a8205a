"""A whole network: sparse against every dense engine at hand, in one run.

Batch-norm is folded for all engines, which therefore get the same plain network. Each engine's output is checked
against that network in float64 first. Then all are visited in turn, minimum over rounds: on one thread by process CPU
time, on more by wall time; on a GPU by its events. The speed-up is against the fastest dense engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from .measure.engines import DENSE, make
from .measure.machine import timed_on
from .measure.timing import compare, device_of, speedup
from .sparse.anchors import random_mask
from .sparse.convert import choices, convert, to_dense
from .sparse.dispatch import KINDS
from .sparse.fusion import optimize_for_inference
from .sparse.problem import rounding_of

OURS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "convert": convert,
    "optimize_for_inference": optimize_for_inference,
}
TOLERANCE = 1e-4  # of an engine's output, relative to the largest element of float64's; or, in half types and TF32,
ROUNDINGS = 8  # so many of its last digit


class FirstOutput(nn.Module):
    """The one output that networks with several are asked for: the map of a segmentation network, else the first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        if isinstance(output, dict):
            return output.get("out", next(iter(output.values()), None))
        return output[0]


def masked(model: nn.Module, sparsity: float, vector: int) -> nn.Module:
    """Zeros at random places of every convolution and linear layer but the first, in place.

    What is left is scaled, so that it carries a signal to the end for outputs to be compared by.
    """
    layers = [module for module in model.modules() if type(module) in KINDS]
    with torch.no_grad():
        for layer in layers[1:]:
            mask = random_mask(layer.weight, sparsity, vector, getattr(layer, "groups", 1))
            layer.weight.mul_(mask).div_((1 - sparsity) ** 0.5)
    return model


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A plain network in eval mode with one output, its batch-norm folded where torch.fx can trace it.

    ValueError: a network whose first answer is no tensor (a detector's, say).
    """
    model = to_dense(model).eval()
    if not isinstance(model(x), Tensor):
        model = FirstOutput(model).eval()
        if not isinstance(output := model(x), Tensor):
            raise ValueError(f"Expected a network whose answers are tensors to compare, got {type(output).__name__}")
    try:
        return fuse(model)
    except Exception:  # torch.fx raises many kinds; all engines then get the network as it is
        return model


def prepared(
    model: nn.Module, x: Tensor, against: Sequence[str], ours: Sequence[str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str], dict[str, str]]:
    """The engines that answer as the network does in float64; why each of the others is out; what ours say."""
    expected = to_dense(model).double()(x.double())
    engines, out, said = {}, {}, {}
    for name in (*against, *ours):
        try:
            if name in OURS:
                fast = OURS[name](model, x)
                said[name] = choices(fast).summary()
                engine = lambda fast=fast: fast(x)  # noqa: E731
            else:
                engine = make(name, model, x, torch.get_num_threads())
            error = float((engine().double() - expected).abs().max() / expected.abs().max())
        except ImportError as missing:
            out[name] = f"not installed: {missing}"
        except Exception as failure:  # other people's engines fail in many ways
            out[name] = f"failed: {(str(failure).strip().splitlines() or [type(failure).__name__])[0]}"
        else:
            if error < max(TOLERANCE, ROUNDINGS * rounding_of(x)):
                engines[name] = engine
            else:
                out[name] = f"failed: {error:.2g} off float64"
    return engines, out, said


def run(
    model: nn.Module,
    x: Tensor,
    against: Sequence[str] = tuple(DENSE),
    ours: Sequence[str] = tuple(OURS),
    rounds: int = 9,
    min_time: float = 0.02,
) -> dict:
    """Times the engines on a plain network (see `folded`): milliseconds, speed-ups with their intervals, who is out.

    ValueError: no dense engine that runs.
    """
    with torch.no_grad():
        engines, out, said = prepared(model, x, against, ours)
        dense = [engine for engine in against if engine in engines]
        if not dense:
            raise ValueError(f"Expected a dense engine that runs, got none: {out}")
        on = timed_on(device_of(model, x))
        timings = compare(engines, rounds=rounds, min_time=min_time, warmup=2, **on)
    best = min(dense, key=lambda engine: timings[engine].min)
    gains = {engine: speedup(timings[best], timing) for engine, timing in timings.items()}
    return {
        "batch": x.shape[0],
        "threads": torch.get_num_threads(),
        "clock": on["clock"],
        "best_dense": best,
        "out": out,
        "said": said,
        "ms": {engine: timing.min * 1e3 for engine, timing in timings.items()},
        "speedup": {engine: [gain.value, gain.low, gain.high] for engine, gain in gains.items()},
    }


def lines(row: dict) -> list[str]:
    """A row of `run` as text."""
    made = [f"  {engine:24} {said}" for engine, said in row["said"].items()]
    for engine, ms in row["ms"].items():
        value, low, high = row["speedup"][engine]
        made.append(f"  {engine:24} {ms:9.2f} ms {value:6.2f}x  {low:.2f}-{high:.2f}")
    return made + [f"  {engine:24} {reason}" for engine, reason in row["out"].items()]


def failed(rows: Sequence[dict]) -> bool:
    """Whether an engine that is installed did not run, or answered otherwise."""
    return any(reason.startswith("failed") for row in rows for reason in row["out"].values())
