// A checked view of a packed weight's indices: V x 1 vector-CSR.
//
//   crow_indices [groups * ceil(rows_per_group / V) + 1]   first vector of each row group
//   col_indices  [n_vectors]                               column (c, r, s) flattened, within the convolution group
//   row_indices  [rows] or none                            output row of each packed position (a permutation that stays
//                                                          inside the convolution groups)
//   transpose    [columns_total + 1 | n | n] or none       the transposed pattern made by transpose_pattern: where each
//                                                          input channel's entries start, their column (row, r, s) in
//                                                          the transposed weight, and their place in `values`
//
// Row groups never cross convolution groups; the last of each is padded. Columns are range-checked where they are
// used (kernels.h), everything else here.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace sparsekd::cpu {

struct Pattern {
  Pattern(const at::Tensor& crow_indices, const at::Tensor& col_indices, const std::optional<at::Tensor>& row_indices,
          int64_t rows, int64_t groups, int64_t vector);

  const int32_t* crow;
  const int32_t* col;
  int64_t n_vectors;
  int64_t vector;
  int64_t rows;             // output channels
  int64_t groups;           // of the convolution
  int64_t rows_per_group;
  int64_t packed_per_group;  // row groups in one convolution group
  bool in_order;             // no permutation
  std::vector<int64_t> row_of;  // [groups * packed_per_group * vector], output row or -1 for padding
};

// The transposed pattern as three checked arrays.
struct Transposed {
  Transposed(const at::Tensor& transpose, int64_t columns_total, int64_t n_values);

  const int32_t* crow;  // [columns_total + 1]
  const int32_t* col;
  const int32_t* place;
  int64_t count;
};

// The error of columns of which a kernel found one outside 0 .. columns - 1: names the first.
[[noreturn]] void outside_error(const int32_t* col, int64_t count, int64_t columns, const char* name);

at::Tensor transpose_pattern(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                             const std::optional<at::Tensor>& row_indices, int64_t vector, int64_t rows,
                             int64_t in_channels, int64_t taps, int64_t groups);

}  // namespace sparsekd::cpu
