#include "generated_conv2d.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../resident.h"
#include "flat_pixels.h"

namespace sparsekd::cpu {

bool can_generate(const Conv2dShape& shape, const Pattern& pattern) {
  constexpr int64_t kMost = int64_t{1} << 26;  // entries: so much code would be as large as a dense weight of 512 MiB
  return generates_code() && shape.batch > 0 && pattern.n_vectors > 0 && pattern.packed_per_group > 0 &&
         pattern.n_vectors * pattern.vector <= kMost && pattern.vector <= kGeneratedRows;
}

Grid inference_grid(const Conv2dShape& shape, const Pattern& pattern) {
  Rows<float> rows = rows_of<float>(shape, pattern, nullptr);
  Grid best = forward_grid(shape, rows);
  if (!can_generate(shape, pattern)) return best;
  rows.generated = true;
  const Grid planes = forward_grid(shape, rows), in_place = InPlace::grid_of(shape, rows);
  const Grid& code = in_place.cost < planes.cost ? in_place : planes;
  return generates_always() || code.cost < best.cost ? code : best;
}

std::unique_ptr<GeneratedConv2d> GeneratedConv2d::of(const Conv2dShape& shape, const at::Tensor& crow_indices,
                                                     const at::Tensor& col_indices,
                                                     const std::optional<at::Tensor>& row_indices, int64_t vector) {
  std::unique_ptr<GeneratedConv2d> made(
      new GeneratedConv2d(shape, crow_indices, col_indices, row_indices, vector));
  return made->code_ ? std::move(made) : nullptr;
}

GeneratedConv2d::GeneratedConv2d(const Conv2dShape& shape, const at::Tensor& crow_indices,
                                 const at::Tensor& col_indices, const std::optional<at::Tensor>& row_indices,
                                 int64_t vector)
    : shape_(shape),
      crow_(crow_indices),
      col_(col_indices),
      pattern_(crow_, col_, row_indices, shape.out_channels, shape.groups, vector) {
  const Grid grid = inference_grid(shape, pattern_);
  if (!grid.generated) return;
  const Rows<float> rows = rows_of<float>(shape, pattern_, nullptr);
  if (grid.in_place) in_place_ = std::make_unique<InPlace>(shape, grid);
  tiling_ = in_place_ ? in_place_->tiling() : direct_tiling(shape, pattern_, at::empty({0}, at::kFloat), true);
  const std::vector<int32_t> table = column_table(rows, tiling_);
  if (*std::max_element(table.begin(), table.end()) > GeneratedRows::kFarthest) return;
  code_ = std::make_unique<GeneratedRows>(rows, table, tiling_[1],
                                          in_place_ ? in_place_->masks() : std::vector<int>{});
  order_ = at::empty({pattern_.n_vectors}, at::kInt);
  std::copy(code_->order().begin(), code_->order().end(), order_.mutable_data_ptr<int32_t>());
}

std::optional<at::Tensor> GeneratedConv2d::run(const at::Tensor& input, const at::Tensor& values,
                                               const std::optional<at::Tensor>& shift,
                                               const std::optional<at::Tensor>& residual,
                                               Activation activation) const {
  const bool aligned = reinterpret_cast<uintptr_t>(input.const_data_ptr<float>()) % 64 == 0;
  if (!input.is_contiguous() || (!aligned && !in_place_)) return std::nullopt;
  Finish finish;
  if (shift) finish.shift = shift->contiguous();
  if (residual) finish.residual = residual->contiguous();
  finish.activation = activation;
  at::Tensor output = empty_result(shape_.output_size(), at::kFloat);
  if (!in_place_) {
    const OffsetPlan plan{tiling_, nullptr, nullptr, nullptr, code_.get()};
    direct_forward(shape_, pattern_, &plan, input, values, finish, false, output);
    return output;
  }
  Rows<float> rows = rows_of(shape_, pattern_, values.const_data_ptr<float>());
  rows.cuts = &code_->cuts();
  const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; };
  in_place_->run(*code_, rows, input.const_data_ptr<float>(), data(finish.shift),
                 {nullptr, nullptr, data(finish.residual), activation}, output.mutable_data_ptr<float>());
  return output;
}

}  // namespace sparsekd::cpu
