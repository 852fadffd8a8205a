// Sparse convolution on tensor cores, for rows in groups of V >= 8 that share their columns; 16-bit values, fp32 sums.
//
// As in conv2d.cuh a block of threads stages all channels of a tile of positions and serves many output rows with it.
// Innermost are 8 lanes (images or strips), 16 bytes: a gathered column at one position is one row of an ldmatrix, whose
// address is the column's distance plus the position's. Transposed, eight of them are the 8 columns of an operand:
//
//   V >= 16:  C [16 rows x 8 lanes]      += A [16 rows x 16 columns, weights] * B [16 columns x 8 lanes, activations]
//   V = 8:    C [2 positions of 8 lanes x 8 rows] += A [the same x 16 columns, activations] * B [16 columns x 8 rows]
//
// The eight rows of a matrix are read at once when they lie in different banks, that is when their distances differ
// modulo 8 vectors. Two things see to it. Planes have an odd pitch, and which channel of a block lies in which plane is
// chosen, for each block of rows, so that the distances of each slice fall evenly into the eight residues; and each
// slice's columns are dealt out to its octets residue by residue.
//
// The pattern's layout after Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity", SC 2021.
#pragma once
#include "conv2d.cuh"
#include "conv2d_tensor.h"
#include "mma.cuh"

namespace sparsekd::cuda {

// ---- activations to lanes of 16 bits ----

__global__ void to_lanes16_kernel(const ToLanes16Params p) {
  const Lanes& lanes = p.lanes;
  const int64_t vectors = int64_t(lanes.units) * lanes.channels * lanes.plane;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= vectors) return;
  int64_t unit, place;
  int channel;
  if (p.channels_last) {
    channel = static_cast<int>(index % lanes.channels);
    place = index / lanes.channels % lanes.plane;
    unit = index / lanes.channels / lanes.plane;
  } else {
    place = index % lanes.plane;
    channel = static_cast<int>(index / lanes.plane % lanes.channels);
    unit = index / lanes.plane / lanes.channels;
  }
  int rest = static_cast<int>(place);
  const int column = rest % lanes.columns;
  rest /= lanes.columns;
  const int x = column * p.axes[1].stride + rest % lanes.phases[1] + p.axes[1].origin;
  rest /= lanes.phases[1];
  const int row = rest % lanes.rows, phase_y = rest / lanes.rows;

  const auto* source = static_cast<const uint16_t*>(p.source) + channel * p.stride_c + x * p.stride_w;
  uint32_t words[kLanes / 2];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t slot = unit * kLanes + lane;
    const int64_t image = slot / lanes.strips, strip = slot - image * lanes.strips;
    const int64_t y = (strip * lanes.strip_rows + row) * p.axes[0].stride + phase_y + p.axes[0].origin;
    const bool inside = image < lanes.batch && y >= 0 && y < p.axes[0].size && x >= 0 && x < p.axes[1].size;
    const uint32_t bits = inside ? source[image * p.stride_n + y * p.stride_h] : 0;
    words[lane / 2] = lane % 2 ? words[lane / 2] | bits << 16 : bits;
  }
  const int64_t to = (unit * lanes.channels + channel) * lanes.plane + place;
  store_vector(static_cast<uint4*>(p.to) + to, uint4{words[0], words[1], words[2], words[3]});
}

// ---- the pattern ----

// Of an entry: its channel, and its distance in vectors within a plane. channel -1: not one that `pack` makes.
struct Tap {
  int channel, in_plane;
};

__device__ __forceinline__ Tap tap_at(const TensorPatternParams& p, int column) {
  const int kernel_w = p.axes[1].kernel, taps = p.axes[0].kernel * kernel_w;
  if (column < 0 || column >= p.channels_per_group * taps) return {-1, 0};
  int phase_y, phase_x, y, x;
  if (!tap_of(p.axes[0], column % taps / kernel_w, phase_y, y)) return {-1, 0};
  if (!tap_of(p.axes[1], column % taps % kernel_w, phase_x, x)) return {-1, 0};
  return {column / taps, ((phase_y * p.tile_rows + y) * p.phases_x + phase_x) * p.tile_columns + x};
}

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(const TensorPatternParams& p, int row_group) {
  const int begin = min(max(p.crow[row_group], 0), p.n_vectors);
  return {begin, min(max(p.crow[row_group + 1], begin), p.n_vectors)};
}

// How often each residue modulo 8 occurs among a channel's taps, four bits each. More than 15, of very large kernels,
// run over into the next: the planes are then chosen less well.
__device__ __forceinline__ unsigned rotated(unsigned counts, int residue) {
  return residue ? counts << 4 * residue | counts >> (32 - 4 * residue) : counts;
}

// A block of threads per block of rows and block of channels: the order of slices, and which channel lies in which plane.
__global__ __launch_bounds__(128) void tensor_planes_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int block = blockIdx.x, group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  const int first_channel = block * p.block_channels;
  const int channels = min(p.block_channels, p.channels_per_group - first_channel);
  auto* counts = shared_memory<unsigned>();                                  // [block_slices][block_channels]
  int* sums = reinterpret_cast<int*>(counts + p.block_slices * p.block_channels);  // [block_slices][8]
  int* weights = sums + kMostSlices * 8;                                     // [block_channels]
  int* by_weight = weights + p.block_channels;                               // [block_channels]
  int* slices = by_weight + p.block_channels;                                // [block_slices]

  for (int i = threadIdx.x; i < p.block_slices * p.block_channels; i += blockDim.x) counts[i] = 0;
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
    if (block == 0) p.order[group * p.slices_per_group + rank] = slice;
  }
  __syncthreads();  // slices, and counts of zero

  for (int i = warp; i < p.block_slices; i += warps) {
    if (slices[i] < 0) continue;
    const Range range = range_of(p, slices[i] / p.slices);
    for (int base = range.begin; base < range.end; base += 32) {
      Tap tap{-1, 0};
      if (base + lane < range.end) tap = tap_at(p, p.col[base + lane]);
      const int channel = tap.channel - first_channel;
      const bool used = tap.channel >= 0 && channel >= 0 && channel < channels;
      const unsigned peers = __match_any_sync(kAll, used ? channel : -1);
      const int turn_of = __popc(peers & ((1u << lane) - 1));
      // Lanes with the same channel count one after another.
      for (int turn = 0; __ballot_sync(kAll, used && turn_of >= turn) != 0; ++turn) {
        if (used && turn_of == turn) counts[i * p.block_channels + channel] += 1u << 4 * (tap.in_plane % 8);
        __syncwarp();
      }
    }
  }
  __syncthreads();  // counts
  for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
    int weight = 0;
    for (int i = 0; i < p.block_slices; ++i) {
      const unsigned word = counts[i * p.block_channels + channel];
      for (int r = 0; r < 8; ++r) weight += word >> 4 * r & 15;
    }
    weights[channel] = weight;
  }
  __syncthreads();  // weights
  for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
    int rank = 0;
    for (int other = 0; other < channels; ++other) {
      const int more = weights[other] - weights[channel];
      rank += more > 0 || (more == 0 && other < channel);
    }
    by_weight[rank] = channel;
  }
  __syncthreads();  // by_weight
  if (warp != 0) return;

  // Heaviest first, each channel goes to the residue that keeps the sums of squares smallest: lane r + 8 * q looks at
  // residue r and every fourth slice. Plane i begins at residue i * pitch, and an odd pitch is its own inverse modulo 8.
  const int residue = lane % 8, part = lane / 8;
  int taken = 0;  // planes of the lane's residue
  const int first_plane = residue * p.pitch % 8;
  const int64_t at = int64_t(blockIdx.y) * p.channels_per_group + first_channel;
  for (int i = 0; i < channels; ++i) {
    const int channel = by_weight[i];
    int cost = 0;
    for (int s = part; s < p.block_slices; s += 4) {
      const unsigned word = rotated(counts[s * p.block_channels + channel], residue);
      for (int r = 0; r < 8; ++r) cost += sums[s * 8 + r] * static_cast<int>(word >> 4 * r & 15);
    }
    cost += __shfl_xor_sync(kAll, cost, 8);
    cost += __shfl_xor_sync(kAll, cost, 16);
    const int plane = first_plane + 8 * taken;
    int best = plane < channels ? min(cost, (1 << 26) - 1) * 8 + residue : (1 << 29) + residue;
    for (int distance = 1; distance < 8; distance *= 2) best = min(best, __shfl_xor_sync(kAll, best, distance));
    const int chosen = best % 8;
    __syncwarp();  // all have read the sums
    for (int s = part; s < p.block_slices; s += 4) {
      sums[s * 8 + residue] += rotated(counts[s * p.block_channels + channel], chosen) >> 4 * residue & 15;
    }
    __syncwarp();  // before the sums are read again
    if (residue != chosen) continue;
    if (part == 0) {
      p.channel_at[at + plane] = first_channel + channel;
      p.slot_of[at + channel] = plane;
    }
    ++taken;
  }
}

// Where the value of a row and a place of an octet lies among its fragments.
template <int kRows>
__device__ __forceinline__ int fragment_place(int row, int place) {
  const int lane = row % 8 * 4 + place / 2;
  if constexpr (kRows == 8) {
    return lane * 2 + place % 2;
  } else {
    // Two matrices of 16 rows lie together, so that a lane reads 16 bytes.
    constexpr int kTogether = kRows == 16 ? 1 : 2;
    const int matrix = row / 16;
    return ((matrix / kTogether * 32 + lane) * kTogether + matrix % kTogether) * 4 + row % 16 / 8 * 2 + place % 2;
  }
}

// One warp per slice. Columns are sorted by block of channels and residue, and dealt out to the octets of their block:
// residue by residue, the most frequent first, to the octets that hold least. Those of a residue that has more columns
// than there are octets share octets, and go where another residue is twice already.
template <int kRows>
__global__ __launch_bounds__(128, 4) void tensor_fragments_kernel(const TensorPatternParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int ranked = blockIdx.x * warps + warp;
  if (ranked >= p.row_groups * p.slices) return;  // a whole warp
  const int group = ranked / p.slices_per_group, rank = ranked % p.slices_per_group;
  const int slice = p.order[ranked], row_group = slice / p.slices, part = slice % p.slices;
  const int row_block = group * p.row_blocks + rank / p.block_slices;
  const int32_t* slot_of = p.slot_of + int64_t(row_block) * p.channels_per_group;
  // [blocks][8] columns, [blocks][8] the first of them, and of each octet: columns, how often a residue is in it, by rank
  int* counts = shared_memory<int>() + warp * (p.blocks * 16 + p.most_octets * 3);
  int* firsts = counts + p.blocks * 8;
  int *filled = firsts + p.blocks * 8, *most_equal = filled + p.most_octets, *by_rank = most_equal + p.most_octets;
  const Range range = range_of(p, row_group);
  int2* sorted = static_cast<int2*>(p.sorted) + int64_t(range.begin) * p.slices + int64_t(part) * (range.end - range.begin);

  auto key_of = [&](int i, int& distance) {
    const Tap tap = i < range.end ? tap_at(p, p.col[i]) : Tap{-1, 0};
    if (tap.channel < 0) return -1;
    distance = kZeros + slot_of[tap.channel] * p.pitch + tap.in_plane;
    return tap.channel / p.block_channels * 8 + distance % 8;
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
      p.starts[int64_t(slice) * (p.blocks + 1) + base + lane] = octets + octets_before - (mine + 7) / 8;
    }
    columns += __shfl_sync(kAll, columns_before, 31);
    octets += __shfl_sync(kAll, octets_before, 31);
  }
  if (lane == 0) p.starts[int64_t(slice) * (p.blocks + 1) + p.blocks] = octets;
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

  auto* fragments = static_cast<uint16_t*>(p.fragments);
  const auto* values = static_cast<const uint16_t*>(p.values);
  for (int block = 0; block < p.blocks; ++block) {
    const int64_t first = p.starts[int64_t(slice) * (p.blocks + 1) + block];
    const int all = p.starts[int64_t(slice) * (p.blocks + 1) + block + 1] - static_cast<int>(first);
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
          store_vector(p.distances + (first + octet) * 8 + place, entry.y * 16);
          for (int r = 0; r < kRows; ++r) {
            const int row = part * kRows + r;
            const uint16_t bits = row < p.vector ? values[int64_t(entry.x) * p.vector + row] : 0;
            store_vector(fragments + (first + octet) * kRows * 8 + fragment_place<kRows>(r, place), bits);
          }
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
        int32_t* distance = p.distances + (first + i) * 8 + place;
        if (place < used) {
          residues |= 1u << *distance / 16 % 8;
          continue;
        }
        const int free = __ffs(~residues) - 1;
        residues |= 1u << free;
        store_vector(distance, free * 16);
        for (int r = 0; r < kRows; ++r) {
          store_vector(fragments + (first + i) * kRows * 8 + fragment_place<kRows>(r, place), uint16_t{0});
        }
      }
    }
    __syncwarp();  // before the next block's octets
  }
}

// ---- the convolution ----

// The weights of one or two octets, as a lane holds them: words of the operand for K = 16.
template <int kRows>
struct Weights {
  static constexpr int kMatrices = kRows == 8 ? 1 : kRows / 16, kWords = kRows == 8 ? 2 : 4;
  uint32_t words[kMatrices][kWords];

  __device__ __forceinline__ void load(const void* fragments, int octet, int half, int lane) {
    const auto* from = static_cast<const uint16_t*>(fragments) + int64_t(octet) * kRows * 8;
    if constexpr (kRows == 8) {
      words[0][half] = load_vector(reinterpret_cast<const uint32_t*>(from) + lane);
    } else if constexpr (kRows == 16) {
      const uint2 two = load_vector(reinterpret_cast<const uint2*>(from) + lane);
      words[0][2 * half] = two.x;
      words[0][2 * half + 1] = two.y;
    } else {
#pragma unroll
      for (int m = 0; m < kMatrices; m += 2) {
        const uint4 four = load_vector(reinterpret_cast<const uint4*>(from) + m / 2 * 32 + lane);
        words[m][2 * half] = four.x;
        words[m][2 * half + 1] = four.y;
        words[m + 1][2 * half] = four.z;
        words[m + 1][2 * half + 1] = four.w;
      }
    }
  }
};

template <class T, int kRows, int kGroups, int kPositions, int kRun>
__global__ __launch_bounds__(32 * kTensorWarps) void conv2d_tensor_kernel(const TensorConv2dParams p) {
  constexpr int kMatrices = Weights<kRows>::kMatrices;
  // Of one matrix of sums: 8 lanes of a position, or of two.
  constexpr int kPlaces = kRows == 8 ? kPositions / 2 : kPositions;
  constexpr int kCopies = 6;  // of a lane, of a staged plane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int row_warp = warp % p.row_warps, position_warp = warp / p.row_warps;
  const int tile = blockIdx.x % (p.tiles_h * p.tiles_w);
  const int64_t unit = blockIdx.x / (p.tiles_h * p.tiles_w);
  const int y0 = tile / p.tiles_w * p.tile_h, x0 = tile % p.tiles_w * p.tile_w;
  const int group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;

  float sums[kGroups][kMatrices][kPlaces][4];
  int slice[kGroups], next[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const int rank = (row_block * p.row_warps + row_warp) * kGroups + k;
    slice[k] = rank < p.slices_per_group ? p.order[group * p.slices_per_group + rank] : -1;
    next[k] = slice[k] < 0 ? 0 : p.starts[int64_t(slice[k]) * (p.blocks + 1)];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[k][m][i][e] = 0.0f;
      }
    }
  }

  uint4* buffers = shared_memory<uint4>();  // [2][kZeros + block_channels * pitch]
  const int buffer_size = kZeros + p.block_channels * p.pitch;
  if (threadIdx.x < 2 * kZeros) {
    store_vector(buffers + threadIdx.x / kZeros * buffer_size + threadIdx.x % kZeros, uint4{0, 0, 0, 0});
  }
  const uint4* source = static_cast<const uint4*>(p.input) +
                        (unit * p.lanes.channels + int64_t(group) * p.channels_per_group) * p.lanes.plane;
  const int32_t* channel_at = p.channel_at + int64_t(blockIdx.y) * p.channels_per_group;
  auto source_of = [&](int position) {
    const int column = x0 + position % p.tile_columns;
    int rest = position / p.tile_columns;
    const int phase_x = rest % p.lanes.phases[1];
    rest /= p.lanes.phases[1];
    const int row = y0 + rest % p.tile_rows, phase_y = rest / p.tile_rows;
    if (column >= p.lanes.columns || row >= p.lanes.rows) return -1;  // zeros
    return ((phase_y * p.lanes.rows + row) * p.lanes.phases[1] + phase_x) * p.lanes.columns + column;
  };
  int from_lane[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; ++j) from_lane[j] = lane + j * 32 < p.plane ? source_of(lane + j * 32) : -2;
  auto stage = [&](int block) {
    const int first = block * p.block_channels;
    const int count = min(p.block_channels, p.channels_per_group - first);
    for (int i = warp; i < count; i += warps) {
      const uint4* from = source + int64_t(channel_at[first + i]) * p.lanes.plane;
      uint4* to = buffers + block % 2 * buffer_size + kZeros + i * p.pitch;
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        if (from_lane[j] != -2) copy_async16(to + lane + j * 32, from + max(from_lane[j], 0), from_lane[j] >= 0);
      }
      for (int position = lane + kCopies * 32; position < p.plane; position += 32) {
        const int at = source_of(position);
        copy_async16(to + position, from + max(at, 0), at >= 0);
      }
    }
  };
  stage(0);
  copy_async_commit();
  if (p.blocks > 1) stage(1);
  copy_async_commit();

  // Lanes 8 * i ... 8 * i + 7 give the rows of matrix i: for K = 16 the columns of two octets at two positions, in the
  // order of the operand's words; for K = 8 of one octet at four.
  const int row_pitch = p.lanes.phases[1] * p.tile_columns;
  const int column16 = kRows == 8 ? lane % 8 + lane / 16 * 8 : lane % 16;
  const int position16 = kRows == 8 ? lane / 8 % 2 : lane / 16, position8 = lane / 8;
  const int place0 = position_warp * kPositions;
  const int corner = place0 / p.tile_w * row_pitch + place0 % p.tile_w;
  const SharedAddress buffer0 = shared_address(buffers + corner);
  for (int block = 0; block < p.blocks; ++block) {
    copy_async_wait<1>();
    __syncthreads();  // what other threads copied
    const SharedAddress base = buffer0 + block % 2 * buffer_size * 16;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (slice[k] < 0) continue;
      int i = next[k];
      const int end = min(p.starts[int64_t(slice[k]) * (p.blocks + 1) + block + 1], p.n_octets);
      next[k] = end;
      if (i >= end) continue;
      Weights<kRows> ahead;
      int distance_ahead = 0;
      auto load = [&](int octet) {
        ahead.load(p.fragments, octet, 0, lane);
        const bool whole = octet + 1 < end;
        if (whole) ahead.load(p.fragments, octet + 1, 1, lane);
        distance_ahead = p.distances[int64_t(octet) * 8 + (whole ? column16 : lane % 8)];
      };
      load(i);
      for (; i + 1 < end; i += 2) {
        const Weights<kRows> weights = ahead;
        const SharedAddress row = base + distance_ahead + position16 * 16;
        if (i + 2 < end) load(i + 2);  // while these are used
#pragma unroll
        for (int j = 0; j < kPositions; j += 2) {
          uint32_t in[4];
          load_matrices_transposed(in, row + (j / kRun * row_pitch + j % kRun) * 16);
          if constexpr (kRows == 8) {
            mma_k16<T>(sums[k][0][j / 2], in[0], in[1], in[2], in[3], weights.words[0][0], weights.words[0][1]);
          } else {
#pragma unroll
            for (int m = 0; m < kMatrices; ++m) {
              const uint32_t* w = weights.words[m];
              mma_k16<T>(sums[k][m][j], w[0], w[1], w[2], w[3], in[0], in[1]);
              mma_k16<T>(sums[k][m][j + 1], w[0], w[1], w[2], w[3], in[2], in[3]);
            }
          }
        }
      }
      if (i >= end) continue;
      const SharedAddress row = base + distance_ahead + position8 * 16;
#pragma unroll
      for (int j = 0; j < kPositions; j += 4) {
        uint32_t in[4];
        load_matrices_transposed(in, row + (j / kRun * row_pitch + j % kRun) * 16);
        if constexpr (kRows == 8) {
          mma_k8<T>(sums[k][0][j / 2], in[0], in[1], ahead.words[0][0]);
          mma_k8<T>(sums[k][0][j / 2 + 1], in[2], in[3], ahead.words[0][0]);
        } else {
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
            for (int q = 0; q < 4; ++q) mma_k8<T>(sums[k][m][j + q], ahead.words[m][0], ahead.words[m][1], in[q]);
          }
        }
      }
    }
    __syncthreads();  // before the buffer is filled again
    if (block + 2 < p.blocks) stage(block + 2);
    copy_async_commit();
  }
  copy_async_wait<0>();

  // Eight rows at a time go through shared memory, each warp's to itself, from where a lane takes one position's: the
  // buffers are free.
  constexpr int kPitch = kPositions + 1, kAtOnce = 32 / kPositions;  // lanes of the layout that a warp writes at once
  float* results = shared_memory<float>() + warp * 64 * kPitch;      // [8 rows][8 lanes][kPitch]
  const int g = lane / 4, t = lane % 4;
  const int place = place0 + lane % kPositions;
  const int row_in_strip = y0 + place / p.tile_w, column = x0 + place % p.tile_w;
  const bool in_plane = row_in_strip < p.lanes.strip_rows && column < p.axes[1].positions;
  const int64_t at_x = (int64_t(column) * p.axes[1].out_step + p.axes[1].out_begin) * p.out_w;
  auto finish = [&](int k, int first_row) {
    int channel_of = -1;  // of row lane % 8
    float scale_of = 1.0f, shift_of = 0.0f;
    const int rank = (row_block * p.row_warps + row_warp) * kGroups + k;
    if (rank < p.slices_per_group) {
      const int local = p.order[group * p.slices_per_group + rank] - group * p.slices_per_group;
      const int in_vector = local % p.slices * kRows + first_row + lane % 8;
      const int row = local / p.slices * p.vector + in_vector;
      if (in_vector < p.vector && row < p.rows_per_group) {
        channel_of = group * p.rows_per_group + row;
        if (p.row_indices) channel_of = p.row_indices[channel_of];
        if (channel_of >= p.out_channels) channel_of = -1;
      }
    }
    if (channel_of >= 0 && p.scale) scale_of = load_value(p.scale, p.dtype, channel_of);
    if (channel_of >= 0 && p.shift) shift_of = load_value(p.shift, p.dtype, channel_of);
    __syncwarp();  // results
#pragma unroll 1
    for (int i = 0; i < kLanes; i += kAtOnce) {
      const int in_lanes = i + lane / kPositions;
      const int64_t slot = unit * kLanes + in_lanes;
      const int64_t image = slot / p.lanes.strips;
      const int64_t row = (slot - image * p.lanes.strips) * p.lanes.strip_rows + row_in_strip;
      const bool inside = in_plane && image < p.lanes.batch && row < p.axes[0].positions;
      const int64_t at = image * p.out_n + (row * p.axes[0].out_step + p.axes[0].out_begin) * p.out_h + at_x;
#pragma unroll 1
      for (int r = 0; r < 8; ++r) {
        const int channel = __shfl_sync(0xffffffffu, channel_of, r);
        const float scale = __shfl_sync(0xffffffffu, scale_of, r), shift = __shfl_sync(0xffffffffu, shift_of, r);
        if (!inside || channel < 0) continue;
        float result = results[(r * kLanes + in_lanes) * kPitch + lane % kPositions] * scale + shift;
        if (p.residual) result += load_value(p.residual, p.dtype, at + channel * p.out_c);
        store_value(p.output, p.dtype, at + channel * p.out_c, activate(result, p.activation));
      }
    }
    __syncwarp();  // before the next results
  };
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    if constexpr (kRows == 8) {  // rows 2 * t + {0, 1}, lane g, of two positions
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          results[((2 * t + e % 2) * kLanes + g) * kPitch + 2 * i + e / 2] = sums[k][0][i][e];
        }
      }
      finish(k, 0);
    } else {  // rows g and g + 8, lanes 2 * t + {0, 1}
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              results[(g * kLanes + 2 * t + e) * kPitch + i] = sums[k][m][i][2 * half + e];
            }
          }
          finish(k, 16 * m + 8 * half);
        }
      }
    }
  }
}

}  // namespace sparsekd::cuda
