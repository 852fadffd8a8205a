// Layers of a network one after the other, without Python between them: what it does for a layer, 5 us where its
// objects are in the caches and several times that after a kernel went through them, is a tenth of ResNet-50 at
// batch 1. Between layers that allow it activations stay in strips (cpu/strip_chain.h).
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/slice.h>
#include <c10/util/Exception.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/strip_chain.h"
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
    checked_pair(kernel_size, "kernel_size", 1);
    checked_pair(stride, "stride", 1);
    checked_pair(padding, "padding", 0);
    step.geometry = {std::move(kernel_size), std::move(stride), std::move(padding)};
    return add(std::move(step));
  }

  // Every stride-th pixel, with so many channels of zeros before and after those of the input.
  int64_t shortcut(int64_t input, Numbers stride, Numbers channels) {
    Step step = next({input, -1});
    checked_pair(stride, "stride", 1);
    checked_pair(channels, "channels", 0);
    step.geometry = {std::move(stride), std::move(channels), {}};
    step.shortcut = true;
    return add(std::move(step));
  }

  int64_t squeeze_excite(int64_t input, at::Tensor reduce, std::optional<at::Tensor> reduce_bias, at::Tensor expand,
                         std::optional<at::Tensor> expand_bias, const std::string& activation,
                         const std::string& gate) {
    Step step = next({input, -1});
    step.excitation = std::make_shared<const cpu::Excitation>(
        cpu::Excitation{std::move(reduce), std::move(reduce_bias), std::move(expand), std::move(expand_bias),
                        activation_of(activation), cpu::hard_gate(gate)});
    step.names = {activation, gate};
    return add(std::move(step));
  }

  // What torch itself does, or an operator of ours, between convolutions and after them.
  int64_t average_pool(int64_t input) {  // [N, C, 1, 1]
    return add_call(input, [](const at::Tensor& x) { return at::adaptive_avg_pool2d(x, {1, 1}); });
  }
  int64_t flatten(int64_t input) {
    return add_call(input, [](const at::Tensor& x) { return at::flatten(x, 1); });
  }
  int64_t dense_linear(int64_t input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    return add_call(input, [=](const at::Tensor& x) { return at::linear(x, weight, bias); });
  }
  int64_t linear(int64_t input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
                 const std::optional<at::Tensor>& row_indices, const std::optional<at::Tensor>& bias,
                 int64_t out_features) {
    using OptionalTensor = std::optional<at::Tensor>;
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::SymInt);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::linear", "").typed<Signature>();
    return add_call(input, [=](const at::Tensor& x) {
      const at::AutoDispatchBelowAutograd below;
      return op.call(x, values, crow_indices, col_indices, row_indices, {}, bias, out_features);
    });
  }

  // What run() gives, by place. Activations stay in strips where that is faster by their costs ("auto"), wherever it is
  // possible ("always"), or "never". `measure`: where there are two ways to run a layer in strips, with the same bits,
  // the first runs tell which is faster; else its costs do.
  void output(Numbers places, const std::string& strips, bool measure) {
    TORCH_CHECK_VALUE(strips == "auto" || strips == "always" || strips == "never",
                      "Expected strips to be auto, always or never, got ", strips);
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
    if (strips != "never") keep_strips(strips == "always", measure);
  }

  // The steps whose results stay in strips, by place of those.
  Numbers in_strips() const {
    Numbers places;
    for (const Step& step : steps_) {
      if (!step.chain) continue;
      const int64_t first = inputs_ + (&step - steps_.data());
      for (int64_t place = first; place < inputs_ + static_cast<int64_t>(step.past); ++place) places.push_back(place);
    }
    return places;
  }

  // None where a layer wants more than its planned call does (PlannedConv2d::run).
  std::optional<std::vector<at::Tensor>> run(std::vector<at::Tensor> activations) const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(activations.size()) == inputs_, "Expected ", inputs_, " inputs, got ",
                      activations.size());
    if (chained_ && !PlannedConv2d::plain()) return std::nullopt;
    std::vector<cpu::Lying> lying(places_);
    for (int64_t place = 0; place < inputs_; ++place) lying[place].images = std::move(activations[place]);
    for (size_t i = 0; i < steps_.size();) {
      const size_t end = steps_[i].chain ? steps_[i].past : i + 1;
      if (!(steps_[i].chain ? steps_[i].chain->run(lying) : make(i, lying))) return std::nullopt;
      for (; i < end; ++i) {
        for (const int64_t place : ends_[i]) lying[place] = {};
      }
    }
    std::vector<at::Tensor> results;
    for (const int64_t place : outputs_) results.push_back(lying[place].images);
    return results;
  }

 private:
  struct Step {
    std::array<int64_t, 2> reads;  // places of the input and the residual, or -1
    c10::intrusive_ptr<PlannedConv2d> conv;  // null: a max-pool, a shortcut, or a squeeze-and-excitation
    bool shortcut = false;
    std::shared_ptr<const cpu::Excitation> excitation;
    std::array<std::string, 2> names;  // its activation and gate
    at::Tensor values;
    std::optional<at::Tensor> shift;
    std::array<Numbers, 3> geometry;
    std::function<at::Tensor(const at::Tensor&)> call;  // if not null, all there is
    std::shared_ptr<const cpu::StripChain> chain;  // of this step and those up to `past`, if not null
    size_t past = 0;

    // What is no convolution as a layer in strips, if the size of its input is known.
    std::optional<cpu::StripLayer> other(const Numbers& size) const {
      if (size.empty() || call) return std::nullopt;
      cpu::StripLayer layer;
      const auto& [first, second, padding] = geometry;
      if (excitation) {
        if (!excitation->fits() || excitation->channels() != size[1]) return std::nullopt;
        layer.excitation = excitation;
        layer.shape = checked_shape(size, size[1], {1, 1}, {1, 1}, {0, 0}, {1, 1}, size[1]);
      } else if (shortcut) {
        layer.zeros_before = second[0];
        layer.shape = checked_shape(size, second[0] + size[1] + second[1], {1, 1}, first, {0, 0}, {1, 1}, 1);
      } else {
        layer.shape = checked_shape(size, size[1], first, second, padding, {1, 1}, size[1]);
      }
      return layer;
    }

    at::Tensor shortened(const at::Tensor& input) const {
      const auto& [stride, channels, _] = geometry;
      const at::Tensor pixels = input.slice(2, 0, input.size(2), stride[0]).slice(3, 0, input.size(3), stride[1]);
      return at::constant_pad_nd(pixels, {0, 0, 0, 0, channels[0], channels[1]});
    }

    at::Tensor excited(const at::Tensor& input) const {
      using OptionalTensor = std::optional<at::Tensor>;
      using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                   const OptionalTensor&, c10::string_view, c10::string_view);
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::squeeze_excite", "").typed<Signature>();
      const at::AutoDispatchBelowAutograd below;
      return op.call(input, excitation->reduce, excitation->reduce_bias, excitation->expand, excitation->expand_bias,
                     names[0], names[1]);
    }

    at::Tensor pooled(const at::Tensor& input) const {
      using Signature = at::Tensor(const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef);
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow("sparsekd::max_pool2d", "").typed<Signature>();
      const at::AutoDispatchBelowAutograd below;
      return op.call(input, geometry[0], geometry[1], geometry[2]);
    }
  };

  // Whether a step was made.
  bool make(size_t i, std::vector<cpu::Lying>& lying) const {
    const Step& step = steps_[i];
    const auto [input, residual] = step.reads;
    at::Tensor& result = lying[inputs_ + i].images;
    if (!step.conv) {
      const at::Tensor& images = lying[input].images;
      result = step.call         ? step.call(images)
               : step.excitation ? step.excited(images)
               : step.shortcut   ? step.shortened(images)
                                 : step.pooled(images);
      return true;
    }
    const auto added = residual < 0 ? std::nullopt : std::optional(lying[residual].images);
    auto made = step.conv->run(lying[input].images, step.values, step.shift, added);
    if (made) result = std::move(*made);
    return made.has_value();
  }

  // Makes chains of the steps whose activations stay in strips.
  void keep_strips(bool always, bool measure) {
    std::vector<cpu::StripLayer> layers;
    std::vector<cpu::StripChain::Weights> weights;
    std::vector<size_t> step_of;
    std::vector<bool> elsewhere(places_, false);
    std::vector<Numbers> sizes(places_);  // as far as they are known
    for (const int64_t place : outputs_) elsewhere[place] = true;
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& step = steps_[i];
      const auto [input, residual] = step.reads;
      std::optional<cpu::StripLayer> layer = step.conv ? step.conv->in_strips(step.values) : step.other(sizes[input]);
      if (layer) {
        layer->input = input;
        layer->residual = residual;
        layer->output = inputs_ + static_cast<int64_t>(i);
        const auto size = layer->shape.output_size();
        sizes[layer->output].assign(size.begin(), size.end());
        layers.push_back(std::move(*layer));
        weights.push_back({step.values, step.shift});
        step_of.push_back(i);
      } else {
        if (step.conv) sizes[inputs_ + i] = step.conv->output_size();
        for (const int64_t place : step.reads) {
          if (place >= 0) elsewhere[place] = true;
        }
      }
    }
    using cpu::StripSource;
    const std::vector<cpu::StripRegion> regions = cpu::plan_strips(layers, elsewhere, always);
    // What of each place somebody reads: images, by all that is in no region and by members that ask for them; else
    // strips.
    std::vector<bool> images = elsewhere, regrouped(places_, false), in_strips(layers.size(), false);
    std::vector<bool> member_of(layers.size(), false);
    for (const cpu::StripRegion& region : regions) {
      for (const auto& member : region.members) {
        member_of[member.layer] = true;
        in_strips[member.layer] = member.source != StripSource::images;
        if (member.source == StripSource::regrouped) regrouped[layers[member.layer].input] = true;
      }
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      if (!in_strips[i]) images[layers[i].input] = true;
      if (!member_of[i] && layers[i].residual >= 0) images[layers[i].residual] = true;
    }
    for (const cpu::StripRegion& region : regions) {
      const auto& members = region.members;
      auto step_at = [&](size_t member) { return step_of[members[member].layer]; };
      for (size_t first = 0, last; first < members.size(); first = last) {
        // Images that a chain makes are read after it: packing looks past a unit's own, where another thread may write.
        std::vector<bool> made(places_, false);
        for (last = first; last < members.size(); ++last) {
          const cpu::StripLayer& layer = layers[members[last].layer];
          const bool follows = last == first || step_at(last) == step_at(last - 1) + 1;
          if (!follows || (members[last].source == StripSource::images && made[layer.input])) break;
          made[layer.output] = true;
        }
        std::vector<bool> strips = regrouped;  // that are read after this chain
        for (size_t i = last; i < members.size(); ++i) {
          const cpu::StripLayer& layer = layers[members[i].layer];
          if (members[i].source != StripSource::images) strips[layer.input] = true;
          if (layer.residual >= 0) strips[layer.residual] = true;
        }
        Step& step = steps_[step_at(first)];
        step.chain =
            std::make_shared<cpu::StripChain>(layers, weights, region, first, last, images, strips, measure);
        step.past = step_at(last - 1) + 1;
        chained_ = true;
      }
    }
  }

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

  template <class Call>
  int64_t add_call(int64_t input, Call call) {
    Step step = next({input, -1});
    step.call = std::move(call);
    return add(std::move(step));
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
  bool chained_ = false;  // whether any step is
};

}  // namespace sparsekd
