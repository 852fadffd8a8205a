// conv2d on tensor cores: the choice of tile and the launches. Arguments were checked in conv2d.cpp.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"

namespace sparsekd::cuda {
namespace {

std::atomic<int64_t> on_tensor_cores{0}, on_cuda_cores{0};

struct Limits {
  int major, shared_bytes, multiprocessors;
};

struct Tiling {
  TensorVariant variant;
  Lanes lanes;
  int row_warps, position_warps, tile_h, tile_w, tile_rows, tile_columns, plane, pitch;
  int64_t block_channels;
  double cost;
};

int64_t rounded_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int phases_of_taps(const TapAxis& axis) {
  int most = 0;
  for (int r = 0; r < axis.kernel; ++r) {
    const int t = axis.add + r * axis.mult;
    if (t % axis.div == 0) most = std::max(most, (t / axis.div - axis.least) % axis.stride);
  }
  return most + 1;
}

// By cycles of an SM, counted as at the head of conv2d_tensor.cuh: what shared memory delivers (128 bytes a cycle) to
// the operands and takes from the copies, or what the tensor cores multiply (1024 a cycle), whichever is more.
std::optional<Tiling> choose(const TensorConv2d& conv, const Limits& limits) {
  const int64_t vector = conv.values.size(1), slice_rows = vector > 32 ? 64 : vector > 16 ? 32 : vector > 8 ? 16 : 8;
  const int64_t slices = conv.row_groups * ceil_div(vector, slice_rows) / conv.groups;  // of a group
  const int64_t channels = conv.in_channels / conv.groups;
  const TapAxis &ay = conv.axes[0], &ax = conv.axes[1];
  const int phases[2] = {phases_of_taps(ay), phases_of_taps(ax)};
  const double columns_of_row = static_cast<double>(conv.col.size(0)) / static_cast<double>(conv.row_groups);

  const int64_t wanted = std::clamp<int64_t>(ceil_div(kLanes, std::max<int64_t>(conv.batch, 1)), 1, ay.positions);
  const int64_t strip_rows = ceil_div(ay.positions, wanted), strips = ceil_div(ay.positions, strip_rows);
  const int64_t units = ceil_div(conv.batch * strips, kLanes);
  const int64_t rows = strip_rows + ay.most / ay.stride, columns = rounded_up(ax.positions + ax.most / ax.stride, 2);
  if (phases[0] * rows * phases[1] * columns > std::numeric_limits<int32_t>::max()) return {};

  std::optional<Tiling> best;
  for (const TensorVariant& variant : kTensorVariants) {
    if (variant.rows != slice_rows) continue;
    for (int64_t position_warps = 1; position_warps <= kTensorWarps; position_warps *= 2) {
      const int64_t most_rows = kTensorWarps / position_warps;
      const int64_t row_warps = std::min(most_rows, ceil_div(slices, variant.groups));
      const int64_t positions = position_warps * variant.positions;
      // A warp's positions lie in rows of `run` neighbours; where it has but one row, the tile may be wider.
      for (int64_t tile_w = variant.run; tile_w <= (variant.run == variant.positions ? 32 : variant.run); tile_w *= 2) {
        const int64_t tile_h = positions / tile_w;
        if (tile_h < 1) continue;
        const int64_t tile_rows = tile_h + ay.most / ay.stride, tile_columns = tile_w + ax.most / ax.stride;
        const int64_t plane = phases[0] * tile_rows * phases[1] * tile_columns, pitch = plane | 1;
        const int64_t most_bytes = limits.shared_bytes / 2 - kZeros * 16;
        int64_t block_channels = std::min<int64_t>({most_bytes / (pitch * 16), kMostBlockChannels, channels});
        if (block_channels < 1) continue;
        if (row_warps * position_warps * result_bytes(variant.positions) > limits.shared_bytes) continue;
        const int64_t blocks = ceil_div(channels, block_channels);
        block_channels = ceil_div(channels, blocks);
        const int64_t tiles = units * ceil_div(strip_rows, tile_h) * ceil_div(ax.positions, tile_w);
        const int64_t row_blocks = conv.groups * ceil_div(slices, row_warps * variant.groups);
        const double block_slices = static_cast<double>(std::min(slices, row_warps * variant.groups));
        const double octets = columns_of_row / 8 + 0.5 * static_cast<double>(blocks);
        const double gathered = block_slices * octets * static_cast<double>(positions) * 1.2;
        const double copied = static_cast<double>(channels * plane) / 8;
        const double weights = block_slices * octets * static_cast<double>(position_warps * slice_rows) / 8;
        const double multiplied = block_slices * octets * static_cast<double>(positions * slice_rows) / 16;
        // An SM works on one block at a time, and at the end some SMs have none left. A block begins by waiting.
        const double turns = static_cast<double>(ceil_div(tiles * row_blocks, limits.multiprocessors));
        const double cost = turns * (std::max(gathered + copied + weights, multiplied) + 1000);
        if (best && best->cost <= cost) continue;
        best = Tiling{variant,
                      {int(conv.batch), int(conv.in_channels), 1, int(strips), int(strip_rows), int(units),
                       {phases[0], phases[1]}, int(rows), int(columns), int(phases[0] * rows * phases[1] * columns)},
                      int(row_warps), int(position_warps), int(tile_h), int(tile_w), int(tile_rows), int(tile_columns),
                      int(plane), int(pitch), block_channels, cost};
      }
    }
  }
  return best;
}

bool not_taken(const std::string& reason) {
  ++on_cuda_cores;
  TORCH_WARN_ONCE("conv2d of 16-bit values with V >= 8 runs on CUDA cores, as tensor cores can't take it: ", reason);
  return false;
}

const void* pointer(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

}  // namespace

bool run_on_tensor_cores(Call& call, const TensorConv2d& conv) {
  Limits limits{};
  call.launched(sparsekd_device_limits(std::max<int>(conv.input.device().index(), 0), &limits.major));
  if (limits.major < 8) return not_taken("expected compute capability 8.0 or later, got " + std::to_string(limits.major) + ".x");
  const std::optional<Tiling> chosen = choose(conv, limits);
  if (!chosen) return not_taken("expected a reach that fits a tile in shared memory");
  const Tiling& c = *chosen;

  const int64_t vector = conv.values.size(1), slices = ceil_div(vector, int64_t(c.variant.rows));
  const int64_t all_slices = conv.row_groups * slices, slices_per_group = all_slices / conv.groups;
  const int64_t channels = conv.in_channels / conv.groups, blocks = ceil_div(channels, c.block_channels);
  const int64_t n_vectors = conv.col.size(0), limit = std::numeric_limits<int32_t>::max();
  const int64_t n_octets = slices * (n_vectors / 8 + conv.row_groups * blocks);
  const int64_t block_slices = int64_t(c.row_warps) * c.variant.groups;
  const int64_t row_blocks = ceil_div(slices_per_group, block_slices);
  const int64_t taps = int64_t(conv.axes[0].kernel) * conv.axes[1].kernel;
  const int64_t vectors = int64_t(c.lanes.units) * c.lanes.channels * c.lanes.plane;
  const int64_t grid_x = int64_t(c.lanes.units) * ceil_div(c.lanes.strip_rows, c.tile_h) *
                         ceil_div(conv.axes[1].positions, c.tile_w);
  if (n_octets * 8 > limit || all_slices * (blocks + 1) > limit || n_vectors > limit) {
    return not_taken("expected fewer than 2^28 packed columns, got " + std::to_string(n_vectors));
  }
  if (conv.groups * row_blocks > 65535) {
    return not_taken("expected fewer than 65536 blocks of rows, got " + std::to_string(conv.groups * row_blocks));
  }
  if (vectors / 256 >= limit || grid_x > limit) return not_taken("expected fewer than 2^42 activations");
  ++on_tensor_cores;

  const auto shorts = conv.input.options(), ints = conv.input.options().dtype(at::kInt);
  const at::Tensor lanes = at::empty({vectors, kLanes}, shorts);
  const at::Tensor order = at::empty({all_slices}, ints), starts = at::empty({all_slices, blocks + 1}, ints);
  const at::Tensor planes = at::empty({2, conv.groups * row_blocks, channels}, ints);
  const at::Tensor sorted = at::empty({std::max<int64_t>(n_vectors * slices, 1), 2}, ints);
  const at::Tensor distances = at::empty({n_octets, 8}, ints);
  const at::Tensor fragments = at::empty({n_octets, int64_t(c.variant.rows) * 8}, shorts);
  call.writes(lanes, "lanes");
  call.writes(order, "order");
  call.writes(starts, "starts");
  call.writes(planes, "planes");
  call.writes(sorted, "sorted");
  call.writes(distances, "distances");
  call.writes(fragments, "fragments");

  const at::Tensor& input = conv.input;
  ToLanes16Params to_lanes{c.lanes, {conv.axes[0], conv.axes[1]}, input.const_data_ptr(), input.stride(0), input.stride(1),
                           input.stride(2), input.stride(3), input.stride(1) == 1 && input.size(1) > 1,
                           lanes.mutable_data_ptr()};
  call.launched(sparsekd_to_lanes16(&to_lanes, call.stream()));

  TensorPatternParams pattern{};
  pattern.values = pointer(conv.values);
  pattern.crow = conv.crow.const_data_ptr<int32_t>();
  pattern.col = static_cast<const int32_t*>(pointer(conv.col));
  pattern.row_groups = int(conv.row_groups);
  pattern.row_groups_per_group = int(conv.row_groups / conv.groups);
  pattern.vector = int(vector);
  pattern.slices = int(slices);
  pattern.slices_per_group = int(slices_per_group);
  pattern.rows = c.variant.rows;
  pattern.n_vectors = int(n_vectors);
  pattern.channels_per_group = int(channels);
  pattern.block_channels = int(c.block_channels);
  pattern.blocks = int(blocks);
  std::copy_n(conv.axes, 2, pattern.axes);
  pattern.phases_x = c.lanes.phases[1];
  pattern.tile_rows = c.tile_rows;
  pattern.tile_columns = c.tile_columns;
  pattern.pitch = c.pitch;
  pattern.row_blocks = int(row_blocks);
  pattern.block_slices = int(block_slices);
  pattern.most_octets = int(std::min(n_vectors, ceil_div(c.block_channels * taps, int64_t(8))));
  pattern.sorted = sorted.mutable_data_ptr();
  pattern.order = order.mutable_data_ptr<int32_t>();
  pattern.slot_of = planes.mutable_data_ptr<int32_t>();
  pattern.channel_at = pattern.slot_of + conv.groups * row_blocks * channels;
  pattern.starts = starts.mutable_data_ptr<int32_t>();
  pattern.distances = distances.mutable_data_ptr<int32_t>();
  pattern.fragments = fragments.mutable_data_ptr();
  call.launched(sparsekd_tensor_pattern(&pattern, int(conv.groups), call.stream()));

  TensorConv2dParams p{};
  p.lanes = c.lanes;
  std::copy_n(conv.axes, 2, p.axes);
  p.input = lanes.const_data_ptr();
  p.starts = pattern.starts;
  p.distances = pattern.distances;
  p.order = pattern.order;
  p.channel_at = pattern.channel_at;
  p.row_indices = static_cast<const int32_t*>(pointer(conv.rows));
  p.fragments = pattern.fragments;
  p.slices = pattern.slices;
  p.slices_per_group = pattern.slices_per_group;
  p.vector = pattern.vector;
  p.rows_per_group = int(conv.out_channels / conv.groups);
  p.out_channels = int(conv.out_channels);
  p.channels_per_group = pattern.channels_per_group;
  p.block_channels = pattern.block_channels;
  p.blocks = pattern.blocks;
  p.n_octets = int(n_octets);
  p.row_warps = c.row_warps;
  p.position_warps = c.position_warps;
  p.row_blocks = pattern.row_blocks;
  p.tile_h = c.tile_h;
  p.tile_w = c.tile_w;
  p.tiles_h = int(ceil_div(c.lanes.strip_rows, c.tile_h));
  p.tiles_w = int(ceil_div(conv.axes[1].positions, c.tile_w));
  p.tile_rows = c.tile_rows;
  p.tile_columns = c.tile_columns;
  p.plane = c.plane;
  p.pitch = c.pitch;
  p.scale = pointer(conv.scale);
  p.shift = pointer(conv.shift);
  p.residual = pointer(conv.residual);
  p.activation = conv.activation;
  p.dtype = conv.output.scalar_type() == at::kHalf ? DType::float16 : DType::bfloat16;
  p.output = conv.output.mutable_data_ptr();
  p.out_n = conv.output.stride(0);
  p.out_c = conv.output.stride(1);
  p.out_h = conv.output.stride(2);
  p.out_w = conv.output.stride(3);
  call.launched(sparsekd_conv2d_tensor(&p, &c.variant, grid_x, int(conv.groups * row_blocks), call.stream()));
  return true;
}

}  // namespace sparsekd::cuda

void sparsekd_conv2d_calls(int64_t* tensor, int64_t* cuda) {
  *tensor = sparsekd::cuda::on_tensor_cores;
  *cuda = sparsekd::cuda::on_cuda_cores;
}
