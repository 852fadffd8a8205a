// 1 x 1 kernels without padding: rows times the pixels of images where they lie, or of all images one after the other.
#pragma once
#include "passes.h"

namespace sparsekd::cpu {

// How the pixels of a 1 x 1 kernel without padding are multiplied: those of an image where they lie, or those of all
// images one after the other.
template <class T>
struct FlatPixels {
  FlatPixels(GridKey key, const Rows<T>& rows, const Batch<const T>& source, const Pair& stride, const Pair& pixels)
      : planes{{Plane{pixels, {1, 1}, {0, 0}}}, {Tap{0, 0, 0}}, {0, 0}, {}} {
    const int64_t count = pixels[0] * pixels[1];
    // Channels a multiple of 1 KiB apart would share their cache sets.
    const bool apart_well = !source.last && stride[0] == 1 && stride[1] == 1 &&
                            count * static_cast<int64_t>(sizeof(T)) % 1024 != 0;
    auto lies_well = [&](int64_t lanes) {
      return apart_well && count % lanes == 0 &&
             reinterpret_cast<uintptr_t>(source.data) % (lanes * sizeof(T)) == 0;
    };
    key.push_back(reinterpret_cast<uintptr_t>(source.data) % 64);
    grid = best_width<T>(key, rows.generated, [&](const LaneKernels<T>& kernels) {
      const TileShape shape = shape_of(rows, kernels);
      const int64_t apart = lies_well(shape.lanes) ? source.count : 1;
      Work work = work_of(rows, apart, pixels, pixels[1], planes, shape.lanes);
      const Grid flat = flat_grid(work, shape, source.count / apart * count);
      if (!apart_well || lies_well(shape.lanes) || rows.generated || count < 2 * shape.lanes) return flat;
      work.batch = source.count;
      const Grid lying = lying_grid(work, shape, count);
      return lying.cost < flat.cost ? lying : flat;
    });
    in_place = grid.lying || lies_well(grid.lanes);
  }

  Planes planes;
  Grid grid;
  bool in_place;
};

// How a convolution's own pixels are multiplied by its rows.
template <class T>
Grid forward_grid(const Conv2dShape& shape, const Rows<T>& rows) {
  const Batch<const T> source{nullptr, shape.batch, shape.in_channels, shape.input, false};
  const GridKey key = grid_key(kForwardGrid, shape, rows, false);
  if (is_flat(shape)) return FlatPixels<T>(key, rows, source, shape.stride, shape.output).grid;
  return planes_grid(key, rows, source, shape.output, input_planes(shape, shape.output));
}

// One pass of a 1 x 1 kernel without padding, over runs of the source's pixels: those of an image where they lie, or
// those of all images one after the other. `pixels` are every stride-th of the source, and every step-th of the result.
template <class T>
void over_pixels(GridKey key, const Batch<const T>& source, const Pair& stride, const Pair& pixels, const Pair& step,
                 std::vector<Pass<T>>& passes, const T* init, const Epilogue<T>& epilogue, const Batch<T>& result) {
  Pass<T>& pass = passes[0];
  const Rows<T>& rows = pass.rows;
  const int64_t count = pixels[0] * pixels[1];
  const FlatPixels<T> flat(std::move(key), rows, source, stride, pixels);
  const Grid& grid = flat.grid;
  const bool in_place = flat.in_place;
  const int64_t lanes = grid.lanes, bytes = lanes * static_cast<int64_t>(sizeof(T));
  const int64_t images = in_place ? 1 : source.count, all = images * count;  // of a grid
  const int64_t widest = grid.largest() * lanes;
  pass.blocks = grid.blocks;
  // What is packed is so in bands of whole tiles.
  const int64_t channel_bytes = std::max<int64_t>(source.channels, 1) * widest * static_cast<int64_t>(sizeof(T));
  const int64_t tiles_in_band =
      in_place ? grid.tiles[1] : std::clamp<int64_t>(kBandBudget / channel_bytes, 1, grid.tiles[1]);
  const int64_t bands = ceil_div(grid.tiles[1], tiles_in_band);
  const int64_t pitch = in_place ? count : spread<T>(tiles_in_band * widest);
  pass.taps = flat.planes.taps;
  if (!locate(pass, pitch, plain_layout(flat.planes), 1)) return;
  auto band_begin = [&](int64_t band) { return grid.begin(1, std::min(band * tiles_in_band, grid.tiles[1])) * lanes; };
  run_units(
      source.count / images * bands, source.channels, in_place ? 0 : source.channels * pitch, passes,
      [&](int64_t unit, int64_t from, int64_t to, T* packed) {
        const int64_t first = band_begin(unit), end = std::min(band_begin(unit + 1), all);
        pack_flat(source, stride, pixels, first, end - first, from, to, pitch, packed);
      },
      [&](const Pass<T>&, int64_t unit, const T* packed, int64_t from, int64_t to) {
        const int64_t n = unit / bands, band = unit % bands;
        const bool every = step[0] == 1 && step[1] == 1;  // then an image's lines are one
        const int64_t width = every ? count : pixels[1];
        RunStore<T> store(rows, result, epilogue, step[1], type_kernels<T>().lanes[grid.width]);
        std::vector<int32_t> cursor;
        Buffer<T> scratch(std::min(to - from, rows.packed_per_group) * rows.vector * widest);
        for_chunks(rows, widest, from, to, [&](int64_t group, int64_t begin, int64_t end) {
          const int64_t channels = group * rows.channels_per_group * pitch;
          const T* input = in_place ? source.image(n) + channels : packed + channels;
          for (int64_t t = band * tiles_in_band; t < std::min((band + 1) * tiles_in_band, grid.tiles[1]); ++t) {
            SpmmTile<T> tile = tile_of<T>(grid, 0, t, init);
            const int64_t begins = grid.begin(1, t) * lanes;
            const int64_t first = in_place ? std::min(begins, all - tile.width * lanes) : begins;
            const int64_t valid = std::min(tile.width * lanes, all - first);
            tile.input = input + first - (in_place ? 0 : band_begin(band));
            store.clear();
            for (int64_t done = 0, run; done < valid; done += run) {
              const int64_t image = (first + done) / count, y = (first + done) % count / width;
              const int64_t x = (first + done) % width;
              run = std::min(valid - done, width - x);
              store.add(done, n + image, y * step[0] * result.size[1] + x * step[1], run);
            }
            // Channels lie far apart in memory, so that nothing foresees where the next tiles read. Several tiles
            // together fetch what as many read after them, each for a part of the channels, so that it is a few lines
            // at a time; at an image's end, of the next one.
            if (in_place) {
              constexpr int64_t kTogether = 256;  // bytes of a channel
              const int64_t together = ceil_div(kTogether, widest / lanes * bytes), set = t / together + 1;
              const bool more = set * together < grid.tiles[1];
              const int64_t start = more ? grid.begin(1, set * together) : 0;
              const int64_t stop = grid.begin(1, std::min((more ? set + 1 : 1) * together, grid.tiles[1]));
              if (more || n + 1 < source.count) {
                tile.ahead = source.image(more ? n : n + 1) + channels + start * lanes;
                tile.ahead_pitch = pitch;
                tile.ahead_lines = static_cast<int>(ceil_div((stop - start) * bytes, 64));
                tile.ahead_part = static_cast<int>(t % together);
                tile.ahead_parts = static_cast<int>(std::min(together, grid.tiles[1] - (set - 1) * together));
              }
            }
            store.aim(tile, scratch.get(), begin, end, lanes, count, false);
            multiply_tile(grid, rows, pass.offsets, pass.blocks, tile, begin, end, scratch.get(), cursor);
            store.store(tile, begin, end);
          }
        });
      });
}

}  // namespace sparsekd::cpu
