"""Which kernel for which layer: measured on the shapes that flow through it, with the reason.

Dense as the model runs it, dense in channels_last (layout changes counted in), and sparse take turns in one run. Sparse
is chosen when it beats both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..measure.timing import compare, speedup
from .modules import SparseConv1d, SparseConv2d, SparseLinear
from .packed_module import SparseModule

# No kernel here has beaten dense below this sparsity; measuring would only take time.
MIN_SPARSITY = 0.3

# The layers that have sparse twins.
KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer, and why. Times are milliseconds per forward, 0.0 where nothing was measured."""

    name: str
    kind: str  # "Conv1d", "Conv2d" or "Linear"
    kernel: str  # "sparse" or "dense"
    reason: str
    shape: tuple[int, ...] = ()  # of the input
    sparsity: float = 0.0
    vector: int = 0
    dense_ms: float = 0.0  # the better of the two dense ways
    dense_as: str = ""
    sparse_ms: float = 0.0
    speedup: float = 0.0
    speedup_low: float = 0.0
    speedup_high: float = 0.0
    dense_bytes: int = 0
    sparse_bytes: int = 0

    def kept_dense(self, reason: str) -> Choice:
        return replace(self, kernel="dense", reason=reason)


def clock() -> str:
    """CPU time does not see the neighbours, but it adds up over threads."""
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def sparsity_of(weight: Tensor) -> float:
    """Fraction of zeros, 0..1."""
    return 1.0 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)


def from_dense(
    module: nn.Module, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
) -> SparseModule:
    """The sparse twin of an nn.Conv1d, nn.Conv2d or nn.Linear."""
    twins = {nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
    return twins[kind_of(module)].from_dense(module, mask, vector, permute)


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


def measure_layer(
    name: str, dense: nn.Module, sparse: SparseModule, inputs: Sequence[Tensor], rounds: int = 7
) -> Choice:
    """Times one layer on the inputs that it meets (all of them in each call) and chooses."""
    if dense.training or sparse.training:
        raise ValueError(f"Expected layers in eval mode to be timed, got {name} in training mode")
    engines = {"as it is": lambda: [dense(x) for x in inputs], "sparse": lambda: [sparse(x) for x in inputs]}
    if isinstance(dense, nn.Conv2d) and any(x.dim() == 4 and not _channels_last(x) for x in inputs):
        turned = _copy_channels_last(dense)

        def channels_last():
            for x in inputs:
                turned(x.contiguous(memory_format=torch.channels_last)).contiguous()

        engines["channels_last"] = channels_last
    with torch.no_grad():
        timings = compare(engines, rounds=rounds, min_time=0.002, warmup=2, clock=clock())
    best = min((key for key in timings if key != "sparse"), key=lambda key: timings[key].min)
    gain = speedup(timings[best], timings["sparse"])
    faster = gain.value > 1 and gain.median > 1
    choice = Choice(
        name=name,
        kind=kind_of(dense).__name__,
        kernel="sparse" if faster else "dense",
        reason="",
        shape=tuple(inputs[0].shape),
        sparsity=sparse.sparsity,
        vector=sparse.vector,
        dense_ms=timings[best].min * 1e3,
        dense_as=best,
        sparse_ms=timings["sparse"].min * 1e3,
        speedup=gain.value,
        speedup_low=gain.low,
        speedup_high=gain.high,
        dense_bytes=_bytes(dense),
        sparse_bytes=_bytes(sparse),
    )
    said = (
        f"sparse {choice.sparse_ms:.3g} ms {'beats' if faster else 'does not beat'} dense {choice.dense_ms:.3g} ms "
        f"({best}) at sparsity {choice.sparsity:.2f}"
    )
    return replace(choice, reason=said)


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
