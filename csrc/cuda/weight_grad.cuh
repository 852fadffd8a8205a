// The weight gradient at the non-zeros (a sampled product of two dense matrices, SDDMM).
//
//   grad_values[i] = sum over images and positions of  grad_output[n, k, y, x] * input[n, c, y * stride + r * dilation,
//   ..]
//
// The same tiles, staged by the same copies, as the convolution's (conv2d.cuh). A lane of a warp keeps the gradient of
// its rows at its own position in registers for all channels; a non-zero is one distance within the staged input, and
//
//   per non-zero vector of a warp: kG 16-byte reads of shared memory feed kV * kG * 4 multiply-adds in each lane
//
// whose results are then added up over the lanes, eight at a time: each step of the butterfly halves how many values a
// lane has, so that eight take nine shuffles, not forty. No atomics: a block adds up its share of the tiles one after
// another, and a second kernel adds up the blocks, so that the result is the same in every run and on every GPU.
#pragma once
#include "conv2d.cuh"
#include "weight_grad.h"

namespace sparsekd::cuda {

// values[0] becomes the sum over all lanes of value `summed_index<kValues>(lane)`.
template <int kValues>
__device__ __forceinline__ void sum_over_lanes(float (&values)[kValues], int lane) {
  constexpr unsigned kAll = 0xffffffffu;
  int distance = 1;
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2, distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float kept = upper ? values[j + half] : values[j], given = upper ? values[j] : values[j + half];
      values[j] = kept + __shfl_xor_sync(kAll, given, distance);
    }
  }
#pragma unroll
  for (; distance < 32; distance *= 2) values[0] += __shfl_xor_sync(kAll, values[0], distance);
}
template <int kValues>
__device__ __forceinline__ int summed_index(int lane) {
  int index = 0;
#pragma unroll
  for (int half = kValues / 2, bit = 0; half > 0; half /= 2, ++bit) index += (lane >> bit & 1) * half;
  return index;
}

// Of a vector of a staged plane: its row (in the upper half) and column, counted from the tile's first, and how far
// from that it lies in the plane in global memory.
__device__ __forceinline__ int2 place_in_tile(const WeightGradParams& p, int position) {
  const int column = position % p.tile_columns;
  int rest = position / p.tile_columns;
  const int phase_x = rest % p.lanes.phases[1];
  rest /= p.lanes.phases[1];
  const int row = rest % p.tile_rows, phase_y = rest / p.tile_rows;
  return {row << 16 | column,
          ((phase_y * p.lanes.rows + row) * p.lanes.phases[1] + phase_x) * p.lanes.columns + column};
}

template <int kV, int kG, int kGroups, int kPlane>
__global__ __launch_bounds__(32 * kConv2dWarps, 2) void weight_grad_kernel(const WeightGradParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int plane = kPlane ? kPlane : p.plane;  // in shared memory
  const int tiles_of_unit = p.tiles_h * p.tiles_w;
  const int split = blockIdx.x;
  const int group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  // The lane's own position in a staged plane.
  const int own = lane / p.tile_w * p.lanes.phases[1] * p.tile_columns + lane % p.tile_w;
  const int first_tile = static_cast<int>(int64_t(p.tiles) * split / p.splits);
  const int end_tile = static_cast<int>(int64_t(p.tiles) * (split + 1) / p.splits);

  constexpr bool kWhole = kV <= 2;  // there the kernel's V is the pattern's, a row group one slice
  const int vector = kWhole ? kV : p.vector;
  const int first_rank = (row_block * warps + warp) * kGroups;
  auto row_group_of = [&](int k) {
    const int rank = first_rank + k, local = kWhole ? rank : rank / p.slices;
    return local < p.row_groups_per_group ? p.order[group * p.row_groups_per_group + local] : -1;
  };
  auto part_of = [&](int k) { return kWhole ? 0 : (first_rank + k) % p.slices; };
  // Of several no registers are left to keep them.
  const int only = kGroups == 1 ? row_group_of(0) : -1;
  auto row_group = [&](int k) { return kGroups == 1 ? only : row_group_of(k); };

  float4* buffers = shared_memory<float4>();  // [2][block_channels][kG][plane]
  const int buffer_size = p.block_channels * kG * plane;
  const int64_t planes = int64_t(p.lanes.channels) * kG;
  // Of each vector of a staged plane, and of each lane within the tile; in registers it would leave too few for the
  // loop.
  int2* const places = reinterpret_cast<int2*>(buffers + 2 * buffer_size);  // [plane] {row and column, distance}
  int* const own_places = reinterpret_cast<int*>(places + p.plane);         // [32] row and column
  if (warp == 0) own_places[lane] = lane / p.tile_w << 16 | lane % p.tile_w;
  for (int i = threadIdx.x; i < p.plane; i += blockDim.x) store_vector(places + i, place_in_tile(p, i));
  __syncthreads();  // places
  float grad[kGroups][kV][kG * 4];
  auto load_grad = [&](int tile) {
    const int unit = tile / tiles_of_unit, in_unit = tile % tiles_of_unit;
    const int place = own_places[lane];
    const int row = in_unit / p.tiles_w * p.tile_h + (place >> 16);
    const int column = in_unit % p.tiles_w * p.tile_w + (place & 0xffff);
    const bool inside = row < p.lanes.strip_rows && column < p.axes[1].positions;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int mine = row_group(k);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const int in_vector = part_of(k) * kV + v;
        const int in_group = (mine - group * p.row_groups_per_group) * vector + in_vector;
        int channel = -1;
        if (mine >= 0 && in_vector < vector && in_group < p.rows_per_group) {
          channel = group * p.rows_per_group + in_group;
          if (p.row_indices) channel = p.row_indices[channel];
        }
        const bool real = inside && channel >= 0 && channel < p.out_channels;
        const float4* from = reinterpret_cast<const float4*>(p.grad) +
                             (int64_t(unit) * p.out_channels + channel) * kG * p.grad_plane + row * p.grad_columns +
                             column;
#pragma unroll
        for (int g = 0; g < kG; ++g) {
          const float4 four = real ? load_vector(from + int64_t(g) * p.grad_plane) : float4{0.0f, 0.0f, 0.0f, 0.0f};
          grad[k][v][g * 4] = four.x;
          grad[k][v][g * 4 + 1] = four.y;
          grad[k][v][g * 4 + 2] = four.z;
          grad[k][v][g * 4 + 3] = four.w;
        }
      }
    }
  };

  int staged_tile = first_tile, staged_block = 0, staged_buffer = 0;
  auto stage = [&] {  // the next block of channels of the next tile
    if (staged_tile == end_tile) return;
    const int unit = staged_tile / tiles_of_unit, in_unit = staged_tile % tiles_of_unit;
    const int y0 = in_unit / p.tiles_w * p.tile_h, x0 = in_unit % p.tiles_w * p.tile_w;
    const int first = staged_block * p.block_channels * kG;
    const int count = min(p.block_channels * kG, p.channels_per_group * kG - first);
    const float4* source = reinterpret_cast<const float4*>(p.input) +
                           (unit * planes + int64_t(group) * p.channels_per_group * kG + first) * p.lanes.plane;
    const int origin = y0 * p.lanes.phases[1] * p.lanes.columns + x0;
    for (int position = lane; position < p.plane; position += 32) {
      const int2 place = load_vector(places + position);
      const bool inside = (place.x & 0xffff) + x0 < p.lanes.columns && (place.x >> 16) + y0 < p.lanes.rows;
      const float4* from = source + int64_t(warp) * p.lanes.plane + (inside ? place.y + origin : 0);
      float4* to = buffers + staged_buffer * buffer_size + warp * plane + position;
      for (int i = warp; i < count; i += warps, from += int64_t(warps) * p.lanes.plane, to += warps * plane) {
        copy_async16(to, from, inside);
      }
    }
    staged_buffer ^= 1;
    if (++staged_block == p.blocks) staged_block = 0, ++staged_tile;
  };
  stage();
  copy_async_commit();
  stage();
  copy_async_commit();

  float* const results = p.partial + int64_t(split) * p.n_records * vector;
  int buffer = 0;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    load_grad(tile);
    for (int block = 0; block < p.blocks; ++block, buffer ^= 1) {
      copy_async_wait<1>();
      __syncthreads();  // what other threads copied
      const auto* tile_data = reinterpret_cast<const unsigned char*>(buffers + buffer * buffer_size + own);
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        const int mine = row_group(k);
        if (mine < 0) continue;
        const int bound = mine * (p.blocks + 1) + block;
        const int end = min(p.starts[bound + 1], p.n_records);
        int i = p.starts[bound];
        auto take = [&](auto count) {  // that many entries
          constexpr int kCount = decltype(count)::value, kValues = kCount * kV;
          float sums[kValues];
          const float4* at[kCount];
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            at[c] = reinterpret_cast<const float4*>(tile_data + *record_at<1>(p.records, i + c, p.n_records).distance);
#pragma unroll
            for (int v = 0; v < kV; ++v) sums[c * kV + v] = 0.0f;
          }
          // One group of lanes after the other, as the reads of all of them would take too many registers.
#pragma unroll
          for (int g = 0; g < kG; ++g) {
            if (g > 0 && g == kG / 2 && kGroups > 1) __syncwarp();
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              const float4 in = load_vector(at[c] + g * plane);
#pragma unroll
              for (int v = 0; v < kV; ++v) {
                const float* with = &grad[k][v][g * 4];
                float& sum = sums[c * kV + v];
                sum += with[0] * in.x;
                sum += with[1] * in.y;
                sum += with[2] * in.z;
                sum += with[3] * in.w;
              }
            }
          }
          sum_over_lanes<kValues>(sums, lane);
          const int index = summed_index<kValues>(lane);
          if (lane < kValues && part_of(k) * kV + index % kV < vector) {
            float* to = results + ((i + index / kV) * vector + part_of(k) * kV + index % kV);
            *to = tile == first_tile ? sums[0] : *to + sums[0];
          }
          i += kCount;
        };
        constexpr int kMost = kV == 1 ? 4 : kV == 8 ? 1 : 2;
#pragma unroll 1
        while (end - i >= kMost) take(std::integral_constant<int, kMost>{});
        if (kMost > 2 && end - i >= 2) take(std::integral_constant<int, 2>{});
        if (kMost > 1 && end - i >= 1) take(std::integral_constant<int, 1>{});
      }
      __syncthreads();  // before the buffer is filled again
      stage();
      copy_async_commit();
    }
  }
  copy_async_wait<0>();
}

// One thread per value, over the splits in their order.
__global__ void weight_grad_sum_kernel(const WeightGradSumParams p) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = int64_t(p.n_vectors) * p.vector;
  if (index >= count) return;
  const int64_t entry = index / p.vector, record = p.where[entry];
  float sum = 0.0f;
  if (record >= 0) {
    const float* from = p.partial + record * p.vector + index % p.vector;
    for (int split = 0; split < p.splits; ++split) sum += from[split * count];
  }
  store_value(p.output, p.dtype, index, sum);
}

}  // namespace sparsekd::cuda
