// Pixels in the lanes of vectors, so that every column of a packed weight is one aligned vector at a fixed distance.
//
// Strips: an image is cut into `down` x `across` strips, and `images` of them lie side by side. Lane l of position (y, x)
// holds pixel (y, x) of strip l, so that a tap moves whole vectors and a tile never meets a border:
//
//   image of 4 x 4 pixels, 2 x 2 strips, 4 lanes        position (0, 0)   a c i k
//     a b | c d                                         position (0, 1)   b d j l
//     e f | g h        with a 3 x 3 kernel each         position (1, 0)   e g m o
//     ---------        strip has a halo of its          ...
//     i j | k l        neighbours' pixels around it,
//     m n | o p        or zeros (planes.h)
//
// Runs: a vector is as many pixels as it has lanes, one after the other as they lie in a padded plane. A tap moves single
// elements, so that most loads straddle what the cache likes, but nothing is turned around on the way in and out. A kernel
// of 1 x 1 moves nothing and always runs, over the image as it is. A run goes on over the ends of lines:
//
//   image, one channel            its plane (padding 1, 3 x 3 taps)
//     a b c                         0 0 0 0 0
//     d e f                         0 a b c 0      output pixel p = (oh, ow) lives at oh * pitch + ow, and tap (r, s)
//     g h i                         0 d e f 0      reads plane[p + r * pitch + s], whatever p is. The few results
//                                   0 g h i 0      computed between lines (pitch - out_w each) are thrown away.
//                                   0 0 0 0 0
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "planes.h"

namespace sparsekd::cpu {

// Where lanes lie, and how positions are cut into tiles and channels into blocks.
struct Grid {
  bool runs = false;
  int64_t lanes = 1, images = 1, down = 1, across = 1;
  Pair strip{1, 1};  // positions
  Pair tiles{1, 1};  // over a strip; they differ by at most one line or one position
  int64_t begin(int d, int64_t tile) const { return strip[d] * tile / tiles[d]; }
  int64_t count(int d, int64_t tile) const { return begin(d, tile + 1) - begin(d, tile); }
  int64_t largest() const { return ceil_div(strip[0], tiles[0]) * ceil_div(strip[1], tiles[1]); }  // positions
  Pair covered() const { return {down * strip[0], across * strip[1]}; }  // pixels of an image with room in the strips
};

// What decides on a grid.
struct Work {
  int64_t batch;
  Pair pixels;         // of a result
  Pair halo;           // of the planes, in positions
  int64_t phases;      // planes per channel
  int64_t channels, rows;  // of one convolution group: input channels, row groups
  double vectors_per_row;  // non-zero vectors in a row group
  int vector;
  int64_t bytes;       // of a vector of lanes
};

constexpr int64_t kL1Budget = 24 * 1024;  // bytes of a 32 KiB L1 that a block of channels may take
constexpr double kMinBlockWork = 12;      // vectors per row and block that pay for reloading the partial sums

// Blocks of channels for a tile of this size.
inline int64_t blocks_of(const Work& work, int64_t lines, int64_t width) {
  const int64_t footprint = work.phases * (lines + work.halo[0]) * (width + work.halo[1]) * work.bytes;
  const auto least = static_cast<int64_t>(kMinBlockWork * work.channels / std::max(work.vectors_per_row, 1.0));
  const int64_t block = std::max<int64_t>({kL1Budget / footprint, least, 1});
  return std::max<int64_t>(ceil_div(work.channels, block), 1);
}

// Cycles of a whole pass, roughly: two FMAs a cycle, or as many as straddling loads allow, what a column and a row cost
// besides, and what each vector costs on its way in and out: more where it is turned around.
inline double cycles(const Work& work, const Grid& grid) {
  const double lines = static_cast<double>(grid.strip[0]) / grid.tiles[0];
  const double width = static_cast<double>(grid.strip[1]) / grid.tiles[1];
  const double sums = lines * width;
  const bool straddles = grid.runs && work.halo[1] > 0 && work.vector == 1;
  const double column = std::max((straddles ? 0.72 : 0.5) * sums * work.vector, 2.5) + 0.8 + 0.25 * lines;
  const int64_t blocks = blocks_of(work, ceil_div(grid.strip[0], grid.tiles[0]), ceil_div(grid.strip[1], grid.tiles[1]));
  const double row = work.vectors_per_row * column + blocks * (15 + sums * work.vector);
  const double in = work.channels * work.phases * (grid.strip[0] + work.halo[0]) * (grid.strip[1] + work.halo[1]);
  const double out = work.rows * work.vector * grid.strip[0] * grid.strip[1];
  return ceil_div(work.batch, grid.images) *
         (work.rows * grid.tiles[0] * grid.tiles[1] * row + (grid.runs ? in + out : 6 * in + 16 * out));
}

// The best tiles for the strips of a grid.
inline double choose_tiles(const Work& work, const TileShape& shape, Grid& grid) {
  double best = std::numeric_limits<double>::max();
  Grid tried = grid;
  for (int64_t lines = 1; lines <= std::min<int64_t>(shape.lines, grid.strip[0]); ++lines) {
    const int64_t most = std::min<int64_t>(shape.positions / lines, grid.strip[1]);
    // A width that only evens the tiles out is the same as a narrower one.
    for (int64_t width = std::max<int64_t>(most / 2, 1); width <= most; ++width) {
      tried.tiles = {ceil_div(grid.strip[0], lines), ceil_div(grid.strip[1], width)};
      const double cost = cycles(work, tried);
      if (cost < best) {
        best = cost;
        grid.tiles = tried.tiles;
      }
    }
  }
  return best;
}

// For runs a halo is so many vectors beyond the tile.
inline Work work_of_runs(Work work, int64_t lanes) {
  const int64_t pitch = work.pixels[1] + work.halo[1];
  work.halo = {0, ceil_div(work.halo[0] * pitch + work.halo[1], lanes)};
  return work;
}

inline Grid run_grid(const Work& work, const TileShape& shape) {
  Grid grid;
  grid.runs = true;
  grid.lanes = shape.lanes;
  const int64_t pitch = work.pixels[1] + work.halo[1];
  grid.strip = {1, ceil_div((work.pixels[0] - 1) * pitch + work.pixels[1], shape.lanes)};
  choose_tiles(work_of_runs(work, shape.lanes), shape, grid);
  return grid;
}

inline Grid strip_grid(const Work& work, const TileShape& shape) {
  Grid best;
  double least = std::numeric_limits<double>::max();
  for (int64_t images = 1; images <= shape.lanes; images *= 2) {
    if (images > 1 && images / 2 >= work.batch) break;
    for (int64_t down = 1; images * down <= shape.lanes; down *= 2) {
      Grid grid;
      grid.lanes = shape.lanes;
      grid.images = images;
      grid.down = down;
      grid.across = shape.lanes / images / down;
      grid.strip = {ceil_div(work.pixels[0], down), ceil_div(work.pixels[1], grid.across)};
      const double cost = choose_tiles(work, shape, grid);
      if (cost < least) {
        least = cost;
        best = grid;
      }
    }
  }
  return best;
}

inline Grid best_grid(const Work& work, const TileShape& shape, bool may_run) {
  const Grid strips = strip_grid(work, shape);
  if (!may_run) return strips;
  const Grid runs = run_grid(work, shape);
  return cycles(work_of_runs(work, shape.lanes), runs) < cycles(work, strips) ? runs : strips;
}

// Elements between channels: whole cache lines, an odd number of them, or channels would fall on the same cache sets.
template <class T>
int64_t spread(int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(elements, kLine) | 1) * kLine;
}

// Uninitialised memory on a cache line's border.
template <class T>
struct Buffer {
  explicit Buffer(int64_t elements)
      : data(static_cast<T*>(::operator new(std::max<int64_t>(elements, 1) * sizeof(T), std::align_val_t(64)))) {}
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data;
  T* get() const { return data.get(); }
};

// Images as the passes read or write them.
template <class T>
struct Batch {
  T* data;
  int64_t count, channels;
  Pair size;
  bool last;  // channels_last: [H, W, C], else [C, H, W]
  T* image(int64_t n) const { return data + n * channels * size[0] * size[1]; }
};

// Channels begin .. end - 1 of the images from `first` on, in strips: out[c][phase][y][x][lane], `pitch` elements between
// channels. `planes` are those of a strip, `whole` those of all of an image's strips together.
template <class T>
void pack_strips(const Batch<const T>& batch, const Planes& planes, const Planes& whole, const Grid& grid, int64_t first,
                 int64_t begin, int64_t end, int64_t pitch, T* out) {
  const auto gather = type_kernels<T>().gather_lanes;
  std::vector<const T*> from(grid.lanes);
  const Pair size = planes.phases[0].size;
  if (batch.last) {
    const std::vector<T> zeros(batch.channels, T(0));
    for (size_t p = 0; p < planes.phases.size(); ++p) {
      const Plane& plane = planes.phases[p];
      for (int64_t y = 0; y < size[0]; ++y) {
        for (int64_t x = 0; x < size[1]; ++x) {
          for (int64_t lane = 0; lane < grid.lanes; ++lane) {
            const int64_t n = first + lane / (grid.down * grid.across);
            const int64_t row = (lane / grid.across % grid.down * grid.strip[0] + y) * plane.step[0] + plane.origin[0];
            const int64_t column = (lane % grid.across * grid.strip[1] + x) * plane.step[1] + plane.origin[1];
            const bool inside = n < batch.count && row >= 0 && row < batch.size[0] && column >= 0 && column < batch.size[1];
            from[lane] = (inside ? batch.image(n) + (row * batch.size[1] + column) * batch.channels : zeros.data()) + begin;
          }
          gather(from.data(), end - begin, out + begin * pitch + ((p * size[0] + y) * size[1] + x) * grid.lanes, pitch);
        }
      }
    }
    return;
  }
  const int64_t image = whole.channel(), line = whole.pitch();
  Buffer<T> padded(grid.images * image);
  for (int64_t i = std::max<int64_t>(batch.count - first, 0); i < grid.images; ++i) {
    std::fill(padded.get() + i * image, padded.get() + (i + 1) * image, T(0));
  }
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t i = 0; i < std::min(grid.images, batch.count - first); ++i) {
      fill_planes<T>(batch.image(first + i) + c * batch.size[0] * batch.size[1], batch.size, whole, padded.get() + i * image);
    }
    T* to = out + c * pitch;
    for (size_t p = 0; p < planes.phases.size(); ++p) {
      for (int64_t lane = 0; lane < grid.lanes; ++lane) {
        from[lane] = padded.get() + lane / (grid.down * grid.across) * image + p * whole.plane() +
                     lane / grid.across % grid.down * grid.strip[0] * line + lane % grid.across * grid.strip[1];
      }
      for (int64_t y = 0; y < size[0]; ++y, to += size[1] * grid.lanes) {
        gather(from.data(), size[1], to, grid.lanes);
        for (int64_t lane = 0; lane < grid.lanes; ++lane) from[lane] += line;
      }
    }
  }
}

// Pixels begin .. begin + count - 1 of one image for a 1 x 1 kernel, every stride-th pixel of each line and column:
// out[c][pixel], zeros from `count` on to `pitch`.
template <class T>
void pack_flat(const Batch<const T>& batch, const Pair& stride, const Pair& pixels, int64_t n, int64_t first, int64_t count,
               int64_t begin, int64_t end, int64_t pitch, T* out) {
  const T* image = batch.image(n);
  const bool every = stride[0] == 1 && stride[1] == 1;  // then the lines are one
  const int64_t width = every ? pixels[0] * pixels[1] : pixels[1];
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / width, x = (first + done) % width;
    const int64_t run = std::min(count - done, width - x);
    const int64_t at = every ? x : y * stride[0] * batch.size[1] + x * stride[1];
    if (batch.last) {
      type_kernels<T>().transpose(image + at * batch.channels + begin, run, end - begin, stride[1] * batch.channels,
                                  out + begin * pitch + done, pitch);
    } else {
      for (int64_t c = begin; c < end; ++c) {
        const T* line = image + c * batch.size[0] * batch.size[1] + at;
        T* to = out + c * pitch + done;
        if (stride[1] == 1) {
          std::copy(line, line + run, to);
        } else if (stride[1] == 2) {  // so often that the compiler should know it
          for (int64_t i = 0; i < run; ++i) to[i] = line[2 * i];
        } else {
          for (int64_t i = 0; i < run; ++i) to[i] = line[i * stride[1]];
        }
      }
    }
    done += run;
  }
  for (int64_t c = begin; count < pitch && c < end; ++c) std::fill(out + c * pitch + count, out + (c + 1) * pitch, T(0));
}

// Channels begin .. end - 1 of one image in planes: out[c][phase][y][x], zeros from there to `pitch`.
template <class T>
void pack_planes(const Batch<const T>& batch, const Planes& planes, int64_t n, int64_t begin, int64_t end, int64_t pitch,
                 T* out) {
  for (int64_t c = begin; c < end; ++c) {
    fill_planes<T>(batch.image(n) + c * batch.size[0] * batch.size[1], batch.size, planes, out + c * pitch);
    std::fill(out + c * pitch + planes.channel(), out + (c + 1) * pitch, T(0));
  }
}

// Stores one tile of rows from lanes to where its pixels lie.
template <class T>
struct StripStore {
  StripStore(const Batch<T>& batch, const Target& target, const Grid& grid) : batch(batch), target(target), grid(grid) {}

  // The tile of `lines` x `width` positions at (y, x) of the images from `first` on.
  void at(int64_t first, int64_t y, int64_t x, int64_t lines, int64_t width) {
    this->lines = lines;
    this->width = width;
    runs.clear();
    whole.assign(lines, target.step[1] == 1);
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
        if (count < width) whole[h] = false;
      }
    }
  }

  // `rows` rows, whose results are row_of[0 .. rows - 1]; -1 is none.
  void store(const T* from, int64_t pitch, const int64_t* row_of, int64_t rows, bool in_order) {
    const auto scatter = type_kernels<T>().scatter_lanes;
    std::vector<T*> to(grid.lanes);
    if (batch.last) {
      while (rows > 0 && in_order && row_of[rows - 1] < 0) --rows;  // padding ends a convolution group
      if (rows == 0) return;
      aside.resize(grid.lanes * rows);
      for (int64_t position = 0; position < lines * width; ++position) {
        const Run* run = &runs[position / width * grid.lanes];
        const int64_t x = position % width;
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          const bool direct = in_order && x < run[lane].count;
          to[lane] = direct ? pixel_of(run[lane], x) + row_of[0] : aside.data() + lane * rows;
        }
        scatter(from + position * grid.lanes, pitch, rows, to.data());
        if (in_order) continue;
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          if (x >= run[lane].count) continue;
          for (int64_t r = 0; r < rows; ++r) {
            if (row_of[r] >= 0) pixel_of(run[lane], x)[row_of[r]] = aside[lane * rows + r];
          }
        }
      }
      return;
    }
    const int64_t plane = batch.size[0] * batch.size[1];
    aside.resize(grid.lanes * width);
    for (int64_t r = 0; r < rows; ++r) {
      if (row_of[r] < 0) continue;
      for (int64_t h = 0; h < lines; ++h) {
        const Run* run = &runs[h * grid.lanes];
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          const bool direct = whole[h] || (target.step[1] == 1 && run[lane].count == width);
          to[lane] = direct ? batch.data + run[lane].image + row_of[r] * plane + run[lane].pixel : aside.data() + lane * width;
        }
        scatter(from + r * pitch + h * width * grid.lanes, grid.lanes, width, to.data());
        if (whole[h]) continue;
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          if (target.step[1] == 1 && run[lane].count == width) continue;
          T* line = batch.data + run[lane].image + row_of[r] * plane + run[lane].pixel;
          for (int64_t x = 0; x < run[lane].count; ++x) line[x * target.step[1]] = aside[lane * width + x];
        }
      }
    }
  }

 private:
  struct Run {  // of pixels of one lane in one line
    int64_t image, pixel, count;  // elements before the image; first pixel in it
  };
  T* pixel_of(const Run& run, int64_t x) const {
    return batch.data + run.image + (run.pixel + x * target.step[1]) * batch.channels;
  }
  Batch<T> batch;
  Target target;
  Grid grid;
  int64_t lines = 0, width = 0;
  std::vector<Run> runs;     // [lines, lanes]
  std::vector<bool> whole;   // [lines] whether all of a line's runs are as long as the tile is wide
  std::vector<T> aside;
};

}  // namespace sparsekd::cpu
