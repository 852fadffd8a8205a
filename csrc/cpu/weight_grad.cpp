// The weight gradient at the non-zeros.
//
//   grad_values[i] = sum over images and pixels of  grad_output[n, k, p] * input at the non-zero's distance
//
// Input and gradient lie in the same lanes (lanes.h), so that a tile of the gradient stays in registers for all
// non-zeros of its row (sddmm.inc).
#include <ATen/Parallel.h>

#include <memory>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "generated_dots.h"
#include "passes.h"

namespace sparsekd::cpu {
namespace {

constexpr int64_t kFlatPixels = 1024;          // of a 1 x 1 kernel that lie side by side
constexpr int64_t kChannelGrain = 32;          // that pay for another thread to pack them

// One of the two that are multiplied, as it comes and as it lies in the lanes.
template <class T>
struct Side {
  Batch<const T> images;
  Pair stride{1, 1};
  Planes planes, whole;  // of a strip and of all of an image's together; of the image, if it lies in runs
  Layout layout;
  int64_t pitch;         // elements from one channel to the next
  bool in_place = false;
  int64_t elements() const { return in_place ? 0 : images.channels * pitch; }
};

// Adds all tiles of what is packed. Each thread has its own chunks: the result does not depend on threads.
void add_by_code(const GeneratedDots& code, const Rows<float>& rows, const Grid& grid, const float* inputs,
                 int64_t pitch, int64_t line, const float* grads, int64_t grad_line, float* sums) {
  constexpr int64_t kBytes = sizeof(float);
  const int64_t parts = at::get_num_threads();
  std::vector<std::vector<int32_t>> places;
  for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
    for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
      std::vector<int32_t>& of_tile = places.emplace_back();
      for (int64_t h = grid.begin(0, ty); h < grid.begin(0, ty + 1); ++h) {
        for (int64_t w = grid.begin(1, tx); w < grid.begin(1, tx + 1); ++w) {
          of_tile.push_back(static_cast<int32_t>((h * line + w * grid.lanes) * kBytes));
          of_tile.push_back(static_cast<int32_t>((h * grad_line + w * grid.lanes) * kBytes));
        }
      }
    }
  }
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      for (int64_t group = 0; group < rows.groups; ++group) {
        for (const std::vector<int32_t>& of_tile : places) {
          code.add(group, part, parts, inputs + group * rows.channels_per_group * pitch, grads, of_tile, sums);
        }
      }
    }
  });
}

// By code if there is some that fits; or if `make`, makes it and does no more.
template <class T>
void weight_grad(const Conv2dShape& shape, const Pattern& pattern, const T* input, const T* grad_output,
                 bool channels_last, T* grad_values, const GeneratedDots* code = nullptr,
                 std::unique_ptr<const GeneratedDots>* make = nullptr) {
  Rows<T> rows = rows_of<T>(shape, pattern, nullptr);
  rows.generated = code || make;
  if (!make) std::fill(grad_values, grad_values + pattern.n_vectors * pattern.vector, T(0));
  if (shape.batch == 0 || shape.output[0] * shape.output[1] == 0) return;  // linear has no pixels for no rows
  const bool flat = is_flat(shape);
  const int64_t pixels = shape.output[0] * shape.output[1];
  const Planes of_image = input_planes(shape, shape.output);
  // Pixels of so many images lie side by side that few lanes stay idle.
  const int64_t flat_images = std::clamp<int64_t>(kFlatPixels / pixels, 1, shape.batch);
  auto work_for = [&](int64_t lanes) {
    return work_of(rows, shape.batch, shape.output, shape.input[1], of_image, lanes);
  };
  const Grid grid =
      best_width<T>(grid_key(kWeightGradGrid, shape, rows, channels_last), rows.generated,
                    [&](const LaneKernels<T>& kernels) {
        const TileShape tile_shape = kernels.grad_tile_shape();
        const Work work = work_for(tile_shape.lanes);
        if (flat) return flat_grid(work, tile_shape, flat_images * pixels);
        // What is packed of both lies in L2 until all rows have passed.
        const int64_t fit = channels_last ? 1 : bands_of(work, tile_shape, shape.in_channels + shape.out_channels);
        return best_grid(work, tile_shape, ceil_div(shape.output[0], ceil_div(shape.output[0], fit)), !channels_last);
      });
  const int64_t bands = grid.bands, band_lines = ceil_div(shape.output[0], bands);
  const int64_t lanes = grid.lanes, images_per_unit = flat ? flat_images : grid.images;
  const bool runs = grid.runs && !flat;
  const int64_t step = runs ? 1 : lanes;  // elements from one position to the next
  const Pair strip = flat ? Pair{1, grid.strip[1]} : grid.strip;
  const Pair band{band_lines, shape.output[1]};  // the last one ends in zeros
  Side<T> in, grad;  // gradients have the same positions without a halo
  in.images = {input, shape.batch, shape.in_channels, shape.input, channels_last};
  in.stride = shape.stride;
  in.planes = input_planes(shape, runs ? band : strip);
  in.whole = input_planes(shape, grid.covered());
  in.layout =
      runs ? shared_layout(in.planes, shape.input[1], shape.output[1], lanes, grid.aligned) : plain_layout(in.planes);
  grad.images = {grad_output, shape.batch, shape.out_channels, shape.output, channels_last};
  grad.planes.phases = {Plane{runs ? band : strip, {1, 1}, {0, 0}}};
  grad.whole.phases = {Plane{grid.covered(), {1, 1}, {0, 0}}};
  grad.layout = plain_layout(grad.planes);
  if (runs) grad.layout = {in.layout.pitch, 0, in.layout.pitch * band[0], {0}};
  for (Side<T>* side : {&in, &grad}) {
    // The last vector of a run may reach past the last pixel.
    side->pitch = spread<T>(side->layout.channel() * step + (runs ? of_image.halo[1] + 2 * lanes : 0));
  }
  // What is one image's pixels, whole vectors of them, is read where it lies.
  const bool whole_vectors = flat && images_per_unit == 1 && pixels % lanes == 0;
  for (Side<T>* side : {&in, &grad}) {
    const bool aligned = reinterpret_cast<uintptr_t>(side->images.data) % (lanes * sizeof(T)) == 0;
    side->in_place = whole_vectors && side->stride == Pair{1, 1} && !channels_last && aligned;
    if (side->in_place) side->pitch = pixels;
  }
  const int64_t blocks = grid.blocks;
  const Tiling tiling = tiling_of(in.pitch, blocks, in.planes.taps, in.layout, step);
  if constexpr (std::is_same_v<T, float>) {
    if (make) {
      *make = std::make_unique<GeneratedDots>(rows, tiling, grad.pitch);
      return;
    }
  }
  if (code && !code->fits(tiling, grad.pitch)) {  // tensors lie otherwise than those that it was made for
    return weight_grad(shape, pattern, input, grad_output, channels_last, grad_values);
  }
  const std::vector<int32_t> table = code ? std::vector<int32_t>() : column_table(rows, tiling);

  const int64_t bands_in_unit = runs ? bands : 1, units = ceil_div(shape.batch, images_per_unit) * bands_in_unit;
  Buffer<T> packed(in.elements()), packed_grads(grad.elements()), zeros(grad.pitch);
  Buffer<T> sums(code ? code->places() : 0);
  if (code) std::fill(sums.get(), sums.get() + code->places(), T(0));
  std::fill(zeros.get(), zeros.get() + grad.pitch, T(0));
  auto pack = [&](const Side<T>& side, int64_t unit, int64_t begin, int64_t end, T* to) {
    const int64_t first = unit / bands_in_unit * images_per_unit;
    if (flat) {
      const int64_t count = std::min(images_per_unit, shape.batch - first) * pixels;
      pack_flat(side.images, side.stride, shape.output, first * pixels, count, begin, end, side.pitch, to);
    } else if (runs) {
      pack_planes(side.images, side.planes, side.layout, first, unit % bands * band_lines, begin, end, side.pitch, to);
    } else {
      StripPacker<T>(side.images, side.planes, side.whole, grid).pack(first, begin, end, side.pitch, to);
    }
  };
  for (int64_t unit = 0; unit < units; ++unit) {
    const T* const inputs = in.in_place ? in.images.image(unit) : packed.get();
    const T* const grads = grad.in_place ? grad.images.image(unit) : packed_grads.get();
    at::parallel_for(0, shape.in_channels + shape.out_channels, kChannelGrain, [&](int64_t from, int64_t to) {
      if (from < shape.in_channels && !in.in_place) pack(in, unit, from, std::min(to, shape.in_channels), packed.get());
      if (to > shape.in_channels && !grad.in_place) {
        pack(grad, unit, std::max(from - shape.in_channels, int64_t{0}), to - shape.in_channels, packed_grads.get());
      }
    });
    if constexpr (std::is_same_v<T, float>) {
      if (code) {
        add_by_code(*code, rows, grid, inputs, in.pitch, in.layout.pitch * step, grads, grad.layout.pitch * step,
                    sums.get());
        continue;
      }
    }
    // Each thread sums its own rows over images and tiles in a fixed order: the result does not depend on threads.
    parallel_rows(rows, [&](int64_t from, int64_t to) {
      std::vector<int32_t> cursor;
      for_chunks(rows, grid.largest() * lanes, from, to, [&](int64_t group, int64_t begin, int64_t end) {
        for (int64_t ty = 0; ty < grid.tiles[0]; ++ty) {
          for (int64_t tx = 0; tx < grid.tiles[1]; ++tx) {
            const int64_t y = grid.begin(0, ty), x = grid.begin(1, tx);
            cursor.assign(rows.crow + begin, rows.crow + end);
            SddmmTile<T> tile{};
            tile.lines = static_cast<int>(grid.count(0, ty));
            tile.width = static_cast<int>(grid.count(1, tx));
            tile.line = in.layout.pitch * step;
            tile.input = inputs + group * rows.channels_per_group * in.pitch + y * tile.line + x * lanes;
            tile.table = table.data();
            tile.crow = rows.crow + begin;
            tile.col = rows.col;
            tile.vector = rows.vector;
            tile.cursor = cursor.data();
            tile.grad_line = grad.layout.pitch * step;
            tile.grad = grads + y * tile.grad_line + x * lanes;
            tile.grad_pitch = grad.pitch;
            tile.row_of = rows.row_of + begin * rows.vector;
            tile.zeros = zeros.get();
            tile.grad_values = grad_values;
            for (int64_t block = 0; block < blocks; ++block) {
              tile.limit = block_limit(rows, static_cast<int>(block), static_cast<int>(blocks));
              type_kernels<T>().lanes[grid.width].sddmm(tile, 0, end - begin);
            }
            check_cursors(rows, cursor.data(), begin, end);
          }
        }
      });
    });
  }
  for (int64_t i = 0; code && i < code->places(); ++i) {
    if (code->values()[i] >= 0) grad_values[code->values()[i]] = sums.get()[i];
  }
}

}  // namespace

std::unique_ptr<const GeneratedDots> generated_weight_grad(const Conv2dShape& shape, const Pattern& pattern,
                                                           const at::Tensor& input, const at::Tensor& grad_output) {
  std::unique_ptr<const GeneratedDots> made;
  weight_grad<float>(shape, pattern, input.const_data_ptr<float>(), grad_output.const_data_ptr<float>(), false, nullptr,
                     nullptr, &made);
  return made;
}

void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const GeneratedDots& code,
                        const at::Tensor& input, const at::Tensor& grad_output, at::Tensor& grad_values) {
  weight_grad(shape, pattern, input.const_data_ptr<float>(), grad_output.const_data_ptr<float>(), false,
              grad_values.mutable_data_ptr<float>(), &code);
}

void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, bool channels_last, at::Tensor& grad_values) {
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    weight_grad(shape, pattern, input.const_data_ptr<T>(), grad_output.const_data_ptr<T>(), channels_last,
                grad_values.mutable_data_ptr<T>());
  });
}

}  // namespace sparsekd::cpu
