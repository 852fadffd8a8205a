#include "in_strips.h"

#include <ATen/ops/empty.h>

#include "borders.h"
#include "passes.h"

namespace sparsekd::cpu {
namespace {

// Whether a tap of some position of a strip reads this vector of a phase.
bool is_read(const Planes& planes, const Pair& strip, int64_t phase, int64_t y, int64_t x) {
  return std::any_of(planes.taps.begin(), planes.taps.end(), [&](const Tap& tap) {
    return tap.phase == phase && y >= tap.y && y < tap.y + strip[0] && x >= tap.x && x < tap.x + strip[1];
  });
}

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

}  // namespace

Regrouped::Regrouped(const Planes& planes, const Grid& grid, const StripLayout& input, int64_t channels) : grid_(grid) {
  const Grid& from = input.grid;
  // Where the pixel of a lane is: its vector's elements from the first unit on, and its lane; or -1 for none.
  auto source = [&](const Plane& plane, int64_t y, int64_t x, int64_t lane) -> std::pair<int64_t, int64_t> {
    const int64_t image = lane / (grid.down * grid.across), down = lane / grid.across % grid.down;
    const int64_t row = (down * grid.strip[0] + y) * plane.step[0] + plane.origin[0];
    const int64_t column = (lane % grid.across * grid.strip[1] + x) * plane.step[1] + plane.origin[1];
    if (row < 0 || row >= input.image[0] || column < 0 || column >= input.image[1]) return {-1, 0};
    return {image / from.images * channels * input.pitch() + input.at(row % from.strip[0], column % from.strip[1]),
            (image % from.images * from.down + row / from.strip[0]) * from.across + column / from.strip[1]};
  };
  int64_t place = 0, phase = 0;
  for (auto of = planes.phases.begin(); of != planes.phases.end(); ++of, ++phase) {
    const Plane& plane = *of;
    for (int64_t y = 0; y < plane.size[0]; ++y) {
      for (int64_t x = 0; x < plane.size[1]; ++x, place += grid.lanes) {
        if (!is_read(planes, grid.strip, phase, y, x)) continue;
        const size_t first = from_.size();
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          const auto [vector, of_vector] = source(plane, y, x, lane);
          lanes_.push_back(static_cast<int32_t>(of_vector));
          if (vector < 0) continue;
          size_t part = first;
          while (part < from_.size() && from_[part] != vector) ++part;
          if (part == from_.size()) {
            from_.push_back(static_cast<int32_t>(vector));
            masks_.push_back(0);
          }
          masks_[part] = static_cast<uint16_t>(masks_[part] | 1 << lane);
        }
        to_.push_back(static_cast<int32_t>(place));
        ends_.push_back(static_cast<int32_t>(from_.size()));
      }
    }
  }
}

void Regrouped::operator()(const float* in, int64_t lanes_before, float* out) const {
  const auto count = static_cast<int64_t>(to_.size());
  type_kernels<float>().lanes[grid_.width].merge_lanes(
      in, static_cast<int>(grid_.lanes - lanes_before),
      {count, to_.data(), ends_.data(), lanes_.data(), from_.data(), masks_.data()}, out);
}

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
  if (source == StripSource::strips || (source == StripSource::apart && grid.generated)) {
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
    if (source == StripSource::regrouped) {
      regrouped_ = std::make_unique<Regrouped>(planes_, output.grid, input, input_channels);
    }
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
      if (source != StripSource::apart || !grid.generated) continue;
      std::vector<int32_t>& starts = starts_apart_.emplace_back();
      for (const int32_t place : places) {
        const int64_t y = place / lanes / line * shape_.stride[0], x = place / lanes % line * shape_.stride[1];
        starts.push_back(static_cast<int32_t>(y * line_ + x * lanes));
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
  if (source_ == StripSource::images) return packer->pack(call.unit * grid_.images, from, to, pitch_, packed);
  const float* input = call.input;
  int64_t lanes_before = 0;
  if (source_ == StripSource::regrouped) {
    const Grid& before = input_.grid;
    const int64_t image = call.unit * grid_.images;
    lanes_before = image % before.images * before.down * before.across;
    input += image / before.images * call.input_unit + lanes_before;
  }
  for (int64_t c = from; c < to; ++c) {
    const float* const plane = input + c * input_.pitch();
    if (source_ == StripSource::regrouped) {
      // Units lie far apart, so that nothing foresees the next channel of each.
      for (int64_t image = 0; c + 1 < to && image < grid_.images; image += input_.grid.images) {
        fetch_line(plane + input_.pitch() + image / input_.grid.images * call.input_unit, input_.pitch());
      }
      (*regrouped_)(plane, lanes_before, packed + c * pitch_);
    } else {
      kernels.collect(plane, apart_.data(), static_cast<int64_t>(apart_.size()), packed + c * pitch_);
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
  const bool packs = this->packs(), merged = merged_groups_ > 1;
  const Batch<const float> images{call.input, shape_.batch, shape_.in_channels, shape_.input, false};
  std::optional<Planes> whole;
  std::optional<StripPacker<float>> packer;
  if (source_ == StripSource::images) {
    whole = input_planes(shape_, output_.grid.covered());
    packer.emplace(images, planes_, *whole, output_.grid);
  }
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
      auto starts = starts_apart_.begin();
      for (int64_t ty = 0; ty < grid_.tiles[0]; ++ty) {
        for (int64_t tx = 0; tx < grid_.tiles[1]; ++tx) {
          SpmmTile<float> tile = tile_of(grid_, ty, tx, call.init);
          tile.input = source + group * rows.channels_per_group * pitch_;
          ReadPlaces reads{};
          if (starts_apart_.empty()) {
            tile.input += grid_.begin(0, ty) * line_ + grid_.begin(1, tx) * grid_.lanes;
            tile.line = line_;
          } else {
            reads.starts = (starts++)->data();
            tile.reads = &reads;
          }
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
