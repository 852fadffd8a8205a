"""What the compiler makes of the kernels here, for any architecture and without a GPU.

Launchers are run on tensors of the device ``meta``, so that each launch is recorded with the arguments, alignments and
options that it would have, and then compiled as Triton would on a GPU: 16 where a pointer or a number divides by it.
:data:`CASES` has the layers, each with its default configuration; :func:`rows` is the table of all of them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
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

from . import configs, conv2d, kd_loss, linear, weight_grad

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


# Tensor cores, how their operands come to shared memory and from there, and whole 16-byte vectors from global memory.
NOTED = {
    "mma.sync": r"\bmma\.sync",
    "ldmatrix": r"\bldmatrix\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "cp.async": r"\bcp\.async\.c[ag]\.shared\.global",
    "cp.async 16": r"\bcp\.async\.c[ag]\.shared\.global[^;]*, 0x10[,;]",
    "cp.async 4": r"\bcp\.async\.ca\.shared\.global[^;]*, 0x4[,;]",
    "ld.global 2": r"\bld\.global(?:\.\w+(?:::\w+)?)*\.[bu]16\b",
    "ld.global 16": r"\bld\.global(?:\.\w+(?:::\w+)?)*\.v4\.b32|\bld\.global(?:\.\w+(?:::\w+)?)*\.v2\.b64",
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
    constants: dict  # constexpr arguments: BLOCK_M and so on

    @functools.cached_property
    def loop(self) -> dict[str, int]:
        """How often those of :data:`NOTED` occur in the smallest loop that has a product of tensor cores; {}: none."""
        lines = self.ptx.splitlines()
        labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\$\w+):", line))}
        found = []
        for end, line in enumerate(lines):
            to = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
            if to and labels.get(to[1], end) < end:
                body = "\n".join(lines[labels[to[1]] : end])
                if any(re.search(NOTED[name], body) for name in ("mma.sync", "wgmma", "tcgen05.mma")):
                    found.append(body)
        if not found:
            return {}
        return {name: len(re.findall(pattern, min(found, key=len))) for name, pattern in NOTED.items()}

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
            signature[name] = launch.kernel.params[position].annotation_type or "fp32"
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
        {name: launch.arguments[name] for name in constexprs},
    )


# --- the layers that are compiled ------------------------------------------------------------------------------------

MULTIPROCESSORS = 108  # of an A100; decides where K is split


@dataclass(frozen=True)
class Layer:
    """A convolution (or, with size 1, a linear layer of as many rows as the batch) at a tenth of its columns."""

    dtype: torch.dtype
    vector: int
    kernel: int = 3
    size: int = 28
    batch: int = 8
    channels: int = 128
    stride: int = 1
    tf32: bool = True

    def __str__(self) -> str:
        kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}.get(self.dtype)
        kind = kind or ("tf32" if self.tf32 else "fp32")
        map_ = f"{self.kernel}x{self.kernel} {self.size}^2 batch {self.batch}" if self.size > 1 else "linear"
        return f"{kind} V={self.vector} {map_}" + (f" stride {self.stride}" if self.stride > 1 else "")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, values, crow_indices, col_indices, on meta."""
        row_groups = self.channels // self.vector
        n = row_groups * (self.channels * self.kernel**2 // 10)
        integers = dict(dtype=torch.int32, device="meta")
        return (
            torch.empty(self.batch, self.channels, self.size, self.size, dtype=self.dtype, device="meta"),
            torch.empty(n, self.vector, dtype=self.dtype, device="meta"),
            torch.empty(row_groups + 1, **integers),
            torch.empty(n, **integers),
        )

    @property
    def geometry(self) -> tuple:
        pair = [self.kernel // 2] * 2
        return [self.kernel] * 2, [self.stride] * 2, pair, [1, 1], 1

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee"


def _forward(layer: Layer) -> None:
    input, *packed = layer.tensors()
    bias = torch.empty(layer.channels, dtype=layer.dtype, device="meta")
    epilogue = (None, bias, None, "relu", layer.channels)
    conv2d.conv2d_fused(input, *packed, None, *epilogue, *layer.geometry, precision=layer.precision)


def _input_grad(layer: Layer) -> None:
    input, *packed = layer.tensors()
    grad = input[:, :, :: layer.stride, :: layer.stride].contiguous()
    sizes = (list(input.shape), *layer.geometry)
    conv2d.conv2d_input_grad(grad, *packed, None, None, *sizes, precision=layer.precision)


def _weight_grad(layer: Layer) -> None:
    input, _, crow, col = layer.tensors()
    grad = input[:, :, :: layer.stride, :: layer.stride].contiguous()
    pattern = (crow, col, None, layer.vector)
    weight_grad.conv2d_weight_grad(input, grad, *pattern, *layer.geometry, precision=layer.precision)


def _linear(layer: Layer) -> None:
    input, *packed = layer.tensors()
    linear.linear(input.flatten(1), *packed, None, None, None, layer.channels)


@dataclass(frozen=True)
class Loss:
    dtype: torch.dtype
    classes: int
    divergence: str = "forward_kl"

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.classes} classes {self.divergence}"


def _loss(loss: Loss) -> None:
    logits = torch.empty(512, loss.classes, dtype=loss.dtype, device="meta")
    target, labelled = (torch.empty(n, dtype=torch.int64, device="meta") for n in ((512,), ()))
    losses, grad = logits.new_empty(512, dtype=torch.float32), logits.new_empty(logits.shape, dtype=torch.float32)
    settings = (512, 4.0, 0.5, -100, 0.0, False, loss.divergence)
    kd_loss.launch(logits, logits, target, labelled, losses, grad, *settings)


_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
CASES: list[tuple[Callable, Layer | Loss]] = [
    *((_forward, Layer(_F16, vector)) for vector in (8, 16, 32, 64, 128)),
    *((_forward, Layer(_F32, vector)) for vector in (8, 16, 32, 64, 128)),
    (_forward, Layer(_BF16, 32)),
    (_forward, Layer(_F16, 16, stride=2)),
    (_forward, Layer(_F16, 32, kernel=1)),
    (_forward, Layer(_F16, 64, kernel=1)),
    (_forward, Layer(_F16, 16, size=7, batch=1, channels=512)),
    (_forward, Layer(_F16, 32, kernel=1, size=14)),
    (_forward, Layer(_F32, 32, kernel=1)),
    (_forward, Layer(_F32, 8, tf32=False)),
    *((_input_grad, Layer(_F16, vector)) for vector in (8, 16, 64)),
    (_input_grad, Layer(_F32, 16)),
    (_input_grad, Layer(_F16, 16, stride=2)),
    (_input_grad, Layer(_F16, 32, kernel=1)),
    *((_weight_grad, Layer(_F16, vector)) for vector in (8, 16, 64)),
    (_weight_grad, Layer(_F32, 16)),
    (_weight_grad, Layer(_F16, 32, kernel=1)),
    (_linear, Layer(_F16, 16, kernel=1, size=1, batch=256, channels=1024)),
    (_linear, Layer(_F32, 64, kernel=1, size=1, batch=256, channels=1024, tf32=False)),
    *((_loss, Loss(dtype, classes)) for dtype in (_F16, _F32) for classes in (10, 1000, 32000)),
    *((_loss, Loss(_F32, classes, divergence)) for classes in (1000, 32000) for divergence in ("reverse_kl", "jsd")),
]


def compiled(case: tuple[Callable, Layer | Loss], architecture: int) -> list[Compiled]:
    """Every launch of one of :data:`CASES`."""
    run, layer = case
    with recording() as launches, mock.patch.object(configs, "multiprocessors", lambda device: MULTIPROCESSORS):
        with mock.patch.object(configs, "architecture_of", lambda device: architecture):
            run(layer)
    return [compile_launch(launch, architecture, str(layer)) for launch in launches]


PRODUCT = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def in_vectors(run: Callable, layer: Layer, architecture: int) -> bool:
    """Whether the layout of a layer's activations lets 16-byte vectors load what the loop gathers.

    Space to lanes does, and a 1 x 1 convolution whose rows are whole vectors. TF32 products want each pixel's columns
    side by side in shared memory from 9.0 on (no transposed operand but of 16 bits), which no copy of a vector of
    pixels gives.
    """
    if layer.dtype.itemsize > 2 and architecture >= 90:
        return False
    if layer.kernel == 1:
        return layer.size**2 % 16 == 0
    return run is not _weight_grad and layer.size > 7


def shortcomings(run: Callable, layer: Layer | Loss, made: Compiled) -> list[str]:
    """What is wrong with one launch of a case: a sentence for each property that its code must have and has not."""
    registers, spills = made.registers_and_spills
    wrong = []

    def expect(holds: bool, what: str, got: object) -> None:
        if not holds:
            wrong.append(f"Expected {what}, got {got}")

    expect(spills == 0, "no spill", f"{spills} bytes of {registers} registers")
    limit = configs.shared_limit(made.architecture)
    expect(made.shared <= limit, f"at most {limit} bytes of shared memory", made.shared)
    if made.kernel not in ("_conv2d_kernel", "_conv2d_weight_grad_kernel"):
        return wrong
    loop = made.loop
    if layer.dtype == torch.float32 and layer.precision == "ieee":
        expect(not loop, "float32 as it is, which tensor cores have not", loop)
        return wrong
    product = PRODUCT[made.architecture]
    expect(bool(loop.get(product)), f"{product} in the loop", loop)
    if not loop or run is _weight_grad and layer.kernel > 1:
        return wrong
    if layer.dtype.itemsize == 2 and made.architecture < 90:
        expect(loop["ldmatrix"] > 0, "ldmatrix in the loop", loop)
    expect(loop["cp.async"] > 0, "the next columns fetched by cp.async while these are multiplied", loop)
    if in_vectors(run, layer, made.architecture):
        vectors = made.constants["BLOCK_M"] * made.constants["BLOCK_K"] * layer.dtype.itemsize // 16
        least = max(vectors // (32 * made.num_warps), 1)
        expect(loop["cp.async 16"] >= least, f"{least} vectors of activations", loop["cp.async 16"])
        narrow = loop["ld.global 2"] + loop["cp.async 4"]
        most = 2 + made.constants["BLOCK_K"] // 8  # the columns' own numbers
        expect(narrow <= most, f"at most {most} narrow loads", narrow)
    return wrong


def rows(architectures: Iterable[int] = configs.ARCHITECTURES) -> list[dict]:
    """One dictionary for each launch of :data:`CASES` and architecture, for the table of ``make gpu-static``.

    Keys: kernel, arch ("sm_80"), registers (a thread), shared_bytes (a block), spills (bytes a thread), loop
    (:data:`NOTED`, those that occur in the loop of products), wrong (:func:`shortcomings`).
    """
    found = {}
    for case in CASES:
        for architecture in architectures:
            for made in compiled(case, architecture):
                name = f"{made.kernel.removeprefix('_').removesuffix('_kernel')} {case[0].__name__.removeprefix('_')}"
                registers, spills = made.registers_and_spills
                found[name, made.case, architecture] = dict(
                    kernel=f"{name} {made.case}",
                    arch=f"sm_{architecture}",
                    registers=registers,
                    shared_bytes=made.shared,
                    spills=spills,
                    loop={name: count for name, count in made.loop.items() if count},
                    wrong=shortcomings(*case, made),
                )
    return list(found.values())
