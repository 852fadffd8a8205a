// conv2d_24 and conv2d_24_fused on the CPU: torch's dense convolution of the unpacked weight. No CPU has an instruction
// for 2:4, so that nothing is faster than dense here: it is for tests, and for models that were pruned for a GPU.
#include <ATen/ops/add.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../shape_24.h"

namespace sparsekd::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// In which of its four channels a value lies; see csrc/cuda/mma.cuh.
int64_t place_of(const int32_t* tile, int64_t row, int64_t value) {
  const int64_t lane = row % 8 * 4 + value / 8;
  return tile[lane] >> (row / 8 * 16 + value % 8 * 2) & 3;
}

template <class T>
void unpack(const Conv2d24Shape& shape, const T* values, const int32_t* metadata, T* weight) {
  const int64_t taps = shape.conv.taps(), half = shape.channels / 2;
  for (int64_t channel = 0; channel < shape.conv.out_channels; ++channel) {
    const int64_t row = channel % shape.rows;
    const int64_t tile = channel / shape.rows * shape.row_tiles + row / kTile24Rows;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* from = values + (channel * taps + tap) * half;
      for (int64_t i = 0; i < half; i += 2) {
        const int64_t block = i * 2 / kTile24Channels, in_block = i % (kTile24Channels / 2);
        const int32_t* words = metadata + ((tile * taps + tap) * shape.channel_blocks + block) * kTile24Words;
        const int64_t first = place_of(words, row % kTile24Rows, in_block);
        const int64_t second = place_of(words, row % kTile24Rows, in_block + 1);
        TORCH_CHECK_INDEX(first < second, "Expected metadata whose two places of four ascend, got ", first, " and ",
                          second, " for output channel ", channel);
        T* to = weight + (channel * shape.channels + i * 2) * taps + tap;
        to[first * taps] = from[i];
        to[second * taps] = from[i + 1];
      }
    }
  }
}

at::Tensor activated(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::relu(x);
    case Activation::relu6: return at::relu6(x);
    case Activation::silu: return at::silu(x);
    case Activation::hardswish: return at::hardswish(x);
    default: return x;
  }
}

at::Tensor run(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
               const OptionalTensor& scale, const OptionalTensor& shift, const char* shift_name,
               const OptionalTensor& residual, Activation activation, int64_t out_channels,
               at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
               int64_t groups) {
  check_floating(input, "input");
  const Conv2d24Shape shape =
      checked_shape_24(input, values, metadata, out_channels, kernel_size, stride, padding, dilation, groups);
  const auto size = shape.conv.output_size();
  const at::Tensor scales = checked_channels(scale, "scale", input, out_channels);
  const at::Tensor shifts = checked_channels(shift, shift_name, input, out_channels);
  if (residual) check_residual(*residual, size, input);

  // Half types are computed in float32 and rounded once.
  const auto dtype = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor packed = values.to(dtype).contiguous(), words = metadata.contiguous();
  const at::Tensor weight =
      at::zeros({out_channels, shape.channels, kernel_size[0], kernel_size[1]}, packed.options());
  if (dtype == at::kDouble) {
    unpack(shape, packed.const_data_ptr<double>(), words.const_data_ptr<int32_t>(), weight.mutable_data_ptr<double>());
  } else {
    unpack(shape, packed.const_data_ptr<float>(), words.const_data_ptr<int32_t>(), weight.mutable_data_ptr<float>());
  }
  at::Tensor sums = at::conv2d(input.to(dtype), weight, {}, stride, padding, dilation, groups);
  if (scales.defined()) sums = at::mul(sums, scales.to(dtype).view({-1, 1, 1}));
  if (shifts.defined()) sums = at::add(sums, shifts.to(dtype).view({-1, 1, 1}));
  if (residual) sums = at::add(sums, residual->to(dtype));
  const at::Tensor output = at::empty(size, input.options().memory_format(input.suggest_memory_format()));
  output.copy_(activated(sums, activation));
  return output;
}

at::Tensor conv2d_24_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
                         const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef kernel_size,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run(input, values, metadata, {}, bias, "bias", {}, Activation::none, out_channels, kernel_size, stride,
             padding, dilation, groups);
}

at::Tensor conv2d_24_fused_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& metadata,
                               const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                               c10::string_view activation, int64_t out_channels, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                               int64_t groups) {
  return run(input, values, metadata, scale, shift, "shift", residual, activation_of(activation), out_channels,
             kernel_size, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) {
  m.impl("conv2d_24", &sparsekd::cpu::conv2d_24_cpu);
  m.impl("conv2d_24_fused", &sparsekd::cpu::conv2d_24_fused_cpu);
}
