// conv2d and conv2d_fused on CUDA: checks, the choice of kernel and tile, launches.
// Nothing here waits for the device. Indices are not looked at on the host: entries outside the pattern's range are
// left out by the kernel that prepares them, so that wrong indices give wrong numbers at worst.
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
#include "planar_host.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kStageBytes = 32 << 10;      // of each of two buffers, so that two blocks share an SM
constexpr int64_t kMostStageBytes = 48 << 10;  // for kernels with so wide a reach that one channel needs more
// In cycles of an SM. A read of shared memory by a warp; a vector of 16 bytes that is copied there, with its
// instructions; a sector that is stored. Copies and stores wait while other warps multiply.
constexpr double kReadCost = 4, kStagedCost = 0.16, kStoredCost = 0.5;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Even, so that rows begin at a 32-byte sector; but a single column lies in one piece.
int64_t lane_columns(int64_t columns) { return columns == 1 ? 1 : round_up(columns, 2); }

// The zeros that each row of the staged columns begins and ends with, at whatever phase, of which one may serve both it
// and a neighbour.
int64_t shared_zeros(const TapAxis& axis, int phases, int64_t columns) {
  const int64_t before = ceil_div(std::max<int64_t>(-axis.origin - (phases - 1), 0), int64_t(axis.stride));
  const int64_t real = ceil_div(std::max<int64_t>(int64_t(axis.size) - axis.origin, 0), int64_t(axis.stride));
  return std::clamp<int64_t>(columns - real, 0, std::min<int64_t>(before, axis.most / axis.stride));
}

// How results are stored to images.
struct Stores {
  int64_t element_size, width;
  bool joined;  // each row begins where the one before ends
};

int64_t output_size(const Problem& problem, int d) {
  return problem.interleaved ? problem.output_size[d] : problem.axes[d].positions;
}

// Positions in rectangles of 32 or in runs, images or strips in lanes: the way that takes least of reads of shared
// memory (see the head of conv2d.cuh), copies and stores.
std::optional<Choice> choose_tile(const Problem& problem, int64_t n_vectors, const std::optional<Stores>& stores) {
  const int64_t vector = problem.vector >= 8 ? 8 : problem.vector >= 3 ? 4 : problem.vector;
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const int phases[2] = {phases_of(ay), phases_of(ax)};
  const int64_t columns = ax.positions + ax.most / ax.stride, limit = std::numeric_limits<int32_t>::max();
  const double row_columns = static_cast<double>(std::max<int64_t>(n_vectors / problem.row_groups, 1));
  const double outputs = static_cast<double>(problem.batch * ay.positions * ax.positions);
  std::vector<Choice> choices;
  for (const Conv2dVariant& variant : kConv2dVariants) {
    if (variant.vector != vector || (variant.run > 1 && !(stores && stores->joined))) continue;
    if (problem.interleaved && variant.groups != 4) continue;
    const int64_t slots = 4 * variant.lane_groups;
    const int64_t wanted = std::clamp<int64_t>(ceil_div(slots, std::max<int64_t>(problem.batch, 1)), 1, ay.positions);
    const int64_t strip_rows = ceil_div(ay.positions, wanted), strips = ceil_div(ay.positions, strip_rows);
    const int64_t units = ceil_div(problem.batch * strips, slots);
    const int64_t rows = strip_rows + ay.most / ay.stride;
    const int64_t lanes_plane = phases[0] * rows * phases[1] * lane_columns(columns);
    if (lanes_plane > limit / 2) continue;
    Choice choice{};
    choice.variant = variant;
    choice.lanes = {int(problem.batch), int(problem.in_channels), variant.lane_groups, int(strips), int(strip_rows),
                    int(units), {phases[0], phases[1]}, int(rows), int(lane_columns(columns)), int(lanes_plane)};
    // Of results that lie one behind the other where `joined`: so many a tile, in which a strip's may be whole; else
    // in rows of as many.
    auto sectors = [&](int64_t results, int64_t tiles, bool joined) {
      if (!stores) return 0.0;
      if (problem.interleaved) results *= joined ? 4 : 2;
      if (joined && tiles == 1) results *= std::min(strips, slots);
      return sectors_of_each(stores->element_size, results, joined ? results : stores->width);
    };
    auto consider = [&](int64_t plane, int64_t tiles, double stored) {
      if (variant.plane && plane > variant.plane) return;
      const int64_t bytes = (variant.plane ? variant.plane : plane) * variant.lane_groups * 16;
      if (bytes > kMostStageBytes) return;
      // Of a slice of rows, all that is computed.
      const double warps = static_cast<double>(units * tiles);
      const double reads = variant.lane_groups * variant.run + 0.5 / variant.parts;
      const double read = warps * row_columns * reads * kReadCost;
      const double copied = warps * static_cast<double>(problem.channels_per_group() * plane * variant.lane_groups) *
                            kStagedCost / (kConv2dWarps * variant.groups);
      choice.cost = read + copied + outputs * static_cast<double>(vector) * stored * kStoredCost;
      choice.sectors = stored;
      choice.plane = int(plane);
      choice.block_channels = std::clamp<int64_t>(kStageBytes / bytes, 1, problem.channels_per_group());
      choices.push_back(choice);
    };
    if (variant.run > 1) {
      const int64_t pitch = columns - shared_zeros(ax, phases[1], columns), run = 32 * variant.run;
      const int64_t positions = (strip_rows - 1) * pitch + ax.positions, tiles = ceil_div(positions, run);
      // Whole rows, if that takes no more tiles: they begin at more even places.
      const int64_t fitting = run < ax.positions ? 0 : (run - ax.positions) / pitch + 1;
      const bool whole = fitting > 0 && ceil_div(strip_rows, fitting) == tiles;
      if (problem.interleaved && !whole) continue;
      const int64_t tile_rows = whole ? ceil_div(strip_rows, tiles) : 0;
      choice.step = int(whole ? tile_rows * pitch : run);
      choice.joined = true;
      choice.tile_columns = int(pitch);
      choice.run_length = int(run + ay.most / ay.stride * pitch + ax.most / ax.stride);
      choice.tiles_h = 1;
      choice.tiles_w = int(tiles);
      choice.row_pitch = int(pitch);
      choice.phase_pitch[0] = phases[1] * choice.run_length;
      choice.phase_pitch[1] = choice.run_length;
      const int64_t stored = whole ? tile_rows * ax.positions : std::max<int64_t>(run * ax.positions / pitch, 1);
      consider(phases[0] * phases[1] * int64_t(choice.run_length), tiles,
               whole ? sectors(stored, tiles, true) : sectors_of_each(stores->element_size, stored, 1));
      continue;
    }
    for (const auto& [tile_h, tile_w] : {std::pair{4, 8}, std::pair{2, 16}, std::pair{1, 32}, std::pair{32, 1}}) {
      if (tile_w == 1 && ax.positions > 1) continue;
      choice.tile_h = tile_h;
      choice.tile_w = tile_w;
      choice.tile_rows = int(tile_h + ay.most / ay.stride);
      choice.tile_columns = int(tile_w + ax.most / ax.stride);
      choice.tiles_h = int(ceil_div(strip_rows, tile_h));
      choice.tiles_w = int(ceil_div(ax.positions, tile_w));
      choice.row_pitch = phases[1] * choice.tile_columns;
      choice.phase_pitch[0] = choice.tile_rows * choice.row_pitch;
      choice.phase_pitch[1] = choice.tile_columns;
      // Of rows that lie side by side, tiles of whole ones; else a tile's piece of each.
      choice.joined = stores && stores->joined && ax.positions <= tile_w;
      const int64_t piece = choice.joined ? std::min<int64_t>(tile_h, strip_rows) * ax.positions
                                          : std::min<int64_t>(tile_w, ax.positions);
      const int64_t tiles = int64_t(choice.tiles_h) * choice.tiles_w;
      consider(int64_t(phases[0]) * choice.phase_pitch[0], tiles, sectors(piece, tiles, choice.joined));
    }
  }
  return best_of(choices);
}

}  // namespace

std::optional<Choice> choose(const Problem& problem, int64_t n_vectors, const at::Tensor& output) {
  std::optional<Stores> stores;
  if (output.defined()) {
    const auto& [y, x] = problem.axes;
    const int64_t height = output_size(problem, 0), width = output_size(problem, 1);
    bool joined = (width == 1 || output.stride(3) == 1) && (height == 1 || output.stride(2) == width);
    joined = joined && (problem.interleaved || (y.out_step == 1 && x.out_step == 1));
    stores = {output.element_size(), width, joined};
  }
  return choose_tile(problem, n_vectors, stores);
}

Choice checked_choice(const Problem& problem, int64_t n_vectors, const at::Tensor& output) {
  const std::optional<Choice> chosen = choose(problem, n_vectors, output);
  TORCH_CHECK_NOT_IMPLEMENTED(chosen,
                              "Expected a kernel whose reach, dilation * (size - 1), fits a tile in shared memory for "
                              "conv2d on cuda, got ", problem.axes[0].most, " by ", problem.axes[1].most);
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
  const int64_t limit = std::numeric_limits<int32_t>::max();
  const int64_t warps = std::clamp<int64_t>(ceil_div(slices_per_group, c.variant.groups), 1, kConv2dWarps);
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
  p.activation = finish.activation;
  p.dtype = dtype_of(output);
  p.output = output.mutable_data_ptr();
  p.out_n = output.stride(0);
  p.out_c = output.stride(1);
  p.out_h = output.stride(2);
  p.out_w = output.stride(3);
  for (int d = 0; d < 2; ++d) p.out_size[d] = int(output_size(problem, d));
  p.joined = c.joined;
  p.interleaved = problem.interleaved;
  const int64_t grid_x = int64_t(c.lanes.units) * p.tiles_h * p.tiles_w, grid_y = problem.groups * p.row_blocks;
  TORCH_CHECK_VALUE(grid_x <= limit && grid_y <= 65535, "Expected fewer than 65536 blocks of output channels, got ",
                    grid_y);
  call.launched(sparsekd_conv2d(&p, &c.variant, int(warps), grid_x, int(grid_y), call.stream()));
}

namespace {

void run_to_planes(Call& call, const Problem& problem, const Pattern& pattern, const at::Tensor& input,
                   const Finish& finish, const at::Tensor& output) {
  if (problem.vector >= 8 && input.element_size() == 2 && !pattern.place.defined() &&
      run_on_tensor_cores(call,
                          {problem.batch, problem.in_channels, problem.out_channels, problem.groups, problem.vector,
                           problem.row_groups, pattern.col.size(0), {problem.axes[0], problem.axes[1]}},
                          pattern.crow, pattern.col,
                          {input, pattern.values, {}, pattern.rows, finish.scale, finish.shift, finish.residual, output,
                           finish.activation})) {
    return;
  }
  const Choice c = checked_choice(problem, pattern.col.size(0), output);
  const at::Tensor lanes = to_lanes(call, c.lanes, problem.axes, input, "lanes");
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
