// conv2d and conv2d_fused on CUDA: checks, the choice of kernel and tile, launches.
// Nothing here waits for the device. Indices are not looked at on the host: entries outside the pattern's range are
// left out by the kernel that prepares them, so that wrong indices give wrong numbers at worst.
#include "direct.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/silu.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "../geometry.h"
#include "conv2d_tensor_host.h"
#include "host.h"
#include "planar_host.h"
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

int64_t output_size(const Problem& problem, int d) {
  return problem.interleaved ? problem.output_size[d] : problem.axes[d].positions;
}

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
