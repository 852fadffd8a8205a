// linear and its gradients on the CPU: a 1 x 1 convolution in which the rows of the input are the pixels.
//
//   output [N, out] = input [N, in] @ weight^T + bias, weight [out, in] in vector-CSR
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "direct.h"

namespace sparsekd::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

Conv2dShape pixels_of_rows(int64_t rows, int64_t in_features, int64_t out_features) {
  return {1, in_features, out_features, 1, {1, rows}, {1, rows}, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
}

void check_values(const at::Tensor& values, const at::Tensor& like, const char* like_name,
                  const at::Tensor& col_indices) {
  check_dim(values, "values", 2);
  check_same(values, "values", like, like_name);
  check_dim(col_indices, "col_indices", 1);
  check_size(values, "values", 0, col_indices.size(0), "the number of col_indices");
}

// [N, features] to [features, N] and back.
at::Tensor transposed(const at::Tensor& matrix) { return widened(matrix.t()); }

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                      const at::Tensor& col_indices, const OptionalTensor& row_indices, const OptionalTensor&,
                      const OptionalTensor& bias, int64_t out_features) {
  check_floating(input, "input");
  check_dim(input, "input", 2);
  check_values(values, input, "input", col_indices);
  at::Tensor wide_bias;
  if (bias) {
    check_dim(*bias, "bias", 1);
    check_size(*bias, "bias", 0, out_features, "output features");
    check_same(*bias, "bias", input, "input");
    wide_bias = widened(*bias);
  }
  const Pattern pattern(crow_indices, col_indices, row_indices, out_features, 1, values.size(1));
  const Conv2dShape shape = pixels_of_rows(input.size(0), input.size(1), out_features);
  const at::Tensor planes = transposed(input);
  at::Tensor output = at::empty({out_features, input.size(0)}, planes.options());
  direct_forward(shape, pattern, planes, widened(values), wide_bias, output);
  return output.t().to(input.scalar_type()).contiguous();
}

at::Tensor linear_input_grad_cpu(const at::Tensor& grad_output, const at::Tensor& values,
                                 const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                 const OptionalTensor& row_indices, const OptionalTensor& transpose,
                                 int64_t in_features) {
  check_floating(grad_output, "grad_output");
  check_dim(grad_output, "grad_output", 2);
  check_values(values, grad_output, "grad_output", col_indices);
  const int64_t rows = grad_output.size(0), out_features = grad_output.size(1);
  const at::Tensor plan = transpose ? *transpose
                                    : transpose_pattern(crow_indices, col_indices, row_indices, values.size(1),
                                                        out_features, in_features, 1, 1);
  check_same(plan, "transpose", crow_indices, "crow_indices");
  const Transposed pattern(plan, in_features, values.numel());
  const at::Tensor planes = transposed(grad_output);
  at::Tensor grad_input = at::empty({in_features, rows}, planes.options());
  direct_input_grad(pixels_of_rows(rows, in_features, out_features), pattern, planes, widened(values), grad_input);
  return grad_input.t().to(grad_output.scalar_type()).contiguous();
}

at::Tensor linear_weight_grad_cpu(const at::Tensor& input, const at::Tensor& grad_output,
                                  const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                  const OptionalTensor& row_indices, int64_t vector) {
  check_floating(input, "input");
  check_dim(input, "input", 2);
  check_dim(grad_output, "grad_output", 2);
  check_same(grad_output, "grad_output", input, "input");
  check_size(grad_output, "grad_output", 0, input.size(0), "rows of the input");
  check_dim(col_indices, "col_indices", 1);
  const Pattern pattern(crow_indices, col_indices, row_indices, grad_output.size(1), 1, vector);
  const at::Tensor planes = transposed(input);
  at::Tensor grad_values = at::empty({pattern.n_vectors, vector}, planes.options());
  direct_weight_grad(pixels_of_rows(input.size(0), input.size(1), grad_output.size(1)), pattern, planes,
                     transposed(grad_output), grad_values);
  return grad_values.to(input.scalar_type());
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) {
  m.impl("linear", &sparsekd::cpu::linear_cpu);
  m.impl("linear_input_grad", &sparsekd::cpu::linear_input_grad_cpu);
  m.impl("linear_weight_grad", &sparsekd::cpu::linear_weight_grad_cpu);
}
