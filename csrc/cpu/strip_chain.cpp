#include "strip_chain.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "scratch.h"

namespace sparsekd::cpu {
namespace {

constexpr int64_t kTrials = 8;  // runs, half of them the one and half the other way

// Code is twice as large as offsets, and so leaves less room in the caches for what other layers read.
constexpr double kCodeCosts = 1.04;

at::Tensor empty_floats(at::IntArrayRef size) { return empty_large(size, at::kFloat, kHugePage); }

}  // namespace

struct StripChain::Built {
  const StripRegion& region;
  const std::vector<bool>& strips_wanted;
  std::vector<bool> before;  // by place: whether an earlier chain left its strips
};

void StripChain::add(Op op) {
  const size_t at = ops_.size();
  for (const int64_t place : {op.from_images ? -1 : op.input, op.residual, op.to_images ? -1 : op.output}) {
    if (place < 0) continue;
    Strips& strips = strips_.at(place);
    if (strips.last == 0) strips.first = at;
    strips.last = at + 1;
  }
  ops_.push_back(std::move(op));
}

// Has strips of a place from here on.
void StripChain::want_strips(Built& built, int64_t place, int64_t channels) {
  const StripLayout& layout = *built.region.layouts[place];
  const bool before = built.before[place];
  const Strips strips{layout, built.region.channels[place], before || built.strips_wanted[place]};
  if (!strips_.try_emplace(place, strips).second || before) return;
  Op op;
  op.way = way_of(to_strips(layout, channels));
  op.input = op.output = place;
  op.from_images = true;
  given_[place] = {layout.batch, channels, layout.image[0], layout.image[1]};
  add(std::move(op));
}

StripChain::StripChain(const std::vector<StripLayer>& layers, const std::vector<Weights>& weights,
                       const StripRegion& region, size_t first, size_t last, const std::vector<bool>& images_wanted,
                       const std::vector<bool>& strips_wanted, bool measures) {
  Built built{region, strips_wanted, std::vector<bool>(region.layouts.size(), false)};
  for (size_t i = 0; i < first; ++i) built.before[layers[region.members[i].layer].output] = true;
  for (size_t i = first; i < last; ++i) {
    const StripRegion::Member& member = region.members[i];
    const StripLayer& layer = layers[member.layer];
    const Conv2dShape& shape = layer.shape;
    const StripLayout& output = *region.layouts[layer.output];
    const bool from_images = member.source == StripSource::images;
    units_ = output.units();
    StripLayout input;
    if (from_images) {
      const Pair& size = shape.input;
      given_[layer.input] = {shape.batch, shape.in_channels, size[0], size[1]};
    } else if (member.source == StripSource::regrouped) {
      input = *member.from;
      strips_.try_emplace(layer.input, Strips{input, member.from_channels, true});
    } else {
      input = *region.layouts[layer.input];
      want_strips(built, layer.input, shape.in_channels);
    }
    if (layer.residual >= 0) want_strips(built, layer.residual, shape.out_channels);
    Op op;
    if (!layer.convolves()) {
      op.way = way_of(other_strips(layer, input, output));
    } else {
      auto by = [&](const Grid& grid) {
        return way_of(
            std::make_unique<ConvStrips>(layer, member.source, grid, input, member.from_channels, output));
      };
      op.way = by(member.grid);
      if (measures && member.other) op.other = by(*member.other);
      if (op.other) {
        trials_ = kTrials;
        settled_ = false;
      }
      op.weights = weights[member.layer];
    }
    op.input = layer.input;
    op.residual = layer.residual;
    op.output = layer.output;
    op.from_images = from_images;
    op.made = layer.made_channels();
    op.regroups = member.source == StripSource::regrouped;
    strips_.emplace(layer.output, Strips{output, region.channels[layer.output], strips_wanted[layer.output]});
    add(std::move(op));
    if (!images_wanted[layer.output]) continue;
    Op back;
    back.way = way_of(from_strips(output, shape.out_channels));
    back.input = back.output = layer.output;
    back.to_images = true;
    made_[layer.output] = shape.output_size();
    add(std::move(back));
  }
  share_memory();
  for (Op& op : ops_) {
    op.reads = where(op.input, op.from_images);
    op.adds = where(op.residual, false);
    op.writes = where(op.output, op.to_images);
  }
}

StripChain::Where StripChain::where(int64_t place, bool images) const {
  if (place < 0 || images) return {place, images};
  const Strips& strips = strips_.at(place);
  return {place, false, strips.outlives, strips.offset, strips.size()};
}

std::shared_ptr<StripChain::Way> StripChain::way_of(std::unique_ptr<UnitStep> step) {
  auto way = std::make_shared<Way>();
  way->conv = dynamic_cast<const ConvStrips*>(step.get());
  if (way->conv) way->ordered = std::make_unique<OrderedValues>(way->conv->order());
  way->step = std::move(step);
  return way;
}

std::pair<std::vector<std::shared_ptr<StripChain::Way>>, bool> StripChain::next_ways() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  const bool others = trials_ % 2 == 1;
  std::vector<std::shared_ptr<Way>> ways;
  ways.reserve(ops_.size());
  for (const Op& op : ops_) ways.push_back(others && op.other ? op.other : op.way);
  return {std::move(ways), others};
}

void StripChain::compare_ways(bool others, const std::vector<std::atomic<int64_t>>& took) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (trials_ == 0) return;
  for (size_t i = 0; i < ops_.size(); ++i) {
    int64_t& least = ops_[i].least[others ? 1 : 0];
    least = std::min<int64_t>(least, took[i]);
  }
  if (--trials_ > 0) return;
  for (Op& op : ops_) {
    if (!op.other) continue;
    auto costs = [&](const Way& way, int64_t least) { return (way.conv->generated() ? kCodeCosts : 1) * least; };
    if (costs(*op.other, op.least[1]) < costs(*op.way, op.least[0])) op.way = op.other;
    op.other = nullptr;
  }
  settled_.store(true, std::memory_order_release);
}

// Gives each place that does not outlive a unit the first gap that is free while it lives; or a result its residual's
// memory, if nobody reads that later: each of its vectors is read just before it is written.
void StripChain::share_memory() {
  std::vector<Strips*> placed;
  for (size_t at = 0; at < ops_.size(); ++at) {
    for (auto& [place, strips] : strips_) {
      if (strips.outlives || strips.first != at) continue;
      const Op& op = ops_[at];
      if (place == op.output && op.residual >= 0 && op.residual != op.input) {
        const Strips& residual = strips_.at(op.residual);
        if (!residual.outlives && residual.last == at + 1 && residual.size() == strips.size()) {
          strips.offset = residual.offset;
          placed.push_back(&strips);
          continue;
        }
      }
      std::vector<std::pair<int64_t, int64_t>> taken;  // begin, end
      for (const Strips* other : placed) {
        if (other->last > at) taken.push_back({other->offset, other->offset + other->size()});
      }
      std::sort(taken.begin(), taken.end());
      for (const auto& [begin, end] : taken) {
        if (strips.offset + strips.size() <= begin) break;
        strips.offset = std::max(strips.offset, end);
      }
      memory_ = std::max(memory_, strips.offset + strips.size());
      placed.push_back(&strips);
    }
  }
}

bool StripChain::run(std::vector<Lying>& lying) const {
  for (const auto& [place, size] : given_) {
    if (!is_cpu_floats(lying[place].images, size)) return false;
  }
  const bool settled = settled_.load(std::memory_order_acquire);
  std::pair<std::vector<std::shared_ptr<Way>>, bool> compared;
  if (!settled) compared = next_ways();
  std::vector<Way*> ways(ops_.size());
  for (size_t i = 0; i < ops_.size(); ++i) {
    ways[i] = settled ? ops_[i].way.get() : compared.first[i].get();
    const auto& [own, shift] = ops_[i].weights;
    if (!(ways[i]->conv ? ways[i]->conv->fits(own, shift) : ways[i]->step->fits())) return false;
  }
  for (const auto& [place, size] : given_) lying[place].images = lying[place].images.contiguous();
  for (const auto& [place, size] : made_) lying[place].images = empty_floats(size);
  for (const auto& [place, strips] : strips_) {
    at::Tensor& held = lying[place].strips;
    if (strips.outlives && !held.defined()) held = empty_floats({units_, strips.channels, strips.layout.pitch()});
  }
  std::vector<at::Tensor> values(ops_.size());
  std::vector<const float*> init(ops_.size());
  std::vector<std::vector<float>> padded;
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (!ways[i]->conv) continue;
    const auto& [own, shift] = ops_[i].weights;
    values[i] = ways[i]->ordered->of(own);
    if (!shift) continue;
    init[i] = shift->const_data_ptr<float>();
    if (ops_[i].made == shift->numel()) continue;
    padded.emplace_back(ops_[i].made, 0.0f);
    std::copy_n(init[i], shift->numel(), padded.back().begin());
    init[i] = padded.back().data();
  }
  using Clock = std::chrono::steady_clock;
  std::vector<std::atomic<int64_t>> took(settled ? 0 : ops_.size());
  auto run_unit = [&](int64_t unit) {
    const Buffer<float> memory(memory_);
    // All images, or a unit's strips.
    auto at = [&](const Where& where, int64_t of) -> float* {
      if (where.place < 0) return nullptr;
      if (where.images) return lying[where.place].images.data_ptr<float>();
      if (!where.outlives) return memory.get() + where.offset;
      return lying[where.place].strips.data_ptr<float>() + of * where.size;
    };
    for (size_t i = 0; i < ops_.size(); ++i) {
      const Op& op = ops_[i];
      const Clock::time_point start = settled ? Clock::time_point{} : Clock::now();
      ways[i]->step->run({unit, at(op.reads, op.regroups ? 0 : unit), op.reads.size, at(op.adds, unit),
                          at(op.writes, unit), ways[i]->conv ? values[i].const_data_ptr<float>() : nullptr, init[i]});
      if (settled) continue;
      took[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
    }
  };
  if (units_ >= at::get_num_threads()) {
    at::parallel_for(0, units_, 1, [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) run_unit(unit);
    });
  } else {
    for (int64_t unit = 0; unit < units_; ++unit) run_unit(unit);
  }
  if (!settled) compare_ways(compared.second, took);
  return true;
}

}  // namespace sparsekd::cpu
