// The weight gradient at the non-zeros as straight-line code: what sddmm.inc does for any pattern, for one that is kept.
//
//   sums[i] += sum over the positions of a tile, and over lanes, of  grad[row of i][p] * input[offset of i + p]
//
// A chunk of 28 entries, row by row, has a register each. Its code goes over the positions of the tile: it loads the
// gradient of each of its rows once, and has one FMA for each entry, whose pixels come from memory:
//
//   vmovups      zmm31, [r9 + row * pitch]                  the gradient of a row
//   vfmadd231ps  zmm0, zmm31, [rax + 0x1480]                its entries
//   vfmadd231ps  zmm1, zmm31, [rax + 0x2840]
//   vmovups      zmm31, [r9 + next row * pitch]
//   ...
//
// Then lanes are added up for all of them at once, and the next chunk follows: no column is looked up, no row's end is
// to be foreseen, and few instructions are spent on what is not a multiplication. As in the interpreting kernel a block
// of channels stays in L1 while all rows pass.
#pragma once
#include <memory>
#include <vector>

#include "../executable.h"
#include "generated.h"
#include "kernels.h"
#include "rows.h"

namespace sparsekd::cpu {

class GeneratedDots {
 public:
  static constexpr int64_t kDots = 28;    // in a chunk; the others of 32 registers hold a gradient and what is added up
  static constexpr int64_t kPlaces = 32;  // sums of a chunk, of which the last are nobody's

  // `rows` as far as values are not needed, and offsets as for GeneratedRows; gradients of rows are `grad_pitch`
  // elements apart. Columns are checked.
  GeneratedDots(const Rows<float>& rows, Tiling tiling, int64_t grad_pitch);

  // Whether it is for a layout, with offsets that are in reach.
  bool fits(const Tiling& tiling, int64_t grad_pitch) const {
    return pages_ && tiling == tiling_ && grad_pitch == grad_pitch_;
  }
  size_t bytes() const { return pages_ ? pages_->size() : 0; }

  // Of all chunks.
  int64_t places() const { return static_cast<int64_t>(value_of_.size()); }
  // The gradient's element of each place, -1 for none.
  const std::vector<int32_t>& values() const { return value_of_; }

  // Adds a tile to the sums of one of so many parts of a convolution group's chunks. `places` are the tile's positions:
  // each one's distance from `input` and from `grad`, in bytes. `grad` is of result row 0.
  void add(int64_t group, int64_t part, int64_t parts, const float* input, const float* grad,
           const std::vector<int32_t>& places, float* sums) const;

 private:
  const Tiling tiling_;
  const int64_t grad_pitch_, blocks_;
  std::vector<int64_t> first_;     // [groups * blocks + 1] chunk
  std::vector<size_t> code_;       // [chunks]
  std::vector<int32_t> value_of_;  // [chunks, kPlaces]
  std::unique_ptr<const ExecutablePages> pages_;
};

}  // namespace sparsekd::cpu
