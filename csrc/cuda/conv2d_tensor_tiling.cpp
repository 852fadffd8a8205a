// How the convolution on tensor cores is cut into tiles, and what follows from it.
#include <algorithm>
#include <limits>

#include "../geometry.h"
#include "conv2d_tensor_host.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

int phases_of_taps(const TapAxis& axis) {
  int most = 0;
  for (int r = 0; r < axis.kernel; ++r) {
    const int t = axis.add + r * axis.mult;
    if (t % axis.div == 0) most = std::max(most, (t / axis.div - axis.least) % axis.stride);
  }
  return most + 1;
}

int64_t slice_rows(int64_t vector) { return vector > 32 ? 64 : vector > 16 ? 32 : vector > 8 ? 16 : 8; }

int64_t in_fours(int64_t ints) { return ceil_div(ints, int64_t(4)) * 4; }

std::string unfit(const TensorProblem& problem, const Tile& tile) {
  if (tile.n_octets * 8 > kLimit || tile.all_slices * (tile.blocks + 1) > kLimit ||
      problem.n_vectors * tile.slices > kLimit) {
    return "expected fewer than 2^28 packed columns, got " + std::to_string(problem.n_vectors);
  }
  if (problem.groups * tile.row_blocks > 65535) {
    return "expected fewer than 65536 blocks of rows, got " + std::to_string(problem.groups * tile.row_blocks);
  }
  return {};
}

}  // namespace

std::vector<int64_t> Tiling::numbers() const {
  return {variant.rows,   variant.groups, variant.positions, variant.run,   row_warps,
          position_warps, tile_h,         tile_w,            block_channels};
}

Tile tile_of(const TensorProblem& problem, const Tiling& tiling) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  Tile tile{};
  tile.phases[0] = phases_of_taps(ay);
  tile.phases[1] = phases_of_taps(ax);
  tile.tile_rows = tiling.tile_h + ay.most / ay.stride;
  tile.tile_columns = tiling.tile_w + ax.most / ax.stride;
  tile.plane = tile.phases[0] * tile.tile_rows * tile.phases[1] * tile.tile_columns;
  tile.pitch = tile.plane | 1;
  tile.zeros = int(zero_vectors(tiling.tile_h, tiling.tile_w, int64_t(tile.phases[1]) * tile.tile_columns));
  tile.slices = ceil_div(problem.vector, int64_t(tiling.variant.rows));
  tile.all_slices = problem.row_groups * tile.slices;
  tile.slices_per_group = tile.all_slices / problem.groups;
  tile.channels = problem.in_channels / problem.groups;
  tile.blocks = ceil_div(tile.channels, int64_t(tiling.block_channels));
  tile.block_slices = int64_t(tiling.row_warps) * tiling.variant.groups;
  tile.row_blocks = ceil_div(tile.slices_per_group, tile.block_slices);
  tile.n_octets = tile.slices * (problem.n_vectors / 8 + problem.row_groups * tile.blocks);
  return tile;
}

int64_t Tile::plan_ints() const {
  const int64_t groups = all_slices / slices_per_group;
  return in_fours(all_slices) + in_fours(all_slices * (blocks + 1)) + in_fours(groups * row_blocks * channels) +
         n_octets * 16;
}

TensorPlan Tile::plan(const at::Tensor& ints) const {
  const int64_t groups = all_slices / slices_per_group;
  TensorPlan plan{};
  plan.order = static_cast<int32_t*>(const_cast<void*>(ints.const_data_ptr()));
  plan.starts = plan.order + in_fours(all_slices);
  plan.channel_at = plan.starts + in_fours(all_slices * (blocks + 1));
  plan.distances = plan.channel_at + in_fours(groups * row_blocks * channels);
  plan.columns = plan.distances + n_octets * 8;
  return plan;
}

// By cycles of an SM, counted as at the head of conv2d_tensor.cuh: what shared memory delivers (128 bytes a cycle) to
// the operands and takes from the copies, or what the tensor cores multiply (1024 a cycle), whichever is more.
std::optional<Tiling> choose_tiling(const TensorProblem& problem, const TensorDevice& device, std::string& reason) {
  if (device.major < 8) {
    reason = "expected compute capability 8.0 or later, got " + std::to_string(device.major) + ".x";
    return {};
  }
  const int64_t rows = slice_rows(problem.vector);
  const int64_t slices = problem.row_groups * ceil_div(problem.vector, rows) / problem.groups;  // of a group
  const int64_t channels = problem.in_channels / problem.groups;
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const double columns_of_row = static_cast<double>(problem.n_vectors) / static_cast<double>(problem.row_groups);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(kLanes, std::max<int64_t>(problem.batch, 1)), 1, ay.positions);
  const int64_t strip_rows = ceil_div(ay.positions, wanted), strips = ceil_div(ay.positions, strip_rows);
  const int64_t units = ceil_div(problem.batch * strips, kLanes);

  std::optional<Tiling> best;
  double least = 0;
  for (const TensorVariant& variant : kTensorVariants) {
    if (variant.rows != rows) continue;
    for (int position_warps = 1; position_warps <= kTensorWarps; position_warps *= 2) {
      const int64_t row_warps = std::min<int64_t>(kTensorWarps / position_warps, ceil_div(slices, variant.groups));
      const int positions = position_warps * variant.positions;
      // A warp's positions lie in rows of `run` neighbours; where it has but one row, the tile may be wider.
      for (int tile_w = variant.run; tile_w <= (variant.run == variant.positions ? 32 : variant.run); tile_w *= 2) {
        const int tile_h = positions / tile_w;
        if (tile_h < 1) continue;
        Tiling tiling{variant, int(row_warps), position_warps, tile_h, tile_w, 1};
        const Tile one = tile_of(problem, tiling);
        const int64_t most_bytes = device.shared_bytes / 2 - one.zeros * 16;
        const int64_t fitting = std::min<int64_t>({most_bytes / (one.pitch * 16), kMostBlockChannels, channels});
        if (fitting < 1 || row_warps * position_warps * result_bytes(variant.positions) > device.shared_bytes) continue;
        tiling.block_channels = int(ceil_div(channels, ceil_div(channels, fitting)));
        const Tile tile = tile_of(problem, tiling);
        const int64_t tiles = units * ceil_div(strip_rows, tile_h) * ceil_div(ax.positions, tile_w);
        const double block_slices = static_cast<double>(std::min(slices, tile.block_slices));
        const double octets = columns_of_row / 8 + 0.5 * static_cast<double>(tile.blocks);
        // The fewer columns a slice has in a block of channels, the less evenly they lie in the banks.
        const double conflicts = 1 + 0.8 * static_cast<double>(tile.blocks) / (columns_of_row / 8 + 1);
        const double gathered = block_slices * octets * positions * conflicts;
        const double copied = static_cast<double>(channels * tile.plane) / 8;
        const double weights = block_slices * octets * static_cast<double>(position_warps * rows) / 8;
        const double multiplied = block_slices * octets * static_cast<double>(positions * rows) / 16;
        // An SM works on one block at a time, and at the end some SMs have none left. A block begins by waiting.
        const double turns =
            static_cast<double>(ceil_div(tiles * problem.groups * tile.row_blocks, int64_t(device.multiprocessors)));
        const double cost = turns * (std::max(gathered + copied + weights, multiplied) + 1000);
        if (best && least <= cost) continue;
        best = tiling;
        least = cost;
      }
    }
  }
  if (!best) {
    reason = "expected a reach that fits a tile in shared memory";
  } else if (reason = unfit(problem, tile_of(problem, *best)); !reason.empty()) {
    best.reset();
  }
  return best;
}

Tiling checked_tiling(at::IntArrayRef numbers, const TensorProblem& problem, const TensorDevice& device) {
  TORCH_CHECK_VALUE(numbers.size() == 9 && *std::min_element(numbers.begin(), numbers.end()) >= 1 &&
                        *std::max_element(numbers.begin(), numbers.end()) <= 1024,
                    "Expected a tiling of nine numbers as conv2d_tiling gives them, got ", numbers);
  TORCH_CHECK_NOT_IMPLEMENTED(device.major >= 8, "Expected a device of compute capability 8.0 or later, got ",
                              device.major, ".x");
  int n[9];
  std::copy(numbers.begin(), numbers.end(), n);
  const Tiling tiling{{n[0], n[1], n[2], n[3]}, n[4], n[5], n[6], n[7], n[8]};
  const TensorVariant& v = tiling.variant;
  const bool known = std::any_of(std::begin(kTensorVariants), std::end(kTensorVariants), [&](const TensorVariant& of) {
    return of.rows == v.rows && of.groups == v.groups && of.positions == v.positions && of.run == v.run;
  });
  TORCH_CHECK_VALUE(known && v.rows == slice_rows(problem.vector), "Expected a tiling for V = ", problem.vector, ", got ",
                    numbers);
  const int warps = tiling.row_warps * tiling.position_warps;
  const bool in_rows = tiling.tile_w == v.run || (v.run == v.positions && tiling.tile_w % v.run == 0);
  TORCH_CHECK_VALUE(warps <= kTensorWarps && tiling.tile_h * tiling.tile_w == tiling.position_warps * v.positions &&
                        in_rows && tiling.block_channels <= std::min<int64_t>(kMostBlockChannels,
                                                                              problem.in_channels / problem.groups),
                    "Expected a tiling whose warps cover its tile, got ", numbers);
  const Tile tile = tile_of(problem, tiling);
  const int64_t bytes = std::max(2 * staged_bytes(tiling.block_channels, tile.pitch, tile.zeros),
                                 warps * result_bytes(v.positions));
  TORCH_CHECK_VALUE(bytes <= device.shared_bytes, "Expected a tiling that fits ", device.shared_bytes,
                    " bytes of shared memory, got ", numbers, ", which takes ", bytes);
  const std::string reason = unfit(problem, tile);
  TORCH_CHECK_VALUE(reason.empty(), "E", reason.empty() ? "" : reason.substr(1));
  return tiling;
}

}  // namespace sparsekd::cuda
