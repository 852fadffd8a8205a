#include "in_place.h"

#include <algorithm>
#include <utility>

#include "passes.h"

namespace sparsekd::cpu {
namespace {

constexpr int64_t kLanes = kGeneratedLanes;

// Elements from a result's pixel to each tap.
std::vector<Tap> taps_of(const Conv2dShape& shape) {
  std::vector<Tap> taps;
  for (int64_t r = 0; r < shape.kernel[0]; ++r) {
    for (int64_t s = 0; s < shape.kernel[1]; ++s) {
      taps.push_back({0, r * shape.dilation[0] - shape.padding[0], s * shape.dilation[1] - shape.padding[1]});
    }
  }
  return taps;
}

int64_t distance(const Conv2dShape& shape, const Tap& tap) { return tap.y * shape.input[1] + tap.x; }

bool inside(const Conv2dShape& shape, const Tap& tap, int64_t pixel) {
  const int64_t y = pixel / shape.input[1] + tap.y, x = pixel % shape.input[1] + tap.x;
  return y >= 0 && y < shape.input[0] && x >= 0 && x < shape.input[1];
}

// Whether a tap leaves the image for some pixel.
bool leaves(const Conv2dShape& shape, const Tap& tap) {
  return tap.y < 0 || tap.x != 0 || shape.output[0] - 1 + tap.y >= shape.input[0];
}

// Bytes of images and results beyond which they are not in L3 when they are read.
constexpr int64_t kNearBytes = int64_t{16} << 20;

// Loads that one of pixels counts as. One that straddles two lines counts three times: both have to come to L1, where
// channels lie as they lie.
double loads_of(const Conv2dShape& shape, const std::vector<Tap>& taps) {
  constexpr int64_t kChannels = kLanes;  // after which places in a line repeat
  int64_t straddling = 0;
  for (int64_t c = 0; c < kChannels; ++c) {
    for (const Tap& tap : taps) straddling += (c * shape.input[0] * shape.input[1] + distance(shape, tap)) % kLanes != 0;
  }
  return 1 + 2 * static_cast<double>(straddling) / static_cast<double>(kChannels * static_cast<int64_t>(taps.size()));
}

}  // namespace

Grid InPlace::grid_of(const Conv2dShape& shape, const Rows<float>& rows) {
  constexpr int64_t kMostMasks = 63;  // within reach of a byte
  const int64_t plane = shape.input[0] * shape.input[1], count = shape.output[0] * shape.output[1];
  Grid best;
  // Channels a multiple of 1 KiB apart would share their cache sets.
  if (shape.stride != Pair{1, 1} || shape.output[1] != shape.input[1] || count < kLanes || plane * 4 % 1024 == 0 ||
      !rows.in_order || rows.packed_per_group * rows.vector != shape.out_channels / shape.groups) {
    return best;
  }
  const std::vector<Tap> taps = taps_of(shape);
  if (std::count_if(taps.begin(), taps.end(), [&](const Tap& tap) { return leaves(shape, tap); }) > kMostMasks) {
    return best;
  }
  int64_t low = 0, high = 0;
  for (const Tap& tap : taps) {
    low = std::min(low, distance(shape, tap));
    high = std::max(high, distance(shape, tap));
  }
  const Planes planes{{Plane{shape.output, {1, 1}, {0, 0}}}, taps, {0, 0}, {}};
  const TypeKernels<float>& kernels = type_kernels<float>();
  const Work work = work_of(rows, shape.batch, shape.output, shape.input[1], planes, kLanes);
  Grid grid;
  grid.width = kernels.generated;
  grid.lanes = kLanes;
  grid.runs = grid.in_place = true;
  grid.strip = {1, ceil_div(count, kLanes)};
  grid.halo = {0, ceil_div(high - low, kLanes)};
  grid.loads = loads_of(shape, taps);
  for_code(work, grid, [&](Grid code) {
    code.cost = static_cast<double>(shape.batch * code.tiles[1]) * rows_cycles(work, code);
    if (code.cost < best.cost) best = code;
  });
  return best;
}

InPlace::InPlace(const Conv2dShape& shape, const Grid& grid)
    : shape_(shape),
      grid_(grid),
      count_(shape.output[0] * shape.output[1]),
      fetches_(4 * shape.batch * (shape.in_channels * shape.input[0] * shape.input[1] + shape.out_channels * count_) >
               kNearBytes),
      taps_(taps_of(shape)) {
  int masks = 0;
  for (const Tap& tap : taps_) mask_of_.push_back(leaves(shape, tap) ? masks++ : -1);
  of_each_ = masks;
  for (int64_t position = 0; position < grid.strip[1]; ++position) {
    const int64_t start = std::min(position * kLanes, count_ - kLanes);
    starts_.push_back(static_cast<int32_t>(start));
    for (const Tap& tap : taps_) {
      if (!leaves(shape, tap)) continue;
      uint16_t mask = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        mask = static_cast<uint16_t>(mask | (inside(shape, tap, start + lane) ? 1 : 0) << lane);
      }
      masks_.push_back(mask);
    }
  }
}

Tiling InPlace::tiling() const {
  Tiling tiling{shape_.input[0] * shape_.input[1], grid_.blocks};
  for (const Tap& tap : taps_) tiling.push_back(distance(shape_, tap));
  return tiling;
}

void InPlace::run_image(const GeneratedRows& code, const Rows<float>& rows, const Batch<const float>& source,
                        int64_t n, const float* init, const Epilogue<float>& epilogue, const Batch<float>& result,
                        int64_t from, int64_t to) const {
  const int64_t plane = source.size[0] * source.size[1], tiles = grid_.tiles[1];
  const int64_t channels = rows.channels_per_group * plane;
  Buffer<float> scratch(grid_.blocks > 1 ? kGeneratedRows * grid_.largest() * kLanes : 0);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t position = grid_.begin(1, t), first = position * kLanes;
    const ReadPlaces pixels{starts_.data() + position, masks_.data() + position * of_each_, of_each_,
                            static_cast<int>(grid_.strip[1] * kLanes - count_)};
    const int64_t next = t + 1 < tiles ? t + 1 : 0;
    const float* const ahead = !fetches_ ? nullptr : next > 0 ? source.image(n) : n + 1 < source.count ? source.image(n + 1) : nullptr;
    for (int64_t begin = from, end; begin < to; begin = end) {  // of one convolution group
      const int64_t group = begin / rows.packed_per_group;
      end = std::min(to, (group + 1) * rows.packed_per_group);
      float* const output = result.image(n) + begin * rows.vector * count_;
      SpmmTile<float> tile = tile_of<float>(grid_, 0, t, init ? init + begin * rows.vector : nullptr);
      tile.input = source.image(n) + group * channels;
      tile.reads = &pixels;
      tile.output = output;
      tile.output_pitch = count_;
      tile.places = pixels.starts;
      tile.tail = t + 1 == tiles && pixels.skipped > 0 ? static_cast<int>(kLanes) - pixels.skipped : 0;
      if (epilogue.clamps()) epilogue.clamp(tile, result.data, output);
      if (ahead) {
        tile.ahead = ahead + group * channels + starts_[grid_.begin(1, next)];
        tile.ahead_pitch = plane;
        tile.ahead_channels = rows.channels_per_group;
        tile.ahead_lines = static_cast<int>(grid_.count(1, next));
      }
      code.multiply(tile, rows.values, begin, end, scratch.get());
      if (epilogue.any() && !epilogue.clamps()) {
        finish_rows(rows, rows.row_of + begin * rows.vector, (end - begin) * rows.vector, epilogue, result, n, first,
                    std::min(tile.width * kLanes, count_ - first));
      }
    }
  }
}

void InPlace::run(const GeneratedRows& code, const Rows<float>& rows, const float* input, const float* init,
                  const Epilogue<float>& epilogue, float* output) const {
  const Batch<const float> source{input, shape_.batch, shape_.in_channels, shape_.input, false};
  const Batch<float> result{output, shape_.batch, shape_.out_channels, shape_.output, false};
  if (source.count >= at::get_num_threads()) {
    at::parallel_for(0, source.count, 1, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        run_image(code, rows, source, n, init, epilogue, result, 0, rows.packed());
      }
    });
    return;
  }
  for (int64_t n = 0; n < source.count; ++n) {
    parallel_rows(rows, [&](int64_t from, int64_t to) {
      run_image(code, rows, source, n, init, epilogue, result, from, to);
    });
  }
}

}  // namespace sparsekd::cpu
