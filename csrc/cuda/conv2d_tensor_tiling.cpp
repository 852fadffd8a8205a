// How the convolution on tensor cores is cut into tiles, and what follows from it.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "direct.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
constexpr int64_t kFar = 1 << 20;  // more vectors than any shared memory holds

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
          position_warps, tile_h,         tile_w,            block_planes,
          whole_rows ? 2 : 1};
}

Tile tile_of(const TensorProblem& problem, const Tiling& tiling) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  Tile tile{};
  tile.phases[0] = phases_of(ay);
  tile.phases[1] = phases_of(ax);
  tile.tile_rows = tiling.tile_h + ay.most / ay.stride;
  tile.tile_columns = tiling.tile_w + ax.most / ax.stride;
  tile.last_place = int(std::min<int64_t>(
      tiling.whole_rows ? tiling.positions() - 1 : int64_t(tiling.tile_h - 1) * tile.tile_columns + tiling.tile_w - 1,
      kFar));
  const int64_t reach = int64_t(ay.most / ay.stride) * tile.tile_columns + ax.most / ax.stride;
  tile.plane = int(std::min(std::max(int64_t(tile.tile_rows) * tile.tile_columns, tile.last_place + reach + 1), kFar));
  tile.pitch = tile.plane | 1;
  tile.zeros = int(zero_vectors(tile.last_place));
  tile.slices = ceil_div(problem.vector, int64_t(tiling.variant.rows));
  tile.all_slices = problem.row_groups * tile.slices;
  tile.slices_per_group = tile.all_slices / problem.groups;
  tile.planes = problem.in_channels / problem.groups * tile.phases[0] * tile.phases[1];
  tile.blocks = ceil_div(tile.planes, int64_t(tiling.block_planes));
  tile.block_slices = int64_t(tiling.row_warps) * tiling.variant.groups;
  tile.row_blocks = ceil_div(tile.slices_per_group, tile.block_slices);
  tile.n_octets = tile.slices * (problem.n_vectors / 8 + problem.row_groups * tile.blocks);
  tile.block_fours = int(ceil_div(int64_t(tiling.block_planes), int64_t(4)));
  tile.buffers = buffers_of(tiling.block_planes, tile.blocks, tile.pitch, tile.zeros,
                            tiling.row_warps * tiling.position_warps * result_bytes(tiling.variant.positions));
  return tile;
}

int64_t Tile::plan_ints() const {
  const int64_t groups = all_slices / slices_per_group;
  return in_fours(all_slices) + in_fours(all_slices * (blocks + 1)) + groups * row_blocks * blocks * block_fours * 4 +
         n_octets * 16;
}

TensorPlan Tile::plan(const at::Tensor& ints) const {
  const int64_t groups = all_slices / slices_per_group;
  TensorPlan plan{};
  plan.order = static_cast<int32_t*>(const_cast<void*>(ints.const_data_ptr()));
  plan.starts = plan.order + in_fours(all_slices);
  plan.plane_at = plan.starts + in_fours(all_slices * (blocks + 1));
  int32_t* distances = plan.plane_at + groups * row_blocks * blocks * block_fours * 4;
  plan.distances = reinterpret_cast<uint32_t*>(distances);
  plan.columns = distances + n_octets * 8;
  return plan;
}

// By shared memory, of which each block takes 1 KiB more than it asks for, and registers: the kernels' eight warps take
// nearly all.
int64_t Tile::resident(const Tiling& tiling, const TensorDevice& device) const {
  const int64_t by_registers = kTensorWarps / (tiling.row_warps * tiling.position_warps);
  return std::max<int64_t>(std::min(by_registers, (device.shared_bytes + 1024) / (buffers.bytes + 1024)), 1);
}

namespace {

int strip_rows_of(const TensorProblem& problem) {
  const int64_t rows = problem.axes[0].positions;
  return int(ceil_div(rows, std::clamp<int64_t>(ceil_div(kLanes, std::max<int64_t>(problem.batch, 1)), 1, rows)));
}

// As many rows as fit, or as even parts of them all have; none where not one fits.
Tiling of_whole_rows(const TensorProblem& problem, const TensorVariant& variant, int row_warps, int position_warps) {
  const TapAxis& ax = problem.axes[1];
  Tiling tiling{variant, row_warps, position_warps, 0, ax.positions, 1, true};
  const int rest = tiling.positions() - ax.positions, rows = strip_rows_of(problem);
  if (rest < 0) return tiling;
  const int most = std::min(rest / (ax.positions + ax.most / ax.stride) + 1, rows);
  tiling.tile_h = ceil_div(rows, ceil_div(rows, most));
  return tiling;
}

// By cycles of an SM, counted as at the head of conv2d_tensor.cuh: what shared memory delivers (128 bytes a cycle) to
// the operands and takes from the copies, or what the tensor cores multiply (1024 a cycle), whichever is more.
struct Candidate {
  Tiling tiling;
  double cost, sectors;  // of a result
};
Candidate candidate_of(const TensorProblem& problem, const TensorDevice& device, Results results, const Tiling& tiling,
                       const Tile& tile) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const double rows = tiling.variant.rows, positions = tiling.positions();
  const int64_t strip_rows = strip_rows_of(problem), strips = ceil_div(int64_t(ay.positions), strip_rows);
  const int64_t units = ceil_div(problem.batch * strips, kLanes);
  const int64_t tiles = units * ceil_div(strip_rows, tiling.tile_h) * ceil_div(ax.positions, tiling.tile_w);

  const double slices = static_cast<double>(std::min(tile.slices_per_group, tile.block_slices));
  const double columns = static_cast<double>(problem.n_vectors) / static_cast<double>(problem.row_groups);
  const double octets = slices * (columns / 8 + 0.5 * static_cast<double>(tile.blocks));
  // The more slices share a choice of slots, the less it suits each.
  const double conflicts = 1 + 0.4 * slices / tiling.block_planes;
  const double gathered = octets * positions * conflicts;
  const double taps = ay.kernel * ax.kernel, phases = tile.phases[0] * tile.phases[1];
  const double density = std::min(columns * phases / static_cast<double>(tile.planes) / taps, 1.0);
  const double read_planes = static_cast<double>(tile.planes) * (1 - std::pow(1 - density, taps / phases * slices));
  const double copied = read_planes * tile.plane / 8;
  const double weights = octets * tiling.position_warps * (rows / 8 + 0.25);
  const double multiplied = octets * positions * rows / 16;

  // Results go through shared memory, there and back, and out as 16 bits: 80 bytes of 8 lanes. To images each lane of a
  // tile's row stores for itself, or of whole rows several warps together, a sector of 32 bytes a cycle.
  const bool joined = results == Results::joined && tiling.tile_w == ax.positions;
  int64_t piece = std::min({tiling.tile_w, tiling.variant.positions, 16, ax.positions});
  if (joined) {
    const int64_t whole_strips = tiling.tile_h >= strip_rows ? std::min<int64_t>(strips, kLanes) : 1;
    piece = whole_strips * std::min<int64_t>(tiling.tile_h, strip_rows) * ax.positions;
  }
  const double sectors = sectors_of_each(2, piece, joined ? piece : ax.positions);
  const double stored = results == Results::lanes ? 16.0 / 128 : 8 * sectors;
  const double finished = slices * rows * (joined ? tiling.tile_h * tiling.tile_w : positions) * (64.0 / 128 + stored);
  const double worked = std::max(gathered + copied + weights, multiplied) + finished;
  // L2 has about 47 bytes a cycle for an SM. Copies wait for the only buffer while it is read, if no other block has
  // work meanwhile. At the end some SMs have no block left.
  const double fetched = copied * 128 / 47;
  const int64_t resident = tile.resident(tiling, device);
  const double waiting = resident == 1 && tile.blocks == 1 ? std::max(fetched - finished, 0.0) : 0.0;
  const double turns =
      static_cast<double>(ceil_div(tiles * problem.groups * tile.row_blocks, device.multiprocessors * resident));
  const double cost = turns * (std::max(worked, fetched) * static_cast<double>(resident) + waiting) + fetched + 600;
  return {tiling, cost, results == Results::lanes ? 0.0 : sectors};
}

}  // namespace

std::optional<Tiling> choose_tiling(const TensorProblem& problem, const TensorDevice& device, Results results,
                                    std::string& reason) {
  if (device.major < 8) {
    reason = "expected compute capability 8.0 or later, got " + std::to_string(device.major) + ".x";
    return {};
  }
  const int64_t rows = slice_rows(problem.vector);
  const int64_t slices = problem.row_groups * ceil_div(problem.vector, rows) / problem.groups;  // of a group

  std::vector<Candidate> candidates;
  for (const TensorVariant& variant : kTensorVariants) {
    if (variant.rows != rows) continue;
    for (int position_warps = 1; position_warps <= kTensorWarps; position_warps *= 2) {
      const int64_t row_warps = std::min<int64_t>(kTensorWarps / position_warps, ceil_div(slices, variant.groups));
      const int positions = position_warps * variant.positions;
      std::vector<Tiling> shapes;
      // A warp's positions lie in rows of `run` neighbours; where it has but one row, the tile may be wider.
      for (int tile_w = variant.run; tile_w <= (variant.run == variant.positions ? 32 : variant.run); tile_w *= 2) {
        if (tile_w <= positions)
          shapes.push_back({variant, int(row_warps), position_warps, positions / tile_w, tile_w, 1});
      }
      if (results == Results::joined) shapes.push_back(of_whole_rows(problem, variant, int(row_warps), position_warps));
      for (Tiling& tiling : shapes) {
        if (tiling.tile_h < 1) continue;
        const Tile one = tile_of(problem, tiling);
        // All planes at once, or as many as fit twice.
        const int64_t fitting = (device.shared_bytes / 2 - one.zeros * 16) / (int64_t(one.pitch) * 16);
        for (const int64_t most : {one.planes, std::min(fitting, one.planes)}) {
          if (most < 1) continue;
          const int64_t blocks = ceil_div(one.planes, std::min<int64_t>(most, kMostBlockPlanes));
          tiling.block_planes = int(ceil_div(one.planes, blocks));
          const Tile tile = tile_of(problem, tiling);
          if (tile.buffers.bytes > device.shared_bytes) continue;
          candidates.push_back(candidate_of(problem, device, results, tiling, tile));
        }
      }
    }
  }
  const std::optional<Candidate> best = best_of(candidates);
  if (!best) {
    reason = "expected a reach that fits a tile in shared memory";
    return {};
  }
  reason = unfit(problem, tile_of(problem, best->tiling));
  return reason.empty() ? std::optional<Tiling>(best->tiling) : std::nullopt;
}

Tiling checked_tiling(at::IntArrayRef numbers, const TensorProblem& problem, const TensorDevice& device) {
  TORCH_CHECK_VALUE(numbers.size() == 10 && *std::min_element(numbers.begin(), numbers.end()) >= 1 &&
                        *std::max_element(numbers.begin(), numbers.end()) <= 1024,
                    "Expected a tiling of ten numbers as conv2d_tiling gives them, got ", numbers);
  TORCH_CHECK_NOT_IMPLEMENTED(device.major >= 8, "Expected a device of compute capability 8.0 or later, got ",
                              device.major, ".x");
  int n[10];
  std::copy(numbers.begin(), numbers.end(), n);
  const Tiling tiling{{n[0], n[1], n[2], n[3]}, n[4], n[5], n[6], n[7], n[8], n[9] == 2};
  const TensorVariant& v = tiling.variant;
  const bool known = std::any_of(std::begin(kTensorVariants), std::end(kTensorVariants), [&](const TensorVariant& of) {
    return of.rows == v.rows && of.groups == v.groups && of.positions == v.positions && of.run == v.run;
  });
  TORCH_CHECK_VALUE(known && v.rows == slice_rows(problem.vector), "Expected a tiling for V = ", problem.vector,
                    ", got ", numbers);
  const int warps = tiling.row_warps * tiling.position_warps;
  const bool in_rows = tiling.tile_w == v.run || (v.run == v.positions && tiling.tile_w % v.run == 0);
  const TapAxis& ax = problem.axes[1];
  const int64_t row_pitch = int64_t(tiling.tile_w) + ax.most / ax.stride;
  const bool fits = tiling.whole_rows ? (tiling.tile_h - 1) * row_pitch + tiling.tile_w <= tiling.positions()
                                      : tiling.tile_h * tiling.tile_w == tiling.positions() && in_rows;
  TORCH_CHECK_VALUE(warps <= kTensorWarps && fits && n[9] <= 2 &&
                        tiling.block_planes <= kMostBlockPlanes,
                    "Expected a tiling whose warps cover its tile, got ", numbers);
  const Tile tile = tile_of(problem, tiling);
  TORCH_CHECK_VALUE(tiling.block_planes <= tile.planes && tile.buffers.bytes <= device.shared_bytes,
                    "Expected a tiling that fits ", tile.planes, " planes and ", device.shared_bytes,
                    " bytes of shared memory, got ", numbers, ", which takes ", tile.buffers.bytes);
  const std::string reason = unfit(problem, tile);
  TORCH_CHECK_VALUE(reason.empty(), "E", reason.empty() ? "" : reason.substr(1));
  return tiling;
}

}  // namespace sparsekd::cuda

int sparsekd_tensor_tiling(const int64_t* sizes, const int* device, int joined, int64_t* numbers) {
  using namespace sparsekd;
  using namespace sparsekd::cuda;
  const auto [batch, in_channels, out_channels, vector, n_vectors, size, kernel, stride] =
      *reinterpret_cast<const std::array<int64_t, 8>*>(sizes);
  const int64_t padding = kernel / 2, input[] = {batch, in_channels, size * stride, size * stride};
  const int64_t both[][2] = {{kernel, kernel}, {stride, stride}, {padding, padding}, {1, 1}};
  const Conv2dShape shape = checked_shape(input, out_channels, both[0], both[1], both[2], both[3], 1);
  const TensorProblem problem{batch, in_channels, out_channels, 1, vector, ceil_div(out_channels, vector), n_vectors,
                              {forward_axis(shape, 0), forward_axis(shape, 1)}};
  std::string reason;
  const auto tiling = choose_tiling(problem, {device[0], device[1], device[2]},
                                    joined ? Results::joined : Results::lanes, reason);
  if (!tiling) return 0;
  const std::vector<int64_t> found = tiling->numbers();
  std::copy(found.begin(), found.end(), numbers);
  return static_cast<int>(found.size());
}
