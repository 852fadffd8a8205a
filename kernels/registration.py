"""The kernels here as operators, ``sparsekd::triton_conv2d`` and so on, and who serves ``sparsekd::conv2d`` on CUDA.

Each launcher is a ``torch.library.triton_op`` of the very schema of the op that it computes, so that ``torch.compile``
can see the kernels inside. Fakes and gradients are those of the op. On the dispatch key CUDA there may be two backends
for an op, "triton" and "cuda" (CUDA C++, csrc/cuda): :data:`CHOICES` says which one a call goes to. Where that one is
not built the other serves; :data:`fallbacks` counts such calls, the first of each kind warns, and under
:func:`strict` it is an error.

Triton, and what torch needs for a triton_op, take seconds to import: that waits for the first call.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.library import Library

from . import checks


class Call(NamedTuple):
    """What the choice of a backend looks at."""

    op: str
    dtype: torch.dtype
    vector: int | None  # V; None for an op without a sparse weight
    tf32: bool


class Choice(NamedTuple):
    backend: str
    serves: Callable[[Call], bool]
    because: str


TENSOR_CORES = ("conv2d", "conv2d_fused")  # whose CUDA C++ kernels use them, for 16-bit values

# The first row that serves a call decides. By counts of instructions and of what shared memory delivers: none of it was
# measured on a GPU.
CHOICES = (
    Choice("triton", lambda c: c.dtype == torch.float64, "the CUDA C++ kernels compute in float32"),
    Choice("triton", lambda c: c.op == "linear_kd_loss", "its products are Triton's work"),
    Choice("cuda", lambda c: c.vector is None, "a row in registers, and no compiler at the first call"),
    Choice("cuda", lambda c: c.vector < 8, "the narrowest side of a tensor core's tile is 8: CUDA cores do as well"),
    Choice("cuda", lambda c: c.dtype == torch.float32 and not c.tf32, "float32 products are the work of CUDA cores"),
    Choice("cuda", lambda c: c.dtype != torch.float32 and c.op in TENSOR_CORES, "ldmatrix gathers whole aligned rows"),
    Choice("triton", lambda c: True, "V of at least 8 in half precision or TF32 fills tensor cores"),
)


class Op(NamedTuple):
    file: str  # that holds its launcher
    vector: Callable[[tuple], int] | None  # V, from a call's arguments
    convolution: bool = True  # whose TF32 setting counts


def _columns_of_values(args: tuple) -> int:
    return args[1].shape[1]


OPS: dict[str, Op] = {
    "conv2d": Op("conv2d", _columns_of_values),
    "conv2d_fused": Op("conv2d", _columns_of_values),
    "conv2d_input_grad": Op("conv2d", _columns_of_values),
    "conv2d_weight_grad": Op("weight_grad", lambda args: args[5]),
    "linear": Op("linear", _columns_of_values, False),
    "linear_input_grad": Op("linear", _columns_of_values, False),
    "linear_weight_grad": Op("linear", lambda args: args[5], False),
    "kd_loss_forward": Op("kd_loss", None),
    "linear_kd_loss": Op("linear_kd_loss", None),
}

ANNOTATIONS = {  # of a schema's types
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor | None,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "List[int]": list[int],
    "List[bool]": list[bool],
}

# (op, the backend that CHOICES names, the one that served): calls, since the process began
fallbacks: collections.Counter[tuple[str, str, str]] = collections.Counter()
_strict = False


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Within it a backend that is not built is an error."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


_only: str | None = None


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Within it every op on CUDA goes to one backend, "cuda" or "triton", whatever :data:`CHOICES` says.

    RuntimeError at the call where that one is not built.
    """
    global _only
    if backend not in ("cuda", "triton"):
        raise ValueError(f"Expected backend to be cuda or triton, got {backend!r}")
    before, _only = _only, backend
    try:
        yield
    finally:
        _only = before


seconds_of: Callable[[Callable[[], object]], float] | None = None


@contextlib.contextmanager
def tuning(seconds: Callable[[Callable[[], object]], float]) -> Iterator[None]:
    """Within it the tile sizes of a Triton kernel are tuned where they are not known yet (``configs.py``).

    Args:
        seconds: how long a callable takes on the device.
    """
    global seconds_of
    before, seconds_of = seconds_of, seconds
    try:
        yield
    finally:
        seconds_of = before


def choice(call: Call) -> Choice:
    return next(row for row in CHOICES if row.serves(call))


def _check_built(name: str, call: Call, wanted: Choice, serving: str) -> None:
    """Of a call that goes to another backend than the one that CHOICES names."""
    of_v = "" if call.vector is None else f", V = {call.vector}"
    said = (
        f"Expected the {wanted.backend} backend of {name} for {str(call.dtype).removeprefix('torch.')}{of_v} "
        f"({wanted.because}), got none built"
    )
    fall_back((name, wanted.backend, serving), said)


def fall_back(kind: tuple[str, str, str], said: str) -> None:
    """Of a call that is served by other means than it should be: counts it and says so once; an error within strict."""
    if _strict:
        raise RuntimeError(said)
    fallbacks[kind] += 1
    if fallbacks[kind] == 1:
        warnings.warn(f"{said}: the {kind[2]} backend serves it", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Within it a kernel of ours may take the place of another of ours without torch's warning.

    torch warns of one operator in a process: with ``set_warn_always`` ours is not that one.
    """
    before = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel.*operator: sparsekd::")
        torch.set_warn_always(True)
        try:
            yield
        finally:
            torch.set_warn_always(before)


@functools.cache
def triton_op(name: str) -> torch._ops.OpOverload:
    """``sparsekd::triton_<name>`` for one of :data:`OPS`, registered on the first call."""
    launcher = getattr(importlib.import_module(f".{OPS[name].file}", __package__), name)

    @functools.wraps(launcher)  # where torch looks for the kernels
    def launch(*args):
        return launcher(*args)

    launch.__signature__ = _signature(getattr(torch.ops.sparsekd, name).default)
    torch.library.triton_op(f"sparsekd::triton_{name}", launch, mutates_args=())
    return getattr(torch.ops.sparsekd, f"triton_{name}").default


def _signature(op: torch._ops.OpOverload) -> inspect.Signature:
    """An op's schema as a signature: before torch 2.12 ``triton_op`` infers a schema even where it is given one."""
    schema, positional = op._schema, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(a.name, positional, annotation=ANNOTATIONS[str(a.type)]) for a in schema.arguments]
    returns = tuple(ANNOTATIONS[str(r.type)] for r in schema.returns)
    return inspect.Signature(parameters, return_annotation=returns[0] if len(returns) == 1 else tuple[returns])


@replacing()
def register(key: str = "CUDA") -> Library:
    """Puts the backends behind ``sparsekd::<op>`` on a dispatch key, for as long as the library that it returns lives.

    On another key than CUDA, as a test asks for, these kernels alone serve.
    """
    library = Library("sparsekd", "IMPL")
    has_triton = importlib.util.find_spec("triton") is not None
    for name in OPS:
        if key != "CUDA":
            library.impl(name, _triton(name), key)
            continue
        native = native_kernel(name)
        if name == "linear_kd_loss" and native_kernel("kd_loss_forward") is not None:
            native = _linear_kd_loss_chunked  # its rows are kd_loss_forward's
        if native is not None or has_triton:
            library.impl(name, _chosen(name, native, has_triton), key, with_keyset=True)
    if key == "CUDA":  # of this op the CPU's half is there too, as it needs no kernel of its own
        library.impl("linear_kd_loss", _linear_kd_loss_chunked, "CPU", with_keyset=True)
    if has_triton and (key != "CUDA" or not is_registered("transpose_pattern", key)):
        library.impl("transpose_pattern", _transpose_pattern, key)
    return library


def native_kernel(name: str) -> Any:
    """The CUDA C++ kernel of an op, looked up before anything is put in front of it; None where none is built."""
    if not is_registered(name, "CUDA"):
        return None
    if not hasattr(torch.library, "get_kernel"):  # before torch 2.9
        warnings.warn(
            f"Expected torch 2.9 or newer to choose between two backends of {name}, got {torch.__version__}: "
            "the Triton backend alone serves it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return torch.library.get_kernel(f"sparsekd::{name}", "CUDA").call_boxed


def backend_of(name: str, dtype: torch.dtype, vector: int | None) -> str:
    """The backend that a call goes to where both are built."""
    return _only or choice(Call(name, dtype, vector, checks.uses_tf32(OPS[name].convolution))).backend


def is_registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekd::{name}", key)


def _triton(name: str) -> Callable:
    return lambda *args: triton_op(name)(*args)


def _chosen(name: str, native: Any, has_triton: bool) -> Callable:
    op = OPS[name]
    built = {"cuda": native is not None, "triton": has_triton}

    def run(keys, *args):
        vector = None if op.vector is None else op.vector(args)
        call = Call(name, args[0].dtype, vector, checks.uses_tf32(op.convolution))
        wanted = choice(call)
        backend = _only or wanted.backend
        if _only and not built[backend]:
            raise RuntimeError(f"Expected the {backend} backend of {name}, as asked for, got none built")
        if not built[backend]:
            backend = "triton" if has_triton else "cuda"
            _check_built(name, call, wanted, backend)
        return triton_op(name)(*args) if backend == "triton" else native(keys, *args)

    return run


def _linear_kd_loss_chunked(keys, *args):
    from .linear_kd_loss import linear_kd_loss_cpu

    return linear_kd_loss_cpu(*args)


def _transpose_pattern(*args):
    from .plans import transpose_pattern

    return transpose_pattern(*args)
