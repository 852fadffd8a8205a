// conv2d_planned with all but a call's tensors bound: a small layer takes less time than its numbers and lists take on
// their way from Python into an operator's arguments. Nothing is computed here, the operator is called as ever.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/index_select.h>
#include <c10/core/GradMode.h>
#include <torch/custom_class.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "geometry.h"
#include "resident.h"

namespace sparsekd {

class PlannedConv2d : public torch::CustomClassHolder {
 public:
  using OptionalTensor = std::optional<at::Tensor>;
  using Numbers = std::vector<int64_t>;

  // For inputs of this size, [N, C, H, W], on the CPU. `order`: the values' at each of the plan's places, if it has its
  // own.
  PlannedConv2d(at::Tensor plan, Numbers tiling, OptionalTensor order, OptionalTensor row_indices,
                std::string activation, Numbers input_size, int64_t out_channels, Numbers kernel_size, Numbers stride,
                Numbers padding, Numbers dilation, int64_t groups)
      : plan_(std::move(plan)),
        tiling_(std::move(tiling)),
        order_(std::move(order)),
        row_indices_(std::move(row_indices)),
        activation_(std::move(activation)),
        input_size_(std::move(input_size)),
        kernel_size_(std::move(kernel_size)),
        stride_(std::move(stride)),
        padding_(std::move(padding)),
        dilation_(std::move(dilation)),
        out_channels_(out_channels),
        groups_(groups) {
    const Conv2dShape shape =
        checked_shape(input_size_, out_channels_, kernel_size_, stride_, padding_, dilation_, groups_);
    output_size_ = {shape.batch, out_channels_, shape.output[0], shape.output[1]};
  }

  // act(conv2d + shift + residual); None for a call that wants more than the operator at once, and goes the long way:
  // with gradients, under autocast or a mode that overrides functions, of another dtype or size, with a residual that
  // is broadcast.
  OptionalTensor run(const at::Tensor& input, const at::Tensor& values, const OptionalTensor& shift,
                     const OptionalTensor& residual) const {
    const bool plain = !at::GradMode::is_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
                       !at::impl::torch_function_mode_enabled();
    if (!plain || !fits(input, input_size_) || (residual && !fits(*residual, output_size_))) return std::nullopt;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::conv2d_planned", "").typed<Signature>();
    const at::AutoDispatchBelowAutograd below;  // its autograd formula is in Python
    return op.call(input, ordered(values), plan_, tiling_, row_indices_, {}, shift, residual, activation_, false,
                   out_channels_, numbers(kernel_size_), numbers(stride_), numbers(padding_), numbers(dilation_),
                   groups_);
  }

 private:
  // The values in the plan's order: those of the last call if they are the same tensor, unchanged since.
  at::Tensor ordered(const at::Tensor& values) const {
    if (!order_) return values;
    const std::lock_guard<std::mutex> guard(mutex_);
    // Tensors made in inference mode do not count their changes.
    const bool counts = !values.is_inference();
    const bool known = counts && source_.is_same(values) && version_ == values._version();
    if (!known) {
      arranged_ = empty_resident(values.sizes(), values.options());
      at::index_select_out(arranged_, values, 0, *order_);
      source_ = counts ? values : at::Tensor();
      version_ = counts ? values._version() : 0;
    }
    return arranged_;
  }

  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, c10::string_view, bool, c10::SymInt, c10::SymIntArrayRef,
                               c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt);

  static bool fits(const at::Tensor& tensor, const Numbers& size) {
    return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == at::kFloat &&
           tensor.sizes() == at::IntArrayRef(size);
  }

  static c10::SymIntArrayRef numbers(const Numbers& values) { return c10::fromIntArrayRefSlow(values); }

  const at::Tensor plan_;
  const Numbers tiling_;
  const OptionalTensor order_;
  const OptionalTensor row_indices_;
  const std::string activation_;
  const Numbers input_size_, kernel_size_, stride_, padding_, dilation_;
  const int64_t out_channels_, groups_;
  Numbers output_size_;
  mutable std::mutex mutex_;
  mutable at::Tensor source_, arranged_;
  mutable uint32_t version_ = 0;
};

}  // namespace sparsekd
