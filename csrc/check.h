// What every op checks before it touches memory. Messages say what was expected and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <limits>
#include <optional>

namespace sparsekd {

// Whether a tensor is strided floats of this size on the CPU, as they lie in its memory.
inline bool is_cpu_floats(const at::Tensor& t, at::IntArrayRef size) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat && t.sizes() == size &&
         !t.is_neg() && !t._is_zerotensor();
}

inline void check_dim(const at::Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, "Expected ", name, " with ", dim, " dimensions, got shape ", t.sizes());
}

inline void check_size(const at::Tensor& t, const char* name, int64_t dim, int64_t size, const char* meaning) {
  TORCH_CHECK_VALUE(t.size(dim) == size, "Expected ", name, " of size ", size, " in dimension ", dim, " (", meaning,
                    "), got shape ", t.sizes());
}

inline void check_same(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), "Expected ", name, " on ", like.device(), " as ", like_name,
                    ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "Expected ", name, " of dtype ", like.scalar_type(), " as ",
                   like_name, ", got ", t.scalar_type());
}

inline void check_indices(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, "Expected ", name, " of dtype Int, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), "Expected ", name, " on ", like.device(), ", got ", t.device());
  check_dim(t, name, 1);
  TORCH_CHECK_VALUE(t.is_contiguous(), "Expected contiguous ", name, ", got strides ", t.strides());
}

inline void check_floating(const at::Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, "Expected ",
                   name, " of dtype Float, Double, Half or BFloat16, got ", type);
}

// The packed weight's values: [n_vectors, V], one row for each column index.
inline void check_values(const at::Tensor& values, const at::Tensor& like, const char* like_name,
                         const at::Tensor& col_indices) {
  check_dim(values, "values", 2);
  check_same(values, "values", like, like_name);
  check_dim(col_indices, "col_indices", 1);
  check_size(values, "values", 0, col_indices.size(0), "the number of col_indices");
}

// The channels' scale, shift or bias, or an undefined tensor.
inline at::Tensor checked_channels(const std::optional<at::Tensor>& t, const char* name, const at::Tensor& input,
                                   int64_t channels, const char* meaning = "output channels") {
  if (!t) return {};
  check_dim(*t, name, 1);
  check_size(*t, name, 0, channels, meaning);
  check_same(*t, name, input, "input");
  return t->contiguous();
}

// What is added to an output of that size.
inline void check_residual(const at::Tensor& residual, at::IntArrayRef size, const at::Tensor& input) {
  TORCH_CHECK_VALUE(residual.sizes() == size, "Expected a residual of the output's shape ", size, ", got ",
                    residual.sizes());
  check_same(residual, "residual", input, "input");
}

// All of kd_loss but the targets' values.
inline void check_kd_loss(const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& target,
                          double temperature, double alpha, double label_smoothing) {
  check_floating(student, "student logits");
  check_floating(teacher, "teacher logits");
  check_dim(student, "student logits", 2);
  TORCH_CHECK_VALUE(teacher.sizes() == student.sizes(), "Expected teacher logits of the student's shape ",
                    student.sizes(), ", got ", teacher.sizes());
  TORCH_CHECK_VALUE(teacher.device() == student.device(), "Expected teacher logits on ", student.device(), ", got ",
                    teacher.device());
  TORCH_CHECK_VALUE(student.size(1) >= 1, "Expected at least one class, got shape ", student.sizes());
  TORCH_CHECK_VALUE(temperature > 0 && temperature < std::numeric_limits<double>::infinity(),
                    "Expected temperature to be positive and finite, got ", temperature);
  TORCH_CHECK_VALUE(alpha >= 0 && alpha <= 1, "Expected alpha in [0, 1], got ", alpha);
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "Expected label_smoothing in [0, 1], got ",
                    label_smoothing);
  TORCH_CHECK_VALUE(target.has_value() || alpha == 1, "Expected a target unless alpha is 1, got none with alpha=",
                    alpha);
  if (target) {
    TORCH_CHECK_TYPE(target->scalar_type() == at::kLong, "Expected target of dtype Long (class indices), got ",
                     target->scalar_type());
    check_dim(*target, "target", 1);
    check_size(*target, "target", 0, student.size(0), "rows of the logits");
    TORCH_CHECK_VALUE(target->device() == student.device(), "Expected target on ", student.device(), ", got ",
                      target->device());
  }
}

}  // namespace sparsekd
