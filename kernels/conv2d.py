"""Convolution with a V x 1 sparse weight and dense activations, as an implicit GEMM on tensor cores.

    output[n, row(g, v), y, x] = sum over j in group g:  values[j, v] * input[n, c(j), y*stride + r(j)*dilation - padding, ...]

    pixels (n, y, x)  ->  M            a tile of BLOCK_M pixels
    the V rows of g   ->  N            BLOCK_N = V, or slices of it
    columns j of g    ->  K            only those that are kept, BLOCK_K at a time

The V output channels of a row group share their columns, so that a gathered tile of activations [BLOCK_M, BLOCK_K] meets
a dense tile of weights [BLOCK_K, BLOCK_N] in one ``tl.dot``. What is gathered is decided by ``col_indices`` alone: a
column (c, r, s) is a run of pixels of channel c, shifted. In NCHW the shift leaves loads without an alignment; in lanes
(``lanes.py``) each is a whole 16-byte vector.

The input gradient is the same kernel on the transposed pattern (TRANSPOSED): BLOCK_N input channels on N, and on K the
union of the (row group, tap) in which any of them has a vector, V rows each. See ``plans.py``.

Tiles are walked by a persistent grid, heaviest row groups first. A small map gives few tiles, so K is split (SPLIT_K):
partial sums go to memory and ``_finish_kernel`` adds them in order, which is deterministic.

Indices may come from anywhere: starts, columns and rows are clamped to their range, so that wrong ones give wrong
numbers at worst.

Method: vectors of output channels as in Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity
under reduced precision", SC 2021; heaviest rows first as in Gale et al., "Sparse GPU kernels for deep learning", SC 2020.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import checks, configs, lanes, plans
from .checks import cdiv


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x > 0, x, tl.where(x != x, x, 0.0))  # NaN stays NaN
    elif ACTIVATION == "relu6":
        x = tl.where(x != x, x, tl.where(x > 0, tl.where(x < 6, x, 6.0), 0.0))
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        x = x * tl.where(x > -3, tl.where(x < 3, x + 3, 6.0), 0.0) / 6
    return x


@triton.jit
def _conv2d_tile(
    tile,
    columns,
    input_ptr,
    values_ptr,
    start_ptr,
    end_ptr,
    col_ptr,
    vector_of_ptr,
    row_ptr,
    order_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    output_ptr,
    n_vectors,
    n_slots,
    batch,
    pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    grid_h,
    grid_w,
    channels_per_group,
    rows_per_group,
    row_groups,
    row_groups_per_group,
    strips,
    pad_h,
    pad_w,
    origin_h,
    origin_w,
    x_n,
    x_c,
    x_h,
    x_w,
    y_split,
    y_n,
    y_c,
    y_h,
    y_w,
    VECTOR: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LANES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_M pixels and BLOCK_N output channels; see :func:`_conv2d_kernel`."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H  # from a position to the next, in the input
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    SLICES: tl.constexpr = 1 if TRANSPOSED else (VECTOR + BLOCK_N - 1) // BLOCK_N
    # Row groups fastest: those that run at a time read the same pixels, from L2.
    rank = tile % columns // SLICES
    slice_begin = tile % SLICES * BLOCK_N
    split = tile // columns % SPLIT_K
    tile_m = tile // columns // SPLIT_K
    entry = tl.load(order_ptr + rank)
    row_group = entry // PHASES
    group = row_group // row_groups_per_group  # of the convolution
    phase_h = entry % PHASES // STRIDE_W
    phase_w = entry % PHASES % STRIDE_W

    # Pixels: where each lies in the input and in the output.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if LANES > 1:
        position = m // LANES
        slot = position // (grid_w * grid_h) * LANES + m % LANES
        x_position = position % grid_w
        y_in_strip = position // grid_w % grid_h
        image = slot // strips
        y_position = slot % strips * grid_h + y_in_strip
        # What lies at `origin` is stored first. Vectors are counted, so that their alignment is plain to see.
        unit = position // (grid_w * grid_h)
        first = tile_m * BLOCK_M // LANES // (grid_w * grid_h)
        in_base = (unit - first) * x_n
        in_base += (y_in_strip * STEP_H - origin_h) * x_h + (x_position * STEP_W - origin_w)
    else:
        image = m // (grid_w * grid_h)
        y_position = m // grid_w % grid_h
        x_position = m % grid_w
        first = tile_m * BLOCK_M // (grid_w * grid_h)
        in_base = (image - first) * x_n + y_position * STEP_H * x_h + x_position * STEP_W * x_w
    # Within a tile 32 bits reach; what lies before it is a scalar.
    input_ptr += (first.to(tl.int64) * x_n + (group * channels_per_group).to(tl.int64) * x_c) * LANES
    in_m = m < pixels
    y_in, x_in = y_position * STEP_H, x_position * STEP_W
    y_out, x_out = y_position, x_position
    if TRANSPOSED:
        y_out = y_position * STRIDE_H + phase_h
        x_out = x_position * STRIDE_W + phase_w
    in_output = in_m & (image < batch) & (y_out < out_h) & (x_out < out_w)

    # The group's columns, this split's share of them.
    begin = tl.maximum(tl.load(start_ptr + entry), 0)
    end = tl.minimum(tl.load(end_ptr + entry), n_slots)
    if TRANSPOSED:
        begin, end = begin * VECTOR, end * VECTOR
    if SPLIT_K > 1:
        share = (end - begin + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
        begin += split * share
        end = tl.minimum(end, begin + share)

    n = slice_begin + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
    for k in range(begin, end, BLOCK_K):
        j = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        in_k = j < end
        if TRANSPOSED:
            column = tl.load(col_ptr + j // VECTOR, mask=in_k, other=0)
            channel = column // TAPS * VECTOR + j % VECTOR  # the packed row
            in_k &= channel < channels_per_group
            if HAS_ROWS:
                first_row = group * channels_per_group
                channel = tl.load(row_ptr + first_row + channel, mask=in_k, other=0) - first_row
        else:
            column = tl.load(col_ptr + j, mask=in_k, other=0)
            channel = column // TAPS
        in_k &= (channel >= 0) & (channel < channels_per_group)
        r, s = column % TAPS // KERNEL_W, column % KERNEL_W
        if TRANSPOSED:
            # The taps of a phase are those for which these divisions leave no rest.
            shift_h = (phase_h + pad_h - r * DILATION_H) // STRIDE_H
            shift_w = (phase_w + pad_w - s * DILATION_W) // STRIDE_W
        else:
            shift_h, shift_w = r * DILATION_H - pad_h, s * DILATION_W - pad_w
        if LANES > 1:  # borders are zeros that lie there
            in_x = in_k[None, :] & in_m[:, None]
            offset = channel * x_c + shift_h * x_h + shift_w
            offset = (in_base[:, None] + offset[None, :]) * LANES + (m % LANES)[:, None]
        else:
            y, x = y_in[:, None] + shift_h[None, :], x_in[:, None] + shift_w[None, :]
            in_x = in_k[None, :] & in_m[:, None] & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
            offset = in_base[:, None] + (channel * x_c + shift_h * x_h + shift_w * x_w)[None, :]
        a = tl.load(input_ptr + offset, mask=in_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        if TRANSPOSED:
            vector = tl.load(
                vector_of_ptr + (j // VECTOR * BLOCK_N)[:, None] + n[None, :], mask=in_k[:, None], other=-1
            )
            place = vector * VECTOR + (j % VECTOR)[:, None]
            in_w_tile = in_k[:, None] & (vector >= 0) & (vector < n_vectors)
        else:
            place = j[:, None] * VECTOR + n[None, :]
            in_w_tile = in_k[:, None] & (n[None, :] < VECTOR)
        w = tl.load(values_ptr + place, mask=in_w_tile, other=0.0)  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(a, w, accumulator, input_precision=PRECISION)

    # The output channel of each packed row.
    if TRANSPOSED:
        local = row_group % row_groups_per_group * BLOCK_N + n
        in_n = local < rows_per_group
    else:
        local = row_group % row_groups_per_group * VECTOR + n
        in_n = (n < VECTOR) & (local < rows_per_group)
    row = group * rows_per_group + local
    if HAS_ROWS and not TRANSPOSED:
        row = tl.load(row_ptr + row, mask=in_n, other=0)
        in_n &= (row >= 0) & (row < row_groups // row_groups_per_group * rows_per_group)
    offset = image.to(tl.int64) * y_n + y_out * y_h + x_out * y_w
    offset = offset[:, None] + row.to(tl.int64)[None, :] * y_c
    in_y = in_output[:, None] & in_n[None, :]
    if SPLIT_K > 1:
        tl.store(output_ptr + split.to(tl.int64) * y_split + offset, accumulator, mask=in_y)
    else:
        if HAS_SCALE:
            accumulator *= tl.load(scale_ptr + row, mask=in_n, other=0.0).to(ACCUMULATOR)[None, :]
        if HAS_SHIFT:
            accumulator += tl.load(shift_ptr + row, mask=in_n, other=0.0).to(ACCUMULATOR)[None, :]
        if HAS_RESIDUAL:
            accumulator += tl.load(residual_ptr + offset, mask=in_y, other=0.0).to(ACCUMULATOR)
        accumulator = _activate(accumulator, ACTIVATION)
        tl.store(output_ptr + offset, accumulator.to(output_ptr.dtype.element_ty), mask=in_y)


@triton.jit
def _conv2d_kernel(
    input_ptr,
    values_ptr,
    start_ptr,
    end_ptr,
    col_ptr,
    vector_of_ptr,
    row_ptr,
    order_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    output_ptr,
    n_vectors,
    n_slots,
    batch,
    pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    grid_h,
    grid_w,
    channels_per_group,
    rows_per_group,
    row_groups,
    row_groups_per_group,
    strips,
    pad_h,
    pad_w,
    origin_h,
    origin_w,
    x_n,
    x_c,
    x_h,
    x_w,
    y_split,
    y_n,
    y_c,
    y_h,
    y_w,
    VECTOR: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LANES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One tile of BLOCK_M pixels and BLOCK_N output channels after the other; see the head of the file.

    Pixels are those of ``grid_h`` x ``grid_w`` positions. The forward computes each of them; the input gradient of a
    strided convolution computes one phase (y % stride, x % stride) at a time, whose taps are those that reach it, so
    that within a phase it is a convolution of stride 1.
    """
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    SLICES: tl.constexpr = 1 if TRANSPOSED else (VECTOR + BLOCK_N - 1) // BLOCK_N
    columns = row_groups * SLICES * PHASES
    if PERSISTENT:
        tiles = (pixels + BLOCK_M - 1) // BLOCK_M * SPLIT_K * columns
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _conv2d_tile(
                tile,
                columns,
                input_ptr,
                values_ptr,
                start_ptr,
                end_ptr,
                col_ptr,
                vector_of_ptr,
                row_ptr,
                order_ptr,
                scale_ptr,
                shift_ptr,
                residual_ptr,
                output_ptr,
                n_vectors,
                n_slots,
                batch,
                pixels,
                in_h,
                in_w,
                out_h,
                out_w,
                grid_h,
                grid_w,
                channels_per_group,
                rows_per_group,
                row_groups,
                row_groups_per_group,
                strips,
                pad_h,
                pad_w,
                origin_h,
                origin_w,
                x_n,
                x_c,
                x_h,
                x_w,
                y_split,
                y_n,
                y_c,
                y_h,
                y_w,
                VECTOR,
                KERNEL_H,
                KERNEL_W,
                STRIDE_H,
                STRIDE_W,
                DILATION_H,
                DILATION_W,
                TRANSPOSED,
                LANES,
                HAS_ROWS,
                HAS_SCALE,
                HAS_SHIFT,
                HAS_RESIDUAL,
                ACTIVATION,
                ACCUMULATOR,
                PRECISION,
                SPLIT_K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    else:
        _conv2d_tile(
            tl.program_id(0),
            columns,
            input_ptr,
            values_ptr,
            start_ptr,
            end_ptr,
            col_ptr,
            vector_of_ptr,
            row_ptr,
            order_ptr,
            scale_ptr,
            shift_ptr,
            residual_ptr,
            output_ptr,
            n_vectors,
            n_slots,
            batch,
            pixels,
            in_h,
            in_w,
            out_h,
            out_w,
            grid_h,
            grid_w,
            channels_per_group,
            rows_per_group,
            row_groups,
            row_groups_per_group,
            strips,
            pad_h,
            pad_w,
            origin_h,
            origin_w,
            x_n,
            x_c,
            x_h,
            x_w,
            y_split,
            y_n,
            y_c,
            y_h,
            y_w,
            VECTOR,
            KERNEL_H,
            KERNEL_W,
            STRIDE_H,
            STRIDE_W,
            DILATION_H,
            DILATION_W,
            TRANSPOSED,
            LANES,
            HAS_ROWS,
            HAS_SCALE,
            HAS_SHIFT,
            HAS_RESIDUAL,
            ACTIVATION,
            ACCUMULATOR,
            PRECISION,
            SPLIT_K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


@triton.jit
def _finish_kernel(
    partial_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    output_ptr,
    count,
    channels,
    out_h,
    out_w,
    y_n,
    y_c,
    y_h,
    y_w,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the SPLIT_K partial sums ``[SPLIT_K, N, K, H, W]`` in order, and finishes as the convolution would have."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros((BLOCK,), dtype=ACCUMULATOR)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial_ptr + split * count + i, mask=inside, other=0.0)
    x = i % out_w
    y = i // out_w % out_h
    row = i // out_w // out_h % channels
    image = i // out_w // out_h // channels
    offset = image * y_n + row * y_c + y * y_h + x * y_w
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row, mask=inside, other=0.0).to(ACCUMULATOR)
    if HAS_SHIFT:
        total += tl.load(shift_ptr + row, mask=inside, other=0.0).to(ACCUMULATOR)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(ACCUMULATOR)
    total = _activate(total, ACTIVATION)
    tl.store(output_ptr + offset, total.to(output_ptr.dtype.element_ty), mask=inside)


# --- launchers -------------------------------------------------------------------------------------------------------


def precision_of(dtype: torch.dtype, convolution: bool) -> str:
    """How fp32 products are computed: as torch would in its own convolutions and matrix products."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


class _Epilogue(NamedTuple):
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"


class _Source(NamedTuple):
    """Where a pattern's columns are: the forward's own, or transposed."""

    start: Tensor
    end: Tensor
    column: Tensor
    order: Tensor
    vector_of: Tensor | None = None


def _launch(
    input: Tensor,
    values: Tensor,
    source: _Source,
    rows: Tensor | None,
    epilogue: _Epilogue,
    output: Tensor,
    geometry: checks.Geometry,
    config: configs.Config,
    precision: str,
) -> None:
    """One convolution or, with ``source.vector_of``, one input gradient, of ``input`` into ``output``."""
    transposed = source.vector_of is not None
    batch, in_channels, in_h, in_w = input.shape
    out_channels, out_h, out_w = output.shape[1:]
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    channels_per_group, rows_per_group = in_channels // geometry.groups, out_channels // geometry.groups
    vector = values.shape[1]
    row_groups = geometry.groups * cdiv(rows_per_group, config.block_n if transposed else vector)
    if max(in_channels * in_h * in_w, out_channels * out_h * out_w) > checks.INT32_LIMIT:
        raise ValueError(
            f"Expected images of fewer than 2^31 elements, got {tuple(input.shape)} and {tuple(output.shape)}"
        )
    positions = (cdiv(out_h, stride[0]), cdiv(out_w, stride[1])) if transposed else (out_h, out_w)
    step = (1, 1) if transposed else stride
    lanes_count, strips, origin, strides = 1, 1, (0, 0), input.stride()
    grid_h, images = positions[0], batch
    if config.lanes:
        origin, reach = _origin_and_reach(geometry, transposed)
        lay = lanes.layout(batch, positions, step, reach)
        input = lanes.to_lanes(input, lay, step[0], origin)
        lanes_count, strips = lanes.LANES, lay.strips
        strides = (in_channels * lay.rows * lay.columns, lay.rows * lay.columns, lay.columns, 1)
        grid_h, images = lay.strip_positions, lay.units * lanes.LANES
    pixels = images * grid_h * positions[1]
    if pixels > checks.INT32_LIMIT:
        raise ValueError(f"Expected fewer than 2^31 pixels, got {pixels}")
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    accumulator = tl.float64 if input.dtype == torch.float64 else tl.float32
    split_k = config.split_k
    target = output if split_k == 1 else output.new_empty((split_k, *output.shape), dtype=wide)
    target_strides = target.stride()[-4:]
    slices = 1 if transposed else cdiv(vector, config.block_n)
    phases = stride[0] * stride[1] if transposed else 1
    tiles = cdiv(pixels, config.block_m) * split_k * row_groups * slices * phases
    programs = min(config.programs or tiles, tiles, checks.INT32_LIMIT)
    finish = dict(
        HAS_SCALE=epilogue.scale is not None,
        HAS_SHIFT=epilogue.shift is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        ACCUMULATOR=accumulator,
        SPLIT_K=split_k,
    )
    wrap_triton(_conv2d_kernel)[(programs,)](
        input,
        values,
        source.start,
        source.end,
        source.column,
        source.vector_of,
        rows,
        source.order,
        epilogue.scale,
        epilogue.shift,
        epilogue.residual,
        target,
        values.shape[0],
        source.column.shape[0],
        batch,
        pixels,
        in_h,
        in_w,
        out_h,
        out_w,
        grid_h,
        positions[1],
        channels_per_group,
        rows_per_group,
        row_groups,
        row_groups // geometry.groups,
        strips,
        *padding,
        *origin,
        *strides,
        output.numel(),
        *target_strides,
        VECTOR=vector,
        KERNEL_H=geometry.kernel[0],
        KERNEL_W=geometry.kernel[1],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        TRANSPOSED=transposed,
        LANES=lanes_count,
        HAS_ROWS=rows is not None,
        PRECISION=precision,
        PERSISTENT=programs < tiles,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **finish,
    )
    if split_k > 1:
        block = 512
        wrap_triton(_finish_kernel)[(cdiv(output.numel(), block),)](
            target,
            epilogue.scale,
            epilogue.shift,
            epilogue.residual,
            output,
            output.numel(),
            out_channels,
            out_h,
            out_w,
            *output.stride(),
            BLOCK=block,
            **finish,
        )


def _origin_and_reach(geometry: checks.Geometry, transposed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first input row and column that position 0 reads, and how far beyond it the last tap lies."""
    origin, reach = [], []
    for kernel, stride, padding, dilation in zip(
        geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
    ):
        shifts = [tap * dilation - padding for tap in range(kernel)]
        if transposed:
            phases = [(phase, tap) for phase in range(stride) for tap in range(kernel)]
            exact = [(phase + padding - tap * dilation) for phase, tap in phases]
            shifts = [shift // stride for shift in exact if shift % stride == 0]
        origin.append(min(shifts))
        reach.append(max(shifts) - min(shifts))
    return tuple(origin), tuple(reach)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def conv2d_fused(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: configs.Config | None = None,
    shift_name: str = "shift",
) -> Tensor:
    """``activation(scale * conv2d + shift + residual)``; arguments as :func:`sparsekd.sparse.ops.conv2d_fused`'s."""
    checks.check_floating(input, "input")
    geometry, out_size = checks.checked_geometry(input.shape, kernel_size, stride, padding, dilation, groups)
    checks.check_dim(col_indices, "col_indices", 1)
    checks.check_values(values, input, "input", col_indices)
    vector = values.shape[1]
    checks.check_pattern(crow_indices, col_indices, row_indices, input, out_channels, groups, vector)
    scale = checks.check_channels(scale, "scale", input, out_channels)
    shift = checks.check_channels(shift, shift_name, input, out_channels)
    if activation not in ("none", "relu", "relu6", "silu", "hardswish"):
        raise ValueError(f"Expected activation to be none, relu, relu6, silu or hardswish, got {activation}")
    output = _empty((input.shape[0], out_channels, *out_size), input)
    if residual is not None:
        if residual.shape != output.shape:
            raise ValueError(
                f"Expected a residual of the output's shape {tuple(output.shape)}, got {tuple(residual.shape)}"
            )
        checks.check_like(residual, "residual", input, "input")
        if residual.stride() != output.stride():
            residual = torch.empty_like(output).copy_(residual)
    if output.numel() == 0:
        return output
    row_groups = crow_indices.shape[0] - 1
    problem = configs.Problem.of(
        "conv2d", input.dtype, vector, output.numel() // out_channels, out_channels,
        input.shape[1] // groups * geometry.taps, geometry.taps, geometry.stride[0], col_indices.shape[0], row_groups,
    )  # fmt: skip
    config = config or configs.config_for(problem, input.device)
    order = plans.heaviest_first(crow_indices)
    source = _Source(crow_indices[:-1], crow_indices[1:], col_indices, order)
    precision = precision_of(input.dtype, convolution=True)
    epilogue = _Epilogue(scale, shift, residual, activation)
    _launch(input, values.contiguous(), source, row_indices, epilogue, output, geometry, config, precision)
    return output


def conv2d(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    transpose: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: configs.Config | None = None,
) -> Tensor:
    """Arguments as :func:`sparsekd.sparse.ops.conv2d`'s; ``transpose`` is of the backward alone."""
    pattern = (crow_indices, col_indices, row_indices)
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    return conv2d_fused(input, values, *pattern, None, bias, None, "none", *geometry, config=config, shift_name="bias")


def conv2d_input_grad(
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    transpose: Tensor | None,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: configs.Config | None = None,
) -> Tensor:
    """dgrad. ``transpose``, the list of single entries, is not read: blocks of channels have a plan of their own."""
    checks.check_floating(grad_output, "grad_output")
    checks.check_dim(grad_output, "grad_output", 4)
    geometry, out_size = checks.checked_geometry(input_size, kernel_size, stride, padding, dilation, groups)
    out_channels = grad_output.shape[1]
    if tuple(grad_output.shape) != (input_size[0], out_channels, *out_size):
        raise ValueError(
            f"Expected grad_output of shape {(input_size[0], out_channels, *out_size)}, got {tuple(grad_output.shape)}"
        )
    checks.check_dim(col_indices, "col_indices", 1)
    checks.check_values(values, grad_output, "grad_output", col_indices)
    vector = values.shape[1]
    checks.check_pattern(crow_indices, col_indices, row_indices, grad_output, out_channels, groups, vector)
    grad_input = _empty(tuple(input_size), grad_output)
    if grad_input.numel() == 0:
        return grad_input
    row_groups = crow_indices.shape[0] - 1
    columns = input_size[1] // groups * geometry.taps
    density = col_indices.shape[0] / max(row_groups * columns, 1)
    block = _block_of_channels(density, input_size[1] // groups)
    plan = plans.transposed(crow_indices, col_indices, input_size[1], row_groups // groups, geometry, block)
    if config is None:
        problem = configs.Problem.of(
            "conv2d_input_grad", grad_output.dtype, block, grad_input.numel() // input_size[1], input_size[1],
            row_groups // groups * vector * geometry.taps, geometry.taps, geometry.stride[0],
            int(plan.column.shape[0] * vector * (1 - (1 - density) ** block)), cdiv(input_size[1], block),
        )  # fmt: skip
        config = configs.config_for(problem, grad_output.device)
    config = dataclasses.replace(config, block_n=block)
    source = _Source(plan.start, plan.end, plan.column, plan.order, plan.vector_of)
    precision = precision_of(grad_output.dtype, convolution=True)
    _launch(grad_output, values.contiguous(), source, row_indices, _Epilogue(), grad_input, geometry, config, precision)
    return grad_input


def _block_of_channels(density: float, channels: int) -> int:
    """Input channels that share a tile of the input gradient.

    A wider tile makes better use of a tensor core, and meets more columns, as any of its channels may have them.
    """
    # Share of the peak that a tile of this width reaches, about.
    share = {8: 0.25, 16: 0.5, 32: 0.8, 64: 1.0}
    usable = [block for block in share if block == 8 or block < 2 * channels]
    return min(usable, key=lambda block: (1 - (1 - density) ** block) / share[block])
