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

// All of them by one look at which it is, for results that become 16-bit values: silu by instructions that are short.
template <int kCount>
__device__ __forceinline__ void activate_all(float (&x)[kCount], Activation activation) {
  auto each = [&x](auto constant) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = activate(x[e], decltype(constant)::value);
  };
  switch (activation) {
    case Activation::relu: return each(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6: return each(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu: {
      constexpr float kLog2E = 1.4426950408889634f;
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] = fast_divide(x[e], 1.0f + fast_exp2(-kLog2E * x[e]));
      return;
    }
    case Activation::hardswish: return each(std::integral_constant<Activation, Activation::hardswish>{});
    default: return;
  }
}

// What a row of results needs: lane r of a warp knows it of row r.
struct RowEnd {
  int channel = -1;  // of the output, or none
  float scale = 1.0f, shift = 0.0f;

  __device__ __forceinline__ RowEnd(const Conv2dParams& p, int slice, int group, int row_in_slice, int slice_rows) {
    if (slice < 0) return;
    const int local = slice - group * p.slices_per_group;  // within the group of the convolution
    const int in_vector = (p.interleaved ? 0 : local % p.slices * slice_rows) + row_in_slice;
    const int row = local / p.slices * p.vector + in_vector;
    if (in_vector >= p.vector || row >= p.rows_per_group) return;
    channel = group * p.rows_per_group + row;
    if (p.row_indices) channel = p.row_indices[channel];
    if (channel >= p.out_channels) channel = -1;
    if (channel >= 0 && p.scale) scale = load_value(p.scale, p.dtype, channel);
    if (channel >= 0 && p.shift) shift = load_value(p.shift, p.dtype, channel);
  }
};

// Stores one result after another. What most calls ask for, fp32 and an activation that cuts, is looked up once.
struct ResultStore {
  const Conv2dParams& p;
  bool plain;
  float least, most;

  __device__ __forceinline__ explicit ResultStore(const Conv2dParams& params) : p(params) {
    plain = p.dtype == DType::float32 && (p.activation == Activation::none || p.activation == Activation::relu ||
                                          p.activation == Activation::relu6);
    least = p.activation == Activation::none ? -INFINITY : 0.0f;
    most = p.activation == Activation::relu6 ? 6.0f : INFINITY;
  }
  __device__ __forceinline__ void operator()(int64_t at, float result, bool there = true) const {
    if (!plain) {
      if (p.residual && there) result += load_value(p.residual, p.dtype, at);
      store_value(p.output, p.dtype, at, activate(result, p.activation), there);
      return;
    }
    if (p.residual && there) result += static_cast<const float*>(p.residual)[at];
    store_vector(static_cast<float*>(p.output) + at, cut(result), there);
  }
  __device__ __forceinline__ float cut(float result) const { return not_above(not_below(result, least), most); }
};

// Results of one row of flat planes, four neighbours a vector.
__device__ __forceinline__ void store_flat(const ResultStore& store, const Conv2dParams& p, int64_t at, float4 result) {
  if (p.residual) {
    const float4 more = load_vector(reinterpret_cast<const float4*>(static_cast<const float*>(p.residual) + at));
    result.x += more.x;
    result.y += more.y;
    result.z += more.z;
    result.w += more.w;
  }
  result = {store.cut(result.x), store.cut(result.y), store.cut(result.z), store.cut(result.w)};
  store_vector(reinterpret_cast<float4*>(static_cast<float*>(p.output) + at), result);
}

// The images and strips that lie in a unit's lanes, one after another.
struct Slot {
  int image, strip;

  __device__ __forceinline__ Slot(const Conv2dParams& p, int64_t first)
      : image(static_cast<int>(first) / p.lanes.strips), strip(static_cast<int>(first) - image * p.lanes.strips) {}
  __device__ __forceinline__ void next(const Conv2dParams& p) {
    if (++strip == p.lanes.strips) {
      strip = 0;
      ++image;
    }
  }
};

// Of one row of results, those of one position of a lane in all images or strips, from its registers: four of each
// lane group, which has kRun times as many. What a warp stores at once may begin anywhere in a sector: that costs less than
// a way through shared memory.
template <int kLanes, int kRun>
__device__ __forceinline__ void store_position(const ResultStore& store, const Conv2dParams& p, const float* sums,
                                               int channel, float scale, float shift, int64_t unit, int row_in_strip,
                                               int column, bool in_plane) {
  Slot slot(p, unit * kLanes);
  const int64_t first_row = int64_t(slot.strip * p.lanes.strip_rows + row_in_strip) * p.axes[0].out_step;
  int64_t at = slot.image * p.out_n + channel * p.out_c + (first_row + p.axes[0].out_begin) * p.out_h +
               (int64_t(column) * p.axes[1].out_step + p.axes[1].out_begin) * p.out_w;
  const int64_t to_strip = int64_t(p.lanes.strip_rows) * p.axes[0].out_step * p.out_h;
  const int64_t to_image = p.out_n - (p.lanes.strips - 1) * to_strip;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const bool inside = in_plane && slot.image < p.lanes.batch &&
                        slot.strip * p.lanes.strip_rows + row_in_strip < p.axes[0].positions;
    float result = sums[i / 4 * kRun * 4 + i % 4] * scale + shift;
    if (p.residual && inside) result += static_cast<const float*>(p.residual)[at];
    store_vector(static_cast<float*>(p.output) + at, store.cut(result), inside);
    at += slot.strip + 1 == p.lanes.strips ? to_image : to_strip;
    slot.next(p);
  }
}

// Results [kRows][kLanes][32], where a lane of the warp takes those of its own position in the strip.
template <int kRows, int kLanes>
__device__ __forceinline__ void store_rectangle(const Conv2dParams& p, const float* results, const RowEnd& row_end,
                                                int64_t unit, int row_in_strip, int column) {
  results += threadIdx.x % 32;
  const bool in_plane = row_in_strip < p.lanes.strip_rows && column < p.axes[1].positions;
  const int64_t at_x = (int64_t(column) * p.axes[1].out_step + p.axes[1].out_begin) * p.out_w;
  const ResultStore store(p);
  Slot slot(p, unit * kLanes);
#pragma unroll 1
  for (int i = 0; i < kLanes; ++i, slot.next(p)) {
    const int row = slot.strip * p.lanes.strip_rows + row_in_strip;
    const bool inside = in_plane && slot.image < p.lanes.batch && row < p.axes[0].positions;
    const int64_t at =
        slot.image * p.out_n + (int64_t(row) * p.axes[0].out_step + p.axes[0].out_begin) * p.out_h + at_x;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const int channel = __shfl_sync(0xffffffffu, row_end.channel, r);
      const float scale = __shfl_sync(0xffffffffu, row_end.scale, r);
      const float shift = __shfl_sync(0xffffffffu, row_end.shift, r);
      if (!inside || channel < 0) continue;
      store(at + channel * p.out_c, results[(r * kLanes + i) * 32] * scale + shift);
    }
  }
}

// What a tile of whole rows, or a run, has of results, counted from its strip's first one: those between its rows are
// left out.
struct Span {
  int begin, count;
};
__device__ __forceinline__ int outputs_before(const Conv2dParams& p, int place) {
  const int width = p.axes[1].positions;
  return place / p.tile_columns * width + min(place % p.tile_columns, width);
}
__device__ __forceinline__ Span span_of_run(const Conv2dParams& p, int first) {
  const int begin = outputs_before(p, first), end = outputs_before(p, first + p.step);
  return {begin, min(end, p.lanes.strip_rows * p.axes[1].positions) - begin};
}
__device__ __forceinline__ Span span_of_rows(const Conv2dParams& p, int first_row, int rows) {
  const int of_row = p.interleaved ? 2 * p.out_size[1] : p.out_size[1];
  return {first_row * of_row, min(rows, p.lanes.strip_rows - first_row) * of_row};
}

// Strips that a tile takes whole lie one behind the other in the output. This many floats from one to the next then.
__device__ __forceinline__ int strip_results(const Conv2dParams& p) {
  const bool merged = p.joined && p.lanes.strips > 1 && p.tiles_h * p.tiles_w == 1;
  return merged ? p.lanes.strip_rows * p.out_size[1] * (p.interleaved ? 2 : 1) : 0;
}

struct Pieces {
  int64_t begin;  // of the first, from a strip's first result
  int count, size, pitch;
};

// Where a row of the interleaved results of a rectangle lies: the two of a row of positions change places where another
// one, written at once with it, would meet the same banks.
__device__ __forceinline__ int interleaved_row(int row, int pitch) { return row ^ (row / 2 * pitch / 16 & 1); }

// Results [rows][kLanes][..] of `lane_pitch` and as many as `row_pitch` floats: of each lane `pieces` of them, each of
// which lies in one piece in the output, too. What the warp stores at once begins where a sector of 32 bytes does.
template <int kLanes, class Pieces>
__device__ __forceinline__ void store_pieces(const Conv2dParams& p, const float* results, int rows, int row_pitch,
                                             int lane_pitch, const RowEnd& row_end, int64_t unit, Pieces pieces_of) {
  const int lane = threadIdx.x % 32, sector = p.dtype == DType::float32 ? 8 : 16;
  const int strip_rows = p.interleaved ? 2 * p.lanes.strip_rows : p.lanes.strip_rows;
  const bool merged = strip_results(p) > 0;
  const ResultStore store(p);
  Slot slot(p, unit * kLanes);
#pragma unroll 1
  for (int i = 0; i < kLanes; ++i, slot.next(p)) {
    const int64_t image = slot.image;
    const int strip = slot.strip;
    if (image >= p.lanes.batch || (merged && strip > 0 && i > 0)) continue;  // stored with the one before
    const int together = merged ? min(p.lanes.strips - strip, kLanes - i) : 1;
    const int left = p.out_size[0] - strip * strip_rows;
    const auto pieces = pieces_of(min(left, together * strip_rows), together > 1);
    const int64_t first = image * p.out_n + strip * strip_rows * p.out_h + pieces.begin;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const int channel = __shfl_sync(0xffffffffu, row_end.channel, r);
      const float scale = __shfl_sync(0xffffffffu, row_end.scale, r);
      const float shift = __shfl_sync(0xffffffffu, row_end.shift, r);
      if (channel < 0 || pieces.size <= 0) continue;
      int64_t at = first + channel * p.out_c;
      const float* from = results + r * row_pitch + i * lane_pitch;
#pragma unroll 1
      for (int piece = 0; piece < pieces.count; ++piece, at += p.out_h) {
        const float* of_piece = from + interleaved_row(piece, pieces.pitch) * pieces.pitch;
        for (int begin = -static_cast<int>(at & (sector - 1)); begin < pieces.size; begin += 32) {
          const int place = begin + lane, near = min(max(place, 0), pieces.size - 1);
          store(at + place, of_piece[near] * scale + shift, place == near);
        }
      }
    }
  }
}


// A span, or as many of them as there are strips together.
template <int kLanes>
__device__ __forceinline__ void store_span(const Conv2dParams& p, const float* results, int rows, int row_pitch,
                                           int lane_pitch, const RowEnd& row_end, int64_t unit, const Span& span) {
  store_pieces<kLanes>(p, results, rows, row_pitch, lane_pitch, row_end, unit, [&](int rows_there, bool together) {
    const int there = rows_there * p.out_size[1] - span.begin;
    return Pieces{span.begin, 1, together ? there : min(there, span.count), 0};
  });
}

// The interleaved results of a rectangle, [2 * tile_h][2 * tile_w], row by row.
template <int kLanes>
__device__ __forceinline__ void store_interleaved(const Conv2dParams& p, const float* results, int lane_pitch,
                                                  const RowEnd& row_end, int64_t unit, int y0, int x0) {
  store_pieces<kLanes>(p, results, 1, 0, lane_pitch, row_end, unit, [&](int rows_there, bool) {
    return Pieces{2 * y0 * p.out_h + 2 * x0, min(2 * p.tile_h, rows_there - 2 * y0),
                  min(2 * p.tile_w, p.out_size[1] - 2 * x0), 2 * p.tile_w};
  });
}

}  // namespace sparsekd::cuda
