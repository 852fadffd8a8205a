// Convolution with 2:4 weights on sparse tensor cores: an implicit matrix product in NHWC, 16-bit values, fp32 sums.
//
//   output [rows x pixels] += weight [rows x channels, two of each four kept] * activations [channels x pixels]
//
// summed over taps (r, s) and blocks of 64 channels: a step. For each step a block of threads copies to shared memory,
// two steps ahead, the values [rows][32] and metadata of its output channels and the activations [pixels][64] that its
// pixels read at that tap, zeros beyond the borders. A warp takes its operands from there by ldmatrix, 16 bytes a row:
//
//   values       row of 64 bytes, vector c at c ^ (row / 2) % 4     so that eight rows, and eight pixels, that are read
//   activations  pixel of 128 bytes, vector c at c ^ pixel % 8      at once lie in different banks
//
// Metadata lie as mma.sp wants them (mma.cuh): one word of each lane serves two instructions, selector 0 for channels 0
// to 31 of the block and 1 for the others. They only choose among four rows of an operand in registers, so that wrong
// ones give wrong numbers at worst.
//
// 2:4 after Mishra et al., "Accelerating sparse deep neural networks", 2021.
#pragma once
#include "conv2d.cuh"
#include "conv2d_24.h"
#include "fragments.cuh"
#include "mma.cuh"

namespace sparsekd::cuda {

// Of a pixel: where its first tap lies, in rows, columns and vectors of 8 channels.
struct Place {
  int y, x, vector;
};
constexpr int kOutside = -(1 << 30);  // a row that no tap brings inside

__device__ __forceinline__ Place place_of(const Conv2d24Params& p, int64_t pixel, int group) {
  if (pixel >= p.pixels) return {kOutside, 0, 0};
  const int x = static_cast<int>(pixel % p.out_w) * p.stride_w - p.padding_w;
  const int64_t row = pixel / p.out_w;
  const int y = static_cast<int>(row % p.out_h) * p.stride_h - p.padding_h;
  const int64_t first = (row / p.out_h * p.in_h + y) * p.in_w + x;
  return {y, x, static_cast<int>((first * p.groups + group) * (p.channels / 8))};
}

// The end of the convolution for `count` (at most 8) channels of every 16 * kDepth-th pixel from `place` on, whose
// results are the sums of those of all groups, `kOfGroup` apart.
template <class T, int kPixels, int kDepth, int kOfGroup>
__device__ __forceinline__ void store_channels(const Conv2d24Params& p, const float* results, int64_t first_pixel,
                                               int place, int channel, int count) {
  float scale[8], shift[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    scale[e] = p.scale && e < count ? load_value(p.scale, p.dtype, channel + e) : 1.0f;
    shift[e] = p.shift && e < count ? load_value(p.shift, p.dtype, channel + e) : 0.0f;
  }
#pragma unroll 1
  for (int i = place; i < kPixels && first_pixel + i < p.pixels; i += 16 * kDepth) {
    const int64_t at = (first_pixel + i) * p.groups * p.rows + channel;
    const auto* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
    T* to = static_cast<T*>(p.output) + at;
    const auto* four = reinterpret_cast<const float4*>(results + i * kResultPitch);
    const float4 low = load_vector(four), high = load_vector(four + 1);
    float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int d = 1; d < kDepth; ++d) {
      const auto* more = reinterpret_cast<const float4*>(results + d * kOfGroup + i * kResultPitch);
      const float4 a = load_vector(more), b = load_vector(more + 1);
      x[0] += a.x, x[1] += a.y, x[2] += a.z, x[3] += a.w, x[4] += b.x, x[5] += b.y, x[6] += b.z, x[7] += b.w;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = x[e] * scale[e] + shift[e];
    if (residual && p.whole_vectors) {
      alignas(16) T added[8];
      const uint4 words = load_vector(reinterpret_cast<const uint4*>(residual));
      __builtin_memcpy(added, &words, 16);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] += to_float(added[e]);
    } else if (residual) {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] += e < count ? to_float(residual[e]) : 0.0f;
    }
    activate_all(x, p.activation);
    if (p.whole_vectors) {
      alignas(16) T stored[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) stored[e] = from_float<T>(x[e]);
      uint4 words;
      __builtin_memcpy(&words, stored, 16);
      store_vector(reinterpret_cast<uint4*>(to), words);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) store_vector(to + e, from_float<T>(x[e]));
      }
    }
  }
}

// The end of the convolution for a warp's results, from registers: of each pair of row tiles and eight pixels, a lane
// gets 8 channels of a pixel, where it had two pixels of four channels. Rows are whole vectors of channels.
template <class T, int kRowTiles, int kPixelTiles>
__device__ __forceinline__ void store_from_registers(const Conv2d24Params& p, int group, int first_row,
                                                     int64_t first_pixel,
                                                     const float (&sums)[kRowTiles][kPixelTiles][4]) {
  static_assert(kRowTiles % 2 == 0);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; m += 2) {
    float scale[4], shift[4];  // of rows g + 8 * q
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = first_row + m * 16 + q * 8 + g, channel = group * p.rows + row;
      scale[q] = p.scale && row < p.rows ? load_value(p.scale, p.dtype, channel) : 1.0f;
      shift[q] = p.shift && row < p.rows ? load_value(p.shift, p.dtype, channel) : 0.0f;
    }
    const int own_row = first_row + m * 16 + t * 8;
#pragma unroll
    for (int n = 0; n < kPixelTiles; ++n) {
      const int64_t pixel = first_pixel + n * 8 + g;
      const bool there = pixel < p.pixels && own_row < p.rows;
      const int64_t at = (pixel * p.groups * p.rows + group * p.rows + own_row) / 8;
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = sums[m + e / 4][n][e % 4] * scale[e / 2] + shift[e / 2];
      uint32_t words[4] = {0, 0, 0, 0};
      if (p.residual) {
        if (there) {
          const uint4 four = load_vector(static_cast<const uint4*>(p.residual) + at);
          words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        }
        turn_over(words);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t word = transposed(words[q]);
          x[2 * q] += float_of_bits<T>(word & 0xffff);
          x[2 * q + 1] += float_of_bits<T>(word >> 16);
        }
      }
      activate_all(x, p.activation);
#pragma unroll
      for (int q = 0; q < 4; ++q) words[q] = transposed(word_of<T>(x[2 * q], x[2 * q + 1]));
      turn_over(words);
      store_vector(static_cast<uint4*>(p.output) + at, uint4{words[0], words[1], words[2], words[3]}, there);
    }
  }
}

template <class T, int kRowTiles, int kPixelTiles, int kRowWarps, int kPixelWarps, int kDepth>
__global__ __launch_bounds__(32 * kRowWarps * kPixelWarps * kDepth,
                             blocks_of_24(kRowWarps * kPixelWarps * kDepth, kRowTiles * kPixelTiles)) void conv2d_24_kernel(
    const Conv2d24Params p) {
  needs_tensor_cores();
  using Sizes = Conv2d24Sizes<Conv2d24Variant{kRowTiles, kPixelTiles, kRowWarps, kPixelWarps, kDepth}>;
  constexpr int kRows = Sizes::kRows, kPixels = Sizes::kPixels, kThreads = Sizes::kThreads;
  constexpr int kValueCopies = kRows * 4 / kThreads, kCopies = kPixels * 8 / kThreads;
  constexpr int kMetadataAt = kRows * 4 + kPixels * 8, kStageVectors = Sizes::kStageVectors;
  static_assert(kRows * 4 % kThreads == 0 && kPixels * 8 % kThreads == 0 && kRows / 2 <= kThreads);
  const int thread = threadIdx.x % kThreads, depth = threadIdx.x / kThreads;  // in its group; the group
  const int lane = thread % 32, warp = thread / 32;
  const int row_warp = warp % kRowWarps, pixel_warp = warp / kRowWarps;
  // Blocks that read the same pixels run one after another.
  const int row_block = blockIdx.x % p.row_blocks;
  const int group = blockIdx.x / p.row_blocks % p.groups;
  const int64_t first_pixel = int64_t(blockIdx.x / p.row_blocks / p.groups) * kPixels;
  const int first_row = row_block * kRows;

  // [kDepth][kConv2d24Stages][values | activations | metadata]
  uint4* stages = shared_memory<uint4>() + depth * kConv2d24Stages * kStageVectors;

  // ---- what a thread copies: the same vector of every so many rows and pixels ----
  const int taps = p.kernel_h * p.kernel_w, steps = kDepth > 1 ? p.steps : taps * p.channel_blocks;
  const int group_vectors = p.channels / 16, pixel_vectors = p.groups * (p.channels / 8);
  const int value_row = thread / 4, value_vector = thread % 4;
  const int value_to = value_row * 4 + (value_vector ^ value_row / 2 % 4);
  const auto* values = static_cast<const uint4*>(p.values) +
                       (int64_t(group) * p.rows + first_row + value_row) * taps * group_vectors + value_vector;
  const int64_t value_pitch = int64_t(kThreads / 4) * taps * group_vectors;
  const int pixel = thread / 8, pixel_vector = thread % 8;
  const int pixel_to = kRows * 4 + pixel * 8 + (pixel_vector ^ pixel % 8);
  // Rows beyond the last tile take the last one's: their values are zeros, but zeros are no metadata.
  const int tile = min(first_row / 16 + thread / 8, p.row_tiles - 1);
  const auto* metadata = static_cast<const uint4*>(p.metadata) + (int64_t(group) * p.row_tiles + tile) * steps * 8 +
                         thread % 8;

  // A warp copies 4 pixels at once, kCopies times: each lane knows the place of one of them, or of every 32nd.
  constexpr int kPlaces = (kCopies * 4 + 31) / 32;
  Place places[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int copy = i * 8 + lane / 4, place = warp * 4 + lane % 4 + copy * (kThreads / 8);
    places[i] = place_of(p, copy < kCopies ? first_pixel + place : p.pixels, group);
  }
  int from[kCopies];  // of each pixel at the tap that is copied next, in vectors, or -1
  int tap_y = 0, tap_x = 0, block = depth, step_value = 0;  // of what is copied next
  auto turn_to_tap = [&] {
    const int dy = tap_y * p.dilation_h, dx = tap_x * p.dilation_w;
    const int distance = (dy * p.in_w + dx) * pixel_vectors;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int y = places[i].y + dy, x = places[i].x + dx;
      const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
      const int own = inside ? places[i].vector + distance : -1;
#pragma unroll
      for (int j = i * 8; j < min(i * 8 + 8, kCopies); ++j) {
        from[j] = __shfl_sync(0xffffffffu, own, j % 8 * 4 + lane / 8);
      }
    }
  };
  auto find_step = [&] {  // from `block`, which may lie behind the last
    const bool turned = block >= p.channel_blocks;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {  // as often as there may be taps of one block
      if (block < p.channel_blocks) continue;
      block -= p.channel_blocks;
      if (++tap_x < p.kernel_w) continue;
      tap_x = 0;
      ++tap_y;
    }
    step_value = (tap_y * p.kernel_w + tap_x) * group_vectors + block * 4;
    if (turned) turn_to_tap();
  };
  auto stage = [&](int turn) {
    uint4* to = stages + turn % kConv2d24Stages * kStageVectors;
    const int step = turn * kDepth + depth;
    const bool value_there = block * 4 + value_vector < group_vectors;
#pragma unroll
    for (int j = 0; j < kValueCopies; ++j) {
      const bool there = value_there && first_row + value_row + j * (kThreads / 4) < p.rows;
      copy_async16(to + value_to + j * kThreads, there ? values + j * value_pitch + step_value : values, there);
    }
    const bool channels_there = (block * 8 + pixel_vector) * 8 < p.channels;
    const auto* source = static_cast<const uint4*>(p.input) + block * 8 + pixel_vector;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const bool there = channels_there && from[j] >= 0;
      copy_async16(to + pixel_to + j * kThreads, source + (there ? from[j] : 0), there);
    }
    if (thread < kRows / 2) copy_async16(to + kMetadataAt + thread, metadata + int64_t(step) * 8, true);
    block += kDepth;
    find_step();
  };

  float sums[kRowTiles][kPixelTiles][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kPixelTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
    }
  }
  turn_to_tap();
  find_step();
  const int turns = (steps + kDepth - 1) / kDepth;
#pragma unroll
  for (int turn = 0; turn < kConv2d24Stages - 1; ++turn) {
    if (turn * kDepth + depth < steps) stage(turn);
    copy_async_commit();
  }

  // Lanes 8 * i ... 8 * i + 7 give the rows of matrix i: of values, rows 8 * (i % 2) and on, vector i / 2; of
  // activations, eight pixels, vector i.
  const int own_row = row_warp * kRowTiles * 16 + lane % 16, own_pixel = pixel_warp * kPixelTiles * 8 + lane % 8;
  const int value_at = own_row * 4, value_turn = own_row / 2 % 4, pixel_at = kRows * 4 + own_pixel * 8;
  for (int turn = 0; turn < turns; ++turn) {
    copy_async_wait<kConv2d24Stages - 2>();
    __syncthreads();  // what other threads copied, and the stage that is filled next was read
    // Asked of one group, too, so that the compiler doesn't mix copies and products, for which registers are missing.
    const int next = (turn + kConv2d24Stages - 1) * kDepth + depth;
    if (next < steps) stage(turn + kConv2d24Stages - 1);
    copy_async_commit();
    const bool there = next - (kConv2d24Stages - 1) * kDepth < min(steps, p.steps);
    const uint4* staged = stages + turn % kConv2d24Stages * kStageVectors;
    uint32_t words[kRowTiles];
    const auto* own_words = reinterpret_cast<const uint32_t*>(staged + kMetadataAt) + row_warp * kRowTiles * 32 + lane;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) words[m] = there ? load_vector(own_words + m * 32) : 0;
    auto multiply = [&](auto selector) {
      constexpr int kSelector = decltype(selector)::value;
      const SharedAddress row = shared_address(staged + value_at + ((kSelector * 2 + lane / 16) ^ value_turn));
      const SharedAddress at = shared_address(staged + pixel_at + ((kSelector * 4 + lane / 8) ^ lane % 8));
      uint32_t kept[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrices(kept[m], row + m * 16 * 4 * 16);
#pragma unroll
      for (int n = 0; n < kPixelTiles; ++n) {
        uint32_t in[4];
        load_matrices(in, at + n * 8 * 8 * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) mma_sparse_k32<T, kSelector>(sums[m][n], kept[m], in, words[m]);
      }
    };
    if (there) {
      multiply(std::integral_constant<int, 0>{});
      multiply(std::integral_constant<int, 1>{});
    }
  }
  copy_async_wait<0>();
  if (kDepth == 1 && p.whole_vectors) {
    return store_from_registers<T>(p, group, first_row + row_warp * kRowTiles * 16,
                                   first_pixel + pixel_warp * kPixelTiles * 8, sums);
  }
  __syncthreads();  // before the stages take results

  // ---- 16 channels of all its pixels at a time, each warp and those of the other groups that have the same to
  // themselves, so that a lane stores 8 channels of a pixel ----
  constexpr int kOfGroup = kRowWarps * kPixelWarps * kPixelTiles * 8 * kResultPitch;  // floats
  float* results = shared_memory<float>() + warp * kPixelTiles * 8 * kResultPitch;
  float* own = results + depth * kOfGroup;
  const int g = lane / 4, t = lane % 4, half = lane / 16;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kPixelTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // row g + 8 * (e / 2), pixel 2 * t + e % 2
        own[(n * 8 + 2 * t + e % 2) * kResultPitch + g + e / 2 * 8] = sums[m][n][e];
      }
    }
    __syncthreads();  // results of all groups
    const int row = first_row + (row_warp * kRowTiles + m) * 16 + half * 8;
    if (row < p.rows) {
      store_channels<T, kPixelTiles * 8, kDepth, kOfGroup>(
          p, results + half * 8, first_pixel + pixel_warp * kPixelTiles * 8, lane % 16 + depth * 16,
          group * p.rows + row, min(p.rows - row, 8));
    }
    __syncthreads();  // before the next results
  }
}

}  // namespace sparsekd::cuda
