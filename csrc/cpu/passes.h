// Runs of the spmm kernel over whole batches of images: what lies where is chosen in lanes.h, moved in packing.h.
#pragma once
#include <vector>

#include "direct.h"
#include "run_store.h"
#include "strip_store.h"
#include "strips.h"

namespace sparsekd::cpu {

// Whether pixels are read where they lie, one for one.
inline bool is_flat(const Conv2dShape& shape) {
  return shape.taps() == 1 && shape.padding[0] == 0 && shape.padding[1] == 0;
}

template <class T>
Rows<T> rows_of(const Conv2dShape& shape, const Pattern& pattern, const T* values) {
  Rows<T> rows;
  rows.groups = pattern.groups;
  rows.packed_per_group = pattern.packed_per_group;
  rows.vector = static_cast<int>(pattern.vector);
  rows.crow = pattern.crow;
  rows.col = pattern.col;
  rows.values = values;
  rows.row_of = pattern.row_of.data();
  rows.in_order = pattern.in_order;
  rows.channels_per_group = shape.in_channels / shape.groups;
  rows.taps = shape.taps();
  return rows;
}

// One kernel run over every image: rows, where their columns are, and which pixels they make.
template <class T>
struct Pass {
  Rows<T> rows;
  std::vector<Tap> taps;
  Target target;
  int64_t blocks = 1;  // of channels
  bool idle = false;  // without entries: its results are zero already
  Offsets offsets;
  const OffsetPlan* plan = nullptr;  // offsets made before, if any
  Tiling* asked = nullptr;           // where the tiling goes if only that is wanted
  const int32_t* places = nullptr;  // of the values that the rows take a copy of
  std::vector<T> values;            // where the rows own a copy in their own order
  std::vector<int32_t> crow, col, own_places;  // likewise
};

// Runs `fill(unit, from channel, to channel, buffer)`, then `multiply(pass, unit, buffer, from row, to row)` for each
// unit (an image, a band of pixels, or several images): units side by side, or one at a time with its rows side by
// side.
template <class T, class Fill, class Multiply>
void run_units(int64_t units, int64_t channels, int64_t elements, const std::vector<Pass<T>>& passes, Fill fill,
               Multiply multiply) {
  if (units >= at::get_num_threads()) {
    at::parallel_for(0, units, 1, [&](int64_t from, int64_t to) {
      Buffer<T> packed(elements);
      for (int64_t unit = from; unit < to; ++unit) {
        if (elements > 0) fill(unit, 0, channels, packed.get());
        for (const Pass<T>& pass : passes) {
          if (!pass.idle) multiply(pass, unit, packed.get(), 0, pass.rows.packed());
        }
      }
    });
    return;
  }
  Buffer<T> packed(elements);
  for (int64_t unit = 0; unit < units; ++unit) {
    if (elements > 0) {
      const int64_t grain = std::max<int64_t>(16384 * channels / elements, 16);
      at::parallel_for(0, channels, grain, [&](int64_t from, int64_t to) { fill(unit, from, to, packed.get()); });
    }
    for (const Pass<T>& pass : passes) {
      if (pass.idle) continue;
      parallel_rows(pass.rows, [&](int64_t begin, int64_t end) { multiply(pass, unit, packed.get(), begin, end); });
    }
  }
}

template <class T>
Work work_of(const Rows<T>& rows, int64_t batch, const Pair& pixels, int64_t width, const Planes& planes,
             int64_t lanes) {
  const double vectors = static_cast<double>(rows.crow[rows.packed()]) / std::max<int64_t>(rows.packed(), 1);
  return {batch, pixels, width, &planes, rows.channels_per_group, rows.packed_per_group, vectors, rows.vector,
          lanes * static_cast<int64_t>(sizeof(T))};
}

// The tiles that rows can be multiplied on: of any size by code.
template <class T>
TileShape shape_of(const Rows<T>& rows, const LaneKernels<T>& kernels) {
  TileShape shape = kernels.tile_shape(rows.vector);
  if (!rows.generated) return shape;
  shape.generated = true;
  shape.positions = shape.lines = std::numeric_limits<int>::max();
  return shape;
}

// Of the only pass the grid knows; of several it was chosen for the one with the most entries.
template <class T>
void choose_blocks(std::vector<Pass<T>>& passes, const Batch<const T>& source, const Pair& pixels, const Planes& planes,
                   const Grid& grid) {
  for (Pass<T>& pass : passes) {
    pass.blocks = grid.blocks;
    if (passes.size() == 1) continue;
    pass.blocks = blocks_of(work_of(pass.rows, source.count, pixels, source.size[1], planes, grid.lanes), grid);
  }
}

// Makes the pass's offsets. False if nothing but the tiling was asked for.
template <class T>
bool locate(Pass<T>& pass, int64_t pitch, const Layout& layout, int64_t step) {
  Tiling tiling = tiling_of(pitch, pass.blocks, pass.taps, layout, step);
  if (pass.asked) {
    *pass.asked = std::move(tiling);
    return false;
  }
  Rows<T>& rows = pass.rows;
  pass.offsets = offsets_of(rows, tiling, pass.plan);
  if (pass.offsets.code) rows.cuts = &pass.offsets.code->cuts();
  const bool made_before = pass.offsets.starts || pass.offsets.code;
  if (pass.plan && pass.plan->order && !made_before) {  // the plan is for others, and so is the values' order
    const int64_t count = rows.crow[rows.packed()];
    pass.values.resize(count * rows.vector);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = pass.plan->order[i];
      TORCH_CHECK_INDEX(entry >= 0 && entry < count, "Expected a plan's order in 0..", count - 1, ", got ", entry);
      std::copy_n(rows.values + i * rows.vector, rows.vector, pass.values.data() + entry * rows.vector);
    }
    rows.values = pass.values.data();
  }
  return true;
}

template <class T>
SpmmTile<T> tile_of(const Grid& grid, int64_t ty, int64_t tx, const T* init) {
  SpmmTile<T> tile{};
  tile.lines = static_cast<int>(grid.count(0, ty));
  tile.width = static_cast<int>(grid.count(1, tx));
  tile.init = init;
  return tile;
}

// All passes over strips of the source. `planes_for(positions, passes)` gives the planes of so many pixels, and the
// passes their taps' places in them.
template <class T, class PlanesFor>
void over_strips(const Grid& grid, const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for,
                 std::vector<Pass<T>>& passes, const T* init, const Epilogue<T>& epilogue, const Batch<T>& result) {
  const Planes planes = planes_for(grid.strip, &passes), whole = planes_for(grid.covered(), nullptr);
  const Layout layout = plain_layout(planes);
  const int64_t pitch = spread<T>(layout.channel() * grid.lanes), line = layout.pitch * grid.lanes;
  choose_blocks(passes, source, pixels, planes, grid);
  bool asked = false;
  for (Pass<T>& pass : passes) asked |= !pass.idle && !locate(pass, pitch, layout, grid.lanes);
  if (asked) return;
  const StripPacker<T> packer(source, planes, whole, grid);
  run_units(
      ceil_div(source.count, grid.images), source.channels, source.channels * pitch, passes,
      [&](int64_t unit, int64_t from, int64_t to, T* packed) {
        packer.pack(unit * grid.images, from, to, pitch, packed);
      },
      [&](const Pass<T>& pass, int64_t unit, const T* packed, int64_t from, int64_t to) {
        const Rows<T>& rows = pass.rows;
        StripStore<T> target(result, pass.target, grid, epilogue);
        std::vector<int32_t> cursor;
        const int64_t elements = grid.largest() * grid.lanes;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * elements);
        for_chunks(rows, elements, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          const T* input = packed + group * rows.channels_per_group * pitch;
          for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
            for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
              const int64_t y = grid.begin(0, ty), x = grid.begin(1, tx);
              SpmmTile<T> tile = tile_of<T>(grid, ty, tx, init);
              tile.input = input + y * line + x * grid.lanes;
              tile.line = line;
              tile.output = scratch.get();
              tile.output_pitch = tile.lines * tile.width * grid.lanes;
              multiply_tile(grid, rows, pass.offsets, pass.blocks, tile, begin, end, scratch.get(), cursor);
              target.at(unit * grid.images, y, x, tile.lines, tile.width);
              target.store(scratch.get(), tile.output_pitch, rows.row_of + begin * rows.vector,
                           (end - begin) * rows.vector, rows.in_order);
            }
          }
          if (!epilogue.any() || target.finishes) return;
          for (int64_t n = unit * grid.images; n < std::min((unit + 1) * grid.images, result.count); ++n) {
            finish_rows(rows, rows.row_of + begin * rows.vector, (end - begin) * rows.vector, epilogue, result, n, 0,
                        result.size[0] * result.size[1]);
          }
        });
      });
}

// All passes over runs of the source's planes, band by band.
template <class T, class PlanesFor>
void over_runs(const Grid& grid, const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for,
               std::vector<Pass<T>>& passes, const T* init, const Epilogue<T>& epilogue, const Batch<T>& result) {
  const int64_t bands = grid.bands;
  const Planes planes = planes_for({ceil_div(pixels[0], bands), pixels[1]}, &passes);
  const Layout layout = shared_layout(planes, source.size[1], pixels[1], grid.lanes, grid.aligned);
  // The last vector may reach past the last pixel.
  const int64_t pitch = spread<T>(layout.channel() + planes.halo[1] + 2 * grid.lanes);
  const int64_t line = layout.pitch, widest = grid.largest() * grid.lanes;
  choose_blocks(passes, source, pixels, planes, grid);
  bool asked = false;
  for (Pass<T>& pass : passes) asked |= !pass.idle && !locate(pass, pitch, layout, 1);
  if (asked) return;
  auto band_begin = [&](int64_t band) { return pixels[0] * band / bands; };
  run_units(
      source.count * bands, source.channels, source.channels * pitch, passes,
      [&](int64_t unit, int64_t from, int64_t to, T* packed) {
        pack_planes(source, planes, layout, unit / bands, band_begin(unit % bands), from, to, pitch, packed);
      },
      [&](const Pass<T>& pass, int64_t unit, const T* packed, int64_t from, int64_t to) {
        const Rows<T>& rows = pass.rows;
        const int64_t n = unit / bands, above = band_begin(unit % bands), below = band_begin(unit % bands + 1);
        Target target = pass.target;  // its lines in this band
        target.size[0] = std::min(target.size[0], below) - above;
        target.origin[0] += above * target.step[0];
        if (target.size[0] <= 0) return;
        const int64_t positions = (target.size[0] - 1) * line + target.size[1];
        const int64_t limit = target.origin[0] * result.size[1] + target.size[0] * result.size[1];
        const bool spills = target.step[0] == 1 && target.size[1] == result.size[1];
        RunStore<T> store(rows, result, epilogue, target.step[1], type_kernels<T>().lanes[grid.width]);
        std::vector<int32_t> cursor;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * widest);
        for_chunks(rows, widest, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          const T* input = packed + group * rows.channels_per_group * pitch;
          for (int64_t tile_index = 0; tile_index < grid.tiles[0] * grid.tiles[1]; ++tile_index) {
            // A vector at the end of a line spills into the next one, which then has to be stored later.
            const int64_t ty = tile_index / grid.tiles[1], across = tile_index % grid.tiles[1];
            const int64_t tx = grid.strip[0] > 1 ? grid.tiles[1] - 1 - across : across;
            SpmmTile<T> tile = tile_of<T>(grid, ty, tx, init);
            const int64_t first = grid.begin(0, ty) * line + grid.begin(1, tx) * grid.lanes;
            const int64_t run = tile.width * grid.lanes;
            // The pixels of this tile that exist, line by line; the same for every row.
            store.clear();
            for (int h = 0; h < tile.lines; ++h) {
              const int64_t from_here = first + h * line, last = std::min(from_here + run, positions);
              for (int64_t y = from_here / line; y * line < last; ++y) {
                const int64_t start = std::max(from_here, y * line), stop = std::min(last, y * line + target.size[1]);
                if (start >= stop) continue;
                store.add(h * run + start - from_here, n,
                          (target.origin[0] + y * target.step[0]) * result.size[1] + target.origin[1] +
                              (start - y * line) * target.step[1],
                          stop - start);
              }
            }
            if (store.empty()) continue;
            tile.input = input + first;
            tile.line = line;
            store.aim(tile, scratch.get(), begin, end, grid.lanes, limit, spills);
            multiply_tile(grid, rows, pass.offsets, pass.blocks, tile, begin, end, scratch.get(), cursor);
            store.store(tile, begin, end);
          }
        });
      });
}

// All that the choice of a grid depends on, besides what `kind` tells apart.
template <class T>
GridKey grid_key(int64_t kind, const Conv2dShape& shape, const Rows<T>& rows, bool last) {
  GridKey key{kind, last, rows.generated, shape.batch, shape.in_channels, shape.out_channels, shape.groups,
              rows.packed_per_group, rows.vector, rows.crow[rows.packed()]};
  for (const Pair& pair : {shape.input, shape.kernel, shape.stride, shape.padding, shape.dilation}) {
    key.insert(key.end(), pair.begin(), pair.end());
  }
  return key;
}
enum GridKind : int64_t { kForwardGrid, kInputGradGrid, kWeightGradGrid };

// How the pixels of some planes are multiplied by rows that are the most work of all passes.
template <class T>
Grid planes_grid(const GridKey& key, const Rows<T>& rows, const Batch<const T>& source, const Pair& pixels,
                 const Planes& planes) {
  return best_width<T>(key, rows.generated, [&](const LaneKernels<T>& kernels) {
    const TileShape shape = shape_of(rows, kernels);
    const Work work = work_of(rows, source.count, pixels, source.size[1], planes, shape.lanes);
    return best_grid(work, shape, bands_of(work, shape, source.channels), !source.last);
  });
}

// The pass that is the most work.
template <class T>
const Pass<T>& main_pass(const std::vector<Pass<T>>& passes) {
  auto entries = [](const Pass<T>& pass) { return pass.rows.crow[pass.rows.packed()]; };
  return *std::max_element(passes.begin(), passes.end(),
                           [&](const Pass<T>& a, const Pass<T>& b) { return entries(a) < entries(b); });
}

template <class T, class PlanesFor>
void run_passes(const GridKey& key, const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for,
                std::vector<Pass<T>>& passes, const T* init, const Epilogue<T>& epilogue, const Batch<T>& result) {
  const Grid grid = planes_grid(key, main_pass(passes).rows, source, pixels, planes_for(pixels, nullptr));
  if (grid.runs) return over_runs(grid, source, pixels, planes_for, passes, init, epilogue, result);
  over_strips(grid, source, pixels, planes_for, passes, init, epilogue, result);
}

}  // namespace sparsekd::cpu
