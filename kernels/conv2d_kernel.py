"""Device code of the V x 1 sparse convolution and of its input gradient; see ``conv2d.py`` for what it computes."""

import triton
import triton.language as tl


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
    BORDER: tl.constexpr,
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
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H  # from a position to the next, in the input
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    SLICES: tl.constexpr = 1 if TRANSPOSED else (VECTOR + BLOCK_N - 1) // BLOCK_N
    columns = row_groups * SLICES * PHASES
    rounds = 1  # a constant, which leaves no loop behind
    if PERSISTENT:
        tiles = (pixels + BLOCK_M - 1) // BLOCK_M * SPLIT_K * columns
        rounds = (tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    for round in range(0, rounds):
        tile = tl.program_id(0) + round * tl.num_programs(0)
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
        of_tile = input_ptr + (first.to(tl.int64) * x_n + (group * channels_per_group).to(tl.int64) * x_c) * LANES
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
            # Division rounds towards zero: a negative column may look like one of channel 0.
            in_k &= (column >= 0) & (channel >= 0) & (channel < channels_per_group)
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
                in_x = in_k[None, :] & in_m[:, None]
                if BORDER:
                    y, x = y_in[:, None] + shift_h[None, :], x_in[:, None] + shift_w[None, :]
                    in_x &= (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
                offset = in_base[:, None] + (channel * x_c + shift_h * x_h + shift_w * x_w)[None, :]
            a = tl.load(of_tile + offset, mask=in_x, other=0.0)  # [BLOCK_M, BLOCK_K]
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
            accumulator = tl.dot(a, w, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)

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
        first_image = first * LANES // strips if LANES > 1 else first
        offset = (image - first_image) * y_n + y_out * y_h + x_out * y_w
        offset = offset[:, None] + row[None, :] * y_c
        to_tile = first_image.to(tl.int64) * y_n
        in_y = in_output[:, None] & in_n[None, :]
        if SPLIT_K > 1:
            to_tile += split.to(tl.int64) * y_split
            tl.store(output_ptr + to_tile + offset, accumulator, mask=in_y)
        else:
            if HAS_SCALE:
                accumulator *= tl.load(scale_ptr + row, mask=in_n, other=0.0).to(ACCUMULATOR)[None, :]
            if HAS_SHIFT:
                accumulator += tl.load(shift_ptr + row, mask=in_n, other=0.0).to(ACCUMULATOR)[None, :]
            if HAS_RESIDUAL:
                accumulator += tl.load(residual_ptr + to_tile + offset, mask=in_y, other=0.0).to(ACCUMULATOR)
            accumulator = _activate(accumulator, ACTIVATION)
            tl.store(output_ptr + to_tile + offset, accumulator.to(output_ptr.dtype.element_ty), mask=in_y)


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
