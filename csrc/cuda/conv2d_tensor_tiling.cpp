// How the convolution on tensor cores is cut into tiles, and what follows from it.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "direct.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
constexpr int kMostNumber = 1024;  // of a tiling
constexpr int64_t kFar = 1 << 20;  // more vectors than any shared memory holds

// Rows of a slice are as many as those of a vector, or more; of long vectors half as many do nearly as well.
bool suits(const TensorVariant& variant, int64_t vector) {
  const int rows = vector > 32 ? 64 : vector > 16 ? 32 : vector > 8 ? 16 : 8;
  return variant.rows == std::min(rows, 32);
}

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
  return {variant.rows, variant.groups, variant.positions, row_warps, position_warps, tile_w, row_places, block_planes};
}

int64_t Tiling::tiles_of_stretch(int64_t rows) const {
  return ceil_div((rows - 1) * row_places + tile_w, int64_t(positions()));
}

namespace {

// Of a staged plane, the last vector that a place of a tile has: of all beginnings that tiles have in a row.
int64_t last_place_of(const Tiling& tiling, int64_t tile_columns) {
  const int64_t places = tiling.positions(), row = tiling.row_places, wider = tile_columns - row;
  int64_t last = 0;
  for (int64_t shift = 0; shift < row; shift += std::gcd(places, row)) {
    const int64_t crossed = (shift + places - 1) / row;
    // The last place, or where rows of the plane are shorter, that of the row before.
    last = std::max(last, places - 1 + crossed * wider);
    if (crossed > 0) last = std::max(last, crossed * row - shift - 1 + (crossed - 1) * wider);
  }
  return last;
}

}  // namespace

Tile tile_of(const TensorProblem& problem, const Tiling& tiling) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  Tile tile{};
  tile.phases[0] = phases_of(ay);
  tile.phases[1] = phases_of(ax);
  tile.tile_columns = tiling.tile_w + ax.most / ax.stride;
  tile.last_place = int(std::min<int64_t>(last_place_of(tiling, tile.tile_columns), kFar));
  const int64_t reach = int64_t(ay.most / ay.stride) * tile.tile_columns + ax.most / ax.stride;
  tile.plane = int(std::min(tile.last_place + reach + 1, kFar));
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
                            tile.block_slices * tiling.variant.rows);
  return tile;
}

bool direct_to_images(const TensorProblem& problem, const Tiling& tiling) {
  const int64_t width = problem.axes[1].positions, plane = problem.axes[0].positions * width;
  if (tiling.row_places != tiling.tile_w) return false;
  return tiling.tile_w == width ? plane % kLanes == 0 : tiling.tile_w % kLanes == 0 && width % kLanes == 0;
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

// By shared memory, of which each block takes 1 KiB more than it asks for, and registers: as many warps as a block may
// have take nearly all.
int64_t Tile::resident(const Tiling& tiling, const TensorDevice& device) const {
  const int64_t by_registers = kTensorWarps / (tiling.row_warps * tiling.position_warps);
  return std::max<int64_t>(std::min(by_registers, (device.shared_bytes + 1024) / (buffers.bytes + 1024)), 1);
}

namespace {

// Multiply-adds of `mma.sync` with fp32 sums, a cycle and multiprocessor. What has little shared memory (8.6, 8.9,
// 12.0) is taken for a GeForce card; the later large ones have more, but only for other instructions.
double tensor_macs(const TensorDevice& device) {
  return device.shared_bytes < (128 << 10) ? 256 : device.major == 8 ? 1024 : 0.6 * 2048;
}

// Instructions of a warp for one tile, counted in what nvcc 13 makes of the kernel.
struct Instructions {
  double staged, multiplied, finished;
};
Instructions instructions_of(const TensorVariant& v, const Tile& tile, double warps, double columns,
                             double read_planes) {
  const double blocks = static_cast<double>(tile.blocks), places = v.positions;
  const double steps = columns / 16 + blocks / 2;  // of a slice; the last one of a block may be half a step
  const double products = v.rows == 8 ? 1 : v.rows / 8.0;  // of two positions
  const double copies = 20 + 8 * std::ceil(tile.plane / 32.0);
  return {blocks * 150 + read_planes / warps * copies,
          v.groups * (steps * (14 + places / 2 * (1 + products)) + blocks * 30),
          200 + v.groups * v.rows / 8.0 * (70 + places * (v.rows == 8 ? 15 : 10))};
}

// By cycles of an SM: the most of what its four quarters issue, what shared memory delivers (128 bytes a cycle) to the
// operands and takes from the copies, what the tensor cores multiply, what L2 delivers, and what a warp takes that
// waits for nothing but itself. As an H100 showed, that is what counts where few warps share a quarter: from one
// instruction of a warp to the next are 5.7 cycles in the mean. No term falls with the number of columns, so
// that a sparser pattern never costs more. benchmarks/predict.py makes its times of it.
constexpr double kBetweenInstructions = 5.7, kIssued = 0.8, kL2Bytes = 32, kFirstBytes = 1000;
double cycles_of(const TensorProblem& problem, const TensorDevice& device, Results results, const Cut& cut,
                 const Tiling& tiling, const Tile& tile) {
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const double rows = tiling.variant.rows, positions = tiling.positions();
  const int64_t tiles =
      cut.units * tiling.tiles_of_stretch(cut.strip_rows) * ceil_div(ax.positions, int64_t(tiling.tile_w));

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
  const double multiplied = octets * positions * rows * 64 / tensor_macs(device);
  const double stored = slices * rows * positions * kLanes * 2 / kL2Bytes;

  const double warps = tiling.row_warps * tiling.position_warps;
  const Instructions of_warp = instructions_of(tiling.variant, tile, warps, columns, read_planes);
  const double instructions = of_warp.staged + of_warp.multiplied + of_warp.finished;
  const double fetched = copied * 128 / kL2Bytes;
  const double throughput =
      std::max({gathered + copied + weights, multiplied, instructions * warps / 4 / kIssued, fetched + stored});
  // The tiles that a multiprocessor computes, some together, one such round after the other. While there is but one
  // buffer, what is copied into it is hidden by finishing alone, or by other blocks of threads.
  const int64_t turns = ceil_div(std::max<int64_t>(tiles * problem.groups * tile.row_blocks, 1),
                                 int64_t(device.multiprocessors));
  const int64_t resident = std::min(tile.resident(tiling, device), turns);
  const auto together = static_cast<double>(resident), rounds = static_cast<double>(ceil_div(turns, resident));
  const double first = kFirstBytes + fetched * together / static_cast<double>(tile.blocks);
  const double alone = instructions * kBetweenInstructions +
                       (tile.blocks == 1 ? std::max(first - of_warp.finished * kBetweenInstructions, 0.0) : 0);
  const double round = std::max(throughput * together, alone);
  double cycles = first + rounds * round + 1000;
  // Results that can't go to images directly are read and written once more, by a kernel of their own.
  if (results == Results::images && (cut.strips > 1 || !direct_to_images(problem, tiling))) {
    const double all = static_cast<double>(problem.batch * problem.out_channels) * ay.positions * ax.positions;
    cycles += 3000 + all * 2 * 2 / 16 / device.multiprocessors;
  }
  return cycles;
}

// {of rows, of positions} in a block of threads: as many as there may be, or a half or quarter, for more blocks.
std::vector<std::pair<int, int>> warps_of(int64_t rows) {
  std::vector<std::pair<int, int>> found;
  for (int position_warps = 1; position_warps <= kTensorWarps; position_warps *= 2) {
    for (int warps = kTensorWarps; warps >= std::max(kTensorWarps / 4, position_warps); warps /= 2) {
      const int row_warps = warps / position_warps;
      const std::pair<int, int> both(std::min<int64_t>(row_warps, rows), position_warps);
      if (found.empty() || found.back() != both) found.push_back(both);
    }
  }
  return found;
}

}  // namespace

// Images are cut into strips of about equal height where they are too few to fill the lanes.
Cut cut_of(const TensorProblem& problem, Results results) {
  const int64_t rows = problem.axes[0].positions, batch = problem.batch;
  const int64_t strips = std::clamp<int64_t>(ceil_div(int64_t(kLanes), std::max<int64_t>(batch, 1)), 1, rows);
  const int64_t strip_rows = results == Results::lanes ? rows : ceil_div(rows, strips);
  const int64_t all = ceil_div(rows, strip_rows);
  return {all, strip_rows, ceil_div(batch * all, int64_t(kLanes))};
}

namespace {

// With all planes at once, or as many as fit twice; of all shared memory or, for more blocks of threads, a part.
void look_at(const TensorProblem& problem, const TensorDevice& device, Results results, const Cut& cut, Tiling tiling,
             std::optional<Chosen>& best) {
  const Tile one = tile_of(problem, tiling);
  int64_t last = 0;
  for (const int64_t parts : {0, 1, 2, 4}) {
    int64_t most = one.planes;
    if (parts > 0) {
      const int64_t others = one.zeros + one.block_slices * tiling.variant.rows;
      most = std::min(most, ((device.shared_bytes / 2 / parts - 1024) / 16 - others) / one.pitch);
    }
    if (most < 1) continue;
    const int64_t blocks = ceil_div(one.planes, std::min<int64_t>(most, kMostBlockPlanes));
    if (blocks == last) continue;
    last = blocks;
    tiling.block_planes = int(ceil_div(one.planes, blocks));
    const Tile tile = tile_of(problem, tiling);
    if (tile.buffers.bytes > device.shared_bytes) continue;
    const double cycles = cycles_of(problem, device, results, cut, tiling, tile);
    if (!best || cycles < best->cycles) best = {tiling, cycles};
  }
}

}  // namespace

std::optional<Chosen> choose_tiling(const TensorProblem& problem, const TensorDevice& device, Results results,
                                    std::string& reason) {
  if (device.major < 8) {
    reason = "expected compute capability 8.0 or later, got " + std::to_string(device.major) + ".x";
    return {};
  }
  const int width = problem.axes[1].positions, between = problem.axes[1].most / problem.axes[1].stride;
  const Cut cut = cut_of(problem, results);
  std::optional<Chosen> best;
  for (const TensorVariant& variant : kTensorVariants) {
    if (!suits(variant, problem.vector)) continue;
    const int64_t slices = problem.row_groups * ceil_div(problem.vector, int64_t(variant.rows)) / problem.groups;
    for (const auto& [row_warps, position_warps] : warps_of(ceil_div(slices, int64_t(variant.groups)))) {
      const int positions = position_warps * variant.positions;
      std::vector<std::pair<int, int>> shapes;  // columns of a stretch, places of its rows
      for (int tile_w = kNeighbours; tile_w <= std::min(positions, 32); tile_w *= 2) {
        shapes.emplace_back(tile_w, tile_w);
      }
      if (results == Results::images) {
        shapes.emplace_back(width, width + between);
        int last = width + between;
        for (int run = kNeighbours; run <= 16; run *= 2) {
          const int in_runs = ceil_div(width, run) * run;
          if (in_runs != last) shapes.emplace_back(width, last = in_runs);
        }
      }
      for (const auto& [tile_w, row_places] : shapes) {
        if (row_places > kMostNumber) continue;
        look_at(problem, device, results, cut, {variant, row_warps, position_warps, tile_w, row_places, 1}, best);
      }
    }
  }
  if (!best) {
    reason = "expected a reach that fits a tile in shared memory";
    return {};
  }
  reason = unfit(problem, tile_of(problem, best->tiling));
  return reason.empty() ? best : std::nullopt;
}

Tiling checked_tiling(at::IntArrayRef numbers, const TensorProblem& problem, const TensorDevice& device) {
  constexpr size_t kNumbers = 8;
  TORCH_CHECK_VALUE(numbers.size() == kNumbers && *std::min_element(numbers.begin(), numbers.end()) >= 1 &&
                        *std::max_element(numbers.begin(), numbers.end()) <= kMostNumber,
                    "Expected a tiling of eight numbers as conv2d_tiling gives them, got ", numbers);
  TORCH_CHECK_NOT_IMPLEMENTED(device.major >= 8, "Expected a device of compute capability 8.0 or later, got ",
                              device.major, ".x");
  int n[kNumbers];
  std::copy(numbers.begin(), numbers.end(), n);
  const Tiling tiling{{n[0], n[1], n[2]}, n[3], n[4], n[5], n[6], n[7]};
  const TensorVariant& v = tiling.variant;
  const bool known = std::any_of(std::begin(kTensorVariants), std::end(kTensorVariants), [&](const TensorVariant& of) {
    return of.rows == v.rows && of.groups == v.groups && of.positions == v.positions;
  });
  TORCH_CHECK_VALUE(known && suits(v, problem.vector), "Expected a tiling for V = ", problem.vector, ", got ", numbers);
  // No run of neighbours crosses from row to row, but where rows of places are those of a staged plane.
  const int zeros = problem.axes[1].most / problem.axes[1].stride;
  const bool fits = tiling.row_places >= tiling.tile_w &&
                    (tiling.row_places % kNeighbours == 0 || tiling.row_places == tiling.tile_w + zeros);
  TORCH_CHECK_VALUE(tiling.row_warps * tiling.position_warps <= kTensorWarps && fits &&
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

int sparsekd_tensor_tiling(const int64_t* sizes, const int* device, int images, int64_t* numbers, double* cycles) {
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
  const auto chosen = choose_tiling(problem, {device[0], device[1], device[2]},
                                    images ? Results::images : Results::lanes, reason);
  if (!chosen) return 0;
  *cycles = chosen->cycles;
  const std::vector<int64_t> found = chosen->tiling.numbers();
  std::copy(found.begin(), found.end(), numbers);
  return static_cast<int>(found.size());
}
