// Sparse convolution on CUDA cores: direct, without im2col.
//
//   output[n, k, y, x] = sum over the non-zeros (c, r, s) of row k:  value * input[n, c, y * stride + r * dilation, ...]
//
// A block stages all channels of a tile of positions, block of channels by block of channels (cp.async, two buffers), in
// the layout of conv2d.h, and serves many output rows with it. A lane of a warp owns one position of the tile and the
// 4 * kG lanes there; a non-zero is one distance within the staged tile, added to the lane's own place. So
//
//   per non-zero vector of a warp: kG 16-byte reads of shared memory feed kV * kG * 4 multiply-adds in each lane
//
// and neither borders nor strides nor dilation are seen in the loop. Method: Park et al., "Faster CNNs with direct sparse
// convolutions and guided pruning", ICLR 2017; Chen, "Escoin", 2018; rows sorted by length: Gale et al., "Sparse GPU
// kernels for deep learning", SC 2020.
#pragma once
#include "conv2d.h"
#include "element.cuh"

namespace sparsekd::cuda {

// ---- records: [distance | values] of each entry, sorted by block of channels ----

__device__ __forceinline__ bool tap_of(const TapAxis& axis, int r, int& phase, int& index) {
  const int t = axis.add + r * axis.mult;
  if (t % axis.div != 0) return false;
  const int tap = t / axis.div - axis.least;
  phase = tap % axis.stride;
  index = tap / axis.stride;
  return true;
}

struct Entry {
  bool used;
  int block, distance;  // in bytes
};

// Entries that no pattern made by `pack` holds are left out, so that no foreign memory is ever read.
__device__ __forceinline__ Entry entry_of(const RecordsParams& p, int column) {
  const int kernel_w = p.axes[1].kernel, taps = p.axes[0].kernel * kernel_w;
  Entry entry{false, 0, 0};
  if (column < 0 || column >= p.channels_per_group * taps) return entry;
  const int channel = column / taps, r = column % taps / kernel_w, s = column % kernel_w;
  int phase_y, phase_x, y, x;
  if (!tap_of(p.axes[0], r, phase_y, y) || !tap_of(p.axes[1], s, phase_x, x)) return entry;
  entry.used = true;
  entry.block = channel / p.block_channels;
  const int in_plane = ((phase_y * p.tile_rows + y) * p.phases_x + phase_x) * p.tile_columns + x;
  entry.distance = ((channel % p.block_channels) * p.lane_groups * p.plane + in_plane) * 16;
  return entry;
}

// One warp per slice. A stable counting sort: its counters, one per block of channels, lie in shared memory.
template <int kV>
__global__ void records_kernel(const RecordsParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int slice = blockIdx.x * (blockDim.x / 32) + warp;
  if (slice >= p.row_groups * p.slices) return;  // a whole warp
  int* counters = shared_memory<int>() + warp * p.blocks;
  const int row_group = slice / p.slices, part = slice % p.slices;
  const int begin = min(max(p.crow[row_group], 0), p.n_vectors);
  const int end = min(max(p.crow[row_group + 1], begin), p.n_vectors);

  for (int i = lane; i < p.blocks; i += 32) counters[i] = 0;
  __syncwarp();
  for (int base = begin; base < end; base += 32) {
    Entry entry{false, 0, 0};
    if (base + lane < end) entry = entry_of(p, p.col[base + lane]);
    const unsigned peers = __match_any_sync(kAll, entry.used ? entry.block : -1);
    if (entry.used && __ffs(peers) - 1 == lane) counters[entry.block] += __popc(peers);
    __syncwarp();
  }
  // Counts become places; the batches of 32 are one after another.
  const int64_t first = int64_t(begin) * p.slices + int64_t(part) * (end - begin);
  int total = 0;
  for (int base = 0; base < p.blocks; base += 32) {
    const int count = base + lane < p.blocks ? counters[base + lane] : 0;
    int sum = count;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_sync(kAll, sum, max(lane - distance, 0));
      if (lane >= distance) sum += other;
    }
    if (base + lane < p.blocks) {
      counters[base + lane] = total + sum - count;
      p.starts[int64_t(slice) * (p.blocks + 1) + base + lane] = static_cast<int>(first) + total + sum - count;
    }
    total += __shfl_sync(kAll, sum, 31);
  }
  if (lane == 0) p.starts[int64_t(slice) * (p.blocks + 1) + p.blocks] = static_cast<int>(first) + total;
  __syncwarp();
  for (int base = begin; base < end; base += 32) {
    Entry entry{false, 0, 0};
    const int i = base + lane;
    if (i < end) entry = entry_of(p, p.col[i]);
    const unsigned peers = __match_any_sync(kAll, entry.used ? entry.block : -1);
    int place = 0;
    if (entry.used) place = counters[entry.block] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();  // all have read before the first of the peers counts on
    if (entry.used && __ffs(peers) - 1 == lane) counters[entry.block] += __popc(peers);
    __syncwarp();
    if (!entry.used) continue;
    unsigned char* record = p.records + (first + place) * kRecordBytes<kV>;
    if constexpr (kV == 2) {
      store_vector(reinterpret_cast<int2*>(record), int2{entry.distance, 0});  // read as one vector
    } else {
      store_vector(reinterpret_cast<int*>(record), entry.distance);
    }
    if (p.where && part == 0) p.where[i] = static_cast<int>(first) + place;
    float* to = reinterpret_cast<float*>(record + kRecordBytes<kV> - 4 * kV);
    for (int v = 0; v < kV; ++v) {
      const int row = part * kV + v;
      int64_t index = p.place ? p.place[i] : int64_t(i) * p.vector + row;
      const bool real = row < p.vector && index >= 0 && index < p.n_values;
      to[v] = real ? load_value(p.values, p.dtype, index) : 0.0f;
    }
  }
  // The rank of a slice is the number of slices before it.
  const int slices_per_group = p.row_groups_per_group * p.slices;
  const int group = slice / slices_per_group, mine = end - begin;
  int before = 0;
  for (int base = 0; base < slices_per_group; base += 32) {
    const int local = base + lane;
    if (local >= slices_per_group) continue;
    const int other = group * slices_per_group + local;
    const int other_group = other / p.slices;
    const int other_begin = min(max(p.crow[other_group], 0), p.n_vectors);
    const int count = min(max(p.crow[other_group + 1], other_begin), p.n_vectors) - other_begin;
    before += count > mine || (count == mine && other < slice);
  }
  for (int distance = 16; distance > 0; distance /= 2) before += __shfl_xor_sync(kAll, before, distance);
  if (lane == 0) p.order[group * slices_per_group + before] = slice;
}

// ---- the convolution ----

template <int kV>
struct Record {
  int distance;
  float values[kV];
};

template <int kV>
__device__ __forceinline__ Record<kV> load_record(const unsigned char* from) {
  Record<kV> record;
  if constexpr (kV == 1) {
    const float2 pair = load_vector(reinterpret_cast<const float2*>(from));
    record.distance = __float_as_int(pair.x);
    record.values[0] = pair.y;
  } else if constexpr (kV == 2) {
    const float4 all = load_vector(reinterpret_cast<const float4*>(from));
    record.distance = __float_as_int(all.x);
    record.values[0] = all.z;
    record.values[1] = all.w;
  } else {
    record.distance = load_vector(reinterpret_cast<const int*>(from));
#pragma unroll
    for (int v = 0; v < kV; v += 4) {
      const float4 four = load_vector(reinterpret_cast<const float4*>(from + 16) + v / 4);
      record.values[v] = four.x;
      record.values[v + 1] = four.y;
      record.values[v + 2] = four.z;
      record.values[v + 3] = four.w;
    }
  }
  return record;
}

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x > 0.0f || x != x ? x : 0.0f;
    case Activation::relu6: return x != x ? x : fminf(fmaxf(x, 0.0f), 6.0f);
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::hardswish: return x != x ? x : x * fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    default: return x;
  }
}

// The vectors of a staged plane that a lane of a warp copies, as distances in the plane in global memory.
template <int kPlane>
struct StagedPlane {
  static constexpr int kCopies = kPlane / 32;
  int from[kCopies];  // -1: outside, filled with zeros; -2: none

  template <class Params>
  __device__ __forceinline__ void set(const Params& p, int lane, int y0, int x0) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) from[i] = source(p, lane + i * 32, y0, x0);
  }
  template <class Params>
  static __device__ __forceinline__ int source(const Params& p, int position, int y0, int x0) {
    if (position >= p.plane) return -2;
    const int column = x0 + position % p.tile_columns;
    int rest = position / p.tile_columns;
    const int phase_x = rest % p.lanes.phases[1];
    rest /= p.lanes.phases[1];
    const int row = y0 + rest % p.tile_rows, phase_y = rest / p.tile_rows;
    if (column >= p.lanes.columns || row >= p.lanes.rows) return -1;
    return ((phase_y * p.lanes.rows + row) * p.lanes.phases[1] + phase_x) * p.lanes.columns + column;
  }
};
template <>
struct StagedPlane<0> {
  template <class Params>
  __device__ __forceinline__ void set(const Params&, int, int, int) {}
};

template <int kV, int kG, int kGroups, int kPlane>
__global__ __launch_bounds__(32 * kConv2dWarps, 2) void conv2d_kernel(const Conv2dParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int plane = kPlane ? kPlane : p.plane;  // in shared memory
  const int tile = blockIdx.x % (p.tiles_h * p.tiles_w);
  const int64_t unit = blockIdx.x / (p.tiles_h * p.tiles_w);
  const int y0 = tile / p.tiles_w * p.tile_h, x0 = tile % p.tiles_w * p.tile_w;
  const int group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  const int y = lane / p.tile_w, x = lane % p.tile_w;  // of the lane's position within the tile

  float sums[kGroups][kV][kG * 4];
  int slice[kGroups], next[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const int rank = (row_block * warps + warp) * kGroups + k;
    slice[k] = rank < p.slices_per_group ? p.order[group * p.slices_per_group + rank] : -1;
    next[k] = slice[k] < 0 ? 0 : p.starts[int64_t(slice[k]) * (p.blocks + 1)];
#pragma unroll
    for (int v = 0; v < kV; ++v) {
#pragma unroll
      for (int i = 0; i < kG * 4; ++i) sums[k][v][i] = 0.0f;
    }
  }

  float4* buffers = shared_memory<float4>();  // [2][block_channels][kG][plane]
  const int buffer_size = p.block_channels * kG * plane;
  const int64_t planes = int64_t(p.lanes.channels) * kG;
  const float4* source = reinterpret_cast<const float4*>(p.input) +
                         (unit * planes + int64_t(group) * p.channels_per_group * kG) * p.lanes.plane;
  // Where each vector of a staged plane comes from. In registers it would leave too few for the loop.
  int* places = reinterpret_cast<int*>(buffers + 2 * buffer_size);  // [kPlane]
  if constexpr (kPlane != 0) {
    for (int i = threadIdx.x; i < kPlane; i += blockDim.x) places[i] = StagedPlane<32>::source(p, i, y0, x0);
    __syncthreads();  // places
  }
  auto stage = [&](int block) {
    const int first = block * p.block_channels * kG;
    const int count = min(p.block_channels * kG, p.channels_per_group * kG - first);
    constexpr int kCopies = kPlane / 32;
    int place[kCopies + 1];
#pragma unroll
    for (int j = 0; j < kCopies; ++j) place[j] = places[lane + j * 32];
    for (int i = warp; i < count; i += warps) {
      const float4* from = source + int64_t(first + i) * p.lanes.plane;
      float4* to = buffers + (block % 2) * buffer_size + i * plane;
      if constexpr (kPlane != 0) {
#pragma unroll
        for (int j = 0; j < kCopies; ++j) {
          const int at = place[j];
          if (at != -2) copy_async16(to + lane + j * 32, from + max(at, 0), at >= 0);
        }
      } else {
        for (int position = lane; position < plane; position += 32) {
          const int at = StagedPlane<32>::source(p, position, y0, x0);
          copy_async16(to + position, from + max(at, 0), at >= 0);
        }
      }
    }
  };
  stage(0);
  copy_async_commit();
  if (p.blocks > 1) stage(1);
  copy_async_commit();

  const int own = y * p.lanes.phases[1] * p.tile_columns + x;
  for (int block = 0; block < p.blocks; ++block) {
    copy_async_wait<1>();
    __syncthreads();  // what other threads copied
    const auto* tile_data = reinterpret_cast<const unsigned char*>(buffers + (block % 2) * buffer_size + own);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (slice[k] < 0) continue;
      const int i = next[k], end = min(p.starts[int64_t(slice[k]) * (p.blocks + 1) + block + 1], p.n_records);
      next[k] = end;
      if (i >= end) continue;
      const unsigned char* from = p.records + int64_t(i) * kRecordBytes<kV>;
      auto multiply = [&](const Record<kV>& record) {
        const auto* at = reinterpret_cast<const float4*>(tile_data + record.distance);
#pragma unroll
        for (int g = 0; g < kG; ++g) {
          const float4 in = load_vector(at + g * plane);
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            float* sum = &sums[k][v][g * 4];
            sum[0] += record.values[v] * in.x;
            sum[1] += record.values[v] * in.y;
            sum[2] += record.values[v] * in.z;
            sum[3] += record.values[v] * in.w;
          }
        }
      };
      // The last one apart: a load under a condition would cost moves of what it might leave as it is.
      Record<kV> ahead = load_record<kV>(from);
#pragma unroll 2
      for (int left = end - i - 1; left > 0; --left) {
        const Record<kV> record = ahead;
        from += kRecordBytes<kV>;
        ahead = load_record<kV>(from);  // while this one is used
        multiply(record);
      }
      multiply(ahead);
    }
    __syncthreads();  // before the buffer is filled again
    if (block + 2 < p.blocks) stage(block + 2);
    copy_async_commit();
  }
  copy_async_wait<0>();

  // Sums go through shared memory, each lane's to itself, so that one rolled loop can finish them: the buffers are free.
  constexpr int kRows = kGroups * kV, kLanes = kG * 4;
  float* results = shared_memory<float>() + warp * kRows * kLanes * 32 + lane;  // [kRows][kLanes][32]
  // Lane r knows what row r needs.
  int mine = -1, my_channel = -1;
  float my_scale = 1.0f, my_shift = 0.0f;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int v = 0; v < kV; ++v) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) results[((k * kV + v) * kLanes + i) * 32] = sums[k][v][i];
    }
    // Not by `?:`, which becomes slice[lane / kV], and what a lane indexes lies in local memory.
    mine = max(mine, slice[k] | -int(lane / kV != k));
  }
  if (mine >= 0) {
    const int local = mine - group * p.slices_per_group;  // within the group of the convolution
    const int in_vector = local % p.slices * kV + lane % kV;
    const int row = local / p.slices * p.vector + in_vector;
    if (in_vector < p.vector && row < p.rows_per_group) {
      my_channel = group * p.rows_per_group + row;
      if (p.row_indices) my_channel = p.row_indices[my_channel];
      if (my_channel >= p.out_channels) my_channel = -1;
    }
  }
  if (my_channel >= 0 && p.scale) my_scale = load_value(p.scale, p.dtype, my_channel);
  if (my_channel >= 0 && p.shift) my_shift = load_value(p.shift, p.dtype, my_channel);

  const int row_in_strip = y0 + y, column = x0 + x;
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
      const int channel = __shfl_sync(0xffffffffu, my_channel, r);
      const float scale = __shfl_sync(0xffffffffu, my_scale, r), shift = __shfl_sync(0xffffffffu, my_shift, r);
      if (!inside || channel < 0) continue;
      float result = results[(r * kLanes + i) * 32] * scale + shift;
      if (p.residual) result += load_value(p.residual, p.dtype, at + channel * p.out_c);
      store_value(p.output, p.dtype, at + channel * p.out_c, activate(result, p.activation));
    }
  }
}

}  // namespace sparsekd::cuda
