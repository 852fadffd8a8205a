// Runs a kernel on the host and checks what it does.
//
// Each CUDA thread is a fiber with its own stack; blocks run one after another. A fiber runs until it has to meet
// others (a barrier, a shuffle), then the next one does. Blocks, warps and lanes take turns in an order drawn from the
// seed.
//
// What they touch is checked by shadow.h. Found are also: asynchronous copies that were not waited for (they land as
// late as the wait allows), barriers and shuffles at which not all arrive, outputs with bytes that were never written.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "costs.h"
#include "shadow.h"

namespace emulator {

uint64_t seed = 0;

namespace {

Thread* current = nullptr;  // the one that runs; null outside kernels
unsigned char* shared = nullptr;

constexpr size_t kStackBytes = 128 << 10;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes;
  bool valid;
};

struct Fiber {
  Thread thread;  // first, so that a Thread* is a Fiber*
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  unsigned index = 0, warp = 0, lane = 0;
  enum { ready, at_warp, at_block, ended } state = ready;
  uint32_t generation = 0;  // of what it waits for
  int line = 0;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies
  std::vector<Copy> open;
};

struct Warp {
  unsigned lanes = 0, arrived = 0, mask = 0, ended = 0;
  Meeting kind{};
  int line = 0;
  uint32_t generation = 0, epoch = 1;
  void* slots[32];
};

struct Block {
  uint32_t number = 0, generation = 0;
  unsigned arrived = 0, ended = 0;
  int line = 0;
  std::vector<Warp> warps;
};

std::vector<Fiber> fibers;
Block block;
uint32_t epoch = 0, launch_epoch = 0;  // the first of the running launch
void* scheduler = nullptr;
bool failed = false, exchanging = false;
std::string message;
const char* kernel_name = "";
void (*kernel_entry)(const void*) = nullptr;
const void* kernel_closure = nullptr;
size_t last_shared_bytes = 0;  // of the last launch

Fiber* self() { return reinterpret_cast<Fiber*>(current); }

// ---- fibers ----

extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void to_scheduler() {
  Fiber* fiber = self();
  current = nullptr;
  emulator_switch(&fiber->stack_pointer, scheduler);
  current = &fiber->thread;
}

void fiber_main() {
  kernel_entry(kernel_closure);
  Fiber* fiber = self();
  if (!fiber->open.empty() || !fiber->groups.empty()) fail("the thread ends with asynchronous copies not waited for");
  fiber->state = Fiber::ended;
  ++block.ended;
  block.warps[fiber->warp].ended |= 1u << fiber->lane;
  to_scheduler();
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fiber.stack = static_cast<unsigned char*>(memory);
  }
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = Fiber::ready;
  fiber.groups.clear();
  fiber.open.clear();
}

void wait_in(decltype(Fiber::state) state, uint32_t generation, int line) {
  Fiber* fiber = self();
  fiber->state = state;
  fiber->generation = generation;
  fiber->line = line;
  to_scheduler();
}

Access access_of(const Fiber& fiber) {
  return {fiber.index, fiber.warp, block.number, epoch, block.warps[fiber.warp].epoch, launch_epoch};
}

void land(const Copy& copy) {
  Region& region = *region_of(copy.to, copy.bytes);
  const size_t offset = copy.to - region.begin;
  check_cells(region, copy.to, copy.bytes, true, access_of(*self()), true);
  for (unsigned i = 0; i < copy.bytes; i += 2) region.cells[(offset + i) / 2].pending = false;
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// ---- a launch ----

void run_block(uint32_t number, dim3 index, dim3 grid, dim3 size, const std::vector<unsigned>& order, Region& memory) {
  const unsigned threads = size.x * size.y * size.z;
  std::fill(memory.cells.begin(), memory.cells.end(), Cell{});
  std::memset(shared, 0xa5, memory.bytes);
  block = Block{};
  block.number = number;
  block.warps.resize((threads + 31) / 32);
  ++epoch;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    start(fiber);
    fiber.thread = Thread{{i % size.x, i / size.x % size.y, i / size.x / size.y}, index, size, grid};
    fiber.index = i;
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    block.warps[fiber.warp].lanes |= 1u << fiber.lane;
  }
  while (block.ended < threads && !failed) {
    bool moved = false;
    for (unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.state == Fiber::ended) continue;
      if (fiber.state == Fiber::at_warp && fiber.generation == block.warps[fiber.warp].generation) continue;
      if (fiber.state == Fiber::at_block && fiber.generation == block.generation) continue;
      fiber.state = Fiber::ready;
      moved = true;
      current = &fiber.thread;
      emulator_switch(&scheduler, fiber.stack_pointer);
      current = nullptr;
      if (failed) return;
    }
    if (moved) continue;
    const auto& stuck = *std::find_if(fibers.begin(), fibers.begin() + threads,
                                      [](const Fiber& f) { return f.state != Fiber::ended; });
    failed = true;
    message = std::string(kernel_name) + ": deadlock: thread " + std::to_string(stuck.index) + " waits at line " +
              std::to_string(stuck.line) + ", " + std::to_string(block.ended) + " threads have ended";
  }
}

}  // namespace

Thread this_thread() { return *current; }
unsigned char* block_memory() { return shared; }
unsigned lane() { return self()->lane; }

void fail(const char* format, ...) {
  char text[512], whole[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  const Fiber& fiber = *self();
  std::snprintf(whole, sizeof(whole), "%s, block (%u, %u, %u), thread %u: %s", kernel_name, fiber.thread.block.x,
                fiber.thread.block.y, fiber.thread.block.z, fiber.index, text);
  message = whole;
  failed = true;
  exchanging = false;
  to_scheduler();  // and never back
  __builtin_unreachable();
}

void access(const void* address, unsigned bytes, bool write, const void* pc) {
  if (current == nullptr || exchanging) return;
  Fiber* fiber = self();
  const auto* byte = static_cast<const unsigned char*>(address);
  if (byte >= fiber->stack && byte < fiber->stack + kStackBytes) return;
  Region& region = checked_region(address, bytes, write);
  if (region.begin == kernel_closure) return;  // the kernel's arguments
  check_cells(region, address, bytes, write, access_of(*fiber));
  count({pc, &region == regions.back().get(), write, bytes}, fiber->warp, fiber->lane, address);
}

void stand_by(const void* near, unsigned bytes, const void* pc) {
  const Region& memory = *regions.back();
  const auto* byte = static_cast<const unsigned char*>(near);
  count({pc, byte >= memory.begin && byte < memory.begin + memory.bytes, true, bytes}, self()->warp, self()->lane,
        nullptr);
}

void copy_async(void* to, const void* from, unsigned bytes, bool valid, const void* pc) {
  auto count_at = [&](bool shared, const void* address) {
    count({pc, shared, shared, bytes ? bytes : 16}, self()->warp, self()->lane, address);
  };
  if (bytes == 0) {
    count_at(false, nullptr);
    count_at(true, nullptr);
    return;
  }
  Region& region = checked_region(to, bytes, true);
  check_cells(region, to, bytes, true, access_of(*self()));  // those who read and wrote before must be done by now
  if (valid) access(from, bytes, false, pc);
  if (!valid) count_at(false, nullptr);
  const size_t offset = static_cast<unsigned char*>(to) - region.begin;
  for (unsigned i = 0; i < bytes; i += 2) region.cells[(offset + i) / 2].pending = true;
  self()->open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid});
  count_at(true, to);
}

void copy_async_commit() {
  Fiber* fiber = self();
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}

void copy_async_wait(int pending) {
  Fiber* fiber = self();
  while (static_cast<int>(fiber->groups.size()) > pending) {
    for (const Copy& copy : fiber->groups.front()) land(copy);
    fiber->groups.erase(fiber->groups.begin());
  }
}

void meet(Meeting kind, unsigned mask, void* slot, Combine combine, int line) {
  Fiber* fiber = self();
  Warp& warp = block.warps[fiber->warp];
  mask &= kind == Meeting::syncwarp ? warp.lanes : ~0u;
  if (!(mask >> fiber->lane & 1)) fail("line %d: the mask %08x is without the lane itself", line, mask);
  if (mask & ~warp.lanes) fail("line %d: the mask %08x holds lanes that don't exist", line, mask);
  if (mask & warp.ended) fail("line %d: the mask %08x holds lanes that have ended", line, mask);
  if (warp.arrived && (warp.kind != kind || warp.mask != mask || warp.line != line)) {
    fail("the lanes diverge: lines %d and %d, masks %08x and %08x", line, warp.line, mask, warp.mask);
  }
  warp.kind = kind;
  warp.mask = mask;
  warp.line = line;
  warp.slots[fiber->lane] = slot;
  warp.arrived |= 1u << fiber->lane;
  if (warp.arrived != mask) return wait_in(Fiber::at_warp, warp.generation, line);
  exchanging = true;  // it reads what other lanes hold in registers, which lie on their stacks
  if (combine) combine(warp.slots, mask);
  exchanging = false;
  warp.arrived = 0;
  ++warp.generation;
  if (kind == Meeting::syncwarp) ++warp.epoch;
}

void sync_block(int line) {
  const Fiber* fiber = self();
  const unsigned threads = fiber->thread.block_dim.x * fiber->thread.block_dim.y * fiber->thread.block_dim.z;
  if (block.ended) fail("line %d: __syncthreads after %u threads have ended", line, block.ended);
  if (block.arrived && block.line != line)
    fail("__syncthreads at line %d while others wait at line %d", line, block.line);
  block.line = line;
  if (++block.arrived < threads) return wait_in(Fiber::at_block, block.generation, line);
  block.arrived = 0;
  ++block.generation;
  ++epoch;
}

void note_buffer(const void* data, size_t bytes, bool writable, bool written, const char* name) {
  if (bytes == 0) return;
  auto region = std::make_unique<Region>(Region{static_cast<const unsigned char*>(data), bytes, writable, name, {}});
  if (writable) region->cells.resize((bytes + 1) / 2);
  for (Cell& cell : region->cells) cell.written = written;
  regions.push_back(std::move(region));
}

void forget_buffers() {
  if (!failed) message.clear();
  for (const auto& region : regions) {
    if (failed || !region->writable || region->name.rfind("output", 0) != 0) continue;
    for (size_t i = 0; i < region->cells.size(); ++i) {
      if (region->cells[i].written) continue;
      failed = true;
      message = place(*region, region->begin + 2 * i) + " was never written";
      break;
    }
  }
  regions.clear();
  failed = false;
}

const char* error() { return message.c_str(); }

cudaError_t run(dim3 grid, dim3 size, size_t shared_bytes, void (*entry)(const void*), const void* closure,
                size_t closure_bytes, const char* name) {
  if (failed) return 1;
  kernel_name = name;
  kernel_entry = entry;
  kernel_closure = closure;
  launch_epoch = epoch + 1;
  last_shared_bytes = shared_bytes;
  message.clear();
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > 227 * 1024) {
    failed = true;
    message = std::string(name) + ": launch with a grid, block or shared memory that no GPU takes";
    return 1;
  }
  if (fibers.size() < threads) fibers.resize(threads);
  note_buffer(closure, closure_bytes, false, false, "kernel arguments");
  std::vector<uint4> memory(shared_bytes / 16 + 1);
  shared = reinterpret_cast<unsigned char*>(memory.data());
  auto region = std::make_unique<Region>(Region{shared, shared_bytes, true, "shared memory", {}});
  region->cells.resize((shared_bytes + 1) / 2);
  regions.push_back(std::move(region));

  std::mt19937_64 random(seed);
  std::vector<uint32_t> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
  for (uint32_t number : blocks) {
    if (seed) {  // warps in any order, and the lanes of each
      std::shuffle(order.begin(), order.end(), random);
      std::vector<unsigned> rank((threads + 31) / 32);
      std::iota(rank.begin(), rank.end(), 0);
      std::shuffle(rank.begin(), rank.end(), random);
      std::stable_sort(order.begin(), order.end(), [&](unsigned a, unsigned b) { return rank[a / 32] < rank[b / 32]; });
    }
    run_block(number, {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y}, grid, size, order,
              *regions.back());
    count_block(kernel_name);
    if (failed) break;
  }
  shared = nullptr;
  regions.pop_back();
  std::erase_if(regions, [](const auto& r) { return r->name == "kernel arguments"; });
  return failed ? 1 : 0;
}

}  // namespace emulator

// ---- for the tests, through ctypes ----

extern "C" {

void emulator_set_seed(uint64_t seed) { emulator::seed = seed; }
uint64_t emulator_last_shared_bytes() { return emulator::last_shared_bytes; }
}
