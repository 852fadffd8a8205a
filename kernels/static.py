"""What the compiler makes of the kernels here, for any architecture and without a GPU.

Launchers are run on tensors of the device ``meta``, so that each launch is recorded with the arguments, alignments and
options that it would have, and then compiled as Triton would on a GPU: 16 where a pointer or a number divides by it.
:func:`compiled_kernels` lists the kernels with their configurations; ``tests`` and ``make gpu-static`` read it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: JITFunction
    arguments: dict
    options: dict  # num_warps, num_stages


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    kernel: str  # the function's name, `_conv2d_kernel`
    case: str  # what it was compiled for: dtype, V, tiles
    architecture: int  # 80, 86, 90, 100
    num_warps: int
    shared: int  # bytes a block
    ptx: str
    cubin: bytes

    def count(self, instruction: str) -> int:
        """How often the pattern occurs in the PTX."""
        return len(re.findall(instruction, self.ptx))

    @functools.cached_property
    def registers_and_spills(self) -> tuple[int, int]:
        """Registers a thread, and bytes of local memory a thread, as cuobjdump reads them from the cubin."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            said = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said.stdout)
        if usage is None:
            raise RuntimeError(f"Expected cuobjdump to say REG, STACK and LOCAL, got {said.stdout!r}")
        return int(usage[1]), int(usage[2]) + int(usage[3])


def cuobjdump() -> str:
    """The tool that comes inside the triton package, else the toolkit's."""
    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(inside) if inside.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("Expected cuobjdump inside the triton package or on the PATH, got neither")
    return found


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted in place of run."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        launches.append(Launch(self, dict(zip(names, args, strict=False)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", run), set_wrap_triton_enabled(False):
        yield launches


def compile_launch(launch: Launch, architecture: int, case: str) -> Compiled:
    signature, constants, attributes = {}, {}, {}
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in constexprs or value is None:
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            # What torch allocates is aligned to 512 bytes; a view need not be.
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[(position,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    return Compiled(
        launch.kernel.__name__,
        case,
        architecture,
        made.metadata.num_warps,
        made.metadata.shared,
        made.asm["ptx"],
        made.asm["cubin"],
    )
