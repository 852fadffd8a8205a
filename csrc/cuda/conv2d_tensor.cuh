// Sparse convolution on tensor cores, for rows in groups of V >= 8 that share their columns; 16-bit values, fp32 sums.
//
// As in conv2d.cuh a block of threads stages all channels of a tile of positions and serves many output rows with it,
// where a stride sees phases of a channel each of them as a plane of its own, without those that none of the rows
// reads. Innermost are 8 lanes (images or strips), 16 bytes: a gathered column at one position is one row of an
// ldmatrix, whose address is the column's distance plus the position's. Transposed, eight of them are the 8 columns of
// an operand:
//
//   V >= 16:  C [16 rows x 8 lanes]      += A [16 rows x 16 columns, weights] * B [16 columns x 8 lanes, activations]
//   V = 8:    C [2 positions of 8 lanes x 8 rows] += A [the same x 16 columns, activations] * B [16 columns x 8 rows]
//
// The eight rows of a matrix are read at once when they lie in different banks, that is when their distances differ
// modulo 8 vectors. Two things see to it. Planes have an odd pitch, and in which slot each plane of a block lies is
// chosen, for each block of rows, so that the distances of each slice fall evenly into the eight residues; and each
// slice's columns are dealt out to its octets residue by residue. That is the plan of a pattern, made once by the
// kernels of conv2d_tensor_pattern.cuh; the values are put in its order at each call.
//
// Activations come as images, which to_lanes16_kernel turns, or lie in lanes as the layer before left them. Results go
// to either.
//
// The pattern's layout after Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity", SC 2021.
#pragma once
#include "conv2d_tensor_finish.cuh"
#include "conv2d_tensor_pattern.cuh"
#include "conv2d_tensor_stage.cuh"
#include "mma.cuh"

namespace sparsekd::cuda {

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

// Where a place of a tile lies in a staged plane, in vectors.
__device__ __forceinline__ int in_plane(const TensorConv2dParams& p, int shift, int place) {
  const Divided row = divided(shift + place, p.row_places);
  return row.quotient * p.tile_columns.by + row.rest - shift;
}

template <class T, int kRows, int kGroups, int kPositions>
__global__ __launch_bounds__(32 * kTensorWarps) void conv2d_tensor_kernel(const TensorConv2dParams p) {
  needs_tensor_cores();
  constexpr int kMatrices = Weights<kRows>::kMatrices;
  // Of one matrix of sums: 8 lanes of a position, or of two.
  constexpr int kPlaces = kRows == 8 ? kPositions / 2 : kPositions;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_warp = warp % p.row_warps, place0 = warp / p.row_warps * kPositions;
  const int group = blockIdx.y / p.row_blocks, row_block = blockIdx.y % p.row_blocks;
  const int first_rank = (row_block * p.row_warps + row_warp) * kGroups;
  int slice[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const int rank = first_rank + k;
    slice[k] = rank < p.slices_per_group ? slice_of(p, group * p.slices_per_group + rank) : -1;
  }

  uint4* buffers = shared_memory<uint4>();  // [2, or 1 for all][zeros, then planes]
  const bool one = p.blocks == 1;
  for (int i = threadIdx.x; i < (one ? 1 : 2) * p.zeros; i += blockDim.x) {
    store_vector(buffers + i / p.zeros * p.buffer + i % p.zeros, uint4{0, 0, 0, 0});
  }
  Stager stager(p, buffers);
#pragma unroll 1
  for (int i = 0; i < (one ? 1 : 2); ++i) stager.next();

  // What the block's rows need at the end of each tile, behind the buffers: found once, as one load waits for another.
  auto* ends = reinterpret_cast<TensorRowEnd*>(buffers + (one ? 1 : 2) * p.buffer);
  for (int i = threadIdx.x; i < p.row_warps * kGroups * kRows; i += blockDim.x) {
    const int rank = row_block * p.row_warps * kGroups + i / kRows;
    store_vector(ends + i, row_end_of(p, group, rank, i % kRows, kRows));
  }
  ends += row_warp * kGroups * kRows;

  // Lanes 8 * i ... 8 * i + 7 give the rows of matrix i: for K = 16 the columns of two octets at two positions, in the
  // order of the operand's words; for K = 8 of one octet at four.
  const int column16 = kRows == 8 ? lane % 8 + lane / 16 * 8 : lane % 16;
  const int position16 = kRows == 8 ? lane / 8 % 2 : lane / 16, position8 = lane / 8;
  const SharedAddress buffer0 = shared_address(buffers);
  int buffer = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    // A warp's first position, and from it on to the others that begin a run of neighbours, in bytes.
    const int shift = place_of(p, tile).shift;
    const int first = in_plane(p, shift, place0) * 16;
    int runs[kPositions / kNeighbours];
#pragma unroll
    for (int i = 0; i < kPositions / kNeighbours; ++i) {
      runs[i] = in_plane(p, shift, place0 + i * kNeighbours) * 16 - first;
    }
    float sums[kGroups][kMatrices][kPlaces][4];
    // A slice's octets of this block of planes, and where those of the next end, which is loaded while these are used.
    int begin[kGroups], end[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      end[k] = slice[k] < 0 ? 0 : max(p.plan.starts[int64_t(slice[k]) * (p.blocks + 1)], 0);
      begin[k] = slice[k] < 0 ? 0 : p.plan.starts[int64_t(slice[k]) * (p.blocks + 1) + 1];
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[k][m][i][e] = 0.0f;
        }
      }
    }
    for (int block = 0; block < p.blocks; ++block) {
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        const int next = min(max(begin[k], 0), p.n_octets);
        begin[k] = end[k];
        end[k] = next;
      }
      const uint32_t* four = nullptr;
      bool upper = true;
      Weights<kRows> ahead;
      unsigned distances = 0, distance_ahead = 0;  // in vectors
      auto load = [&](int octet, int last) {
        ahead.load(p.fragments, octet, 0, lane);
        const bool whole = octet + 1 < last;
        if (whole) ahead.load(p.fragments, octet + 1, 1, lane);
        upper = !upper;
        if (!upper) four += distance_word_at(0, 4, 0);
        if (!upper || !whole) distances = four[whole ? column16 : lane % 8];
        distance_ahead = min(upper ? distances >> 16 : distances & 0xffff, p.most_distance);
      };
      auto load_first = [&](int k) {
        four = p.plan.distances + distance_word_at(begin[k], -4, 0);
        upper = true;
        if (begin[k] < end[k]) load(begin[k], end[k]);
      };
      load_first(0);  // while others copy
      copy_async_wait<1>();
      __syncthreads();  // what other threads copied
      const SharedAddress base = buffer0 + first + buffer * p.buffer * 16;
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (k > 0) load_first(k);
        int i = begin[k];
        const int last = end[k];
        if (block + 2 <= p.blocks && slice[k] >= 0) {
          begin[k] = p.plan.starts[int64_t(slice[k]) * (p.blocks + 1) + block + 2];
        }
        if (i >= last) continue;
        for (; i + 1 < last; i += 2) {
          const Weights<kRows> weights = ahead;
          const SharedAddress row = base + (distance_ahead + position16) * 16;
          if (i + 2 < last) load(i + 2, last);  // while these are used
#pragma unroll
          for (int j = 0; j < kPositions; j += 2) {
            uint32_t in[4];
            load_matrices_transposed(in, row + (runs[j / kNeighbours] + j % kNeighbours * 16));
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
        if (i >= last) continue;
        const SharedAddress row = base + (distance_ahead + position8) * 16;
#pragma unroll
        for (int j = 0; j < kPositions; j += 4) {
          uint32_t in[4];
          load_matrices_transposed(in, row + (runs[j / kNeighbours] + j % kNeighbours * 16));
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
      stager.next();
      if (!one) buffer ^= 1;
    }
    using Finish = Finisher<T, kRows, kGroups, kPositions>;
    Finish{p, ends, p.slices_per_group - first_rank}.run(place_of(p, tile), place0, sums);
  }
  copy_async_wait<0>();
}

}  // namespace sparsekd::cuda
