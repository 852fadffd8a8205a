// Direct convolution with a sparse weight in vector-CSR and dense activations, forward and backward.
//
//   output[n, k, oh, ow]  = bias[k] + sum over non-zeros (c, r, s) of row k of  w * input[n, c, oh*st + r*dil - pad, ...]
//   grad_input            = the same kernel on the transposed pattern, once per phase of the stride
//   grad_values[i]        = sum over images and pixels of  grad_output[n, k, p] * input at the non-zero's offset
//
// No im2col: inputs are copied once into zero-padded planes (planes.h), where a non-zero is one constant offset for a
// whole run of pixels, and a register tile of pixels goes through all non-zeros of an output channel (spmm.inc). After
// SkimCaffe (Park et al., ICLR 2017) and Escoin (Chen, 2018).
#include "direct.h"

#include "../check.h"
#include "spmm.h"

namespace sparsekd::cpu {
namespace {

// offsets[column] = c * channel + tap_offsets[tap], for the columns of one convolution group.
std::vector<int32_t> column_offsets(int64_t channels, const Planes& planes, const std::vector<int64_t>& taps) {
  std::vector<int32_t> table;
  table.reserve(channels * taps.size());
  for (int64_t c = 0; c < channels; ++c) {
    for (const int64_t tap : taps) table.push_back(tap < 0 ? -1 : static_cast<int32_t>(c * planes.channel() + tap));
  }
  return table;
}

template <class T>
Rows<T> stretched_rows(const Conv2dShape& shape, const Pattern& pattern, const Planes& planes, const T* values) {
  Rows<T> rows;
  rows.groups = pattern.groups;
  rows.packed_per_group = pattern.packed_per_group;
  rows.vector = static_cast<int>(pattern.vector);
  rows.crow.assign(pattern.crow, pattern.crow + rows.packed() + 1);
  rows.offsets.resize(pattern.n_vectors);
  rows.values = values;
  rows.row_of = pattern.row_of.data();
  rows.in_order = pattern.in_order;
  rows.channels_per_group = shape.in_channels / shape.groups;
  check_reachable(rows.channels_per_group, planes);
  const std::vector<int32_t> table = column_offsets(rows.channels_per_group, planes, planes.tap_offsets);
  const auto columns = static_cast<int32_t>(table.size());
  if (!kernels().stretch(pattern.col, pattern.n_vectors, table.data(), columns, rows.offsets.data())) {
    outside_error(pattern.col, pattern.n_vectors, columns, "col_indices");
  }
  return rows;
}

// One kernel run over every image: rows, how they are cut up, and which pixels they make.
template <class T>
struct Pass {
  Rows<T> rows;
  Tiling tiling;
  Target target;
  std::vector<T> values;  // where the rows own a copy in their own order
};

// Images as the passes read or write them.
template <class T>
struct Batch {
  T* data;
  int64_t channels;
  Pair size;
  bool last;  // channels_last
  T* image(int64_t n) const { return data + n * channels * size[0] * size[1]; }
};

// result[n] = all passes over the planes of source[n].
template <class T>
void run_passes(int64_t batch, const Batch<const T>& source, const Planes& planes, const std::vector<Pass<T>>& passes,
                const T* init, const Batch<T>& result) {
  const int64_t channels = source.channels, plane = result.size[0] * result.size[1];
  auto fill = [&](int64_t n, int64_t begin, int64_t end, T* packed) {
    fill_planes<T>({source.image(n), channels, source.size, source.last}, planes, begin, end,
                   type_kernels<T>().transpose, packed);
  };
  auto rows_of_image = [&](const Pass<T>& pass, int64_t n, const T* packed, int64_t begin, int64_t end) {
    const Result<T> target{result.image(n), result.last ? 1 : plane, result.last ? result.channels : 1, result.size[1],
                           pass.target};
    spmm_row_range(pass.rows, pass.tiling, planes, packed, init, target, begin, end);
  };
  if (batch >= at::get_num_threads()) {  // images side by side, each thread with its own planes
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
      PlaneBuffer<T> packed(channels * planes.channel());
      for (int64_t n = from; n < to; ++n) {
        fill(n, 0, channels, packed.data.get());
        for (const Pass<T>& pass : passes) rows_of_image(pass, n, packed.data.get(), 0, pass.rows.packed());
      }
    });
    return;
  }
  PlaneBuffer<T> packed(channels * planes.channel());
  for (int64_t n = 0; n < batch; ++n) {  // one image at a time, its rows side by side
    const int64_t grain = std::max<int64_t>(16384 / planes.channel(), 16);
    at::parallel_for(0, channels, grain, [&](int64_t from, int64_t to) { fill(n, from, to, packed.data.get()); });
    for (const Pass<T>& pass : passes) {
      parallel_rows(pass.rows, [&](int64_t begin, int64_t end) {
        rows_of_image(pass, n, packed.data.get(), begin, end);
      });
    }
  }
}

template <class T>
void forward(const Conv2dShape& shape, const Pattern& pattern, const T* input, const T* values, const T* bias,
             bool channels_last, T* output) {
  const Planes planes = input_planes(shape);
  std::vector<Pass<T>> passes(1);
  Pass<T>& pass = passes[0];
  pass.rows = stretched_rows(shape, pattern, planes, values);
  pass.target = {shape.output, {1, 1}, {0, 0}};
  pass.tiling = make_tiling(pass.rows, planes, shape.output, planes.reach,
                            type_kernels<T>().spmm_shape(pass.rows.vector));
  std::vector<T> init;
  if (bias != nullptr) {
    for (const int64_t row : pattern.row_of) init.push_back(row < 0 ? T(0) : bias[row]);
  }
  run_passes<T>(shape.batch, {input, shape.in_channels, shape.input, channels_last}, planes, passes,
                bias ? init.data() : nullptr, {output, shape.out_channels, shape.output, channels_last});
}

template <class T>
void input_grad(const Conv2dShape& shape, const Transposed& transposed, const T* grad_output, const T* values,
                T* grad_input) {
  std::vector<InputGradPhase> phases;
  const Planes planes = input_grad_planes(shape, phases);
  const int64_t rows_per_group = shape.out_channels / shape.groups;
  check_reachable(rows_per_group, planes);
  std::vector<int64_t> row_of(shape.in_channels);
  std::iota(row_of.begin(), row_of.end(), 0);
  std::vector<Pass<T>> passes;
  for (const InputGradPhase& phase : phases) {
    Pass<T>& pass = passes.emplace_back();
    const std::vector<int32_t> table = column_offsets(rows_per_group, planes, phase.tap_offsets);
    const auto columns = static_cast<uint32_t>(table.size());
    pass.rows.crow.push_back(0);
    for (int64_t channel = 0; channel < shape.in_channels; ++channel) {
      for (int64_t i = transposed.crow[channel]; i < transposed.crow[channel + 1]; ++i) {
        const auto column = static_cast<uint32_t>(transposed.col[i]);
        TORCH_CHECK_INDEX(column < columns, "Expected the transpose plan's columns in 0..", columns - 1, ", got ",
                          transposed.col[i]);
        if (table[column] < 0) continue;  // this tap reaches another phase
        pass.rows.offsets.push_back(table[column]);
        pass.values.push_back(values[transposed.place[i]]);
      }
      pass.rows.crow.push_back(static_cast<int32_t>(pass.rows.offsets.size()));
    }
    pass.rows.groups = shape.groups;
    pass.rows.packed_per_group = shape.in_channels / shape.groups;
    pass.rows.channels_per_group = rows_per_group;
    pass.rows.row_of = row_of.data();
    pass.rows.values = pass.values.data();
    pass.target = phase.target;
    pass.tiling = make_tiling(pass.rows, planes, phase.target.size, phase.reach, type_kernels<T>().spmm_shape(1));
  }
  run_passes<T>(shape.batch, {grad_output, shape.out_channels, shape.output, false}, planes, passes, nullptr,
                {grad_input, shape.in_channels, shape.input, false});
}

constexpr int64_t kImagesScratch = 64 << 20;  // bytes of planes that the weight gradient holds at a time

template <class T>
void weight_grad(const Conv2dShape& shape, const Pattern& pattern, const T* input, const T* grad_output,
                 T* grad_values) {
  const Planes planes = input_planes(shape);
  const Rows<T> rows = stretched_rows<T>(shape, pattern, planes, nullptr);
  std::fill(grad_values, grad_values + pattern.n_vectors * pattern.vector, T(0));
  if (shape.batch == 0 || shape.output[0] * shape.output[1] == 0) return;  // linear has no pixels for no rows
  const Tiling tiling = make_tiling(rows, planes, shape.output, planes.reach,
                                    type_kernels<T>().sddmm_shape(rows.vector));

  // The gradient's rows in packed order at the planes' pitch. Zeros between lines and after the last one cancel what
  // the input's planes hold there.
  const int64_t pitch = tiling.vectors * tiling.lanes;
  const int64_t positions = rows.packed() * rows.vector;
  const int64_t input_image = shape.in_channels * planes.channel(), grad_image = positions * pitch;
  const int64_t bytes = (input_image + grad_image) * static_cast<int64_t>(sizeof(T));
  const int64_t images = std::clamp<int64_t>(kImagesScratch / std::max<int64_t>(bytes, 1), 1, shape.batch);
  PlaneBuffer<T> packed(images * input_image);
  std::unique_ptr<T[]> grads(new T[images * grad_image]);
  const Planes grad_plane{{Plane{{shape.output[0], planes.pitch()}, {1, 1}, {0, 0}}}, {0}, 0};
  for (int64_t first = 0; first < shape.batch; first += images) {
    const int64_t count = std::min(images, shape.batch - first);
    at::parallel_for(0, count * shape.in_channels, 4, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t n = i / shape.in_channels, c = i % shape.in_channels;
        const T* image = input + (first + n) * shape.in_channels * shape.input[0] * shape.input[1];
        fill_planes<T>({image, shape.in_channels, shape.input, false}, planes, c, c + 1, type_kernels<T>().transpose,
                       packed.data.get() + n * input_image);
      }
    });
    at::parallel_for(0, count * positions, 4, [&](int64_t from, int64_t to) {
      std::unique_ptr<T[]> whole(new T[grad_plane.plane()]);
      for (int64_t i = from; i < to; ++i) {
        T* out = grads.get() + i * pitch;
        const int64_t row = pattern.row_of[i % positions];
        int64_t filled = 0;
        if (row >= 0) {
          const int64_t channel = (first + i / positions) * shape.out_channels + row;
          fill_planes<T>({grad_output + channel * shape.output[0] * shape.output[1], 1, shape.output, false}, grad_plane,
                         0, 1, type_kernels<T>().transpose, whole.get());
          std::copy(whole.get(), whole.get() + tiling.positions, out);
          filled = tiling.positions;
        }
        std::fill(out + filled, out + pitch, T(0));
      }
    });
    // Each thread sums its own rows over images and tiles in a fixed order: the result does not depend on threads.
    parallel_rows(rows, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t row = begin; row < end;) {
          const int64_t group = row / rows.packed_per_group;
          const int64_t stop = std::min(end, (group + 1) * rows.packed_per_group);
          for (int64_t t = 0; t < tiling.tiles; ++t) {
            SddmmTile<T> tile;
            tile.input = packed.data.get() + n * input_image + group * rows.channels_per_group * planes.channel() +
                         tiling.begin(t);
            tile.offsets = rows.offsets.data();
            tile.bounds = tiling.bounds.data();
            tile.blocks = tiling.blocks;
            tile.vector = rows.vector;
            tile.grad = grads.get() + n * grad_image + tiling.begin(t);
            tile.pitch = pitch;
            tile.grad_values = grad_values;
            tile.vectors = tiling.width(t);
            type_kernels<T>().sddmm(tile, row, stop);
          }
          row = stop;
        }
      }
    });
  }
}

}  // namespace

void direct_forward(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                    const at::Tensor& values, const at::Tensor& bias, at::Tensor& output) {
  if (output.numel() == 0) return;
  const bool channels_last = !input.is_contiguous();
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    forward(shape, pattern, input.const_data_ptr<T>(), values.const_data_ptr<T>(),
            bias.defined() ? bias.const_data_ptr<T>() : nullptr, channels_last, output.mutable_data_ptr<T>());
  });
}

void direct_input_grad(const Conv2dShape& shape, const Transposed& transposed, const at::Tensor& grad_output,
                       const at::Tensor& values, at::Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  dispatch(grad_output, [&](auto zero) {
    using T = decltype(zero);
    input_grad(shape, transposed, grad_output.const_data_ptr<T>(), values.const_data_ptr<T>(),
               grad_input.mutable_data_ptr<T>());
  });
}

void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, at::Tensor& grad_values) {
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    weight_grad(shape, pattern, input.const_data_ptr<T>(), grad_output.const_data_ptr<T>(),
                grad_values.mutable_data_ptr<T>());
  });
}

}  // namespace sparsekd::cpu
