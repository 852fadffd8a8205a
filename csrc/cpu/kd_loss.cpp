// The distillation loss and its gradient in one pass over both logits; the formula is in kd_loss.inc. kd_loss_rows_ is
// what linear_kd_loss (kernels/linear_kd_loss.py) makes of a chunk of its rows, where the logits lie.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
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

// Rows with a label, whose range is checked.
int64_t count_labels(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t labelled = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target == nullptr || target[i] == ignore_index) continue;
    TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < classes, "Expected targets in 0..", classes - 1,
                      " or ignore_index=", ignore_index, ", got ", target[i]);
    ++labelled;
  }
  return labelled;
}

// The sum of the rows' losses; their gradient goes to `grad`, which may be `student`, unless it is null.
template <class T>
double rows_loss(const KDLossSettings& settings, const T* student, const T* teacher, T* grad, const int64_t* target,
                 int64_t rows, int64_t ignore_index, bool distill_ignored) {
  const int64_t classes = settings.classes, pitch = (classes + 15) / 16 * 16;
  constexpr int64_t kLine = 64 / sizeof(double);
  std::vector<double> losses(rows);
  at::parallel_for(0, rows, std::max<int64_t>(4096 / classes, 1), [&](int64_t begin, int64_t end) {
    // On whole lines of cache, over whose ends a wide vector would take twice as long.
    std::unique_ptr<double[]> memory(new double[3 * pitch + kLine]);
    size_t space = (3 * pitch + kLine) * sizeof(double);
    void* aligned = memory.get();
    double* const scratch = static_cast<double*>(std::align(64, 3 * pitch * sizeof(double), aligned, space));
    for (int64_t i = begin; i < end; ++i) {
      KDLossRow<T> row{settings};
      row.student = student + i * classes;
      row.teacher = teacher + i * classes;
      row.grad = grad ? grad + i * classes : nullptr;
      row.scratch = scratch;
      const bool known = target == nullptr || target[i] != ignore_index;
      row.target = target != nullptr && settings.ce_scale > 0 && known ? target[i] : -1;
      row.distill = settings.distill_scale > 0 && (known || distill_ignored);
      losses[i] = type_kernels<T>().kd_loss_row(row);
    }
  });
  return sum_by_halves(losses.data(), rows);
}

template <class T>
double mean_loss(const at::Tensor& student, const at::Tensor& teacher, const int64_t* target, at::Tensor& grad,
                 double temperature, double alpha, int64_t ignore_index, double label_smoothing,
                 bool distill_ignored) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const int64_t labelled = count_labels(target, rows, classes, ignore_index);
  const int64_t distilled = target == nullptr || distill_ignored ? rows : labelled;
  // As torch: the mean over no rows is NaN. Unlabelled rows that are distilled make the loss well defined.
  const bool no_labels = target != nullptr && labelled == 0;
  const bool nothing = rows == 0 || (no_labels && !distill_ignored);
  KDLossSettings settings{};
  settings.classes = classes;
  settings.temperature = temperature;
  settings.label_smoothing = label_smoothing;
  settings.ce_scale = labelled > 0 ? (1 - alpha) / static_cast<double>(labelled) : 0;
  settings.distill_scale = distilled > 0 ? alpha * temperature * temperature / static_cast<double>(distilled) : 0;
  const double loss = rows_loss(settings, student.const_data_ptr<T>(), teacher.const_data_ptr<T>(),
                                grad.defined() ? grad.mutable_data_ptr<T>() : nullptr, target, rows, ignore_index,
                                distill_ignored);
  return nothing ? std::numeric_limits<double>::quiet_NaN() : loss;
}

// Memory as large as this the allocator gives back, so each gradient's is new, and a page of 4 KiB at a time takes
// longer to get than its gradient to compute.
void ask_for_large_pages(const at::Tensor& tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kLeast = 4 * kPage;
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + tensor.nbytes()) / kPage * kPage;
  if (tensor.nbytes() >= kLeast) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
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
  if (with_grad) ask_for_large_pages(grad);
  const int64_t* label_data = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  const double loss = wide ? mean_loss<double>(s, t, label_data, grad, temperature, alpha, ignore_index,
                                               label_smoothing, distill_ignored)
                           : mean_loss<float>(s, t, label_data, grad, temperature, alpha, ignore_index,
                                              label_smoothing, distill_ignored);
  // The gradient stays as wide as the loss: in float16 it would be lost before a loss scale gets to it.
  const auto options = s.options().dtype(student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor result = at::empty({}, options);
  result.fill_(loss);
  return {result, with_grad ? grad.to(options.dtype()) : at::empty({0}, options)};
}

Divergence divergence_called(c10::string_view name) {
  if (name == "forward_kl") return Divergence::kForwardKL;
  if (name == "reverse_kl") return Divergence::kReverseKL;
  TORCH_CHECK_VALUE(name == "jsd", "Expected divergence to be one of forward_kl, reverse_kl, jsd, got '", name, "'");
  return Divergence::kJSD;
}

template <class T>
double rows_loss_in_place(const KDLossSettings& settings, at::Tensor& student, const at::Tensor& teacher,
                          const int64_t* target, int64_t ignore_index, bool distill_ignored, bool with_grad) {
  T* const s = student.mutable_data_ptr<T>();
  return rows_loss(settings, s, teacher.const_data_ptr<T>(), with_grad ? s : nullptr, target, student.size(0),
                   ignore_index, distill_ignored);
}

at::Tensor kd_loss_rows_cpu(at::Tensor student, const at::Tensor& teacher, const std::optional<at::Tensor>& target,
                            double temperature, double hard, double soft, c10::string_view divergence, double beta,
                            int64_t ignore_index, double label_smoothing, bool distill_ignored, bool with_grad) {
  check_kd_loss(student, teacher, target, temperature, target ? 0.5 : 1, label_smoothing);
  check_same(teacher, "teacher logits", student, "the student's");
  TORCH_CHECK_TYPE(student.scalar_type() == at::kFloat || student.scalar_type() == at::kDouble,
                   "Expected student logits of dtype Float or Double, got ", student.scalar_type());
  TORCH_CHECK_VALUE(student.is_contiguous(), "Expected contiguous student logits, got strides ", student.strides());
  TORCH_CHECK_VALUE(hard >= 0 && soft >= 0 && std::isfinite(hard + soft),
                    "Expected weights hard and soft that are finite and not negative, got ", hard, " and ", soft);
  const Divergence kind = divergence_called(divergence);
  TORCH_CHECK_VALUE(kind != Divergence::kJSD || (beta > 0 && beta < 1), "Expected beta in (0, 1), got ", beta);
  const at::Tensor labels = target ? target->contiguous() : at::Tensor();
  const at::Tensor t = teacher.contiguous();
  TORCH_CHECK_VALUE(!with_grad || at::get_overlap_status(student, t) == at::MemOverlapStatus::No,
                    "Expected teacher logits apart from the student's, which become the gradient, got shared memory");
  const int64_t* label_data = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  count_labels(label_data, student.size(0), student.size(1), ignore_index);
  KDLossSettings settings{};
  settings.classes = student.size(1);
  settings.divergence = kind;
  settings.beta = beta;
  settings.temperature = temperature;
  settings.label_smoothing = label_smoothing;
  settings.ce_scale = hard;
  settings.distill_scale = soft * temperature * temperature;
  const double loss =
      student.scalar_type() == at::kDouble
          ? rows_loss_in_place<double>(settings, student, t, label_data, ignore_index, distill_ignored, with_grad)
          : rows_loss_in_place<float>(settings, student, t, label_data, ignore_index, distill_ignored, with_grad);
  at::Tensor result = at::empty({}, student.options().dtype(at::kDouble));
  result.fill_(loss);
  return result;
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) {
  m.impl("kd_loss_forward", &sparsekd::cpu::kd_loss_forward_cpu);
  m.impl("kd_loss_rows_", &sparsekd::cpu::kd_loss_rows_cpu);
}
