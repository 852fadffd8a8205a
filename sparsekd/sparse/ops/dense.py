"""What of 2:4 weights no kernel on CUDA takes: torch's dense convolution of the unpacked weight computes it.

The kernel is for float16 and bfloat16, as sparse tensor cores are. Calls of another dtype, or of a build without it,
are counted in ``fallbacks`` and said once, and are errors within ``strict_backends``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.library import Library

from ...kernels import checks, registration
from .. import reference

COMPUTED = {"conv2d_24": reference.conv2d_24_reference, "conv2d_24_fused": reference.conv2d_24_fused_reference}


def register() -> Library:
    """Stands before the kernels on CUDA, for as long as the library that it returns lives."""
    library = Library("sparsekd", "IMPL")
    with registration.replacing():
        for name in COMPUTED:
            if "get_kernel" not in vars(torch.library) and registration.is_registered(name, "CUDA"):
                continue  # before torch 2.9 nothing can stand before a kernel
            library.impl(name, served(name, registration.native_kernel(name)), "CUDA", with_keyset=True)
    return library


def served(name: str, native: Any, device: str = "cuda") -> Callable[..., Tensor]:
    """The kernel on CUDA of ``conv2d_24`` or ``conv2d_24_fused``; native: in CUDA C++, None where it isn't built."""

    arguments = getattr(torch.ops.sparsekd, name).default._schema.arguments

    def run(keys, *args):
        input = args[0]
        half = input.dtype in (torch.float16, torch.bfloat16)
        if half and native is not None:
            return native(keys, *args)
        if input.device.type != device:
            raise ValueError(f"Expected input on {device}, got {input.device}")
        checks.check_dim(input, "input", 4)
        checks.check_floating(input, "input")
        for argument, given in zip(arguments[1:], args[1:], strict=True):
            if isinstance(given, Tensor) and argument.name != "metadata":
                checks.check_like(given, argument.name, input, "input")
        wanted = "a build with CUDA C++" if half else "float16 or bfloat16, as sparse tensor cores take them,"
        dtype = str(input.dtype).removeprefix("torch.")
        registration.fall_back((name, "cuda", "dense"), f"Expected {wanted} for {name} on {input.device}, got {dtype}")
        # Sums of float32 keep its digits under an autocast that has lowered what it would.
        with torch.autocast(input.device.type, enabled=False):
            output = COMPUTED[name](*args)
        return output.contiguous(memory_format=suggest_memory_format(input))

    return run
