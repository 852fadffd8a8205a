// One request of a warp to memory, of which is known what it costs, to test the emulator's counters with.
#include "emulator.h"

namespace {

constexpr int kBytes = 8192;

__global__ void pattern_kernel(const unsigned char* global, float* output, bool in_shared, int bytes, int stride,
                               int offset, int together, int modulus) {
  unsigned char* shared = sparsekd::cuda::shared_memory<unsigned char>();
  const int lane = threadIdx.x;
  if (in_shared) {
    for (int i = lane; i < kBytes / 4; i += 32) reinterpret_cast<float*>(shared)[i] = 1.0f;
    __syncwarp();
  }
  const unsigned char* from = (in_shared ? shared : global) + offset + lane / together % modulus * stride;
  float value;
  if (bytes == 16) {
    value = sparsekd::cuda::load_vector(reinterpret_cast<const float4*>(from)).x;
  } else if (bytes == 8) {
    value = sparsekd::cuda::load_vector(reinterpret_cast<const float2*>(from)).x;
  } else if (bytes == 4) {
    value = *reinterpret_cast<const float*>(from);
  } else {
    value = sparsekd::cuda::to_float(*reinterpret_cast<const sparsekd::cuda::Half*>(from));
  }
  output[lane] = value;
}

}  // namespace

// Lane i reads `bytes` at offset + i / together % modulus * stride.
extern "C" int emulator_pattern(int in_shared, int bytes, int stride, int offset, int together, int modulus) {
  alignas(32) static unsigned char memory[kBytes];
  alignas(32) static float output[32];
  emulator::note_buffer(memory, kBytes, false, true, "memory");
  emulator::note_buffer(output, sizeof(output), true, false, "output");
  const int error = SPARSEKD_LAUNCH(pattern_kernel, dim3(1), dim3(32), in_shared ? kBytes : 0, nullptr, memory, output,
                                    in_shared != 0, bytes, stride, offset, together, modulus);
  emulator::forget_buffers();
  return error;
}
