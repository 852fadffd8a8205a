// Direct convolution with a sparse weight in vector-CSR and dense activations, forward and backward.
//
//   output[n, k, oh, ow]  = bias[k] + sum over non-zeros (c, r, s) of row k of  w * input[n, c, oh*st + r*dil - pad, ...]
//   grad_input            = the same kernel on the transposed pattern, once per phase of the stride
//   grad_values[i]        = sum over images and pixels of  grad_output[n, k, p] * input at the non-zero's offset
//
// No im2col: inputs are copied once into planes of vectors (lanes.h), where a non-zero is one constant distance for all
// pixels, and a register tile of pixels goes through all non-zeros of an output channel (spmm.inc). After SkimCaffe
// (Park et al., ICLR 2017) and Escoin (Chen, 2018). A 1 x 1 kernel reads its input where it lies, if it lies well.
#include "direct.h"

#include <numeric>

#include "../check.h"
#include "spmm.h"

namespace sparsekd::cpu {
namespace {

// One kernel run over every image: rows, where their columns are, and which pixels they make.
template <class T>
struct Pass {
  Rows<T> rows;
  std::vector<int64_t> tap_offsets;
  Target target;
  int blocks = 1;
  std::vector<int32_t> table;
  std::vector<T> values;               // where the rows own a copy in their own order
  std::vector<int32_t> crow, col;      // likewise
};

// Runs `fill(unit, from channel, to channel, buffer)`, then `multiply(pass, unit, buffer, from row, to row)` for each unit
// (an image, a band of it, or several images): units side by side, or one at a time with its rows side by side.
template <class T, class Fill, class Multiply>
void run_units(int64_t units, int64_t channels, int64_t elements, const std::vector<Pass<T>>& passes, Fill fill,
               Multiply multiply) {
  if (units >= at::get_num_threads()) {
    at::parallel_for(0, units, 1, [&](int64_t from, int64_t to) {
      Buffer<T> packed(elements);
      for (int64_t unit = from; unit < to; ++unit) {
        if (elements > 0) fill(unit, 0, channels, packed.get());
        for (const Pass<T>& pass : passes) multiply(pass, unit, packed.get(), 0, pass.rows.packed());
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
      parallel_rows(pass.rows, [&](int64_t begin, int64_t end) { multiply(pass, unit, packed.get(), begin, end); });
    }
  }
}

template <class T>
Work work_of(const Rows<T>& rows, int64_t batch, const Pair& pixels, const Planes& planes, int64_t lanes) {
  const double vectors = static_cast<double>(rows.crow[rows.packed()]) / std::max<int64_t>(rows.packed(), 1);
  return {batch, pixels, planes.halo, static_cast<int64_t>(planes.phases.size()), rows.channels_per_group,
          rows.packed_per_group, vectors, rows.vector, lanes * static_cast<int64_t>(sizeof(T))};
}

// All passes over strips of the source. `planes_for(positions, passes)` gives the planes of so many pixels, and the passes
// their taps' places in them.
template <class T, class PlanesFor>
void over_strips(const Grid& grid, const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for,
                 std::vector<Pass<T>>& passes, const T* init, const Batch<T>& result) {
  const Planes planes = planes_for(grid.strip, &passes), whole = planes_for(grid.covered(), nullptr);
  const int64_t pitch = spread<T>(planes.channel() * grid.lanes), line = planes.pitch() * grid.lanes;
  const int64_t lines = ceil_div(grid.strip[0], grid.tiles[0]), width = ceil_div(grid.strip[1], grid.tiles[1]);
  for (Pass<T>& pass : passes) {
    pass.table = column_table(pass.rows, pitch, pass.tap_offsets, grid.lanes);
    pass.blocks = static_cast<int>(blocks_of(work_of(pass.rows, source.count, pixels, planes, grid.lanes), lines, width));
  }
  run_units(
      ceil_div(source.count, grid.images), source.channels, source.channels * pitch, passes,
      [&](int64_t unit, int64_t from, int64_t to, T* packed) {
        pack_strips(source, planes, whole, grid, unit * grid.images, from, to, pitch, packed);
      },
      [&](const Pass<T>& pass, int64_t unit, const T* packed, int64_t from, int64_t to) {
        const Rows<T>& rows = pass.rows;
        StripStore<T> target(result, pass.target, grid);
        std::vector<int32_t> cursor;
        const int64_t elements = lines * width * grid.lanes;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * elements);
        for_chunks(rows, elements, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          const T* input = packed + group * rows.channels_per_group * pitch;
          for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
            for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
              const int64_t y = grid.begin(0, ty), x = grid.begin(1, tx);
              SpmmTile<T> tile{};
              tile.lines = static_cast<int>(grid.count(0, ty));
              tile.width = static_cast<int>(grid.count(1, tx));
              tile.input = input + y * line + x * grid.lanes;
              tile.line = line;
              tile.table = pass.table.data();
              tile.init = init;
              tile.output = scratch.get();
              tile.output_pitch = tile.lines * tile.width * grid.lanes;
              multiply_tile(rows, pass.blocks, tile, begin, end, scratch.get(), cursor);
              target.at(unit * grid.images, y, x, tile.lines, tile.width);
              target.store(scratch.get(), tile.output_pitch, rows.row_of + begin * rows.vector,
                           (end - begin) * rows.vector, rows.in_order);
            }
          }
        });
      });
}

// All passes over runs of the source's planes.
template <class T, class PlanesFor>
void over_runs(const Grid& grid, const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for,
               std::vector<Pass<T>>& passes, const T* init, const Batch<T>& result) {
  const Planes planes = planes_for(pixels, &passes);
  // The last vector may reach past the last pixel.
  const int64_t pitch = spread<T>(planes.channel() + grid.lanes);
  const int64_t line = planes.pitch(), widest = grid.largest() * grid.lanes;
  for (Pass<T>& pass : passes) {
    pass.table = column_table(pass.rows, pitch, pass.tap_offsets, 1);
    const Work work = work_of(pass.rows, source.count, pixels, planes, grid.lanes);
    pass.blocks = static_cast<int>(blocks_of(work_of_runs(work, grid.lanes), 1, grid.largest()));
  }
  run_units(
      source.count, source.channels, source.channels * pitch, passes,
      [&](int64_t n, int64_t from, int64_t to, T* packed) { pack_planes(source, planes, n, from, to, pitch, packed); },
      [&](const Pass<T>& pass, int64_t n, const T* packed, int64_t from, int64_t to) {
        struct Segment {
          int64_t source, target, count;
        };
        const Rows<T>& rows = pass.rows;
        const Target& target = pass.target;
        const int64_t plane = result.size[0] * result.size[1], step = target.step[1];
        const int64_t positions = (target.size[0] - 1) * line + target.size[1];
        std::vector<Segment> segments;
        std::vector<int32_t> cursor;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * widest);
        for_chunks(rows, widest, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          for (int64_t t = 0; t < grid.tiles[1]; ++t) {
            const int64_t first = grid.begin(1, t) * grid.lanes;
            SpmmTile<T> tile{};
            tile.lines = 1;
            tile.width = static_cast<int>(grid.count(1, t));
            tile.input = packed + group * rows.channels_per_group * pitch + first;
            tile.table = pass.table.data();
            tile.init = init;
            tile.output = scratch.get();
            tile.output_pitch = tile.width * grid.lanes;
            multiply_tile(rows, pass.blocks, tile, begin, end, scratch.get(), cursor);
            // The pixels of this tile that exist, line by line; the same for every row.
            segments.clear();
            const int64_t last = std::min(first + tile.output_pitch, positions);
            for (int64_t y = first / line; y * line < last; ++y) {
              const int64_t start = std::max(first, y * line), stop = std::min(last, y * line + target.size[1]);
              if (start >= stop) continue;
              segments.push_back({start - first,
                                  (target.origin[0] + y * target.step[0]) * result.size[1] + target.origin[1] +
                                      (start - y * line) * step,
                                  stop - start});
            }
            for (int64_t position = 0; position < (end - begin) * rows.vector; ++position) {
              const int64_t row = rows.row_of[begin * rows.vector + position];
              if (row < 0) continue;
              const T* made = scratch.get() + position * tile.output_pitch;
              T* out = result.image(n) + row * plane;
              for (const Segment& s : segments) {
                if (step == 1) {
                  std::copy(made + s.source, made + s.source + s.count, out + s.target);
                } else {
                  for (int64_t x = 0; x < s.count; ++x) out[s.target + x * step] = made[s.source + x];
                }
              }
            }
          }
        });
      });
}

template <class T, class PlanesFor>
void run_passes(const Batch<const T>& source, const Pair& pixels, PlanesFor planes_for, std::vector<Pass<T>>& passes,
                const T* init, const Batch<T>& result) {
  const TileShape shape = type_kernels<T>().tile_shape(passes[0].rows.vector);
  const Work work = work_of(passes[0].rows, source.count, pixels, planes_for({1, 1}, nullptr), shape.lanes);
  const Grid grid = best_grid(work, shape, !source.last);
  if (grid.runs) return over_runs(grid, source, pixels, planes_for, passes, init, result);
  over_strips(grid, source, pixels, planes_for, passes, init, result);
}

constexpr int64_t kBandBudget = 512 * 1024;  // bytes of a band of pixels, of all channels, that is packed at a time

// One pass of a 1 x 1 kernel without padding, over runs of the source's pixels as they lie.
template <class T>
void over_pixels(const Batch<const T>& source, const Pair& stride, const Pair& pixels, std::vector<Pass<T>>& passes,
              const T* init, const Batch<T>& result) {
  Pass<T>& pass = passes[0];
  const Rows<T>& rows = pass.rows;
  const TileShape shape = type_kernels<T>().tile_shape(rows.vector);
  const Planes planes{{Plane{{1, 1}, {1, 1}, {0, 0}}}, {0}, {0, 0}};
  const Work work = work_of(rows, source.count, pixels, planes, shape.lanes);
  const Grid grid = run_grid(work, shape);
  const int64_t lanes = grid.lanes, count = pixels[0] * pixels[1], widest = grid.largest() * lanes;
  pass.blocks = static_cast<int>(blocks_of(work, 1, grid.largest()));
  // Where the input lies well it is read there. The last tile then begins earlier, so as not to read past the end; what
  // it shares with the one before comes out the same. Channels a multiple of 1 KiB apart share their cache sets.
  const bool in_place = !source.last && stride[0] == 1 && stride[1] == 1 && count >= widest &&
                        count * static_cast<int64_t>(sizeof(T)) % 1024 != 0;
  // Else in bands of whole tiles.
  const int64_t tiles_in_band =
      in_place ? grid.tiles[1]
               : std::clamp<int64_t>(kBandBudget / (std::max<int64_t>(source.channels, 1) * widest * static_cast<int64_t>(sizeof(T))), 1, grid.tiles[1]);
  const int64_t bands = ceil_div(grid.tiles[1], tiles_in_band);
  const int64_t pitch = in_place ? count : spread<T>(tiles_in_band * widest);
  pass.table = column_table(rows, pitch, {0}, lanes);
  auto band_begin = [&](int64_t band) { return grid.begin(1, std::min(band * tiles_in_band, grid.tiles[1])) * lanes; };
  run_units(
      source.count * bands, source.channels, in_place ? 0 : source.channels * pitch, passes,
      [&](int64_t unit, int64_t from, int64_t to, T* packed) {
        const int64_t first = band_begin(unit % bands), end = std::min(band_begin(unit % bands + 1), count);
        pack_flat(source, stride, pixels, unit / bands, first, end - first, from, to, pitch, packed);
      },
      [&](const Pass<T>&, int64_t unit, const T* packed, int64_t from, int64_t to) {
        const int64_t n = unit / bands, band = unit % bands, first = band_begin(band);
        T* image = result.image(n);
        std::vector<int32_t> cursor;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * widest);
        for_chunks(rows, widest, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          const int64_t channels = group * rows.channels_per_group * pitch;
          const T* input = in_place ? source.image(n) + channels : packed + channels;
          const int64_t* row_of = rows.row_of + begin * rows.vector;
          for (int64_t t = band * tiles_in_band; t < std::min((band + 1) * tiles_in_band, grid.tiles[1]); ++t) {
            SpmmTile<T> tile{};
            tile.lines = 1;
            tile.width = static_cast<int>(grid.count(1, t));
            const int64_t elements = tile.width * lanes;
            int64_t pixel = grid.begin(1, t) * lanes;
            if (in_place) pixel = std::min(pixel, count - elements);
            const int64_t valid = std::min(elements, count - pixel);
            tile.input = input + pixel - (in_place ? 0 : first);
            tile.table = pass.table.data();
            tile.init = init;
            // Straight to the result, if the rows lie there as they are here.
            const bool direct = !result.last && valid == elements && rows.in_order && row_of[(end - begin) * rows.vector - 1] >= 0;
            tile.output = direct ? image + row_of[0] * count + pixel : scratch.get();
            tile.output_pitch = direct ? count : elements;
            multiply_tile(rows, pass.blocks, tile, begin, end, scratch.get(), cursor);
            if (direct) continue;
            int64_t made = (end - begin) * rows.vector;
            if (result.last && rows.in_order) {
              while (made > 0 && row_of[made - 1] < 0) --made;  // padding ends a convolution group
              type_kernels<T>().transpose(scratch.get(), made, valid, elements,
                                          image + pixel * result.channels + row_of[0], result.channels);
              continue;
            }
            for (int64_t r = 0; r < made; ++r) {
              if (row_of[r] < 0) continue;
              const T* line = scratch.get() + r * elements;
              if (!result.last) {
                std::copy(line, line + valid, image + row_of[r] * count + pixel);
              } else {
                for (int64_t i = 0; i < valid; ++i) image[(pixel + i) * result.channels + row_of[r]] = line[i];
              }
            }
          }
        });
      });
}

bool is_flat(const Conv2dShape& shape) {
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

template <class T>
void forward(const Conv2dShape& shape, const Pattern& pattern, const T* input, const T* values, const T* bias,
             bool channels_last, T* output) {
  std::vector<Pass<T>> passes(1);
  Pass<T>& pass = passes[0];
  pass.rows = rows_of(shape, pattern, values);
  pass.target = {shape.output, {1, 1}, {0, 0}};
  std::vector<T> init;
  if (bias != nullptr) {
    for (const int64_t row : pattern.row_of) init.push_back(row < 0 ? T(0) : bias[row]);
  }
  const Batch<const T> source{input, shape.batch, shape.in_channels, shape.input, channels_last};
  const Batch<T> result{output, shape.batch, shape.out_channels, shape.output, channels_last};
  const T* start = bias ? init.data() : nullptr;
  if (is_flat(shape)) return over_pixels(source, shape.stride, shape.output, passes, start, result);
  run_passes<T>(
      source, shape.output,
      [&](const Pair& positions, std::vector<Pass<T>>* of) {
        Planes planes = input_planes(shape, positions);
        if (of) (*of)[0].tap_offsets = planes.tap_offsets;
        return planes;
      },
      passes, start, result);
}

template <class T>
void input_grad(const Conv2dShape& shape, const Transposed& transposed, const T* grad_output, const T* values,
                bool channels_last, T* grad_input) {
  std::vector<int64_t> row_of(shape.in_channels);
  std::iota(row_of.begin(), row_of.end(), 0);
  Rows<T> rows;
  rows.groups = shape.groups;
  rows.packed_per_group = shape.in_channels / shape.groups;
  rows.channels_per_group = shape.out_channels / shape.groups;
  rows.taps = shape.taps();
  rows.row_of = row_of.data();
  rows.name = "the transpose plan's columns";
  std::vector<InputGradPhase> phases;
  input_grad_planes(shape, {1, 1}, phases);
  std::vector<Pass<T>> passes;
  for (const InputGradPhase& phase : phases) {
    Pass<T>& pass = passes.emplace_back();
    pass.rows = rows;
    pass.target = phase.target;
    const auto columns = static_cast<uint32_t>(rows.columns());
    const bool all = *std::min_element(phase.tap_offsets.begin(), phase.tap_offsets.end()) >= 0;  // taps take part
    if (!all) pass.crow.push_back(0);
    pass.values.reserve(transposed.count / phases.size());
    for (int64_t channel = 0; channel < shape.in_channels; ++channel) {
      for (int64_t i = transposed.crow[channel]; i < transposed.crow[channel + 1]; ++i) {
        if (!all) {
          const auto column = static_cast<uint32_t>(transposed.col[i]);
          if (column >= columns) outside_error(transposed.col, transposed.count, columns, rows.name);
          if (phase.tap_offsets[column % rows.taps] < 0) continue;  // this tap reaches another phase
          pass.col.push_back(transposed.col[i]);
        }
        pass.values.push_back(values[transposed.place[i]]);
      }
      if (!all) pass.crow.push_back(static_cast<int32_t>(pass.col.size()));
    }
    pass.rows.crow = all ? transposed.crow : pass.crow.data();
    pass.rows.col = all ? transposed.col : pass.col.data();
    pass.rows.values = pass.values.data();
  }
  const Batch<const T> source{grad_output, shape.batch, shape.out_channels, shape.output, channels_last};
  const Batch<T> result{grad_input, shape.batch, shape.in_channels, shape.input, channels_last};
  if (is_flat(shape) && shape.stride == Pair{1, 1}) {
    return over_pixels<T>(source, {1, 1}, shape.input, passes, nullptr, result);
  }
  Pair pixels;  // of the largest phase
  for (int d = 0; d < 2; ++d) pixels[d] = ceil_div(shape.input[d], shape.stride[d]);
  run_passes<T>(
      source, pixels,
      [&](const Pair& positions, std::vector<Pass<T>>* of) {
        phases.clear();
        Planes planes = input_grad_planes(shape, positions, phases);
        for (size_t i = 0; of && i < phases.size(); ++i) (*of)[i].tap_offsets = phases[i].tap_offsets;
        return planes;
      },
      passes, nullptr, result);
}

constexpr int64_t kImagesScratch = 64 << 20;  // bytes of planes that the weight gradient holds at a time

template <class T>
void weight_grad(const Conv2dShape& shape, const Pattern& pattern, const T* input, const T* grad_output,
                 bool channels_last, T* grad_values) {
  const Rows<T> rows = rows_of<T>(shape, pattern, nullptr);
  std::fill(grad_values, grad_values + pattern.n_vectors * pattern.vector, T(0));
  if (shape.batch == 0 || shape.output[0] * shape.output[1] == 0) return;  // linear has no pixels for no rows
  const bool flat = is_flat(shape);
  const TileShape tile_shape = type_kernels<T>().grad_tile_shape();
  const Work work = work_of(rows, shape.batch, shape.output, input_planes(shape, {1, 1}), tile_shape.lanes);
  const Grid grid = flat ? run_grid(work, tile_shape) : best_grid(work, tile_shape, !channels_last);
  const int64_t lanes = grid.lanes;
  // Of a strip and of all of an image's, or of the image. Gradients have the same positions without a halo.
  const Planes planes = input_planes(shape, grid.runs ? shape.output : grid.strip);
  const Planes whole = input_planes(shape, grid.covered());
  const Pair lines = grid.runs ? Pair{shape.output[0], planes.pitch()} : grid.strip;
  const Planes grad_planes{{Plane{lines, {1, 1}, {0, 0}}}, {0}, {0, 0}};
  const Planes grad_whole{{Plane{grid.covered(), {1, 1}, {0, 0}}}, {0}, {0, 0}};
  const int64_t step = grid.runs ? 1 : lanes;  // elements from one position of the planes to the next
  // The last vector of a run may reach past the last pixel.
  const int64_t pitch = spread<T>(planes.channel() * step + (grid.runs ? lanes : 0));
  const int64_t grad_pitch = spread<T>(grid.runs ? grad_planes.channel() + lanes : grad_planes.channel() * lanes);
  const std::vector<int32_t> table = column_table(rows, pitch, planes.tap_offsets, step);
  const int64_t blocks = blocks_of(grid.runs ? work_of_runs(work, lanes) : work, ceil_div(grid.strip[0], grid.tiles[0]),
                                   ceil_div(grid.strip[1], grid.tiles[1]));

  const Batch<const T> images{input, shape.batch, shape.in_channels, shape.input, channels_last};
  const Batch<const T> grads{grad_output, shape.batch, shape.out_channels, shape.output, channels_last};
  const int64_t image_elements = shape.in_channels * pitch, grad_elements = shape.out_channels * grad_pitch;
  const int64_t units = ceil_div(shape.batch, grid.images);
  const int64_t bytes = (image_elements + grad_elements) * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::clamp<int64_t>(kImagesScratch / std::max<int64_t>(bytes, 1), 1, std::max<int64_t>(units, 1));
  Buffer<T> packed(most * image_elements), packed_grads(most * grad_elements);
  Buffer<T> zeros(grad_pitch);
  std::fill(zeros.get(), zeros.get() + grad_pitch, T(0));
  auto pack = [&](const Batch<const T>& from, const Planes& strips, const Planes& all, const Pair& stride, int64_t unit,
                  int64_t begin, int64_t end, int64_t apart, T* to) {
    if (flat) {
      const int64_t count = shape.output[0] * shape.output[1];
      pack_flat(from, stride, shape.output, unit, 0, count, begin, end, apart, to);
    } else if (grid.runs) {
      pack_planes(from, strips, unit, begin, end, apart, to);
    } else {
      pack_strips(from, strips, all, grid, unit * grid.images, begin, end, apart, to);
    }
  };
  for (int64_t first = 0; first < units; first += most) {
    const int64_t count = std::min(most, units - first);
    at::parallel_for(0, count * 2, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t unit = first + i / 2;
        if (i % 2 == 0) {
          pack(images, planes, whole, shape.stride, unit, 0, shape.in_channels, pitch, packed.get() + i / 2 * image_elements);
        } else {
          pack(grads, grad_planes, grad_whole, {1, 1}, unit, 0, shape.out_channels, grad_pitch,
               packed_grads.get() + i / 2 * grad_elements);
        }
      }
    });
    // Each thread sums its own rows over images and tiles in a fixed order: the result does not depend on threads.
    parallel_rows(rows, [&](int64_t from, int64_t to) {
      std::vector<int32_t> cursor;
      for (int64_t unit = 0; unit < count; ++unit) {
        for_chunks(rows, grid.largest() * lanes, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
            for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
              const int64_t y = grid.begin(0, ty), x = grid.begin(1, tx);
              cursor.assign(rows.crow + begin, rows.crow + end);
              SddmmTile<T> tile{};
              tile.lines = static_cast<int>(grid.count(0, ty));
              tile.width = static_cast<int>(grid.count(1, tx));
              tile.line = planes.pitch() * lanes;  // a run has one line
              tile.input = packed.get() + unit * image_elements + group * rows.channels_per_group * pitch + y * tile.line +
                           x * lanes;
              tile.table = table.data();
              tile.crow = rows.crow + begin;
              tile.col = rows.col;
              tile.vector = rows.vector;
              tile.cursor = cursor.data();
              tile.grad = packed_grads.get() + unit * grad_elements + (y * grid.strip[1] + x) * lanes;
              tile.grad_line = grid.strip[1] * lanes;
              tile.grad_pitch = grad_pitch;
              tile.row_of = rows.row_of + begin * rows.vector;
              tile.zeros = zeros.get();
              tile.grad_values = grad_values;
              for (int64_t block = 0; block < blocks; ++block) {
                tile.limit = block_limit(rows, static_cast<int>(block), static_cast<int>(blocks));
                type_kernels<T>().sddmm(tile, 0, end - begin);
              }
              check_cursors(rows, cursor.data(), begin, end);
            }
          }
        });
      }
    });
  }
}

}  // namespace

void direct_forward(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                    const at::Tensor& values, const at::Tensor& bias, bool channels_last, at::Tensor& output) {
  if (output.numel() == 0) return;
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    forward(shape, pattern, input.const_data_ptr<T>(), values.const_data_ptr<T>(),
            bias.defined() ? bias.const_data_ptr<T>() : nullptr, channels_last, output.mutable_data_ptr<T>());
  });
}

void direct_input_grad(const Conv2dShape& shape, const Transposed& transposed, const at::Tensor& grad_output,
                       const at::Tensor& values, bool channels_last, at::Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  dispatch(grad_output, [&](auto zero) {
    using T = decltype(zero);
    input_grad(shape, transposed, grad_output.const_data_ptr<T>(), values.const_data_ptr<T>(), channels_last,
               grad_input.mutable_data_ptr<T>());
  });
}

void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, bool channels_last, at::Tensor& grad_values) {
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    weight_grad(shape, pattern, input.const_data_ptr<T>(), grad_output.const_data_ptr<T>(), channels_last,
                grad_values.mutable_data_ptr<T>());
  });
}

}  // namespace sparsekd::cpu
