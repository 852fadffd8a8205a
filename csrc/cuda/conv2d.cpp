// conv2d and conv2d_fused on CUDA: checks, the choice of kernel and tile, launches.
// Nothing here waits for the device. Indices are not looked at on the host: entries outside the pattern's range are left
// out by the kernel that prepares them, so that wrong indices give wrong numbers at worst.
#include "direct.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "host.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kStageBytes = 32 << 10;      // of each of two buffers, so that two blocks share an SM
constexpr int64_t kMostStageBytes = 48 << 10;  // for kernels with so wide a reach that one channel needs more

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Even, so that rows begin at a 32-byte sector; but a single column lies in one piece.
int64_t lane_columns(int64_t columns) { return columns == 1 ? 1 : round_up(columns, 2); }

int phases_of(const TapAxis& axis) {
  int most = 0;
  for (int r = 0; r < axis.kernel; ++r) {
    const int t = axis.add + r * axis.mult;
    if (t % axis.div == 0) most = std::max(most, (t / axis.div - axis.least) % axis.stride);
  }
  return most + 1;
}

// Positions in tiles of 32, images or strips in lanes: the way that computes least for nothing and reads least.
std::optional<Choice> choose(const Problem& problem) {
  const int64_t vector = problem.vector >= 8 ? 8 : problem.vector >= 3 ? 4 : problem.vector;
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const int phases[2] = {phases_of(ay), phases_of(ax)};
  std::optional<Choice> best;
  for (const Conv2dVariant& variant : kConv2dVariants) {
    if (variant.vector != vector) continue;
    const int64_t slots = 4 * variant.lane_groups;
    const int64_t wanted = std::clamp<int64_t>(ceil_div(slots, std::max<int64_t>(problem.batch, 1)), 1, ay.positions);
    const int64_t strip_rows = ceil_div(ay.positions, wanted), strips = ceil_div(ay.positions, strip_rows);
    const int64_t units = ceil_div(problem.batch * strips, slots);
    for (const auto& [tile_h, tile_w] : {std::pair{4, 8}, std::pair{2, 16}, std::pair{1, 32}, std::pair{32, 1}}) {
      if (tile_w == 1 && ax.positions > 1) continue;
      const int64_t tile_rows = tile_h + ay.most / ay.stride, tile_columns = tile_w + ax.most / ax.stride;
      const int64_t plane = phases[0] * tile_rows * phases[1] * tile_columns;
      if (variant.plane && plane > variant.plane) continue;
      const int64_t bytes = (variant.plane ? variant.plane : plane) * variant.lane_groups * 16;
      if (bytes > kMostStageBytes) continue;
      const int64_t computed = units * slots * round_up(strip_rows, tile_h) * round_up(ax.positions, tile_w);
      // Per non-zero, in reads of shared memory or what they take as long as: see the head of conv2d.cuh.
      const double reads = variant.lane_groups + 0.5, staged = 0.02 * static_cast<double>(plane);
      const double cost = static_cast<double>(computed) * (reads / variant.lane_groups + staged);
      if (best && best->cost <= cost) continue;
      Choice choice{variant, {}, tile_h, tile_w, int(tile_rows), int(tile_columns), int(plane), 0, cost};
      choice.block_channels = std::clamp<int64_t>(kStageBytes / bytes, 1, problem.channels_per_group());
      const int64_t columns = lane_columns(ax.positions + ax.most / ax.stride);
      const int64_t rows = strip_rows + ay.most / ay.stride;
      if (phases[0] * rows * phases[1] * columns > std::numeric_limits<int32_t>::max()) continue;
      choice.lanes = {int(problem.batch), int(problem.in_channels), variant.lane_groups, int(strips), int(strip_rows),
                      int(units), {phases[0], phases[1]}, int(rows), int(columns),
                      int(phases[0] * rows * phases[1] * columns)};
      best = choice;
    }
  }
  return best;
}

}  // namespace

Choice checked_choice(const Problem& problem) {
  const std::optional<Choice> chosen = choose(problem);
  TORCH_CHECK_NOT_IMPLEMENTED(chosen, "Expected a kernel whose reach (dilation * (size - 1), here ",
                              problem.axes[0].most, " by ", problem.axes[1].most,
                              ") fits a tile in shared memory: conv2d on cuda has no kernel for it");
  return *chosen;
}

Lanes lanes_of_output(const Choice& choice, const Problem& problem) {
  Lanes lanes = choice.lanes;
  lanes.channels = int(problem.out_channels);
  lanes.phases[0] = lanes.phases[1] = 1;
  lanes.rows = lanes.strip_rows;
  lanes.columns = int(lane_columns(problem.axes[1].positions));
  lanes.plane = lanes.rows * lanes.columns;
  return lanes;
}

at::Tensor to_lanes(Call& call, const Lanes& lanes, const TapAxis (&axes)[2], const at::Tensor& source,
                    const char* name) {
  const at::Tensor to = at::empty({int64_t(lanes.units) * lanes.channels * lanes.lane_groups, lanes.plane, 4},
                                  source.options().dtype(at::kFloat));
  TORCH_CHECK_VALUE(to.numel() / 4 / 256 < std::numeric_limits<int32_t>::max(), "Expected fewer than 2^39 activations, got ",
                    to.numel());
  call.writes(to, name);
  ToLanesParams p{lanes, {axes[0], axes[1]}, source.const_data_ptr(), source.stride(0), source.stride(1),
                  source.stride(2), source.stride(3), dtype_of(source), to.mutable_data_ptr<float>()};
  call.launched(sparsekd_to_lanes(&p, call.stream()));
  return to;
}

Records make_records(Call& call, const Problem& problem, const Pattern& pattern, const Choice& choice, int slices,
                     int kernel_vector) {
  const int64_t blocks = ceil_div(problem.channels_per_group(), choice.block_channels);
  const int64_t n_vectors = pattern.col.size(0), all_slices = problem.row_groups * slices;
  const int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(n_vectors * slices <= limit && all_slices * (blocks + 1) <= limit,
                    "Expected fewer than 2^31 packed rows, got ", n_vectors * slices);
  const auto ints = pattern.crow.options();
  const Records made{
      at::empty({std::max<int64_t>(n_vectors * slices, 1), record_bytes(kernel_vector)}, ints.dtype(at::kByte)),
      at::empty({all_slices, blocks + 1}, ints), at::empty({all_slices}, ints)};
  call.writes(made.records, "records");
  call.writes(made.starts, "starts");
  call.writes(made.order, "order");
  RecordsParams p{};
  p.values = data_of(pattern.values);
  p.dtype = pattern.values.defined() ? dtype_of(pattern.values) : DType::float32;
  p.crow = pattern.crow.const_data_ptr<int32_t>();
  p.col = static_cast<const int32_t*>(data_of(pattern.col));
  p.place = static_cast<const int32_t*>(data_of(pattern.place));
  p.row_groups = int(problem.row_groups);
  p.row_groups_per_group = int(problem.row_groups / problem.groups);
  p.vector = int(problem.vector);
  p.slices = slices;
  p.n_vectors = int(n_vectors);
  p.n_values = pattern.values.defined() ? int(pattern.values.numel()) : 0;
  p.channels_per_group = int(problem.channels_per_group());
  p.block_channels = int(choice.block_channels);
  p.blocks = int(blocks);
  std::copy_n(problem.axes, 2, p.axes);
  p.phases_x = choice.lanes.phases[1];
  p.tile_rows = choice.tile_rows;
  p.tile_columns = choice.tile_columns;
  p.plane = choice.variant.plane ? choice.variant.plane : choice.plane;
  p.lane_groups = choice.variant.lane_groups;
  p.records = made.records.mutable_data_ptr<uint8_t>();
  p.starts = made.starts.mutable_data_ptr<int32_t>();
  p.order = made.order.mutable_data_ptr<int32_t>();
  p.where = pattern.where.defined() ? pattern.where.mutable_data_ptr<int32_t>() : nullptr;
  call.launched(sparsekd_records(&p, kernel_vector, call.stream()));
  return made;
}

// One convolution into `output`, whose elements at axes' out_begin + i * out_step it writes.
void run(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input, const Finish& finish,
         const at::Tensor& output) {
  if (problem.vector >= 8 && input.element_size() == 2 && !pattern.place.defined() &&
      run_on_tensor_cores(call,
                          {problem.batch, problem.in_channels, problem.out_channels, problem.groups, problem.vector,
                           problem.row_groups, pattern.col.size(0), {problem.axes[0], problem.axes[1]}},
                          pattern.crow, pattern.col,
                          {input, pattern.values, {}, pattern.rows, finish.scale, finish.shift, finish.residual, output,
                           finish.activation})) {
    return;
  }
  const Choice c = checked_choice(problem);
  const int64_t slices = ceil_div(problem.vector, c.variant.vector);
  const int64_t slices_per_group = problem.row_groups * slices / problem.groups;
  const int64_t blocks = ceil_div(problem.channels_per_group(), c.block_channels);
  const int64_t limit = std::numeric_limits<int32_t>::max();
  const at::Tensor lanes = to_lanes(call, c.lanes, problem.axes, input, "lanes");
  const Records records = make_records(call, problem, pattern, c, int(slices), c.variant.vector);

  const int64_t warps = std::clamp<int64_t>(ceil_div(slices_per_group, c.variant.groups), 1, kConv2dWarps);
  Conv2dParams p{};
  p.lanes = c.lanes;
  std::copy_n(problem.axes, 2, p.axes);
  p.input = lanes.const_data_ptr<float>();
  p.records = records.records.const_data_ptr<uint8_t>();
  p.starts = records.starts.const_data_ptr<int32_t>();
  p.order = records.order.const_data_ptr<int32_t>();
  p.row_indices = static_cast<const int32_t*>(data_of(pattern.rows));
  p.slices = int(slices);
  p.slices_per_group = int(slices_per_group);
  p.vector = int(problem.vector);
  p.rows_per_group = int(problem.out_channels / problem.groups);
  p.out_channels = int(problem.out_channels);
  p.channels_per_group = int(problem.channels_per_group());
  p.block_channels = int(c.block_channels);
  p.blocks = int(blocks);
  p.n_records = int(pattern.col.size(0) * slices);
  p.tile_h = c.tile_h;
  p.tile_w = c.tile_w;
  p.tiles_h = int(ceil_div(c.lanes.strip_rows, c.tile_h));
  p.tiles_w = int(ceil_div(problem.axes[1].positions, c.tile_w));
  p.tile_rows = c.tile_rows;
  p.tile_columns = c.tile_columns;
  p.plane = c.plane;
  p.row_blocks = int(ceil_div(slices_per_group, warps * c.variant.groups));
  p.scale = data_of(finish.scale);
  p.shift = data_of(finish.shift);
  p.residual = data_of(finish.residual);
  p.activation = finish.activation;
  p.dtype = dtype_of(output);
  p.output = output.mutable_data_ptr();
  p.out_n = output.stride(0);
  p.out_c = output.stride(1);
  p.out_h = output.stride(2);
  p.out_w = output.stride(3);
  const int64_t grid_x = int64_t(c.lanes.units) * p.tiles_h * p.tiles_w, grid_y = problem.groups * p.row_blocks;
  TORCH_CHECK_VALUE(grid_x <= limit && grid_y <= 65535, "Expected fewer than 65536 blocks of output channels, got ", grid_y);
  call.launched(sparsekd_conv2d(&p, &c.variant, int(warps), grid_x, int(grid_y), call.stream()));
}

TapAxis forward_axis(const Conv2dShape& shape, int d) {
  TapAxis axis;
  axis.kernel = int(shape.kernel[d]);
  axis.mult = int(shape.dilation[d]);
  axis.stride = int(shape.stride[d]);
  axis.origin = -int(shape.padding[d]);
  axis.size = int(shape.input[d]);
  axis.positions = int(shape.output[d]);
  axis.most = axis.mult * (axis.kernel - 1);
  return axis;
}

namespace {

at::Tensor run_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col,
                      const OptionalTensor& rows, const OptionalTensor& scale, const OptionalTensor& shift,
                      const char* shift_name, const OptionalTensor& residual, Activation activation,
                      int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_device(input, "input");
  check_type(input, "input");
  const Conv2dShape shape = checked_shape(input.sizes(), out_channels, kernel_size, stride, padding, dilation, groups);
  check_values(values, input, "input", col);
  const int64_t vector = values.size(1);
  const int64_t row_groups = checked_row_groups(crow, col, rows, input, out_channels, groups, vector);
  Finish finish{checked_channels(scale, "scale", input, out_channels),
                checked_channels(shift, shift_name, input, out_channels), {}, activation};
  const auto format = input.suggest_memory_format();
  const int64_t size[] = {shape.batch, out_channels, shape.output[0], shape.output[1]};
  if (residual) {
    check_residual(*residual, size, input);
    finish.residual = residual->contiguous(format);
  }
  const at::Tensor output = at::empty(size, input.options().memory_format(format));
  if (output.numel() == 0) return output;
  const Problem problem{shape.batch, shape.in_channels, out_channels, groups, vector, row_groups,
                        {forward_axis(shape, 0), forward_axis(shape, 1)}};
  const Pattern pattern{values.contiguous(), crow, col, {}, rows.value_or(at::Tensor()), {}};
  Call call(input);
  call.reads(input, "input");
  read_pattern(call, pattern);
  call.reads(finish.scale, "scale");
  call.reads(finish.shift, "shift");
  call.reads(finish.residual, "residual");
  call.writes(output, "output");
  run(call, problem, pattern, input, finish, output);
  call.finish();
  return output;
}

at::Tensor conv2d_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col,
                       const OptionalTensor& rows, const OptionalTensor&, const OptionalTensor& bias,
                       int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run_conv2d(input, values, crow, col, rows, {}, bias, "bias", {}, Activation::none, out_channels, kernel_size,
                    stride, padding, dilation, groups);
}

at::Tensor conv2d_fused_cuda(const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow,
                             const at::Tensor& col, const OptionalTensor& rows, const OptionalTensor& scale,
                             const OptionalTensor& shift, const OptionalTensor& residual, c10::string_view activation,
                             int64_t out_channels, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return run_conv2d(input, values, crow, col, rows, scale, shift, "shift", residual, activation_of(activation),
                    out_channels, kernel_size, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace sparsekd::cuda

SPARSEKD_CUDA_LIBRARY(m) {
  m.impl("conv2d", &sparsekd::cuda::conv2d_cuda);
  m.impl("conv2d_fused", &sparsekd::cuda::conv2d_fused_cuda);
}
