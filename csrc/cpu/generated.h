// Sparse rows as straight-line code: what spmm.inc does for any pattern, for one that is final.
//
// A group of rows has a register each, up to 30 of them with AVX-512. Its code goes through the columns in order: it
// loads a column's pixels once, and for each row with an entry there it has one FMA, whose weight comes from a stream
// of values. So a load of pixels serves all entries of a column in the group, not one; no offset is read, no row's end
// is to be foreseen, and partial sums come and go once per thousand entries:
//
//   vmovups      zmm31, [rdi + 3 * 64]                      the pixels of column 3
//   vfmadd231ps  zmm0, zmm31, [rsi + 0 * 4] {1to16}         row 0 has an entry there,
//   vfmadd231ps  zmm7, zmm31, [rsi + 1 * 4] {1to16}         and row 7
//   vmovups      zmm31, [rdi + 4 * 64]
//   ...
//
// A row's entries are added in the order of their columns, as the interpreting kernel does with one sum, and so with
// the same result to the last bit. Code for a final pattern: SparseRT (Wang, "SparseRT: accelerating unstructured
// sparsity on GPUs for deep learning inference", PACT 2020) and SparseDNN (Wang, arXiv:2101.07948, 2021) do so for
// products of matrices.
#pragma once
#include <limits>
#include <memory>
#include <vector>

#include "../executable.h"
#include "kernels.h"
#include "rows.h"

namespace sparsekd::cpu {

constexpr int kGeneratedLanes = 16;
constexpr int kMaskRegisters = 7;
constexpr int kGeneratedRows = 30;  // most in a group: two registers are left for pixels, and for bounds

// Whether code is made: where the instruction set and the system let it run, but not with SPARSEKD_GENERATE=never; with
// SPARSEKD_GENERATE=always also where it is slower (read once).
bool generates_code();
bool generates_always();

// Where code reads a tile's vectors if they don't lie line by line.
struct ReadPlaces {
  const int32_t* starts;  // [positions] elements from the tile's input on
  // Of an image without a border (in_place.h), [positions, of each]: for each tap that needs it the lanes for which it
  // lies in the image.
  const uint16_t* masks = nullptr;
  int64_t of_each = 0;
  int skipped = 0;  // of the last position: lanes before its `tail`, which belong to the one before it
};

class GeneratedRows {
 public:
  static constexpr int32_t kFarthest = std::numeric_limits<int32_t>::max() / 8;  // offset, in elements

  // `rows` as far as values are not needed; offsets as column_table says, up to kFarthest. Columns are checked. A body
  // of code is for one block of channels. `masks`: for each tap its place among ReadPlaces::masks, or -1; empty for
  // planes.
  GeneratedRows(const Rows<float>& rows, const std::vector<int32_t>& table, int64_t blocks,
                const std::vector<int>& masks = {});

  // The pattern's entry at each place, [n_vectors]: values are read in this order.
  const std::vector<int32_t>& order() const { return order_; }
  size_t bytes() const { return pages_->size(); }
  // Row groups where code begins, and their number.
  const std::vector<int64_t>& cuts() const { return cuts_; }

  // Row groups begin .. end - 1, both where code begins, on a tile of any size. `values` is of all rows and in order,
  // `tile.init` of row `begin`. Partial sums lie in `scratch`: of kGeneratedRows rows, or of all of them if results have
  // no other place yet.
  void multiply(const SpmmTile<float>& tile, const float* values, int64_t begin, int64_t end, float* scratch) const;

 private:
  struct Body {
    size_t code;    // where it begins
    int64_t value;  // the first of its values
  };
  struct Ends {  // for a number of rows
    size_t zeros, init, partial;              // how sums begin
    size_t stored[2], raised[2], clamped[2];  // what is done with them: nothing; held above a bound; between two.
                                              // [1]: a residual first
  };

  void make_body(class Assembler& assembler, const Rows<float>& rows, const std::vector<int32_t>& table,
                 class GroupEntries& entries, uint32_t limit);
  Ends ends_of(class Assembler& assembler, int rows) const;
  void multiply_body(const SpmmTile<float>& tile, const float* values, int64_t code, int64_t block, int64_t row,
                     int64_t after, class FetchedPixels& ahead, float* partial) const;

  const int vector_;
  const int64_t blocks_;
  const std::vector<int> masks_;  // by tap
  int in_registers_;              // of masks
  std::vector<int64_t> cuts_;  // row groups, from 0 to their number
  std::vector<Body> bodies_;   // [groups of code, blocks], and where the last one ends
  std::vector<Ends> ends_;     // by number of rows; zeros where there is no such group
  std::vector<int32_t> order_;
  std::unique_ptr<const ExecutablePages> pages_;
};

}  // namespace sparsekd::cpu
