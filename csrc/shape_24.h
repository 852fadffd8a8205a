// The convolution with 2:4 weights: what the CPU and the GPU check before they touch memory.
#pragma once
#include "geometry.h"

namespace sparsekd {

// Rows of output channels and blocks of input channels that one tile of metadata is of, and its words.
constexpr int64_t kTile24Rows = 16, kTile24Channels = 64, kTile24Words = 32;

struct Conv2d24Shape {
  Conv2dShape conv;
  int64_t channels, rows, row_tiles, channel_blocks;  // of a convolution group
};

inline Conv2d24Shape checked_shape_24(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
                                      int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  Conv2d24Shape shape;
  shape.conv = checked_shape(input.sizes(), out_channels, kernel_size, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(out_channels >= groups && out_channels % groups == 0,
                    "Expected output channels divisible by groups=", groups, ", got ", out_channels);
  shape.channels = shape.conv.in_channels / groups;
  shape.rows = out_channels / groups;
  TORCH_CHECK_VALUE(shape.channels % 16 == 0,
                    "Expected a multiple of 16 input channels per group for 2:4 weights, got ", shape.channels);
  check_same(values, "values", input, "input");
  check_dim(values, "values", 3);
  check_size(values, "values", 0, out_channels, "output channels");
  check_size(values, "values", 1, shape.conv.taps(), "places of the kernel");
  check_size(values, "values", 2, shape.channels / 2, "half of the input channels per group");
  shape.row_tiles = ceil_div(shape.rows, kTile24Rows);
  shape.channel_blocks = ceil_div(shape.channels, kTile24Channels);
  TORCH_CHECK_TYPE(metadata.scalar_type() == at::kInt, "Expected metadata of dtype Int, got ", metadata.scalar_type());
  TORCH_CHECK_VALUE(metadata.device() == input.device(), "Expected metadata on ", input.device(), ", got ",
                    metadata.device());
  const int64_t size[] = {groups * shape.row_tiles, shape.conv.taps(), shape.channel_blocks, kTile24Words};
  TORCH_CHECK_VALUE(metadata.sizes() == at::IntArrayRef(size), "Expected metadata of shape ", at::IntArrayRef(size),
                    ", got ", metadata.sizes());
  return shape;
}

}  // namespace sparsekd
