// linear and its gradients on the CPU.
//
//   output [N, out] = input [N, in] @ weight^T + bias, weight [out, in] in vector-CSR
//
// One row of activations is a dot product per output (spmv.inc). More rows are the pixels of a 1 x 1 convolution over
// one image in channels_last.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>

#include "../check.h"
#include "direct.h"
#include "kernels.h"

namespace sparsekd::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

Conv2dShape pixels_of_rows(int64_t rows, int64_t in_features, int64_t out_features) {
  return {1, in_features, out_features, 1, {1, rows}, {1, rows}, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
}

void check_index_range(int64_t features) {
  TORCH_CHECK_VALUE(features <= std::numeric_limits<int32_t>::max(), "Expected fewer than 2^31 features, got ",
                    features);
}

// What the product with single rows needs of a packed matrix: the weight in the forward, its transposed pattern in the
// input gradient.
template <class T>
struct Packed {
  const int32_t* crow;
  const int32_t* col;
  int64_t n_vectors;
  const T* values;  // [n_vectors, vector]
  int vector;
  const std::vector<int64_t>& row_of;  // [row groups * vector], -1 for padding
  const T* init;                       // [row groups * vector] or null
  int64_t columns, results;            // sizes of a row of activations before and after

  int64_t groups() const { return static_cast<int64_t>(row_of.size()) / vector; }
};

template <class Body>
void parallel_over(int64_t count, int64_t grain, Body body) {
  at::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

constexpr int64_t kGrain = 32 * 1024;  // multiply-adds that pay for another thread

template <class T>
void one_row(const Packed<T>& packed, const T* input, T* output, const char* name) {
  const int64_t groups = packed.groups();
  std::unique_ptr<T[]> sums(new T[packed.row_of.size()]);
  const SpmvRows<T> rows{input,         packed.crow,   packed.col,  static_cast<int32_t>(packed.columns),
                         packed.values, packed.vector, packed.init, sums.get()};
  const int64_t per_group = packed.n_vectors * packed.vector / std::max<int64_t>(groups, 1) + 1;
  parallel_over(groups, kGrain / per_group, [&](int64_t begin, int64_t end) {
    if (!type_kernels<T>().spmv(rows, begin, end)) outside_error(packed.col, packed.n_vectors, packed.columns, name);
    for (int64_t position = begin * packed.vector; position < end * packed.vector; ++position) {
      if (packed.row_of[position] >= 0) output[packed.row_of[position]] = sums[position];
    }
  });
}

// Rows that are faster one by one than in the lanes, most of which they would leave idle.
constexpr int64_t kSingly = 2;

template <class T>
void product(const Packed<T>& packed, int64_t count, const T* input, T* output, const char* name) {
  if (packed.results == 0) return;
  for (int64_t n = 0; n < count; ++n) {
    one_row(packed, input + n * packed.columns, output + n * packed.results, name);
  }
}

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
                      const at::Tensor& col_indices, const OptionalTensor& row_indices, const OptionalTensor&,
                      const OptionalTensor& bias, int64_t out_features) {
  check_floating(input, "input");
  check_dim(input, "input", 2);
  check_values(values, input, "input", col_indices);
  const at::Tensor wide_bias = widened(checked_channels(bias, "bias", input, out_features, "output features"));
  const Pattern pattern(crow_indices, col_indices, row_indices, out_features, 1, values.size(1));
  check_index_range(input.size(1));
  const at::Tensor wide_input = widened(input), wide_values = widened(values);
  at::Tensor output = at::empty({input.size(0), out_features}, wide_input.options());
  if (input.size(0) > kSingly) {
    direct_forward(pixels_of_rows(input.size(0), input.size(1), out_features), pattern, nullptr, wide_input,
                   wide_values, {{}, wide_bias, {}}, true, output);
    return output.to(input.scalar_type());
  }
  dispatch(wide_input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> init;
    if (bias) {
      const T* data = wide_bias.const_data_ptr<T>();
      for (const int64_t row : pattern.row_of) init.push_back(row < 0 ? T(0) : data[row]);
    }
    const Packed<T> packed{pattern.crow, pattern.col, pattern.n_vectors, wide_values.const_data_ptr<T>(),
                           static_cast<int>(pattern.vector), pattern.row_of, bias ? init.data() : nullptr,
                           input.size(1), out_features};
    product(packed, input.size(0), wide_input.const_data_ptr<T>(), output.mutable_data_ptr<T>(), "col_indices");
  });
  return output.to(input.scalar_type());
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
  check_index_range(out_features);
  const at::Tensor wide_grad = widened(grad_output), wide_values = widened(values);
  at::Tensor grad_input = at::empty({rows, in_features}, wide_grad.options());
  if (rows > kSingly) {
    direct_input_grad(pixels_of_rows(rows, in_features, out_features), pattern, wide_grad, wide_values, true,
                      grad_input);
    return grad_input.to(grad_output.scalar_type());
  }
  std::vector<int64_t> row_of(in_features);
  std::iota(row_of.begin(), row_of.end(), 0);
  dispatch(wide_grad, [&](auto zero) {
    using T = decltype(zero);
    std::unique_ptr<T[]> gathered(new T[pattern.count]);
    const T* data = wide_values.const_data_ptr<T>();
    for (int64_t i = 0; i < pattern.count; ++i) gathered[i] = data[pattern.place[i]];
    const Packed<T> packed{pattern.crow, pattern.col, pattern.count, gathered.get(), 1, row_of, nullptr, out_features,
                           in_features};
    product(packed, rows, wide_grad.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>(),
            "the transpose plan's columns");
  });
  return grad_input.to(grad_output.scalar_type());
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
  const at::Tensor wide_input = widened(input);
  at::Tensor grad_values = at::empty({pattern.n_vectors, vector}, wide_input.options());
  direct_weight_grad(pixels_of_rows(input.size(0), input.size(1), grad_output.size(1)), pattern, wide_input,
                     widened(grad_output), true, grad_values);
  return grad_values.to(input.scalar_type());
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) {
  m.impl("linear", &sparsekd::cpu::linear_cpu);
  m.impl("linear_input_grad", &sparsekd::cpu::linear_input_grad_cpu);
  m.impl("linear_weight_grad", &sparsekd::cpu::linear_weight_grad_cpu);
}
