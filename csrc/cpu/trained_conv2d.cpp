#include "trained_conv2d.h"

#include <ATen/ops/empty.h>

#include <memory>
#include <utility>
#include <vector>

#include "../check.h"
#include "../resident.h"
#include "generated_conv2d.h"
#include "generated_dots.h"
#include "kept_code.h"

namespace sparsekd::cpu {
namespace {

enum Kind : int64_t { kForward, kInputGrad, kWeightGrad };

CodeStore::Key key_of(Kind kind, const Conv2dShape& shape, int64_t count, int64_t vector) {
  CodeStore::Key key{kind, count, vector, shape.batch, shape.in_channels, shape.out_channels, shape.groups};
  for (const Pair& pair : {shape.input, shape.kernel, shape.stride, shape.padding, shape.dilation}) {
    key.insert(key.end(), pair.begin(), pair.end());
  }
  return key;
}

bool plain_floats(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat && tensor.is_contiguous(); }

// Whether a step takes so long that code, which takes memory and as much time as a few steps to be made, saves some of
// it: of fewer multiply-adds the way through the operators takes longer.
bool worth_code(const Conv2dShape& shape, int64_t weights) {
  constexpr int64_t kLeast = int64_t{1} << 22;
  return generates_code() &&
         (generates_always() || weights * shape.batch * shape.output[0] * shape.output[1] >= kLeast);
}

// Vectors of values, [places.size(), V], that lie at the places.
at::Tensor in_order(const at::Tensor& values, const int32_t* places, int64_t count, int64_t vector) {
  at::Tensor ordered = at::empty({count, vector}, values.options());
  const float* const from = values.const_data_ptr<float>();
  float* const to = ordered.mutable_data_ptr<float>();
  if (vector == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[places[i]];
  } else {
    for (int64_t i = 0; i < count; ++i) std::copy_n(from + places[i] * vector, vector, to + i * vector);
  }
  return ordered;
}

struct ForwardCode final : KeptCode {
  ForwardCode(const Conv2dShape& shape, const std::vector<at::Tensor>& given, int64_t vector) : KeptCode(given) {
    const at::Tensor& rows = indices()[2];
    conv = GeneratedConv2d::of(shape, indices()[0], indices()[1],
                               rows.defined() ? std::optional<at::Tensor>(rows) : std::nullopt, vector);
  }
  size_t bytes() const override { return conv->code_bytes(); }
  std::unique_ptr<GeneratedConv2d> conv;
};

// With a stride of one it is a convolution of the output's gradient: taps in reverse, and padding by what they reach.
struct InputGradCode final : KeptCode {
  InputGradCode(const Conv2dShape& shape, const at::Tensor& plan) : KeptCode({plan}) {
    const Transposed transposed(plan, shape.in_channels, std::numeric_limits<int32_t>::max());
    Conv2dShape turned = shape;
    std::swap(turned.in_channels, turned.out_channels);
    std::swap(turned.input, turned.output);
    for (int d = 0; d < 2; ++d) turned.padding[d] = (shape.kernel[d] - 1) * shape.dilation[d] - shape.padding[d];
    if (shape.stride != Pair{1, 1} || std::min(turned.padding[0], turned.padding[1]) < 0) {
      if (generates_code()) phases = plan_input_grad(shape, transposed);
      return;
    }
    const int64_t taps = shape.taps(), columns = shape.out_channels / shape.groups * taps;
    at::Tensor crow = at::empty({shape.in_channels + 1}, at::kInt), col = at::empty({transposed.count}, at::kInt);
    std::copy_n(transposed.crow, shape.in_channels + 1, crow.mutable_data_ptr<int32_t>());
    int32_t* const reversed = col.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < transposed.count; ++i) {
      const int64_t column = transposed.col[i];
      if (column < 0 || column >= columns) {
        outside_error(transposed.col, transposed.count, columns, "the transpose plan's columns");
      }
      reversed[i] = static_cast<int32_t>(column - column % taps + taps - 1 - column % taps);
    }
    conv = GeneratedConv2d::of(turned, crow, col, std::nullopt, 1);
    if (!conv) return;
    const int32_t* const order = conv->order().const_data_ptr<int32_t>();
    for (int64_t i = 0; i < transposed.count; ++i) places.push_back(transposed.place[order[i]]);
  }
  size_t bytes() const override {
    size_t total = conv ? conv->code_bytes() : 0;
    for (size_t p = 0; phases && p < phases->phases.size(); ++p) {
      if (phases->phases[p].code) total += phases->phases[p].code->bytes();
    }
    return total;
  }
  std::unique_ptr<GeneratedConv2d> conv;    // or
  std::unique_ptr<InputGradPlan> phases;
  std::vector<int32_t> places;              // of conv's values in the order of its code
};

struct WeightGradCode final : KeptCode {
  WeightGradCode(const Conv2dShape& shape, const std::vector<at::Tensor>& given, int64_t vector,
                 const at::Tensor& input, const at::Tensor& grad_output)
      : KeptCode(given),
        pattern(indices()[0], indices()[1],
                indices()[2].defined() ? std::optional<at::Tensor>(indices()[2]) : std::nullopt, shape.out_channels,
                shape.groups, vector) {
    if (can_generate(shape, pattern)) dots = generated_weight_grad(shape, pattern, input, grad_output);
  }
  size_t bytes() const override { return dots->bytes(); }
  const Pattern pattern;
  std::unique_ptr<const GeneratedDots> dots;
};

// The indices of a pattern, checked as far as comparing them needs it.
std::vector<at::Tensor> indices_of(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                   const std::optional<at::Tensor>& row_indices) {
  check_indices(crow_indices, "crow_indices", crow_indices);
  check_indices(col_indices, "col_indices", crow_indices);
  if (row_indices) check_indices(*row_indices, "row_indices", crow_indices);
  return {crow_indices, col_indices, row_indices.value_or(at::Tensor())};
}

}  // namespace

std::optional<at::Tensor> trained_forward(const Conv2dShape& shape, const at::Tensor& input, const at::Tensor& values,
                                          const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                          const std::optional<at::Tensor>& row_indices, const at::Tensor& transpose,
                                          const std::optional<at::Tensor>& bias) {
  if (!worth_code(shape, values.numel()) || !plain_floats(input) || !plain_floats(values) ||
      (bias && !plain_floats(*bias))) {
    return std::nullopt;
  }
  const std::vector<at::Tensor> indices = indices_of(crow_indices, col_indices, row_indices);
  const int64_t vector = values.size(1);
  CodeStore::shared().note_columns(transpose, col_indices);
  const auto kept = CodeStore::shared().get(transpose, key_of(kForward, shape, values.size(0), vector), indices, [&] {
    auto made = std::make_shared<ForwardCode>(shape, indices, vector);
    return made->conv ? made : nullptr;
  });
  if (!kept) return std::nullopt;
  const GeneratedConv2d& conv = *static_cast<const ForwardCode&>(*kept).conv;
  const at::Tensor& order = conv.order();
  return conv.run(input, in_order(values, order.const_data_ptr<int32_t>(), order.size(0), vector), bias, std::nullopt,
                  Activation::none);
}

std::optional<at::Tensor> trained_input_grad(const Conv2dShape& shape, const at::Tensor& grad_output,
                                             const at::Tensor& values, const at::Tensor& transpose) {
  if (!worth_code(shape, values.numel()) || !plain_floats(grad_output) || !plain_floats(values)) return std::nullopt;
  check_indices(transpose, "transpose", transpose);
  const auto kept = CodeStore::shared().get(
      transpose, key_of(kInputGrad, shape, values.size(0), values.size(1)), {transpose},
      [&]() -> std::shared_ptr<const KeptCode> {
        Transposed(transpose, shape.in_channels, values.numel());  // checks the places
        auto made = std::make_shared<InputGradCode>(shape, transpose);
        return made->conv || made->phases ? made : nullptr;
      });
  if (!kept) return std::nullopt;
  const auto& code = static_cast<const InputGradCode&>(*kept);
  if (code.conv) {
    const auto count = static_cast<int64_t>(code.places.size());
    return code.conv->run(grad_output, in_order(values, code.places.data(), count, 1), std::nullopt, std::nullopt,
                          Activation::none);
  }
  at::Tensor grad_input = empty_result({shape.batch, shape.in_channels, shape.input[0], shape.input[1]}, at::kFloat);
  direct_input_grad(shape, *code.phases, grad_output, values, grad_input);
  return grad_input;
}

std::optional<at::Tensor> trained_weight_grad(const Conv2dShape& shape, const at::Tensor& input,
                                              const at::Tensor& grad_output, const at::Tensor& crow_indices,
                                              const at::Tensor& col_indices,
                                              const std::optional<at::Tensor>& row_indices, int64_t vector) {
  if (!worth_code(shape, col_indices.size(0) * vector) || !plain_floats(input) || !plain_floats(grad_output)) {
    return std::nullopt;
  }
  // Measured: with the phases of a stride code takes as long as interpretation does.
  if (shape.stride != Pair{1, 1} && shape.taps() > 1 && !generates_always()) return std::nullopt;
  const std::vector<at::Tensor> indices = indices_of(crow_indices, col_indices, row_indices);
  const auto kept = CodeStore::shared().get_by_columns(
      col_indices, key_of(kWeightGrad, shape, col_indices.size(0), vector), indices,
      [&]() -> std::shared_ptr<const KeptCode> {
        auto made = std::make_shared<WeightGradCode>(shape, indices, vector, input, grad_output);
        return made->dots && made->dots->bytes() > 0 ? made : nullptr;
      });
  if (!kept) return std::nullopt;
  const auto& code = static_cast<const WeightGradCode&>(*kept);
  at::Tensor grad_values = at::empty({code.pattern.n_vectors, vector}, input.options());
  direct_weight_grad(shape, code.pattern, *code.dots, input, grad_output, grad_values);
  return grad_values;
}

}  // namespace sparsekd::cpu
