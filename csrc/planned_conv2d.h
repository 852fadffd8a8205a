// conv2d_planned with all but a call's tensors bound: a small layer takes less time than its numbers and lists take on
// their way from Python into an operator's arguments. Nothing is computed here, the operator is called as ever.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/custom_class.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/generated_conv2d.h"
#include "cpu/in_strips.h"
#include "geometry.h"
#include "ordered_values.h"

namespace sparsekd {

class PlannedConv2d : public torch::CustomClassHolder {
 public:
  using OptionalTensor = std::optional<at::Tensor>;
  using Numbers = std::vector<int64_t>;

  // For inputs of this size, [N, C, H, W], on the CPU. `order`: the values' at each of the plan's places, if it has its
  // own; the pattern is then final, and may get code of its own.
  PlannedConv2d(at::Tensor plan, Numbers tiling, OptionalTensor order, OptionalTensor row_indices,
                std::string activation, Numbers input_size, int64_t out_channels, Numbers kernel_size, Numbers stride,
                Numbers padding, Numbers dilation, int64_t groups)
      : plan_(std::move(plan)),
        tiling_(std::move(tiling)),
        ordered_(order ? std::make_unique<OrderedValues>(std::move(*order)) : nullptr),
        row_indices_(std::move(row_indices)),
        activation_(std::move(activation)),
        input_size_(std::move(input_size)),
        kernel_size_(std::move(kernel_size)),
        stride_(std::move(stride)),
        padding_(std::move(padding)),
        dilation_(std::move(dilation)),
        out_channels_(out_channels),
        groups_(groups) {
    const auto size = shape().output_size();
    output_size_.assign(size.begin(), size.end());
  }

  // Whether nothing but the operator itself is wanted at the moment.
  static bool plain() {
    return !at::GradMode::is_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
           !at::impl::torch_function_mode_enabled();
  }
  // act(conv2d + shift + residual); None for a call that wants more than the operator at once, and goes the long way:
  // with gradients, under autocast or a mode that overrides functions, of another dtype or size, with a residual that
  // is broadcast.
  OptionalTensor run(const at::Tensor& input, const at::Tensor& values, const OptionalTensor& shift,
                     const OptionalTensor& residual) const {
    if (!plain() || !is_cpu_floats(input, input_size_)) return std::nullopt;
    if (residual && !is_cpu_floats(*residual, output_size_)) return std::nullopt;
    const bool watched = c10::impl::dispatch_mode_enabled();  // by a mode that is to see every operator
    const Generated* const own = watched || values.dim() != 2 ? nullptr : generated(values.size(1));
    if (own && own->fits(values, shift)) {
      OptionalTensor output =
          own->conv->run(input, own->values->of(values), shift, residual, activation_of(activation_));
      if (output) return output;
    }
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::conv2d_planned", "").typed<Signature>();
    const at::AutoDispatchBelowAutograd below;  // its autograd formula is in Python
    return op.call(input, ordered_ ? ordered_->of(values) : values, plan_, tiling_, row_indices_, {}, shift, residual,
                   activation_, false, out_channels_, numbers(kernel_size_), numbers(stride_), numbers(padding_),
                   numbers(dilation_), groups_);
  }

  // What a sequence has to know for keeping activations in strips, if the layer can do so at all: with values that are
  // kept in an order.
  std::optional<cpu::StripLayer> in_strips(const at::Tensor& values) const {
    cpu::StripLayer layer;
    layer.activation = activation_of(activation_);
    if (!ordered_ || row_indices_) return std::nullopt;
    layer.shape = shape();
    layer.vector = values.size(1);
    const int64_t row_groups = groups_ * ceil_div(out_channels_ / groups_, layer.vector);
    layer.crow_indices = plan_.narrow(0, 0, row_groups + 1);
    layer.col_indices = plan_.narrow(0, row_groups + 1, ordered_->order().size(0));
    return layer;
  }
  // Bytes of the code by which it runs, for a weight of V values together; 0 where it runs without.
  int64_t code_bytes(int64_t vector) const {
    const Generated* own = generated(vector);
    return own ? static_cast<int64_t>(own->conv->code_bytes()) : 0;
  }
  // Whether that code reads images where they lie.
  bool in_place(int64_t vector) const {
    const Generated* own = generated(vector);
    return own && own->conv->in_place();
  }
  const Numbers& output_size() const { return output_size_; }

 private:
  // The convolution by code of its own, and its values.
  struct Generated {
    bool fits(const at::Tensor& given, const OptionalTensor& shift) const {
      const auto floats = [](const at::Tensor& tensor, at::IntArrayRef size) {
        return is_cpu_floats(tensor, size) && tensor.is_contiguous();
      };
      return floats(given, {conv->order().size(0), vector}) && (!shift || floats(*shift, {out_channels}));
    }
    int64_t vector, out_channels;
    std::unique_ptr<cpu::GeneratedConv2d> conv;
    std::unique_ptr<OrderedValues> values;
  };
  // Made at the first call. Null where nothing is gained by it.
  const Generated* generated(int64_t vector) const {
    if (!ordered_ || vector < 1) return nullptr;
    std::call_once(made_, [&] {
      const int64_t row_groups = groups_ * ceil_div(out_channels_ / groups_, vector);
      const Conv2dShape shape =
          checked_shape(input_size_, out_channels_, kernel_size_, stride_, padding_, dilation_, groups_);
      std::unique_ptr<cpu::GeneratedConv2d> conv = cpu::GeneratedConv2d::of(
          shape, plan_.narrow(0, 0, row_groups + 1), plan_.narrow(0, row_groups + 1, ordered_->order().size(0)),
          row_indices_, vector);
      if (!conv) return;
      auto order = std::make_unique<OrderedValues>(conv->order());
      generated_ = std::make_unique<Generated>(Generated{vector, out_channels_, std::move(conv), std::move(order)});
    });
    return generated_.get();
  }

  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, c10::string_view, bool, c10::SymInt, c10::SymIntArrayRef,
                               c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt);

  Conv2dShape shape() const {
    return checked_shape(input_size_, out_channels_, kernel_size_, stride_, padding_, dilation_, groups_);
  }
  static c10::SymIntArrayRef numbers(const Numbers& values) { return c10::fromIntArrayRefSlow(values); }

  const at::Tensor plan_;
  const Numbers tiling_;
  const std::unique_ptr<OrderedValues> ordered_;
  const OptionalTensor row_indices_;
  const std::string activation_;
  const Numbers input_size_, kernel_size_, stride_, padding_, dilation_;
  const int64_t out_channels_, groups_;
  Numbers output_size_;
  mutable std::once_flag made_;
  mutable std::unique_ptr<const Generated> generated_;
};

}  // namespace sparsekd
