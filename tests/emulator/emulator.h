// What csrc/cuda/device.cuh means under g++: CUDA's names, one fiber per CUDA thread, and a checker of every access.
// The machinery is in emulator.cpp. Kernels are compiled with -fsanitize=thread but without its runtime: the hooks that
// gcc then calls at each load and store are our own.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace emulator {

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
};
Thread this_thread();           // by value, so that looking at it is no access
unsigned char* block_memory();  // shared memory of the running block

// The seed of the order of blocks, warps and lanes. 0 is their own order.
extern uint64_t seed;

// ---- the host's side: buffers that kernels may touch ----

void note_buffer(const void* data, size_t bytes, bool writable, bool written, const char* name);
void forget_buffers();           // checks first that each byte of every writable buffer was written
const char* error();             // of the last launch or check, "" if there was none
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*entry)(const void*), const void* closure,
                size_t closure_bytes, const char* name);

// ---- the kernels' side ----

enum class Meeting { shuffle, match, ballot, syncwarp, matrix };
using Combine = void (*)(void* const* slots, unsigned mask);
void meet(Meeting kind, unsigned mask, void* slot, Combine combine, int line);
void sync_block(int line);
void access(const void* address, unsigned bytes, bool write, const void* pc);
// A lane takes part in its warp's request, which is for the same memory, without touching anything.
void stand_by(const void* near, unsigned bytes, const void* pc);
void copy_async(void* to, const void* from, unsigned bytes, bool valid, const void* pc);  // 0, 4, 8 or 16 bytes
void copy_async_commit();
void copy_async_wait(int pending);
[[noreturn]] void fail(const char* format, ...);
unsigned lane();

#define EMULATOR_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

// One access of the whole vector, where gcc would make one of each element.
template <class V>
EMULATOR_UNCHECKED V load_vector(const V* from) {
  access(from, sizeof(V), false, __builtin_return_address(0));
  return *from;
}
template <class V>
EMULATOR_UNCHECKED void store_vector(V* to, V value, bool there = true) {
  if (!there) return stand_by(to, sizeof(V), __builtin_return_address(0));
  access(to, sizeof(V), true, __builtin_return_address(0));
  *to = value;
}

template <class T>
struct Exchange {
  T value;
  int from;  // lane
};
template <class T>
EMULATOR_UNCHECKED T exchange(unsigned mask, T value, int from, int line) {
  Exchange<T> slot{value, from};
  meet(Meeting::shuffle, mask, &slot, [](void* const* slots, unsigned mask) {
    T values[32];
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) values[i] = static_cast<Exchange<T>*>(slots[i])->value;
    }
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* slot = static_cast<Exchange<T>*>(slots[i]);
      if (!(mask >> slot->from & 1)) fail("a shuffle reads lane %d, which is not in the mask %08x", slot->from, mask);
      slot->value = values[slot->from];
    }
  }, line);
  return slot.value;
}

}  // namespace emulator

#define threadIdx (emulator::this_thread().thread)
#define blockIdx (emulator::this_thread().block)
#define blockDim (emulator::this_thread().block_dim)
#define gridDim (emulator::this_thread().grid_dim)
#define __syncthreads() emulator::sync_block(__LINE__)
#define __syncwarp() emulator::meet(emulator::Meeting::syncwarp, ~0u, nullptr, nullptr, __LINE__)
#define __shfl_sync(mask, value, from) emulator::exchange(mask, value, (from) & 31, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  emulator::exchange(mask, value, int(emulator::lane() ^ unsigned(distance)), __LINE__)
#define __match_any_sync(mask, value) emulator::match_any(mask, value, __LINE__)
#define __ballot_sync(mask, value) emulator::ballot(mask, value, __LINE__)

namespace emulator {
struct Word {
  int in;
  unsigned out;
};
EMULATOR_UNCHECKED inline unsigned match_any(unsigned mask, int value, int line) {
  Word slot{value, 0};
  meet(Meeting::match, mask, &slot, [](void* const* slots, unsigned mask) {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) {
        if (!(mask >> i & mask >> j & 1)) continue;
        auto *a = static_cast<Word*>(slots[i]), *b = static_cast<Word*>(slots[j]);
        if (a->in == b->in) a->out |= 1u << j;
      }
    }
  }, line);
  return slot.out;
}
EMULATOR_UNCHECKED inline unsigned ballot(unsigned mask, int value, int line) {
  Word slot{value != 0, 0};
  meet(Meeting::ballot, mask, &slot, [](void* const* slots, unsigned mask) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1 && static_cast<Word*>(slots[i])->in) votes |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) static_cast<Word*>(slots[i])->out = votes;
    }
  }, line);
  return slot.out;
}
}  // namespace emulator

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int __float_as_int(float x) {
  int bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

namespace sparsekd::cuda {

using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(Half x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, ties to even
}

// Two values as the 16-bit halves of a word, the first the lower.
template <class T>
uint32_t word_of(float low, float high) {
  const T two[] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  __builtin_memcpy(&word, two, 4);
  return word;
}

inline float half_of_bits(unsigned bits) {
  const auto low = static_cast<uint16_t>(bits);
  Half x;
  __builtin_memcpy(&x, &low, 2);
  return static_cast<float>(x);
}
template <class T>
T anew(T x) {
  return x;
}
inline float fast_exp2(float x) { return exp2f(x); }
inline float not_below(float x, float least) { return x < least ? least : x; }
inline float not_above(float x, float most) { return x > most ? most : x; }
inline float fast_divide(float a, float b) { return a / b; }

#define SPARSEKD_ASSERT(condition, sentence) ((condition) ? void(0) : emulator::fail("assertion: %s", sentence))

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::block_memory());
}
using emulator::load_vector;
using emulator::store_vector;

// 16 bytes from global to shared memory, or zeros where not `valid`; nothing where not `there`.
EMULATOR_UNCHECKED inline void copy_async16(void* to, const void* from, bool valid, bool there = true) {
  emulator::copy_async(to, from, there ? 16 : 0, valid, __builtin_return_address(0));
}
EMULATOR_UNCHECKED inline void copy_async8(void* to, const void* from) {
  emulator::copy_async(to, from, 8, true, __builtin_return_address(0));
}
EMULATOR_UNCHECKED inline void copy_async4(void* to, const void* from) {
  emulator::copy_async(to, from, 4, true, __builtin_return_address(0));
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_named(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t, Arguments... arguments) {
  auto closure = [=] { kernel(arguments...); };
  using Closure = decltype(closure);
  return emulator::run(grid, block, shared_bytes, [](const void* c) { (*static_cast<const Closure*>(c))(); }, &closure,
                       sizeof(closure), name);
}
#define SPARSEKD_LAUNCH(kernel, ...) sparsekd::cuda::launch_named(#kernel, kernel, __VA_ARGS__)

}  // namespace sparsekd::cuda
