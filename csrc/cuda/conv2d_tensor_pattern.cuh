// The plan of a convolution on tensor cores (conv2d_tensor.cuh): which plane of activations lies where, in which order
// slices are taken, and which column is which place of an octet, so that what is gathered lies in different banks.
#pragma once
#include "conv2d.cuh"
#include "conv2d_tensor.h"

namespace sparsekd::cuda {

// Of an entry: its plane, channel * phases + phase, and its distance in vectors within it. plane -1: not one that
// `pack` makes.
struct Tap {
  int plane, in_plane;
};

__device__ __forceinline__ Tap tap_at(const TensorPatternParams& p, int column) {
  const int kernel_w = p.axes[1].kernel, taps = p.axes[0].kernel * kernel_w;
  const int phases = p.phases[0] * p.phases[1], channels = p.planes_per_group / phases;
  if (column < 0 || column >= channels * taps) return {-1, 0};
  int phase_y, phase_x, y, x;
  if (!tap_of(p.axes[0], column % taps / kernel_w, phase_y, y)) return {-1, 0};
  if (!tap_of(p.axes[1], column % taps % kernel_w, phase_x, x)) return {-1, 0};
  return {column / taps * phases + phase_y * p.phases[1] + phase_x, y * p.tile_columns + x};
}

// Distances have 16 bits. Of each four octets of a slice and block, the first two have the lower halves of words and
// the others the upper: what one load brings serves two steps of the convolution, which take two octets each. `first`
// is the first of the slice and block, and what fills up the last four lies in the words of its own octets.
__device__ __forceinline__ int64_t distance_word_at(int64_t first, int octet, int place) {
  return first * 8 + octet / 4 * 16 + octet % 2 * 8 + place;
}
__device__ __forceinline__ uint16_t* distance_at(const TensorPlan& plan, int64_t first, int octet, int place) {
  return reinterpret_cast<uint16_t*>(plan.distances + distance_word_at(first, octet, place)) + octet / 2 % 2;
}

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(const TensorPatternParams& p, int row_group) {
  const int begin = min(max(p.crow[row_group], 0), p.n_vectors);
  return {begin, min(max(p.crow[row_group + 1], begin), p.n_vectors)};
}

// How often each residue modulo 8 occurs among a plane's taps, four bits each. More than 15, of very large kernels,
// count as 15: their places are then chosen less well.
__device__ __forceinline__ unsigned rotated(unsigned counts, int residue) {
  return residue ? counts << 4 * residue | counts >> (32 - 4 * residue) : counts;
}

constexpr int kPlanesWarps = 16;

// A block of threads per block of rows and block of planes: the order of slices, and in which slot each plane lies.
__global__ __launch_bounds__(32 * kPlanesWarps) void tensor_planes_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int block = blockIdx.x, group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  const int first_plane = block * p.block_planes;
  const int planes = min(p.block_planes, p.planes_per_group - first_plane);
  auto* counts = shared_memory<unsigned>();                            // [block_slices][block_planes]
  int* weights = reinterpret_cast<int*>(counts + p.block_slices * p.block_planes);  // [block_planes]
  int* by_weight = weights + p.block_planes;                           // [block_planes]
  int* slot_in = by_weight + p.block_planes;                           // [block_planes]
  int* slices = slot_in + p.block_planes;                              // [block_slices]
  int* lengths = slices + p.block_slices;                              // [slices_per_group]
  auto* single = reinterpret_cast<uint16_t*>(lengths + p.slices_per_group);  // [block_slices][block_planes][8]

  for (int i = threadIdx.x; i < p.block_slices * p.block_planes * 4; i += blockDim.x) {
    reinterpret_cast<unsigned*>(single)[i] = 0;
  }
  for (int i = threadIdx.x; i < p.block_slices; i += blockDim.x) slices[i] = -1;
  for (int i = threadIdx.x; i < p.slices_per_group; i += blockDim.x) {
    const Range range = range_of(p, (group * p.slices_per_group + i) / p.slices);
    lengths[i] = range.end - range.begin;
  }
  __syncthreads();  // lengths, and slices that there are not
  // The rank of a slice is the number of slices before it.
  for (int local = threadIdx.x; local < p.slices_per_group; local += blockDim.x) {
    const int own = lengths[local];
    int rank = 0;
    for (int i = 0; i < p.slices_per_group; ++i) rank += lengths[i] > own || (lengths[i] == own && i < local);
    if (rank / p.block_slices != row_block) continue;
    slices[rank % p.block_slices] = group * p.slices_per_group + local;
    if (block == 0) p.plan.order[group * p.slices_per_group + rank] = group * p.slices_per_group + local;
  }
  __syncthreads();  // slices, and counts of zero

  for (int i = warp; i < p.block_slices; i += warps) {
    if (slices[i] < 0) continue;
    const Range range = range_of(p, slices[i] / p.slices);
    for (int base = range.begin; base < range.end; base += 32) {
      Tap tap{-1, 0};
      if (base + lane < range.end) tap = tap_at(p, p.col[base + lane]);
      const int plane = tap.plane - first_plane;
      const bool used = tap.plane >= 0 && plane >= 0 && plane < planes;
      const int at = used ? plane * 8 + tap.in_plane % 8 : -1;
      const unsigned peers = __match_any_sync(kAll, at);
      if (used && __ffs(peers) - 1 == lane) {
        uint16_t* count = single + i * p.block_planes * 8 + at;
        *count = static_cast<uint16_t>(min(*count + __popc(peers), 15));
      }
      __syncwarp();  // before the next are counted
    }
  }
  __syncthreads();  // counts of each residue
  for (int i = threadIdx.x; i < p.block_slices * p.block_planes; i += blockDim.x) {
    unsigned word = 0;
    for (int r = 0; r < 8; ++r) word |= static_cast<unsigned>(single[i * 8 + r]) << 4 * r;
    counts[i] = word;
  }
  __syncthreads();  // counts
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    int weight = 0;
    for (int i = 0; i < p.block_slices; ++i) {
      const unsigned word = counts[i * p.block_planes + plane];
      const unsigned bytes = (word & 0x0f0f0f0fu) + (word >> 4 & 0x0f0f0f0fu);
      weight += static_cast<int>(bytes * 0x01010101u >> 24);
    }
    weights[plane] = weight;
  }
  __syncthreads();  // weights
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    const int own = weights[plane];
    int rank = 0;
    for (int other = 0; other < planes; ++other) {
      rank += weights[other] > own || (weights[other] == own && other < plane);
    }
    by_weight[rank] = plane;
  }
  __syncthreads();  // by_weight

  // Heaviest first, each plane goes to the residue that keeps the sums of squares smallest: lane r + 8 * q looks at
  // residue r and every fourth slice, of which it remembers what lies at even and odd residues, a byte each. Slot i
  // begins at residue i * pitch, and an odd pitch is its own inverse modulo 8.
  if (warp == 0) {
    constexpr int kOwn = kMostSlices / 4;
    const int residue = lane % 8, part = lane / 8;
    const int first_slot = residue * p.pitch % 8;
    int taken = 0;  // slots of the lane's residue
    unsigned even[kOwn], odd[kOwn];
#pragma unroll
    for (int s = 0; s < kOwn; ++s) even[s] = odd[s] = 0;
    for (int i = 0; i < planes; ++i) {
      const int plane = by_weight[i];
      unsigned words[kOwn];
#pragma unroll
      for (int s = 0; s < kOwn; ++s) {
        words[s] = part + s * 4 < p.block_slices ? counts[(part + s * 4) * p.block_planes + plane] : 0;
      }
      unsigned cost = 0;
#pragma unroll
      for (int s = 0; s < kOwn; ++s) {
        const unsigned word = rotated(words[s], residue);
        cost = __dp4a(even[s], word & 0x0f0f0f0fu, cost);
        cost = __dp4a(odd[s], word >> 4 & 0x0f0f0f0fu, cost);
      }
      cost += __shfl_xor_sync(kAll, cost, 8);
      cost += __shfl_xor_sync(kAll, cost, 16);
      const bool free = first_slot + 8 * taken < planes;
      unsigned best = (free ? min(cost, 1u << 26) : 1u << 27) * 8 + residue;
      for (int distance = 1; distance < 8; distance *= 2) best = min(best, __shfl_xor_sync(kAll, best, distance));
      const int chosen = static_cast<int>(best % 8);
#pragma unroll
      for (int s = 0; s < kOwn; ++s) {
        const unsigned word = rotated(words[s], chosen);
        even[s] += word & 0x0f0f0f0fu;
        odd[s] += word >> 4 & 0x0f0f0f0fu;
      }
      if (residue != chosen) continue;
      if (part == 0) slot_in[plane] = first_slot + 8 * taken;
      ++taken;
    }
  }
  __syncthreads();  // slot_in
  const int64_t at = int64_t(blockIdx.y) * p.planes_per_group + first_plane;
  int32_t* plane_at = p.plan.plane_at + (int64_t(blockIdx.y) * p.blocks + block) * p.block_fours * 4;
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    plane_at[slot_in[plane]] = weights[plane] ? first_plane + plane : -1;
    p.slot_of[at + plane] = slot_in[plane];
  }
}

// One warp per slice. Columns are counted by block of planes and residue; that one is the i-th of its block, in the
// order of residues, is its place: of n octets, it goes to octet i % n. So columns of a residue that are no more than
// octets go to different ones, and each octet has about as many.
__global__ __launch_bounds__(128, 4) void tensor_columns_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int ranked = blockIdx.x * warps + warp;
  if (ranked >= p.row_groups * p.slices) return;  // a whole warp
  const int group = ranked / p.slices_per_group, rank = ranked % p.slices_per_group;
  const int slice = p.plan.order[ranked], row_group = slice / p.slices, part = slice % p.slices;
  const int row_block = group * p.row_blocks + rank / p.block_slices;
  const int32_t* slot_of = p.slot_of + int64_t(row_block) * p.planes_per_group;
  // [blocks][8] columns, [blocks][8] the first of them in the block, [blocks] octets, [blocks] the first of them
  int* counts = shared_memory<int>() + warp * p.blocks * 18;
  int *firsts = counts + p.blocks * 8, *octets_of = firsts + p.blocks * 8, *first_of = octets_of + p.blocks;
  const Range range = range_of(p, row_group);

  auto key_of = [&](int i, int& distance) {
    const Tap tap = i < range.end ? tap_at(p, p.col[i]) : Tap{-1, 0};
    if (tap.plane < 0) return -1;
    distance = p.zeros + slot_of[tap.plane] * p.pitch + tap.in_plane;
    return tap.plane / p.block_planes * 8 + distance % 8;
  };

  for (int i = lane; i < p.blocks * 8; i += 32) counts[i] = 0;
  __syncwarp();
  for (int base = range.begin; base < range.end; base += 32) {
    int distance = 0;
    const int key = key_of(base + lane, distance);
    const unsigned peers = __match_any_sync(kAll, key);
    if (key >= 0 && __ffs(peers) - 1 == lane) counts[key] += __popc(peers);
    __syncwarp();
  }
  const int before = range.begin / 8 + row_group * p.blocks, most = range.end / 8 - range.begin / 8 + p.blocks;
  int octets = before * p.slices + part * most;
  for (int base = 0; base < p.blocks; base += 32) {
    int mine = 0;
    if (base + lane < p.blocks) {
      for (int r = 0; r < 8; ++r) {
        firsts[(base + lane) * 8 + r] = mine;
        mine += counts[(base + lane) * 8 + r];
      }
    }
    int octets_before = (mine + 7) / 8;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int more = __shfl_sync(kAll, octets_before, max(lane - distance, 0));
      if (lane >= distance) octets_before += more;
    }
    if (base + lane < p.blocks) {
      octets_of[base + lane] = (mine + 7) / 8;
      first_of[base + lane] = octets + octets_before - (mine + 7) / 8;
      p.plan.starts[int64_t(slice) * (p.blocks + 1) + base + lane] = first_of[base + lane];
    }
    octets += __shfl_sync(kAll, octets_before, 31);
  }
  if (lane == 0) p.plan.starts[int64_t(slice) * (p.blocks + 1) + p.blocks] = octets;
  __syncwarp();  // firsts, and octets of blocks
  for (int base = range.begin; base < range.end; base += 32) {
    int distance = 0;
    const int key = key_of(base + lane, distance);
    const unsigned peers = __match_any_sync(kAll, key);
    const int i = key >= 0 ? firsts[key] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();  // all have read before the first of the peers counts on
    if (key >= 0 && __ffs(peers) - 1 == lane) firsts[key] += __popc(peers);
    __syncwarp();  // before the next are read
    if (key < 0) continue;
    const int64_t first = first_of[key / 8];
    const int octet = i % octets_of[key / 8], place = i / octets_of[key / 8];
    store_vector(distance_at(p.plan, first, octet, place), static_cast<uint16_t>(distance));
    store_vector(p.plan.columns + (first + octet) * 8 + place, (base + lane) * p.slices + part);
  }
  __syncwarp();  // distances

  // What is left of an octet points at zeros, in a bank that the octet does not use.
  for (int block = 0; block < p.blocks; ++block) {
    const int64_t first = first_of[block];
    const int all = octets_of[block], columns = firsts[block * 8 + 7];  // which has been counted on to the end
    for (int i = lane; i < all; i += 32) {
      unsigned residues = 0;
      for (int place = 0; place < 8; ++place) {
        if (place * all + i < columns) {
          residues |= 1u << *distance_at(p.plan, first, i, place) % 8;
          continue;
        }
        const int free = __ffs(~residues) - 1;
        residues |= 1u << free;
        store_vector(distance_at(p.plan, first, i, place), static_cast<uint16_t>(free));
        store_vector(p.plan.columns + (first + i) * 8 + place, -1);
      }
    }
  }
}

// ---- values, at each call ----

// A thread writes one word, the values of a row at two neighbouring places of an octet:
//   8 rows:  [lane]
//   more:    [matrix][lane][half of the rows]
template <int kRows>
__global__ void tensor_values_kernel(const TensorValuesParams p) {
  constexpr int kWords = kRows * 4, kHalves = kRows > 8 ? 2 : 1;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t octet = index / kWords;
  if (octet >= p.n_octets) return;
  int word = static_cast<int>(index % kWords);
  const int half = word % kHalves;
  word /= kHalves;
  const int matrix = word / 32, lane = word % 32;
  const int in_slice = matrix * 16 + half * 8 + lane / 4;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = p.columns[octet * 8 + lane % 4 * 2 + i];
    if (column < 0) continue;
    const int vector = column / p.slices, row = column % p.slices * kRows + in_slice;
    if (vector >= p.n_vectors || row >= p.vector) continue;
    bits |= uint32_t(static_cast<const uint16_t*>(p.values)[int64_t(vector) * p.vector + row]) << 16 * i;
  }
  store_vector(static_cast<uint32_t*>(p.fragments) + index, bits);
}

}  // namespace sparsekd::cuda
