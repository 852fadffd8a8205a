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
// run over into the next: their places are then chosen less well.
__device__ __forceinline__ unsigned rotated(unsigned counts, int residue) {
  return residue ? counts << 4 * residue | counts >> (32 - 4 * residue) : counts;
}

// What a slice's gathers cost that has so many columns of each residue in `octets` octets: their wavefronts above all,
// and how far residues are above the mean, which prepares for less.
__device__ __forceinline__ int wavefronts_of(const int (&columns)[8], int octets) {
  int most = octets, above = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    most = max(most, columns[r]);
    const int over = max(columns[r] - octets + 1, 0);
    above += over * over;
  }
  return 64 * most + above;
}

// A block of threads per block of rows and block of planes: the order of slices, and in which slot each plane lies.
__global__ __launch_bounds__(128) void tensor_planes_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int block = blockIdx.x, group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  const int first_plane = block * p.block_planes;
  const int planes = min(p.block_planes, p.planes_per_group - first_plane);
  auto* counts = shared_memory<unsigned>();                                  // [block_slices][block_planes]
  int* sums = reinterpret_cast<int*>(counts + p.block_slices * p.block_planes);  // [block_slices][8]
  int* weights = sums + kMostSlices * 8;                                     // [block_planes]
  int* by_weight = weights + p.block_planes;                               // [block_planes]
  int* slot_in = by_weight + p.block_planes;                              // [block_planes]
  int* slices = slot_in + p.block_planes;                                 // [block_slices]
  int* best_of = slices + p.block_slices;                                    // [warps]

  for (int i = threadIdx.x; i < p.block_slices * p.block_planes; i += blockDim.x) counts[i] = 0;
  for (int i = threadIdx.x; i < kMostSlices * 8; i += blockDim.x) sums[i] = 0;
  for (int i = threadIdx.x; i < p.block_slices; i += blockDim.x) slices[i] = -1;
  __syncthreads();  // before slices are found
  // The rank of a slice is the number of slices before it.
  for (int local = threadIdx.x; local < p.slices_per_group; local += blockDim.x) {
    const int slice = group * p.slices_per_group + local;
    const Range own = range_of(p, slice / p.slices);
    int rank = 0;
    for (int i = 0; i < p.slices_per_group; ++i) {
      const int other = group * p.slices_per_group + i;
      const Range theirs = range_of(p, other / p.slices);
      const int more = (theirs.end - theirs.begin) - (own.end - own.begin);
      rank += more > 0 || (more == 0 && other < slice);
    }
    if (rank / p.block_slices != row_block) continue;
    slices[rank % p.block_slices] = slice;
    if (block == 0) p.plan.order[group * p.slices_per_group + rank] = slice;
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
      const unsigned peers = __match_any_sync(kAll, used ? plane : -1);
      const int turn_of = __popc(peers & ((1u << lane) - 1));
      // Lanes with the same plane count one after another.
      for (int turn = 0; __ballot_sync(kAll, used && turn_of >= turn) != 0; ++turn) {
        if (used && turn_of == turn) counts[i * p.block_planes + plane] += 1u << 4 * (tap.in_plane % 8);
        __syncwarp();
      }
    }
  }
  __syncthreads();  // counts
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    int weight = 0;
    for (int i = 0; i < p.block_slices; ++i) {
      const unsigned word = counts[i * p.block_planes + plane];
      for (int r = 0; r < 8; ++r) weight += word >> 4 * r & 15;
    }
    weights[plane] = weight;
  }
  __syncthreads();  // weights
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    int rank = 0;
    for (int other = 0; other < planes; ++other) {
      const int more = weights[other] - weights[plane];
      rank += more > 0 || (more == 0 && other < plane);
    }
    by_weight[rank] = plane;
  }
  __syncthreads();  // by_weight

  // Heaviest first, each plane goes to the residue that keeps the sums of squares smallest: lane r + 8 * q looks at
  // residue r and every fourth slice. Slot i begins at residue i * pitch, and an odd pitch is its own inverse modulo 8.
  const int residue = lane % 8, part = lane / 8;
  int taken = 0;  // slots of the lane's residue
  const int first_slot = residue * p.pitch % 8;
  for (int i = 0; warp == 0 && i < planes; ++i) {
    const int plane = by_weight[i];
    int cost = 0;
    for (int s = part; s < p.block_slices; s += 4) {
      const unsigned word = rotated(counts[s * p.block_planes + plane], residue);
      for (int r = 0; r < 8; ++r) cost += sums[s * 8 + r] * static_cast<int>(word >> 4 * r & 15);
    }
    cost += __shfl_xor_sync(kAll, cost, 8);
    cost += __shfl_xor_sync(kAll, cost, 16);
    const int slot = first_slot + 8 * taken;
    int best = slot < planes ? min(cost, (1 << 26) - 1) * 8 + residue : (1 << 29) + residue;
    for (int distance = 1; distance < 8; distance *= 2) best = min(best, __shfl_xor_sync(kAll, best, distance));
    const int chosen = best % 8;
    __syncwarp();  // all have read the sums
    for (int s = part; s < p.block_slices; s += 4) {
      sums[s * 8 + residue] += rotated(counts[s * p.block_planes + plane], chosen) >> 4 * residue & 15;
    }
    __syncwarp();  // before the sums are read again
    if (residue != chosen) continue;
    if (part == 0) slot_in[plane] = slot;
    ++taken;
  }
  __syncthreads();  // slot_in, sums

  // Then, twice, each plane in turn changes places with the one that this makes cheapest, if any: a thread tries one
  // other.
  for (int turn = 0; turn < 2 * planes; ++turn) {
    const int plane = turn % planes;
    const int own = slot_in[plane] * p.pitch % 8;
    int best = 0;  // the gain, negative, in its upper bits
    for (int other = threadIdx.x; other < planes; other += blockDim.x) {
      const int theirs = slot_in[other] * p.pitch % 8;
      if (theirs == own) continue;
      int gain = 0;
      for (int s = 0; s < p.block_slices; ++s) {
        const unsigned mine = counts[s * p.block_planes + plane], its = counts[s * p.block_planes + other];
        if (mine == its) continue;
        const unsigned less[] = {rotated(mine, own), rotated(its, theirs)};
        const unsigned more[] = {rotated(mine, theirs), rotated(its, own)};
        int before[8], after[8], all = 0;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int nibble = 4 * r;
          before[r] = sums[s * 8 + r];
          after[r] = before[r] + int(more[0] >> nibble & 15) + int(more[1] >> nibble & 15) -
                     int(less[0] >> nibble & 15) - int(less[1] >> nibble & 15);
          all += before[r];
        }
        gain += wavefronts_of(after, (all + 7) / 8) - wavefronts_of(before, (all + 7) / 8);
      }
      best = min(best, max(gain, -(1 << 22)) * kMostBlockPlanes + other);
    }
    for (int distance = 1; distance < 32; distance *= 2) best = min(best, __shfl_xor_sync(kAll, best, distance));
    if (lane == 0) best_of[warp] = best;
    __syncthreads();  // best_of, and all have read the sums
    for (int i = 0; i < warps; ++i) best = min(best, best_of[i]);
    if (best < 0) {
      const int other = best & (kMostBlockPlanes - 1), theirs = slot_in[other] * p.pitch % 8;
      for (int i = threadIdx.x; i < p.block_slices * 8; i += blockDim.x) {
        const unsigned* of_slice = counts + i / 8 * p.block_planes;
        const unsigned mine = of_slice[plane], its = of_slice[other];
        const int nibble = i % 8 * 4;
        sums[i] += int(rotated(mine, theirs) >> nibble & 15) + int(rotated(its, own) >> nibble & 15) -
                   int(rotated(mine, own) >> nibble & 15) - int(rotated(its, theirs) >> nibble & 15);
      }
      __syncthreads();  // all have read slot_in
      if (threadIdx.x == 0) {
        const int slot = slot_in[plane];
        slot_in[plane] = slot_in[other];
        slot_in[other] = slot;
      }
    }
    __syncthreads();  // before they are read again
  }
  const int64_t at = int64_t(blockIdx.y) * p.planes_per_group + first_plane;
  int32_t* plane_at = p.plan.plane_at + (int64_t(blockIdx.y) * p.blocks + block) * p.block_fours * 4;
  for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
    plane_at[slot_in[plane]] = weights[plane] ? first_plane + plane : -1;
    p.slot_of[at + plane] = slot_in[plane];
  }
}

// One warp per slice. Columns are sorted by block of planes and residue, and dealt out to the octets of their block:
// residue by residue, the most frequent first, to the octets that hold least. Those of a residue that has more columns
// than there are octets share octets, and go where another residue is twice already.
__global__ __launch_bounds__(128, 4) void tensor_columns_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int ranked = blockIdx.x * warps + warp;
  if (ranked >= p.row_groups * p.slices) return;  // a whole warp
  const int group = ranked / p.slices_per_group, rank = ranked % p.slices_per_group;
  const int slice = p.plan.order[ranked], row_group = slice / p.slices, part = slice % p.slices;
  const int row_block = group * p.row_blocks + rank / p.block_slices;
  const int32_t* slot_of = p.slot_of + int64_t(row_block) * p.planes_per_group;
  // [blocks][8] columns, [blocks][8] the first of them, and of each octet: columns, how often a residue is in it, by
  // rank
  int* counts = shared_memory<int>() + warp * (p.blocks * 16 + p.most_octets * 3);
  int* firsts = counts + p.blocks * 8;
  int *filled = firsts + p.blocks * 8, *most_equal = filled + p.most_octets, *by_rank = most_equal + p.most_octets;
  const Range range = range_of(p, row_group);
  int2* sorted =
      static_cast<int2*>(p.sorted) + int64_t(range.begin) * p.slices + int64_t(part) * (range.end - range.begin);

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
  int octets = before * p.slices + part * most, columns = 0;
  for (int base = 0; base < p.blocks; base += 32) {
    int mine = 0;
    if (base + lane < p.blocks) {
      for (int r = 0; r < 8; ++r) mine += counts[(base + lane) * 8 + r];
    }
    int columns_before = mine, octets_before = (mine + 7) / 8;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int from = max(lane - distance, 0);
      const int other = __shfl_sync(kAll, columns_before, from), more = __shfl_sync(kAll, octets_before, from);
      if (lane >= distance) {
        columns_before += other;
        octets_before += more;
      }
    }
    if (base + lane < p.blocks) {
      int first = columns + columns_before - mine;
      for (int r = 0; r < 8; ++r) {
        firsts[(base + lane) * 8 + r] = first;
        first += counts[(base + lane) * 8 + r];
      }
      p.plan.starts[int64_t(slice) * (p.blocks + 1) + base + lane] = octets + octets_before - (mine + 7) / 8;
    }
    columns += __shfl_sync(kAll, columns_before, 31);
    octets += __shfl_sync(kAll, octets_before, 31);
  }
  if (lane == 0) p.plan.starts[int64_t(slice) * (p.blocks + 1) + p.blocks] = octets;
  __syncwarp();
  for (int base = range.begin; base < range.end; base += 32) {
    int distance = 0;
    const int key = key_of(base + lane, distance);
    const unsigned peers = __match_any_sync(kAll, key);
    const int to = key >= 0 ? firsts[key] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();  // all have read before the first of the peers counts on
    if (key >= 0 && __ffs(peers) - 1 == lane) firsts[key] += __popc(peers);
    __syncwarp();
    if (key >= 0) store_vector(sorted + to, int2{base + lane, distance});
  }
  __syncwarp();

  for (int block = 0; block < p.blocks; ++block) {
    const int64_t first = p.plan.starts[int64_t(slice) * (p.blocks + 1) + block];
    const int all = p.plan.starts[int64_t(slice) * (p.blocks + 1) + block + 1] - static_cast<int>(first);
    const int count = min(all, p.most_octets);  // more only where a row names a column twice
    for (int i = lane; i < count; i += 32) {
      filled[i] = 0;
      most_equal[i] = 0;
    }
    __syncwarp();
    unsigned dealt = 0;
    for (int turn = 0; turn < 8; ++turn) {
      int residue = 0, left = -1;
      for (int r = 0; r < 8; ++r) {
        if (dealt >> r & 1 || counts[block * 8 + r] <= left) continue;
        residue = r;
        left = counts[block * 8 + r];
      }
      dealt |= 1u << residue;
      // `firsts` has been counted on to the end.
      const int2* from = sorted + firsts[block * 8 + residue] - left;
      for (int round = 1; left > 0; ++round) {
        // Octets with room, the best first. A lane per octet counts those before its own.
        auto worth = [&](int i) { return (most_equal[i] < round && round > 1 ? 16 : 0) + filled[i]; };
        int room = 0;
        for (int base = 0; base < count; base += 32) {
          const int i = base + lane;
          const bool open = i < count && filled[i] < 8;
          room += __popc(__ballot_sync(kAll, open));
          if (!open) continue;
          int before_it = 0;
          for (int j = 0; j < count; ++j) {
            if (filled[j] < 8) before_it += worth(j) < worth(i) || (worth(j) == worth(i) && j < i);
          }
          by_rank[before_it] = i;
        }
        __syncwarp();
        const int taken = min(left, room);
        if (taken == 0) break;
        for (int i = lane; i < taken; i += 32) {
          const int octet = by_rank[i], place = filled[octet];
          const int2 entry = load_vector(from + i);
          store_vector(distance_at(p.plan, first, octet, place), static_cast<uint16_t>(entry.y));
          store_vector(p.plan.columns + (first + octet) * 8 + place, entry.x * p.slices + part);
          filled[octet] = place + 1;
          most_equal[octet] = max(most_equal[octet], round);
        }
        __syncwarp();  // before octets are ranked again
        from += taken;
        left -= taken;
      }
    }
    // What is left of an octet points at zeros, in a bank that the octet does not use.
    for (int i = lane; i < all; i += 32) {
      const int used = i < count ? filled[i] : 0;
      unsigned residues = 0;
      for (int place = 0; place < 8; ++place) {
        if (place < used) {
          residues |= 1u << *distance_at(p.plan, first, i, place) % 8;
          continue;
        }
        const int free = __ffs(~residues) - 1;
        residues |= 1u << free;
        store_vector(distance_at(p.plan, first, i, place), static_cast<uint16_t>(free));
        store_vector(p.plan.columns + (first + i) * 8 + place, -1);
      }
    }
    __syncwarp();  // before the next block's octets
  }
}

// ---- values, at each call ----

// A thread writes one word, the values of a row at two neighbouring places of an octet:
//   8 rows:   [lane]
//   16 rows:  [lane][half of the rows]
//   more:     [pair of matrices][lane][matrix][half of the rows], so that a lane reads 16 bytes
template <int kRows>
__global__ void tensor_values_kernel(const TensorValuesParams p) {
  constexpr int kWords = kRows * 4, kTogether = kRows > 16 ? 2 : 1, kHalves = kRows > 8 ? 2 : 1;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t octet = index / kWords;
  if (octet >= p.n_octets) return;
  int word = static_cast<int>(index % kWords);
  const int half = word % kHalves;
  word /= kHalves;
  const int matrix = word / kTogether / 32 * kTogether + word % kTogether, lane = word / kTogether % 32;
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
