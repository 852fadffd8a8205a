// Convolution of images where they lie: without a copy into planes, by generated code.
//
// With a stride of one and results as wide as the image, a tap is a fixed distance from the result's pixel in the image
// itself, too, as long as it doesn't leave it. A vector is as many pixels as it has lanes, one after the other; lanes
// whose tap lies outside are masked out where the vector is loaded, and nothing is read there:
//
//   image, one channel      results 0 .. 3, tap up and to the left:  - - - a      is read from 4 before the first on
//     a b c                 results 4 .. 7:                          b - d e      (no room for it before row 2)
//     d e f                 the last vector of 4 begins where it ends with the image:
//     g h i                 results 5 .. 8:                          - d e -      of which 5 .. 7 are known already
//
// What that saves is the copy, the columns of zeros that are multiplied too, and the way back of the results.
#pragma once
#include <vector>

#include "packing.h"
#include "spmm.h"

namespace sparsekd::cpu {

class InPlace {
 public:
  // The best tiles; of infinite cost where it can't be done.
  static Grid grid_of(const Conv2dShape& shape, const Rows<float>& rows);

  InPlace(const Conv2dShape& shape, const Grid& grid);

  // What code is made for.
  Tiling tiling() const;
  // Each tap's place among the masks, -1 for one that never leaves the image.
  const std::vector<int>& masks() const { return mask_of_; }

  // `rows.cuts` are the code's. All of act(conv2d + init + residual), of images [N, C, H, W] without gaps.
  void run(const GeneratedRows& code, const Rows<float>& rows, const float* input, const float* init,
           const Epilogue<float>& epilogue, float* output) const;

 private:
  void run_image(const GeneratedRows& code, const Rows<float>& rows, const Batch<const float>& source, int64_t n,
                 const float* init, const Epilogue<float>& epilogue, const Batch<float>& result, int64_t from,
                 int64_t to) const;

  const Conv2dShape shape_;
  const Grid grid_;
  const int64_t count_;           // pixels of a result
  const bool fetches_;            // whether pixels are fetched a tile ahead: it takes time where they are near
  std::vector<Tap> taps_;
  std::vector<int> mask_of_;      // [taps]
  std::vector<int32_t> starts_;   // [positions] first pixel
  std::vector<uint16_t> masks_;   // [positions, masks]
  int64_t of_each_;               // masks
};

}  // namespace sparsekd::cpu
