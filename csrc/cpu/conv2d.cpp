// conv2d and its gradients on the CPU: checks first, then direct.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../geometry.h"
#include "direct.h"

namespace sparsekd::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Whether a tensor is taken as it is in channels_last. Half types take a copy anyway, and one that is contiguous both
// ways counts as [N, C, H, W].
bool lies_last(const at::Tensor& tensor) {
  const bool half = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  return !half && !tensor.is_contiguous() && tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor empty(at::IntArrayRef size, const at::Tensor& like, bool last) {
  return at::empty(size, like.options().memory_format(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

// The channels' scale or shift, if any, in the dtype of the sums.
at::Tensor wide_channels(const OptionalTensor& tensor, const char* name, const at::Tensor& input, int64_t channels) {
  const at::Tensor checked = checked_channels(tensor, name, input, channels);
  return checked.defined() ? widened(checked) : checked;
}

void check_tiling(at::IntArrayRef tiling, const Conv2dShape& shape) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(tiling.size()) == shape.taps() + 1, "Expected a tiling of conv2d_tiling with ",
                    shape.taps() + 1, " numbers for ", shape.taps(), " taps, got ", tiling.size());
  for (const int64_t number : tiling) {
    TORCH_CHECK_VALUE(number >= 0 && number <= std::numeric_limits<int32_t>::max(),
                      "Expected a tiling of numbers from 0 to 2^31 - 1, got ", number);
  }
}

struct Geometry {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  int64_t groups;
};

at::Tensor run_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                      const at::Tensor& col_indices, const OptionalTensor& row_indices, const OptionalTensor& scale,
                      const OptionalTensor& shift, const char* shift_name, const OptionalTensor& residual,
                      Activation activation, int64_t out_channels, const Geometry& geometry,
                      const OffsetPlan* plan = nullptr) {
  check_floating(input, "input");
  const Conv2dShape shape = checked_shape(input.sizes(), out_channels, geometry.kernel_size, geometry.stride,
                                          geometry.padding, geometry.dilation, geometry.groups);
  check_values(values, input, "input", col_indices);
  Finish finish{wide_channels(scale, "scale", input, out_channels),
                wide_channels(shift, shift_name, input, out_channels), {}, activation};
  const int64_t size[] = {shape.batch, out_channels, shape.output[0], shape.output[1]};
  const Pattern pattern(crow_indices, col_indices, row_indices, out_channels, geometry.groups, values.size(1));
  const bool last = lies_last(input);
  if (residual) {
    check_residual(*residual, size, input);
    finish.residual = last ? residual->contiguous(at::MemoryFormat::ChannelsLast) : widened(*residual);
  }
  const at::Tensor wide_input = last ? input : widened(input);
  at::Tensor output = empty(size, wide_input, last);
  direct_forward(shape, pattern, plan, wide_input, widened(values), finish, last, output);
  return output.to(input.options(), false, false, input.suggest_memory_format());
}

at::Tensor conv2d_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                      const at::Tensor& col_indices, const OptionalTensor& row_indices, const OptionalTensor&,
                      const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef kernel_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run_conv2d(input, values, crow_indices, col_indices, row_indices, {}, bias, "bias", {}, Activation::none,
                    out_channels, {kernel_size, stride, padding, dilation, groups});
}

at::Tensor conv2d_fused_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                            const at::Tensor& col_indices, const OptionalTensor& row_indices,
                            const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                            c10::string_view activation, int64_t out_channels, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run_conv2d(input, values, crow_indices, col_indices, row_indices, scale, shift, "shift", residual,
                    activation_of(activation), out_channels, {kernel_size, stride, padding, dilation, groups});
}

// The tiling says how a float32 input of this size lies, if it is contiguous: another one has its offsets made anew.
std::vector<int64_t> conv2d_tiling_cpu(const at::Tensor& col_indices, int64_t vector, at::IntArrayRef input_size,
                                       int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_dim(col_indices, "col_indices", 1);
  TORCH_CHECK_VALUE(vector >= 1 && out_channels >= groups, "Expected V and channels per group of at least 1, got V = ",
                    vector, ", ", out_channels, " channels and groups=", groups);
  if (shape.batch == 0) return {};
  // It depends on how many entries there are, not on where.
  at::Tensor crow = at::zeros({groups * ceil_div(out_channels / groups, vector) + 1}, at::kInt);
  crow[-1] = col_indices.size(0);
  return direct_tiling(shape, Pattern(crow, col_indices, {}, out_channels, groups, vector), at::empty({0}, at::kFloat));
}

// [crow_indices | col_indices | offsets].
at::Tensor conv2d_plan_cpu(const at::Tensor& crow_indices, const at::Tensor& col_indices, at::IntArrayRef tiling,
                           int64_t vector, at::IntArrayRef input_size, int64_t out_channels, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_dim(col_indices, "col_indices", 1);
  const Pattern pattern(crow_indices, col_indices, {}, out_channels, groups, vector);
  check_tiling(tiling, shape);
  at::Tensor plan = at::empty({crow_indices.size(0) + 2 * pattern.n_vectors}, crow_indices.options());
  int32_t* to = plan.mutable_data_ptr<int32_t>();
  to = std::copy_n(pattern.crow, crow_indices.size(0), to);
  to = std::copy_n(pattern.col, pattern.n_vectors, to);
  direct_offsets(shape, pattern, tiling.vec(), to);
  return plan;
}

at::Tensor conv2d_planned_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& plan,
                              at::IntArrayRef tiling, const OptionalTensor& row_indices, const OptionalTensor& scale,
                              const OptionalTensor& shift, const OptionalTensor& residual, c10::string_view activation,
                              bool to_lanes, int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(!to_lanes && input.dim() == 4, "Expected [N, C, H, W] in and out on the CPU, got an input of ",
                    input.dim(), " dimensions and to_lanes=", to_lanes ? "True" : "False");
  check_dim(values, "values", 2);
  check_indices(plan, "plan", plan);
  TORCH_CHECK_VALUE(groups >= 1 && values.size(1) >= 1, "Expected groups and V of at least 1, got groups=", groups,
                    ", V = ", values.size(1));
  const int64_t rows = groups * ceil_div(out_channels / groups, values.size(1)) + 1, count = values.size(0);
  TORCH_CHECK_VALUE(plan.size(0) == rows + 2 * count, "Expected a plan of conv2d_plan with ", rows + 2 * count,
                    " entries for ", rows - 1, " row groups and ", count, " vectors, got ", plan.size(0));
  const OffsetPlan offsets{tiling.vec(), plan.const_data_ptr<int32_t>() + rows + count};
  return run_conv2d(input, values, plan.narrow(0, 0, rows), plan.narrow(0, rows, count), row_indices, scale, shift,
                    "shift", residual, activation_of(activation), out_channels,
                    {kernel_size, stride, padding, dilation, groups}, &offsets);
}

at::Tensor conv2d_input_grad_cpu(const at::Tensor& grad_output, const at::Tensor& values,
                                 const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                 const OptionalTensor& row_indices, const OptionalTensor& transpose,
                                 at::IntArrayRef input_size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_floating(grad_output, "grad_output");
  check_dim(grad_output, "grad_output", 4);
  const int64_t out_channels = grad_output.size(1);
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(grad_output.sizes() ==
                        at::IntArrayRef({shape.batch, out_channels, shape.output[0], shape.output[1]}),
                    "Expected grad_output of shape [", shape.batch, ", ", out_channels, ", ", shape.output[0], ", ",
                    shape.output[1], "], got ", grad_output.sizes());
  check_values(values, grad_output, "grad_output", col_indices);
  const at::Tensor plan = transpose ? *transpose
                                    : transpose_pattern(crow_indices, col_indices, row_indices, values.size(1),
                                                        out_channels, shape.in_channels, shape.taps(), groups);
  check_same(plan, "transpose", crow_indices, "crow_indices");
  const Transposed transposed(plan, shape.in_channels, values.numel());
  const bool last = lies_last(grad_output);
  const at::Tensor wide_grad = last ? grad_output : widened(grad_output);
  at::Tensor grad_input = empty(input_size, wide_grad, last);
  direct_input_grad(shape, transposed, wide_grad, widened(values), last, grad_input);
  return grad_input.to(grad_output.options(), false, false, grad_output.suggest_memory_format());
}

at::Tensor conv2d_weight_grad_cpu(const at::Tensor& input, const at::Tensor& grad_output,
                                  const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                  const OptionalTensor& row_indices, int64_t vector, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups) {
  check_floating(input, "input");
  check_dim(grad_output, "grad_output", 4);
  check_same(grad_output, "grad_output", input, "input");
  const int64_t out_channels = grad_output.size(1);
  const Conv2dShape shape =
      checked_shape(input.sizes(), out_channels, kernel_size, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(grad_output.sizes() ==
                        at::IntArrayRef({shape.batch, out_channels, shape.output[0], shape.output[1]}),
                    "Expected grad_output of shape [", shape.batch, ", ", out_channels, ", ", shape.output[0], ", ",
                    shape.output[1], "], got ", grad_output.sizes());
  check_dim(col_indices, "col_indices", 1);
  const Pattern pattern(crow_indices, col_indices, row_indices, out_channels, groups, vector);
  const bool last = lies_last(input) && lies_last(grad_output);
  const at::Tensor wide_input = last ? input : widened(input);
  at::Tensor grad_values = at::empty({pattern.n_vectors, vector}, wide_input.options());
  direct_weight_grad(shape, pattern, wide_input, last ? grad_output : widened(grad_output), last, grad_values);
  return grad_values.to(input.scalar_type());
}

at::Tensor transpose_pattern_cpu(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                 const OptionalTensor& row_indices, int64_t vector, int64_t out_channels,
                                 int64_t in_channels, int64_t taps, int64_t groups) {
  check_dim(col_indices, "col_indices", 1);
  return transpose_pattern(crow_indices, col_indices, row_indices, vector, out_channels, in_channels, taps, groups);
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) {
  m.impl("conv2d", &sparsekd::cpu::conv2d_cpu);
  m.impl("conv2d_fused", &sparsekd::cpu::conv2d_fused_cpu);
  m.impl("conv2d_tiling", &sparsekd::cpu::conv2d_tiling_cpu);
  m.impl("conv2d_plan", &sparsekd::cpu::conv2d_plan_cpu);
  m.impl("conv2d_planned", &sparsekd::cpu::conv2d_planned_cpu);
  m.impl("conv2d_input_grad", &sparsekd::cpu::conv2d_input_grad_cpu);
  m.impl("conv2d_weight_grad", &sparsekd::cpu::conv2d_weight_grad_cpu);
  m.impl("transpose_pattern", &sparsekd::cpu::transpose_pattern_cpu);
}
