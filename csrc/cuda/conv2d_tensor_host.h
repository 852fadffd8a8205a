// The convolution on tensor cores, as its operators call it: a tiling is chosen on the host, from it and a pattern a
// plan is made on the device, and with both a convolution is run.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "conv2d_tensor.h"
#include "host.h"

namespace sparsekd::cuda {

struct TensorProblem {
  int64_t batch, in_channels, out_channels, groups, vector, row_groups, n_vectors;
  TapAxis axes[2];
};

struct TensorDevice {
  int major, shared_bytes, multiprocessors;
};
TensorDevice tensor_device(Call& call, const at::Tensor& on);

// What a plan depends on beside the pattern and the geometry. Any fits any size of input, though not as well.
struct Tiling {
  TensorVariant variant;
  int row_warps, position_warps;
  // A tile is `positions()` places, one behind the other, of a stretch of `tile_w` columns. Its rows have `row_places`,
  // of which the last ones may lie behind the stretch: so many that no run of neighbours goes on in the next row, or
  // the zeros between rows. With as many as columns a tile that begins with a row is a rectangle.
  int tile_w, row_places, block_planes;
  int positions() const { return position_warps * variant.positions; }
  int64_t tiles_of_stretch(int64_t rows) const;
  std::vector<int64_t> numbers() const;
};

// What follows from a tiling.
struct Tile {
  int phases[2], tile_columns, plane, pitch, zeros, block_fours;
  int last_place;  // of a tile's positions in a staged plane
  int64_t slices, all_slices, slices_per_group, planes, blocks, block_slices, row_blocks, n_octets;
  Buffers buffers;
  int64_t resident(const Tiling& tiling, const TensorDevice& device) const;  // blocks of threads on a multiprocessor
  int64_t plan_ints() const;
  TensorPlan plan(const at::Tensor& ints) const;  // [order | starts | plane_at | distances | columns]
};
Tile tile_of(const TensorProblem& problem, const Tiling& tiling);
// In images whose rows lie one behind the other, eight places of a tile are always 16 bytes in a row.
bool direct_to_images(const TensorProblem& problem, const Tiling& tiling);

// How activations and results of images are cut before tiles are: strips of so many rows, eight of which are a unit.
struct Cut {
  int64_t strips, strip_rows, units;
};
enum class Results { lanes, images };
struct Chosen {
  Tiling tiling;
  double cycles;  // of a multiprocessor, by the model of costs that it was chosen by
};
// None, with the reason, where tensor cores can't take the convolution.
std::optional<Chosen> choose_tiling(const TensorProblem& problem, const TensorDevice& device, Results results,
                                    std::string& reason);
Cut cut_of(const TensorProblem& problem, Results results);
// Numbers from outside.
Tiling checked_tiling(at::IntArrayRef numbers, const TensorProblem& problem, const TensorDevice& device);

at::Tensor make_plan(Call& call, const TensorProblem& problem, const Tiling& tiling, const at::Tensor& crow,
                     const at::Tensor& col);

// Tensors that are not given are undefined. Input and output are [N, C, H, W], or in lanes [units, C, H, W, 8] with the
// strides of `lanes_strides`; the residual lies as the output.
struct TensorOperands {
  at::Tensor input, values, plan, rows, scale, shift, residual, output;
  Activation activation = Activation::none;
};
void run_planned(Call& call, const TensorProblem& problem, const Tiling& tiling, const TensorOperands& operands);

// Of [units, C, H, W, 8]: rows begin at a 32-byte sector.
std::vector<int64_t> lanes_strides(at::IntArrayRef size);

// False, with the reason counted and said once, where tensor cores can't take it: nothing was launched then.
bool run_on_tensor_cores(Call& call, const TensorProblem& problem, const at::Tensor& crow, const at::Tensor& col,
                         TensorOperands operands);

}  // namespace sparsekd::cuda

extern "C" {
// For benchmarks/predict.py: the tiling that is chosen for {batch, input and output channels, V, non-zero vectors,
// height and width of the output, kernel, stride} on a device {major, shared memory, multiprocessors}. How many numbers
// it has, or 0; `cycles` are those that a multiprocessor is expected to take.
int sparsekd_tensor_tiling(const int64_t* sizes, const int* device, int images, int64_t* numbers, double* cycles);
// Calls that ran on tensor cores, and calls with V >= 8 and 16-bit values that had to run on CUDA cores.
void sparsekd_conv2d_calls(int64_t* on_tensor_cores, int64_t* on_cuda_cores);
}
