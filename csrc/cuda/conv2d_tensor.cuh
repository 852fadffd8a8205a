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
    } else {
      // Eight bytes a lane, though more might come at once: those of two octets are the four registers in a row that
      // the instruction wants, and nothing has to move.
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const uint2 two = load_vector(reinterpret_cast<const uint2*>(from) + m * 32 + lane);
        words[m][2 * half] = two.x;
        words[m][2 * half + 1] = two.y;
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
      // Two octets are a step, for K = 16, the last one may be left for K = 8; a word has the distances of two steps.
      // What is loaded is used a step later: it has to come from L2.
      Weights<kRows> even, odd;
      unsigned distances = 0;  // in vectors
      auto load = [&](Weights<kRows>& to, int octet) {
        to.load(p.fragments, octet, 0, lane);
        to.load(p.fragments, octet + 1, 1, lane);
      };
      auto load_one = [&](Weights<kRows>& to, int first, int octet) {
        to.load(p.fragments, octet, 0, lane);
        distances = p.plan.distances[distance_word_at(first, octet - first, lane % 8)];
      };
      auto load_first = [&](int k) {
        const int octets = end[k] - begin[k];
        if (octets >= 2) {
          load(even, begin[k]);
          distances = p.plan.distances[distance_word_at(begin[k], 0, column16)];
        } else if (octets == 1) {
          load_one(even, begin[k], begin[k]);
        }
      };
      load_first(0);  // while others copy
      copy_async_wait<1>();
      __syncthreads();  // what other threads copied
      const SharedAddress base = buffer0 + first + buffer * p.buffer * 16;
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (k > 0) load_first(k);
        const int octet = begin[k], last = end[k], steps = (last - octet) / 2;
        if (block + 2 <= p.blocks && slice[k] >= 0) {
          begin[k] = p.plan.starts[int64_t(slice[k]) * (p.blocks + 1) + block + 2];
        }
        if (octet >= last) continue;
        const bool one_left = (last - octet) % 2 != 0;
        auto multiply = [&](const Weights<kRows>& weights, unsigned distance) {
          const SharedAddress row = base + (min(distance, p.most_distance) + position16) * 16;
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
        };
        int step = 0;
        for (; step + 1 < steps; step += 2) {
          load(odd, octet + 2 * step + 2);
          multiply(even, distances & 0xffff);
          const unsigned upper = distances >> 16;
          if (step + 2 < steps) {
            load(even, octet + 2 * step + 4);
            distances = p.plan.distances[distance_word_at(octet, 2 * step + 4, column16)];
          } else if (one_left) {
            load_one(even, octet, last - 1);
          }
          multiply(odd, upper);
        }
        if (step < steps) {
          const unsigned lower = distances & 0xffff;
          if (one_left) load_one(odd, octet, last - 1);
          multiply(even, lower);
          even = odd;
        }
        if (!one_left) continue;
        const unsigned distance = min(steps % 2 ? distances >> 16 : distances & 0xffff, p.most_distance);
        const SharedAddress row = base + (distance + position8) * 16;
#pragma unroll
        for (int j = 0; j < kPositions; j += 4) {
          uint32_t in[4];
          load_matrices_transposed(in, row + (runs[j / kNeighbours] + j % kNeighbours * 16));
          const auto& w = even.words;
          if constexpr (kRows == 8) {
            mma_k8<T>(sums[k][0][j / 2], in[0], in[1], w[0][0]);
            mma_k8<T>(sums[k][0][j / 2 + 1], in[2], in[3], w[0][0]);
          } else {
#pragma unroll
            for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
              for (int q = 0; q < 4; ++q) mma_k8<T>(sums[k][m][j + q], w[m][0], w[m][1], in[q]);
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
