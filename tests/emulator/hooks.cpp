// What gcc calls under -fsanitize=thread at every access of a kernel: they go to the emulator's checks.
#include "emulator.h"

extern "C" {

#define HOOKS(size)                                                                                             \
  void __tsan_read##size(void* p) { emulator::access(p, size, false, __builtin_return_address(0)); }             \
  void __tsan_write##size(void* p) { emulator::access(p, size, true, __builtin_return_address(0)); }             \
  void __tsan_unaligned_read##size(void* p) { emulator::access(p, size, false, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##size(void* p) { emulator::access(p, size, true, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i += 4) emulator::access(static_cast<char*>(p) + i, 4, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i += 4) emulator::access(static_cast<char*>(p) + i, 4, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
