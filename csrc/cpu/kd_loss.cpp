// The distillation loss and its gradient in one pass over both logits; the formula is in kd_loss.inc.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <memory>
#include <vector>

#include "../check.h"
#include "kernels.h"

namespace sparsekd::cpu {
namespace {

// By halves: a sum of millions of rows one after the other would lose six digits. The same on any number of threads.
double sum_by_halves(const double* values, int64_t count) {
  if (count > 64) return sum_by_halves(values, count / 2) + sum_by_halves(values + count / 2, count - count / 2);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

template <class T>
double rows_loss(const at::Tensor& student, const at::Tensor& teacher, const int64_t* target, at::Tensor& grad,
                 double temperature, double alpha, int64_t ignore_index, double label_smoothing,
                 bool distill_ignored) {
  const int64_t rows = student.size(0), classes = student.size(1);
  int64_t labelled = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target == nullptr || target[i] == ignore_index) continue;
    TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < classes, "Expected targets in 0..", classes - 1,
                      " or ignore_index=", ignore_index, ", got ", target[i]);
    ++labelled;
  }
  const int64_t distilled = target == nullptr || distill_ignored ? rows : labelled;
  const bool hard = target != nullptr && alpha < 1, soft = alpha > 0;
  KDLossRow<T> common{};
  common.classes = classes;
  common.temperature = temperature;
  common.label_smoothing = label_smoothing;
  common.ce_scale = hard && labelled > 0 ? (1 - alpha) / static_cast<double>(labelled) : 0;
  common.kl_scale = soft && distilled > 0 ? alpha * temperature * temperature / static_cast<double>(distilled) : 0;

  const T* s = student.const_data_ptr<T>();
  const T* t = teacher.const_data_ptr<T>();
  T* g = grad.defined() ? grad.mutable_data_ptr<T>() : nullptr;
  const int64_t pitch = (classes + 15) / 16 * 16;
  std::vector<double> losses(rows);
  at::parallel_for(0, rows, std::max<int64_t>(4096 / classes, 1), [&](int64_t begin, int64_t end) {
    std::unique_ptr<double[]> scratch(new double[3 * pitch]);
    for (int64_t i = begin; i < end; ++i) {
      KDLossRow<T> row = common;
      row.student = s + i * classes;
      row.teacher = t + i * classes;
      row.grad = g ? g + i * classes : nullptr;
      row.scratch = scratch.get();
      const bool known = target == nullptr || target[i] != ignore_index;
      row.target = hard && known ? target[i] : -1;
      row.distill = soft && (known || distill_ignored);
      losses[i] = type_kernels<T>().kd_loss_row(row);
    }
  });
  double loss = sum_by_halves(losses.data(), rows);
  // As torch: the mean over no rows is NaN. Unlabelled rows that are distilled make the loss well defined.
  const bool no_labels = target != nullptr && labelled == 0;
  if (rows == 0 || (no_labels && !distill_ignored)) loss = std::numeric_limits<double>::quiet_NaN();
  return loss;
}

std::tuple<at::Tensor, at::Tensor> kd_loss_forward_cpu(const at::Tensor& student, const at::Tensor& teacher,
                                                       const std::optional<at::Tensor>& target, double temperature,
                                                       double alpha, int64_t ignore_index, double label_smoothing,
                                                       bool distill_ignored, bool with_grad) {
  check_kd_loss(student, teacher, target, temperature, alpha, label_smoothing);
  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  const auto arithmetic = wide ? at::kDouble : at::kFloat;
  const at::Tensor labels = target ? target->contiguous() : at::Tensor();
  const at::Tensor s = student.to(arithmetic).contiguous();
  const at::Tensor t = teacher.to(arithmetic).contiguous();
  at::Tensor grad = with_grad ? at::empty_like(s) : at::Tensor();
  const int64_t* label_data = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  const double loss = wide ? rows_loss<double>(s, t, label_data, grad, temperature, alpha, ignore_index,
                                               label_smoothing, distill_ignored)
                           : rows_loss<float>(s, t, label_data, grad, temperature, alpha, ignore_index,
                                              label_smoothing, distill_ignored);
  // The gradient stays as wide as the loss: in float16 it would be lost before a loss scale gets to it.
  const auto options = s.options().dtype(student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor result = at::empty({}, options);
  result.fill_(loss);
  return {result, with_grad ? grad.to(options.dtype()) : at::empty({0}, options)};
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) { m.impl("kd_loss_forward", &sparsekd::cpu::kd_loss_forward_cpu); }
