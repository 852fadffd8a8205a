#include "strip_plan.h"

#include <map>
#include <memory>
#include <numeric>

#include "generated_conv2d.h"
#include "passes.h"

namespace sparsekd::cpu {
namespace {

// Cycles that a vector costs on its way from an image into a strip, and back; and from a strip to its neighbour's.
constexpr double kPacked = 8, kUnpacked = 10, kMoved = 2;
// A vector of a max-pool of images, and each of a window's where it is one of strips.
constexpr double kPooled = 48, kCollected = 1.5;

// What the activations of a layer cost if they don't stay in L2, and of those what doesn't stay in L3: so much of it is
// one thread's.
double far_cycles(int64_t bytes) {
  constexpr double kL3Line = 2;
  constexpr int64_t kL3Share = 8;  // L2 budgets
  const double beyond_l2 = static_cast<double>(std::max<int64_t>(bytes - l2_budget(), 0));
  const double beyond_l3 = static_cast<double>(std::max<int64_t>(bytes - kL3Share * l2_budget(), 0));
  return (kL3Line * beyond_l2 + kFarLine * beyond_l3) / 64;
}

// Sums that a tile of so many positions makes side by side, for each of the passes that its rows take.
std::vector<int> sums_of(int vector, int64_t positions) {
  std::vector<int> sums;
  for (int row = 0; row < vector; row += chunk_rows(vector - row)) {
    sums.push_back(chains(static_cast<int>(chunk_rows(vector - row) * positions)));
  }
  return sums;
}

// The same of all of a grid's tiles; empty if they differ.
std::vector<int> sums_of(int vector, const Grid& grid) {
  if (grid.generated) return {1};
  const int64_t least = (grid.strip[0] / grid.tiles[0]) * (grid.strip[1] / grid.tiles[1]);
  const std::vector<int> sums = sums_of(vector, grid.largest());
  return least > 0 && sums_of(vector, least) == sums ? sums : std::vector<int>{};
}

bool one_sum(const std::vector<int>& sums) { return !sums.empty() && *std::max_element(sums.begin(), sums.end()) == 1; }

// Where a layer's input comes from in an arrangement of strips. `taken`: places that lie in others already.
StripSource source_of(const StripLayer& layer, const Grid& strips, const std::vector<bool>& taken) {
  const Conv2dShape& shape = layer.shape;
  if (taken[layer.input]) return StripSource::images;
  if (shape.stride == Pair{1, 1}) return shape.input == shape.output ? StripSource::strips : StripSource::images;
  const Pair cut{strips.down, strips.across};
  for (int d = 0; d < 2; ++d) {
    // Every strip's results are of the pixels in it and around it.
    const int64_t farthest = (shape.kernel[d] - 1) * shape.dilation[d] - shape.padding[d] - shape.stride[d];
    const bool halves = shape.input[d] == shape.output[d] * shape.stride[d] && shape.output[d] % cut[d] == 0;
    if (!halves || farthest >= shape.padding[d]) return StripSource::images;
  }
  return StripSource::apart;
}

// The grid of an arrangement for images of this size.
Grid for_images(Grid strips, const Pair& image) {
  strips.strip = {ceil_div(image[0], strips.down), ceil_div(image[1], strips.across)};
  return strips;
}

// How a layer may be run, and if there is another way to the same bits, that.
struct Ways {
  Grid grid;
  std::optional<Grid> other;
};

// A layer by itself, and in strips.
class Layer {
 public:
  explicit Layer(const StripLayer& of)
      : of(of),
        shape(of.shape),
        planes_(input_planes(shape, shape.output)) {
    if (!of.convolves()) {
      alone = kPooled * static_cast<double>(shape.batch * shape.out_channels * shape.output[0] * shape.output[1]) / 16;
      return;
    }
    pattern_.emplace(of.crow_indices, of.col_indices, std::nullopt, shape.out_channels, shape.groups, of.vector);
    rows_ = rows_of<float>(shape, *pattern_, nullptr);
    grid_ = inference_grid(shape, *pattern_);
    rows_.generated = can_generate(shape, *pattern_);  // in strips
    alone = grid_.cost * static_cast<double>(shape.groups);
  }

  // The tiles over the strips of a grid for the output, or over their pixels in one line, and what all of it costs;
  // null if none makes sums as they are made by itself.
  std::optional<Ways> in(const Grid& strips, StripSource source, bool one_line) {
    const auto [known, added] =
        found_.try_emplace({strips.width, strips.images, strips.down, static_cast<int64_t>(source), one_line});
    if (added) known->second = search(strips, source, one_line);
    return known->second;
  }

  const StripLayer& of;
  const Conv2dShape& shape;
  double alone;  // cycles

 private:
  std::optional<Ways> search(const Grid& strips, StripSource source, bool one_line) const {
    Grid grid = strips, best, best_code;
    const double units = ceil_div(shape.batch, strips.images);
    const double made = static_cast<double>(strips.strip[0] * strips.strip[1] * strips.lanes) * sizeof(float);
    const double read =
        static_cast<double>(shape.input[0] * shape.input[1]) / (shape.output[0] * shape.output[1]) * made;
    const double far = units * far_cycles(static_cast<int64_t>(shape.in_channels * read +
                                                               shape.out_channels * made * (of.residual < 0 ? 1 : 2)));
    if (!of.convolves()) {
      if (source == StripSource::images) return std::nullopt;
      grid.cost = far + kCollected *
                            static_cast<double>(shape.taps() * shape.out_channels * strips.strip[0] * strips.strip[1]) *
                            units;
      return Ways{grid, std::nullopt};
    }
    const TypeKernels<float>& kernels = type_kernels<float>();
    const TileShape most = kernels.lanes[strips.width].tile_shape(rows_.vector);
    const Work work = work_of(rows_, shape.batch, shape.output, shape.input[1], planes_, strips.lanes);
    const std::vector<int> sums = sums_of(rows_.vector, grid_);
    if (sums.empty()) return std::nullopt;
    grid.rows = most.rows;
    grid.halo = planes_.halo;
    if (one_line) grid.strip = {1, strips.strip[0] * strips.strip[1]};
    double packing = 0;
    if (source != StripSource::strips) {
      const double phases = static_cast<double>(planes_.phases.size());
      const double pixels = phases * static_cast<double>(strips.strip[0] * strips.strip[1]);
      const double all =
          phases * static_cast<double>((strips.strip[0] + grid.halo[0]) * (strips.strip[1] + grid.halo[1]));
      packing = source == StripSource::apart ? kMoved * all : kPacked * pixels + kMoved * (all - pixels);
      packing *= static_cast<double>(shape.in_channels);
    }
    auto cost = [&](const Grid& tried) {
      const double tiles = static_cast<double>(shape.groups * tried.tiles[0] * tried.tiles[1]);
      const bool reads_apart = source == StripSource::apart && tried.generated;
      return far + units * ((reads_apart ? 0 : packing) + tiles * rows_cycles(work, tried));
    };
    if (one_sum(sums) && rows_.generated && strips.width == kernels.generated && within_reach(strips)) {
      for_code(work, grid, [&](const Grid& code) {
        const double cycles = cost(code);
        if (cycles < best_code.cost) (best_code = code).cost = cycles;
      });
    }
    if (strips.width >= kernels.widths || (generates_always() && found(best_code))) return ways(best_code, best);
    for (int64_t lines = 1; lines <= std::min<int64_t>(most.lines, grid.strip[0]); ++lines) {
      for (int64_t width = 1; width <= std::min<int64_t>(most.positions / lines, grid.strip[1]); ++width) {
        grid.tiles = {ceil_div(grid.strip[0], lines), ceil_div(grid.strip[1], width)};
        const std::vector<int> made_so = sums_of(rows_.vector, grid);
        if (made_so != sums && !(one_sum(made_so) && one_sum(sums))) continue;
        grid.blocks = one_sum(sums) ? blocks_of(work, grid) : grid_.blocks;
        grid.cost = cost(grid);
        if (grid.cost < best.cost) best = grid;
      }
    }
    return best.cost < best_code.cost ? ways(best, best_code) : ways(best_code, best);
  }

  static bool found(const Grid& grid) { return grid.cost < std::numeric_limits<double>::max(); }
  static std::optional<Ways> ways(const Grid& best, const Grid& other) {
    constexpr double kUnsure = 1.7;  // how far costs may be wrong about two ways
    if (!found(best)) return std::nullopt;
    const bool unsure = other.cost < kUnsure * best.cost && !generates_always();
    return Ways{best, unsure ? std::optional(other) : std::nullopt};
  }

  // Whether code can tell how far apart channels and their taps are.
  bool within_reach(const Grid& strips) const {
    int64_t plane = strips.lanes;
    for (int d = 0; d < 2; ++d) plane *= shape.stride[d] * strips.strip[d] + 4 * shape.padding[d] + planes_.halo[d] + 1;
    return plane * shape.in_channels <= GeneratedRows::kFarthest;
  }

  Planes planes_;
  std::optional<Pattern> pattern_;
  Rows<float> rows_;
  Grid grid_;
  std::map<GridKey, std::optional<Ways>> found_;
};

// Places that belong together.
struct Sets {
  explicit Sets(size_t count) : parent(count) { std::iota(parent.begin(), parent.end(), 0); }
  int64_t of(int64_t place) {
    while (parent[place] != place) place = parent[place] = parent[parent[place]];
    return place;
  }
  void join(int64_t a, int64_t b) { parent[of(a)] = of(b); }
  std::vector<int64_t> parent;
};

// Whether a layer's results can lie in strips one channel after the other.
bool may_take_part(const StripLayer& layer) {
  const Conv2dShape& shape = layer.shape;
  if (!layer.convolves()) return shape.batch > 0;
  const bool whole = shape.groups == 1 || shape.out_channels / shape.groups % layer.vector == 0;
  return whole && shape.batch > 0 && layer.col_indices.numel() > 0;
}

// A region, and the cycles that it gains.
struct Gain {
  StripRegion region;
  double cycles = 0;
  bool operator>(const Gain& other) const { return !region.members.empty() && cycles > other.cycles; }
};

using Layers = std::vector<std::pair<size_t, Layer*>>;

// Layers that are connected, in one arrangement of strips, without those that do not fit into it. A place lies in the
// strips of one region at most.
Gain gain_of(Layers layers, const Grid& strips, std::vector<bool> elsewhere, const std::vector<bool>& taken) {
  Sets alike(elsewhere.size());  // a residual lies as its result does
  std::vector<Pair> halo(elsewhere.size(), {0, 0});
  std::vector<bool> made(elsewhere.size(), false);
  for (const auto& [_, layer] : layers) {
    if (layer->of.residual >= 0) alike.join(layer->of.residual, layer->of.output);
  }
  for (const auto& [_, layer] : layers) {
    made[layer->of.output] = true;
    if (source_of(layer->of, strips, taken) == StripSource::images) continue;
    Pair& most = halo[alike.of(layer->of.input)];
    for (int d = 0; d < 2; ++d) most[d] = std::max(most[d], layer->shape.padding[d]);
  }
  Gain gain;
  for (const auto& [index, layer] : layers) {
    const StripSource source = source_of(layer->of, strips, taken);
    const bool lines = source == StripSource::strips && halo[alike.of(layer->of.input)] != Pair{0, 0};
    const bool fits = !taken[layer->of.output] && (layer->of.residual < 0 || !taken[layer->of.residual]);
    const auto ways = fits ? layer->in(for_images(strips, layer->shape.output), source, is_flat(layer->shape) && !lines)
                           : std::nullopt;
    if (!ways) {
      elsewhere[layer->of.input] = true;
      if (layer->of.residual >= 0) elsewhere[layer->of.residual] = true;
      layers.erase(std::find(layers.begin(), layers.end(), std::pair(index, layer)));
      return gain_of(std::move(layers), strips, std::move(elsewhere), taken);
    }
    gain.region.members.push_back({index, source, ways->grid, ways->other});
    gain.cycles += layer->alone - ways->grid.cost;
  }
  gain.region.layouts.resize(elsewhere.size());
  auto lay = [&](int64_t place, const Pair& image, int64_t batch, int64_t channels) {
    std::optional<StripLayout>& layout = gain.region.layouts[place];
    if (layout) return;
    layout = StripLayout{for_images(strips, image), batch, image, halo[alike.of(place)]};
    const Pair& strip = layout->grid.strip;
    const int64_t inner = strip[0] * strip[1], border = layout->plane()[0] * layout->plane()[1] - inner;
    const double turned = !made[place] ? kPacked : elsewhere[place] ? kUnpacked : 0;
    gain.cycles -= static_cast<double>(layout->units() * channels) * (kMoved * border + turned * inner);
  };
  for (const StripRegion::Member& member : gain.region.members) {
    const StripLayer& of = std::find_if(layers.begin(), layers.end(), [&](const auto& one) {
                             return one.first == member.layer;
                           })->second->of;
    const Conv2dShape& shape = of.shape;
    if (member.source != StripSource::images) lay(of.input, shape.input, shape.batch, shape.in_channels);
    for (const int64_t place : {of.residual, of.output}) {
      if (place >= 0) lay(place, shape.output, shape.batch, shape.out_channels);
    }
  }
  return gain;
}

// The best region in one arrangement of strips, if it is better than `best`.
Gain best_in(std::map<size_t, Layer>& layers, const Grid& strips, std::vector<bool> elsewhere,
             const std::vector<bool>& taken, Gain best) {
  Sets together(elsewhere.size());
  for (const auto& [_, layer] : layers) {
    if (source_of(layer.of, strips, taken) == StripSource::images) {
      elsewhere[layer.of.input] = true;
    } else {
      together.join(layer.of.input, layer.of.output);
    }
    if (layer.of.residual >= 0) together.join(layer.of.residual, layer.of.output);
  }
  std::map<int64_t, Layers> groups;
  for (auto& [i, layer] : layers) groups[together.of(layer.of.output)].push_back({i, &layer});
  for (auto& [_, group] : groups) {
    Gain gain = gain_of(std::move(group), strips, elsewhere, taken);
    if (gain > best) best = std::move(gain);
  }
  return best;
}

// A residual is read with the channels that pad rows, as its result is written.
void count_channels(const std::vector<StripLayer>& layers, StripRegion& region) {
  region.channels.assign(region.layouts.size(), 0);
  auto want = [&](int64_t place, int64_t channels) {
    if (place >= 0) region.channels[place] = std::max(region.channels[place], channels);
  };
  for (const auto& member : region.members) {
    const StripLayer& layer = layers[member.layer];
    want(layer.input, layer.shape.in_channels);
    want(layer.residual, layer.made_channels());
    want(layer.output, layer.made_channels());
  }
}

// What one region reads of another's needs no images in between.
void regroup(const std::vector<StripLayer>& layers, std::vector<StripRegion>& regions) {
  std::map<int64_t, std::pair<StripLayout, int64_t>> made;
  for (const StripRegion& region : regions) {
    for (const auto& member : region.members) {
      const StripLayer& layer = layers[member.layer];
      made.try_emplace(layer.output, *region.layouts[layer.output], region.channels[layer.output]);
    }
  }
  for (StripRegion& region : regions) {
    for (auto& member : region.members) {
      const auto from = made.find(layers[member.layer].input);
      if (member.source != StripSource::images || from == made.end()) continue;
      const auto& [layout, channels] = from->second;
      const bool fits = layout.grid.lanes == member.grid.lanes &&
                        layout.batch * channels * layout.pitch() <= std::numeric_limits<int32_t>::max() &&
                        layout.batch % std::max(layout.grid.images, member.grid.images) == 0;
      if (!fits) continue;
      member.source = StripSource::regrouped;
      member.from = layout;
      member.from_channels = channels;
    }
  }
}

}  // namespace

std::vector<StripRegion> plan_strips(const std::vector<StripLayer>& layers, const std::vector<bool>& elsewhere,
                                     bool always) {
  std::vector<bool> read = elsewhere;  // by others than the layers that are left
  std::vector<bool> taken(elsewhere.size(), false), positive(elsewhere.size(), false);
  std::map<size_t, Layer> left;
  auto leave = [&](size_t i) {
    left.erase(i);
    read[layers[i].input] = true;
    if (layers[i].residual >= 0) read[layers[i].residual] = true;
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    // Zeros around a map change nothing in a largest value of it if that isn't negative.
    const Activation activation = layers[i].activation;
    const bool clamped = activation == Activation::relu || activation == Activation::relu6;
    positive[layers[i].output] = layers[i].convolves() ? clamped : positive[layers[i].input];
    const bool padded = !layers[i].convolves() && layers[i].shape.padding != Pair{0, 0};
    if (may_take_part(layers[i]) && (!padded || positive[layers[i].input])) {
      left.try_emplace(i, layers[i]);
    } else {
      leave(i);
    }
  }
  std::vector<StripRegion> regions;
  while (!left.empty()) {
    Gain best{{}, always ? std::numeric_limits<double>::lowest() : 0};
    const TypeKernels<float>& kernels = type_kernels<float>();
    for (int width = 0; width < std::max(kernels.widths, kernels.generated + 1); ++width) {
      const int64_t lanes = kernels.lanes[width].tile_shape(1).lanes;
      for (Grid strips : strip_grids(left.begin()->second.shape.batch, {1, 1}, lanes)) {
        strips.width = width;
        best = best_in(left, strips, read, taken, std::move(best));
      }
    }
    if (best.region.members.empty()) break;
    for (const StripRegion::Member& member : best.region.members) leave(member.layer);
    for (size_t place = 0; place < taken.size(); ++place) taken[place] = taken[place] || best.region.layouts[place];
    count_channels(layers, best.region);
    regions.push_back(std::move(best.region));
  }
  regroup(layers, regions);
  return regions;
}

}  // namespace sparsekd::cpu
