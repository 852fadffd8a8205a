// The end of the convolution on tensor cores (conv2d_tensor.cuh): scale, shift, residual, activation, and the way to
// images or lanes.
#pragma once
#include "conv2d_tensor_stage.cuh"

#include <utility>

namespace sparsekd::cuda {

// A slice in the order of the plan, which may come from anywhere.
__device__ __forceinline__ int slice_of(const TensorConv2dParams& p, int rank) {
  return min(max(p.plan.order[rank], 0), p.all_slices - 1);
}

// What a row of results needs.
struct TensorRowEnd {
  int channel = -1;  // of the output, or none
  float scale = 1.0f, shift = 0.0f;

  // The slice of a rank, the row in it of `slice_rows`.
  __device__ __forceinline__ TensorRowEnd(const TensorConv2dParams& p, int group, int rank, int row_in_slice,
                                          int slice_rows) {
    if (rank >= p.slices_per_group) return;
    const int local = slice_of(p, group * p.slices_per_group + rank) - group * p.slices_per_group;
    const int in_vector = local % p.slices * slice_rows + row_in_slice;
    const int row = local / p.slices * p.vector + in_vector;
    if (local < 0 || in_vector >= p.vector || row >= p.rows_per_group) return;
    channel = group * p.rows_per_group + row;
    if (p.row_indices) channel = p.row_indices[channel];
    if (channel >= p.out_channels) channel = -1;
    if (channel >= 0 && p.scale) scale = load_value(p.scale, p.dtype, channel);
    if (channel >= 0 && p.shift) shift = load_value(p.shift, p.dtype, channel);
  }
};

// Eight rows of some positions at a time go through shared memory, each warp's to itself, from where a lane takes the 8
// lanes of a row and position. The pitch of rows is such that what is written lies in different banks.
template <class T, int kRows, int kGroups, int kPositions>
struct Finisher {
  static constexpr int kMatrices = kRows == 8 ? 1 : kRows / 16, kPlaces = kRows == 8 ? kPositions / 2 : kPositions;
  static constexpr int kTogether = kPositions < kResultPositions ? kPositions : kResultPositions;
  static constexpr int kPitch = kTogether * 8 + (kRows == 8 ? 4 : 8), kAtOnce = 32 / kTogether;
  static constexpr int kVectors = kPitch * 2;  // of `results`, 16 bytes each
  static_assert(kVectors * 16 <= result_bytes(kPositions));
  const TensorConv2dParams& p;
  float* results;  // [8 rows][kTogether][8 lanes], of the warp
  int first_rank, group;
  int64_t at[kLanes];  // -1: none

  // From position `place` of the tile on.
  __device__ __forceinline__ void turn_to(const TilePlace& tile, int place) {
    place += tile.shift + threadIdx.x % kTogether;
    const int column_in_tile = place % p.row_places;
    const int row_in_strip = tile.y + place / p.row_places, column = tile.x + column_in_tile;
    const bool in_tile = column_in_tile < p.tile_w;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int64_t slot = tile.unit * kLanes + i, image = p.to_lanes ? tile.unit : slot / p.strips;
      const int64_t row = p.to_lanes ? row_in_strip : (slot - image * p.strips) * p.strip_rows + row_in_strip;
      const bool inside = in_tile && row_in_strip < p.strip_rows && column < p.positions[1] && row < p.positions[0];
      at[i] = inside && (p.to_lanes || image < p.batch) ? image * p.out_n + row * p.out_h + column * p.out_w : -1;
    }
  }

  // Rows `first_row` ... + 7 of a slice.
  __device__ __forceinline__ void store(int k, int first_row) const {
    const int lane = threadIdx.x % 32;
    const int own = lane % kTogether, upper = own / 4 % 2;  // which half is read first, for the banks' sake
    const TensorRowEnd end(p, group, first_rank + k, first_row + lane % 8, kRows);  // of row lane % 8
    __syncwarp();  // results
#pragma unroll 1
    for (int i = 0; i < 8; i += kAtOnce) {
      const int r = i + lane / kTogether;
      const int channel = __shfl_sync(0xffffffffu, end.channel, r);
      const float scale = __shfl_sync(0xffffffffu, end.scale, r), shift = __shfl_sync(0xffffffffu, end.shift, r);
      if (channel < 0) continue;
      const auto* from = reinterpret_cast<const float4*>(results + r * kPitch + own * 8);
      const float4 first = load_vector(from + upper), second = load_vector(from + 1 - upper);
      const float4 low = upper ? second : first, high = upper ? first : second;
      float result[kLanes] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < kLanes; ++j) result[j] = result[j] * scale + shift;
      const int64_t of_channel = channel * p.out_c;
      if (p.to_lanes) {
        if (at[0] < 0) continue;
        if (p.residual) {
          const uint4 bits = load_vector(reinterpret_cast<const uint4*>(
              static_cast<const uint16_t*>(p.residual) + at[0] + of_channel));
          const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
          for (int j = 0; j < kLanes; ++j) result[j] += float_of_bits<T>(words[j / 2] >> 16 * (j % 2) & 0xffff);
        }
        uint32_t words[kLanes / 2];
#pragma unroll
        for (int j = 0; j < kLanes; j += 2) {
          words[j / 2] = bits_of<T>(activate(result[j], p.activation)) |
                         bits_of<T>(activate(result[j + 1], p.activation)) << 16;
        }
        store_vector(reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.output) + at[0] + of_channel),
                     uint4{words[0], words[1], words[2], words[3]});
        continue;
      }
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (at[j] < 0) continue;
        if (p.residual) result[j] += to_float(static_cast<const T*>(p.residual)[at[j] + of_channel]);
        store_vector(static_cast<T*>(p.output) + at[j] + of_channel, from_float<T>(activate(result[j], p.activation)));
      }
    }
    __syncwarp();  // before the next results
  }

  // Eight rows of slice k, of kTogether positions from `kFirst` on.
  template <int kStep>
  __device__ __forceinline__ void write(const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    constexpr int kEights = kRows / 8, kEight = kStep % kEights, k = kStep / kEights % kGroups;
    constexpr int kFirst = kStep / kEights / kGroups * kTogether;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (kRows == 8) {  // rows 2 * t + {0, 1}, lane g, of two positions
#pragma unroll
      for (int i = 0; i < kTogether / 2; ++i) {
        const float* four = sums[k][0][kFirst / 2 + i];
#pragma unroll
        for (int e = 0; e < 4; ++e) results[(2 * t + e % 2) * kPitch + (2 * i + e / 2) * 8 + g] = four[e];
      }
    } else {  // rows g and g + 8, lanes 2 * t + {0, 1}
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float* two = &sums[k][kEight / 2][kFirst + i][kEight % 2 * 2];
        store_vector(reinterpret_cast<float2*>(results + g * kPitch + i * 8 + 2 * t), float2{two[0], two[1]});
      }
    }
  }

  template <int... kStep>
  __device__ __forceinline__ void write_step(std::integer_sequence<int, kStep...>, int step,
                                             const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    ((step == kStep ? write<kStep>(sums) : void()), ...);
  }

  __device__ __forceinline__ void run(const TilePlace& tile, int place,
                                      const float (&sums)[kGroups][kMatrices][kPlaces][4]) {
    constexpr int kOfPlaces = kGroups * (kRows / 8), kSteps = kOfPlaces * (kPositions / kTogether);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {  // one copy of what stores, for the sake of the code's size
      if (step % kOfPlaces == 0) turn_to(tile, place + step / kOfPlaces * kTogether);
      write_step(std::make_integer_sequence<int, kSteps>{}, step, sums);
      store(step / (kRows / 8) % kGroups, step % (kRows / 8) * 8);
    }
  }
};

}  // namespace sparsekd::cuda
