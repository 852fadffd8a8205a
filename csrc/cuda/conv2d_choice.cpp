// Which kernel of the convolution on CUDA cores, and which tile, serves a problem: by a model of what launches take.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "direct.h"
#include "weight_grad.h"

#ifdef SPARSEKD_EMULATED
// Of kConv2dVariants, the one that a test wants to see at work, or all.
extern "C" __attribute__((visibility("default"))) int emulator_conv2d_variant = -1;
#else
static constexpr int emulator_conv2d_variant = -1;
#endif

namespace sparsekd::cuda {
namespace {

constexpr int64_t kStageBytes[] = {8 << 10, 16 << 10, 32 << 10, 48 << 10};  // of each of two buffers
constexpr int64_t kMostStageBytes = 48 << 10;
// Of the weight gradient, in cycles of an SM. A read of shared memory by a warp; a vector of 16 bytes that is copied
// there, with its instructions.
constexpr double kReadCost = 4, kStagedCost = 0.16;
// Of the convolution, fitted to launches that were timed on an H200: ResNet-50's layers at a tenth of the weights, V of 1,
// 2, 4 and 8, batches of 1, 8 and 32, all tiles and variants (6688; of the best one's neighbourhood the root mean square
// error is 18%). Instructions of a warp that an entry takes beside its reads and multiply-adds; a slice's entries in one
// block of channels; a staged vector of each lane; 32 results, or 128 of flat planes; and the rest.
constexpr double kEntryCost = 8, kPieceCost = 200, kVectorCost = 1.5, kResultsCost = 25, kFlatResultsCost = 30,
                 kWarpCost = 560;
constexpr double kIssue = 4;      // cycles from one instruction of a warp to its next one, where no other warp wants to
constexpr double kL2Bytes = 20;   // that a multiprocessor gets in a cycle

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

// What a launch consists of.
struct Launch {
  int64_t blocks, warps;         // of threads; of each
  double entries;                // of a slice
  int64_t channels, tile_plane;  // of a group; what is staged of each
};

// How long it takes, in cycles.
double cycles_of(const TensorDevice& device, const Choice& choice, const Launch& launch, bool flat) {
  const Conv2dVariant& v = choice.variant;
  const double pieces = static_cast<double>(ceil_div(launch.channels, choice.block_channels));
  const double warps = static_cast<double>(launch.warps);
  const double reads = v.lane_groups * v.run, record_reads = v.vector <= 2 ? 1 : 1 + v.vector / 4;
  // Of what its parts can't share out evenly, each takes all.
  const double of_entry = record_reads + reads * (1 + 4 * v.vector);
  const double loop = launch.entries * (of_entry + kEntryCost / v.parts) +
                      pieces * (v.parts - 1) / 2 * (of_entry + kEntryCost);
  const double staged = static_cast<double>(launch.channels * v.lane_groups);
  const double results = v.vector * v.groups * v.lane_groups * 4 * v.run;
  const double instructions = v.groups * (loop + pieces * kPieceCost) + kWarpCost +
                              staged * static_cast<double>(ceil_div(launch.tile_plane, 32)) / warps * kVectorCost +
                              results * (flat ? kFlatResultsCost / 4 : kResultsCost);
  const int64_t plane = v.plane ? v.plane : launch.tile_plane;
  const int64_t shared = conv2d_shared(int(choice.block_channels * v.lane_groups * plane), int(launch.warps * v.groups),
                                       v.vector, int(launch.tile_plane), int(pieces)).bytes;
  const int sums = v.vector * v.lane_groups * v.groups * v.run * v.parts;
  const int64_t per_warp = conv2d_resident(sums, v.vector, v.parts) * kConv2dWarps / launch.warps;
  const int64_t resident = std::clamp<int64_t>((device.shared_bytes + 1024) / (shared + 1024), 1, std::max<int64_t>(per_warp, 1));
  auto wave = [&](int64_t blocks) {  // so many on a multiprocessor
    return instructions * std::hypot(static_cast<double>(blocks) * warps / 4, kIssue);
  };
  const int64_t at_once = resident * device.multiprocessors, left = launch.blocks % at_once;
  const double whole = static_cast<double>(launch.blocks / at_once) * wave(resident);
  const double cycles = whole + (left ? wave(ceil_div(left, device.multiprocessors)) : 0);
  const double bytes = staged * static_cast<double>(launch.tile_plane) * 16;
  const double shared_reads = warps * (v.groups * launch.entries * (reads * 4 + record_reads / v.parts) + results * 2);
  const double of_each = static_cast<double>(launch.blocks) / device.multiprocessors;
  return std::max({cycles, of_each * (shared_reads + bytes / 128), of_each * bytes / kL2Bytes});
}

// Positions in rectangles of 32 or in runs, images or strips in lanes: the way that takes least of reads of shared
// memory (see the head of conv2d.cuh), copies and stores.
std::optional<Choice> choose_tile(const TensorDevice& device, const Problem& problem, int64_t n_vectors,
                                  const std::optional<Stores>& stores) {
  const int64_t vector = problem.vector >= 8 ? 8 : problem.vector >= 3 ? 4 : problem.vector;
  const TapAxis &ay = problem.axes[0], &ax = problem.axes[1];
  const int phases[2] = {phases_of(ay), phases_of(ax)};
  const int64_t columns = ax.positions + ax.most / ax.stride, limit = std::numeric_limits<int32_t>::max();
  const double entries = static_cast<double>(n_vectors) / static_cast<double>(problem.row_groups);
  std::vector<Choice> choices;
  for (const Conv2dVariant& variant : stores ? std::span<const Conv2dVariant>(kConv2dVariants)
                                              : std::span<const Conv2dVariant>(kWeightGradVariants)) {
    if (variant.vector != vector || (variant.run > 1 && !(stores && stores->joined))) continue;
    if (stores && emulator_conv2d_variant >= 0 && &variant != &kConv2dVariants[emulator_conv2d_variant]) continue;
    if ((problem.interleaved && variant.groups != 4) || (problem.flat && variant.lane_groups != 1)) continue;
    const int64_t row_vectors = problem.flat ? columns : lane_columns(columns);
    const int64_t slots = 4 * variant.lane_groups;
    const int64_t wanted = std::clamp<int64_t>(ceil_div(slots, std::max<int64_t>(problem.batch, 1)), 1, ay.positions);
    const int64_t strip_rows = ceil_div(ay.positions, wanted), strips = ceil_div(ay.positions, strip_rows);
    const int64_t units = ceil_div(problem.batch * strips, slots);
    const int64_t rows = strip_rows + ay.most / ay.stride;
    const int64_t lanes_plane = phases[0] * rows * phases[1] * row_vectors;
    if (lanes_plane > limit / 2) continue;
    Choice choice{};
    choice.variant = variant;
    choice.lanes = {int(problem.batch), int(problem.in_channels), variant.lane_groups, int(strips), int(strip_rows),
                    int(units), {phases[0], phases[1]}, int(rows), int(row_vectors), int(lanes_plane)};
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
      choice.sectors = stored;
      choice.plane = int(plane);
      const int64_t channels = problem.channels_per_group();
      if (!stores) {
        const double tile_units = static_cast<double>(units * tiles);
        choice.block_channels = std::clamp<int64_t>((32 << 10) / bytes, 1, channels);
        choice.cost = tile_units * (std::max(entries, 1.0) * (variant.lane_groups + 0.5 / variant.parts) * kReadCost +
                                    static_cast<double>(channels * plane * variant.lane_groups) * kStagedCost /
                                        (kConv2dWarps * variant.groups));
        choices.push_back(choice);
        return;
      }
      const int64_t slices = problem.row_groups / problem.groups *
                             (problem.interleaved ? 4 : ceil_div(problem.vector, variant.vector));
      // So that hardly a slice has more entries in a block of channels than are staged.
      const double staged = std::sqrt(1.0 + staged_records(variant.vector)) - 1;
      const double of_channel = (problem.interleaved ? entries / 4 : entries) / static_cast<double>(channels);
      const int64_t most = std::max<int64_t>(static_cast<int64_t>(staged * staged / std::max(of_channel, 1e-3)), 1);
      for (const int64_t most_warps : {kConv2dWarps, kConv2dWarps / 2}) {
        choice.warps = std::clamp<int64_t>(ceil_div(slices, int64_t{variant.groups}), 1, most_warps);
        int64_t before = 0;
        for (const int64_t stage : kStageBytes) {
          choice.block_channels = std::clamp<int64_t>(stage / bytes, 1, std::min(channels, most));
          if (choice.block_channels == before) continue;
          before = choice.block_channels;
          const int64_t row_blocks = ceil_div(slices, choice.warps * variant.groups);
          choice.cost = cycles_of(device, choice, {units * tiles * problem.groups * row_blocks, choice.warps,
                                                   problem.interleaved ? entries / 4 : entries, channels, plane},
                                  problem.flat);
          choices.push_back(choice);
        }
        if (choice.warps < most_warps) break;
      }
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

std::optional<Choice> choose(const TensorDevice& device, const Problem& problem, int64_t n_vectors,
                             const at::Tensor& output) {
  std::optional<Stores> stores;
  if (problem.flat) {
    stores = {4 * output.element_size(), problem.axes[1].positions, true};
  } else if (output.defined()) {
    const auto& [y, x] = problem.axes;
    const int64_t height = output_size(problem, 0), width = output_size(problem, 1);
    bool joined = (width == 1 || output.stride(3) == 1) && (height == 1 || output.stride(2) == width);
    joined = joined && (problem.interleaved || (y.out_step == 1 && x.out_step == 1));
    stores = {output.element_size(), width, joined};
  }
  if (emulator_conv2d_variant >= 0) return choose_tile(device, problem, n_vectors, stores);
  // Hundreds are compared, and a layer is called with the same sizes over and over.
  std::vector<int64_t> key{device.major, device.shared_bytes, device.multiprocessors, problem.batch,
                           problem.in_channels, problem.out_channels, problem.groups, problem.vector,
                           problem.row_groups, problem.interleaved, problem.output_size[0], problem.output_size[1],
                           problem.flat, n_vectors, stores.has_value()};
  if (stores) key.insert(key.end(), {stores->element_size, stores->width, stores->joined});
  for (const TapAxis& a : problem.axes) {
    key.insert(key.end(), {a.kernel, a.add, a.mult, a.div, a.least, a.stride, a.origin, a.size, a.positions,
                           a.out_step, a.out_begin, a.most});
  }
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, std::optional<Choice>> known;
  constexpr size_t kMostKnown = 4096;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() >= kMostKnown) known.clear();
  return known[key] = choose_tile(device, problem, n_vectors, stores);
}

Choice checked_choice(const TensorDevice& device, const Problem& problem, int64_t n_vectors,
                      const at::Tensor& output) {
  const std::optional<Choice> chosen = choose(device, problem, n_vectors, output);
  TORCH_CHECK_NOT_IMPLEMENTED(chosen,
                              "Expected a kernel whose reach, dilation * (size - 1), fits a tile in shared memory for "
                              "conv2d on cuda, got ", problem.axes[0].most, " by ", problem.axes[1].most);
  return *chosen;
}

bool has_flat_planes(const Problem& problem) {
  bool flat = !problem.interleaved && int64_t(problem.axes[0].size) * problem.axes[1].size % 4 == 0;
  for (const TapAxis& axis : problem.axes) {
    flat = flat && axis.kernel == 1 && axis.stride == 1 && axis.origin == 0 && axis.most == 0 && axis.add == 0 &&
           axis.positions == axis.size && axis.out_step == 1 && axis.out_begin == 0;
  }
  return flat;
}

bool is_flat(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat && t.is_contiguous() &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

Problem flattened(const Problem& problem) {
  Problem flat = problem;
  flat.flat = true;
  flat.batch = 4 * problem.batch;
  const int vectors = problem.axes[0].size * problem.axes[1].size / 4;
  flat.axes[0].size = flat.axes[0].positions = 1;
  flat.axes[1].size = flat.axes[1].positions = vectors;
  return flat;
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

}  // namespace sparsekd::cuda
