// The three convolutions with sparse weights and dense activations, on checked tensors of float or double.
// `linear` is the same with N pixels in one row of one image.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

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
void direct_weight_grad(const Conv2dShape& shape, const Pattern& pattern, const at::Tensor& input,
                        const at::Tensor& grad_output, bool channels_last, at::Tensor& grad_values);

// Whether rows of floats can have code of their own, and whether they are multiplied faster by it.
bool can_generate(const Conv2dShape& shape, const Pattern& pattern);
bool pays_to_generate(const Conv2dShape& shape, const Pattern& pattern);

// A float32 convolution of one pattern and input size by generated code.
class GeneratedConv2d {
 public:
  // Null where nothing is gained by it.
  static std::unique_ptr<GeneratedConv2d> of(const Conv2dShape& shape, const at::Tensor& crow_indices,
                                             const at::Tensor& col_indices,
                                             const std::optional<at::Tensor>& row_indices, int64_t vector);

  // The pattern's entry at each place of the values, int32 [n_vectors].
  const at::Tensor& order() const { return order_; }
  size_t code_bytes() const { return code_->bytes(); }
  // act(conv2d + shift + residual), of checked tensors but for where their elements lie; `values` are in order. None if
  // the input lies otherwise than code expects.
  std::optional<at::Tensor> run(const at::Tensor& input, const at::Tensor& values,
                                const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& residual,
                                Activation activation) const;

 private:
  GeneratedConv2d(const Conv2dShape& shape, const at::Tensor& crow_indices, const at::Tensor& col_indices,
                  const std::optional<at::Tensor>& row_indices, int64_t vector);

  const Conv2dShape shape_;
  const at::Tensor crow_, col_;
  const Pattern pattern_;
  Tiling tiling_;
  std::unique_ptr<const GeneratedRows> code_;
  at::Tensor order_;
};

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
