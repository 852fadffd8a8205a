"""Loads the compiled part, puts the kernels in Triton beside it, and calls what is registered."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import sparsekd._C  # noqa: F401  (registers the operators)
except ImportError as error:
    raise ImportError(
        "Expected the compiled part of sparsekd (sparsekd._C), built against the installed torch "
        f"{torch.__version__}, got: {error}. Build it with `pip install --no-build-isolation .`"
    ) from error

from ...kernels import checks, registration
from . import dense

_backends_on_cuda = registration.register(), dense.register()  # kept, as they are gone with it
# Ops that CUDA has a kernel of; looked up once, as a compiler that traces a call can't ask the dispatcher.
ON_CUDA = frozenset(
    name.removeprefix("sparsekd::")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    if name.startswith("sparsekd::")
)
fallbacks, strict_backends = registration.fallbacks, registration.strict
only_backend, tuning_tiles, backend_of = registration.only, registration.tuning, registration.backend_of
uses_tf32 = checks.uses_tf32

OPS = torch.ops.sparsekd


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: "baseline", "avx2" or "avx512" (cap: ``SPARSEKD_CPU_ISA``)."""
    return OPS.cpu_isa()


def call(op, *arguments):
    """Runs an op. Without gradients it goes past its autograd formula, which is in Python and costs 10 us even then."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def check_device(input: Tensor, op: str) -> None:
    kind = input.device.type
    if kind in ("cpu", "meta"):
        return
    if kind != "cuda" or op not in ON_CUDA:
        raise NotImplementedError(f"Expected input on cpu, got {input.device}: no kernel is built for this device")
