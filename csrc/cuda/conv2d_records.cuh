// Of the sparse convolution on CUDA cores (conv2d.cuh): what its loop reads of a pattern, a record [distance | values]
// of each entry, those of a row one after another and sorted by block of channels.
#pragma once
#include "conv2d.h"
#include "element.cuh"

namespace sparsekd::cuda {

// `out_phase`: of interleaved results.
__device__ __forceinline__ bool tap_of(const TapAxis& axis, int r, int& phase, int& index, int out_phase = 0) {
  const int t = axis.add + out_phase + r * axis.mult;
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
__device__ __forceinline__ Entry entry_of(const RecordsParams& p, int column, int part) {
  const int kernel_w = p.axes[1].kernel, taps = p.axes[0].kernel * kernel_w;
  Entry entry{false, 0, 0};
  if (column < 0 || column >= p.channels_per_group * taps) return entry;
  const int channel = column / taps, r = column % taps / kernel_w, s = column % kernel_w;
  const int out_phase = p.interleaved ? part : 0;
  int phase_y, phase_x, y, x;
  if (!tap_of(p.axes[0], r, phase_y, y, out_phase / 2)) return entry;
  if (!tap_of(p.axes[1], s, phase_x, x, out_phase % 2)) return entry;
  entry.used = true;
  entry.block = channel / p.block_channels;
  const int in_plane = phase_y * p.phase_pitch[0] + y * p.row_pitch + phase_x * p.phase_pitch[1] + x;
  entry.distance = ((channel % p.block_channels) * p.lane_groups * p.plane + in_plane) * 16;
  return entry;
}

constexpr int kRecordsWarps = 8;  // at most
constexpr int kHeldEntries = 4;   // of a lane, of which one pass over the columns serves two passes over the entries

// One block of threads per slice. A stable counting sort: each warp takes a piece of the row, and its counters, one per
// block of channels, lie in shared memory.
template <int kV>
__global__ __launch_bounds__(32 * kRecordsWarps) void records_kernel(const RecordsParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int slice = blockIdx.x;
  int* all_counters = shared_memory<int>();  // [warps][blocks], then a sum of each warp
  int* counters = all_counters + warp * p.blocks;
  int* sums = all_counters + warps * p.blocks;
  const int row_group = slice / p.slices, part = slice % p.slices;
  const int begin = min(max(p.crow[row_group], 0), p.n_vectors);
  const int end = min(max(p.crow[row_group + 1], begin), p.n_vectors);

  for (int i = lane; i < p.blocks; i += 32) counters[i] = 0;
  __syncwarp();
  const int rounds = (end - begin + 32 * warps - 1) / (32 * warps);  // of each warp
  const int mine = begin + warp * rounds * 32 + lane;
  auto entry_at = [&](int round) {
    const int i = mine + round * 32;
    return i < end && round < rounds ? entry_of(p, p.col[i], part) : Entry{false, 0, 0};
  };
  auto count = [&](const Entry& entry) {
    const unsigned peers = __match_any_sync(kAll, entry.used ? entry.block : -1);
    if (entry.used && __ffs(peers) - 1 == lane) counters[entry.block] += __popc(peers);
    __syncwarp();
  };
  Entry held[kHeldEntries];
#pragma unroll
  for (int round = 0; round < kHeldEntries; ++round) held[round] = entry_at(round);
#pragma unroll
  for (int round = 0; round < kHeldEntries; ++round) {
    if (round < rounds) count(held[round]);
  }
#pragma unroll 1
  for (int round = kHeldEntries; round < rounds; ++round) count(entry_at(round));

  // The rank of a slice is the number of slices before it.
  const int slices_per_group = p.row_groups_per_group * p.slices;
  const int group = slice / slices_per_group;
  int before = 0;
  for (int local = threadIdx.x; local < slices_per_group; local += blockDim.x) {
    const int other = group * slices_per_group + local;
    const int other_group = other / p.slices;
    const int other_begin = min(max(p.crow[other_group], 0), p.n_vectors);
    const int other_count = min(max(p.crow[other_group + 1], other_begin), p.n_vectors) - other_begin;
    before += other_count > end - begin || (other_count == end - begin && other < slice);
  }
  for (int distance = 16; distance > 0; distance /= 2) before += __shfl_xor_sync(kAll, before, distance);
  if (lane == 0) sums[warp] = before;
  __syncthreads();  // counters and sums of all warps

  // Counts become places; the batches of 32 blocks are one after another.
  const int64_t first = int64_t(begin) * p.slices + int64_t(part) * (end - begin);
  if (warp == 0) {
    int total = 0;
    for (int base = 0; base < p.blocks; base += 32) {
      const int block = base + lane;
      int all = 0;
      for (int w = 0; w < warps && block < p.blocks; ++w) all += all_counters[w * p.blocks + block];
      int sum = all;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_sync(kAll, sum, max(lane - distance, 0));
        if (lane >= distance) sum += other;
      }
      if (block < p.blocks) {
        int place = total + sum - all;
        p.starts[int64_t(slice) * (p.blocks + 1) + block] = static_cast<int>(first) + place;
        for (int w = 0; w < warps; ++w) {
          const int of_warp = all_counters[w * p.blocks + block];
          all_counters[w * p.blocks + block] = place;
          place += of_warp;
        }
      }
      total += __shfl_sync(kAll, sum, 31);
    }
    if (lane == 0) {
      p.starts[int64_t(slice) * (p.blocks + 1) + p.blocks] = static_cast<int>(first) + total;
      int rank = 0;
      for (int w = 0; w < warps; ++w) rank += sums[w];
      p.order[group * slices_per_group + rank] = slice;
    }
  }
  __syncthreads();  // places
  auto put = [&](const Entry& entry, int round) {
    const unsigned peers = __match_any_sync(kAll, entry.used ? entry.block : -1);
    int place = 0;
    if (entry.used) place = counters[entry.block] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();  // all have read before the first of the peers counts on
    if (entry.used && __ffs(peers) - 1 == lane) counters[entry.block] += __popc(peers);
    __syncwarp();
    if (!entry.used) return;
    const int i = mine + round * 32;
    unsigned char* record = p.records + (first + place) * kRecordBytes<kV>;
    // What lies between a distance and its values is copied with them.
    if constexpr (kV > 2) {
      store_vector(reinterpret_cast<uint4*>(record), uint4{static_cast<unsigned>(entry.distance), 0, 0, 0});
    } else if constexpr (kV == 2) {
      store_vector(reinterpret_cast<int2*>(record), int2{entry.distance, 0});
    } else {
      store_vector(reinterpret_cast<int*>(record), entry.distance);
    }
    if (p.where && part == 0) p.where[i] = static_cast<int>(first) + place;
    float* to = reinterpret_cast<float*>(record + kRecordBytes<kV> - 4 * kV);
    if (kV == 1 && p.slots) {
      to[0] = __uint_as_float(static_cast<uint32_t>(i) * p.slices + part);
      return;
    }
    for (int v = 0; v < kV; ++v) {
      const int row = p.interleaved ? v : part * kV + v;
      const int64_t index = p.place ? p.place[i] : int64_t(i) * p.vector + row;
      const bool real = row < p.vector && index >= 0 && index < p.n_values;
      to[v] = real ? load_value(p.values, p.dtype, index) : 0.0f;
    }
  };
#pragma unroll
  for (int round = 0; round < kHeldEntries; ++round) {
    if (round < rounds) put(held[round], round);
  }
#pragma unroll 1
  for (int round = kHeldEntries; round < rounds; ++round) put(entry_at(round), round);
}

// A record that no entry has holds what lies where the plan says, and is never read.
template <int kV>
__device__ __forceinline__ void fill_record(const FillRecordsParams& p, int64_t index) {
  const int2 planned = load_vector(reinterpret_cast<const int2*>(p.plan) + index);
  const int entry = p.slices == 1 ? planned.y : planned.y / p.slices, part = planned.y - entry * p.slices;
  const bool known = entry >= 0 && entry < p.n_vectors;
  float values[kV];
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    const int row = part * kV + v;
    const bool real = known && row < p.vector;
    values[v] = real ? load_value(p.values, p.dtype, int64_t(entry) * p.vector + row) : 0.0f;
  }
  unsigned char* record = p.records + index * kRecordBytes<kV>;
  if constexpr (kV == 1) {
    store_vector(reinterpret_cast<float2*>(record), float2{__uint_as_float(planned.x), values[0]});
  } else if constexpr (kV == 2) {
    store_vector(reinterpret_cast<float4*>(record), float4{__uint_as_float(planned.x), 0.0f, values[0], values[1]});
  } else {
    store_vector(reinterpret_cast<float4*>(record), float4{__uint_as_float(planned.x), 0.0f, 0.0f, 0.0f});
#pragma unroll
    for (int v = 0; v < kV; v += 4) {
      const float4 four{values[v], values[v + 1], values[v + 2], values[v + 3]};
      store_vector(reinterpret_cast<float4*>(record + 16) + v / 4, four);
    }
  }
}

__device__ __forceinline__ void fill_record(const FillRecordsParams& p, int64_t index) {
  switch (p.kernel_vector) {
    case 1: return fill_record<1>(p, index);
    case 2: return fill_record<2>(p, index);
    case 4: return fill_record<4>(p, index);
    default: return fill_record<8>(p, index);
  }
}

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

}  // namespace sparsekd::cuda
