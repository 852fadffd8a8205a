// conv2d and conv2d_fused on CUDA: checks, launches; the choice of kernel and tile is conv2d_choice.cpp's.
// Nothing here waits for the device. Indices are not looked at on the host: entries outside the pattern's range are
// left out by the kernel that prepares them, so that wrong indices give wrong numbers at worst.
#include "direct.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/silu.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "host.h"
#include "planar_host.h"

namespace sparsekd::cuda {

at::Tensor to_lanes(Call& call, const Lanes& lanes, const TapAxis (&axes)[2], const at::Tensor& images,
                    const char* name, const FillRecordsParams& fill) {
  const at::Tensor source = planar(call, images);
  const at::Tensor to = at::empty({int64_t(lanes.units) * lanes.channels * lanes.lane_groups, lanes.plane, 4},
                                  source.options().dtype(at::kFloat));
  const int64_t threads = ceil_div(int64_t(lanes.channels), kLanesChannels) * lanes.lane_groups * lanes.plane;
  const int64_t slots = int64_t(lanes.units) * lanes.lane_groups * 4, limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(threads <= limit && slots <= limit,
                    "Expected fewer than 2^31 vectors of 4 channels in lanes and strips of images, got ", threads,
                    " and ", slots);
  call.writes(to, name);
  ToLanesParams p{lanes, {axes[0], axes[1]}, source.const_data_ptr(), source.stride(0), source.stride(1),
                  source.stride(2), source.stride(3), dtype_of(source), to.mutable_data_ptr<float>(),
                  static_cast<uint32_t>(threads), Divisor(lanes.columns), Divisor(lanes.phases[1]),
                  Divisor(lanes.rows), Divisor(lanes.plane), Divisor(lanes.lane_groups), Divisor(lanes.strips),
                  static_cast<uint32_t>(ceil_div(threads, kLanesThreads)), fill};
  call.launched(sparsekd_to_lanes(&p, call.stream()));
  return to;
}

void fill_records(Call& call, const FillRecordsParams& fill) {
  ToLanesParams p{};
  p.lanes.units = 1;
  p.fill = fill;
  if (fill.n_records > 0) call.launched(sparsekd_to_lanes(&p, call.stream()));
}

RecordsParams records_params(const Problem& problem, const Pattern& pattern, const Choice& choice, int slices) {
  const int64_t blocks = ceil_div(problem.channels_per_group(), choice.block_channels);
  const int64_t n_vectors = pattern.col.size(0), limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(n_vectors * slices <= limit && problem.row_groups * slices * (blocks + 1) <= limit,
                    "Expected fewer than 2^31 packed rows, got ", n_vectors * slices);
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
  p.interleaved = problem.interleaved;
  p.n_vectors = int(n_vectors);
  p.n_values = pattern.values.defined() ? int(pattern.values.numel()) : 0;
  p.channels_per_group = int(problem.channels_per_group());
  p.block_channels = int(choice.block_channels);
  p.blocks = int(blocks);
  std::copy_n(problem.axes, 2, p.axes);
  p.row_pitch = choice.row_pitch;
  std::copy_n(choice.phase_pitch, 2, p.phase_pitch);
  p.plane = choice.variant.plane ? choice.variant.plane : choice.plane;
  p.lane_groups = choice.variant.lane_groups;
  return p;
}

Records make_records(Call& call, const Problem& problem, const Pattern& pattern, const Choice& choice, int slices,
                     int kernel_vector) {
  RecordsParams p = records_params(problem, pattern, choice, slices);
  const int64_t n_records = int64_t(p.n_vectors) * slices, all_slices = problem.row_groups * slices;
  const auto ints = pattern.crow.options();
  const Records made{
      at::empty({std::max<int64_t>(n_records, 1), record_bytes(kernel_vector)}, ints.dtype(at::kByte)),
      at::empty({all_slices, p.blocks + 1}, ints), at::empty({all_slices}, ints)};
  call.writes(made.records, "records");
  call.writes(made.starts, "starts");
  call.writes(made.order, "order");
  p.records = made.records.mutable_data_ptr<uint8_t>();
  p.starts = made.starts.mutable_data_ptr<int32_t>();
  p.order = made.order.mutable_data_ptr<int32_t>();
  p.where = pattern.where.defined() ? pattern.where.mutable_data_ptr<int32_t>() : nullptr;
  call.launched(sparsekd_records(&p, kernel_vector, call.stream()));
  return made;
}

int64_t slices_of(const Problem& problem, const Choice& choice) {
  return problem.interleaved ? 4 : ceil_div(problem.vector, choice.variant.vector);
}

void run_prepared(Call& call, const Problem& problem, const Choice& c, int64_t n_vectors,
                  const at::Tensor& lanes, const at::Tensor& rows, const Records& records, const Finish& finish,
                  const at::Tensor& output) {
  const int64_t slices = slices_of(problem, c), slices_per_group = problem.row_groups * slices / problem.groups;
  const int64_t warps = c.warps, limit = std::numeric_limits<int32_t>::max();
  const bool later = problem.flat && (finish.activation == Activation::silu ||
                                      finish.activation == Activation::hardswish);
  Conv2dParams p{};
  describe(p, problem, rows, c, records, lanes, slices);
  p.slices_per_group = int(slices_per_group);
  p.n_records = int(n_vectors * slices);
  p.step = c.step;
  p.run_length = c.run_length;
  p.row_blocks = int(ceil_div(slices_per_group, warps * c.variant.groups));
  p.scale = data_of(finish.scale);
  p.shift = data_of(finish.shift);
  p.residual = data_of(finish.residual);
  p.activation = later ? Activation::none : finish.activation;
  p.dtype = dtype_of(output);
  p.output = output.mutable_data_ptr();
  p.out_n = output.stride(0);
  p.out_c = output.stride(1);
  p.out_h = output.stride(2);
  p.out_w = output.stride(3);
  for (int d = 0; d < 2; ++d) p.out_size[d] = int(output_size(problem, d));
  p.joined = c.joined;
  p.flat = problem.flat;
  p.interleaved = problem.interleaved;
  const int64_t grid_x = int64_t(c.lanes.units) * p.tiles_h * p.tiles_w, grid_y = problem.groups * p.row_blocks;
  TORCH_CHECK_VALUE(grid_x <= limit && grid_y <= 65535, "Expected fewer than 65536 blocks of output channels, got ",
                    grid_y);
  call.launched(sparsekd_conv2d(&p, &c.variant, int(warps), grid_x, int(grid_y), call.stream()));
  if (!later) return;
  at::Tensor results = output;  // what is written to a flat plane is only cut
  finish.activation == Activation::silu ? at::silu_(results) : at::hardswish_(results);
}

namespace {

void run_to_planes(Call& call, const Problem& given, const Pattern& pattern, const at::Tensor& input,
                   const Finish& finish, const at::Tensor& output) {
  if (given.vector >= 8 && input.element_size() == 2 && !pattern.place.defined() &&
      run_on_tensor_cores(call,
                          {given.batch, given.in_channels, given.out_channels, given.groups, given.vector,
                           given.row_groups, pattern.col.size(0), {given.axes[0], given.axes[1]}},
                          pattern.crow, pattern.col,
                          {input, pattern.values, {}, pattern.rows, finish.scale, finish.shift, finish.residual, output,
                           finish.activation})) {
    return;
  }
  bool flat = has_flat_planes(given);
  for (const at::Tensor& t : {input, output, finish.residual}) flat = flat && (!t.defined() || is_flat(t));
  const Problem problem = flat ? flattened(given) : given;
  const Choice c = checked_choice(tensor_device(call, input), problem, pattern.col.size(0), output);
  const at::Tensor lanes = problem.flat ? input : to_lanes(call, c.lanes, problem.axes, input, "lanes");
  const Records records = make_records(call, problem, pattern, c, int(slices_of(problem, c)), c.variant.vector);
  run_prepared(call, problem, c, pattern.col.size(0), lanes, pattern.rows, records, finish, output);
}

}  // namespace

void run(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input, const Finish& finish,
         const at::Tensor& output) {
  run_planar(call, output, finish.residual, [&](const at::Tensor& to, const at::Tensor& residual) {
    run_to_planes(call, problem, pattern, input, {finish.scale, finish.shift, residual, finish.activation}, to);
  });
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
  const auto size = shape.output_size();
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
