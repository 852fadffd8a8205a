// conv2d_24 and conv2d_24_fused on CUDA: checks, the choice of tile, the launch. Nothing here waits for the device.
// Metadata is not looked at: two bits choose among four values in registers, whatever they are.
#include "conv2d_24.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "../shape_24.h"
#include "conv2d_tensor.h"
#include "host.h"

namespace sparsekd::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Limits {
  int major, shared_bytes, multiprocessors;
};

// By cycles of an SM: the most of what the tensor cores multiply (2048 a cycle, zeros included), what shared memory
// delivers and takes (128 bytes a cycle), what its four quarters issue, and what a warp takes that waits for nothing
// but itself (see conv2d_tensor_tiling.cpp).
const Conv2d24Variant& choose(const Conv2d24Shape& shape, int64_t pixels, const Limits& limits) {
  constexpr double kBetweenInstructions = 5.7, kIssued = 0.8;
  const int64_t steps = shape.conv.taps() * shape.channel_blocks;
  const Conv2d24Variant* best = nullptr;
  double least = 0;
  for (const Conv2d24Variant& v : kConv2d24Variants) {
    if (conv2d_24_bytes(v) > limits.shared_bytes) continue;
    const int64_t row_blocks = shape.conv.groups * ceil_div(shape.rows, int64_t(v.rows()));
    const int64_t blocks = row_blocks * ceil_div(pixels, int64_t(v.pixels()));
    const int64_t warps = v.threads() / 32, turns = ceil_div(blocks, int64_t(limits.multiprocessors));
    const int64_t fitting = (limits.shared_bytes + 1024) / (conv2d_24_bytes(v) + 1024);
    const int64_t living = std::min<int64_t>(blocks_of_24(static_cast<int>(warps), v.row_tiles * v.pixel_tiles), fitting);
    const int64_t together = std::clamp<int64_t>(living, 1, turns);
    // Of a warp, as nvcc 13 makes them, for a step and at the end.
    const double copies = static_cast<double>(v.rows() * 4 + v.pixels() * 8) / v.group_threads();
    const double of_step = 2 * (v.row_tiles + v.pixel_tiles + v.row_tiles * v.pixel_tiles) + 60 + 8 * copies;
    const double of_end = v.depth == 1 ? 300 + v.row_tiles * (30 + v.pixel_tiles * 38.0)
                                       : 300 + v.row_tiles * (80 + v.pixel_tiles * (12 + 40.0 / v.depth));
    const double instructions = of_step * static_cast<double>(ceil_div(steps, int64_t(v.depth))) + of_end;
    const double multiplied = static_cast<double>(v.rows() * v.pixels() * kStepChannels) / 2048;
    const int of_warp = 8 * (v.row_tiles + v.pixel_tiles) + v.row_tiles;
    const double operands = static_cast<double>(v.group_threads() / 32 * of_warp);
    const double moved = operands + v.stage_vectors() / 8.0;
    const double throughput = std::max(static_cast<double>(steps) * std::max(multiplied, moved),
                                       instructions * static_cast<double>(warps) / 4 / kIssued);
    const double round = std::max(throughput * static_cast<double>(together), instructions * kBetweenInstructions);
    const double cost = static_cast<double>(ceil_div(turns, together)) * (round + 1000);
    if (best && least <= cost) continue;
    best = &v;
    least = cost;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(best, "Expected at least 48 KiB of shared memory for a block, got ", limits.shared_bytes);
  return *best;
}

// In channels_last, from a 16-byte boundary on.
at::Tensor channels_last(const at::Tensor& t) {
  const at::Tensor last = t.contiguous(at::MemoryFormat::ChannelsLast);
  if (reinterpret_cast<uintptr_t>(last.const_data_ptr()) % 16 == 0) return last;
  return last.clone(at::MemoryFormat::ChannelsLast);
}

at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor whole = t.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

at::Tensor run(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
               const OptionalTensor& scale, const OptionalTensor& shift, const char* shift_name,
               const OptionalTensor& residual, Activation activation, int64_t out_channels,
               at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
               int64_t groups) {
  check_device(input, "input");
  TORCH_CHECK_TYPE(input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16,
                   "Expected input of dtype Half or BFloat16 for 2:4 weights on cuda, got ", input.scalar_type());
  const Conv2d24Shape shape =
      checked_shape_24(input, values, metadata, out_channels, kernel_size, stride, padding, dilation, groups);
  const Conv2dShape& conv = shape.conv;
  const at::Tensor scales = checked_channels(scale, "scale", input, out_channels);
  const at::Tensor shifts = checked_channels(shift, shift_name, input, out_channels);
  const auto size = conv.output_size();
  if (residual) check_residual(*residual, size, input);
  const int64_t limit = std::numeric_limits<int32_t>::max(), pixels = conv.batch * conv.output[0] * conv.output[1];
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(conv.input[d] + 2 * conv.padding[d] < 1 << 30,
                      "Expected a padded input of less than 2^30 rows and columns, got ",
                      conv.input[d] + 2 * conv.padding[d]);
  }
  // Distances are counted in vectors of 8 channels, those of taps beyond the borders too.
  const double farthest = (static_cast<double>(conv.batch) * static_cast<double>(conv.input[0]) +
                           2.0 * static_cast<double>(conv.padding[0])) *
                          (static_cast<double>(conv.input[1]) + 2.0 * static_cast<double>(conv.padding[1])) *
                          static_cast<double>(conv.in_channels / 8);
  TORCH_CHECK_VALUE(farthest < static_cast<double>(limit),
                    "Expected fewer than 2^34 activations with their padding, got an input of shape ", input.sizes());
  TORCH_CHECK_VALUE(conv.kernel[0] * conv.kernel[1] * shape.channel_blocks <= limit / kTile24Words,
                    "Expected fewer than 2^26 places of the kernel times blocks of 64 channels, got a kernel of size ",
                    kernel_size);
  const auto format = input.suggest_memory_format();
  const at::Tensor result = at::empty(size, input.options().memory_format(format));
  if (result.numel() == 0) return result;
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const auto in_order = input.options().memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor output = last ? result : at::empty(size, in_order);

  Call call(input);
  Limits limits{};
  call.launched(sparsekd_device_limits(std::max<int>(input.device().index(), 0), &limits.major));
  TORCH_CHECK_NOT_IMPLEMENTED(limits.major >= 8, "Expected compute capability 8.0 or later for 2:4 weights, got ",
                              limits.major, ".x");
  const Conv2d24Variant& variant = choose(shape, pixels, limits);
  const at::Tensor in = channels_last(input), kept = aligned(values), words = aligned(metadata);
  const at::Tensor added = residual ? channels_last(*residual) : at::Tensor();
  call.reads(in, "input");
  call.reads(kept, "values");
  call.reads(words, "metadata");
  call.reads(scales, "scale");
  call.reads(shifts, "shift");
  call.reads(added, "residual");
  call.writes(output, "output");

  Conv2d24Params p{};
  p.input = in.const_data_ptr();
  p.values = kept.const_data_ptr();
  p.metadata = words.const_data_ptr();
  p.scale = data_of(scales);
  p.shift = data_of(shifts);
  p.residual = data_of(added);
  p.output = output.mutable_data_ptr();
  p.activation = activation;
  p.dtype = dtype_of(input);
  p.pixels = pixels;
  p.in_h = int(conv.input[0]);
  p.in_w = int(conv.input[1]);
  p.out_h = int(conv.output[0]);
  p.out_w = int(conv.output[1]);
  p.kernel_h = int(conv.kernel[0]);
  p.kernel_w = int(conv.kernel[1]);
  p.stride_h = int(conv.stride[0]);
  p.stride_w = int(conv.stride[1]);
  p.padding_h = int(conv.padding[0]);
  p.padding_w = int(conv.padding[1]);
  p.dilation_h = int(conv.dilation[0]);
  p.dilation_w = int(conv.dilation[1]);
  p.groups = int(groups);
  p.channels = int(shape.channels);
  p.rows = int(shape.rows);
  p.row_tiles = int(shape.row_tiles);
  p.channel_blocks = int(shape.channel_blocks);
  p.steps = int(shape.conv.taps() * shape.channel_blocks);
  const int64_t row_blocks = ceil_div(shape.rows, int64_t(variant.rows()));
  const int64_t pixel_blocks = ceil_div(pixels, int64_t(variant.pixels()));
  TORCH_CHECK_VALUE(row_blocks * groups <= limit / pixel_blocks,
                    "Expected fewer than 2^31 blocks of results, got an output of shape ", at::IntArrayRef(size));
  p.row_blocks = int(row_blocks);
  p.pixel_blocks = int(pixel_blocks);
  p.whole_vectors = shape.rows % 8 == 0;
  call.launched(sparsekd_conv2d_24(&p, &variant, call.stream()));
  call.finish();
  if (!last) result.copy_(output);
  return result;
}

at::Tensor conv2d_24_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
                          const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef kernel_size,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run(input, values, metadata, {}, bias, "bias", {}, Activation::none, out_channels, kernel_size, stride,
             padding, dilation, groups);
}

at::Tensor conv2d_24_fused_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
                                const OptionalTensor& scale, const OptionalTensor& shift,
                                const OptionalTensor& residual, c10::string_view activation, int64_t out_channels,
                                at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, int64_t groups) {
  return run(input, values, metadata, scale, shift, "shift", residual, activation_of(activation), out_channels,
             kernel_size, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) {
  m.impl("conv2d_24", &sparsekd::cuda::conv2d_24_cuda);
  m.impl("conv2d_24_fused", &sparsekd::cuda::conv2d_24_fused_cuda);
}
