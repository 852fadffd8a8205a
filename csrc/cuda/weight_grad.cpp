// The weight gradient of conv2d on CUDA: checks, how the tiles are shared among blocks, launches.
#include "weight_grad.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <limits>

#include "direct.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // that fill any GPU; not of the one at hand, so that sums don't depend on it
constexpr int64_t kPartialBytes = int64_t{64} << 20;  // for the sums of the blocks, at most

}  // namespace

void run_weight_grad(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input,
                     const at::Tensor& grad_output, const at::Tensor& grad_values) {
  const Choice c = checked_choice(tensor_device(call, input), problem, pattern.col.size(0));
  const int64_t slices = ceil_div(problem.vector, c.variant.vector), n_vectors = pattern.col.size(0);
  const int64_t row_groups_per_group = problem.row_groups / problem.groups;
  const int64_t slices_per_group = row_groups_per_group * slices, limit = std::numeric_limits<int32_t>::max();
  const at::Tensor input_lanes = to_lanes(call, c.lanes, problem.axes, input, "lanes");
  const Lanes of_output = lanes_of_output(c, problem);
  TapAxis plain[2];
  for (int d = 0; d < 2; ++d) plain[d].size = plain[d].positions = problem.axes[d].positions;
  const at::Tensor grad_lanes = to_lanes(call, of_output, plain, grad_output, "lanes of the gradient");
  // Distances alone; entries that no pattern made by `pack` holds have no record.
  Pattern distances{{}, pattern.crow, pattern.col, {}, {}, at::full({n_vectors}, -1, pattern.crow.options())};
  call.updates(distances.where, "where");
  Problem of_distances = problem;
  of_distances.vector = 1;
  const Records records = make_records(call, of_distances, distances, c, 1, 1);

  const int64_t groups = weight_grad_groups(c.variant);
  const int64_t warps = std::clamp<int64_t>(ceil_div(slices_per_group, groups), 1, kConv2dWarps);
  WeightGradParams p{};
  describe(p, problem, pattern.rows, c, records, input_lanes, slices);
  p.grad = grad_lanes.const_data_ptr<float>();
  p.grad_columns = of_output.columns;
  p.grad_plane = of_output.plane;
  p.row_groups_per_group = int(row_groups_per_group);
  p.n_records = int(n_vectors);
  p.row_blocks = int(ceil_div(slices_per_group, warps * groups));
  const int64_t tiles = int64_t(c.lanes.units) * p.tiles_h * p.tiles_w;
  const int64_t grid_y = problem.groups * p.row_blocks;
  TORCH_CHECK_VALUE(grid_y <= 65535, "Expected fewer than 65536 blocks of output channels, got ", grid_y);
  TORCH_CHECK_VALUE(grad_values.numel() <= limit && tiles <= limit, "Expected fewer than 2^31 values and tiles, got ",
                    grad_values.numel(), " and ", tiles);
  p.tiles = int(tiles);
  const int64_t fit = std::max<int64_t>(kPartialBytes / 4 / grad_values.numel(), 1);
  p.splits = int(std::min({tiles, ceil_div(kBlocks, grid_y), fit}));
  const at::Tensor partial = at::empty({p.splits, n_vectors, problem.vector}, input_lanes.options());
  call.writes(partial, "partial sums");
  p.partial = partial.mutable_data_ptr<float>();
  call.launched(sparsekd_weight_grad(&p, &c.variant, int(warps), int(grid_y), call.stream()));

  WeightGradSumParams sum{p.partial, distances.where.const_data_ptr<int32_t>(), int(n_vectors), p.vector, p.splits,
                          dtype_of(grad_values), grad_values.mutable_data_ptr()};
  call.launched(sparsekd_weight_grad_sum(&sum, call.stream()));
}

namespace {

at::Tensor conv2d_weight_grad_cuda(const at::Tensor& input, const at::Tensor& grad_output, const at::Tensor& crow,
                                   const at::Tensor& col, const OptionalTensor& rows, int64_t vector,
                                   at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, int64_t groups) {
  check_device(input, "input");
  check_type(input, "input");
  check_same(grad_output, "grad_output", input, "input");
  const Conv2dShape shape =
      checked_grad_shape(grad_output, input.sizes(), kernel_size, stride, padding, dilation, groups);
  const int64_t out_channels = shape.out_channels;
  const int64_t row_groups = checked_row_groups(crow, col, rows, input, out_channels, groups, vector);
  const at::Tensor grad_values = at::empty({col.size(0), vector}, input.options());
  if (grad_values.numel() == 0) return grad_values;
  if (shape.batch == 0) return grad_values.zero_();
  const Problem problem{shape.batch, shape.in_channels, out_channels, groups, vector, row_groups,
                        {forward_axis(shape, 0), forward_axis(shape, 1)}};
  const Pattern pattern{{}, crow, col, {}, rows.value_or(at::Tensor()), {}};
  Call call(input);
  call.reads(input, "input");
  call.reads(grad_output, "grad_output");
  read_pattern(call, pattern);
  call.writes(grad_values, "output gradient");
  run_weight_grad(call, problem, pattern, input, grad_output, grad_values);
  call.finish();
  return grad_values;
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) { m.impl("conv2d_weight_grad", &sparsekd::cuda::conv2d_weight_grad_cuda); }
