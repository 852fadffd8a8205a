// What the host side of the 2:4 convolution hands to its kernel. Plain numbers and pointers; no torch, no CUDA.
#pragma once
#include <cstdint>

#include "../activation.h"
#include "dtype.h"

namespace sparsekd::cuda {

// A block of threads computes 16 * row_tiles * row_warps output channels at 8 * pixel_tiles * pixel_warps pixels, by
// `depth` groups of warps that take every so many-th step and add up at the end: of small maps there are not enough
// pixels for more blocks, and a step of one warp takes as long as it has instructions, each 5 to 6 cycles.
struct Conv2d24Variant {
  int row_tiles, pixel_tiles;  // of a warp: 16 output channels, 8 pixels
  int row_warps, pixel_warps, depth;
  constexpr int rows() const { return 16 * row_tiles * row_warps; }
  constexpr int pixels() const { return 8 * pixel_tiles * pixel_warps; }
  constexpr int group_threads() const { return 32 * row_warps * pixel_warps; }
  constexpr int threads() const { return group_threads() * depth; }
  // Of one step: values, activations and metadata of 64 input channels at one tap.
  constexpr int stage_vectors() const { return rows() * 4 + pixels() * 8 + rows() / 2; }
  bool operator==(const Conv2d24Variant&) const = default;
};
// As constants, which device code may use.
template <Conv2d24Variant kVariant>
struct Conv2d24Sizes {
  static constexpr int kRows = kVariant.rows(), kPixels = kVariant.pixels(), kThreads = kVariant.group_threads();
  static constexpr int kStageVectors = kVariant.stage_vectors();
};
// Of so many warps, the blocks of threads that a multiprocessor has registers for: 12 to 16 warps.
// Where a warp has more than 16 tiles, half as many.
constexpr int blocks_of_24(int warps, int tiles) { return warps == 4 ? (tiles > 16 ? 2 : 3) : warps <= 8 ? 2 : 1; }
constexpr Conv2d24Variant kConv2d24Variants[] = {{4, 8, 2, 2, 1}, {4, 4, 2, 4, 1}, {4, 4, 1, 2, 2}, {4, 4, 2, 2, 3},
                                                {2, 4, 2, 2, 1}};
constexpr int kConv2d24Stages = 3;
constexpr int kStepChannels = 64;
constexpr int kResultPitch = 20;  // floats from pixel to pixel, at the end: 16 channels, and 4 for the banks

constexpr int64_t conv2d_24_bytes(const Conv2d24Variant& v) {
  return int64_t(16) * kConv2d24Stages * v.stage_vectors() * v.depth;
}

struct Conv2d24Params {
  const void* input;     // [batch][in_h][in_w][groups * channels], 16 bits each
  const void* values;    // [groups * rows][taps][channels / 2]
  const void* metadata;  // [groups * row_tiles][taps][channel_blocks][32] words: see mma.cuh
  const void *scale, *shift;  // [groups * rows], or null
  const void* residual;       // as the output, or null
  void* output;               // [pixels][groups * rows]
  Activation activation;
  DType dtype;
  int64_t pixels;             // batch * out_h * out_w
  int in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, channels, rows;  // of a group
  int row_tiles;               // of 16 rows, of a group
  int channel_blocks;          // of 64 channels, of a group
  int steps;                   // taps times channel_blocks
  int row_blocks, pixel_blocks;
  bool whole_vectors;          // of 8 output channels, aligned
};

}  // namespace sparsekd::cuda

extern "C" {
int sparsekd_conv2d_24(const sparsekd::cuda::Conv2d24Params* params, const sparsekd::cuda::Conv2d24Variant* variant,
                       void* stream);
}
