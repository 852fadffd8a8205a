// conv2d, conv2d_fused and the input gradient on CUDA: checks, the choice of kernel and tile, launches.
// Nothing here waits for the device. Indices are not looked at on the host: entries outside the pattern's range are left
// out by the kernel that prepares them, so that wrong indices give wrong numbers at worst.
#include "conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

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

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kStageBytes = 32 << 10;      // of each of two buffers, so that two blocks share an SM
constexpr int64_t kMostStageBytes = 48 << 10;  // for kernels with so wide a reach that one channel needs more

// What one launch of the convolution computes.
struct Problem {
  int64_t batch, in_channels, out_channels, groups, vector, row_groups;
  TapAxis axes[2];
  int64_t channels_per_group() const { return in_channels / groups; }
};

struct Choice {
  Conv2dVariant variant;
  Lanes lanes;
  int tile_h, tile_w, tile_rows, tile_columns, plane;
  int64_t block_channels;
  double cost;
};

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
    for (const auto& [tile_h, tile_w] : {std::pair{4, 8}, std::pair{2, 16}, std::pair{1, 32}}) {
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
      const int64_t columns = round_up(ax.positions + ax.most / ax.stride, 2);
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

DType dtype_of(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf ? DType::float16 : t.scalar_type() == at::kBFloat16 ? DType::bfloat16 : DType::float32;
}

const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

struct Pattern {
  at::Tensor values, crow, col, place, rows;
};

struct Finish {
  at::Tensor scale, shift, residual;
  Activation activation = Activation::none;
};

// One convolution into `output`, whose elements at axes' out_begin + i * out_step it writes.
void run(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input, const Finish& finish,
         const at::Tensor& output) {
  if (problem.vector >= 8 && input.element_size() == 2 && !pattern.place.defined() &&
      run_on_tensor_cores(call, {problem.batch, problem.in_channels, problem.out_channels, problem.groups,
                                 problem.row_groups, {problem.axes[0], problem.axes[1]}, input, pattern.values,
                                 pattern.crow, pattern.col, pattern.rows, finish.scale, finish.shift, finish.residual,
                                 output, finish.activation})) {
    return;
  }
  const std::optional<Choice> chosen = choose(problem);
  TORCH_CHECK_NOT_IMPLEMENTED(chosen, "Expected a kernel whose reach (dilation * (size - 1), here ",
                              problem.axes[0].most, " by ", problem.axes[1].most,
                              ") fits a tile in shared memory: conv2d on cuda has no kernel for it");
  const Choice& c = *chosen;
  const int64_t slices = ceil_div(problem.vector, c.variant.vector);
  const int64_t all_slices = problem.row_groups * slices, slices_per_group = all_slices / problem.groups;
  const int64_t blocks = ceil_div(problem.channels_per_group(), c.block_channels);
  const int64_t n_vectors = pattern.col.size(0), record = record_bytes(c.variant.vector);
  const int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(n_vectors * slices <= limit && all_slices * (blocks + 1) <= limit, "Expected fewer than 2^31 packed rows, got ", n_vectors * slices);

  const auto bytes = input.options().dtype(at::kByte), ints = input.options().dtype(at::kInt);
  const at::Tensor lanes = at::empty({int64_t(c.lanes.units) * c.lanes.channels * c.variant.lane_groups, c.lanes.plane, 4},
                                     input.options().dtype(at::kFloat));
  const at::Tensor records = at::empty({std::max<int64_t>(n_vectors * slices, 1), record}, bytes);
  const at::Tensor starts = at::empty({all_slices, blocks + 1}, ints), order = at::empty({all_slices}, ints);
  call.writes(lanes, "lanes");
  call.writes(records, "records");
  call.writes(starts, "starts");
  call.writes(order, "order");

  ToLanesParams to_lanes{c.lanes, {problem.axes[0], problem.axes[1]}, input.const_data_ptr(), input.stride(0),
                         input.stride(1), input.stride(2), input.stride(3), dtype_of(input),
                         lanes.mutable_data_ptr<float>()};
  TORCH_CHECK_VALUE(lanes.numel() / 4 / 256 < limit, "Expected fewer than 2^39 activations, got ", lanes.numel());
  call.launched(sparsekd_to_lanes(&to_lanes, call.stream()));

  RecordsParams prepare{};
  prepare.values = data_of(pattern.values);
  prepare.dtype = dtype_of(pattern.values);
  prepare.crow = pattern.crow.const_data_ptr<int32_t>();
  prepare.col = static_cast<const int32_t*>(data_of(pattern.col));
  prepare.place = static_cast<const int32_t*>(data_of(pattern.place));
  prepare.row_groups = int(problem.row_groups);
  prepare.row_groups_per_group = int(problem.row_groups / problem.groups);
  prepare.vector = int(problem.vector);
  prepare.slices = int(slices);
  prepare.n_vectors = int(n_vectors);
  prepare.n_values = int(pattern.values.numel());
  prepare.channels_per_group = int(problem.channels_per_group());
  prepare.block_channels = int(c.block_channels);
  prepare.blocks = int(blocks);
  std::copy_n(problem.axes, 2, prepare.axes);
  prepare.phases_x = c.lanes.phases[1];
  prepare.tile_rows = c.tile_rows;
  prepare.tile_columns = c.tile_columns;
  prepare.plane = c.variant.plane ? c.variant.plane : c.plane;
  prepare.lane_groups = c.variant.lane_groups;
  prepare.records = records.mutable_data_ptr<uint8_t>();
  prepare.starts = starts.mutable_data_ptr<int32_t>();
  prepare.order = order.mutable_data_ptr<int32_t>();
  call.launched(sparsekd_records(&prepare, c.variant.vector, call.stream()));

  const int64_t warps = std::clamp<int64_t>(ceil_div(slices_per_group, c.variant.groups), 1, kConv2dWarps);
  Conv2dParams p{};
  p.lanes = c.lanes;
  std::copy_n(problem.axes, 2, p.axes);
  p.input = lanes.const_data_ptr<float>();
  p.records = prepare.records;
  p.starts = prepare.starts;
  p.order = prepare.order;
  p.row_indices = static_cast<const int32_t*>(data_of(pattern.rows));
  p.slices = int(slices);
  p.slices_per_group = int(slices_per_group);
  p.vector = int(problem.vector);
  p.rows_per_group = int(problem.out_channels / problem.groups);
  p.out_channels = int(problem.out_channels);
  p.channels_per_group = prepare.channels_per_group;
  p.block_channels = prepare.block_channels;
  p.blocks = prepare.blocks;
  p.n_records = int(n_vectors * slices);
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

void check_device(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(on_device(t), "Expected ", name, " on ", device_name(), ", got ", t.device());
}

void check_type(const at::Tensor& t, const char* name) {
  check_floating(t, name);
  TORCH_CHECK_TYPE(t.scalar_type() != at::kDouble, "Expected ", name,
                   " of dtype Float, Half or BFloat16 on cuda, got Double: float64 is computed on the CPU alone");
}

int64_t checked_row_groups(const at::Tensor& crow, const at::Tensor& col, const OptionalTensor& rows,
                           const at::Tensor& like, int64_t out_channels, int64_t groups, int64_t vector) {
  TORCH_CHECK_VALUE(vector >= 1, "Expected values of shape [n_vectors, V] with V >= 1, got V = ", vector);
  TORCH_CHECK_VALUE(out_channels >= groups && out_channels % groups == 0,
                    "Expected a number of output channels divisible by groups, got ", out_channels, " and groups=", groups);
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

at::Tensor checked_channels(const OptionalTensor& t, const char* name, const at::Tensor& input, int64_t channels) {
  if (!t) return {};
  check_dim(*t, name, 1);
  check_size(*t, name, 0, channels, "output channels");
  check_same(*t, name, input, "input");
  return t->contiguous();
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
    TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(size), "Expected a residual of the output's shape ",
                      at::IntArrayRef(size), ", got ", residual->sizes());
    check_same(*residual, "residual", input, "input");
    finish.residual = residual->contiguous(format);
  }
  const at::Tensor output = at::empty(size, input.options().memory_format(format));
  if (output.numel() == 0) return output;
  const Problem problem{shape.batch, shape.in_channels, out_channels, groups, vector, row_groups,
                        {forward_axis(shape, 0), forward_axis(shape, 1)}};
  const Pattern pattern{values.contiguous(), crow, col, {}, rows.value_or(at::Tensor())};
  Call call(input);
  call.reads(input, "input");
  call.reads(pattern.values, "values");
  call.reads(crow, "crow_indices");
  call.reads(col, "col_indices");
  call.reads(pattern.rows, "row_indices");
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
