// The rows of a packed weight, and where their columns lie in planes.
#pragma once
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "pattern.h"
#include "planes.h"

namespace sparsekd::cpu {

// Rows of a packed weight. Row groups of one convolution group share its planes and its columns.
template <class T>
struct Rows {
  int64_t groups = 1;            // convolution groups
  int64_t packed_per_group = 0;  // row groups in each
  int vector = 1;
  const int32_t* crow = nullptr;    // [groups * packed_per_group + 1]
  const int32_t* col = nullptr;     // [n_vectors]
  const T* values = nullptr;        // [n_vectors, vector]
  const int64_t* row_of = nullptr;  // [groups * packed_per_group * vector] result row, -1 for padding
  bool in_order = true;             // whether row_of rises by one within a convolution group
  int64_t channels_per_group = 0;   // planes' channels that one convolution group reads
  int64_t taps = 1;
  const char* name = "col_indices";
  bool generated = false;           // whether code is made of them, or to be made (generated.h)
  const std::vector<int64_t>* cuts = nullptr;  // row groups where that of several begins, and their number

  int64_t packed() const { return groups * packed_per_group; }
  int64_t columns() const { return channels_per_group * taps; }
};

// All that offsets and where their blocks begin depend on: elements between channels, blocks of channels, and elements
// from a position to each tap.
using Tiling = std::vector<int64_t>;

inline Tiling tiling_of(int64_t pitch, int64_t blocks, const std::vector<Tap>& taps, const Layout& layout,
                        int64_t step) {
  Tiling tiling{pitch, blocks};
  // A tap that takes no part has no entry that points here.
  for (const Tap& tap : taps) tiling.push_back(tap.phase < 0 ? 0 : layout.at(tap) * step);
  return tiling;
}

// table[column] = where the column's vectors are from the first position of a convolution group's planes on.
template <class T>
std::vector<int32_t> column_table(const Rows<T>& rows, const Tiling& tiling) {
  const int64_t elements = rows.channels_per_group * tiling[0];
  TORCH_CHECK_VALUE(elements <= std::numeric_limits<int32_t>::max(),
                    "Expected a padded image of fewer than 2^31 elements per convolution group, got ", elements);
  std::vector<int32_t> table;
  table.reserve(rows.columns());
  for (int64_t c = 0; c < rows.channels_per_group; ++c) {
    for (size_t tap = 2; tap < tiling.size(); ++tap) table.push_back(static_cast<int32_t>(c * tiling[0] + tiling[tap]));
  }
  return table;
}

// First column that is not of the first `block + 1` of `blocks` blocks of channels.
template <class T>
uint32_t block_limit(const Rows<T>& rows, int64_t block, int64_t blocks) {
  return static_cast<uint32_t>(rows.channels_per_group * (block + 1) / blocks * rows.taps);
}

}  // namespace sparsekd::cpu
