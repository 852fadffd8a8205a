// The three convolutions with sparse weights and dense activations, on checked tensors of float or double.
// `linear` is the same with N pixels in one row of one image.
#pragma once
#include <ATen/core/Tensor.h>

#include "pattern.h"
#include "planes.h"

namespace sparsekd::cpu {

// Tensors [N, C, H, W] that are contiguous, or all of a call in channels_last. `bias` may be undefined, `transposed` is
// the plan of transpose_pattern.
void direct_forward(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                    const at::Tensor& values, const at::Tensor& bias, bool channels_last, at::Tensor& output);
void direct_input_grad(const Conv2dShape& shape, const Transposed& transposed, const at::Tensor& grad_output,
                       const at::Tensor& values, bool channels_last, at::Tensor& grad_input);
void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, bool channels_last, at::Tensor& grad_values);

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
