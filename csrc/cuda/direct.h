// The direct convolution on CUDA cores, as its operators share it: the forward, the input gradient, the weight gradient
// and linear's three. Its kernels are in conv2d.cuh, its host side in conv2d.cpp and conv2d_choice.cpp.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../geometry.h"
#include "conv2d.h"
#include "conv2d_tensor_host.h"
#include "host.h"

namespace sparsekd::cuda {

using OptionalTensor = std::optional<at::Tensor>;

// Of images, the sectors of 32 bytes that each of so many stored elements side by side takes, where as many or `apart`
// lie between the first ones. What does not begin where a sector does takes up to one more. Of tiles that take about as
// long as the best one, the one that stores fewest sectors is taken: so exact no model is.
constexpr double kAsGood = 1.06;

inline double sectors_of_each(int64_t element_size, int64_t elements, int64_t apart) {
  const int64_t bytes = elements * element_size, border = std::gcd(std::gcd(bytes, apart * element_size), int64_t{32});
  return static_cast<double>(bytes + 32 - border) / static_cast<double>(elements) / 32;
}

// The phases of a stride that taps read, up to the last of them.
inline int phases_of(const TapAxis& axis) {
  int most = 0;
  for (int r = 0; r < axis.kernel; ++r) {
    const int t = axis.add + r * axis.mult;
    if (t % axis.div == 0) most = std::max(most, (t / axis.div - axis.least) % axis.stride);
  }
  return most + 1;
}

// What one launch of the convolution computes.
struct Problem {
  int64_t batch, in_channels, out_channels, groups, vector, row_groups;
  TapAxis axes[2];
  // Each position has the results of 2 x 2 phases, of which the output has so many; see Conv2dParams.
  bool interleaved = false;
  int64_t output_size[2] = {};
  // Of a 1 x 1 convolution of planes that lie in one piece: a lane is not an image but one of four neighbours, so that
  // the images lie in lanes as they are. See flattened().
  bool flat = false;
  int64_t channels_per_group() const { return in_channels / groups; }
};

inline int64_t output_size(const Problem& problem, int d) {
  return problem.interleaved ? problem.output_size[d] : problem.axes[d].positions;
}

// See Conv2dParams and RecordsParams.
struct Choice {
  Conv2dVariant variant;
  Lanes lanes;
  int tile_h = 1, tile_w = 1, tiles_h, tiles_w, tile_rows, tile_columns;
  int step, run_length;
  bool joined = false;
  int row_pitch, phase_pitch[2], plane;
  int64_t block_channels, warps;  // warps: of a block
  double cost, sectors;  // of a result that is stored
};

// The one of least cost, or of fewest sectors among those nearly as good.
template <class Candidate>
std::optional<Candidate> best_of(const std::vector<Candidate>& candidates) {
  double least = std::numeric_limits<double>::infinity();
  for (const Candidate& c : candidates) least = std::min(least, c.cost);
  const Candidate* best = nullptr;
  for (const Candidate& c : candidates) {
    if (c.cost > least * kAsGood) continue;
    if (!best || std::pair(c.sectors, c.cost) < std::pair(best->sectors, best->cost)) best = &c;
  }
  return best ? std::optional<Candidate>(*best) : std::nullopt;
}

struct Pattern {
  at::Tensor values, crow, col, place, rows;
  at::Tensor where;  // if defined, takes the record of each entry
};

struct Finish {
  at::Tensor scale, shift, residual;
  Activation activation = Activation::none;
};

struct Records {
  at::Tensor records, starts, order;
};

// For results that are stored to `output`, if defined; else of rectangles. None where no tile of any kernel has the
// reach.
std::optional<Choice> choose(const TensorDevice& device, const Problem& problem, int64_t n_vectors,
                             const at::Tensor& output = {});
Choice checked_choice(const TensorDevice& device, const Problem& problem, int64_t n_vectors,
                      const at::Tensor& output = {});

// A 1 x 1 convolution of stride 1 and no padding, of planes of a multiple of four elements, can run on them as they lie:
// four neighbours are then what four images else are. Where input, output and residual allow it nothing is copied to
// lanes, and results leave by vectors.
bool has_flat_planes(const Problem& problem);
bool is_flat(const at::Tensor& t);
Problem flattened(const Problem& problem);

// How the output lies in the same lanes, strips and units, without a halo.
Lanes lanes_of_output(const Choice& choice, const Problem& problem);
// `source` [N, C, H, W] in the lanes of a choice.
at::Tensor to_lanes(Call& call, const Lanes& lanes, const TapAxis (&axes)[2], const at::Tensor& source,
                    const char* name, const FillRecordsParams& fill = {});
// The records of a plan alone, where nothing is copied.
void fill_records(Call& call, const FillRecordsParams& fill);
// All but where they go.
RecordsParams records_params(const Problem& problem, const Pattern& pattern, const Choice& choice, int slices);
Records make_records(Call& call, const Problem& problem, const Pattern& pattern, const Choice& choice, int slices,
                     int kernel_vector);
// Slices of the kernel's rows that each group of rows has.
int64_t slices_of(const Problem& problem, const Choice& choice);
// The convolution itself, of activations in lanes. `rows`: row_indices, or undefined.
void run_prepared(Call& call, const Problem& problem, const Choice& choice, int64_t n_vectors, const at::Tensor& lanes,
                  const at::Tensor& rows, const Records& records, const Finish& finish, const at::Tensor& output);

// What the parameters of the convolution and of its weight gradient have in common. `lanes` are the input's.
template <class Params>
void describe(Params& p, const Problem& problem, const at::Tensor& rows, const Choice& choice, const Records& records,
              const at::Tensor& lanes, int64_t slices) {
  p.lanes = choice.lanes;
  std::copy_n(problem.axes, 2, p.axes);
  p.input = lanes.const_data_ptr<float>();
  p.records = records.records.const_data_ptr<uint8_t>();
  p.starts = records.starts.const_data_ptr<int32_t>();
  p.order = records.order.const_data_ptr<int32_t>();
  p.row_indices = static_cast<const int32_t*>(data_of(rows));
  p.slices = int(slices);
  p.vector = int(problem.vector);
  p.rows_per_group = int(problem.out_channels / problem.groups);
  p.out_channels = int(problem.out_channels);
  p.channels_per_group = int(problem.channels_per_group());
  p.block_channels = int(choice.block_channels);
  p.blocks = int(ceil_div(problem.channels_per_group(), choice.block_channels));
  p.tile_h = choice.tile_h;
  p.tile_w = choice.tile_w;
  p.tiles_h = choice.tiles_h;
  p.tiles_w = choice.tiles_w;
  p.tile_rows = choice.tile_rows;
  p.tile_columns = choice.tile_columns;
  p.plane = choice.plane;
}

// grad_values [n_vectors, V] of one convolution.
void run_weight_grad(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input,
                     const at::Tensor& grad_output, const at::Tensor& grad_values);

// The pattern that the input gradient walks; made from the weight's where there is no plan, for which the host waits.
Pattern transposed(const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows,
                   const OptionalTensor& transpose, int64_t out_channels, int64_t in_channels, int64_t taps,
                   int64_t groups);

// One convolution into `output`, whose elements at axes' out_begin + i * out_step it writes; all of them, if it lies in
// channels-last order.
void run(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input, const Finish& finish,
         const at::Tensor& output);

inline void read_pattern(Call& call, const Pattern& pattern) {
  call.reads(pattern.values, "values");
  call.reads(pattern.crow, "crow_indices");
  call.reads(pattern.col, "col_indices");
  call.reads(pattern.place, "places of values");
  call.reads(pattern.rows, "row_indices");
}

// The number of row groups, after a look at the pattern's shapes and types.
inline int64_t checked_row_groups(const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows,
                           const at::Tensor& like, int64_t out_channels, int64_t groups, int64_t vector) {
  TORCH_CHECK_VALUE(vector >= 1, "Expected values of shape [n_vectors, V] with V >= 1, got V = ", vector);
  TORCH_CHECK_VALUE(out_channels >= groups && out_channels % groups == 0,
                    "Expected a number of output channels divisible by groups, got ", out_channels,
                    " and groups=", groups);
  const int64_t most = std::max<int64_t>(out_channels / groups, 1024);
  TORCH_CHECK_VALUE(vector <= most, "Expected V of at most ", most, " for ", out_channels / groups,
                    " output channels per group, got V = ", vector);
  check_indices(crow, "crow_indices", like);
  check_indices(col, "col_indices", like);
  const int64_t row_groups = groups * ceil_div(out_channels / groups, vector);
  check_size(crow, "crow_indices", 0, row_groups + 1, "row groups + 1");
  if (rows) {
    check_indices(*rows, "row_indices", like);
    check_size(*rows, "row_indices", 0, out_channels, "output channels");
  }
  return row_groups;
}

TapAxis forward_axis(const Conv2dShape& shape, int d);

}  // namespace sparsekd::cuda
