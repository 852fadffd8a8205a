// What the host side of the convolutions hands to their kernels. Plain numbers and pointers; no torch, no CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../activation.h"
#include "divisor.h"
#include "dtype.h"

namespace sparsekd::cuda {

// One dimension of a convolution, as the kernels see it: position y reads source element
//   y * stride + tap(r) + origin,   tap(r) = (add + r * mult) / div - least,   where the division leaves no rest.
// The forward has tap(r) = r * dilation and origin = -padding. The input gradient is made for one phase of a stride at
// a time, as a convolution of stride 1 over the output's gradient whose taps go backwards.
struct TapAxis {
  int kernel = 1, add = 0, mult = 1, div = 1, least = 0;
  int stride = 1, origin = 0, size = 1;          // size of the source
  int positions = 1;                             // that are computed
  int out_step = 1, out_begin = 0;               // position y is element y * out_step + out_begin of the result
  int most = 0;                                  // largest tap
};

// Space to lanes: [unit][channel][kG][phase y][rows][phase x][columns][4] in fp32. The 4 * kG lanes of a unit are the
// same position of as many images or, of small batches, strips of rows. Every shift by a tap is then a whole 16-byte
// vector, borders are zeros that lie there, and elements that a stride sees as neighbours are neighbours.
struct Lanes {
  int batch, channels;
  int lane_groups;             // kG
  int strips, strip_rows;      // of an image
  int units;
  int phases[2], rows, columns;  // `columns` even, so that rows begin at a 32-byte sector
  int plane;                   // vectors of 4 of one channel and lane group
};

// Of a plan's [slot | distance], the records of a call, in blocks of their own beside those that copy activations.
struct FillRecordsParams {
  const int32_t* plan;  // [n_records][2]
  const void* values;   // [n_vectors][vector]
  DType dtype;
  int n_records, n_vectors, vector, slices;
  int kernel_vector;    // kV
  unsigned char* records;
};

struct ToLanesParams {
  Lanes lanes;
  TapAxis axes[2];
  const void* source;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  DType dtype;
  float* to;
  uint32_t threads;  // of a unit: [ceil(channels / kLanesChannels)][kG][plane]
  Divisor columns, phases_w, rows, plane, lane_groups, strips;
  uint32_t blocks;         // of `threads`; those that come after fill records, if any
  FillRecordsParams fill;  // of no records: none
};
constexpr int kLanesThreads = 128;
constexpr int kLanesChannels = 4;  // that one thread copies, so that where a position lies is worked out once for them

// Sorts each packed row's entries by block of channels and stretches columns into distances within a staged tile.
struct RecordsParams {
  const void* values;
  DType dtype;
  const int32_t *crow, *col, *place;  // place: where the value of an entry lies, or null for [entry][vector]
  int row_groups, row_groups_per_group, vector, slices;  // slices of kV rows per row group
  bool interleaved;                                      // see Conv2dParams: the slices are the phases
  int n_vectors, n_values, channels_per_group, block_channels, blocks;
  TapAxis axes[2];
  int row_pitch, phase_pitch[2];  // within a staged plane, in vectors
  int plane, lane_groups;
  unsigned char* records;
  int32_t* starts;  // [slice][blocks + 1]
  int32_t* order;   // [groups][slices of a group], heaviest first
  int32_t* where;   // [n_vectors] record of each entry in the first slice, or null
  bool slots;       // of records of one value: in its place entry * slices + slice, of which to_lanes makes values
};

// A block's shared memory: two buffers of activations, two of records, then numbers. In bytes.
struct Conv2dShared {
  int records, starts, places, bytes;
  bool has_starts;
};

struct Conv2dParams {
  Lanes lanes;
  TapAxis axes[2];
  const float* input;  // in lanes
  const unsigned char* records;
  const int32_t *starts, *order, *row_indices;
  Conv2dShared shared;  // the launcher's
  int slices, slices_per_group, vector, rows_per_group, out_channels, channels_per_group, block_channels, blocks;
  int n_records;
  // Rectangles of 32 positions, whose staged plane is [phase y][tile_rows][phase x][tile_columns]; or `tiles_w` runs, a
  // `step` of positions apart in a plane of pitch tile_columns, staged as [phase y][phase x][run_length].
  int tile_h, tile_w, tiles_h, tiles_w, tile_rows, tile_columns;
  int step, run_length;
  int plane;                                      // of all phases, in shared memory
  int row_blocks;                                 // per group of the convolution
  const void *scale, *shift, *residual;           // [out_channels] and as the output, or null
  Activation activation;
  DType dtype;                                    // of output, scale, shift, residual
  void* output;
  int64_t out_n, out_c, out_h, out_w;             // strides of output and residual
  int out_size[2];
  // Tiles hold whole rows of results, each of which begins where the one before ends.
  bool joined;
  // The four lanes are neighbours in a plane, images are `out_n` apart and channels `out_c`.
  bool flat;
  // A row's four slices are the phases (y, x) of its results, of which position (y, x) has one at
  // (2 * y, 2 * x) + phase.
  bool interleaved;
};

// What the kernels come in. A warp computes kGroups slices of kV rows at 32 * kRun positions of 4 * kG lanes. Its
// parts, if several, take entries of their own at all of these positions.
struct Conv2dVariant {
  int vector, lane_groups, groups, plane;  // plane 0: any
  int run = 1;                             // positions of a lane of a warp; 1: rectangles, more: runs
  int parts = 1;                           // of a warp: 1, 2 or 4
  bool operator==(const Conv2dVariant&) const = default;
};
// Of few sums there can be many warps, which is what a few positions want; of many sums a warp reads less.
constexpr Conv2dVariant kConv2dVariants[] = {
    {1, 4, 4, 64}, {1, 4, 4, 192}, {1, 2, 2, 64}, {1, 1, 4, 0, 1, 2}, {1, 1, 4, 0, 2}, {1, 1, 4, 0, 4},
    {2, 4, 2, 64}, {2, 2, 1, 64},  {2, 1, 4, 0},  {2, 1, 2, 0, 1, 2}, {2, 1, 2, 0, 2}, {2, 1, 2, 0, 4},
    {4, 4, 1, 64}, {4, 2, 1, 64},  {4, 1, 1, 0},  {4, 1, 2, 0},       {4, 1, 1, 0, 1, 4}, {4, 1, 1, 0, 2, 2},
    {4, 1, 1, 0, 4}, {8, 2, 1, 64}, {8, 1, 1, 0}, {8, 1, 1, 0, 1, 2}, {8, 1, 1, 0, 2},
};
constexpr int kConv2dWarps = 8;
// Of a record, and of two of them in shared memory; see conv2d_records.cuh.
constexpr int record_bytes(int vector) { return vector <= 2 ? 8 * vector : 4 * vector + 4; }
constexpr int pair_bytes(int vector) { return vector <= 2 ? 16 * vector : 8 * vector + 16; }
template <int kV>
constexpr int kPairBytes = pair_bytes(kV);
// Of a slice's entries in a block of channels, what is copied to shared memory along with the channels, two by two.
constexpr int staged_records(int vector) { return vector == 8 ? 24 : 32; }
template <int kV>
constexpr int kStagedRecords = staged_records(kV);
// Blocks of threads that are to live on a multiprocessor at once, by the sums that a lane keeps: as many as registers
// allow, since a warp alone waits most of the time.
constexpr int conv2d_resident(int sums, int vector, int parts) {  // sums: vectors of 4
  return sums > 8 || (sums == 8 && (vector == 8 || (vector == 2 && parts == 2))) ? 2 : 3;
}
constexpr int kMostStarts = 129;  // of a slice, that shared memory is spent on

constexpr Conv2dShared conv2d_shared(int buffer_vectors, int slices, int vector, int plane, int blocks) {
  Conv2dShared shared{};
  shared.records = 2 * buffer_vectors * 16;
  shared.starts = shared.records + slices * staged_records(vector) * pair_bytes(vector);  // two buffers
  shared.has_starts = blocks + 1 <= kMostStarts;
  shared.places = shared.starts + (shared.has_starts ? slices * (blocks + 1) * 4 : 0);
  shared.bytes = shared.places + plane * 4;
  return shared;
}

}  // namespace sparsekd::cuda

// Launchers: return a cudaError_t, 0 for success. `stream` is a cudaStream_t.
extern "C" {
int sparsekd_to_lanes(const sparsekd::cuda::ToLanesParams* params, void* stream);
int sparsekd_records(const sparsekd::cuda::RecordsParams* params, int kernel_vector, void* stream);
int sparsekd_conv2d(const sparsekd::cuda::Conv2dParams* params, const sparsekd::cuda::Conv2dVariant* variant, int warps,
                    int64_t grid_x, int grid_y, void* stream);
}
