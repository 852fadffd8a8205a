// Sparse convolution on tensor cores, for rows in groups of V >= 8 that share their columns; 16-bit values, fp32 sums.
//
// As in conv2d.cuh a block of threads stages all channels of a tile of positions and serves many output rows with it,
// where a stride sees phases of a channel each of them as a plane of its own, without those that none of the rows reads.
// Innermost are 8 lanes (images or strips), 16 bytes: a gathered column at one position is one row of an ldmatrix, whose
// address is the column's distance plus the position's. Transposed, eight of them are the 8 columns of an operand:
//
//   V >= 16:  C [16 rows x 8 lanes]      += A [16 rows x 16 columns, weights] * B [16 columns x 8 lanes, activations]
//   V = 8:    C [2 positions of 8 lanes x 8 rows] += A [the same x 16 columns, activations] * B [16 columns x 8 rows]
//
// The eight rows of a matrix are read at once when they lie in different banks, that is when their distances differ
// modulo 8 vectors. Two things see to it. Planes have an odd pitch, and in which slot each plane of a block lies is
// chosen, for each block of rows, so that the distances of each slice fall evenly into the eight residues; and each
// slice's columns are dealt out to its octets residue by residue. That is the plan of a pattern, made once by the kernels
// of conv2d_tensor_pattern.cuh; the values are put in its order at each call.
//
// Activations come as images, which to_lanes16_kernel turns, or lie in lanes as the layer before left them. Results go
// to either.
//
// The pattern's layout after Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity", SC 2021.
#pragma once
#include "conv2d_tensor_pattern.cuh"
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

// A slice in the order of the plan, which may come from anywhere.
__device__ __forceinline__ int slice_of(const TensorConv2dParams& p, int rank) {
  return min(max(p.plan.order[rank], 0), p.all_slices - 1);
}

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
    slice[k] = rank < p.slices_per_group ? slice_of(p, group * p.slices_per_group + rank) : -1;
    next[k] = slice[k] < 0 ? 0 : max(p.plan.starts[int64_t(slice[k]) * (p.blocks + 1)], 0);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[k][m][i][e] = 0.0f;
      }
    }
  }

  uint4* buffers = shared_memory<uint4>();  // [2, or 1 for all][zeros + block_planes * pitch]
  const int buffer_size = p.zeros + p.block_planes * p.pitch;
  for (int i = threadIdx.x; i < min(p.blocks, 2) * p.zeros; i += blockDim.x) {
    store_vector(buffers + i / p.zeros * buffer_size + i % p.zeros, uint4{0, 0, 0, 0});
  }
  const uint4* source = static_cast<const uint4*>(p.input) +
                        (unit * p.source_channels + int64_t(group) * p.channels_per_group) * p.source_plane;
  const int32_t* plane_at = p.plan.plane_at + int64_t(blockIdx.y) * p.planes_per_group;
  // Of a vector of a plane: its row in the upper half, its column in the lower.
  auto place_in_plane = [&](int i) { return i / p.tile_columns << 16 | i % p.tile_columns; };
  int places[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; ++j) places[j] = place_in_plane(lane + j * 32);
  const int y_begin = y0 * p.source[0].step + p.source[0].origin, x_begin = x0 * p.source[1].step + p.source[1].origin;
  const int phases = p.phases[0] * p.phases[1];
  auto stage = [&](int block) {
    const int first = block * p.block_planes;
    const int count = min(p.block_planes, p.planes_per_group - first);
    for (int i = warp; i < count; i += warps) {
      int channel = min(plane_at[first + i], p.planes_per_group - 1), y_phase = y_begin, x_phase = x_begin;
      int size = p.plane;
      if (channel < 0) continue;
      if (phases > 1) {
        const int phase = channel % phases, phase_y = phase / p.phases[1];
        channel /= phases;
        y_phase += phase_y * p.source[0].phase_step;
        x_phase += phase % p.phases[1] * p.source[1].phase_step;
        if (phase_y > p.last_whole_phase) size -= p.tile_columns;
      }
      const uint4* from = source + int64_t(channel) * p.source_plane;
      uint4* to = buffers + block % 2 * buffer_size + p.zeros + i * p.pitch;
      auto copy = [&](int to_vector, int place) {
        const int y = y_phase + (place >> 16) * p.source[0].step, x = x_phase + (place & 0xffff) * p.source[1].step;
        const bool inside = y >= 0 && y < p.source[0].limit && x >= 0 && x < p.source[1].limit;
        copy_async16(to + to_vector, from + (inside ? y * p.source_pitch + x : 0), inside);  // outside zeros
      };
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        if (lane + j * 32 < size) copy(lane + j * 32, places[j]);
      }
      for (int v = lane + kCopies * 32; v < size; v += 32) copy(v, place_in_plane(v));
    }
  };
  stage(0);
  copy_async_commit();
  if (p.blocks > 1) stage(1);
  copy_async_commit();

  // Lanes 8 * i ... 8 * i + 7 give the rows of matrix i: for K = 16 the columns of two octets at two positions, in the
  // order of the operand's words; for K = 8 of one octet at four.
  const int row_pitch = p.tile_columns;
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
      const int end = min(p.plan.starts[int64_t(slice[k]) * (p.blocks + 1) + block + 1], p.n_octets);
      next[k] = end;
      if (i >= end) continue;
      Weights<kRows> ahead;
      unsigned distance_ahead = 0;  // in vectors
      auto load = [&](int octet) {
        ahead.load(p.fragments, octet, 0, lane);
        const bool whole = octet + 1 < end;
        if (whole) ahead.load(p.fragments, octet + 1, 1, lane);
        const int distance = p.plan.distances[int64_t(octet) * 8 + (whole ? column16 : lane % 8)];
        distance_ahead = min(static_cast<unsigned>(distance), p.most_distance);
      };
      load(i);
      for (; i + 1 < end; i += 2) {
        const Weights<kRows> weights = ahead;
        const SharedAddress row = base + (distance_ahead + position16) * 16;
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
      const SharedAddress row = base + (distance_ahead + position8) * 16;
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

  // Eight rows at a time go through shared memory, each warp's to itself, from where a lane takes the 8 lanes of a row
  // and position: the buffers are free. The pitch of rows is such that what is written lies in different banks.
  constexpr int kPitch = kPositions * 8 + (kRows == 8 ? 4 : 8), kAtOnce = 32 / kPositions;
  float* results = shared_memory<float>() + warp * 64 * (kPositions + 1);  // [8 rows][kPositions][8 lanes]
  const int g = lane / 4, t = lane % 4;
  const int own = lane % kPositions, upper = own / 4 % 2;  // which half is read first, for the banks' sake
  const int place = place0 + own;
  const int row_in_strip = y0 + place / p.tile_w, column = x0 + place % p.tile_w;
  int64_t at[kLanes];  // -1: none
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const int64_t slot = unit * kLanes + i, image = p.to_lanes ? unit : slot / p.strips;
    const int64_t row = p.to_lanes ? row_in_strip : (slot - image * p.strips) * p.strip_rows + row_in_strip;
    const bool inside = row_in_strip < p.strip_rows && column < p.positions[1] && row < p.positions[0];
    at[i] = inside && (p.to_lanes || image < p.batch) ? image * p.out_n + row * p.out_h + column * p.out_w : -1;
  }
  auto finish = [&](int k, int first_row) {
    int channel_of = -1;  // of row lane % 8
    float scale_of = 1.0f, shift_of = 0.0f;
    const int rank = (row_block * p.row_warps + row_warp) * kGroups + k;
    if (rank < p.slices_per_group) {
      const int local = slice_of(p, group * p.slices_per_group + rank) - group * p.slices_per_group;
      const int in_vector = local % p.slices * kRows + first_row + lane % 8;
      const int row = local / p.slices * p.vector + in_vector;
      if (local >= 0 && in_vector < p.vector && row < p.rows_per_group) {
        channel_of = group * p.rows_per_group + row;
        if (p.row_indices) channel_of = p.row_indices[channel_of];
        if (channel_of >= p.out_channels) channel_of = -1;
      }
    }
    if (channel_of >= 0 && p.scale) scale_of = load_value(p.scale, p.dtype, channel_of);
    if (channel_of >= 0 && p.shift) shift_of = load_value(p.shift, p.dtype, channel_of);
    __syncwarp();  // results
#pragma unroll 1
    for (int i = 0; i < 8; i += kAtOnce) {
      const int r = i + lane / kPositions;
      const int channel = __shfl_sync(0xffffffffu, channel_of, r);
      const float scale = __shfl_sync(0xffffffffu, scale_of, r), shift = __shfl_sync(0xffffffffu, shift_of, r);
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
  };
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    if constexpr (kRows == 8) {  // rows 2 * t + {0, 1}, lane g, of two positions
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) results[(2 * t + e % 2) * kPitch + (2 * i + e / 2) * 8 + g] = sums[k][0][i][e];
      }
      finish(k, 0);
    } else {  // rows g and g + 8, lanes 2 * t + {0, 1}
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) {
            const float* two = &sums[k][m][i][2 * half];
            store_vector(reinterpret_cast<float2*>(results + g * kPitch + i * 8 + 2 * t), float2{two[0], two[1]});
          }
          finish(k, 16 * m + 8 * half);
        }
      }
    }
  }
}

}  // namespace sparsekd::cuda
