// What the host side of the convolution on tensor cores hands to its kernels.
#pragma once
#include "conv2d.h"

namespace sparsekd::cuda {

// A block of threads computes `row_warps * groups` slices of `rows` output rows at `position_warps * positions` places.
struct TensorVariant {
  int rows;       // of a slice
  int groups;     // slices of a warp
  int positions;  // of a warp
  int run;        // of these, neighbours in a row of the tile
};
// Each has 128 sums a lane.
constexpr TensorVariant kTensorVariants[] = {
    {8, 2, 32, 8},   {8, 2, 32, 16}, {8, 4, 16, 8},  {16, 1, 32, 8}, {16, 1, 32, 16},
    {16, 2, 16, 8}, {32, 1, 16, 8}, {32, 1, 16, 16}, {64, 1, 8, 8},
};
constexpr int kTensorWarps = 8;
constexpr int kLanes = 8;            // images or strips side by side: 16 bytes
constexpr int kZeros = 8;            // vectors of zeros before a staged block, one for each residue of an address
constexpr int kMostBlockChannels = 128;
constexpr int kMostSlices = 4 * kTensorWarps;  // of a block of threads

// Of 16-bit values, in lanes: [unit][channel][phase y][rows][phase x][columns][8]; see Lanes.
struct ToLanes16Params {
  Lanes lanes;
  TapAxis axes[2];
  const void* source;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  bool channels_last;                              // neighbouring threads take neighbouring channels
  void* to;
};

// Eight columns of a slice are an octet: their distances within a staged block, and their values in the order in which
// the lanes of a warp hold them (mma.cuh).
struct TensorPatternParams {
  const void* values;  // [n_vectors][vector], 16 bits each
  const int32_t *crow, *col;
  int row_groups, row_groups_per_group, vector, slices, slices_per_group, rows;
  int n_vectors, channels_per_group, block_channels, blocks;
  TapAxis axes[2];
  int phases_x, tile_rows, tile_columns;  // of a staged plane: [phase y][tile_rows][phase x][tile_columns]
  int pitch;                              // from plane to plane, in vectors; odd
  int row_blocks, block_slices;           // per group of the convolution; of a block of threads
  int most_octets;                        // of a slice and block of channels
  int32_t* order;                         // [groups][slices of a group], heaviest first
  int32_t *slot_of, *channel_at;          // [groups * row_blocks][channels_per_group]
  int32_t* starts;                        // [slice][blocks + 1], in octets
  void* sorted;                           // [n_vectors * slices] {vector, distance}
  int32_t* distances;                     // [octet][8], in bytes
  void* fragments;                        // [octet][rows * 8]
};

struct TensorConv2dParams {
  Lanes lanes;
  TapAxis axes[2];
  const void* input;  // in lanes
  const int32_t *starts, *distances, *order, *channel_at, *row_indices;
  const void* fragments;
  int slices, slices_per_group, vector, rows_per_group, out_channels, channels_per_group, block_channels, blocks;
  int n_octets;
  int row_warps, position_warps, row_blocks;
  int tile_h, tile_w, tiles_h, tiles_w, tile_rows, tile_columns, plane, pitch;
  const void *scale, *shift, *residual;
  Activation activation;
  DType dtype;
  void* output;
  int64_t out_n, out_c, out_h, out_w;  // strides of output and residual
};

constexpr int64_t staged_bytes(int64_t block_channels, int64_t pitch) { return (kZeros + block_channels * pitch) * 16; }
// Of one warp, at the end: 8 rows and lanes of each position, in a pitch that spreads them over the banks.
constexpr int64_t result_bytes(int positions) { return int64_t(64) * (positions + 1) * 4; }

}  // namespace sparsekd::cuda

extern "C" {
// {major, most shared memory of a block, multiprocessors} of a device.
int sparsekd_device_limits(int device, int* limits);
int sparsekd_to_lanes16(const sparsekd::cuda::ToLanes16Params* params, void* stream);
int sparsekd_tensor_pattern(const sparsekd::cuda::TensorPatternParams* params, int groups, void* stream);
int sparsekd_conv2d_tensor(const sparsekd::cuda::TensorConv2dParams* params,
                           const sparsekd::cuda::TensorVariant* variant, int64_t grid_x, int grid_y, void* stream);
}
