// Drives the spmm and sddmm kernels over planes: tiles of pixels, blocks of channels, threads over rows or images.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "planes.h"

namespace sparsekd::cpu {

// Rows of a packed weight with stretched columns. Row groups of one convolution group share its planes.
template <class T>
struct Rows {
  int64_t groups = 1;            // convolution groups
  int64_t packed_per_group = 0;  // row groups in each
  int vector = 1;
  std::vector<int32_t> crow;     // [groups * packed_per_group + 1]
  std::vector<int32_t> offsets;  // [n_vectors]
  const T* values = nullptr;     // [n_vectors, vector]
  const int64_t* row_of = nullptr;  // [groups * packed_per_group * vector] result row, -1 for padding
  bool in_order = true;             // whether row_of rises by one within a convolution group
  int64_t channels_per_group = 0;   // planes' channels that one convolution group reads

  int64_t packed() const { return groups * packed_per_group; }
};

// How one call is cut up.
struct Tiling {
  int64_t positions;   // flat pixels, (height - 1) * pitch + width
  int64_t tiles;
  int64_t vectors;     // SIMD vectors over all tiles
  int lanes;
  int blocks;          // of channels
  std::vector<int32_t> bounds;  // [packed, blocks + 1]

  // Tiles differ by at most one vector.
  int64_t begin(int64_t tile) const { return vectors * tile / tiles * lanes; }
  int width(int64_t tile) const { return static_cast<int>(vectors * (tile + 1) / tiles - vectors * tile / tiles); }
};

constexpr int64_t kL1Budget = 24 * 1024;  // bytes of a 32 KiB L1 that a block of channels may take
constexpr int64_t kMinBlockWork = 12;     // non-zeros per row and block that pay for reloading the partial sums

// First of offsets[begin .. end) that is not below the limit, for rising offsets. Without a branch: whether a non-zero
// lies before or after is a coin toss, and a call has thousands of these searches.
inline int32_t first_not_below(const int32_t* offsets, int32_t begin, int32_t end, int64_t limit) {
  int32_t count = end - begin;
  const int32_t* at = offsets + begin;
  while (count > 1) {
    const int32_t half = count / 2;
    at += at[half - 1] < limit ? half : 0;
    count -= half;
  }
  return static_cast<int32_t>(at - offsets) + (count == 1 && *at < limit ? 1 : 0);
}

template <class T>
Tiling make_tiling(const Rows<T>& rows, const Planes& planes, const Pair& size, int64_t reach, TileShape shape) {
  Tiling tiling;
  tiling.lanes = shape.lanes;
  tiling.positions = (size[0] - 1) * planes.pitch() + size[1];
  tiling.vectors = ceil_div(tiling.positions, shape.lanes);
  tiling.tiles = ceil_div(tiling.vectors, shape.max_vectors);

  const int64_t width = ceil_div(tiling.vectors, tiling.tiles) * shape.lanes;
  const int64_t footprint =
      static_cast<int64_t>(sizeof(T)) * std::min((width + reach) * static_cast<int64_t>(planes.phases.size()),
                                                 planes.channel());
  const int64_t per_block = std::max<int64_t>(kL1Budget / footprint, 1);
  const int64_t per_row = static_cast<int64_t>(rows.offsets.size()) / std::max<int64_t>(rows.packed(), 1);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(rows.channels_per_group, per_block), 1,
                                             std::max<int64_t>(per_row / kMinBlockWork, 1));
  tiling.blocks = static_cast<int>(blocks);
  tiling.bounds.resize(rows.packed() * (blocks + 1));
  const int64_t block_channels = ceil_div(rows.channels_per_group, blocks);
  for (int64_t row = 0; row < rows.packed(); ++row) {
    int32_t* bounds = tiling.bounds.data() + row * (blocks + 1);
    bounds[0] = rows.crow[row];
    for (int64_t block = 1; block < blocks; ++block) {
      // Searching on from the last boundary keeps bounds rising, so columns in any order are each taken once.
      const int64_t limit = block * block_channels * planes.channel();
      bounds[block] = first_not_below(rows.offsets.data(), bounds[block - 1], rows.crow[row + 1], limit);
    }
    bounds[blocks] = rows.crow[row + 1];
  }
  return tiling;
}

// Where the rows of a result go.
template <class T>
struct Result {
  T* data;              // first element of the image
  int64_t channel;      // elements between rows (channels); 1 in channels_last
  int64_t pixel;        // elements between pixels; 1 unless in channels_last
  int64_t width;        // pixels in a line
  Target target;
};

// Runs row groups begin .. end - 1, which lie in one convolution group, over all tiles of one image.
template <class T>
void spmm_rows_of_group(const Rows<T>& rows, const Tiling& tiling, const T* planes, int64_t pitch, const T* init,
                        const Result<T>& result, int64_t begin, int64_t end, T* scratch) {
  struct Segment {
    int64_t source, target, count;
  };
  std::vector<Segment> segments;
  const Target& target = result.target;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t first = tiling.begin(t);
    const int64_t width = static_cast<int64_t>(tiling.width(t)) * tiling.lanes;
    SpmmTile<T> tile;
    tile.input = planes + first;
    tile.offsets = rows.offsets.data();
    tile.values = rows.values;
    tile.bounds = tiling.bounds.data();
    tile.blocks = tiling.blocks;
    tile.vector = rows.vector;
    tile.init = init;
    tile.output = scratch;
    tile.pitch = width;
    tile.vectors = tiling.width(t);
    type_kernels<T>().spmm(tile, begin, end);

    // The pixels of this tile that exist, line by line; the same for every row.
    segments.clear();
    const int64_t last = std::min(first + width, tiling.positions);
    for (int64_t y = first / pitch; y * pitch < last; ++y) {
      const int64_t from = std::max(first, y * pitch), to = std::min(last, y * pitch + target.size[1]);
      if (from >= to) continue;
      segments.push_back({from - first,
                          (target.origin[0] + y * target.step[0]) * result.width + target.origin[1] +
                              (from - y * pitch) * target.step[1],
                          to - from});
    }
    const int64_t first_position = begin * rows.vector, last_position = end * rows.vector;
    if (result.channel == 1 && rows.in_order) {  // channels side by side
      int64_t count = last_position - first_position;
      while (count > 0 && rows.row_of[first_position + count - 1] < 0) --count;  // padding ends a convolution group
      T* out = result.data + rows.row_of[first_position];
      for (const Segment& s : segments) {
        type_kernels<T>().transpose(scratch + s.source, count, s.count, width, out + s.target * result.pixel,
                                    target.step[1] * result.pixel);
      }
      continue;
    }
    for (int64_t position = first_position; position < last_position; ++position) {
      const int64_t row = rows.row_of[position];
      if (row < 0) continue;
      const T* source = scratch + (position - first_position) * width;
      T* out = result.data + row * result.channel;
      const int64_t step = target.step[1] * result.pixel;
      for (const Segment& s : segments) {
        if (step == 1) {
          std::copy(source + s.source, source + s.source + s.count, out + s.target);
        } else {
          for (int64_t x = 0; x < s.count; ++x) out[s.target * result.pixel + x * step] = source[s.source + x];
        }
      }
    }
  }
}

// Row groups begin .. end - 1 of any convolution groups.
template <class T>
void spmm_row_range(const Rows<T>& rows, const Tiling& tiling, const Planes& planes, const T* packed, const T* init,
                    const Result<T>& result, int64_t begin, int64_t end) {
  // Rows go through the tiles in chunks whose partial sums stay in L2.
  const int64_t widest = ceil_div(tiling.vectors, tiling.tiles) * tiling.lanes;
  const int64_t chunk = std::max<int64_t>(256 * 1024 / (widest * rows.vector * static_cast<int64_t>(sizeof(T))), 1);
  const int64_t most = std::min({chunk, end - begin, rows.packed_per_group});
  std::unique_ptr<T[]> scratch(new T[most * rows.vector * widest]);
  while (begin < end) {
    const int64_t group = begin / rows.packed_per_group;
    const int64_t stop = std::min({end, (group + 1) * rows.packed_per_group, begin + most});
    spmm_rows_of_group(rows, tiling, packed + group * rows.channels_per_group * planes.channel(), planes.pitch(), init,
                       result, begin, stop, scratch.get());
    begin = stop;
  }
}

// Calls body(begin, end) on all threads with row groups of about equal work.
template <class T, class Body>
void parallel_rows(const Rows<T>& rows, Body body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), rows.packed());
  if (threads <= 1) return body(0, rows.packed());
  constexpr int64_t kRowCost = 4;  // what a row costs besides its non-zeros, in non-zeros
  const int64_t work = rows.crow[rows.packed()] + kRowCost * rows.packed();
  std::vector<int64_t> starts(threads + 1, rows.packed());
  starts[0] = 0;
  for (int64_t thread = 1, row = 0; thread < threads; ++thread) {
    while (row < rows.packed() && rows.crow[row] + kRowCost * row < work * thread / threads) ++row;
    starts[thread] = row;
  }
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t thread = from; thread < to; ++thread) {
      if (starts[thread] < starts[thread + 1]) body(starts[thread], starts[thread + 1]);
    }
  });
}

// A buffer of packed planes that ends in zeros: the last tile reads past its last pixel.
template <class T>
struct PlaneBuffer {
  explicit PlaneBuffer(int64_t elements) : data(new T[elements + kSlack]) {
    std::fill(data.get() + elements, data.get() + elements + kSlack, T(0));
  }
  std::unique_ptr<T[]> data;
};

inline void check_reachable(int64_t channels, const Planes& planes) {
  const int64_t elements = channels * planes.channel();
  TORCH_CHECK_VALUE(elements <= std::numeric_limits<int32_t>::max() - kSlack,
                    "Expected a padded image of fewer than 2^31 elements per convolution group, got ", elements);
}

}  // namespace sparsekd::cpu
