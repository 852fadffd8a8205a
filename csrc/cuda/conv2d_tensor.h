// What the host side of the convolution on tensor cores hands to its kernels.
#pragma once
#include "conv2d.h"
#include "divisor.h"

namespace sparsekd::cuda {

// A block of threads computes `row_warps * groups` slices of `rows` output rows at `position_warps * positions` places.
struct TensorVariant {
  int rows;       // of a slice
  int groups;     // slices of a warp
  int positions;  // of a warp
};
// Each has 64 sums a lane, so that a lane has at most 128 registers and each quarter of a multiprocessor four warps or
// more: an instruction of one warp issues every five to six cycles, whatever is multiplied.
constexpr TensorVariant kTensorVariants[] = {{8, 1, 16}, {16, 1, 16}, {32, 1, 8}};
constexpr int kTensorWarps = 16;
constexpr int kNeighbours = 4;  // of a warp's positions so many lie side by side in a row: what one ldmatrix may read
constexpr int kLanes = 8;  // images or strips side by side: 16 bytes
constexpr int kMostBlockPlanes = 128;
constexpr int kMostSlices = 2 * kTensorWarps;  // of a block of threads

// Of 16-bit values, in lanes: [unit][channel][phase y][rows][phase x][columns][8]; see Lanes. A thread takes one vector
// of each unit in turn.
struct ToLanes16Params {
  Lanes lanes;
  TapAxis axes[2];
  const void* source;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  bool channels_last;                              // neighbouring threads take neighbouring channels
  int threads;                                     // for a unit: one a vector or, if channels_last, a few more
  Divisor plane, columns, rows, phases_x;
  Divisor channel_blocks;  // of 16, of which all have threads if channels_last
  void* to;
};

// Back to images: from [unit][channel][rows of a strip][row_pitch][8].
struct FromLanes16Params {
  const void* lanes;
  int units, channels, strips, strip_rows, batch, rows, columns;  // of results
  int plane, row_pitch;                                           // vectors
  Divisor of_plane, of_row;                                       // results
  int64_t out_n, out_c, out_h, out_w;                             // elements
  void* to;
};

// How an index of a staged plane, (phase, index) in an axis, becomes one of the source: index * step + phase *
// phase_step + origin, outside of 0 ... limit - 1 a zero. A source made by to_lanes16_kernel has the phases one behind
// the other and the padding in it; activations that lie in lanes from the layer before have neither.
struct SourceAxis {
  int step, phase_step, origin, limit;
};

// The plan of a pattern and tiling: what a convolution reads of it instead of crow_indices and col_indices, without the
// values. Eight columns of a slice are an octet.
struct TensorPlan {
  int32_t* order;       // [groups][slices of a group], heaviest first
  int32_t* starts;      // [slice][blocks + 1], in octets
  int32_t* plane_at;    // [groups * row_blocks][blocks][block_fours][4], channel * phases + phase; -1: read by no row
  uint32_t* distances;  // [octet][8], in vectors from the begin of a staged block; see distance_at
  int32_t* columns;     // [octet][8], packed vector * slices + slice of the vector; -1: fills up
};

struct TensorPatternParams {
  const int32_t *crow, *col;
  int row_groups, row_groups_per_group, slices, slices_per_group;
  int n_vectors, planes_per_group, block_planes, blocks;
  TapAxis axes[2];
  int phases[2], tile_columns;            // of a staged plane: [tile_rows][tile_columns]
  int block_fours;                        // of planes
  int pitch;                              // from plane to plane, in vectors; odd
  int zeros;                              // before the first plane, in vectors
  int row_blocks, block_slices;           // per group of the convolution; of a block of threads
  int32_t* slot_of;                       // [groups * row_blocks][planes_per_group]
  TensorPlan plan;
};

// Values in the order in which the lanes of a warp hold them (mma.cuh).
struct TensorValuesParams {
  const void* values;  // [n_vectors][vector], 16 bits each
  const int32_t* columns;
  int n_octets, n_vectors, vector, slices;
  void* fragments;  // [octet][rows * 8]
};

struct TensorConv2dParams {
  const void* input;  // in lanes: planes of `source_plane` vectors, rows `source_pitch` apart
  int source_channels, source_plane, source_pitch;
  SourceAxis source[2];
  int phases[2], last_whole_phase;  // later ones are a row shorter
  TensorPlan plan;
  const int32_t* row_indices;
  const void* fragments;
  int all_slices, slices, slices_per_group, vector, rows_per_group, out_channels, channels_per_group;
  int planes_per_group, block_planes, block_fours, blocks;  // fours of planes
  int n_octets;
  int row_warps, row_blocks;
  // A tile is so many places, one behind the other, of a stretch of `tile_w` columns, whose rows have `row_places` of
  // them, and `tile_columns` vectors of a staged plane.
  int tiles, places, tile_w, tiles_of_stretch, plane, pitch, zeros;
  Divisor row_places, tiles_of_unit, stretches, tile_columns;
  int buffer;              // vectors from one buffer to the next
  unsigned most_distance;  // so that what is gathered lies in the staged block
  int threads, shared_bytes;
  const void *scale, *shift, *residual;
  Activation activation;
  DType dtype;
  void* output;
  int batch, strip_rows, positions[2];
  // The output lies in lanes, [unit][channel][rows of a strip][out_h][8]. Or in images, where results go directly.
  bool to_lanes;
  int64_t out_n, out_c, out_h;  // strides of output and residual, of units rather than images in lanes
};

// Where a column points that only fills up an octet, there are zeros at each place of the tile: one for each residue of
// an address, and as many as lie between a tile's first and last place.
constexpr int64_t zero_vectors(int64_t last_place) { return (8 + last_place + 7) / 8 * 8; }
// What a row of results needs at the end, 16 bytes.
struct alignas(16) TensorRowEnd {
  int channel;  // of the output, or -1
  float scale, shift;
  int unused;
};
// While a block of planes is read, the next is copied: two buffers, or one for all planes. Then come the ends of rows.
struct Buffers {
  int64_t vectors, bytes;  // from one to the next; of all
};
constexpr Buffers buffers_of(int64_t block_planes, int64_t blocks, int64_t pitch, int64_t zeros, int64_t rows) {
  const int64_t vectors = zeros + block_planes * pitch;
  return {vectors, ((blocks == 1 ? 1 : 2) * vectors + rows) * 16};
}

}  // namespace sparsekd::cuda

extern "C" {
// {major, most shared memory of a block, multiprocessors} of a device.
int sparsekd_device_limits(int device, int* limits);
int sparsekd_to_lanes16(const sparsekd::cuda::ToLanes16Params* params, void* stream);
int sparsekd_from_lanes16(const sparsekd::cuda::FromLanes16Params* params, void* stream);
int sparsekd_tensor_plan(const sparsekd::cuda::TensorPatternParams* params, int groups, void* stream);
int sparsekd_tensor_values(const sparsekd::cuda::TensorValuesParams* params, int rows, void* stream);
int sparsekd_conv2d_tensor(const sparsekd::cuda::TensorConv2dParams* params,
                           const sparsekd::cuda::TensorVariant* variant, int grid_x, int grid_y, void* stream);
}
