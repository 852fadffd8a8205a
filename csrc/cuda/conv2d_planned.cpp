// conv2d_tiling, conv2d_plan and conv2d_planned: the convolution with its preparation made once, on tensor cores on
// activations that stay in lanes from layer to layer; what is apart on CUDA cores lies in core_plan.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include "conv2d_tensor_host.h"
#include "core_plan.h"
#include "direct.h"
#include "planar_host.h"

namespace sparsekd::cuda {
namespace {

TensorProblem problem_of(const Conv2dShape& shape, int64_t vector, int64_t n_vectors) {
  TORCH_CHECK_VALUE(vector >= 8, "Expected V of at least 8 for tensor cores, got V = ", vector);
  TORCH_CHECK_VALUE(shape.out_channels >= shape.groups && shape.out_channels % shape.groups == 0,
                    "Expected a number of output channels divisible by groups, got ", shape.out_channels,
                    " and groups=", shape.groups);
  return {shape.batch, shape.in_channels, shape.out_channels, shape.groups, vector,
          shape.groups * ceil_div(shape.out_channels / shape.groups, vector), n_vectors,
          {forward_axis(shape, 0), forward_axis(shape, 1)}};
}

std::vector<int64_t> conv2d_tiling_cuda(const at::Tensor& col, int64_t vector, at::IntArrayRef input_size,
                                        int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                        bool tensor_cores) {
  check_device(col, "col_indices");
  check_dim(col, "col_indices", 1);
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  Call call(col);
  if (!tensor_cores) return core_tiling(call, core_problem(shape, vector), col);
  std::string reason;
  // Plans are kept for layers in a row, whose activations stay in lanes if whole ones can be filled.
  const Results results = shape.batch % kLanes == 0 ? Results::lanes : Results::images;
  const auto chosen = choose_tiling(problem_of(shape, vector, col.size(0)), tensor_device(call, col), results, reason);
  return chosen ? chosen->tiling.numbers() : std::vector<int64_t>{};
}

at::Tensor conv2d_plan_cuda(const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef tiling, int64_t vector,
                            at::IntArrayRef input_size, int64_t out_channels, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_device(crow, "crow_indices");
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  checked_row_groups(crow, col, {}, crow, out_channels, groups, vector);
  if (for_cuda_cores(tiling)) {
    Call call(crow);
    call.reads(crow, "crow_indices");
    call.reads(col, "col_indices");
    at::Tensor plan = make_core_plan(call, core_problem(shape, vector), tiling, crow, col);
    call.finish();
    return plan;
  }
  const TensorProblem problem = problem_of(shape, vector, col.size(0));
  Call call(crow);
  const Tiling numbers = checked_tiling(tiling, problem, tensor_device(call, crow));
  call.reads(crow, "crow_indices");
  call.reads(col, "col_indices");
  at::Tensor plan = make_plan(call, problem, numbers, crow, col);
  call.finish();
  return plan;
}

bool has_strides(const at::Tensor& t, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) != strides[d]) return false;
  }
  return true;
}

// As the kernel reads it: rows and planes one after another, at 16 bytes.
at::Tensor lanes_in_order(const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.size(4) == kLanes, "Expected activations in lanes of shape [units, C, H, W, 8], got ", t.sizes());
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  if (aligned && has_strides(t, lanes_strides(t.sizes()))) return t;
  const at::Tensor made = at::empty_strided(t.sizes(), lanes_strides(t.sizes()), t.options());
  made.copy_(t);
  return made;
}

at::Tensor conv2d_planned_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& plan,
                               at::IntArrayRef tiling, const OptionalTensor& rows, const OptionalTensor& scale,
                               const OptionalTensor& shift, const OptionalTensor& residual,
                               c10::string_view activation, bool to_lanes, int64_t out_channels,
                               at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups) {
  check_device(input, "input");
  check_type(input, "input");
  const bool cores = for_cuda_cores(tiling);
  TORCH_CHECK_TYPE(cores || input.element_size() == 2, "Expected input of dtype Half or BFloat16, got ", input.scalar_type());
  const bool in_lanes = input.dim() == 5;
  TORCH_CHECK_VALUE(!cores || (input.dim() == 4 && !to_lanes),
                    "Expected an input [N, C, H, W] and no result in lanes by a plan for CUDA cores, got shape ",
                    input.sizes());
  TORCH_CHECK_VALUE(in_lanes || input.dim() == 4,
                    "Expected an input [N, C, H, W], or in lanes [units, C, H, W, 8], got shape ", input.sizes());
  const int64_t batch = in_lanes ? input.size(0) * kLanes : input.size(0);
  const int64_t input_size[] = {batch, input.size(1), input.size(2), input.size(3)};
  const Conv2dShape shape = checked_shape(input_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_dim(values, "values", 2);
  check_same(values, "values", input, "input");
  check_indices(plan, "plan", input);
  if (rows) {
    check_indices(*rows, "row_indices", input);
    check_size(*rows, "row_indices", 0, out_channels, "output channels");
  }
  if (cores) {
    const Finish finish{checked_channels(scale, "scale", input, out_channels),
                        checked_channels(shift, "shift", input, out_channels), {}, activation_of(activation)};
    return run_core_plan(input, values.contiguous(), plan, tiling, rows, residual, finish, shape);
  }
  const TensorProblem problem = problem_of(shape, values.size(1), values.size(0));
  Call call(input);
  const Tiling numbers = checked_tiling(tiling, problem, tensor_device(call, input));
  check_size(plan, "plan", 0, tile_of(problem, numbers).plan_ints(), "numbers that this tiling's plan has");

  TensorOperands operands{in_lanes ? lanes_in_order(input) : input, values.contiguous(), plan,
                          rows.value_or(at::Tensor()), checked_channels(scale, "scale", input, out_channels),
                          checked_channels(shift, "shift", input, out_channels), {}, {}, activation_of(activation)};
  const auto images = shape.output_size();
  std::vector<int64_t> size(images.begin(), images.end());
  if (to_lanes) {
    size[0] = ceil_div(batch, kLanes);
    size.push_back(kLanes);
    operands.output = at::empty_strided(size, lanes_strides(size), input.options());
  } else {
    const auto format = in_lanes ? at::MemoryFormat::Contiguous : input.suggest_memory_format();
    operands.output = at::empty(size, input.options().memory_format(format));
  }
  const at::Tensor& output = operands.output;
  if (residual) {
    check_residual(*residual, output.sizes(), input);
    operands.residual = to_lanes ? lanes_in_order(*residual) : residual->contiguous(output.suggest_memory_format());
  }
  if (output.numel() == 0) return output;
  call.reads(operands.input, "input");
  call.reads(operands.values, "values");
  call.reads(plan, "plan");
  call.reads(operands.rows, "row_indices");
  call.reads(operands.scale, "scale");
  call.reads(operands.shift, "shift");
  call.reads(operands.residual, "residual");
  if (to_lanes && size[3] % 2 != 0) {
    call.updates(output, "output");  // what fills up its rows is never written
  } else {
    call.writes(output, "output");
  }
  if (to_lanes) {
    run_planned(call, problem, numbers, operands);
  } else {
    run_planar(call, output, operands.residual, [&](const at::Tensor& to, const at::Tensor& planes) {
      TensorOperands of = operands;
      of.output = to;
      of.residual = planes;
      run_planned(call, problem, numbers, of);
    });
  }
  call.finish();
  return output;
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) {
  m.impl("conv2d_tiling", &sparsekd::cuda::conv2d_tiling_cuda);
  m.impl("conv2d_plan", &sparsekd::cuda::conv2d_plan_cuda);
  m.impl("conv2d_planned", &sparsekd::cuda::conv2d_planned_cuda);
}
