// Squeeze-and-excitation for inference (Hu et al., "Squeeze-and-excitation networks", CVPR 2018):
//
//   output[n, c, p] = input[n, c, p] * gate(expand act(reduce mean_p input[n, :, p] + reduce_bias) + expand_bias)[c]
//
// A mean is that of numbers which were rounded to a common unit, so that their sum is exact in double and has the same
// bits in whatever order pixels come, image by image or lane by lane (after Demmel and Nguyen, "Fast reproducible
// floating-point summation", ARITH 2013). The unit is below the largest number's by 2^53 over the count of pixels.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "../activation.h"

namespace sparsekd::cpu {

constexpr int kSumLanes = 16;

// Elements of planes: `lines` runs of `count`, `pitch` apart.
struct PlaneRuns {
  int64_t lines, pitch, count;
};

// Means over numbers that belong to several images: element i of each run to image `image[i % kSumLanes]`, of which
// each has so many pixels.
void plane_means(const float* in, const PlaneRuns& runs, const int* image, int images, int64_t pixels, float* means);

// The two layers between the means and the gates.
struct Excitation {
  at::Tensor reduce;  // [hidden, channels]
  std::optional<at::Tensor> reduce_bias;
  at::Tensor expand;  // [channels, hidden]
  std::optional<at::Tensor> expand_bias;
  Activation activation = Activation::none;
  bool hard = false;  // gates are hard sigmoids

  int64_t channels() const { return expand.size(0); }
  // Whether all are contiguous floats on the CPU of sizes that fit each other.
  bool fits() const;
  void gates(const float* means, float* gates) const;  // [channels] each
};

// "sigmoid" or "hardsigmoid".
bool hard_gate(c10::string_view name);

}  // namespace sparsekd::cpu
