"""The kernels here as operators: ``sparsekd::triton_conv2d`` and so on, and behind the project's own ops on CUDA.

Each launcher is a ``torch.library.triton_op`` of the very schema of the op that it computes, so that ``torch.compile``
can see the kernels inside. On the dispatch key CUDA ``sparsekd::conv2d`` chooses between this op and the CUDA C++ kernel,
if one was built: tensor cores want V of at least :data:`LEAST_VECTOR`. Fakes and gradients are those of the op.

Triton, and what torch needs for a triton_op, take seconds to import: that waits for the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

# Below, CUDA cores do as well where a kernel for them was built; mma's narrowest side is 8.
LEAST_VECTOR = 16

# op: (file that holds its launcher, V of a call's arguments where the op has one)
OPS: dict[str, tuple[str, Callable[[tuple], int] | None]] = {
    "conv2d": ("conv2d", lambda args: args[1].shape[1]),
    "conv2d_fused": ("conv2d", lambda args: args[1].shape[1]),
    "conv2d_input_grad": ("conv2d", lambda args: args[1].shape[1]),
    "conv2d_weight_grad": ("weight_grad", lambda args: args[5]),
    "linear": ("linear", lambda args: args[1].shape[1]),
    "linear_input_grad": ("linear", lambda args: args[1].shape[1]),
    "linear_weight_grad": ("linear", lambda args: args[5]),
    "kd_loss_forward": ("kd_loss", None),
}


@functools.cache
def triton_op(name: str) -> torch._ops.OpOverload:
    """``sparsekd::triton_<name>`` for one of :data:`OPS`, registered on the first call."""
    launcher = getattr(importlib.import_module(f".{OPS[name][0]}", __package__), name)
    schema = str(getattr(torch.ops.sparsekd, name).default._schema)
    schema = schema[schema.index("(") :]
    torch.library.triton_op(f"sparsekd::triton_{name}", launcher, mutates_args=(), schema=schema)
    return getattr(torch.ops.sparsekd, f"triton_{name}").default


def register(key: str = "CUDA") -> Library | None:
    """Puts the kernels behind ``sparsekd::<op>`` on a dispatch key, for as long as the library that it returns lives.

    None where there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    library = Library("sparsekd", "IMPL")
    for name in OPS:
        if key != "CUDA" or not _is_registered(name, key):
            library.impl(name, _triton(name), key)
        elif OPS[name][1] and hasattr(torch.library, "get_kernel"):  # else CUDA C++ keeps the key to itself
            library.impl(name, _choice(name, torch.library.get_kernel(f"sparsekd::{name}", key)), key, with_keyset=True)
    if key != "CUDA" or not _is_registered("transpose_pattern", key):
        library.impl("transpose_pattern", _transpose_pattern, key)
    return library


def _is_registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekd::{name}", key)


def _triton(name: str) -> Callable:
    return lambda *args: triton_op(name)(*args)


def _choice(name: str, native: Any) -> Callable:
    vector_of = OPS[name][1]

    def run(keys, *args):
        return triton_op(name)(*args) if vector_of(args) >= LEAST_VECTOR else native.call_boxed(keys, *args)

    return run


def _transpose_pattern(*args):
    from .plans import transpose_pattern

    return transpose_pattern(*args)
