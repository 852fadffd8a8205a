#include "in_strips.h"

#include <ATen/ops/empty.h>

#include <numeric>

#include "borders.h"
#include "passes.h"

namespace sparsekd::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements that pay for another thread

template <class Body>
void over_channels(int64_t channels, int64_t elements, Body body) {
  at::parallel_for(0, channels, std::max<int64_t>(kGrain / std::max<int64_t>(elements, 1), 1), body);
}

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
        taps_(layer.shape.taps()),
        input_(input),
        output_(output),
        borders_(output.grid) {
    const Conv2dShape& shape = layer.shape;
    for (int64_t y = 0; y < output.grid.strip[0]; ++y) {
      for (int64_t x = 0; x < output.grid.strip[1]; ++x) {
        for (int64_t r = 0; r < shape.kernel[0]; ++r) {
          for (int64_t s = 0; s < shape.kernel[1]; ++s) {
            from_.push_back(static_cast<int32_t>(
                input.at(y * shape.stride[0] - shape.padding[0] + r, x * shape.stride[1] - shape.padding[1] + s)));
          }
        }
      }
    }
    if (!output.flat())
      moves_ = borders_.moves(output.image, output.plane(), {-output.halo[0], -output.halo[1]}, false);
  }

  void run(const UnitCall& call) const override {
    const LaneKernels<float>& kernels = type_kernels<float>().lanes[output_.grid.width];
    const Pair& strip = output_.grid.strip;
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
          kernels.collect(in, from_.data() + y * strip[1] * taps_, taps_, strip[1], plane + output_.at(y, 0));
        }
        kernels.move_lanes(plane, moves_.data(), static_cast<int64_t>(moves_.size()), borders_.sources().data());
      }
    });
  }

 private:
  const int64_t channels_, given_, zeros_before_, taps_;
  const StripLayout input_, output_;
  Borders<float> borders_;
  std::vector<int32_t> from_;  // [position, tap]
  std::vector<LaneMove> moves_;
};

class ExciteStrips : public UnitStep {
 public:
  ExciteStrips(const StripLayer& layer, const StripLayout& input, const StripLayout& output)
      : excitation_(layer.excitation), input_(input), output_(output), borders_(output.grid) {
    const Grid& grid = output.grid;
    moves_ = borders_.moves(output.image, output.plane(), {-output.halo[0], -output.halo[1]}, false);
    cleans_ = input.flat() && output.image != grid.covered();
    for (int i = 0; i < kSumLanes; ++i) image_[i] = static_cast<int>(i % grid.lanes / (grid.down * grid.across));
  }

  bool fits() const override { return excitation_->fits(); }

  void run(const UnitCall& call) const override {
    const int64_t channels = excitation_->channels(), images = output_.grid.images;
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
  const StripLayout input_, output_;
  Borders<float> borders_;
  std::vector<LaneMove> moves_;
  bool cleans_;
  int image_[kSumLanes];  // of a unit, by lane
};

// Where the vectors of `planes` over an output's strips lie in a plane of the input's; -1 for those that no tap reads.
std::vector<int32_t> drawn_apart(const Planes& planes, const StripLayout& input) {
  std::vector<int32_t> from;
  const Pair& strip = input.grid.strip;
  for (const Plane& plane : planes.phases) {
    for (int64_t y = 0; y < plane.size[0]; ++y) {
      for (int64_t x = 0; x < plane.size[1]; ++x) {
        const int64_t row = y * plane.step[0] + plane.origin[0], column = x * plane.step[1] + plane.origin[1];
        const bool held = row >= -input.halo[0] && row < strip[0] + input.halo[0] && column >= -input.halo[1] &&
                          column < strip[1] + input.halo[1];
        from.push_back(held ? static_cast<int32_t>(input.at(row, column)) : -1);
      }
    }
  }
  return from;
}

// Where the pixels of `planes` over an output's strips, of its first unit, lie in strips of another grid; -1 for zeros.
std::vector<int32_t> regrouped(const Planes& planes, const Grid& grid, const StripLayout& input, int64_t channels) {
  const Grid& from = input.grid;
  std::vector<int32_t> places;
  for (const Plane& plane : planes.phases) {
    for (int64_t y = 0; y < plane.size[0]; ++y) {
      for (int64_t x = 0; x < plane.size[1]; ++x) {
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          const int64_t image = lane / (grid.down * grid.across), down = lane / grid.across % grid.down;
          const int64_t row = (down * grid.strip[0] + y) * plane.step[0] + plane.origin[0];
          const int64_t column = (lane % grid.across * grid.strip[1] + x) * plane.step[1] + plane.origin[1];
          const bool inside = row >= 0 && row < input.image[0] && column >= 0 && column < input.image[1];
          if (!inside) {
            places.push_back(-1);
            continue;
          }
          const int64_t strip =
              (image % from.images * from.down + row / from.strip[0]) * from.across + column / from.strip[1];
          places.push_back(static_cast<int32_t>(image / from.images * channels * input.pitch() +
                                                input.at(row % from.strip[0], column % from.strip[1]) + strip));
        }
      }
    }
  }
  return places;
}

}  // namespace

StripLayer StripLayer::without_groups() const {
  const int64_t groups = shape.groups, columns = shape.in_channels / groups * shape.taps();
  const int64_t rows = crow_indices.size(0) - 1;
  const int32_t* const crow = crow_indices.const_data_ptr<int32_t>();
  StripLayer layer = *this;
  layer.shape.groups = 1;
  layer.col_indices = col_indices.clone();
  int32_t* const col = layer.col_indices.mutable_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const auto before = static_cast<int32_t>(row / (rows / groups) * columns);
    for (int64_t i = crow[row]; i < crow[row + 1]; ++i) col[i] += before;
  }
  return layer;
}

int64_t StripLayout::pitch() const { return spread<float>(plane()[0] * plane()[1] * grid.lanes); }

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

// Where nothing is read again by the rows of other tiles' blocks, groups are no more than other rows: one call of the
// kernel takes many.
ConvStrips::ConvStrips(const StripLayer& layer, StripSource source, const Grid& grid, const StripLayout& input,
                       int64_t input_channels, const StripLayout& output)
    : ConvStrips(layer.shape.groups > 1 && grid.blocks == 1 ? layer.without_groups() : layer,
                 grid.blocks == 1 ? layer.shape.groups : 1, source, grid, input, input_channels, output) {}

ConvStrips::ConvStrips(const StripLayer& layer, int64_t groups, StripSource source, const Grid& grid,
                       const StripLayout& input, int64_t input_channels, const StripLayout& output)
    : shape_(layer.shape),
      crow_(layer.crow_indices),
      col_(layer.col_indices),
      pattern_(crow_, col_, {}, shape_.out_channels, shape_.groups, layer.vector),
      merged_groups_(groups),
      activation_(layer.activation),
      source_(source),
      grid_(grid),
      input_(input),
      output_(output),
      planes_(input_planes(shape_, output.grid.strip)) {
  const int64_t lanes = grid.lanes, vectors = pattern_.n_vectors;
  Tiling tiling;
  if (source == StripSource::strips) {
    pitch_ = input.pitch();
    line_ = input.plane()[1] * lanes;
    tiling = {pitch_, grid.blocks};
    for (int64_t r = 0; r < shape_.kernel[0]; ++r) {
      for (int64_t s = 0; s < shape_.kernel[1]; ++s) {
        tiling.push_back(
            input.at(r * shape_.dilation[0] - shape_.padding[0], s * shape_.dilation[1] - shape_.padding[1]));
      }
    }
  } else {
    const Layout layout = plain_layout(planes_);
    pitch_ = spread<float>(layout.channel() * lanes);
    line_ = layout.pitch * lanes;
    tiling = tiling_of(pitch_, grid.blocks, planes_.taps, layout, lanes);
    if (source == StripSource::apart) apart_ = drawn_apart(planes_, input);
    if (source == StripSource::regrouped) apart_ = regrouped(planes_, output.grid, input, input_channels);
  }
  const at::TensorOptions options = crow_.options();
  order_ = at::empty({vectors}, options);
  if (grid.generated) {
    const Rows<float> rows = rows_of<float>(shape_, pattern_, nullptr);
    code_ = std::make_unique<GeneratedRows>(rows, column_table(rows, tiling), grid.blocks);
    std::copy(code_->order().begin(), code_->order().end(), order_.mutable_data_ptr<int32_t>());
  } else {
    starts_ = empty_resident({grid.blocks * pattern_.groups * pattern_.packed_per_group + 1}, options);
    offsets_ = empty_resident({vectors + 1}, options);  // the kernel reads one ahead
    int32_t* const offsets = offsets_.mutable_data_ptr<int32_t>();
    offsets[vectors] = 0;
    plan_offsets(shape_, pattern_, tiling, starts_.mutable_data_ptr<int32_t>(), offsets,
                 order_.mutable_data_ptr<int32_t>());
  }

  const int64_t width = output.grid.strip[1], line = output.plane()[1];
  for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
    for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
      std::vector<int32_t>& places = places_.emplace_back();
      for (int64_t h = 0; h < grid.count(0, ty); ++h) {
        for (int64_t w = 0; w < grid.count(1, tx); ++w) {
          const int64_t y = grid.begin(0, ty) + h, x = grid.begin(1, tx) + w;  // of a strip in one line or in its own
          places.push_back(static_cast<int32_t>(((y + x / width) * line + x % width) * lanes));
        }
      }
    }
  }
  Borders<float> borders(output.grid);
  if (!output.flat()) moves_ = borders.moves(output.image, output.plane(), {-output.halo[0], -output.halo[1]}, false);
  sources_ = borders.sources();
}

bool ConvStrips::fits(const at::Tensor& values, const std::optional<at::Tensor>& shift) const {
  auto are = [](const at::Tensor& tensor, at::IntArrayRef size) {
    return is_cpu_floats(tensor, size) && tensor.is_contiguous();
  };
  return are(values, {pattern_.n_vectors, pattern_.vector}) && (!shift || are(*shift, {shape_.out_channels}));
}

// Where channels from .. to - 1 of what is packed come from.
void ConvStrips::pack(const UnitCall& call, const StripPacker<float>* packer, int64_t from, int64_t to,
                      float* packed) const {
  const LaneKernels<float>& kernels = type_kernels<float>().lanes[grid_.width];
  const auto positions = static_cast<int64_t>(apart_.size());
  if (source_ == StripSource::images) return packer->pack(call.unit * grid_.images, from, to, pitch_, packed);
  const float* input = call.input;
  if (source_ == StripSource::regrouped) {
    const Grid& before = input_.grid;
    const int64_t image = call.unit * grid_.images;
    input += image / before.images * call.input_unit + image % before.images * before.down * before.across;
  }
  for (int64_t c = from; c < to; ++c) {
    const float* const plane = input + c * input_.pitch();
    if (source_ == StripSource::regrouped) {
      kernels.regroup(plane, apart_.data(), positions, packed + c * pitch_);
    } else {
      kernels.collect(plane, apart_.data(), 1, positions, packed + c * pitch_);
    }
  }
}

// What the kernel can't do to results on their way: of a plane's own pixels, what lies around them follows.
void ConvStrips::activate(float* plane) const {
  const Pair& strip = output_.grid.strip;
  const int64_t together = output_.flat() ? strip[0] : 1;  // lines without a border between them
  for (int64_t y = 0; y < strip[0]; y += together) {
    EpilogueLine<float> line{};
    line.from = line.out = plane + output_.at(y, 0);
    line.count = together * strip[1] * output_.grid.lanes;
    line.activation = activation_;
    type_kernels<float>().epilogue(line);
  }
}

void ConvStrips::run(const UnitCall& call) const {
  const LaneKernels<float>& kernels = type_kernels<float>().lanes[grid_.width];
  const bool packs = source_ != StripSource::strips, merged = merged_groups_ > 1;
  const Batch<const float> images{call.input, shape_.batch, shape_.in_channels, shape_.input, false};
  const Planes whole = input_planes(shape_, output_.grid.covered());
  std::optional<StripPacker<float>> packer;
  if (source_ == StripSource::images) packer.emplace(images, planes_, whole, output_.grid);
  const StripPacker<float>* const from_images = packer ? &*packer : nullptr;
  const Buffer<float> packed(packs && !merged ? shape_.in_channels * pitch_ : 0);
  if (packs && !merged) {
    over_channels(shape_.in_channels, pitch_,
                  [&](int64_t from, int64_t to) { pack(call, from_images, from, to, packed.get()); });
  }
  Rows<float> rows = rows_of(shape_, pattern_, call.values);
  Offsets offsets;
  if (code_) {
    offsets.code = code_.get();
    rows.cuts = &code_->cuts();
  } else {
    offsets.offset = offsets_.const_data_ptr<int32_t>();
    offsets.starts = starts_.const_data_ptr<int32_t>();
    offsets.next = 1;
    offsets.pitch = pitch_;
    offsets.limit = std::numeric_limits<uint32_t>::max();  // all were checked when they were made
  }
  Epilogue<float> epilogue;
  epilogue.activation = activation_;
  const int64_t out_pitch = output_.pitch();
  const int64_t merged_rows = rows.packed() / merged_groups_, merged_channels = shape_.in_channels / merged_groups_;
  // Rows that share nothing with others take all tiles while their channels are in the caches.
  const int64_t elements = merged ? merged_channels * pitch_ / (merged_rows * rows.vector) + out_pitch
                                  : grid_.largest() * grid_.lanes;
  parallel_rows(rows, [&](int64_t from, int64_t to) {
    std::vector<int32_t> cursor;
    const Buffer<float> scratch(merged ? 0 : std::min(to - from, rows.packed_per_group) * rows.vector * elements);
    int64_t most = 0;  // merged channels of a chunk
    auto channels_of = [&](int64_t begin, int64_t end) {
      return std::pair(begin / merged_rows * merged_channels, ceil_div(end, merged_rows) * merged_channels);
    };
    if (packs && merged) {
      for_chunks(rows, elements, from, to, [&](int64_t, int64_t begin, int64_t end) {
        const auto [first, past] = channels_of(begin, end);
        most = std::max(most, past - first);
      });
    }
    const Buffer<float> own(most * pitch_);
    for_chunks(rows, elements, from, to, [&](int64_t group, int64_t begin, int64_t end) {
      const float* source = packs ? packed.get() : call.input;
      if (packs && merged) {
        const auto [first, past] = channels_of(begin, end);
        float* const at = own.get() - first * pitch_;  // where channel 0 would be
        pack(call, from_images, first, past, at);
        source = at;
      }
      const int64_t before = begin * rows.vector * out_pitch;
      auto places = places_.begin();
      for (int64_t ty = 0; ty < grid_.tiles[0]; ++ty) {
        for (int64_t tx = 0; tx < grid_.tiles[1]; ++tx) {
          SpmmTile<float> tile = tile_of(grid_, ty, tx, call.init);
          tile.input = source + group * rows.channels_per_group * pitch_ + grid_.begin(0, ty) * line_ +
                       grid_.begin(1, tx) * grid_.lanes;
          tile.line = line_;
          tile.output = call.output + before + output_.middle();
          tile.output_pitch = out_pitch;
          tile.places = (places++)->data();
          if (epilogue.clamps()) epilogue.clamp(tile, tile.output, tile.output);
          if (call.residual) tile.residual = call.residual + before + output_.middle();
          multiply_tile(grid_, rows, offsets, grid_.blocks, tile, begin, end, scratch.get(), cursor);
        }
      }
      for (int64_t r = 0; r < (end - begin) * rows.vector && !(moves_.empty() && epilogue.clamps()); ++r) {
        float* const plane = call.output + before + r * out_pitch;
        if (!epilogue.clamps()) activate(plane);
        if (moves_.empty()) continue;
        kernels.move_lanes(plane, moves_.data(), static_cast<int64_t>(moves_.size()), sources_.data());
      }
    });
  });
}

}  // namespace sparsekd::cpu
