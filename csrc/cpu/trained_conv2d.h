// conv2d of a pattern that is trained, and its gradients, by code that is kept with its transposed plan
// (kept_code.h): values are brought into the order of the code at each call.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "../geometry.h"

namespace sparsekd::cpu {

// Of checked tensors but for their indices. None where nothing is gained by code: then it is to be interpreted.
std::optional<at::Tensor> trained_forward(const Conv2dShape& shape, const at::Tensor& input, const at::Tensor& values,
                                          const at::Tensor& crow_indices, const at::Tensor& col_indices,
                                          const std::optional<at::Tensor>& row_indices, const at::Tensor& transpose,
                                          const std::optional<at::Tensor>& bias);
std::optional<at::Tensor> trained_input_grad(const Conv2dShape& shape, const at::Tensor& grad_output,
                                             const at::Tensor& values, const at::Tensor& transpose);
// For a pattern that a forward had as one that is trained.
std::optional<at::Tensor> trained_weight_grad(const Conv2dShape& shape, const at::Tensor& input,
                                              const at::Tensor& grad_output, const at::Tensor& crow_indices,
                                              const at::Tensor& col_indices,
                                              const std::optional<at::Tensor>& row_indices, int64_t vector);

}  // namespace sparsekd::cpu
