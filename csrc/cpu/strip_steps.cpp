// The steps of a chain in strips that are no convolutions.
#include <numeric>

#include "borders.h"
#include "in_strips.h"
#include "passes.h"

namespace sparsekd::cpu {
namespace {

// Planes around strips of so many positions, and around all strips of an image.
Planes whole_planes(const StripLayout& layout, const Pair& strips) {
  const Pair size{strips[0] + 2 * layout.halo[0], strips[1] + 2 * layout.halo[1]};
  return {{Plane{size, {1, 1}, {-layout.halo[0], -layout.halo[1]}}}, {}, {0, 0}, {}};
}

class ToStrips : public UnitStep {
 public:
  ToStrips(const StripLayout& layout, int64_t channels)
      : layout_(layout),
        channels_(channels),
        planes_(whole_planes(layout, layout.grid.strip)),
        whole_(whole_planes(layout, layout.grid.covered())) {}

  void run(const UnitCall& call) const override {
    const Batch<const float> source{call.input, layout_.batch, channels_, layout_.image, false};
    const StripPacker<float> packer(source, planes_, whole_, layout_.grid);
    over_channels(channels_, layout_.pitch(), [&](int64_t from, int64_t end) {
      packer.pack(call.unit * layout_.grid.images, from, end, layout_.pitch(), call.output);
    });
  }

 private:
  const StripLayout layout_;
  const int64_t channels_;
  const Planes planes_, whole_;
};

class FromStrips : public UnitStep {
 public:
  FromStrips(const StripLayout& layout, int64_t channels) : layout_(layout), row_of_(channels) {
    std::iota(row_of_.begin(), row_of_.end(), 0);
  }

  void run(const UnitCall& call) const override {
    const Grid& grid = layout_.grid;
    const auto channels = static_cast<int64_t>(row_of_.size());
    const Batch<float> result{call.output, layout_.batch, channels, layout_.image, false};
    const int64_t pitch = layout_.pitch();
    const int64_t together = layout_.flat() ? grid.strip[0] : 1;  // lines without a border between them
    over_channels(channels, pitch, [&](int64_t begin, int64_t end) {
      StripStore<float> store(result, {layout_.image, {1, 1}, {0, 0}}, grid, {});
      for (int64_t y = 0; y < grid.strip[0]; y += together) {
        store.at(call.unit * grid.images, y, 0, together, grid.strip[1]);
        store.store(call.input + begin * pitch + layout_.at(y, 0), pitch, row_of_.data() + begin, end - begin, true);
      }
    });
  }

 private:
  const StripLayout layout_;
  std::vector<int64_t> row_of_;
};

class PoolStrips : public UnitStep {
 public:
  PoolStrips(const StripLayer& layer, const StripLayout& input, const StripLayout& output)
      : channels_(layer.shape.out_channels),
        given_(layer.shape.in_channels),
        zeros_before_(layer.zeros_before),
        window_(layer.shape),
        input_(input),
        output_(output),
        borders_(output.grid) {
    if (!output.flat())
      moves_ = borders_.moves(output.image, output.plane(), {-output.halo[0], -output.halo[1]}, false);
  }

  void run(const UnitCall& call) const override {
    const LaneKernels<float>& kernels = type_kernels<float>().lanes[output_.grid.width];
    const Pair& strip = output_.grid.strip;
    const int64_t pitch = input_.plane()[1] * input_.grid.lanes;
    over_channels(channels_, input_.pitch(), [&](int64_t from, int64_t end) {
      for (int64_t c = from; c < end; ++c) {
        float* const plane = call.output + c * output_.pitch();
        const int64_t given = c - zeros_before_;
        if (given < 0 || given >= given_) {
          std::fill(plane, plane + output_.pitch(), 0.0f);
          continue;
        }
        const float* const in = call.input + given * input_.pitch();
        for (int64_t y = 0; y < strip[0]; ++y) {
          fetch_line(in + input_.at(y * window_.stride[0] + kLinesAhead, 0), window_.stride[0] * pitch);
          kernels.pool_line(in + input_.at(y * window_.stride[0] - window_.padding[0], -window_.padding[1]), pitch,
                            window_.kernel[0], window_.kernel[1], window_.stride[1], strip[1],
                            plane + output_.at(y, 0));
        }
        kernels.move_lanes(plane, moves_.data(), static_cast<int64_t>(moves_.size()), borders_.sources().data());
      }
    });
  }

 private:
  static constexpr int64_t kLinesAhead = 6;

  const int64_t channels_, given_, zeros_before_;
  const Conv2dShape window_;
  const StripLayout input_, output_;
  Borders<float> borders_;
  std::vector<LaneMove> moves_;
};

class ExciteStrips : public UnitStep {
 public:
  ExciteStrips(const StripLayer& layer, const StripLayout& input, const StripLayout& output)
      : excitation_(layer.excitation),
        channels_(layer.shape.out_channels),
        input_(input),
        output_(output),
        borders_(output.grid) {
    const Grid& grid = output.grid;
    moves_ = borders_.moves(output.image, output.plane(), {-output.halo[0], -output.halo[1]}, false);
    cleans_ = input.flat() && output.image != grid.covered();
    for (int i = 0; i < kSumLanes; ++i) image_[i] = static_cast<int>(i % grid.lanes / (grid.down * grid.across));
  }

  bool fits() const override { return excitation_->fits() && excitation_->channels() == channels_; }

  void run(const UnitCall& call) const override {
    const int64_t channels = channels_, images = output_.grid.images;
    std::vector<float> means(images * channels), gates(images * channels);
    over_channels(channels, input_.pitch(), [&](int64_t from, int64_t end) {
      for (int64_t c = from; c < end; ++c) {
        const float* const in = call.input + c * input_.pitch();
        float* const out = call.output + c * output_.pitch();
        float mean[kSumLanes];
        if (cleans_) {  // what lies in the lanes beyond an image is no part of its mean
          scale(in, nullptr, out);
          move(out);
          plane_means(out + output_.middle(), runs(output_), image_, static_cast<int>(images), pixels(), mean);
        } else {
          plane_means(in + input_.middle(), runs(input_), image_, static_cast<int>(images), pixels(), mean);
        }
        for (int64_t i = 0; i < images; ++i) means[i * channels + c] = mean[i];
      }
    });
    for (int64_t i = 0; i < images; ++i) excitation_->gates(&means[i * channels], &gates[i * channels]);
    over_channels(channels, input_.pitch(), [&](int64_t from, int64_t end) {
      for (int64_t c = from; c < end; ++c) {
        float gate[kSumLanes];
        for (int i = 0; i < kSumLanes; ++i) gate[i] = gates[image_[i] * channels + c];
        float* const out = call.output + c * output_.pitch();
        scale(call.input + c * input_.pitch(), gate, out);
        if (!output_.flat()) move(out);
      }
    });
  }

 private:
  int64_t pixels() const { return output_.image[0] * output_.image[1]; }
  // Lines of a plane; of one without borders all of it.
  static PlaneRuns runs(const StripLayout& layout) {
    const Pair& strip = layout.grid.strip;
    const int64_t lanes = layout.grid.lanes;
    if (layout.flat()) return {1, 0, strip[0] * strip[1] * lanes};
    return {strip[0], layout.plane()[1] * lanes, strip[1] * lanes};
  }

  // A plane times its gates by lane, if any.
  void scale(const float* in, const float* gate, float* out) const {
    const Pair& strip = output_.grid.strip;
    const int64_t lanes = output_.grid.lanes, together = input_.flat() && output_.flat() ? strip[0] : 1;
    for (int64_t y = 0; y < strip[0]; y += together) {
      const float* const from = in + input_.at(y, 0);
      float* const to = out + output_.at(y, 0);
      const int64_t count = together * strip[1] * lanes;
      if (gate && output_.grid.images > 1) {
        for (int64_t at = 0; at < count; at += lanes) {
          for (int64_t lane = 0; lane < lanes; ++lane) to[at + lane] = from[at + lane] * gate[lane];
        }
        continue;
      }
      EpilogueLine<float> line{};
      line.from = from;
      line.out = to;
      line.count = count;
      line.scale = gate;
      line.activation = Activation::none;
      type_kernels<float>().epilogue(line);
    }
  }

  void move(float* plane) const {
    type_kernels<float>().lanes[output_.grid.width].move_lanes(
        plane, moves_.data(), static_cast<int64_t>(moves_.size()), borders_.sources().data());
  }

  const std::shared_ptr<const Excitation> excitation_;
  const int64_t channels_;
  const StripLayout input_, output_;
  Borders<float> borders_;
  std::vector<LaneMove> moves_;
  bool cleans_;
  int image_[kSumLanes];  // of a unit, by lane
};

}  // namespace

std::unique_ptr<UnitStep> to_strips(const StripLayout& output, int64_t channels) {
  return std::make_unique<ToStrips>(output, channels);
}

std::unique_ptr<UnitStep> from_strips(const StripLayout& input, int64_t channels) {
  return std::make_unique<FromStrips>(input, channels);
}

std::unique_ptr<UnitStep> other_strips(const StripLayer& layer, const StripLayout& input, const StripLayout& output) {
  if (layer.excitation) return std::make_unique<ExciteStrips>(layer, input, output);
  return std::make_unique<PoolStrips>(layer, input, output);
}

}  // namespace sparsekd::cpu
