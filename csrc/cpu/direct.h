// The three convolutions with sparse weights and dense activations, on checked tensors of float or double.
// `linear` is the same with N pixels in one row of one image.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "pattern.h"
#include "planes.h"
#include "spmm.h"

namespace sparsekd::cpu {

// What becomes of a sum: act(scale * sum + shift + residual). Tensors may be undefined; a bias is a shift.
struct Finish {
  at::Tensor scale, shift;  // [out_channels]
  at::Tensor residual;      // as the output
  Activation activation = Activation::none;
};

// Tensors [N, C, H, W] that are contiguous, or all of a call in channels_last. `transposed` is the plan of
// transpose_pattern.
void direct_forward(const Conv2dShape& shape, const Pattern& pattern, const OffsetPlan* plan, const at::Tensor& input,
                    const at::Tensor& values, const Finish& finish, bool channels_last, at::Tensor& output);
// How an input of this shape, contiguous and in the dtype of `like`, will lie, and where the pattern's columns then
// are: an OffsetPlan's parts, of which `order` may be null. With `generated`, for code of float rows.
Tiling direct_tiling(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& like, bool generated = false);
void plan_offsets(const Conv2dShape& shape, const Pattern& pattern, const Tiling& tiling, int32_t* starts,
                  int32_t* offset, int32_t* order);
void direct_input_grad(const Conv2dShape& shape, const Transposed& transposed, const at::Tensor& grad_output,
                       const at::Tensor& values, bool channels_last, at::Tensor& grad_input);

// An input gradient of floats by generated code, for one transposed pattern and size of input.
struct InputGradPlan {
  struct Phase {
    std::vector<int32_t> crow, places;  // of the phase's rows; of each value in the order of the code
    Tiling tiling;
    std::unique_ptr<const GeneratedRows> code;  // null: no entry reaches these pixels
  };
  std::vector<Phase> phases;
};
// Null where nothing is gained by it.
std::unique_ptr<InputGradPlan> plan_input_grad(const Conv2dShape& shape, const Transposed& transposed);
// Of contiguous tensors of floats.
void direct_input_grad(const Conv2dShape& shape, const InputGradPlan& plan, const at::Tensor& grad_output,
                       const at::Tensor& values, at::Tensor& grad_input);

void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, bool channels_last, at::Tensor& grad_values);

class GeneratedDots;
// The same of contiguous tensors of floats by code, which is made for tensors that lie as these do.
std::unique_ptr<const GeneratedDots> generated_weight_grad(const Conv2dShape& shape, const Pattern& pattern,
                                                           const at::Tensor& input, const at::Tensor& grad_output);
void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const GeneratedDots& code,
                        const at::Tensor& input, const at::Tensor& grad_output, at::Tensor& grad_values);

// Calls body with a value of the tensor's C++ type.
template <class Body>
void dispatch(const at::Tensor& tensor, Body body) {
  if (tensor.scalar_type() == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

// half and bfloat16 are computed in float.
inline at::Tensor widened(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const auto type = tensor.scalar_type();
  return (type == at::kHalf || type == at::kBFloat16 ? tensor.to(at::kFloat) : tensor).contiguous();
}

}  // namespace sparsekd::cpu
