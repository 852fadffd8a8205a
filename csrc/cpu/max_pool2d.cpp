// Max-pool of planes [H, W] for inference: torch's goes pixel by pixel over [N, C, H, W].
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../geometry.h"
#include "kernels.h"
#include "scratch.h"

namespace sparsekd::cpu {
namespace {

template <class T>
void planes(MaxPool2d pool, int64_t count, const T* in, T* out) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  const int64_t read = pool.output[1] + kLanes + pool.kernel[1] / pool.stride[1] + 1;
  pool.pitch = std::max(read, (pool.input[1] + pool.padding[1]) / pool.stride[1] + 1);
  const int64_t from = pool.input[0] * pool.input[1], to = pool.output[0] * pool.output[1];
  constexpr int64_t kGrain = 32768;  // pixels that pay for another thread
  at::parallel_for(0, count, std::max<int64_t>(kGrain / from, 1), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(2 * pool.stride[1] * pool.pitch);
    for (int64_t i = begin; i < end; ++i)
      type_kernels<T>().max_pool2d(pool, in + i * from, out + i * to, scratch.get());
  });
}

at::Tensor max_pool2d_cpu(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(input.dim() == 3 || input.dim() == 4, "Expected input with 3 or 4 dimensions, got shape ",
                    input.sizes());
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble,
                   "Expected input of dtype Float or Double, got ", input.scalar_type());
  checked_pair(kernel_size, "kernel_size", 1);
  checked_pair(stride, "stride", 1);
  checked_pair(padding, "padding", 0);
  MaxPool2d pool;
  for (size_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(padding[d] <= kernel_size[d] / 2,
                      "Expected padding from 0 to half of kernel_size ", kernel_size, ", got ", padding);
    pool.input[d] = input.size(input.dim() - 2 + static_cast<int64_t>(d));
    pool.kernel[d] = kernel_size[d];
    pool.stride[d] = stride[d];
    pool.padding[d] = padding[d];
    const int64_t slack = pool.input[d] + 2 * padding[d] - kernel_size[d];
    TORCH_CHECK_VALUE(slack >= 0, "Expected an input of at least the kernel ", kernel_size, ", got ", input.sizes(),
                      " with padding ", padding);
    pool.output[d] = slack / stride[d] + 1;
  }
  std::vector<int64_t> size = input.sizes().vec();
  std::copy(pool.output, pool.output + 2, size.end() - 2);
  const at::Tensor lines = input.contiguous();
  at::Tensor output = at::empty(size, lines.options());
  if (output.numel() == 0) return output;
  const int64_t count = lines.numel() / (pool.input[0] * pool.input[1]);
  if (lines.scalar_type() == at::kFloat) {
    planes(pool, count, lines.const_data_ptr<float>(), output.mutable_data_ptr<float>());
  } else {
    planes(pool, count, lines.const_data_ptr<double>(), output.mutable_data_ptr<double>());
  }
  return output;
}

}  // namespace
}  // namespace sparsekd::cpu

TORCH_LIBRARY_IMPL(sparsekd, CPU, m) { m.impl("max_pool2d", &sparsekd::cpu::max_pool2d_cpu); }
