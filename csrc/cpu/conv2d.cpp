// conv2d and its gradients on the CPU: checks first, then direct.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../geometry.h"
#include "../resident.h"
#include "direct.h"
#include "trained_conv2d.h"

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
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return empty_result(size, like.options().memory_format(format));
}

// So many of a plan's entries: what narrow() gives, without its way through the dispatcher, which a small layer feels.
at::Tensor entries(const at::Tensor& plan, int64_t from, int64_t count) {
  at::Tensor view =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(plan.storage()), plan.key_set(), plan.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(plan.storage_offset() + from);
  view.unsafeGetTensorImpl()->set_sizes_contiguous(count);
  return view;
}

// The channels' scale or shift, if any, in the dtype of the sums.
at::Tensor wide_channels(const OptionalTensor& tensor, const char* name, const at::Tensor& input, int64_t channels) {
  return widened(checked_channels(tensor, name, input, channels));
}

// A tiling of the ops: whether entries lie block by block, and what they depend on.
struct PlanKind {
  PlanKind(at::IntArrayRef numbers, const Conv2dShape& shape) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(numbers.size()) == shape.taps() + 3,
                      "Expected a tiling of conv2d_tiling with ", shape.taps() + 3, " numbers for ", shape.taps(),
                      " taps, got ", numbers.size());
    for (const int64_t number : numbers) {
      TORCH_CHECK_VALUE(number >= 0 && number <= std::numeric_limits<int32_t>::max(),
                        "Expected a tiling of numbers from 0 to 2^31 - 1, got ", number);
    }
    ordered = numbers[0] != 0;
    tiling = numbers.slice(1).vec();
    const int64_t channels = shape.in_channels / shape.groups;
    TORCH_CHECK_VALUE(tiling[1] >= 1 && tiling[1] <= std::max<int64_t>(channels, 1), "Expected a tiling with 1 to ",
                      channels, " blocks of channels, got ", tiling[1]);
  }
  // Numbers in a plan [crow_indices | col_indices | starts | offsets | 0 | order], the last ones as in OffsetPlan; the
  // kernel reads one offset ahead.
  int64_t starts(int64_t row_groups) const {
    return ordered ? tiling[1] * row_groups + 1 : (tiling[1] + 1) * row_groups;
  }
  int64_t size(int64_t row_groups, int64_t vectors) const {
    return row_groups + 1 + (ordered ? 3 : 2) * vectors + starts(row_groups) + 1;
  }

  bool ordered;
  Tiling tiling;
};

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
  const auto size = shape.output_size();
  const Pattern pattern(crow_indices, col_indices, row_indices, out_channels, geometry.groups, values.size(1));
  const bool last = lies_last(input);
  if (residual) {
    check_residual(*residual, size, input);
    finish.residual = last ? residual->contiguous(at::MemoryFormat::ChannelsLast) : widened(*residual);
  }
  const at::Tensor wide_input = last ? input : widened(input);
  at::Tensor output = empty(size, wide_input, last);
  direct_forward(shape, pattern, plan, wide_input, widened(values), finish, last, output);
  // Which is not always the one of `last`: the strides of an image alone may tell of neither.
  const at::MemoryFormat format = input.suggest_memory_format();
  const bool ready = format == (last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  return ready && wide_input.is_same(input) ? output : output.to(input.options(), false, false, format);
}

at::Tensor conv2d_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                      const at::Tensor& col_indices, const OptionalTensor& row_indices, const OptionalTensor& transpose,
                      const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef kernel_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (transpose && transpose->has_storage()) {  // a pattern that is trained
    check_floating(input, "input");
    const Conv2dShape shape =
        checked_shape(input.sizes(), out_channels, kernel_size, stride, padding, dilation, groups);
    check_values(values, input, "input", col_indices);
    checked_channels(bias, "bias", input, out_channels);
    OptionalTensor output =
        trained_forward(shape, input, values, crow_indices, col_indices, row_indices, *transpose, bias);
    if (output) return *output;
  }
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

// The tiling says how a float32 input of this size lies, if it is contiguous: another one has its offsets made anew. A
// caller whose values lie in the plan's order makes its first number 1.
std::vector<int64_t> conv2d_tiling_cpu(const at::Tensor& col_indices, int64_t vector, at::IntArrayRef input_size,
                                       int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool) {
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_dim(col_indices, "col_indices", 1);
  TORCH_CHECK_VALUE(vector >= 1 && out_channels >= groups, "Expected V and channels per group of at least 1, got V = ",
                    vector, ", ", out_channels, " channels and groups=", groups);
  if (shape.batch == 0) return {};
  // It depends on how many entries there are, not on where.
  at::Tensor crow = at::zeros({groups * ceil_div(out_channels / groups, vector) + 1}, at::kInt);
  crow[-1] = col_indices.size(0);
  Tiling tiling =
      direct_tiling(shape, Pattern(crow, col_indices, {}, out_channels, groups, vector), at::empty({0}, at::kFloat));
  tiling.insert(tiling.begin(), 0);
  return tiling;
}

at::Tensor conv2d_plan_cpu(const at::Tensor& crow_indices, const at::Tensor& col_indices, at::IntArrayRef tiling,
                           int64_t vector, at::IntArrayRef input_size, int64_t out_channels,
                           at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups) {
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_dim(col_indices, "col_indices", 1);
  const Pattern pattern(crow_indices, col_indices, {}, out_channels, groups, vector);
  const PlanKind kind(tiling, shape);
  const int64_t row_groups = crow_indices.size(0) - 1;
  at::Tensor plan = empty_resident({kind.size(row_groups, pattern.n_vectors)}, crow_indices.options());
  int32_t* to = plan.mutable_data_ptr<int32_t>();
  to = std::copy_n(pattern.crow, row_groups + 1, to);
  to = std::copy_n(pattern.col, pattern.n_vectors, to);
  int32_t* const offsets = to + kind.starts(row_groups);
  int32_t* const after = offsets + pattern.n_vectors;
  *after = 0;
  plan_offsets(shape, pattern, kind.tiling, to, offsets, kind.ordered ? after + 1 : nullptr);
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
  const Conv2dShape shape = checked_shape(input.sizes(), out_channels, kernel_size, stride, padding, dilation, groups);
  const PlanKind kind(tiling, shape);
  const int64_t rows = groups * ceil_div(out_channels / groups, values.size(1)), count = values.size(0);
  TORCH_CHECK_VALUE(plan.size(0) == kind.size(rows, count), "Expected a plan of conv2d_plan with ",
                    kind.size(rows, count), " entries for ", rows, " row groups, ", count, " vectors and ",
                    kind.tiling[1], " blocks, got ", plan.size(0));
  const int32_t* const starts = plan.const_data_ptr<int32_t>() + rows + 1 + count;
  const int32_t* const after = starts + kind.starts(rows);
  const OffsetPlan offsets{kind.tiling, starts, after, kind.ordered ? after + count + 1 : nullptr};
  return run_conv2d(input, values, entries(plan, 0, rows + 1), entries(plan, rows + 1, count), row_indices, scale,
                    shift, "shift", residual, activation_of(activation), out_channels,
                    {kernel_size, stride, padding, dilation, groups}, &offsets);
}

at::Tensor conv2d_input_grad_cpu(const at::Tensor& grad_output, const at::Tensor& values,
                                 const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                 const OptionalTensor& row_indices, const OptionalTensor& transpose,
                                 at::IntArrayRef input_size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_floating(grad_output, "grad_output");
  const Conv2dShape shape =
      checked_grad_shape(grad_output, input_size, kernel_size, stride, padding, dilation, groups);
  check_values(values, grad_output, "grad_output", col_indices);
  if (transpose) {
    check_same(*transpose, "transpose", crow_indices, "crow_indices");
    OptionalTensor grad_input = trained_input_grad(shape, grad_output, values, *transpose);
    if (grad_input) return *grad_input;
  }
  const at::Tensor plan = transpose ? *transpose
                                    : transpose_pattern(crow_indices, col_indices, row_indices, values.size(1),
                                                        shape.out_channels, shape.in_channels, shape.taps(), groups);
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
  check_same(grad_output, "grad_output", input, "input");
  const Conv2dShape shape =
      checked_grad_shape(grad_output, input.sizes(), kernel_size, stride, padding, dilation, groups);
  check_dim(col_indices, "col_indices", 1);
  OptionalTensor grad = trained_weight_grad(shape, input, grad_output, crow_indices, col_indices, row_indices, vector);
  if (grad) return *grad;
  const Pattern pattern(crow_indices, col_indices, row_indices, shape.out_channels, groups, vector);
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
