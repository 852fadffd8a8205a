// The end of the convolution on tensor cores (conv2d_tensor.cuh): scale, shift, residual, activation, and the way from
// registers to lanes or images, with no shared memory between. Rounded to 16 bits and with two of a unit's lanes in a
// word, a lane of a warp has of each position row g (= lane / 4) and lanes 2 * t + {0, 1} (t = lane % 4); slices of
// eight rows, whose sums come as lane g and rows 2 * t + {0, 1}, are transposed to that.
//
//   to lanes    the words of four positions, turned over among four lanes, are 16 bytes of one position in each
//   to images   where eight places of a tile are 16 bytes in a row, the words of eight positions are those of two
//               images; neighbours change one half each, so that both store to the same image, a whole sector
//
// To other images results go through lanes, from which from_lanes16_kernel takes them.
#pragma once
#include "conv2d_tensor_stage.cuh"
#include "fragments.cuh"

#include <utility>

namespace sparsekd::cuda {

// A slice in the order of the plan, which may come from anywhere.
__device__ __forceinline__ int slice_of(const TensorConv2dParams& p, int rank) {
  return min(max(p.plan.order[rank], 0), p.all_slices - 1);
}

// What a row of results needs: of the slice of a rank, the row in it of `slice_rows`.
__device__ __forceinline__ TensorRowEnd row_end_of(const TensorConv2dParams& p, int group, int rank, int row_in_slice,
                                                   int slice_rows) {
  TensorRowEnd end{-1, 1.0f, 0.0f, 0};
  if (rank >= p.slices_per_group) return end;
  const int local = slice_of(p, group * p.slices_per_group + rank) - group * p.slices_per_group;
  const int in_vector = local % p.slices * slice_rows + row_in_slice;
  const int row = local / p.slices * p.vector + in_vector;
  if (local < 0 || in_vector >= p.vector || row >= p.rows_per_group) return end;
  end.channel = group * p.rows_per_group + row;
  if (p.row_indices) end.channel = p.row_indices[end.channel];
  if (end.channel >= p.out_channels) end.channel = -1;
  if (end.channel >= 0 && p.scale) end.scale = load_value(p.scale, p.dtype, end.channel);
  if (end.channel >= 0 && p.shift) end.shift = load_value(p.shift, p.dtype, end.channel);
  return end;
}

template <class T, int kRows, int kGroups, int kPositions>
struct Finisher {
  static constexpr int kMatrices = kRows == 8 ? 1 : kRows / 16, kPlaces = kRows == 8 ? kPositions / 2 : kPositions;
  const TensorConv2dParams& p;
  const TensorRowEnd* ends;  // of the warp's rows
  int slices;                // that there are

  // Of each `kRun` positions, the vector of the output where the `own`-th lies; -1: none. Rows of the output are `row`
  // positions apart, `of_vector` of which are a vector.
  template <int kRun>
  __device__ __forceinline__ void find(int (&at)[kPositions / kRun], const TilePlace& tile, int place, int own, int row,
                                       int of_vector) const {
    const Divided first = divided(place + tile.shift + own, p.row_places);
    int y = tile.y + first.quotient, in_row = first.rest;
#pragma unroll
    for (int i = 0; i < kPositions / kRun; ++i) {
      const int x = tile.x + in_row;
      const bool inside = in_row < p.tile_w && y < p.strip_rows && x < p.positions[1];
      at[i] = inside ? (y * row + x) / of_vector : -1;
      for (in_row += kRun; in_row >= p.row_places.by; in_row -= p.row_places.by) ++y;
    }
  }

  __device__ __forceinline__ void add_residual(const TensorRowEnd& end, const TilePlace& tile,
                                               int at, int next_at, float (&x)[16]) const {
    const auto* from = static_cast<const uint4*>(p.residual) +
                       (tile.unit * p.out_n + max(end.channel, 0) * p.out_c) / kLanes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int vector = i == 0 ? at : next_at;
      uint32_t words[4] = {0, 0, 0, 0};
      if (vector >= 0 && end.channel >= 0) {
        const uint4 four = load_vector(from + vector);
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
      }
      turn_over(words);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t word = kRows == 8 ? transposed(words[q]) : words[q];
        x[(i * 4 + q) * 2] += float_of_bits<T>(word & 0xffff);
        x[(i * 4 + q) * 2 + 1] += float_of_bits<T>(word >> 16);
      }
    }
  }

  __device__ __forceinline__ void to_lanes(const TensorRowEnd& end, const TilePlace& tile,
                                           const int (&at)[kPositions / 4], const uint32_t (&words)[kPositions]) const {
    auto* to = static_cast<uint4*>(p.output) + (tile.unit * p.out_n + max(end.channel, 0) * p.out_c) / kLanes;
#pragma unroll
    for (int i = 0; i < kPositions / 4; ++i) {
      uint32_t four[4] = {words[i * 4], words[i * 4 + 1], words[i * 4 + 2], words[i * 4 + 3]};
      turn_over(four);
      store_vector(to + at[i], uint4{four[0], four[1], four[2], four[3]}, at[i] >= 0 && end.channel >= 0);
    }
  }

  // Of eight positions, an image's 16-bit values: the lower or upper halves of words.
  __device__ __forceinline__ static uint4 vector_of(const uint32_t* words, int half) {
    uint32_t both[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t low = words[2 * q], high = words[2 * q + 1];
      both[q] = half ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
    }
    return {both[0], both[1], both[2], both[3]};
  }

  __device__ __forceinline__ void to_images(const TensorRowEnd& end, const TilePlace& tile,
                                            const int (&at)[kPositions / 8],
                                            const uint32_t (&words)[kPositions]) const {
    const bool odd = threadIdx.x & 1;
    const int own = threadIdx.x % 4 * 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t image = tile.unit * kLanes + e + (kPositions >= 16 ? own & ~2 : own);
      auto* to = static_cast<uint4*>(p.output) + (image * p.out_n + max(end.channel, 0) * p.out_c) / kLanes;
      const bool there = end.channel >= 0 && image < p.batch;
      if constexpr (kPositions < 16) {
        store_vector(to + at[0], vector_of(words, e), there && at[0] >= 0);
      } else {
        const bool next_there = end.channel >= 0 && image + 2 < p.batch;
#pragma unroll
        for (int i = 0; i < kPositions / 8; i += 2) {
          const uint4 low = vector_of(words + i * 8, e), high = vector_of(words + i * 8 + 8, e);
          const uint4 give = odd ? low : high;
          const uint4 got{__shfl_xor_sync(0xffffffffu, give.x, 1), __shfl_xor_sync(0xffffffffu, give.y, 1),
                          __shfl_xor_sync(0xffffffffu, give.z, 1), __shfl_xor_sync(0xffffffffu, give.w, 1)};
          const int own_at = odd ? at[i + 1] : at[i];
          store_vector(to + own_at, odd ? got : low, there && own_at >= 0);
          store_vector(to + own_at + 2 * p.out_n / kLanes, odd ? high : got, next_there && own_at >= 0);
        }
      }
    }
  }

  __device__ __forceinline__ void run(const TilePlace& tile, int place,
                                      const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (k >= slices) continue;
#pragma unroll
      for (int half = 0; half < kRows / 8; ++half) {
        const TensorRowEnd end = load_vector(ends + k * kRows + half * 8 + g);
        float scale[2] = {end.scale, end.scale}, shift[2] = {end.shift, end.shift};
        if constexpr (kRows == 8) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {  // rows 2 * t + e
            scale[e] = __shfl_sync(0xffffffffu, end.scale, 8 * t + 4 * e);
            shift[e] = __shfl_sync(0xffffffffu, end.shift, 8 * t + 4 * e);
          }
        }
        // Found for each row anew, for want of registers.
        int in_lanes[kPositions / 4];
        if (p.to_lanes) find<4>(in_lanes, tile, place, t, static_cast<int>(p.out_h / kLanes), 1);
        uint32_t words[kPositions];
#pragma unroll
        for (int first = 0; first < kPositions; first += 8) {  // few at a time, for want of registers
          float x[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int at = first * 2 + i;
            const float* four = kRows == 8 ? sums[k][0][at / 4] : sums[k][half / 2][at / 2];
            x[i] = four[kRows == 8 ? i % 4 : half % 2 * 2 + i % 2] * scale[i % 2] + shift[i % 2];
          }
          if (p.residual) add_residual(end, tile, in_lanes[first / 4], in_lanes[first / 4 + 1], x);
          activate_all(x, p.activation);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            words[first + i] = word_of<T>(x[2 * i], x[2 * i + 1]);
            if constexpr (kRows == 8) words[first + i] = transposed(words[first + i]);
          }
        }
        if (p.to_lanes) {
          to_lanes(end, tile, in_lanes, words);
        } else {
          int in_images[kPositions / 8];
          find<8>(in_images, tile, place, 0, p.positions[1], 8);
          to_images(end, tile, in_images, words);
        }
      }
    }
  }
};

}  // namespace sparsekd::cuda
