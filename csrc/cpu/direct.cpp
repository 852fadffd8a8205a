// Direct convolution with a sparse weight in vector-CSR and dense activations, forward and backward.
//
//   output[n, k, oh, ow] = bias[k] + sum over non-zeros (c, r, s) of row k of
//                          w * input[n, c, oh*st + r*dil - pad, ...]
//   grad_input           = the same kernel on the transposed pattern, once per phase of the stride
//   grad_values[i]       = sum over images and pixels of  grad_output[n, k, p] * input at the non-zero's offset
//
// No im2col: inputs are copied once into planes of vectors (lanes.h), where a non-zero is one constant distance for all
// pixels, and a register tile of pixels goes through all non-zeros of an output channel (spmm.inc). After SkimCaffe
// (Park et al., ICLR 2017) and Escoin (Chen, 2018). A 1 x 1 kernel reads its input where it lies, if it lies well.
#include "direct.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "../check.h"
#include "flat_pixels.h"
#include "stream.h"

namespace sparsekd::cpu {
namespace {

template <class T>
void forward(const Conv2dShape& shape, const Pattern& pattern, bool generated, const OffsetPlan* plan, Tiling* asked,
             const T* input, const T* values, const T* bias, const Epilogue<T>& epilogue, bool channels_last,
             T* output) {
  std::vector<Pass<T>> passes(1);
  Pass<T>& pass = passes[0];
  pass.rows = rows_of(shape, pattern, values);
  pass.rows.generated = generated;
  pass.target = {shape.output, {1, 1}, {0, 0}};
  pass.plan = plan;
  pass.asked = asked;
  std::vector<T> init;
  if (bias != nullptr) {
    for (const int64_t row : pattern.row_of) init.push_back(row < 0 ? T(0) : bias[row]);
  }
  const Batch<const T> source{input, shape.batch, shape.in_channels, shape.input, channels_last};
  const Batch<T> result{output, shape.batch, shape.out_channels, shape.output, channels_last};
  const T* start = bias ? init.data() : nullptr;
  const GridKey key = grid_key(kForwardGrid, shape, pass.rows, channels_last);
  if (is_flat(shape))
    return over_pixels(key, source, shape.stride, shape.output, {1, 1}, passes, start, epilogue, result);
  run_passes<T>(
      key, source, shape.output,
      [&](const Pair& positions, std::vector<Pass<T>>* of) {
        Planes planes = input_planes(shape, positions);
        if (of) (*of)[0].taps = planes.taps;
        return planes;
      },
      passes, start, epilogue, result);
}

// The transposed rows' entries, each in the phase that its tap reaches; values are left to `places`.
template <class T>
std::vector<Pass<T>> split(const Rows<T>& rows, const Transposed& transposed,
                           const std::vector<InputGradPhase>& phases) {
  const bool all =
      std::all_of(phases[0].taps.begin(), phases[0].taps.end(), [](const Tap& tap) { return tap.phase >= 0; });
  std::vector<Pass<T>> passes(phases.size());
  for (size_t p = 0; p < phases.size(); ++p) {
    passes[p].rows = rows;
    passes[p].target = phases[p].target;
  }
  if (all && phases.size() == 1) {
    passes[0].rows.crow = transposed.crow;
    passes[0].rows.col = transposed.col;
    passes[0].places = transposed.place;
    return passes;
  }
  const auto columns = static_cast<uint32_t>(rows.columns());
  std::vector<int> phase_of(rows.columns(), -1);  // by column
  for (size_t p = 0; p < phases.size(); ++p) {
    for (int64_t tap = 0; tap < rows.taps; ++tap) {
      if (phases[p].taps[tap].phase < 0) continue;
      for (int64_t column = tap; column < rows.columns(); column += rows.taps) phase_of[column] = static_cast<int>(p);
    }
  }
  for (Pass<T>& pass : passes) {
    pass.col.reserve(transposed.count / phases.size() + 1);
    pass.own_places.reserve(transposed.count / phases.size() + 1);
    pass.crow.push_back(0);
  }
  for (int64_t channel = 0; channel < rows.packed(); ++channel) {
    for (int64_t i = transposed.crow[channel]; i < transposed.crow[channel + 1]; ++i) {
      const auto column = static_cast<uint32_t>(transposed.col[i]);
      if (column >= columns) outside_error(transposed.col, transposed.count, columns, rows.name);
      if (phase_of[column] < 0) continue;  // no pixel is there
      Pass<T>& pass = passes[phase_of[column]];
      pass.col.push_back(transposed.col[i]);
      pass.own_places.push_back(transposed.place[i]);
    }
    for (Pass<T>& pass : passes) pass.crow.push_back(static_cast<int32_t>(pass.col.size()));
  }
  for (Pass<T>& pass : passes) {
    pass.rows.crow = pass.crow.data();
    pass.rows.col = pass.col.data();
    pass.places = pass.own_places.data();
    pass.idle = pass.col.empty();
  }
  return passes;
}

// What the passes of an input gradient share.
template <class T>
struct InputGrad {
  explicit InputGrad(const Conv2dShape& shape) : shape(shape), row_of(shape.in_channels) {
    std::iota(row_of.begin(), row_of.end(), 0);
    rows.groups = shape.groups;
    rows.packed_per_group = shape.in_channels / shape.groups;
    rows.channels_per_group = shape.out_channels / shape.groups;
    rows.taps = shape.taps();
    rows.row_of = row_of.data();
    rows.name = "the transpose plan's columns";
    input_grad_planes(shape, {1, 1}, phases);
    for (int d = 0; d < 2; ++d) pixels[d] = ceil_div(shape.input[d], shape.stride[d]);
  }

  Planes planes_for(const Pair& positions, std::vector<Pass<T>>* of) {
    phases.clear();
    Planes planes = input_grad_planes(shape, positions, phases);
    for (size_t i = 0; of && i < phases.size(); ++i) (*of)[i].taps = phases[i].taps;
    return planes;
  }

  // Brings values to their places, and runs all passes.
  void run(std::vector<Pass<T>>& passes, const T* grad_output, const T* values, bool channels_last, T* grad_input) {
    for (Pass<T>& pass : passes) {
      if (pass.asked || pass.idle) continue;
      const int64_t count = pass.rows.crow[pass.rows.packed()];
      pass.values.resize(count);
      for (int64_t i = 0; i < count; ++i) pass.values[i] = values[pass.places[i]];
      pass.rows.values = pass.values.data();
    }
    const bool asked = passes[0].asked != nullptr;
    if (is_flat(shape) && shape.stride != Pair{1, 1} && !channels_last && !passes[0].idle) {
      return run_apart(passes, grad_output, grad_input);
    }
    // Of a kernel smaller than the stride, most phases are reached by nothing.
    if (!asked && std::any_of(passes.begin(), passes.end(), [](const Pass<T>& pass) { return pass.idle; })) {
      std::fill(grad_input, grad_input + shape.batch * shape.in_channels * shape.input[0] * shape.input[1], T(0));
    }
    const Batch<const T> source{grad_output, shape.batch, shape.out_channels, shape.output, channels_last};
    const Batch<T> result{grad_input, shape.batch, shape.in_channels, shape.input, channels_last};
    const GridKey key = grid_key(kInputGradGrid, shape, passes[0].rows, channels_last);
    if (is_flat(shape) && shape.stride == Pair{1, 1}) {
      return over_pixels<T>(key, source, {1, 1}, shape.output, {1, 1}, passes, nullptr, {}, result);
    }
    run_passes<T>(
        key, source, pixels,
        [&](const Pair& positions, std::vector<Pass<T>>* of) { return planes_for(positions, of); }, passes, nullptr, {},
        result);
  }

  // Of a 1 x 1 kernel, which reaches every stride-th pixel alone, those of the first phase. They are computed side by
  // side, a few images at a time, and go to their places, with zeros between, while they are in the cache.
  void run_apart(std::vector<Pass<T>>& passes, const T* grad_output, T* grad_input) {
    constexpr int64_t kChunk = int64_t{1} << 20;  // bytes
    const int64_t pixels = shape.output[0] * shape.output[1], plane = shape.input[0] * shape.input[1];
    const auto bytes = static_cast<int64_t>(sizeof(T));
    const int64_t few = std::clamp<int64_t>(kChunk / (shape.in_channels * pixels * bytes), 1, shape.batch);
    const bool streamed = shape.batch * shape.in_channels * plane * bytes >= kStreamed;
    const Buffer<T> side_by_side(few * shape.in_channels * pixels);
    Conv2dShape close = shape;
    close.input = shape.output;
    close.stride = {1, 1};
    for (int64_t first = 0; first < shape.batch; first += close.batch) {
      close.batch = std::min(few, shape.batch - first);
      const Batch<const T> source{grad_output + first * shape.out_channels * pixels, close.batch, shape.out_channels,
                                  shape.output, false};
      const Batch<T> result{side_by_side.get(), close.batch, shape.in_channels, shape.output, false};
      over_pixels<T>(grid_key(kInputGradGrid, close, passes[0].rows, false), source, {1, 1}, shape.output, {1, 1},
                     passes, nullptr, {}, result);
      const int64_t planes = close.batch * shape.in_channels;
      at::parallel_for(0, planes, std::max<int64_t>(kChunk / 16 / (plane * bytes), 1), [&](int64_t begin, int64_t end) {
        const Buffer<T> whole(plane);
        std::fill(whole.get(), whole.get() + plane, T(0));
        for (int64_t p = begin; p < end; ++p) {
          const T* const from = side_by_side.get() + p * pixels;
          T* const to = grad_input + (first * shape.in_channels + p) * plane;
          for (int64_t y = 0; y < shape.output[0]; ++y) {
            store_apart(from + y * shape.output[1], shape.output[1], shape.stride[1],
                        whole.get() + y * shape.stride[0] * shape.input[1]);
          }
          if (streamed) {
            stream(whole.get(), plane * bytes, to);
          } else {
            std::copy_n(whole.get(), plane, to);
          }
        }
        if (streamed) end_stream();
      });
    }
  }

  const Conv2dShape& shape;
  std::vector<int64_t> row_of;
  Rows<T> rows;
  std::vector<InputGradPhase> phases;
  Pair pixels;  // of the largest phase
};

}  // namespace

Tiling direct_tiling(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& like, bool generated) {
  Tiling tiling;
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(shape, pattern, generated, nullptr, &tiling, nullptr, nullptr, nullptr, {}, false, nullptr);
  });
  return tiling;
}

void plan_offsets(const Conv2dShape& shape, const Pattern& pattern, const Tiling& tiling, int32_t* starts,
                  int32_t* offset, int32_t* order) {
  const Rows<float> rows = rows_of<float>(shape, pattern, nullptr);
  const int64_t count = rows.packed();
  std::vector<int32_t> stretched(pattern.n_vectors), by_row((tiling[1] + 1) * count);
  stretch(rows, tiling, stretched.data());
  if (std::find(stretched.begin(), stretched.end(), -1) != stretched.end()) {
    outside_error(pattern.col, pattern.n_vectors, shape.in_channels / shape.groups * shape.taps(), "col_indices");
  }
  count_starts(rows, tiling[1], by_row.data());
  if (order == nullptr) {
    std::copy(stretched.begin(), stretched.end(), offset);
    std::copy(by_row.begin(), by_row.end(), starts);
    return;
  }
  order_entries(std::move(by_row), count, starts, order);
  for (int64_t i = 0; i < pattern.n_vectors; ++i) offset[i] = stretched[order[i]];
}

void direct_forward(const Conv2dShape& shape, const Pattern& pattern, const OffsetPlan* plan, const at::Tensor& input,
                    const at::Tensor& values, const Finish& finish, bool channels_last, at::Tensor& output) {
  if (output.numel() == 0) return;
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; };
    // A shift alone is where the sums begin.
    const bool scaled = finish.scale.defined();
    const Epilogue<T> epilogue{data(finish.scale), scaled ? data(finish.shift) : nullptr, data(finish.residual),
                               finish.activation};
    forward<T>(shape, pattern, plan && plan->code, plan, nullptr, input.const_data_ptr<T>(), values.const_data_ptr<T>(),
               scaled ? nullptr : data(finish.shift), epilogue, channels_last, output.mutable_data_ptr<T>());
  });
}

void direct_input_grad(const Conv2dShape& shape, const Transposed& transposed, const at::Tensor& grad_output,
                       const at::Tensor& values, bool channels_last, at::Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  dispatch(grad_output, [&](auto zero) {
    using T = decltype(zero);
    InputGrad<T> input_grad(shape);
    std::vector<Pass<T>> passes = split(input_grad.rows, transposed, input_grad.phases);
    input_grad.run(passes, grad_output.const_data_ptr<T>(), values.const_data_ptr<T>(), channels_last,
                   grad_input.mutable_data_ptr<T>());
  });
}

std::unique_ptr<InputGradPlan> plan_input_grad(const Conv2dShape& shape, const Transposed& transposed) {
  InputGrad<float> input_grad(shape);
  if (shape.batch == 0 || transposed.count == 0 || is_flat(shape)) return nullptr;
  std::vector<Pass<float>> passes = split(input_grad.rows, transposed, input_grad.phases);
  if (main_pass(passes).idle) return nullptr;
  const Batch<const float> source{nullptr, shape.batch, shape.out_channels, shape.output, false};
  const auto cost = [&](bool generated) {
    for (Pass<float>& pass : passes) pass.rows.generated = generated;
    const GridKey key = grid_key(kInputGradGrid, shape, passes[0].rows, false);
    const Planes planes = input_grad.planes_for(input_grad.pixels, nullptr);
    return planes_grid(key, main_pass(passes).rows, source, input_grad.pixels, planes).cost;
  };
  const double interpreted = cost(false);
  if (cost(true) >= interpreted && !generates_always()) return nullptr;
  auto plan = std::make_unique<InputGradPlan>();
  plan->phases.resize(passes.size());
  for (size_t p = 0; p < passes.size(); ++p) passes[p].asked = &plan->phases[p].tiling;
  input_grad.run(passes, nullptr, nullptr, false, nullptr);
  for (size_t p = 0; p < passes.size(); ++p) {
    const Rows<float>& rows = passes[p].rows;
    InputGradPlan::Phase& phase = plan->phases[p];
    phase.crow.assign(rows.crow, rows.crow + rows.packed() + 1);
    if (passes[p].idle) continue;
    const std::vector<int32_t> table = column_table(rows, phase.tiling);
    if (*std::max_element(table.begin(), table.end()) > GeneratedRows::kFarthest) return nullptr;
    phase.code = std::make_unique<GeneratedRows>(rows, table, phase.tiling[1]);
    for (const int32_t entry : phase.code->order()) phase.places.push_back(passes[p].places[entry]);
  }
  return plan;
}

void direct_input_grad(const Conv2dShape& shape, const InputGradPlan& plan, const at::Tensor& grad_output,
                       const at::Tensor& values, at::Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  InputGrad<float> input_grad(shape);
  std::vector<Pass<float>> passes(plan.phases.size());
  std::vector<OffsetPlan> offsets;
  offsets.reserve(passes.size());
  for (size_t p = 0; p < passes.size(); ++p) {
    const InputGradPlan::Phase& phase = plan.phases[p];
    Pass<float>& pass = passes[p];
    offsets.push_back({phase.tiling, nullptr, nullptr, nullptr, phase.code.get()});
    pass.rows = input_grad.rows;
    pass.rows.generated = true;
    pass.rows.crow = phase.crow.data();
    pass.target = input_grad.phases[p].target;
    pass.places = phase.places.data();
    pass.idle = phase.code == nullptr;
    pass.plan = &offsets[p];
  }
  input_grad.run(passes, grad_output.const_data_ptr<float>(), values.const_data_ptr<float>(), false,
                 grad_input.mutable_data_ptr<float>());
}

}  // namespace sparsekd::cpu
