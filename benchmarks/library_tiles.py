"""The tiles of the library's convolutions for a layer, and the time expected of them, with no GPU (for predict.py)."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def library() -> ctypes.CDLL:
    """The host side of csrc/cuda, as tests/emulated.py compiles it: it chooses tiles with no GPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated

    return emulated.emulator().functions


@dataclass(frozen=True)
class Tiling:
    """As csrc/cuda/conv2d_tensor_host.h has it."""

    rows: int  # of a slice
    groups: int  # slices of a warp
    positions: int  # of a warp
    row_warps: int
    position_warps: int
    tile_w: int
    row_places: int
    block_planes: int


@functools.cache
def tiling(sizes: tuple[int, ...], device: tuple[int, int, int], images: bool) -> tuple[Tiling, float]:
    """The one that the library takes, and the cycles of a multiprocessor that it expects.

    Args:
        sizes: batch, input and output channels, V, non-zero vectors, height and width of the output, kernel, stride.
        device: major compute capability, shared memory of a block, multiprocessors.
        images: for results in images, not in lanes.
    """
    numbers, cycles = (ctypes.c_int64 * 8)(), ctypes.c_double()
    given = (ctypes.c_int64 * 8)(*sizes), (ctypes.c_int * 3)(*device), int(images)
    found = library().sparsekd_tensor_tiling(*given, numbers, ctypes.byref(cycles))
    if found != len(numbers):
        raise RuntimeError(f"Expected a tiling for a layer of sizes {sizes} on tensor cores, got none")
    return Tiling(*numbers), cycles.value


@functools.cache
def core_cycles(sizes: tuple[int, ...], device: tuple[int, int, int]) -> tuple[float, bool]:
    """Of the convolution on CUDA cores in float32: the cycles of a multiprocessor that the library expects, and whether
    it reads images as they lie. The arguments are those of ``tiling``."""
    flat, cycles = ctypes.c_int(), ctypes.c_double()
    given = (ctypes.c_int64 * 8)(*sizes), (ctypes.c_int * 3)(*device)
    if not library().sparsekd_core_cycles(*given, ctypes.byref(flat), ctypes.byref(cycles)):
        raise RuntimeError(f"Expected a tile for a layer of sizes {sizes} on CUDA cores, got none")
    return cycles.value, bool(flat.value)
