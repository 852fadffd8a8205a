#include "squeeze_excite.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../check.h"
#include "../geometry.h"
#include "kernels.h"

namespace sparsekd::cpu {
namespace {

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(32)));
typedef int32_t LooseBits __attribute__((vector_size(32), aligned(4), may_alias));

// Per lane the bits of the largest number, of which NaN is larger than infinity.
__attribute__((always_inline)) inline void maxima(const float* in, const PlaneRuns& runs, int32_t* most) {
  Bits largest[2] = {};
  for (int64_t line = 0; line < runs.lines; ++line, in += runs.pitch) {
    int64_t i = 0;
    for (; i + kSumLanes <= runs.count; i += kSumLanes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Bits bits = *reinterpret_cast<const LooseBits*>(in + i + half * 8) & 0x7fffffff;
        largest[half] = bits > largest[half] ? bits : largest[half];
      }
    }
    for (; i < runs.count; ++i) {
      int32_t bits;
      std::memcpy(&bits, in + i, sizeof(bits));
      most[i % kSumLanes] = std::max(most[i % kSumLanes], bits & 0x7fffffff);
    }
  }
  for (int lane = 0; lane < kSumLanes; ++lane) most[lane] = std::max(most[lane], largest[lane / 8][lane % 8]);
}

// Per lane the sum of numbers rounded to the last place of `unit`, to which each is added for a moment.
__attribute__((always_inline)) inline void sums(const float* in, const PlaneRuns& runs, const double* unit,
                                                double* sum) {
  Doubles at[2], total[2] = {};
  std::memcpy(at, unit, sizeof(at));
  for (int64_t line = 0; line < runs.lines; ++line, in += runs.pitch) {
    int64_t i = 0;
    for (; i + kSumLanes <= runs.count; i += kSumLanes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Doubles x = __builtin_convertvector(*reinterpret_cast<const Floats*>(in + i + half * 8), Doubles);
        total[half] += (x + at[half]) - at[half];
      }
    }
    for (; i < runs.count; ++i) sum[i % kSumLanes] += (in[i] + unit[i % kSumLanes]) - unit[i % kSumLanes];
  }
  for (int lane = 0; lane < kSumLanes; ++lane) sum[lane] += total[lane / 8][lane % 8];
}

#if defined(__x86_64__)
#define SPARSEKD_FOR(isa, name)                                                                            \
  __attribute__((target(isa))) void maxima_##name(const float* in, const PlaneRuns& runs, int32_t* most) { \
    maxima(in, runs, most);                                                                                \
  }                                                                                                        \
  __attribute__((target(isa))) void sums_##name(const float* in, const PlaneRuns& runs, const double* unit, \
                                                double* sum) {                                             \
    sums(in, runs, unit, sum);                                                                             \
  }
SPARSEKD_FOR("avx2", avx2)
SPARSEKD_FOR("avx512f", avx512)
#undef SPARSEKD_FOR
#endif

void maxima_baseline(const float* in, const PlaneRuns& runs, int32_t* most) { maxima(in, runs, most); }
void sums_baseline(const float* in, const PlaneRuns& runs, const double* unit, double* sum) {
  sums(in, runs, unit, sum);
}

// The same bits under each instruction set.
struct Sums {
  void (*maxima)(const float*, const PlaneRuns&, int32_t*) = &maxima_baseline;
  void (*sums)(const float*, const PlaneRuns&, const double*, double*) = &sums_baseline;
};

const Sums& functions() {
  static const Sums chosen = [] {
#if defined(__x86_64__)
    const std::string isa = kernels().isa;
    if (isa == "avx512") return Sums{&maxima_avx512, &sums_avx512};
    if (isa == "avx2") return Sums{&maxima_avx2, &sums_avx2};
#endif
    return Sums{};
  }();
  return chosen;
}

// A number whose last place is that of which `pixels` numbers up to `most` can be added without rounding.
double unit_of(int32_t most, int64_t pixels) {
  const int64_t exponent = (most >> 23) - 126;  // most < 2^exponent
  const int64_t bits = std::max(64 - __builtin_clzll(static_cast<uint64_t>(pixels)), 3);  // pixels < 2^bits
  const int64_t power = (1023 + exponent + bits - 1) << 52, half = int64_t{1} << 51;
  double unit;  // 1.5 * 2^(exponent + bits - 1)
  const int64_t pattern = power | half;
  std::memcpy(&unit, &pattern, sizeof(unit));
  return unit;
}

// The mean over all lanes.
float plane_mean(const float* in, const PlaneRuns& runs, int64_t pixels) {
  int32_t most[kSumLanes] = {};
  functions().maxima(in, runs, most);
  double unit[kSumLanes], sum[kSumLanes] = {};
  std::fill(unit, unit + kSumLanes, unit_of(*std::max_element(most, most + kSumLanes), pixels));
  functions().sums(in, runs, unit, sum);
  double total = 0;
  for (const double lane : sum) total += lane;
  return static_cast<float>(total / static_cast<double>(pixels));
}

// sum_i a[i] * b[i], in an order of its own.
float dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 16;
  float sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) sum[s] += a[i + s] * b[i + s];
  }
  for (int s = 0; i < count; ++i, ++s) sum[s] += a[i] * b[i];
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int s = 0; s < width; ++s) sum[s] += sum[s + width];
  }
  return sum[0];
}

bool floats(const at::Tensor& tensor, at::IntArrayRef size) {
  return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.sizes() == size && tensor.is_contiguous();
}

at::Tensor squeeze_excite_cpu(const at::Tensor& input, const at::Tensor& reduce,
                              const std::optional<at::Tensor>& reduce_bias, const at::Tensor& expand,
                              const std::optional<at::Tensor>& expand_bias, c10::string_view activation,
                              c10::string_view gate) {
  check_dim(input, "input", 4);
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat, "Expected input of dtype Float, got ", input.scalar_type());
  check_dim(reduce, "reduce", 2);
  const int64_t channels = input.size(1), hidden = reduce.size(0), pixels = input.size(2) * input.size(3);
  auto checked = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef size) {
    TORCH_CHECK_VALUE(tensor.sizes() == size, "Expected ", name, " of shape ", size, ", got ", tensor.sizes());
    check_same(tensor, name, input, "input");
    return tensor.contiguous();
  };
  Excitation excitation;
  excitation.reduce = checked(reduce, "reduce", {hidden, channels});
  excitation.expand = checked(expand, "expand", {channels, hidden});
  excitation.activation = activation_of(activation);
  excitation.hard = hard_gate(gate);
  if (reduce_bias) excitation.reduce_bias = checked(*reduce_bias, "reduce_bias", {hidden});
  if (expand_bias) excitation.expand_bias = checked(*expand_bias, "expand_bias", {channels});
  const at::Tensor images = input.contiguous();
  at::Tensor output = at::empty_like(images);
  if (output.numel() == 0) return output;
  const float* const in = images.const_data_ptr<float>();
  float* const out = output.mutable_data_ptr<float>();
  const int64_t planes = input.size(0) * channels;
  const int64_t grain = std::max<int64_t>(32768 / pixels, 1);  // planes that pay for another thread
  std::vector<float> means(planes), gates(planes);
  const int one[kSumLanes] = {};
  at::parallel_for(0, planes, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) plane_means(in + i * pixels, {1, 0, pixels}, one, 1, pixels, &means[i]);
  });
  for (int64_t n = 0; n < input.size(0); ++n) excitation.gates(&means[n * channels], &gates[n * channels]);
  at::parallel_for(0, planes, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      EpilogueLine<float> line{};
      line.from = in + i * pixels;
      line.out = out + i * pixels;
      line.count = pixels;
      line.scale = &gates[i];
      line.activation = Activation::none;
      type_kernels<float>().epilogue(line);
    }
  });
  return output;
}

}  // namespace

void plane_means(const float* in, const PlaneRuns& runs, const int* image, int images, int64_t pixels, float* means) {
  if (images == 1) {
    means[0] = plane_mean(in, runs, pixels);
    return;
  }
  int32_t most[kSumLanes] = {}, largest[kSumLanes] = {};
  double units[kSumLanes], unit[kSumLanes], sum[kSumLanes] = {}, total[kSumLanes] = {};
  functions().maxima(in, runs, most);
  for (int lane = 0; lane < kSumLanes; ++lane) {
    largest[image[lane]] = std::max(largest[image[lane]], most[lane]);
  }
  for (int i = 0; i < images; ++i) units[i] = unit_of(largest[i], pixels);
  for (int lane = 0; lane < kSumLanes; ++lane) unit[lane] = units[image[lane]];
  functions().sums(in, runs, unit, sum);
  for (int lane = 0; lane < kSumLanes; ++lane) total[image[lane]] += sum[lane];
  for (int i = 0; i < images; ++i) means[i] = static_cast<float>(total[i] / static_cast<double>(pixels));
}

bool Excitation::fits() const {
  if (reduce.dim() != 2) return false;
  const int64_t hidden = reduce.size(0), channels = reduce.size(1);
  return floats(reduce, {hidden, channels}) && floats(expand, {channels, hidden}) &&
         (!reduce_bias || floats(*reduce_bias, {hidden})) && (!expand_bias || floats(*expand_bias, {channels}));
}

void Excitation::gates(const float* means, float* gates) const {
  const int64_t hidden = reduce.size(0), channels = reduce.size(1);
  std::vector<float> inner(hidden);
  const float* const down = reduce.const_data_ptr<float>();
  const float* const up = expand.const_data_ptr<float>();
  const float* const before = reduce_bias ? reduce_bias->const_data_ptr<float>() : nullptr;
  const float* const after = expand_bias ? expand_bias->const_data_ptr<float>() : nullptr;
  for (int64_t s = 0; s < hidden; ++s) inner[s] = dot(down + s * channels, means, channels) + (before ? before[s] : 0);
  EpilogueLine<float> line{};
  line.from = line.out = inner.data();
  line.count = hidden;
  line.activation = activation;
  type_kernels<float>().epilogue(line);
  for (int64_t c = 0; c < channels; ++c) {
    const float x = dot(up + c * hidden, inner.data(), hidden) + (after ? after[c] : 0);
    const float raised = x + 3, low = raised < 0 ? 0 : raised;  // NaN stays NaN
    gates[c] = hard ? (low > 6 ? 6 : low) / 6 : 1 / (1 + std::exp(-x));
  }
}

bool hard_gate(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "sigmoid" || name == "hardsigmoid", "Expected gate to be sigmoid or hardsigmoid, got ",
                    std::string(name));
  return name == "hardsigmoid";
}

}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) { m.impl("squeeze_excite", &sparsekd::cpu::squeeze_excite_cpu); }
