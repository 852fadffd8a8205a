// The types that tensors on CUDA may have, as kernels are told of them. All of them are computed in fp32.
#pragma once

namespace sparsekd::cuda {

enum class DType : int { float32, float16, bfloat16 };

}  // namespace sparsekd::cuda
