// The end of the convolution on CUDA cores (conv2d.cuh): scale, shift, residual, activation, and the way to images.
#pragma once
#include "conv2d.h"
#include "element.cuh"

namespace sparsekd::cuda {

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x > 0.0f || x != x ? x : 0.0f;
    case Activation::relu6: return x != x ? x : fminf(fmaxf(x, 0.0f), 6.0f);
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::hardswish: return x != x ? x : x * fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    default: return x;
  }
}

// What a row of results needs: lane r of a warp knows it of row r.
struct RowEnd {
  int channel = -1;  // of the output, or none
  float scale = 1.0f, shift = 0.0f;

  __device__ __forceinline__ RowEnd(const Conv2dParams& p, int slice, int group, int row_in_slice, int slice_rows) {
    if (slice < 0) return;
    const int local = slice - group * p.slices_per_group;  // within the group of the convolution
    const int in_vector = local % p.slices * slice_rows + row_in_slice;
    const int row = local / p.slices * p.vector + in_vector;
    if (in_vector >= p.vector || row >= p.rows_per_group) return;
    channel = group * p.rows_per_group + row;
    if (p.row_indices) channel = p.row_indices[channel];
    if (channel >= p.out_channels) channel = -1;
    if (channel >= 0 && p.scale) scale = load_value(p.scale, p.dtype, channel);
    if (channel >= 0 && p.shift) shift = load_value(p.shift, p.dtype, channel);
  }
};

__device__ __forceinline__ void store_result(const Conv2dParams& p, int64_t at, float result,
                                             bool there = true) {
  if (p.residual && there) result += load_value(p.residual, p.dtype, at);
  store_value(p.output, p.dtype, at, activate(result, p.activation), there);
}

// Results [kRows][kLanes][32], where a lane of the warp takes those of its own position in the strip.
template <int kRows, int kLanes>
__device__ __forceinline__ void store_rectangle(const Conv2dParams& p, const float* results, const RowEnd& row_end,
                                                int64_t unit, int row_in_strip, int column) {
  results += threadIdx.x % 32;
  const bool in_plane = row_in_strip < p.lanes.strip_rows && column < p.axes[1].positions;
  const int64_t at_x = (int64_t(column) * p.axes[1].out_step + p.axes[1].out_begin) * p.out_w;
#pragma unroll 1
  for (int i = 0; i < kLanes; ++i) {
    const int64_t slot = unit * kLanes + i;
    const int64_t image = slot / p.lanes.strips;
    const int64_t row = (slot - image * p.lanes.strips) * p.lanes.strip_rows + row_in_strip;
    const bool inside = in_plane && image < p.lanes.batch && row < p.axes[0].positions;
    const int64_t at = image * p.out_n + (row * p.axes[0].out_step + p.axes[0].out_begin) * p.out_h + at_x;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const int channel = __shfl_sync(0xffffffffu, row_end.channel, r);
      const float scale = __shfl_sync(0xffffffffu, row_end.scale, r);
      const float shift = __shfl_sync(0xffffffffu, row_end.shift, r);
      if (!inside || channel < 0) continue;
      store_result(p, at + channel * p.out_c, results[(r * kLanes + i) * 32] * scale + shift);
    }
  }
}

// The outputs of a run, counted from its strip's first: those between its rows are left out.
struct Run {
  int begin = 0, count = 0;
};
__device__ __forceinline__ int outputs_before(const Conv2dParams& p, int place) {
  const int width = p.axes[1].positions;
  return place / p.tile_columns * width + min(place % p.tile_columns, width);
}
__device__ __forceinline__ Run run_from(const Conv2dParams& p, int first) {
  const int begin = outputs_before(p, first), end = outputs_before(p, first + p.step);
  return {begin, min(end, p.lanes.strip_rows * p.axes[1].positions) - begin};
}
// Which output of a run a position of the plane is, or -1.
__device__ __forceinline__ int place_in_run(const Conv2dParams& p, const Run& run, int position) {
  const int row = position / p.tile_columns, column = position % p.tile_columns;
  const int place = row * p.axes[1].positions + column - run.begin;
  return column < p.axes[1].positions && place < run.count ? place : -1;
}

// Results [kRows][kLanes][kPositions], a run in each, which lies in one piece in the output, too. What the warp stores at
// once begins where a sector of 32 bytes does.
template <int kRows, int kLanes, int kPositions>
__device__ __forceinline__ void store_run(const Conv2dParams& p, const float* results, const RowEnd& row_end,
                                          int64_t unit, const Run& run) {
  const int lane = threadIdx.x % 32, sector = p.dtype == DType::float32 ? 8 : 16, width = p.axes[1].positions;
#pragma unroll 1
  for (int i = 0; i < kLanes; ++i) {
    const int64_t slot = unit * kLanes + i;
    const int64_t image = slot / p.lanes.strips, first_row = (slot - image * p.lanes.strips) * p.lanes.strip_rows;
    const int64_t rows = image < p.lanes.batch ? min(p.axes[0].positions - first_row, int64_t(p.lanes.strip_rows)) : 0;
    const int count = static_cast<int>(min(rows * width - run.begin, int64_t(run.count)));
    const int64_t first = image * p.out_n + first_row * width + run.begin;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const int channel = __shfl_sync(0xffffffffu, row_end.channel, r);
      const float scale = __shfl_sync(0xffffffffu, row_end.scale, r);
      const float shift = __shfl_sync(0xffffffffu, row_end.shift, r);
      if (channel < 0 || count <= 0) continue;
      const int64_t at = first + channel * p.out_c;
      for (int begin = -static_cast<int>(at % sector); begin < count; begin += 32) {
        const int place = begin + lane, near = min(max(place, 0), count - 1);
        const float result = results[(r * kLanes + i) * kPositions + near] * scale + shift;
        store_result(p, at + place, result, place == near);
      }
    }
  }
}

}  // namespace sparsekd::cuda
