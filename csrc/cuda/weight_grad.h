// What the host side of the weight gradient hands to its kernels. Plain numbers and pointers; no torch, no CUDA.
#pragma once
#include "conv2d.h"

namespace sparsekd::cuda {

// Of rectangles alone; `parts` does nothing.
constexpr Conv2dVariant kWeightGradVariants[] = {
    {1, 4, 4, 64}, {1, 4, 4, 192}, {1, 1, 4, 0}, {2, 4, 2, 64}, {2, 4, 2, 192}, {2, 1, 2, 0},
    {4, 4, 1, 64}, {4, 4, 1, 192}, {4, 1, 1, 0}, {8, 2, 1, 64}, {8, 2, 1, 192}, {8, 1, 1, 0},
};

// Slices that a warp takes. What the sums over lanes need of registers is not there for gradients: more would spill.
constexpr int weight_grad_groups(const Conv2dVariant& v) {
  return v.vector != 1 || v.lane_groups == 1 ? v.groups : v.plane == 64 ? 2 : 3;
}

struct WeightGradParams {
  Lanes lanes;                                    // of the input
  TapAxis axes[2];
  const float* input;                             // in lanes
  const float* grad;                              // of the output, in as many lanes, strips and units, without a halo
  int grad_columns, grad_plane;
  const unsigned char* records;                   // of one value; only their distances count
  const int32_t *starts, *order, *row_indices;    // starts, order: of row groups
  int row_groups_per_group, vector, slices;       // a row group is taken in slices of kV rows
  int rows_per_group, out_channels, channels_per_group, block_channels, blocks, n_records;
  int tile_h, tile_w, tiles_h, tiles_w;           // 32 positions
  int tile_rows, tile_columns, plane;             // of a staged plane
  int row_blocks;                                 // per group of the convolution
  int tiles;                                      // of all units
  int splits;                                     // blocks that share the tiles
  float* partial;                                 // [splits][n_records][vector]
};

struct WeightGradSumParams {
  const float* partial;  // [splits][n_vectors][vector]
  const int32_t* where;  // [n_vectors] record of each entry, or -1
  int n_vectors, vector, splits;
  DType dtype;
  void* output;          // [n_vectors, vector]
};

}  // namespace sparsekd::cuda

// Launchers: return a cudaError_t, 0 for success. `stream` is a cudaStream_t.
extern "C" {
int sparsekd_weight_grad(const sparsekd::cuda::WeightGradParams* params, const sparsekd::cuda::Conv2dVariant* variant,
                         int warps, int grid_y, void* stream);
int sparsekd_weight_grad_sum(const sparsekd::cuda::WeightGradSumParams* params, void* stream);
}
