// Picks the instruction set once, at the first call.
#include "kernels.h"

#include <unistd.h>

#include <cstdlib>
#include <string>

#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsekd::cpu {
namespace {

int best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int cap_from_environment() {
  const char* value = std::getenv("SPARSEKD_CPU_ISA");
  if (value == nullptr || *value == '\0') return 2;
  const std::string isa = value;
  if (isa == "baseline") return 0;
  if (isa == "avx2") return 1;
  if (isa == "avx512") return 2;
  TORCH_CHECK_VALUE(false, "Expected SPARSEKD_CPU_ISA to be baseline, avx2 or avx512, got ", isa);
}

#if defined(__x86_64__)
// Zen 4 takes vectors of 64 bytes in two halves, so that they gain nothing, and all of them straddle cache lines where
// they aren't aligned.
bool halves_wide_vectors() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return family == 0x19;
}
#endif

const Kernels& choose() {
  const int cap = cap_from_environment();
  const int best = best_supported();
  const int level = cap < best ? cap : best;
#if defined(__x86_64__)
  if (level == 2) return halves_wide_vectors() ? avx512::narrow_kernels : avx512::kernels;
  if (level == 1) return avx2::kernels;
#endif
  (void)level;
  return baseline::kernels;
}

}  // namespace

int64_t l1_budget() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  constexpr int64_t kUsual = 32 * 1024;
  return (found > 0 ? found : kUsual) * 3 / 4;
}

int64_t l2_budget() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  constexpr int64_t kUsual = 512 * 1024;
  return found > 0 ? found : kUsual;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sparsekd::cpu

namespace sparsekd {
const char* cpu_isa() { return cpu::kernels().isa; }
}  // namespace sparsekd
