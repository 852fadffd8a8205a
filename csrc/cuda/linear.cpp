// linear and its gradients on CUDA.
//
//   output [N, out] = input [N, in] @ weight^T + bias, weight [out, in] in vector-CSR
//
// The rows of activations are the rows of pixels of a 1 x 1 convolution over one image of one column, so that they fill
// the lanes as strips.
#include <ATen/ops/empty.h>

#include <limits>

#include "direct.h"

namespace sparsekd::cuda {
namespace {

// [N, features] as [1, features, N, 1].
at::Tensor as_image(const at::Tensor& rows) { return rows.t().unsqueeze(0).unsqueeze(3); }

Problem problem_of(int64_t rows, int64_t in_features, int64_t out_features, int64_t vector, int64_t row_groups) {
  const int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(std::max({rows, in_features, out_features}) < limit,
                    "Expected fewer than 2^31 rows and features, got ", rows, " rows of ", in_features, " and ",
                    out_features, " features");
  TapAxis axis;
  axis.size = axis.positions = int(rows);
  return {1, in_features, out_features, 1, vector, row_groups, {axis, TapAxis{}}};
}

at::Tensor linear_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col,
                       const OptionalTensor& rows, const OptionalTensor&, const OptionalTensor& bias,
                       int64_t out_features) {
  check_device(input, "input");
  check_type(input, "input");
  check_dim(input, "input", 2);
  check_values(values, input, "input", col);
  const Finish finish{{}, checked_channels(bias, "bias", input, out_features, "output features"), {},
                      Activation::none};
  const int64_t row_groups = checked_row_groups(crow, col, rows, input, out_features, 1, values.size(1));
  const at::Tensor output = at::empty({input.size(0), out_features}, input.options());
  if (output.numel() == 0) return output;
  const Pattern pattern{values.contiguous(), crow, col, {}, rows.value_or(at::Tensor()), {}};
  Call call(input);
  call.reads(input, "input");
  read_pattern(call, pattern);
  call.reads(finish.shift, "bias");
  call.writes(output, "output");
  run(call, problem_of(input.size(0), input.size(1), out_features, values.size(1), row_groups), pattern,
      as_image(input), finish, as_image(output));
  call.finish();
  return output;
}

at::Tensor linear_input_grad_cuda(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow,
                                  const at::Tensor& col, const OptionalTensor& rows, const OptionalTensor& transpose,
                                  int64_t in_features) {
  check_device(grad_output, "grad_output");
  check_type(grad_output, "grad_output");
  check_dim(grad_output, "grad_output", 2);
  check_values(values, grad_output, "grad_output", col);
  const int64_t out_features = grad_output.size(1);
  checked_row_groups(crow, col, rows, grad_output, out_features, 1, values.size(1));
  const Pattern pattern = transposed(values, crow, col, rows, transpose, out_features, in_features, 1, 1);
  const at::Tensor grad_input = at::empty({grad_output.size(0), in_features}, grad_output.options());
  if (grad_input.numel() == 0) return grad_input;
  Call call(grad_output);
  call.reads(grad_output, "grad_output");
  read_pattern(call, pattern);
  call.writes(grad_input, "output gradient");
  run(call, problem_of(grad_output.size(0), out_features, in_features, 1, in_features), pattern, as_image(grad_output),
      {}, as_image(grad_input));
  call.finish();
  return grad_input;
}

at::Tensor linear_weight_grad_cuda(const at::Tensor& input, const at::Tensor& grad_output, const at::Tensor& crow,
                                   const at::Tensor& col, const OptionalTensor& rows, int64_t vector) {
  check_device(input, "input");
  check_type(input, "input");
  check_dim(input, "input", 2);
  check_dim(grad_output, "grad_output", 2);
  check_same(grad_output, "grad_output", input, "input");
  check_size(grad_output, "grad_output", 0, input.size(0), "rows of the input");
  const int64_t out_features = grad_output.size(1);
  const int64_t row_groups = checked_row_groups(crow, col, rows, input, out_features, 1, vector);
  const at::Tensor grad_values = at::empty({col.size(0), vector}, input.options());
  if (grad_values.numel() == 0) return grad_values;
  if (input.size(0) == 0) return grad_values.zero_();
  const Pattern pattern{{}, crow, col, {}, rows.value_or(at::Tensor()), {}};
  Call call(input);
  call.reads(input, "input");
  call.reads(grad_output, "grad_output");
  read_pattern(call, pattern);
  call.writes(grad_values, "output gradient");
  run_weight_grad(call, problem_of(input.size(0), input.size(1), out_features, vector, row_groups), pattern,
                  as_image(input), as_image(grad_output), grad_values);
  call.finish();
  return grad_values;
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) {
  m.impl("linear", &sparsekd::cuda::linear_cuda);
  m.impl("linear_input_grad", &sparsekd::cuda::linear_input_grad_cuda);
  m.impl("linear_weight_grad", &sparsekd::cuda::linear_weight_grad_cuda);
}
