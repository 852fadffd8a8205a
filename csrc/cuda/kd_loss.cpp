// The distillation loss on CUDA: checks, the choice of kernel, launches. Nothing here waits for the device, so a target
// that is no class is found there: the kernel that counts them asserts, as torch's cross entropy on CUDA does.
#include "kd_loss.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "../geometry.h"
#include "host.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kMostBlocks = 4096;  // not of the device at hand, so that sums don't depend on it
constexpr int64_t kMostParts = 256;
constexpr int64_t kRowsPerPart = 8 * kKDLossThreads;

bool aligned(const at::Tensor& t) { return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

const KDLossVariant* choose(int64_t classes, bool wide) {
  for (const KDLossVariant& variant : kKDLossVariants) {
    if (variant.wide == (wide ? 4 : 1) && classes <= variant.most()) return &variant;
  }
  return nullptr;
}

std::tuple<at::Tensor, at::Tensor> kd_loss_forward_cuda(const at::Tensor& student, const at::Tensor& teacher,
                                                        const std::optional<at::Tensor>& target, double temperature,
                                                        double alpha, int64_t ignore_index, double label_smoothing,
                                                        bool distill_ignored, bool with_grad) {
  check_device(student, "student logits");
  check_type(student, "student logits");
  check_kd_loss(student, teacher, target, temperature, alpha, label_smoothing);
  const int64_t rows = student.size(0), classes = student.size(1), limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(rows <= limit && classes <= limit, "Expected fewer than 2^31 rows and classes, got ",
                    student.sizes());
  const at::Tensor s = student.contiguous();
  // All is computed in fp32, a float64 teacher too.
  const at::Tensor t = (teacher.scalar_type() == at::kDouble ? teacher.to(at::kFloat) : teacher).contiguous();
  const at::Tensor labels = target ? target->contiguous() : at::Tensor();
  const auto floats = s.options().dtype(at::kFloat);
  const at::Tensor loss = at::empty({}, floats);
  const at::Tensor grad = with_grad ? at::empty(s.sizes(), floats) : at::empty({0}, floats);

  const bool wide = classes % 4 == 0 && aligned(s) && aligned(t) && aligned(grad);
  const KDLossVariant* variant = choose(classes, wide);
  const int64_t rows_at_once = variant ? kKDLossThreads / variant->row_lanes : 1;
  KDLossParams p{};
  p.student = s.const_data_ptr();
  p.teacher = t.const_data_ptr();
  p.student_dtype = dtype_of(s);
  p.teacher_dtype = dtype_of(t);
  p.target = static_cast<const int64_t*>(data_of(labels));
  p.ignore_index = ignore_index;
  p.distill_ignored = distill_ignored;
  p.rows = rows;
  p.classes = classes;
  p.temperature = temperature;
  p.label_smoothing = label_smoothing;
  p.ce_weight = 1 - alpha;
  p.kl_weight = alpha * temperature * temperature;
  p.parts = target ? int(std::clamp<int64_t>(ceil_div(rows, kRowsPerPart), 1, kMostParts)) : 0;
  p.blocks = int(std::min(ceil_div(rows, rows_at_once), kMostBlocks));
  const at::Tensor counts = at::empty({p.parts}, floats.dtype(at::kInt));
  const at::Tensor partial = at::empty({p.blocks}, floats.dtype(at::kDouble));
  p.counts = counts.mutable_data_ptr<int32_t>();
  p.partial = partial.mutable_data_ptr<double>();
  p.grad = with_grad ? grad.mutable_data_ptr<float>() : nullptr;
  p.loss = loss.mutable_data_ptr<float>();

  Call call(student);
  call.reads(s, "student logits");
  call.reads(t, "teacher logits");
  call.reads(labels, "target");
  call.writes(counts, "counts");
  call.writes(partial, "partial sums");
  call.writes(grad, "output gradient");
  call.writes(loss, "output loss");
  if (p.parts > 0) call.launched(sparsekd_kd_loss_count(&p, call.stream()));
  if (p.blocks > 0) call.launched(sparsekd_kd_loss_rows(&p, variant, wide ? 4 : 1, call.stream()));
  call.launched(sparsekd_kd_loss_sum(&p, call.stream()));
  call.finish();
  return {loss, grad};
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) { m.impl("kd_loss_forward", &sparsekd::cuda::kd_loss_forward_cuda); }
