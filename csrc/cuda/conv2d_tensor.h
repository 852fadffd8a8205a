// What the host side of the convolution on tensor cores hands to its kernels.
#pragma once
#include "conv2d.h"

namespace sparsekd::cuda {

// A block of threads computes `row_warps * groups` slices of `rows` output rows at `position_warps * positions` places.
struct TensorVariant {
  int rows;       // of a slice
  int groups;     // slices of a warp
  int positions;  // of a warp
};
// Each has 128 sums a lane.
constexpr TensorVariant kTensorVariants[] = {
    {8, 2, 32}, {8, 4, 16}, {16, 1, 32}, {16, 2, 16}, {32, 1, 16}, {64, 1, 8},
};
constexpr int kTensorWarps = 8;
constexpr int kNeighbours = 4;  // of a warp's positions so many lie side by side in a row: what one ldmatrix may read
constexpr int kLanes = 8;  // images or strips side by side: 16 bytes
constexpr int kMostBlockPlanes = 128;
constexpr int kMostSlices = 4 * kTensorWarps;  // of a block of threads

// Of 16-bit values, in lanes: [unit][channel][phase y][rows][phase x][columns][8]; see Lanes.
struct ToLanes16Params {
  Lanes lanes;
  TapAxis axes[2];
  const void* source;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  bool channels_last;                              // neighbouring threads take neighbouring channels
  int channel_blocks;                              // of 16, of which all have threads if channels_last
  int64_t threads;                                 // one a vector
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
  int most_octets;                        // of a slice and block of planes
  int32_t* slot_of;                       // [groups * row_blocks][planes_per_group]
  void* sorted;                           // [n_vectors * slices] {vector, distance}
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
  int tiles, places, tile_w, row_places, tiles_of_stretch, stretches, tile_columns, plane, pitch, zeros;
  bool shifted;  // tiles begin elsewhere than at the begin of a row, too
  bool joined;   // results of a tile lie one behind the other in each image
  int lane_pitch, row_pitch, four_pitch;  // of such results on their way, in floats; the last is added each four rows
  int buffer;              // vectors from one buffer to the next
  unsigned most_distance;  // so that what is gathered lies in the staged block
  int threads, shared_bytes;
  const void *scale, *shift, *residual;
  Activation activation;
  DType dtype;
  void* output;
  int batch, strips, strip_rows, positions[2];
  bool to_lanes;                       // the output lies in lanes: [unit][channel][positions y][out_h][8]
  int64_t out_n, out_c, out_h, out_w;  // strides of output and residual, of units rather than images in lanes
};

// Where a column points that only fills up an octet, there are zeros at each place of the tile: one for each residue of
// an address, and as many as lie between a tile's first and last place.
constexpr int64_t zero_vectors(int64_t last_place) { return (8 + last_place + 7) / 8 * 8; }
// Of one warp, at the end: 8 rows and lanes of some positions, in a pitch that spreads them over the banks; or its part
// of the results of whole tiles, 8 rows of up to 16 positions or 4 of 32, in such a pitch.
constexpr int kResultPositions = 16;
constexpr int joined_rows(int positions) { return positions <= kResultPositions ? 8 : 4; }
// At once are written, of one result, 8 rows and lanes 2 * t (V >= 16), or rows 2 * t and 8 lanes: the pitches are 4
// modulo 8 and 1 more, or 1 modulo 8 and 4 more, for it to be 32 banks.
constexpr int joined_lane_pitch(int results, int rows) {
  return rows == 8 ? (results + 6) / 8 * 8 + 1 : (results + 3) / 8 * 8 + 4;
}
constexpr int joined_row_pitch(int lane_pitch, int rows) { return kLanes * lane_pitch + (rows == 8 ? 4 : 1); }
constexpr int64_t result_bytes(int positions) {
  const int64_t alone = int64_t(256) * ((positions < kResultPositions ? positions : kResultPositions) + 1);
  const int64_t joined = (joined_rows(positions) * (kLanes * (positions + 4) + 4) * 4 + 15) / 16 * 16;
  return alone < joined ? joined : alone;
}
// While a block of planes is read, the next is copied: two buffers, whose planes give way to results at the end of a
// tile. Or one buffer for all planes, behind which results have a place of their own.
struct Buffers {
  int64_t vectors, bytes;  // from one to the next; of all
};
constexpr Buffers buffers_of(int64_t block_planes, int64_t blocks, int64_t pitch, int64_t zeros, int64_t result_bytes) {
  const int64_t planes = block_planes * pitch, results = result_bytes / 16;
  if (blocks == 1) return {zeros + planes, (zeros + planes + results) * 16};
  const int64_t vectors = zeros + (planes < results ? results : planes);
  return {vectors, 2 * vectors * 16};
}

}  // namespace sparsekd::cuda

extern "C" {
// {major, most shared memory of a block, multiprocessors} of a device.
int sparsekd_device_limits(int device, int* limits);
int sparsekd_to_lanes16(const sparsekd::cuda::ToLanes16Params* params, void* stream);
int sparsekd_tensor_plan(const sparsekd::cuda::TensorPatternParams* params, int groups, void* stream);
int sparsekd_tensor_values(const sparsekd::cuda::TensorValuesParams* params, int rows, void* stream);
int sparsekd_conv2d_tensor(const sparsekd::cuda::TensorConv2dParams* params,
                           const sparsekd::cuda::TensorVariant* variant, int grid_x, int grid_y, void* stream);
}
