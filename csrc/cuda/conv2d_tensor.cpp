// conv2d on tensor cores: the launches. Arguments were checked before.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
std::atomic<int64_t> on_tensor_cores{0}, on_cuda_cores{0};

bool not_taken(const std::string& reason) {
  ++on_cuda_cores;
  TORCH_WARN_ONCE("conv2d of 16-bit values with V >= 8 runs on CUDA cores, as tensor cores can't take it: ", reason);
  return false;
}

// Where the activations of a convolution lie, or will lie, in lanes.
struct Source {
  at::Tensor lanes;
  int64_t units, strips, strip_rows, plane, pitch;
  SourceAxis axes[2];
};

SourceAxis in_place(const TapAxis& axis) { return {axis.stride, 1, axis.origin, axis.size}; }

// Activations that lie in lanes already. Their strides are those of `lanes_strides`, or they are contiguous.
Source source_in_lanes(const TensorProblem& problem, const at::Tensor& input) {
  const int64_t pitch = input.stride(2) / kLanes;
  return {input, input.size(0), 1, problem.axes[0].positions, input.size(2) * pitch, pitch,
          {in_place(problem.axes[0]), in_place(problem.axes[1])}};
}

// In the layout of `layout`, from images.
at::Tensor lanes_of_images(Call& call, const Lanes& layout, const TapAxis (&axes)[2], const at::Tensor& images,
                           const char* name) {
  const bool channels_last = images.stride(1) == 1 && images.size(1) > 1;
  const int64_t channel_blocks = ceil_div(int64_t(layout.channels), int64_t(16));
  const int64_t threads = layout.plane * (channels_last ? channel_blocks * 16 : int64_t(layout.channels));
  TORCH_CHECK_VALUE(threads < kLimit / 2, "Expected fewer than 2^30 activations of a unit of eight images or strips, ",
                    "each, got ", threads);
  const int64_t vectors = int64_t(layout.units) * layout.channels * layout.plane;
  const at::Tensor lanes = at::empty({vectors, kLanes}, images.options());
  call.writes(lanes, name);
  const ToLanes16Params p{layout, {axes[0], axes[1]}, images.const_data_ptr(), images.stride(0), images.stride(1),
                          images.stride(2), images.stride(3), channels_last, int(threads), Divisor(layout.plane),
                          Divisor(layout.columns), Divisor(layout.rows), Divisor(layout.phases[1]),
                          Divisor(channel_blocks), lanes.mutable_data_ptr()};
  call.launched(sparsekd_to_lanes16(&p, call.stream()));
  return lanes;
}

// Images side by side or, of few, strips of them, the padding among them.
Source source_of_images(Call& call, const TensorProblem& problem, const Tile& tile, const at::Tensor& input,
                        const Cut& cut) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const auto [strips, strip_rows, units] = cut;
  const int64_t rows = strip_rows + ay.most / ay.stride;
  const int64_t columns = ceil_div(ax.positions + ax.most / ax.stride, int64_t(2)) * 2;
  const int64_t pitch = tile.phases[1] * columns, plane = tile.phases[0] * rows * pitch;
  TORCH_CHECK_VALUE(plane < kLimit / 2, "Expected fewer than 2^30 activations of a channel, got ", plane);
  const Lanes layout{int(problem.batch), int(problem.in_channels), 1, int(strips), int(strip_rows), int(units),
                     {tile.phases[0], tile.phases[1]}, int(rows), int(columns), int(plane)};
  return {lanes_of_images(call, layout, problem.axes, input, "lanes"), units, strips, strip_rows, plane, pitch,
          {{1, int(rows), 0, int(tile.phases[0] * rows)}, {1, int(columns), 0, int(pitch)}}};
}

// Results in lanes, [units][channels][rows of a strip][pitch][8], on their way from or to images.
Lanes result_lanes(const TensorProblem& problem, const Source& source) {
  const int64_t columns = ceil_div(int64_t(problem.axes[1].positions), int64_t(2)) * 2;
  return {int(problem.batch), int(problem.out_channels), 1, int(source.strips), int(source.strip_rows),
          int(source.units), {1, 1}, int(source.strip_rows), int(columns), int(source.strip_rows * columns)};
}

at::Tensor residual_in_lanes(Call& call, const TensorProblem& problem, const Source& source, const at::Tensor& images) {
  TapAxis axes[2];
  for (int d = 0; d < 2; ++d) axes[d].size = axes[d].positions = problem.axes[d].positions;
  return lanes_of_images(call, result_lanes(problem, source), axes, images, "residual in lanes");
}

void images_of_lanes(Call& call, const TensorProblem& problem, const Source& source, const at::Tensor& lanes,
                     const at::Tensor& to) {
  const Lanes layout = result_lanes(problem, source);
  const int columns = problem.axes[1].positions;
  TORCH_CHECK_VALUE(int64_t(layout.channels) * layout.plane < kLimit / 2,
                    "Expected fewer than 2^30 results of a unit of eight images or strips, each, got ",
                    int64_t(layout.channels) * layout.plane);
  const FromLanes16Params p{lanes.const_data_ptr(), layout.units, layout.channels, layout.strips, layout.strip_rows,
                            layout.batch, problem.axes[0].positions, columns, layout.plane, layout.columns,
                            Divisor(int64_t(layout.strip_rows) * columns), Divisor(columns),
                            to.stride(0), to.stride(1), to.stride(2), to.stride(3), to.mutable_data_ptr()};
  call.launched(sparsekd_from_lanes16(&p, call.stream()));
}

}  // namespace

TensorDevice tensor_device(Call& call, const at::Tensor& on) {
  TensorDevice device{};
  call.launched(sparsekd_device_limits(std::max<int>(on.device().index(), 0), &device.major));
  return device;
}

std::vector<int64_t> lanes_strides(at::IntArrayRef size) {
  const int64_t pitch = (size[3] + size[3] % 2) * kLanes;
  return {size[1] * size[2] * pitch, size[2] * pitch, pitch, kLanes, 1};
}

at::Tensor make_plan(Call& call, const TensorProblem& problem, const Tiling& tiling, const at::Tensor& crow,
                     const at::Tensor& col) {
  const Tile tile = tile_of(problem, tiling);
  // Octets that no slice needs stay -1.
  const at::Tensor ints = at::full({tile.plan_ints()}, -1, crow.options());
  const at::Tensor slots = at::empty({problem.groups * tile.row_blocks, tile.planes}, crow.options());
  call.updates(ints, "plan");
  call.writes(slots, "slots");
  TensorPatternParams p{};
  p.crow = crow.const_data_ptr<int32_t>();
  p.col = static_cast<const int32_t*>(data_of(col));
  p.row_groups = int(problem.row_groups);
  p.row_groups_per_group = int(problem.row_groups / problem.groups);
  p.slices = int(tile.slices);
  p.slices_per_group = int(tile.slices_per_group);
  p.n_vectors = int(problem.n_vectors);
  p.planes_per_group = int(tile.planes);
  p.block_planes = tiling.block_planes;
  p.blocks = int(tile.blocks);
  std::copy_n(problem.axes, 2, p.axes);
  std::copy_n(tile.phases, 2, p.phases);
  p.block_fours = tile.block_fours;
  p.tile_columns = tile.tile_columns;
  p.pitch = tile.pitch;
  p.zeros = tile.zeros;
  p.row_blocks = int(tile.row_blocks);
  p.block_slices = int(tile.block_slices);
  p.slot_of = slots.mutable_data_ptr<int32_t>();
  p.plan = tile.plan(ints);
  call.launched(sparsekd_tensor_plan(&p, int(problem.groups), call.stream()));
  return ints;
}

void run_planned(Call& call, const TensorProblem& problem, const Tiling& tiling, const TensorOperands& operands) {
  const Tile tile = tile_of(problem, tiling);
  const at::Tensor &input = operands.input, &output = operands.output;
  const bool to_lanes = output.dim() == 5;
  const TensorDevice device = tensor_device(call, input);
  const Results results = to_lanes ? Results::lanes : Results::images;
  const Source source = input.dim() == 5 ? source_in_lanes(problem, input)
                                         : source_of_images(call, problem, tile, input,
                                                            cut_of(problem, results));
  const at::Tensor fragments = at::empty({tile.n_octets, int64_t(tiling.variant.rows) * 8}, input.options());
  call.writes(fragments, "fragments");
  const TensorPlan plan = tile.plan(operands.plan);
  const TensorValuesParams values{data_of(operands.values), plan.columns, int(tile.n_octets), int(problem.n_vectors),
                                  int(problem.vector), int(tile.slices), fragments.mutable_data_ptr()};
  call.launched(sparsekd_tensor_values(&values, tiling.variant.rows, call.stream()));

  TensorConv2dParams p{};
  p.input = source.lanes.const_data_ptr();
  p.source_channels = int(problem.in_channels);
  p.source_plane = int(source.plane);
  p.source_pitch = int(source.pitch);
  std::copy_n(source.axes, 2, p.source);
  std::copy_n(tile.phases, 2, p.phases);
  p.last_whole_phase = problem.axes[0].most % problem.axes[0].stride;
  p.plan = plan;
  p.row_indices = static_cast<const int32_t*>(data_of(operands.rows));
  p.fragments = fragments.const_data_ptr();
  p.all_slices = int(tile.all_slices);
  p.slices = int(tile.slices);
  p.slices_per_group = int(tile.slices_per_group);
  p.vector = int(problem.vector);
  p.rows_per_group = int(problem.out_channels / problem.groups);
  p.out_channels = int(problem.out_channels);
  p.channels_per_group = int(problem.in_channels / problem.groups);
  p.planes_per_group = int(tile.planes);
  p.block_planes = tiling.block_planes;
  p.block_fours = tile.block_fours;
  p.blocks = int(tile.blocks);
  p.n_octets = int(tile.n_octets);
  p.row_warps = tiling.row_warps;
  p.row_blocks = int(tile.row_blocks);
  p.places = tiling.positions();
  p.tile_w = tiling.tile_w;
  p.row_places = Divisor(tiling.row_places);
  p.tiles_of_stretch = int(tiling.tiles_of_stretch(source.strip_rows));
  const int64_t stretches = ceil_div(problem.axes[1].positions, tiling.tile_w);
  p.stretches = Divisor(stretches);
    p.tile_columns = Divisor(tile.tile_columns);
  p.plane = tile.plane;
  p.pitch = tile.pitch;
  p.zeros = tile.zeros;
  p.buffer = int(tile.buffers.vectors);
  p.threads = 32 * tiling.row_warps * tiling.position_warps;
  p.shared_bytes = int(tile.buffers.bytes);
  p.most_distance = tile.zeros + tiling.block_planes * tile.pitch - 1 - tile.last_place;
  p.scale = data_of(operands.scale);
  p.shift = data_of(operands.shift);
  p.activation = operands.activation;
  p.dtype = dtype_of(output);
  p.batch = int(problem.batch);
  p.strip_rows = int(source.strip_rows);
  p.positions[0] = problem.axes[0].positions;
  p.positions[1] = problem.axes[1].positions;
  const bool direct = !to_lanes && source.strips == 1 && !operands.residual.defined() && output.is_contiguous() &&
                      direct_to_images(problem, tiling);
  at::Tensor results_in = output, residual = operands.residual;
  if (!to_lanes && !direct) {
    const Lanes layout = result_lanes(problem, source);
    const int64_t size[] = {layout.units, layout.channels, layout.strip_rows, problem.axes[1].positions, kLanes};
    results_in = at::empty_strided(size, lanes_strides(size), output.options());
    if (problem.axes[1].positions % 2 != 0) {
      call.updates(results_in, "results in lanes");  // what fills up its rows is never written
    } else {
      call.writes(results_in, "results in lanes");
    }
    if (residual.defined()) residual = residual_in_lanes(call, problem, source, residual);
  }
  p.to_lanes = !direct;
  p.residual = data_of(residual);
  p.output = results_in.mutable_data_ptr();
  p.out_n = results_in.stride(0);
  p.out_c = results_in.stride(1);
  p.out_h = results_in.stride(2);
  // As many blocks of threads as live at once, each of which goes on to the next tile.
  const int64_t tiles = source.units * p.tiles_of_stretch * stretches, grid_y = problem.groups * tile.row_blocks;
  TORCH_CHECK_VALUE(tiles < kLimit / 2, "Expected fewer than 2^30 tiles of positions, got ", tiles);
  p.tiles = int(tiles);
  p.tiles_of_unit = Divisor(p.tiles_of_stretch * stretches);
  const int64_t turns = ceil_div(tiles * grid_y, device.multiprocessors * tile.resident(tiling, device));
  const int grid_x = int(ceil_div(tiles, turns));
  ++on_tensor_cores;
  call.launched(sparsekd_conv2d_tensor(&p, &tiling.variant, grid_x, int(grid_y), call.stream()));
  if (!to_lanes && !direct) images_of_lanes(call, problem, source, results_in, output);
}

bool run_on_tensor_cores(Call& call, const TensorProblem& problem, const at::Tensor& crow, const at::Tensor& col,
                         TensorOperands operands) {
  std::string reason;
  const std::optional<Chosen> chosen =
      choose_tiling(problem, tensor_device(call, operands.input), Results::images, reason);
  if (!chosen) return not_taken(reason);
  operands.plan = make_plan(call, problem, chosen->tiling, crow, col);
  run_planned(call, problem, chosen->tiling, operands);
  return true;
}

}  // namespace sparsekd::cuda

void sparsekd_conv2d_calls(int64_t* tensor, int64_t* cuda) {
  *tensor = sparsekd::cuda::on_tensor_cores;
  *cuda = sparsekd::cuda::on_cuda_cores;
}
