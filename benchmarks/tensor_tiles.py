"""The tile that the library's convolution on tensor cores takes of a layer, with no GPU (for predict.py)."""

from __future__ import annotations

import ctypes
import functools
import math
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
    run: int
    row_warps: int
    position_warps: int
    tile_h: int
    tile_w: int
    block_planes: int
    kind: int  # 2: tiles of whole rows, the zeros between them among their positions


@functools.cache
def tiling(sizes: tuple[int, ...], device: tuple[int, int, int], joined: bool) -> Tiling:
    """The one that the library takes.

    Args:
        sizes: batch, input and output channels, V, non-zero vectors, height and width of the output, kernel, stride.
        device: major compute capability, shared memory of a block, multiprocessors.
        joined: for results in images whose rows lie one behind the other, not in lanes.
    """
    numbers = (ctypes.c_int64 * 10)()
    found = library().sparsekd_tensor_tiling((ctypes.c_int64 * 8)(*sizes), (ctypes.c_int * 3)(*device), joined, numbers)
    if found != len(numbers):
        raise RuntimeError(f"Expected a tiling for a layer of sizes {sizes} on tensor cores, got none")
    return Tiling(*numbers)


def sectors_of_each(elements: int, apart: int) -> float:
    """Sectors of 32 bytes that each of so many 16-bit results side by side takes, `apart` from the next ones."""
    border = math.gcd(2 * elements, 2 * apart, 32)
    return (2 * elements + 32 - border) / elements / 32
