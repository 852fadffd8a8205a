"""Convolution with a V x 1 sparse weight and dense activations, as an implicit GEMM on tensor cores.

    output[n, row(g, v), y, x] =
        sum over j in group g:  values[j, v] * input[n, c(j), y*stride + r(j)*dilation - padding, ...]

    pixels (n, y, x)  ->  M            a tile of BLOCK_M pixels
    the V rows of g   ->  N            BLOCK_N = V, or slices of it
    columns j of g    ->  K            only those that are kept, BLOCK_K at a time

The V output channels of a row group share their columns, so that a gathered tile of activations [BLOCK_M, BLOCK_K]
meets a dense tile of weights [BLOCK_K, BLOCK_N] in one ``tl.dot``. What is gathered ``col_indices`` alone decide: a
column (c, r, s) is a run of pixels of channel c, shifted. In NCHW the shift leaves loads without an alignment; in lanes
(``lanes.py``) each is a whole 16-byte vector. The device code is in ``conv2d_kernel.py``.

The input gradient is the same kernel on the transposed pattern (TRANSPOSED): BLOCK_N input channels on N, and on K the
union of the (row group, tap) in which any of them has a vector, V rows each. See ``plans.py``.

Tiles are walked by a persistent grid, heaviest row groups first. A small map gives few tiles, so K is split (SPLIT_K):
partial sums go to memory and ``_finish_kernel`` adds them in order, which is deterministic.

Indices may come from anywhere: starts, columns and rows are clamped to their range, so that wrong ones give wrong
numbers at worst.

Method: vectors of output channels as in Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity
under reduced precision", SC 2021; heaviest rows first as in Gale et al., "Sparse GPU kernels for deep learning", SC
2020.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import checks, configs, lanes, plans
from .checks import cdiv
from .conv2d_kernel import _conv2d_kernel, _finish_kernel


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
    input, output, residual = lanes.as_lines(geometry, input, output, epilogue.residual)
    batch, in_channels, in_h, in_w = input.shape
    out_channels, out_h, out_w = output.shape[1:]
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    channels_per_group, rows_per_group = in_channels // geometry.groups, out_channels // geometry.groups
    vector = values.shape[1]
    row_groups = geometry.groups * cdiv(rows_per_group, config.block_n if transposed else vector)
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
    per_tile = config.block_m // (grid_h * positions[1] * lanes_count) + 2  # images or units that one meets
    if max(_span(input, per_tile), _span(output, per_tile * lanes_count)) > checks.INT32_LIMIT:
        raise ValueError(
            f"Expected {config.block_m} pixels to lie within 2^31 elements, got {tuple(input.shape)} and "
            f"{tuple(output.shape)}"
        )
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
        HAS_RESIDUAL=residual is not None,
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
        residual,
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
        BORDER=not geometry.is_point and (transposed or any(padding)),
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
            residual,
            output,
            output.numel(),
            out_channels,
            out_h,
            out_w,
            *output.stride(),
            BLOCK=block,
            **finish,
        )


def _span(maps: Tensor, count: int) -> int:
    """Elements from the first of ``count`` images to the last."""
    sizes = (min(count, maps.shape[0]), *maps.shape[1:])
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, maps.stride(), strict=True))


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
    precision: str | None = None,
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
    if config is None:
        geometry_given = (out_channels, kernel_size, stride, padding, dilation, groups)

        def run(config: configs.Config) -> Tensor:
            pattern, epilogue = (crow_indices, col_indices, row_indices), (scale, shift, residual, activation)
            return conv2d_fused(input, values, *pattern, *epilogue, *geometry_given, config, precision)

        config = configs.config_for(problem, input.device, run)
    order = plans.heaviest_first(crow_indices)
    source = _Source(crow_indices[:-1], crow_indices[1:], col_indices, order)
    precision = precision or checks.precision_of(input.dtype)
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
    precision: str | None = None,
) -> Tensor:
    """Arguments as :func:`sparsekd.sparse.ops.conv2d`'s; ``transpose`` is of the backward alone."""
    pattern = (crow_indices, col_indices, row_indices)
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    epilogue = (None, bias, None, "none")
    chosen = dict(config=config, precision=precision, shift_name="bias")
    return conv2d_fused(input, values, *pattern, *epilogue, *geometry, **chosen)


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
    precision: str | None = None,
) -> Tensor:
    """dgrad. ``transpose``, the list of single entries, is not read: blocks of channels have a plan of their own."""
    checks.check_floating(grad_output, "grad_output")
    geometry = checks.checked_grad_geometry(grad_output, input_size, kernel_size, stride, padding, dilation, groups)
    out_channels = grad_output.shape[1]
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

        def run(config: configs.Config) -> Tensor:
            pattern = (crow_indices, col_indices, row_indices, transpose)
            geometry = (input_size, kernel_size, stride, padding, dilation, groups)
            return conv2d_input_grad(grad_output, values, *pattern, *geometry, config, precision)

        config = configs.config_for(problem, grad_output.device, run)
    config = dataclasses.replace(config, block_n=block)
    source = _Source(plan.start, plan.end, plan.column, plan.order, plan.vector_of)
    precision = precision or checks.precision_of(grad_output.dtype)
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
