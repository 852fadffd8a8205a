// What the host wrappers need of CUDA, and under SPARSEKD_EMULATED of the emulator: there the same wrappers serve CPU
// tensors, so that tests in Python run through them and the real kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include "../check.h"
#include "dtype.h"

#ifdef SPARSEKD_EMULATED
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

#include "emulator.h"

#define SPARSEKD_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(sparsekd_emulated, CPU, m)

namespace sparsekd::cuda {

// Names the buffers that kernels may touch as long as it lives, then checks that outputs were written as a whole.
class Call {
 public:
  explicit Call(const at::Tensor&) {}
  ~Call() { emulator::forget_buffers(); }
  void* stream() const { return nullptr; }
  void reads(const at::Tensor& t, const char* name) { note(t, false, false, name); }
  void writes(const at::Tensor& t, const char* name) { note(t, true, false, name); }
  void updates(const at::Tensor& t, const char* name) { note(t, true, true, name); }  // it holds something already
  void launched(int error) { TORCH_CHECK(error == 0, emulator::error()); }
  // Checked here, as a destructor must not throw.
  void finish() {
    emulator::forget_buffers();
    TORCH_CHECK(emulator::error()[0] == 0, emulator::error());
  }

 private:
  void note(const at::Tensor& t, bool writable, bool written, const char* name) {
    if (!t.defined() || t.numel() == 0) return;
    held_.push_back(t);
    int64_t span = 1;
    for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
    emulator::note_buffer(t.const_data_ptr(), span * t.element_size(), writable, written, name);
  }
  std::vector<at::Tensor> held_;  // so that no two buffers have the same place
};

inline const char* device_name() { return "cpu"; }
inline bool on_device(const at::Tensor& t) { return t.is_cpu(); }

}  // namespace sparsekd::cuda
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#define SPARSEKD_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(sparsekd, CUDA, m)

namespace sparsekd::cuda {

class Call {
 public:
  explicit Call(const at::Tensor& t)
      : guard_(t.device()), stream_(c10::cuda::getCurrentCUDAStream(t.device().index()).stream()) {}
  void* stream() const { return stream_; }
  void reads(const at::Tensor&, const char*) {}
  void writes(const at::Tensor&, const char*) {}
  void updates(const at::Tensor&, const char*) {}
  void launched(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
  void finish() {}

 private:
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};

inline const char* device_name() { return "cuda"; }
inline bool on_device(const at::Tensor& t) { return t.is_cuda(); }

}  // namespace sparsekd::cuda
#endif

namespace sparsekd::cuda {

inline DType dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kHalf) return DType::float16;
  return t.scalar_type() == at::kBFloat16 ? DType::bfloat16 : DType::float32;
}

inline const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

inline void check_device(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(on_device(t), "Expected ", name, " on ", device_name(), ", got ", t.device());
}

inline void check_type(const at::Tensor& t, const char* name) {
  check_floating(t, name);
  TORCH_CHECK_TYPE(t.scalar_type() != at::kDouble, "Expected ", name,
                   " of dtype Float, Half or BFloat16 on cuda, got Double: float64 is computed on the CPU alone");
}

}  // namespace sparsekd::cuda
