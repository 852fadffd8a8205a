"""Gradient of a convolution's weight at the non-zero vectors alone (a sampled dense-dense product), on tensor cores.

    grad_values[j, v] = sum over pixels (n, y, x) of  input[n, c(j), y*stride + r(j)*dilation - padding, ...]
                                                      * grad_output[n, row(g, v), y, x]

    the columns j of a row group  ->  M    BLOCK_M at a time
    its V output channels         ->  N
    pixels                        ->  K    BLOCK_K at a time, in SPLIT_K shares

Shares go to memory and are added in order, so that the result is the same in every run.

Method: SDDMM of Gale et al., "Sparse GPU kernels for deep learning", SC 2020, with vectors as in Chen et al., SC 2021.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import checks, configs, lanes, plans
from .checks import cdiv


@triton.jit
def _conv2d_weight_grad_kernel(
    input_ptr,
    grad_output_ptr,
    crow_ptr,
    col_ptr,
    row_ptr,
    order_ptr,
    output_ptr,
    n_vectors,
    pixels,
    pixels_per_split,
    in_h,
    in_w,
    out_h,
    out_w,
    channels_per_group,
    rows_per_group,
    row_groups_per_group,
    out_channels,
    pad_h,
    pad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    VECTOR: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BORDER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (row groups * slices of V, blocks of columns, shares of the pixels)."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    SLICES: tl.constexpr = (VECTOR + BLOCK_N - 1) // BLOCK_N
    row_group = tl.load(order_ptr + tl.program_id(0) // SLICES)
    group = row_group // row_groups_per_group
    split = tl.program_id(2)
    begin = tl.maximum(tl.load(crow_ptr + row_group), 0)
    end = tl.minimum(tl.load(crow_ptr + row_group + 1), n_vectors)

    n = tl.program_id(0) % SLICES * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    local = row_group % row_groups_per_group * VECTOR + n
    in_n = (n < VECTOR) & (local < rows_per_group)
    row = group * rows_per_group + local
    if HAS_ROWS:
        row = tl.load(row_ptr + row, mask=in_n, other=0)
        in_n &= (row >= 0) & (row < out_channels)
    grad_row = grad_output_ptr + row.to(tl.int64) * g_c
    input_ptr += (group * channels_per_group).to(tl.int64) * x_c

    # Lists are of different lengths: a program takes every so many blocks of its own.
    for block in range(begin + tl.program_id(1) * BLOCK_M, end, tl.num_programs(1) * BLOCK_M):
        j = block + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        in_j = j < end
        column = tl.load(col_ptr + j, mask=in_j, other=0)
        channel = column // TAPS
        in_m = in_j & (column >= 0) & (channel < channels_per_group)
        shift_h = column % TAPS // KERNEL_W * DILATION_H - pad_h
        shift_w = column % KERNEL_W * DILATION_W - pad_w
        shift = channel * x_c + shift_h * x_h + shift_w * x_w
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
        first = split * pixels_per_split
        for k in range(first, tl.minimum(first + pixels_per_split, pixels), BLOCK_K):
            pixel = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            in_k = pixel < pixels
            image = k // (out_h * out_w)  # of the first pixel; 32 bits reach from there
            ahead = pixel // (out_h * out_w) - image
            y, x = pixel // out_w % out_h, pixel % out_w
            y_in, x_in = y * STRIDE_H, x * STRIDE_W
            source = input_ptr + image.to(tl.int64) * x_n
            offset = (ahead * x_n + y_in * x_h + x_in * x_w)[None, :] + shift[:, None]
            inside = in_m[:, None] & in_k[None, :]
            if BORDER:
                y_in, x_in = y_in[None, :] + shift_h[:, None], x_in[None, :] + shift_w[:, None]
                inside &= (y_in >= 0) & (y_in < in_h) & (x_in >= 0) & (x_in < in_w)
            a = tl.load(source + offset, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
            of_pixel = image.to(tl.int64) * g_n + ahead * g_n + y * g_h + x * g_w
            g = tl.load(
                grad_row[None, :] + of_pixel[:, None], mask=in_k[:, None] & in_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            accumulator = tl.dot(a, g, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)
        place = (split.to(tl.int64) * n_vectors + j)[:, None] * VECTOR + n[None, :]
        inside = in_j[:, None] & (n[None, :] < VECTOR)
        tl.store(output_ptr + place, accumulator.to(output_ptr.dtype.element_ty), mask=inside)


def conv2d_weight_grad(
    input: Tensor,
    grad_output: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    vector: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: configs.Config | None = None,
    precision: str | None = None,
) -> Tensor:
    """``[n_vectors, V]`` in the input's dtype; arguments as the op's in ``csrc/ops.cpp``."""
    checks.check_floating(input, "input")
    checks.check_like(grad_output, "grad_output", input, "input")
    geometry = checks.checked_grad_geometry(grad_output, input.shape, kernel_size, stride, padding, dilation, groups)
    out_channels = grad_output.shape[1]
    checks.check_dim(col_indices, "col_indices", 1)
    checks.check_pattern(crow_indices, col_indices, row_indices, input, out_channels, groups, vector)
    n_vectors = col_indices.shape[0]
    pixels = grad_output.numel() // out_channels
    if n_vectors == 0 or pixels == 0:
        return input.new_zeros((n_vectors, vector))
    if max(input[0].numel(), grad_output[0].numel(), pixels) > checks.INT32_LIMIT:
        raise ValueError(f"Expected images of fewer than 2^31 elements, got {tuple(input.shape)}")
    row_groups = crow_indices.shape[0] - 1
    columns = input.shape[1] // groups * geometry.taps
    if config is None:
        problem = configs.Problem.of(
            "conv2d_weight_grad", input.dtype, vector, pixels, out_channels, columns, geometry.taps,
            geometry.stride[0], n_vectors, row_groups,
        )  # fmt: skip

        def run(config: configs.Config) -> Tensor:
            pattern, sizes = (crow_indices, col_indices, row_indices, vector), (kernel_size, stride, padding, dilation)
            return conv2d_weight_grad(input, grad_output, *pattern, *sizes, groups, config, precision)

        config = configs.config_for(problem, input.device, run)
    splits = min(config.split_k, cdiv(pixels, config.block_k))
    per_split = cdiv(cdiv(pixels, config.block_k), splits) * config.block_k
    double = input.dtype == torch.float64
    partial = input.new_empty((splits, n_vectors, vector), dtype=torch.float64 if double else torch.float32)
    # As many blocks of columns as a row group has on average; those of a longer one take turns.
    blocks = min(cdiv(n_vectors, row_groups * config.block_m), 65535)
    slices = cdiv(vector, config.block_n)
    input, grad_output = lanes.as_lines(geometry, input, grad_output)
    wrap_triton(_conv2d_weight_grad_kernel)[(row_groups * slices, blocks, splits)](
        input,
        grad_output,
        crow_indices,
        col_indices,
        row_indices,
        plans.heaviest_first(crow_indices),
        partial,
        n_vectors,
        pixels,
        per_split,
        input.shape[2],
        input.shape[3],
        *grad_output.shape[2:],
        input.shape[1] // groups,
        out_channels // groups,
        row_groups // groups,
        out_channels,
        *geometry.padding,
        *input.stride(),
        *grad_output.stride(),
        VECTOR=vector,
        KERNEL_H=geometry.kernel[0],
        KERNEL_W=geometry.kernel[1],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        BORDER=any(geometry.padding),
        HAS_ROWS=row_indices is not None,
        ACCUMULATOR=tl.float64 if double else tl.float32,
        PRECISION=precision or checks.precision_of(input.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (partial[0] if splits == 1 else partial.sum(0)).to(input.dtype)
