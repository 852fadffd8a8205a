// The input gradient of conv2d on CUDA: the convolution's kernels on the transposed pattern, once for each phase of the
// stride, or for the four of stride 2 together; and that pattern, which is made on the host.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <array>
#include <limits>
#include <vector>

#include "direct.h"
#include "planar_host.h"

namespace sparsekd::cuda {
namespace {

at::Tensor transpose_pattern(const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows, int64_t vector,
                             int64_t out_channels, int64_t in_channels, int64_t taps, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sparsekd::transpose_pattern", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                               int64_t, int64_t, int64_t, int64_t)>();
  const OptionalTensor host_rows = rows ? OptionalTensor(rows->cpu()) : std::nullopt;
  return op.call(crow.cpu(), col.cpu(), host_rows, vector, out_channels, in_channels, taps, groups).to(crow.device());
}

}  // namespace

Pattern transposed(const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows,
                   const OptionalTensor& transpose, int64_t out_channels, int64_t in_channels, int64_t taps,
                   int64_t groups) {
  const at::Tensor plan =
      transpose ? *transpose
                : transpose_pattern(crow, col, rows, values.size(1), out_channels, in_channels, taps, groups);
  check_indices(plan, "transpose", values);
  const int64_t count = (plan.size(0) - (in_channels + 1)) / 2;
  TORCH_CHECK_VALUE(plan.size(0) == in_channels + 1 + 2 * count && count >= 0,
                    "Expected a transpose plan made by transpose_pattern for ", in_channels, " input channels, got ",
                    plan.size(0), " entries");
  return {values.contiguous(), plan.narrow(0, 0, in_channels + 1), plan.narrow(0, in_channels + 1, count),
          plan.narrow(0, in_channels + 1 + count, count), {}, {}};
}

namespace {

// Element position * stride + phase of the input had its part in those elements of the output from which
//   (phase + padding - r * dilation) / stride
// away it lies, for each r where that leaves no rest. False where there is none. For `phases` of them from `phase` on.
bool input_grad_axis(const Conv2dShape& shape, int d, int64_t phase, int64_t phases, TapAxis& axis) {
  const int64_t kernel = shape.kernel[d], stride = shape.stride[d], dilation = shape.dilation[d];
  int64_t least = std::numeric_limits<int64_t>::max(), most = std::numeric_limits<int64_t>::min();
  for (int64_t r = 0; r < kernel * phases; ++r) {
    const int64_t t = phase + r % phases + shape.padding[d] - r / phases * dilation;
    if (t % stride != 0) continue;
    least = std::min(least, t / stride);
    most = std::max(most, t / stride);
  }
  if (least > most) return false;
  axis.kernel = int(kernel);
  axis.add = int(phase + shape.padding[d]);
  axis.mult = -int(dilation);
  axis.div = int(stride);
  axis.least = int(least);
  axis.origin = int(least);
  axis.size = int(shape.output[d]);
  axis.positions = int(ceil_div(shape.input[d] - phase, stride));
  axis.out_step = int(stride);
  axis.out_begin = int(phase);
  axis.most = int(most - least);
  return true;
}

at::Tensor conv2d_input_grad_cuda(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow,
                                  const at::Tensor& col, const OptionalTensor& rows, const OptionalTensor& transpose,
                                  at::IntArrayRef input_size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_device(grad_output, "grad_output");
  check_type(grad_output, "grad_output");
  const Conv2dShape shape =
      checked_grad_shape(grad_output, input_size, kernel_size, stride, padding, dilation, groups);
  const int64_t out_channels = shape.out_channels;
  check_values(values, grad_output, "grad_output", col);
  checked_row_groups(crow, col, rows, grad_output, out_channels, groups, values.size(1));
  const Pattern pattern = transposed(values, crow, col, rows, transpose, out_channels, shape.in_channels, shape.taps(),
                                     groups);

  const auto options = grad_output.options().memory_format(grad_output.suggest_memory_format());
  std::vector<std::array<TapAxis, 2>> phases;
  bool all = true;
  for (int64_t py = 0; py < std::min(shape.stride[0], shape.input[0]); ++py) {
    for (int64_t px = 0; px < std::min(shape.stride[1], shape.input[1]); ++px) {
      std::array<TapAxis, 2> axes;
      const bool any = input_grad_axis(shape, 0, py, 1, axes[0]) && input_grad_axis(shape, 1, px, 1, axes[1]);
      if (any) phases.push_back(axes);
      all = all && any;
    }
  }
  const at::Tensor grad_input = at::empty(input_size, options);
  if (grad_input.numel() == 0) return grad_input;
  // The four phases of stride 2, if each has a tap and results lie in rows.
  Problem together{shape.batch, out_channels, shape.in_channels, groups, 1, shape.in_channels, {}, true,
                   {shape.input[0], shape.input[1]}};
  bool interleaved = all && shape.stride[0] == 2 && shape.stride[1] == 2 && phases.size() == 4 &&
                     (grad_input.is_contiguous() || is_channels_last(grad_input));
  for (int d = 0; interleaved && d < 2; ++d) input_grad_axis(shape, d, 0, 2, together.axes[d]);
  Call call(grad_output);
  interleaved = interleaved && choose(tensor_device(call, grad_output), together, pattern.col.size(0), grad_input);
  call.reads(grad_output, "grad_output");
  read_pattern(call, pattern);
  // A stride may step over elements, which then have no gradient.
  all || is_channels_last(grad_input) ? call.writes(grad_input, "output gradient")
                                      : call.updates(grad_input, "output gradient");
  const auto run_phases = [&](const at::Tensor& to, const at::Tensor&) {
    for (const auto& axes : phases) {
      const Problem problem{shape.batch, out_channels, shape.in_channels, groups, 1, shape.in_channels,
                            {axes[0], axes[1]}};
      run(call, problem, pattern, grad_output, {}, to);
    }
  };
  if (interleaved) {
    run(call, together, pattern, grad_output, {}, grad_input);
  } else {
    run_planar(call, grad_input, {}, run_phases, !all);
  }
  call.finish();
  return grad_input;
}

// Once per pattern, so it is made on the host by the CPU's code, for which this waits.
at::Tensor transpose_pattern_cuda(const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows,
                                  int64_t vector, int64_t out_channels, int64_t in_channels, int64_t taps,
                                  int64_t groups) {
  check_device(crow, "crow_indices");
  check_indices(crow, "crow_indices", crow);
  check_indices(col, "col_indices", crow);
  if (rows) check_indices(*rows, "row_indices", crow);
  return transpose_pattern(crow, col, rows, vector, out_channels, in_channels, taps, groups);
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) {
  m.impl("conv2d_input_grad", &sparsekd::cuda::conv2d_input_grad_cuda);
  m.impl("transpose_pattern", &sparsekd::cuda::transpose_pattern_cuda);
}
