// A convolution whose pattern and input size are final: by which of all ways it is run.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "direct.h"
#include "in_place.h"

namespace sparsekd::cpu {

// Whether rows of floats can have code of their own.
bool can_generate(const Conv2dShape& shape, const Pattern& pattern);
// How such a convolution is run: interpreted, or if that is faster by generated code, through planes or in place.
Grid inference_grid(const Conv2dShape& shape, const Pattern& pattern);

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
  bool in_place() const { return in_place_ != nullptr; }
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
  std::unique_ptr<const InPlace> in_place_;  // null: through planes
  std::unique_ptr<const GeneratedRows> code_;
  at::Tensor order_;
};

}  // namespace sparsekd::cpu
