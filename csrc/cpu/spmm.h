// Drives the spmm kernel over packed planes: blocks of channels, chunks of rows, threads over images or rows.
#pragma once
#include <ATen/Parallel.h>

#include <limits>
#include <type_traits>

#include "generated.h"
#include "lanes.h"
#include "rows.h"

namespace sparsekd::cpu {

// Where the columns of some rows are: entry i at offset[i]; channels are `pitch` apart.
struct Offsets {
  const GeneratedRows* code = nullptr;  // which knows all else
  const int32_t* offset = nullptr;
  // Row group r has entries starts[at] .. starts[at + next] - 1 in a block, at = block * row groups + r. Null if nobody
  // counted them.
  const int32_t* starts = nullptr;
  int64_t next = 0;
  int64_t pitch = 0;
  // Past the last that a column can have, so that an offset from anywhere is as good as one of those.
  uint32_t limit = 0;
  std::vector<int32_t> own;  // where they were made for one call
};

// A pattern's offsets that were made before, for one tiling (conv2d_plan).
//
// Entries lie as in the pattern, row by row; or, if `ordered`, block by block of channels, and then row by row: as they
// are read, so that what isn't in the caches comes in one stream. Values are then in that order, too.
struct OffsetPlan {
  Tiling tiling;
  const int32_t* starts;           // [blocks + 1, row groups], or if ordered [blocks * row groups + 1]
  const int32_t* offset;           // [n_vectors]
  const int32_t* order = nullptr;  // [n_vectors] if ordered: the pattern's entry at each place
  const GeneratedRows* code = nullptr;  // in the place of starts and offsets
};

// Whether a plan's starts rise from its first entry to its last, so that they are nobody else's memory.
template <class T>
bool starts_fit(const Rows<T>& rows, const OffsetPlan& plan) {
  const int64_t count = rows.packed(), all = plan.tiling[1] * count, next = plan.order ? 1 : count;
  const int32_t* const starts = plan.starts;
  bool fit = true;
  if (plan.order) {
    fit = starts[0] == 0 && starts[all] == rows.crow[count];
  } else {
    for (int64_t r = 0; r < count; ++r) fit &= starts[r] == rows.crow[r] && starts[all + r] == rows.crow[r + 1];
  }
  for (int64_t i = 0; i < all; ++i) fit &= starts[i] <= starts[i + next];
  return fit;
}

// Where each row's entries of each block of channels begin, [blocks + 1, row groups]. Columns rise in a row; of one
// that is outside nothing is told here.
template <class T>
void count_starts(const Rows<T>& rows, int64_t blocks, int32_t* starts) {
  const int64_t count = rows.packed();
  for (int64_t r = 0; r < count; ++r) {
    int32_t at = starts[r] = rows.crow[r];
    for (int64_t block = 0; block + 1 < blocks; ++block) {
      const uint32_t limit = block_limit(rows, block, blocks);
      while (at < rows.crow[r + 1] && static_cast<uint32_t>(rows.col[at]) < limit) ++at;
      starts[(block + 1) * count + r] = at;
    }
    starts[blocks * count + r] = rows.crow[r + 1];
  }
}

// Puts the entries in order: starts become [blocks * row groups + 1].
inline void order_entries(std::vector<int32_t> by_row, int64_t row_groups, int32_t* starts, int32_t* order) {
  int32_t place = starts[0] = 0;
  for (size_t i = 0; i + row_groups < by_row.size(); ++i) {
    for (int32_t entry = by_row[i]; entry < by_row[i + row_groups]; ++entry) order[place++] = entry;
    starts[i + 1] = place;
  }
}

constexpr int64_t kStretchGrain = 64 * 1024;  // entries that pay for another thread

// Looks every column up. One that is outside becomes an offset beyond any limit.
template <class T>
void stretch(const Rows<T>& rows, const Tiling& tiling, int32_t* offset) {
  const std::vector<int32_t> table = column_table(rows, tiling);
  const auto columns = static_cast<uint32_t>(table.size());
  at::parallel_for(0, rows.crow[rows.packed()], kStretchGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto column = static_cast<uint32_t>(rows.col[i]);
      offset[i] = column < columns ? table[column] : -1;
    }
  });
}

// The plan's offsets if it has those of this tiling.
template <class T>
Offsets offsets_of(const Rows<T>& rows, const Tiling& tiling, const OffsetPlan* plan) {
  Offsets offsets;
  if (plan && plan->tiling == tiling) {
    offsets.code = plan->code;
    if (offsets.code) return offsets;
    TORCH_CHECK_INDEX(starts_fit(rows, *plan), "Expected a plan whose blocks of channels share each row's entries out");
    offsets.offset = plan->offset;
    offsets.starts = plan->starts;
    offsets.next = plan->order ? 1 : rows.packed();
  } else {
    offsets.own.resize(rows.crow[rows.packed()] + 1);  // the kernel reads one ahead
    stretch(rows, tiling, offsets.own.data());
    offsets.offset = offsets.own.data();
  }
  offsets.pitch = tiling[0];
  const int64_t farthest = *std::max_element(tiling.begin() + 2, tiling.end());
  offsets.limit = rows.channels_per_group == 0
                      ? 0
                      : static_cast<uint32_t>((rows.channels_per_group - 1) * tiling[0] + farthest + 1);
  return offsets;
}

template <class T>
void check_cursors(const Rows<T>& rows, const int32_t* cursor, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    if (cursor[group - begin] != rows.crow[group + 1]) {
      outside_error(rows.col, rows.crow[rows.packed()], rows.columns(), rows.name);
    }
  }
}

// Row groups begin .. end - 1, which lie in one convolution group, on one tile. Partial sums lie in `scratch`, where a
// row takes the tile's vectors side by side; results go where the tile says, which may be the same.
template <class T>
void multiply_tile(const Grid& grid, const Rows<T>& rows, const Offsets& offsets, int64_t blocks, SpmmTile<T> tile,
                   int64_t begin, int64_t end, T* scratch, std::vector<int32_t>& cursor) {
  if constexpr (std::is_same_v<T, float>) {
    if (offsets.code) {
      tile.init = tile.init ? tile.init + begin * rows.vector : nullptr;
      return offsets.code->multiply(tile, rows.values, begin, end, scratch);
    }
  }
  const bool counted = offsets.starts != nullptr;
  if (!counted) {
    cursor.assign(rows.crow + begin, rows.crow + end);
    tile.from = tile.cursor = cursor.data();
    tile.to = rows.crow + begin + 1;
  }
  tile.offset = offsets.offset;
  tile.values = rows.values;
  tile.vector = rows.vector;
  tile.init = tile.init ? tile.init + begin * rows.vector : nullptr;
  const SpmmTile<T> finished = tile;
  tile.partial = tile.output = scratch;
  tile.partial_pitch = tile.output_pitch = int64_t{tile.lines} * tile.width * grid.lanes;
  tile.places = nullptr;
  bool whole = true;
  for (int64_t block = 0; block < blocks; ++block) {
    tile.first = block == 0;
    const int64_t past = rows.channels_per_group * (block + 1) / blocks;
    tile.limit = offsets.limit;
    if (counted) {
      tile.from = offsets.starts + block * rows.packed() + begin;
      tile.to = tile.from + offsets.next;
    } else {
      tile.limit = static_cast<uint32_t>(std::min<int64_t>(past * offsets.pitch, offsets.limit));
    }
    if (finished.ahead) {
      const int64_t channel = rows.channels_per_group * block / blocks, parts = std::max(tile.ahead_parts, 1);
      const int64_t from = channel + (past - channel) * tile.ahead_part / parts;
      tile.ahead_channels = channel + (past - channel) * (tile.ahead_part + 1) / parts - from;
      tile.ahead = finished.ahead + from * finished.ahead_pitch;
    }
    if (block + 1 == blocks) {
      tile.output = finished.output;
      tile.output_pitch = finished.output_pitch;
      tile.places = finished.places;
    }
    const bool ended = type_kernels<T>().lanes[grid.width].spmm(tile, end - begin);
    whole = ended && (whole || !counted);
  }
  if (!whole) outside_error(rows.col, rows.crow[rows.packed()], rows.columns(), rows.name);
}

// The last row group up to `end`, but after `begin`, before which rows may be cut.
template <class T>
int64_t cut_before(const Rows<T>& rows, int64_t begin, int64_t end) {
  if (rows.cuts == nullptr) return end;
  const int64_t first = *std::upper_bound(rows.cuts->begin(), rows.cuts->end(), begin);
  return std::max(first, *(std::upper_bound(rows.cuts->begin(), rows.cuts->end(), end) - 1));
}

// Calls body(begin, end) for chunks of row groups begin .. end - 1 that stay in one convolution group and whose partial
// sums of `elements` per row stay in L2.
template <class T, class Body>
void for_chunks(const Rows<T>& rows, int64_t elements, int64_t begin, int64_t end, Body body) {
  const int64_t most = std::max<int64_t>(256 * 1024 / (elements * rows.vector * static_cast<int64_t>(sizeof(T))), 1);
  while (begin < end) {
    const int64_t group = begin / rows.packed_per_group;
    const int64_t stop = cut_before(rows, begin, std::min({end, (group + 1) * rows.packed_per_group, begin + most}));
    body(group, begin, stop);
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
    starts[thread] = rows.cuts ? *std::lower_bound(rows.cuts->begin(), rows.cuts->end(), row) : row;
  }
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t thread = from; thread < to; ++thread) {
      if (starts[thread] < starts[thread + 1]) body(starts[thread], starts[thread + 1]);
    }
  });
}

}  // namespace sparsekd::cpu
