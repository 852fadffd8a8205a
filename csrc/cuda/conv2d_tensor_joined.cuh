// The end of the convolution on tensor cores (conv2d_tensor.cuh) where stretches are whole rows and go to images: of
// each image, or strip of one, a tile's results are one run of memory, which is stored by whole sectors. Strips that a
// tile takes whole lie one behind the other, too.
#pragma once
#include "conv2d_tensor_finish.cuh"

namespace sparsekd::cuda {

// Results of a strip before a place of it: row y, `in_row` places behind its begin.
__device__ __forceinline__ int results_before(const TensorConv2dParams& p, int y, int in_row) {
  return y * p.tile_w + min(in_row, p.tile_w);
}

// Of such results on their way, where a row of a block of threads begins.
__device__ __forceinline__ int row_at(const TensorConv2dParams& p, int row) {
  return row * p.row_pitch + row / 4 * p.four_pitch;
}

// Some rows of all warps at a time go through shared memory, [rows of a block's warps][8 lanes][results of the tile],
// from where each warp takes some rows and lanes. The pitches are such that what is written lies in different banks.
template <class T, int kRows, int kGroups, int kPositions>
struct JoinedFinisher {
  static constexpr int kMatrices = kRows == 8 ? 1 : kRows / 16, kPlaces = kRows == 8 ? kPositions / 2 : kPositions;
  static constexpr int kTogether = joined_rows(kPositions);  // rows of a warp
  static constexpr int kParts = 8 / kTogether, kSteps = kGroups * (kRows / 8) * kParts;
  const TensorConv2dParams& p;
  float* results;
  int group;

  // Each position's result goes to where the output has it, within the tile; those between rows are left out.
  template <int kStep>
  __device__ __forceinline__ void write(float* to, int place, int shift,
                                        const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    constexpr int kPart = kStep % kParts, kHalf = kStep / kParts % (kRows / 8), k = kStep / kParts / (kRows / 8);
    // A lane has rows 2 * t + {0, 1} and lane g of two positions, or row g (and g + 8) and lanes 2 * t + {0, 1} of one.
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int own_row = kRows == 8 ? 2 * t : g, own_lane = kRows == 8 ? g : 2 * t;
    const int next = kRows == 8 ? p.row_pitch : p.lane_pitch;  // from the first to the second of its two
    const bool mine = own_row / kTogether == kPart;
    float* own = to + row_at(p, own_row % kTogether) + own_lane * p.lane_pitch;
    int row = (shift + place) / p.row_places, column = (shift + place) % p.row_places;
    const int before = results_before(p, 0, shift);
#pragma unroll
    for (int i = 0; i < kPositions; ++i) {
      const int at = row * p.tile_w + column - before;
      if (column < p.tile_w && at < p.lane_pitch) {  // there may be places behind the last row
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum;
          if constexpr (kRows == 8) {
            sum = sums[k][0][i / 2][i % 2 * 2 + e];
          } else {
            sum = sums[k][kHalf / 2][i][kHalf % 2 * 2 + e];
          }
          store_vector(own + at + e * next, sum, mine);
        }
      }
      if (++column == p.row_places) ++row, column = 0;
    }
  }

  // Rows `first_row` ... of slice k of each warp.
  __device__ __forceinline__ void store(const TilePlace& tile, int k, int first_row) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, position_warps = blockDim.x / 32 / p.row_warps;
    const int row_block = blockIdx.y % p.row_blocks;
    // A warp takes so many pairs of a row and lane, of at most eight rows: lane i of it knows the i-th.
    const int each = kTogether * kLanes / position_warps, begin = warp * each, first = begin / kLanes;
    const int own = first + lane % 8, row_warp = own / kTogether;
    const bool there = row_warp < p.row_warps;
    const TensorRowEnd end(p, group, there ? (row_block * p.row_warps + row_warp) * kGroups + k : p.slices_per_group,
                           first_row + own % kTogether, kRows);
    const int width = p.tile_w, strip = p.strip_rows * width, after = tile.shift + p.places;
    const int first_result = results_before(p, tile.y, tile.shift);
    const int end_result = results_before(p, tile.y + after / p.row_places, after % p.row_places);
#pragma unroll 1
    for (int pair = begin; pair < begin + each; ++pair) {
      const int row = pair / kLanes;
      const int channel = __shfl_sync(0xffffffffu, end.channel, row - first);
      const float scale = __shfl_sync(0xffffffffu, end.scale, row - first);
      const float shift = __shfl_sync(0xffffffffu, end.shift, row - first);
      const int64_t slot = tile.unit * kLanes + pair % kLanes, image = slot / p.strips;
      const int strip_of_image = static_cast<int>(slot - image * p.strips), lane_of_unit = pair % kLanes;
      int together = 1;
      if (p.tiles_of_stretch == 1 && p.strips > 1) {
        if (strip_of_image > 0 && lane_of_unit > 0) continue;  // stored with the one before
        together = min(p.strips - strip_of_image, kLanes - lane_of_unit);
      }
      const int first_y = strip_of_image * p.strip_rows;  // of the image
      const int rows = min(together * p.strip_rows, p.positions[0] - first_y);
      const int count = (together > 1 ? rows * width : min(end_result, rows * width)) - first_result;
      if (channel < 0 || image >= p.batch || count <= 0) continue;
      const int64_t at = image * p.out_n + channel * p.out_c + int64_t(first_y) * width + first_result;
      const float* from = results + row_at(p, row) + lane_of_unit * p.lane_pitch;
      // What the warp stores at once begins where a sector of 32 bytes does.
      for (int base = -static_cast<int>(at % 16); base < count; base += 32) {
        const int place = base + lane, near = min(max(place, 0), count - 1);
        const int in_lanes = together > 1 ? near / strip * p.lane_pitch + near % strip : near;
        float result = from[in_lanes] * scale + shift;
        if (p.residual && place == near) result += to_float(static_cast<const T*>(p.residual)[at + place]);
        store_vector(static_cast<T*>(p.output) + at + place, from_float<T>(activate(result, p.activation)),
                     place == near);
      }
    }
  }

  template <int... kStep>
  __device__ __forceinline__ void write_step(std::integer_sequence<int, kStep...>, int step, float* to, int place,
                                             int shift, const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    ((step == kStep ? write<kStep>(to, place, shift, sums) : void()), ...);
  }

  __device__ __forceinline__ void run(const TilePlace& tile,
                                      const float (&sums)[kGroups][kMatrices][kPlaces][4]) const {
    const int warp = threadIdx.x / 32, row_warp = warp % p.row_warps, position_warp = warp / p.row_warps;
    float* to = results + row_at(p, row_warp * kTogether);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {  // one copy of what stores, for the sake of the code's size
      write_step(std::make_integer_sequence<int, kSteps>{}, step, to, position_warp * kPositions, tile.shift, sums);
      __syncthreads();  // results of all warps
      store(tile, step / kParts / (kRows / 8), step / kParts % (kRows / 8) * 8 + step % kParts * kTogether);
      __syncthreads();  // before the next results
    }
  }
};

}  // namespace sparsekd::cuda
