#include "pattern.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "../check.h"

namespace sparsekd::cpu {
namespace {

// First entry 0, never falling, last entry `count`.
void check_crow(const int32_t* crow, int64_t entries, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(crow[0] == 0, "Expected ", name, "[0] to be 0, got ", crow[0]);
  for (int64_t i = 1; i < entries; ++i) {
    TORCH_CHECK_VALUE(crow[i] >= crow[i - 1], "Expected non-decreasing ", name, ", got ", crow[i - 1], " before ",
                      crow[i], " at ", i);
  }
  TORCH_CHECK_VALUE(crow[entries - 1] == count, "Expected the last of ", name, " to be ", count,
                    " (the number of vectors), got ", crow[entries - 1]);
}

}  // namespace

Pattern::Pattern(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                 const std::optional<at::Tensor>& row_indices, int64_t rows, int64_t groups, int64_t vector)
    : n_vectors(col_indices.size(0)), vector(vector), rows(rows), groups(groups), in_order(!row_indices) {
  TORCH_CHECK_VALUE(vector >= 1, "Expected values of shape [n_vectors, V] with V >= 1, got V = ", vector);
  TORCH_CHECK_VALUE(groups >= 1 && rows >= groups && rows % groups == 0,
                    "Expected a number of output channels divisible by groups, got ", rows, " and groups=", groups);
  check_indices(crow_indices, "crow_indices", crow_indices);
  check_indices(col_indices, "col_indices", crow_indices);
  rows_per_group = rows / groups;
  // Padding takes memory, so that a V made by hand could ask for any amount of it.
  const int64_t most = std::max<int64_t>(rows_per_group, 1024);
  TORCH_CHECK_VALUE(vector <= most, "Expected V of at most ", most, " for ", rows_per_group,
                    " output channels per group, got V = ", vector);
  packed_per_group = (rows_per_group + vector - 1) / vector;
  check_size(crow_indices, "crow_indices", 0, groups * packed_per_group + 1, "row groups + 1");
  crow = crow_indices.data_ptr<int32_t>();
  col = col_indices.data_ptr<int32_t>();
  check_crow(crow, groups * packed_per_group + 1, n_vectors, "crow_indices");

  row_of.assign(groups * packed_per_group * vector, -1);
  const int32_t* permutation = nullptr;
  if (row_indices) {
    check_indices(*row_indices, "row_indices", crow_indices);
    check_size(*row_indices, "row_indices", 0, rows, "output channels");
    permutation = row_indices->data_ptr<int32_t>();
  }
  std::vector<bool> seen(permutation ? rows : 0, false);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t local = 0; local < rows_per_group; ++local) {
      const int64_t position = group * rows_per_group + local;
      const int64_t row = permutation ? permutation[position] : position;
      if (permutation) {
        TORCH_CHECK_VALUE(row >= 0 && row < rows && row / rows_per_group == group && !seen[row],
                          "Expected row_indices to permute the output channels of each convolution group, got ", row,
                          " at ", position);
        seen[row] = true;
      }
      row_of[group * packed_per_group * vector + local] = row;
    }
  }
}

Transposed::Transposed(const at::Tensor& transpose, int64_t columns_total, int64_t n_values) {
  check_indices(transpose, "transpose", transpose);
  const int64_t rest = transpose.size(0) - (columns_total + 1);
  TORCH_CHECK_VALUE(rest >= 0 && rest % 2 == 0, "Expected a transpose plan made by transpose_pattern for ",
                    columns_total, " input channels, got ", transpose.size(0), " entries");
  count = rest / 2;
  crow = transpose.data_ptr<int32_t>();
  col = crow + columns_total + 1;
  place = col + count;
  check_crow(crow, columns_total + 1, count, "the transpose plan's row starts");
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(place[i] >= 0 && place[i] < n_values, "Expected the transpose plan to point into ", n_values,
                      " values, got ", place[i]);
  }
}

void outside_error(const int32_t* col, int64_t count, int64_t columns, const char* name) {
  const int32_t* bad = std::find_if(col, col + count, [&](int32_t c) { return c < 0 || c >= columns; });
  TORCH_CHECK_INDEX(bad == col + count, "Expected ", name, " in 0..", columns - 1, ", got ", *bad);
  TORCH_CHECK(false, "Expected ", name, " that stay as they are during the call, got some that changed");
}

at::Tensor transpose_pattern(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                             const std::optional<at::Tensor>& row_indices, int64_t vector, int64_t rows,
                             int64_t in_channels, int64_t taps, int64_t groups) {
  TORCH_CHECK_VALUE(taps >= 1 && groups >= 1 && in_channels >= groups && in_channels % groups == 0,
                    "Expected input channels divisible by groups and at least one tap, got ", in_channels, ", groups=",
                    groups, ", taps=", taps);
  const Pattern pattern(crow_indices, col_indices, row_indices, rows, groups, vector);
  const int64_t channels_per_group = in_channels / groups;
  const int64_t columns = channels_per_group * taps;
  TORCH_CHECK_VALUE(pattern.n_vectors * vector <= std::numeric_limits<int32_t>::max() &&
                        pattern.rows_per_group * taps <= std::numeric_limits<int32_t>::max(),
                    "Expected fewer than 2^31 packed values, got ", pattern.n_vectors * vector);

  // Two passes of a counting sort; going through rows in their own order leaves each channel's entries in order.
  std::vector<int64_t> position_of(rows);
  for (size_t position = 0; position < pattern.row_of.size(); ++position) {
    if (pattern.row_of[position] >= 0) position_of[pattern.row_of[position]] = static_cast<int64_t>(position);
  }
  std::vector<int32_t> start(in_channels + 1, 0);
  auto for_entries = [&](auto&& entry) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = position_of[row];
      const int64_t packed = position / vector;
      const int64_t group = row / pattern.rows_per_group;
      for (int64_t i = pattern.crow[packed]; i < pattern.crow[packed + 1]; ++i) {
        const int64_t column = pattern.col[i];
        TORCH_CHECK_INDEX(column >= 0 && column < columns, "Expected col_indices in 0..", columns - 1, ", got ",
                          column);
        entry(group * channels_per_group + column / taps,
              (row % pattern.rows_per_group) * taps + column % taps, i * vector + position % vector);
      }
    }
  };
  for_entries([&](int64_t channel, int64_t, int64_t) { ++start[channel + 1]; });
  std::partial_sum(start.begin(), start.end(), start.begin());
  const int64_t count = start[in_channels];
  at::Tensor plan = at::empty({in_channels + 1 + 2 * count}, crow_indices.options());
  int32_t* out = plan.data_ptr<int32_t>();
  std::copy(start.begin(), start.end(), out);
  int32_t* col = out + in_channels + 1;
  int32_t* place = col + count;
  for_entries([&](int64_t channel, int64_t column, int64_t value) {
    const int32_t slot = start[channel]++;
    col[slot] = static_cast<int32_t>(column);
    place[slot] = static_cast<int32_t>(value);
  });
  return plan;
}

}  // namespace sparsekd::cpu
