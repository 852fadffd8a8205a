// Results of a tile of strips (lanes.h) on their way to where they belong.
#pragma once
#include <vector>

#include "packing.h"

namespace sparsekd::cpu {

// Stores one tile of rows from lanes to where its pixels lie.
template <class T>
struct StripStore {
  StripStore(const Batch<T>& batch, const Target& target, const Grid& grid, const Epilogue<T>& epilogue)
      : batch(batch), target(target), grid(grid), kernels(type_kernels<T>().lanes[grid.width]) {
    const Pair covered = grid.covered();
    const bool exact = target.size == batch.size && target.step == Pair{1, 1} && covered == batch.size &&
                       batch.count % grid.images == 0;
    finishes = kernels.finishes && exact && !batch.last && epilogue.any() && epilogue.clamps();
    if (finishes) epilogue.clamp(finish, batch.data, batch.data);
    finish.result = batch.data;
  }

  // Whether results are finished where they are stored.
  bool finishes = false;

  // The tile of `lines` x `width` positions at (y, x) of the images from `first` on.
  void at(int64_t first, int64_t y, int64_t x, int64_t lines, int64_t width) {
    this->first = first;
    this->lines = lines;
    this->width = width;
    runs.clear();
    for (int64_t h = 0; h < lines; ++h) {
      for (int64_t lane = 0; lane < grid.lanes; ++lane) {
        const int64_t n = first + lane / (grid.down * grid.across);
        const int64_t row = lane / grid.across % grid.down * grid.strip[0] + y + h;
        const int64_t column = lane % grid.across * grid.strip[1] + x;
        const bool exists = n < batch.count && row < target.size[0];
        const int64_t count = exists ? std::clamp<int64_t>(target.size[1] - column, 0, width) : 0;
        const int64_t pixel = (target.origin[0] + row * target.step[0]) * batch.size[1] + target.origin[1] +
                              column * target.step[1];
        runs.push_back({exists ? n * batch.channels * batch.size[0] * batch.size[1] : 0, pixel, count});
      }
    }
    if (!batch.last && (finishes || !index_pixels(y, x))) aim();
  }

  // `rows` rows, whose results are row_of[0 .. rows - 1]; -1 is none.
  void store(const T* from, int64_t pitch, const int64_t* row_of, int64_t rows, bool in_order) {
    if (batch.last) return store_last(from, pitch, row_of, rows, in_order);
    const int64_t plane = batch.size[0] * batch.size[1];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_of[r];
      if (row < 0) continue;
      if (!index.empty()) {
        kernels.select(from + r * pitch, lines * width * grid.lanes, index.data(), plane,
                       batch.image(first) + row * plane);
        continue;
      }
      for (int64_t h = 0; h < lines; ++h) {
        kernels.scatter_lanes(from + r * pitch + h * width * grid.lanes, grid.lanes, width, to.data() + h * grid.lanes,
                              stride.data() + h * grid.lanes, row, finishes ? &finish : nullptr);
        for (const Part& part : parts) {
          if (part.line != h) continue;
          T* const line = part.to + row * plane;
          store_apart(part.from, part.count, target.step[1], line);
        }
      }
    }
  }

 private:
  struct Run {  // of pixels of one lane in one line
    int64_t image, pixel, count;  // elements before the image; first pixel in it
  };
  struct Part {  // of a run that is shorter than the tile is wide, or has gaps
    int64_t line;
    const T* from;
    T* to;  // in row 0
    int64_t count;
  };

  // Of a small map that is one tile: where each pixel is among the tile's elements.
  bool index_pixels(int64_t y, int64_t x) {
    index.clear();
    const bool one = y == 0 && x == 0 && lines == grid.strip[0] && width == grid.strip[1] && grid.images == 1;
    if (!one || !kernels.select || lines * width * grid.lanes > kSmallMap) return false;
    if (target.size != batch.size || target.origin != Pair{0, 0} || target.step != Pair{1, 1}) return false;
    for (int64_t row = 0; row < batch.size[0]; ++row) {
      for (int64_t column = 0; column < batch.size[1]; ++column) {
        const int64_t lane = row / lines * grid.across + column / width;
        index.push_back(static_cast<int32_t>((row % lines * width + column % width) * grid.lanes + lane));
      }
    }
    return true;
  }

  void aim() {
    to.clear();
    stride.clear();
    parts.clear();
    aside.resize(grid.lanes * width);
    for (int64_t i = 0; i < lines * grid.lanes; ++i) {
      const Run& run = runs[i];
      const bool direct = target.step[1] == 1 && run.count == width;
      T* const out = batch.data + run.image + run.pixel;
      to.push_back(direct ? out : aside.data() + i % grid.lanes * width);
      stride.push_back(direct ? batch.size[0] * batch.size[1] : 0);
      if (!direct && run.count > 0) parts.push_back({i / grid.lanes, to.back(), out, run.count});
    }
  }

  void store_last(const T* from, int64_t pitch, const int64_t* row_of, int64_t rows, bool in_order) {
    while (rows > 0 && in_order && row_of[rows - 1] < 0) --rows;  // padding ends a convolution group
    if (rows == 0) return;
    aside.resize(grid.lanes * rows);
    to.resize(grid.lanes);
    stride.assign(grid.lanes, 0);
    for (int64_t position = 0; position < lines * width; ++position) {
      const Run* run = &runs[position / width * grid.lanes];
      const int64_t x = position % width;
      for (int64_t lane = 0; lane < grid.lanes; ++lane) {
        const bool direct = in_order && x < run[lane].count;
        to[lane] = direct ? pixel_of(run[lane], x) + row_of[0] : aside.data() + lane * rows;
      }
      kernels.scatter_lanes(from + position * grid.lanes, pitch, rows, to.data(), stride.data(), 0, nullptr);
      if (in_order) continue;
      for (int64_t lane = 0; lane < grid.lanes; ++lane) {
        if (x >= run[lane].count) continue;
        for (int64_t r = 0; r < rows; ++r) {
          if (row_of[r] >= 0) pixel_of(run[lane], x)[row_of[r]] = aside[lane * rows + r];
        }
      }
    }
  }

  T* pixel_of(const Run& run, int64_t x) const {
    return batch.data + run.image + (run.pixel + x * target.step[1]) * batch.channels;
  }
  Batch<T> batch;
  Target target;
  Grid grid;
  const LaneKernels<T>& kernels;
  LaneFinish<T> finish{};
  int64_t first = 0, lines = 0, width = 0;
  std::vector<Run> runs;       // [lines, lanes]
  std::vector<int32_t> index;  // [pixels], if the map is small
  std::vector<T*> to;          // [lines, lanes] where a run goes in row 0: straight, or aside
  std::vector<int64_t> stride; // [lines, lanes] from row to row
  std::vector<Part> parts;
  std::vector<T> aside;
};

}  // namespace sparsekd::cpu
