// conv2d on tensor cores: the launches. Arguments were checked before.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <bit>
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

// Images side by side or, of few, strips of them, the padding among them.
Source source_of_images(Call& call, const TensorProblem& problem, const Tile& tile, const at::Tensor& input,
                        const Cut& cut) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const auto [strips, strip_rows, units] = cut;
  const int64_t rows = strip_rows + ay.most / ay.stride;
  const int64_t columns = ceil_div(ax.positions + ax.most / ax.stride, int64_t(2)) * 2;
  const int64_t pitch = tile.phases[1] * columns, plane = tile.phases[0] * rows * pitch;
  const int64_t vectors = units * problem.in_channels * plane;
  const bool channels_last = input.stride(1) == 1 && input.size(1) > 1;
  const int64_t channel_blocks = ceil_div(problem.in_channels, int64_t(16));
  const int64_t threads = channels_last ? units * plane * channel_blocks * 16 : vectors;
  TORCH_CHECK_VALUE(plane <= kLimit && threads / 256 < kLimit, "Expected fewer than 2^42 activations, got ",
                    vectors * 8);
  const at::Tensor lanes = at::empty({vectors, kLanes}, input.options());
  call.writes(lanes, "lanes");
  const Lanes layout{int(problem.batch), int(problem.in_channels), 1, int(strips), int(strip_rows), int(units),
                     {tile.phases[0], tile.phases[1]}, int(rows), int(columns), int(plane)};
  ToLanes16Params p{layout, {ay, ax}, input.const_data_ptr(), input.stride(0), input.stride(1), input.stride(2),
                    input.stride(3), channels_last, int(channel_blocks), threads, lanes.mutable_data_ptr()};
  call.launched(sparsekd_to_lanes16(&p, call.stream()));
  return {lanes, units, strips, strip_rows, plane, pitch,
          {{1, int(rows), 0, int(tile.phases[0] * rows)}, {1, int(columns), 0, int(pitch)}}};
}

// Strips that are stored together are read best if they lie one behind the other before, too. Rows are so far apart
// then, and each four of them so much more, that what is written at once (see joined_lane_pitch) lies in different
// banks; that can be unless a strip's results are divisible by 8.
struct RowPitch {
  int row, four;
};
RowPitch strips_row_pitch(int strip, int slice_rows, int rows_at_once) {
  for (int pitch = kLanes * strip; pitch < kLanes * strip + 32; ++pitch) {
    uint32_t banks = 0;  // of the first four rows
    for (int i = 0; i < 16; ++i) {
      const int row = slice_rows == 8 ? i / 8 * 2 : i / 4, lane = slice_rows == 8 ? i % 8 : i % 4 * 2;
      banks |= uint32_t{1} << (row * pitch + lane * strip) % 32;
    }
    if (std::popcount(banks) < 16) continue;
    if (rows_at_once == 4) return {pitch, 0};
    for (int more = 0; more < 32; ++more) {
      if ((banks & std::rotl(banks, (4 * pitch + more) % 32)) == 0) return {pitch, more};
    }
  }
  return {kLanes * strip, 0};
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
  const int64_t taps = int64_t(problem.axes[0].kernel) * problem.axes[1].kernel;
  // Octets that no slice needs stay -1.
  const at::Tensor ints = at::full({tile.plan_ints()}, -1, crow.options());
  const at::Tensor slots = at::empty({problem.groups * tile.row_blocks, tile.planes}, crow.options());
  const at::Tensor sorted = at::empty({std::max<int64_t>(problem.n_vectors * tile.slices, 1), 2}, crow.options());
  call.updates(ints, "plan");
  call.writes(slots, "slots");
  call.writes(sorted, "sorted");
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
  const int64_t most_channels = tiling.block_planes / (tile.phases[0] * tile.phases[1]) + 2;  // of a block of planes
  p.most_octets = int(std::min(problem.n_vectors, ceil_div(most_channels * taps, int64_t(8))));
  p.slot_of = slots.mutable_data_ptr<int32_t>();
  p.sorted = sorted.mutable_data_ptr();
  p.plan = tile.plan(ints);
  call.launched(sparsekd_tensor_plan(&p, int(problem.groups), call.stream()));
  return ints;
}

void run_planned(Call& call, const TensorProblem& problem, const Tiling& tiling, const TensorOperands& operands) {
  const Tile tile = tile_of(problem, tiling);
  const at::Tensor &input = operands.input, &output = operands.output;
  const bool to_lanes = output.dim() == 5;
  const TensorDevice device = tensor_device(call, input);
  const Results results = to_lanes ? Results::lanes : output.is_contiguous() ? Results::joined : Results::images;
  const Source source = input.dim() == 5 ? source_in_lanes(problem, input)
                                         : source_of_images(call, problem, tile, input,
                                                            choose_cut(problem, device, results, tiling));
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
  p.strips = int(source.strips);
  p.n_octets = int(tile.n_octets);
  p.row_warps = tiling.row_warps;
  p.row_blocks = int(tile.row_blocks);
  p.places = tiling.positions();
  p.tile_w = tiling.tile_w;
  p.row_places = tiling.row_places;
  p.tiles_of_stretch = int(tiling.tiles_of_stretch(source.strip_rows));
  p.stretches = int(ceil_div(problem.axes[1].positions, tiling.tile_w));
  p.shifted = p.places % p.row_places != 0 && p.tiles_of_stretch > 1;
  p.tile_columns = tile.tile_columns;
  p.plane = tile.plane;
  p.pitch = tile.pitch;
  p.zeros = tile.zeros;
  p.buffer = int(tile.buffers.vectors);
  p.threads = 32 * tiling.row_warps * tiling.position_warps;
  p.shared_bytes = int(tile.buffers.bytes);
  p.most_distance = tile.zeros + tiling.block_planes * tile.pitch - 1 - tile.last_place;
  const int strip = int(source.strip_rows) * p.tile_w;
  p.lane_pitch = joined_lane_pitch(std::min(p.places, strip), tiling.variant.rows);
  p.row_pitch = joined_row_pitch(p.lane_pitch, tiling.variant.rows);
  if (p.tiles_of_stretch == 1 && p.strips > 1 && strip % 8 != 0) {
    p.lane_pitch = strip;
    const RowPitch pitch = strips_row_pitch(strip, tiling.variant.rows, joined_rows(tiling.variant.positions));
    p.row_pitch = pitch.row;
    p.four_pitch = pitch.four;
  }
  p.joined = results == Results::joined && tiling.tile_w == problem.axes[1].positions;
  p.scale = data_of(operands.scale);
  p.shift = data_of(operands.shift);
  p.residual = data_of(operands.residual);
  p.activation = operands.activation;
  p.dtype = dtype_of(output);
  p.output = output.mutable_data_ptr();
  p.batch = int(problem.batch);
  p.strip_rows = int(source.strip_rows);
  p.positions[0] = problem.axes[0].positions;
  p.positions[1] = problem.axes[1].positions;
  p.to_lanes = to_lanes;
  p.out_n = output.stride(0);
  p.out_c = output.stride(1);
  p.out_h = output.stride(2);
  p.out_w = output.stride(3);
  // As many blocks of threads as live at once, each of which goes on to the next tile.
  const int64_t tiles = source.units * p.tiles_of_stretch * p.stretches, grid_y = problem.groups * tile.row_blocks;
  TORCH_CHECK_VALUE(tiles < kLimit / 2, "Expected fewer than 2^30 tiles of positions, got ", tiles);
  p.tiles = int(tiles);
  const int64_t turns = ceil_div(tiles * grid_y, device.multiprocessors * tile.resident(tiling, device));
  const int grid_x = int(ceil_div(tiles, turns));
  ++on_tensor_cores;
  call.launched(sparsekd_conv2d_tensor(&p, &tiling.variant, grid_x, int(grid_y), call.stream()));
}

bool run_on_tensor_cores(Call& call, const TensorProblem& problem, const at::Tensor& crow, const at::Tensor& col,
                         TensorOperands operands) {
  std::string reason;
  const Results results = operands.output.is_contiguous() ? Results::joined : Results::images;
  const std::optional<Chosen> chosen = choose_tiling(problem, tensor_device(call, operands.input), results, reason);
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
