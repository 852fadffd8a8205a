// Of the sparse convolution on CUDA cores (conv2d.cuh): what its loop reads of a pattern, a record of each entry, those
// of a row one after another and sorted by block of channels:
//
//   of one value    [value | distance]
//   of two          [value | value | distance | distance]
//   of more         [kV values] of each, then [distance] of each, in global memory;
//                   [kV values | kV values | distance | distance | ..] of each two in shared memory, by 16 bytes
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

template <class Float, class Int>
struct RecordPlace {
  Float* values;
  Int* distance;
};
// Of `count` records in global memory.
template <int kV, class Byte>
__device__ __forceinline__ auto record_at(Byte* records, int64_t index, int64_t count) {
  using Float = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  using Int = std::conditional_t<std::is_const_v<Byte>, const int, int>;
  auto* values = reinterpret_cast<Float*>(records) + index * (kV <= 2 ? 2 * kV : kV);
  auto* distances = reinterpret_cast<Int*>(records + count * 4 * kV) + index;
  return RecordPlace<Float, Int>{values, kV <= 2 ? reinterpret_cast<Int*>(values + kV) : distances};
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
    const auto record = record_at<kV>(p.records, first + place, int64_t(p.n_vectors) * p.slices);
    *record.distance = entry.distance;
    if constexpr (kV == 2) record.distance[1] = entry.distance;
    if (p.where && part == 0) p.where[i] = static_cast<int>(first) + place;
    float* to = record.values;
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
  const int entry = p.slices == 1 ? planned.x : planned.x / p.slices, part = planned.x - entry * p.slices;
  const bool known = entry >= 0 && entry < p.n_vectors;
  float values[kV];
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    const int row = part * kV + v;
    const bool real = known && row < p.vector;
    values[v] = real ? load_value(p.values, p.dtype, int64_t(entry) * p.vector + row) : 0.0f;
  }
  const auto [to, distance] = record_at<kV>(p.records, index, p.n_records);
  const float bits = __uint_as_float(planned.y);
  if constexpr (kV == 1) {
    store_vector(reinterpret_cast<float2*>(to), float2{values[0], bits});
  } else if constexpr (kV == 2) {
    store_vector(reinterpret_cast<float4*>(to), float4{values[0], values[1], bits, bits});
  } else {
    *distance = planned.y;
#pragma unroll
    for (int v = 0; v < kV; v += 4) {
      const float4 four{values[v], values[v + 1], values[v + 2], values[v + 3]};
      store_vector(reinterpret_cast<float4*>(to + v), four);
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
struct Values {
  float of[kV];
};

template <int kV>
__device__ __forceinline__ Values<kV> load_values(const float* from) {
  Values<kV> values;
  if constexpr (kV == 1) {
    values.of[0] = *from;
  } else if constexpr (kV == 2) {
    const float2 two = load_vector(reinterpret_cast<const float2*>(from));
    values.of[0] = two.x;
    values.of[1] = two.y;
  } else {
#pragma unroll
    for (int v = 0; v < kV; v += 4) {
      const float4 four = load_vector(reinterpret_cast<const float4*>(from + v));
      values.of[v] = four.x;
      values.of[v + 1] = four.y;
      values.of[v + 2] = four.z;
      values.of[v + 3] = four.w;
    }
  }
  return values;
}

// Where the values and the distance of a staged record lie, in floats from the first one on.
template <int kV>
__device__ __forceinline__ int staged_values(int i) {
  return kV <= 2 ? i * 2 * kV : i / 2 * (kPairBytes<kV> / 4) + i % 2 * kV;
}
template <int kV>
__device__ __forceinline__ int staged_distance(int i) {
  return kV <= 2 ? i * 2 * kV + kV : i / 2 * (kPairBytes<kV> / 4) + 2 * kV + i % 2;
}

// Which record a lane of a warp copies there, so that eight lanes, whose vectors are written at once, meet no bank
// twice.
template <int kV>
__device__ __forceinline__ int copied_record(int lane) {
  if (kV <= 2) return lane;
  constexpr int kBit = kV == 4 ? 1 : 2;  // changes places with bit 3
  const int differ = (lane >> kBit ^ lane >> 3) & 1;
  return lane ^ (differ << kBit | differ << 3);
}

// Two staged records. The first is read while the one before it is multiplied, the second while the first one is. Of
// many values one read brings both distances.
template <int kV>
struct Pair {
  int distances[2];
  Values<kV> values[2];

  __device__ __forceinline__ void load_first(const float* from) {
    if constexpr (kV > 2) {
      const int2 both = load_vector(reinterpret_cast<const int2*>(from + staged_distance<kV>(0)));
      distances[0] = both.x;
      distances[1] = both.y;
    }
    load(from, 0);
  }
  __device__ __forceinline__ void load_second(const float* from) { load(from, 1); }
  __device__ __forceinline__ void load(const float* from, int i) {
    from += staged_values<kV>(i);
    if constexpr (kV == 1) {
      const float2 record = load_vector(reinterpret_cast<const float2*>(from));
      values[i].of[0] = record.x;
      distances[i] = __float_as_int(record.y);
    } else if constexpr (kV == 2) {
      const float4 record = load_vector(reinterpret_cast<const float4*>(from));
      values[i].of[0] = record.x;
      values[i].of[1] = record.y;
      distances[i] = __float_as_int(record.z);
    } else {
      values[i] = load_values<kV>(from);
    }
  }
};

}  // namespace sparsekd::cuda
