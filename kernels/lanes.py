"""Where activations lie, such that a gathered column of them is made of whole 16-byte vectors.

A 1 x 1 convolution has that from its input: :func:`as_lines`. Others get it by space to lanes:

    [unit][channel][row][column][LANES]

The lanes of a unit are the same position of LANES images or, of small batches, of strips of rows of one image. A shift
by a tap moves to another vector and never off its alignment; what the padding adds lies there as zeros, so that no load
looks at a border. ``csrc/cuda/lanes.cuh`` has the same idea in fp32.

    batch 2, LANES = 8: 4 strips an image      lane 0 1 2 3 | 4 5 6 7
                                               strip 0 1 2 3 | 0 1 2 3   of image 0 | 1
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .checks import Geometry, cdiv

LANES = 8


class Lanes(NamedTuple):
    strips: int  # of an image
    strip_positions: int  # rows of positions in a strip
    units: int
    rows: int  # of a stored plane, reach included
    columns: int


def layout(batch: int, positions: tuple[int, int], step: tuple[int, int], reach: tuple[int, int]) -> Lanes:
    """For a convolution of ``positions`` that are ``step`` apart, which reads ``reach`` beyond the last."""
    strips = min(max(LANES // max(batch, 1), 1), positions[0])
    strip_positions = cdiv(positions[0], strips)
    rows = (strip_positions - 1) * step[0] + reach[0] + 1
    columns = (positions[1] - 1) * step[1] + reach[1] + 1
    return Lanes(strips, strip_positions, cdiv(batch * strips, LANES), rows, columns)


@triton.jit
def _to_lanes_kernel(
    input_ptr,
    output_ptr,
    vectors,
    batch,
    channels,
    in_h,
    in_w,
    strips,
    strip_step,
    rows,
    columns,
    origin_h,
    origin_w,
    x_n,
    x_c,
    x_h,
    x_w,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row ``y`` of strip ``t`` is the input's row ``t * strip_step + y + origin_h``, or zeros outside."""
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    column = vector % columns
    row = vector // columns % rows
    channel = vector // columns // rows % channels
    unit = vector // columns // rows // channels
    slot = unit[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [BLOCK, LANES]
    image = slot // strips
    y = slot % strips * strip_step + row[:, None] + origin_h
    x = column[:, None] + origin_w
    stored = (vector < vectors)[:, None]
    inside = stored & (image < batch) & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
    value = tl.load(input_ptr + image * x_n + channel[:, None] * x_c + y * x_h + x * x_w, mask=inside, other=0.0)
    to = output_ptr + vector[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(to, value, mask=stored)


def to_lanes(input: Tensor, lanes: Lanes, step: int, origin: tuple[int, int]) -> Tensor:
    """``[N, C, H, W]`` to ``[units, C, rows, columns, LANES]``."""
    batch, channels, in_h, in_w = input.shape
    output = input.new_empty((lanes.units, channels, lanes.rows, lanes.columns, LANES))
    vectors = output.numel() // LANES
    block = 128
    wrap_triton(_to_lanes_kernel)[(cdiv(vectors, block),)](
        input,
        output,
        vectors,
        batch,
        channels,
        in_h,
        in_w,
        lanes.strips,
        lanes.strip_positions * step,
        lanes.rows,
        lanes.columns,
        *origin,
        *input.stride(),
        LANES=LANES,
        BLOCK=block,
    )
    return output


def as_lines(geometry: Geometry, *maps: Tensor | None) -> tuple[Tensor | None, ...]:
    """Views ``[N, C, 1, H * W]`` where a convolution has neither reach nor steps and rows follow one another.

    Neighbours then stay neighbours from one row to the next, and no load looks at a border.
    """
    if not geometry.is_point or any(t is not None and t.stride(2) != t.shape[3] * t.stride(3) for t in maps):
        return maps
    return tuple(None if t is None else t.view(*t.shape[:2], 1, t.shape[2] * t.shape[3]) for t in maps)
