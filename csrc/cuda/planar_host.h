// Activations in channels-last order, for kernels that take and give planes: turned before and after.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "host.h"

namespace sparsekd::cuda {

// Whether t [N, C, H, W] lies in channels-last order and is large enough that another pass over it takes less time than
// elements far apart.
bool is_channels_last(const at::Tensor& t);

// Such a tensor in planar order, any other as it is.
at::Tensor planar(Call& call, const at::Tensor& t);

// Of the same shape, from planar to channels-last order.
void to_channels_last(Call& call, const at::Tensor& planar, const at::Tensor& to);

// Calls run(output, residual) on tensors in planar order. `zeros`: the output is to hold zeros before.
template <class Run>
void run_planar(Call& call, const at::Tensor& output, const at::Tensor& residual, Run run, bool zeros = false) {
  if (!is_channels_last(output)) {
    if (zeros) output.zero_();
    return run(output, residual);
  }
  const at::Tensor made = at::empty(output.sizes(), output.options().memory_format(at::MemoryFormat::Contiguous));
  if (zeros) {
    made.zero_();
    call.updates(made, "planar results");
  } else {
    call.writes(made, "planar results");
  }
  run(made, residual.defined() ? planar(call, residual) : residual);
  to_channels_last(call, made, output);
}

}  // namespace sparsekd::cuda
