// The convolution on tensor cores, as conv2d.cpp calls it.
#pragma once
#include <ATen/core/Tensor.h>

#include "conv2d_tensor.h"
#include "host.h"

namespace sparsekd::cuda {

// Tensors that are not given are undefined.
struct TensorConv2d {
  int64_t batch, in_channels, out_channels, groups, row_groups;
  TapAxis axes[2];
  at::Tensor input, values, crow, col, rows, scale, shift, residual, output;
  Activation activation;
};

// False, with the reason counted and said once, where tensor cores can't take it: nothing was launched then.
bool run_on_tensor_cores(Call& call, const TensorConv2d& conv);

}  // namespace sparsekd::cuda

extern "C" {
// Calls that ran on tensor cores, and calls with V >= 8 and 16-bit values that had to run on CUDA cores.
void sparsekd_conv2d_calls(int64_t* on_tensor_cores, int64_t* on_cuda_cores);
}
