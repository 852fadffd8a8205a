// Pixels in the lanes of vectors, so that every column of a packed weight is one aligned vector at a fixed distance.
//
// Strips: an image is cut into `down` x `across` strips, and `images` of them lie side by side. Lane l of position (y,
// x) holds pixel (y, x) of strip l, so that a tap moves whole vectors and a tile never meets a border:
//
//   image of 4 x 4 pixels, 2 x 2 strips, 4 lanes        position (0, 0)   a c i k
//     a b | c d                                         position (0, 1)   b d j l
//     e f | g h        with a 3 x 3 kernel each         position (1, 0)   e g m o
//     ---------        strip has a halo of its          ...
//     i j | k l        neighbours' pixels around it,
//     m n | o p        or zeros (planes.h)
//
// Runs: a vector is as many pixels as it has lanes, one after the other as they lie in a padded plane. A tap moves
// single elements, so that loads straddle cache lines, but nothing is turned around on the way in and out. Lines share
// their padding (planes.h). Where they begin at a multiple of a vector, only taps to the sides straddle, and a tile may
// leave the rest of the lines out; where they don't, a run goes on over their ends, and the few results between are
// thrown away:
//
//   image, one channel            its plane (padding 1, 3 x 3 taps)
//     a b c                         0 0 0 0
//     d e f                         a b c 0      output pixel p = (oh, ow) lives at oh * pitch + ow, and tap (r, s)
//     g h i                         d e f 0      reads plane[p + r * pitch + s - 1], whatever p is
//                                   g h i 0
//                                   0 0 0 0
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "generated.h"
#include "kernels.h"
#include "planes.h"

namespace sparsekd::cpu {

// Where lanes lie, and how positions are cut into tiles and channels into blocks. A position is one vector.
struct Grid {
  int width = 0;      // of its vectors: type_kernels().lanes[width]
  double cost = std::numeric_limits<double>::max();  // see `cycles`
  bool runs = false, aligned = false;
  bool generated = false;  // whether rows have code of their own (generated.h)
  bool in_place = false;   // whether images are read where they lie (in_place.h)
  bool lying = false;      // or by the interpreting kernel, though their vectors straddle lines of the cache
  int64_t lanes = 1, images = 1, down = 1, across = 1;
  int rows = 1;       // that a tile takes together
  int64_t bands = 1;  // of lines in which an image is packed and multiplied
  Pair strip{1, 1};   // positions: of a strip; of a map of runs, in lines or in one
  Pair halo{0, 0};    // positions that taps reach beyond a tile
  double loads = 1;   // that a position costs
  Pair tiles{1, 1};   // over a strip; they differ by at most one line or one position
  int64_t blocks = 1;  // of channels
  int64_t begin(int d, int64_t tile) const { return strip[d] * tile / tiles[d]; }
  int64_t count(int d, int64_t tile) const { return begin(d, tile + 1) - begin(d, tile); }
  Pair tile() const { return {ceil_div(strip[0], tiles[0]), ceil_div(strip[1], tiles[1])}; }  // the largest
  int64_t largest() const { return tile()[0] * tile()[1]; }
  Pair covered() const { return {down * strip[0], across * strip[1]}; }  // pixels of an image with room in the strips
};

// What decides on a grid.
struct Work {
  int64_t batch;
  Pair pixels;             // of a result
  int64_t width;           // of the source
  const Planes* planes;    // for `pixels`
  int64_t channels, rows;  // of one convolution group: input channels, row groups
  double vectors_per_row;  // non-zero vectors in a row group
  int vector;
  int64_t bytes;           // of a vector of lanes
};

// Cycles, fitted to timings of ResNets' layers with 16 lanes.
constexpr double kFarLine = 25;     // a line of 64 bytes that goes to L3 and back
constexpr double kL2Line = 0.55;    // a load of 64 bytes from L2, besides that from L1
constexpr double kRow = 15;         // a row and block: the loop's end is not foreseen
constexpr double kStreamByte = 0.1;  // of weights, offsets or code, which each tile reads: the first from memory,
constexpr double kFarByte = 0.05;    // the others from L3,
constexpr double kNearByte = 0.01;   // or from L2
constexpr double kSum = 2.3;        // a partial sum of 64 bytes, which lies in L2 from block to block

// Bytes that a tile reads of a channel.
inline int64_t footprint_of(const Work& work, const Grid& grid) {
  const Pair tile = grid.tile();
  const auto phases = static_cast<int64_t>(work.planes->phases.size());
  if (grid.runs || work.planes->reach.empty()) {
    return phases * (tile[0] + grid.halo[0]) * (tile[1] + grid.halo[1]) * work.bytes;
  }
  int64_t positions = 0;
  for (const Pair& reach : work.planes->reach) positions += (tile[0] + reach[0]) * (tile[1] + reach[1]);
  return positions * work.bytes;
}

// Cycles in which a tile reads so many bytes of the rows.
inline double stream_cycles(const Grid& grid, double bytes, double of_all) {
  const bool near = of_all <= 0.5 * static_cast<double>(l2_budget());
  return bytes * (kStreamByte / static_cast<double>(grid.tiles[0] * grid.tiles[1]) + (near ? kNearByte : kFarByte));
}

// Cycles of a row of a tile: two FMAs a cycle, or as many as two loads a cycle allow, fewer where what a tile reads of
// a block of channels isn't in L1 whole; and what a column and a block cost besides.
inline double row_cycles(const Work& work, const Grid& grid, int64_t blocks) {
  const double sums = static_cast<double>(grid.strip[0]) / grid.tiles[0] * grid.strip[1] / grid.tiles[1];
  const double passes = ceil_div(work.vector, grid.rows), lines = work.bytes / 64.0;
  const double read = static_cast<double>(ceil_div(work.channels, blocks) * footprint_of(work, grid));
  const double missed = std::clamp(read * 3 / (4 * l1_budget()) - 1, 0.0, 1.0);
  const double load = 0.5 * grid.loads + missed * kL2Line * lines;
  const double fmas = 0.5 * sums * work.vector, loads = passes * (sums * load + 0.5) + 0.5 * work.vector;
  const double column = std::max({fmas, loads, 2.5 * passes}) + 0.3 * passes;
  const double weights = work.vectors_per_row * 4 * (1 + work.vector);
  return work.vectors_per_row * column + stream_cycles(grid, weights, weights * static_cast<double>(work.rows)) +
         blocks * (kRow * passes + kSum * (1 + lines) / 2 * sums * work.vector);
}

constexpr double kBody = 1050;      // entries in a group's code for a block
constexpr double kCall = 16;        // a call of it,
constexpr double kFinish = 40;      // and one that stores results
constexpr double kSlot = 0.49;      // an FMA, or a load of pixels
constexpr double kNearLine = 0.05;  // a line of pixels that comes from L2, besides
constexpr double kLostLine = 1.1;   // that comes from L3
constexpr double kFirstLine = 3.2;  // of a tile, when the first rows read it

// Cycles of a position's FMAs and loads of pixels. A processor that takes vectors of 64 bytes in two halves has one FMA
// a cycle, beside a load of a whole vector or of two weights.
inline double slot_cycles(double fmas, double loads) {
  const TypeKernels<float>& kernels = type_kernels<float>();
  const bool halves = kernels.generated >= kernels.widths;
  return halves ? std::max(fmas, 0.5 * fmas + loads) : kSlot * (fmas + loads);
}

// Cycles of all rows of a tile by generated code: a load of pixels for each column that has an entry in a group of
// rows, and an FMA with a weight from memory for each entry.
inline double generated_cycles(const Work& work, const Grid& grid) {
  const auto groups = static_cast<double>(ceil_div(work.rows, grid.rows / work.vector));
  const double sums = static_cast<double>(grid.strip[0]) / grid.tiles[0] * grid.strip[1] / grid.tiles[1];
  const double columns = static_cast<double>(work.channels * static_cast<int64_t>(work.planes->taps.size()));
  const double absent = std::max(1 - work.vectors_per_row / columns, 0.0);
  const double entries = work.vectors_per_row * static_cast<double>(work.rows * work.vector) / groups;
  const double loads = columns * (1 - std::pow(absent, static_cast<double>(work.rows) / groups));
  const auto read = static_cast<double>(work.channels * footprint_of(work, grid));
  const bool far = read > (grid.in_place ? 0.4 : 0.75) * static_cast<double>(l2_budget());  // with the next one beside it
  const double position =
      slot_cycles(entries, loads * grid.loads) + (far ? kLostLine : kNearLine) * loads + kCall * grid.blocks + kFinish;
  const double code = 11 * entries + 10 * loads;
  return groups * (sums * position + stream_cycles(grid, code, groups * code)) + kFirstLine * read / 64;
}

inline double rows_cycles(const Work& work, const Grid& grid) {
  return grid.generated ? generated_cycles(work, grid)
                        : static_cast<double>(work.rows) * row_cycles(work, grid, grid.blocks);
}

// Blocks of channels: the more, the more of what a tile reads of one stays in L1 while all rows pass, and the more
// often partial sums come and go.
inline int64_t blocks_of(const Work& work, const Grid& grid) {
  if (grid.generated) {
    const int64_t rows = std::min<int64_t>(work.rows, grid.rows / work.vector);
    const int64_t bodies = std::llround(work.vectors_per_row * static_cast<double>(rows * work.vector) / kBody);
    return std::clamp<int64_t>(bodies, 1, std::max<int64_t>(work.channels, 1));
  }
  int64_t best = 1;
  double least = row_cycles(work, grid, 1);
  for (int64_t blocks = 2; blocks <= std::min<int64_t>(work.channels, 64); blocks += 1 + blocks / 8) {
    const double cost = row_cycles(work, grid, blocks);
    if (cost < least) {
      least = cost;
      best = blocks;
    }
  }
  return best;
}

// Cycles of a whole pass, roughly: its rows, and what each line and vector costs on its way in and out, more where it
// is turned around.
inline double cycles(const Work& work, const Grid& grid) {
  const auto lanes = static_cast<double>(grid.lanes), phases = static_cast<double>(work.planes->phases.size());
  const double wide = grid.strip[1] + grid.halo[1], lines_in = work.channels * phases * (grid.strip[0] + grid.halo[0]);
  const double results = work.rows * work.vector * grid.strip[0];
  double around;
  if (grid.lying) {
    around = 3 * results * grid.strip[1];
  } else if (grid.runs) {
    around = (phases == 1 ? 0.25 : 1.0) * lanes * lines_in * wide + 4 * results * grid.strip[1];
  } else {
    const double squares = ceil_div(grid.strip[1], 4) * 4;
    const double squares_out = grid.tiles[1] * (4 + ceil_div(grid.tile()[1], 4) * 4);
    if (grid.images == 1 && work.bytes == 64 && work.pixels[0] * work.pixels[1] <= kSmallMap) {
      around = 4 * (lines_in * wide + results * grid.strip[1]);
    } else {
      const double middle = work.channels * phases * grid.strip[0];
      around = middle * (4 + lanes / 4) * squares + 4 * (lines_in * wide - middle * grid.strip[1]);
      around += results * (2 + lanes / 2) * squares_out;
    }
    if (phases > 1) around += 0.5 * work.channels * phases * work.pixels[0] * work.pixels[1];
    // Strips are not packed in bands: what does not fit in L2 goes to L3 and back.
    around += kFarLine * std::max(lines_in * wide * work.bytes - l2_budget(), 0.0) / 64;
  }
  const auto tiles = static_cast<double>(grid.tiles[0] * grid.tiles[1]);
  return ceil_div(work.batch, grid.images) * (tiles * rows_cycles(work, grid) + around);
}

// Calls body with all tiles that generated code may have over the strips of a grid: as large as the caches allow.
template <class Body>
void for_code(const Work& work, Grid grid, Body body) {
  const int d = grid.strip[0] > 1 ? 0 : 1;
  grid.generated = true;
  grid.rows = kGeneratedRows / work.vector * work.vector;
  grid.blocks = blocks_of(work, grid);
  for (int64_t cuts = 1; cuts <= std::min<int64_t>(grid.strip[d], 64); ++cuts) {
    grid.tiles = d == 0 ? Pair{cuts, 1} : Pair{1, cuts};
    body(grid);
  }
}

// Takes the best tiles for the strips of a grid.
inline void choose_tiles(const Work& work, const TileShape& shape, Grid& grid) {
  Grid tried = grid;
  auto attempt = [&](const Pair& tiles) {
    tried.tiles = tiles;
    if (grid.lying && tried.largest() * grid.lanes > work.pixels[0] * work.pixels[1]) return;
    tried.blocks = blocks_of(work, tried);
    tried.cost = cycles(work, tried);
    if (tried.cost < grid.cost) grid = tried;
  };
  if (shape.generated) {
    return for_code(work, tried, [&](Grid code) {
      code.cost = cycles(work, code);
      if (code.cost < grid.cost) grid = code;
    });
  }
  for (int64_t lines = 1; lines <= std::min<int64_t>(shape.lines, grid.strip[0]); ++lines) {
    const int64_t most = std::min<int64_t>(shape.positions / lines, grid.strip[1]);
    for (int64_t width = 1; width <= most; ++width) {
      attempt({ceil_div(grid.strip[0], lines), ceil_div(grid.strip[1], width)});
    }
  }
}

// Keeps the cheapest of the grids that it is shown.
struct Choice {
  const Work& work;
  const TileShape& shape;
  Grid grid;
  void consider(Grid tried) {
    tried.lanes = shape.lanes;
    tried.rows = shape.rows;
    choose_tiles(work, shape, tried);
    if (tried.cost < grid.cost) grid = tried;
  }
};

// Pixels side by side, without a halo.
inline Grid flat_grid(const Work& work, const TileShape& shape, int64_t pixels) {
  Choice choice{work, shape, {}};
  Grid grid;
  grid.runs = grid.aligned = true;
  grid.strip = {1, ceil_div(pixels, shape.lanes)};
  choice.consider(grid);
  return choice.grid;
}

// Those of an image where it lies. The last tile ends where the image does, and so may begin before the one ahead of it
// ends.
inline Grid lying_grid(const Work& work, const TileShape& shape, int64_t pixels) {
  const int64_t line = 64 * shape.lanes / work.bytes, vectors = pixels / shape.lanes;  // a line's elements
  int64_t straddling = 0;  // in as many channels as there are places where one may begin
  for (int64_t c = 0; c < line; ++c) {
    for (int64_t v = 0; v < vectors; ++v) straddling += (c * pixels + v * shape.lanes) % line + shape.lanes > line;
  }
  Choice choice{work, shape, {}};
  Grid grid;
  grid.runs = grid.lying = true;
  grid.strip = {1, ceil_div(pixels, shape.lanes)};
  grid.loads = 1 + static_cast<double>(straddling) / static_cast<double>(line * vectors);
  choice.consider(grid);
  return choice.grid;
}

inline void consider_runs(Choice& choice) {
  const Work& work = choice.work;
  const int64_t lanes = choice.shape.lanes;
  const Pair& halo = work.planes->halo;
  for (const bool aligned : {false, true}) {
    const int64_t pitch = shared_layout(*work.planes, work.width, work.pixels[1], lanes, aligned).pitch;
    Grid grid;
    grid.runs = true;
    grid.aligned = aligned;
    // A load that is not aligned straddles two cache lines: each of 64 bytes does, every second of 32 bytes.
    const double straddling = static_cast<double>(work.bytes) / 64;
    grid.loads = aligned ? 1 + straddling * halo[1] / (halo[1] + 1) : 1 + straddling * (lanes - 1) / lanes;
    grid.strip = {1, ceil_div((work.pixels[0] - 1) * pitch + work.pixels[1], lanes)};
    grid.halo = {0, ceil_div(halo[0] * pitch + halo[1], lanes)};
    choice.consider(grid);
    if (!aligned) continue;
    grid.strip = {work.pixels[0], ceil_div(work.pixels[1], lanes)};
    grid.halo = {halo[0], ceil_div(halo[1], lanes)};
    choice.consider(grid);
  }
}

// All ways to lay strips of images into lanes.
inline std::vector<Grid> strip_grids(int64_t batch, const Pair& pixels, int64_t lanes) {
  std::vector<Grid> grids;
  for (int64_t images = 1; images <= lanes; images *= 2) {
    if (images > 1 && images / 2 >= batch) break;
    for (int64_t down = 1; images * down <= lanes; down *= 2) {
      Grid grid;
      grid.lanes = lanes;
      grid.images = images;
      grid.down = down;
      grid.across = lanes / images / down;
      grid.strip = {ceil_div(pixels[0], down), ceil_div(pixels[1], grid.across)};
      grids.push_back(grid);
    }
  }
  return grids;
}

inline void consider_strips(Choice& choice) {
  const Work& work = choice.work;
  for (Grid& grid : strip_grids(work.batch, work.pixels, choice.shape.lanes)) {
    grid.halo = work.planes->halo;
    choice.consider(grid);
  }
}

constexpr int64_t kBandBudget = 256 * 1024;  // bytes of an L2 that what is packed at a time may take

// Bands of lines in which an image is packed and multiplied, so that its planes are still in L2 when they are read; but
// as lines in the halo are packed twice, bands are several times as high, and fill a tile.
inline int64_t bands_of(const Work& work, const TileShape& shape, int64_t channels) {
  const Layout layout = shared_layout(*work.planes, work.width, work.pixels[1], shape.lanes, true);
  const int64_t line = channels * static_cast<int64_t>(layout.left.size()) * layout.pitch * work.bytes / shape.lanes;
  const int64_t fit = kBandBudget / std::max<int64_t>(line, 1) - work.planes->halo[0];
  const int64_t tile = ceil_div(std::min<int64_t>(shape.positions, 28) * shape.lanes, layout.pitch);
  return ceil_div(work.pixels[0], std::max<int64_t>({fit, 4 * work.planes->halo[0], tile}));
}

inline Grid best_grid(const Work& work, const TileShape& shape, int64_t bands, bool may_run) {
  Choice strips{work, shape, {}};
  consider_strips(strips);
  if (!may_run) return strips.grid;
  Work band = work;
  band.pixels[0] = ceil_div(work.pixels[0], bands);
  Choice runs{band, shape, {}};
  consider_runs(runs);
  runs.grid.cost *= bands;
  runs.grid.bands = bands;
  return runs.grid.cost < strips.grid.cost ? runs.grid : strips.grid;
}

// What a grid was chosen for.
using GridKey = std::vector<int64_t>;

// The best of the grids that `grid_of(kernels)` finds for each width of vectors. To look for it takes a few percent of
// a small layer's time, so that a thread remembers what it found.
template <class T, class GridOf>
Grid best_width(const GridKey& key, bool generated, GridOf grid_of) {
  constexpr size_t kMost = 1024;
  thread_local std::map<GridKey, Grid> found;
  if (const auto known = found.find(key); known != found.end()) return known->second;
  if (found.size() >= kMost) found.clear();
  Grid best;
  const TypeKernels<T>& kernels = type_kernels<T>();
  const int first = generated ? kernels.generated : 0, end = generated ? first + 1 : kernels.widths;
  for (int width = first; width < end; ++width) {
    Grid grid = grid_of(kernels.lanes[width]);
    grid.width = width;
    if (grid.cost < best.cost) best = grid;
  }
  found.emplace(key, best);
  return best;
}

}  // namespace sparsekd::cpu
