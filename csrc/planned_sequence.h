// Layers of a network one after the other, without Python between them: what it does for a layer, 5 us where its
// objects are in the caches and several times that after a kernel went through them, is a tenth of ResNet-50 at
// batch 1.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "planned_conv2d.h"

namespace sparsekd {

// Activations have places 0, 1, ..., the first of which are the inputs; each step fills the next place.
class PlannedSequence : public torch::CustomClassHolder {
 public:
  using Numbers = std::vector<int64_t>;

  explicit PlannedSequence(int64_t inputs) : inputs_(inputs), places_(inputs) {}

  // Each returns the place of its result.
  int64_t conv2d(const c10::intrusive_ptr<PlannedConv2d>& conv, const at::Tensor& values,
                 const std::optional<at::Tensor>& shift, int64_t input, std::optional<int64_t> residual) {
    Step step = next({input, residual.value_or(-1)});
    step.conv = conv;
    step.values = values;
    step.shift = shift;
    return add(std::move(step));
  }

  int64_t max_pool2d(int64_t input, Numbers kernel_size, Numbers stride, Numbers padding) {
    Step step = next({input, -1});
    step.geometry = {std::move(kernel_size), std::move(stride), std::move(padding)};
    return add(std::move(step));
  }

  // What run() gives, by place.
  void output(Numbers places) {
    for (const int64_t place : places) check_place(place);
    outputs_ = std::move(places);
    ends_.assign(steps_.size(), {});
    std::vector<int64_t> last(places_, -1);  // the step that reads a place last
    for (size_t i = 0; i < steps_.size(); ++i) {
      last[inputs_ + i] = static_cast<int64_t>(i);
      for (const int64_t place : steps_[i].reads) {
        if (place >= 0) last[place] = static_cast<int64_t>(i);
      }
    }
    for (int64_t place = 0; place < places_; ++place) {
      const bool kept = std::find(outputs_.begin(), outputs_.end(), place) != outputs_.end();
      if (!kept && last[place] >= 0) ends_[last[place]].push_back(place);
    }
  }

  // None where a layer wants more than its planned call does (PlannedConv2d::run).
  std::optional<std::vector<at::Tensor>> run(std::vector<at::Tensor> activations) const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(activations.size()) == inputs_, "Expected ", inputs_, " inputs, got ",
                      activations.size());
    activations.reserve(places_);
    for (size_t i = 0; i < steps_.size(); ++i) {
      std::optional<at::Tensor> result = steps_[i].run(activations);
      if (!result) return std::nullopt;
      activations.push_back(std::move(*result));
      for (const int64_t place : ends_[i]) activations[place] = at::Tensor();
    }
    std::vector<at::Tensor> results;
    for (const int64_t place : outputs_) results.push_back(activations[place]);
    return results;
  }

 private:
  struct Step {
    std::array<int64_t, 2> reads;  // places of the input and the residual, or -1
    c10::intrusive_ptr<PlannedConv2d> conv;  // null: a max-pool
    at::Tensor values;
    std::optional<at::Tensor> shift;
    std::array<Numbers, 3> geometry;

    std::optional<at::Tensor> run(const std::vector<at::Tensor>& activations) const {
      const at::Tensor& input = activations[reads[0]];
      if (!conv) return pooled(input);
      return conv->run(input, values, shift, reads[1] < 0 ? std::nullopt : std::optional(activations[reads[1]]));
    }

    at::Tensor pooled(const at::Tensor& input) const {
      using Signature = at::Tensor(const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef);
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::max_pool2d", "").typed<Signature>();
      const at::AutoDispatchBelowAutograd below;
      return op.call(input, geometry[0], geometry[1], geometry[2]);
    }
  };

  void check_place(int64_t place) const {
    TORCH_CHECK_VALUE(place >= 0 && place < places_, "Expected a place in 0..", places_ - 1, ", got ", place);
  }

  Step next(std::array<int64_t, 2> reads) const {
    check_place(reads[0]);
    if (reads[1] != -1) check_place(reads[1]);
    Step step;
    step.reads = reads;
    return step;
  }

  int64_t add(Step step) {
    steps_.push_back(std::move(step));
    return places_++;
  }

  const int64_t inputs_;
  int64_t places_;
  std::vector<Step> steps_;
  std::vector<Numbers> ends_;  // by step: the places that nothing reads after it
  Numbers outputs_;
};

}  // namespace sparsekd
