// Shapes that the CPU's and the GPU's convolutions share, and their checks.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <utility>

#include "activation.h"
#include "check.h"

namespace sparsekd {

using Pair = std::array<int64_t, 2>;  // height, width

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Conv2dShape {
  int64_t batch, in_channels, out_channels, groups;
  Pair input, output, kernel, stride, padding, dilation;
  int64_t taps() const { return kernel[0] * kernel[1]; }
  std::array<int64_t, 4> output_size() const { return {batch, out_channels, output[0], output[1]}; }
};

inline Pair checked_pair(at::IntArrayRef values, const char* name, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // so that sums and products of two don't wrap around
  TORCH_CHECK_VALUE(values.size() == 2 && std::min(values[0], values[1]) >= least &&
                        std::max(values[0], values[1]) <= kMost,
                    "Expected two values of at least ", least, " and below 2^31 for ", name, ", got ", values);
  return {values[0], values[1]};
}

// Sizes that a convolution and its gradients agree on; `output` is computed.
inline Conv2dShape checked_shape(at::IntArrayRef input_size, int64_t out_channels, at::IntArrayRef kernel_size,
                                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                 int64_t groups) {
  TORCH_CHECK_VALUE(input_size.size() == 4, "Expected an input of 4 dimensions [N, C, H, W], got shape ", input_size);
  Conv2dShape shape;
  shape.batch = input_size[0];
  shape.in_channels = input_size[1];
  shape.out_channels = out_channels;
  shape.groups = groups;
  shape.input = {input_size[2], input_size[3]};
  shape.kernel = checked_pair(kernel_size, "kernel_size", 1);
  shape.stride = checked_pair(stride, "stride", 1);
  shape.padding = checked_pair(padding, "padding", 0);
  shape.dilation = checked_pair(dilation, "dilation", 1);
  TORCH_CHECK_VALUE(groups >= 1 && shape.in_channels >= groups && shape.in_channels % groups == 0,
                    "Expected a number of input channels divisible by groups, got ", shape.in_channels,
                    " and groups=", groups);
  for (int d = 0; d < 2; ++d) {
    const int64_t padded = shape.input[d] + 2 * shape.padding[d];
    const int64_t reach = (shape.kernel[d] - 1) * shape.dilation[d] + 1;
    TORCH_CHECK_VALUE(shape.input[d] >= 1 && padded >= reach,
                      "Expected a padded input at least as large as the kernel (", reach, " in ",
                      d == 0 ? "height" : "width", "), got ", padded, " from an input of shape ", input_size);
    shape.output[d] = (padded - reach) / shape.stride[d] + 1;
  }
  return shape;
}

// The same of a gradient's arguments, with the output channels that `grad_output` has.
inline Conv2dShape checked_grad_shape(const at::Tensor& grad_output, at::IntArrayRef input_size,
                                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                      at::IntArrayRef dilation, int64_t groups) {
  check_dim(grad_output, "grad_output", 4);
  const Conv2dShape shape =
      checked_shape(input_size, grad_output.size(1), kernel_size, stride, padding, dilation, groups);
  const auto size = shape.output_size();
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(size), "Expected grad_output of shape ",
                    at::IntArrayRef(size), ", got ", grad_output.sizes());
  return shape;
}

inline Activation activation_of(c10::string_view name) {
  constexpr std::pair<const char*, Activation> kNames[] = {{"none", Activation::none},
                                                           {"relu", Activation::relu},
                                                           {"relu6", Activation::relu6},
                                                           {"silu", Activation::silu},
                                                           {"hardswish", Activation::hardswish}};
  for (const auto& [known, activation] : kNames) {
    if (name == known) return activation;
  }
  TORCH_CHECK_VALUE(false, "Expected activation to be none, relu, relu6, silu or hardswish, got ", std::string(name));
}

}  // namespace sparsekd
