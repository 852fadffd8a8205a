// Runs a kernel on the host and checks what it does.
//
// Each CUDA thread is a fiber with its own stack; blocks run one after another. A fiber runs until it has to meet others
// (a barrier, a shuffle), then the next one does. Blocks, warps and lanes take turns in an order drawn from the seed.
//
// Every two bytes that kernels may touch have a cell that says who wrote and read them last and when. Two accesses of a
// block are in order when a __syncthreads lies between them (`epoch`), or, in one warp, a __syncwarp (`warp_epoch`); a
// shuffle orders nothing. Otherwise, if one of them writes, it is a race. Found are also: accesses out of bounds or not
// aligned, writes to inputs, reads of bytes that nobody wrote, of cp.async copies that were not waited for (they land as
// late as the wait allows), blocks that write what other blocks touch, barriers and shuffles at which not all arrive,
// outputs with bytes that were never written.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace emulator {

uint64_t seed = 0;

namespace {

Thread* current = nullptr;  // the one that runs; null outside kernels
unsigned char* shared = nullptr;

constexpr size_t kStackBytes = 128 << 10;
constexpr int kNobody = 0xffff, kSeveral = 0xfffe;

struct Cell {
  uint32_t write_epoch = 0, read_epoch = 0;    // 0: before this launch
  uint32_t write_block = 0, read_block = 0;
  uint32_t write_warp_epoch = 0, read_warp_epoch = 0;
  uint16_t writer = kNobody, reader = kNobody;  // thread of the block; kSeveral: of one warp
  uint16_t reader_warp = kNobody;               // kSeveral: of several warps
  bool written = false, pending = false;
};

struct Region {
  const unsigned char* begin;
  size_t bytes;
  bool writable;
  std::string name;
  std::vector<Cell> cells;  // of writable ones
  bool holds(const void* p, size_t n) const {
    return p >= begin && static_cast<const unsigned char*>(p) + n <= begin + bytes;
  }
};

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

std::vector<std::unique_ptr<Region>> regions;
std::vector<Fiber> fibers;
Block block;
uint32_t epoch = 0, launch_epoch = 0;  // the first of the running launch
void* scheduler = nullptr;
bool failed = false, exchanging = false;
std::string message;
const char* kernel_name = "";
void (*kernel_entry)(const void*) = nullptr;
const void* kernel_closure = nullptr;

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

// ---- the checker ----

std::string place(const Region& region, const void* address) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s[byte %td of %zu]", region.name.c_str(),
                static_cast<const unsigned char*>(address) - region.begin, region.bytes);
  return text;
}

Region* region_of(const void* address, size_t bytes) {
  static size_t last = 0;
  if (last < regions.size() && regions[last]->holds(address, bytes)) return regions[last].get();
  for (size_t i = 0; i < regions.size(); ++i) {
    if (regions[i]->holds(address, bytes)) return last = i, regions[i].get();
  }
  return nullptr;
}

bool unordered(const Fiber& fiber, int thread, int warp, uint32_t when, uint32_t warp_when) {
  if (thread == static_cast<int>(fiber.index) || when != epoch) return false;
  return warp != static_cast<int>(fiber.warp) || warp_when == block.warps[fiber.warp].epoch;
}

void check_cell(const Region& region, Cell& cell, const void* address, bool write, bool lands) {
  Fiber& fiber = *self();
  if (cell.pending && !lands) fail("%s is touched while an asynchronous copy is on its way", place(region, address).c_str());
  if (!write && !cell.written) fail("%s is read before it was written", place(region, address).c_str());
  if (cell.write_epoch >= launch_epoch) {
    if (cell.write_block != block.number) {
      fail("%s, written by another block, is %s", place(region, address).c_str(), write ? "written" : "read");
    }
    if (unordered(fiber, cell.writer, cell.writer / 32, cell.write_epoch, cell.write_warp_epoch)) {
      fail("race: %s, written by thread %d, is %s with no barrier between", place(region, address).c_str(), cell.writer,
           write ? "written" : "read");
    }
  }
  const uint32_t warp_epoch = block.warps[fiber.warp].epoch;
  if (!write) {
    const bool same = cell.read_epoch == epoch && cell.reader != kNobody;
    if (!same) {
      cell.reader = static_cast<uint16_t>(fiber.index);
      cell.reader_warp = static_cast<uint16_t>(fiber.warp);
    } else if (cell.reader_warp == fiber.warp && cell.read_warp_epoch != warp_epoch) {
      cell.reader = static_cast<uint16_t>(fiber.index);  // a __syncwarp lies between: the earlier ones are done
    } else if (cell.reader != fiber.index) {
      cell.reader = kSeveral;
      if (cell.reader_warp != fiber.warp) cell.reader_warp = kSeveral;
    }
    cell.read_epoch = epoch;
    cell.read_block = block.number;
    cell.read_warp_epoch = warp_epoch;
    return;
  }
  if (cell.read_epoch >= launch_epoch && cell.reader != kNobody) {
    if (cell.read_block != block.number) fail("%s, read by another block, is written", place(region, address).c_str());
    if (unordered(fiber, cell.reader, cell.reader_warp, cell.read_epoch, cell.read_warp_epoch)) {
      fail("race: %s, read by %s, is written with no barrier between", place(region, address).c_str(),
           cell.reader == kSeveral ? "several threads" : ("thread " + std::to_string(cell.reader)).c_str());
    }
  }
  cell.writer = static_cast<uint16_t>(fiber.index);
  cell.write_epoch = epoch;
  cell.write_block = block.number;
  cell.write_warp_epoch = warp_epoch;
  cell.written = true;
}

Region& checked_region(const void* address, unsigned bytes, bool write) {
  Region* region = region_of(address, bytes);
  if (region == nullptr) {
    for (const auto& near : regions) {
      const ptrdiff_t offset = static_cast<const unsigned char*>(address) - near->begin;
      if (offset > -4096 && offset < static_cast<ptrdiff_t>(near->bytes) + 4096) {
        fail("%s of %u bytes out of bounds at %s", write ? "write" : "read", bytes, place(*near, address).c_str());
      }
    }
    fail("%s of %u bytes outside of all buffers", write ? "write" : "read", bytes);
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("misaligned %s of %u bytes at %s", write ? "write" : "read", bytes, place(*region, address).c_str());
  }
  if (write && !region->writable) fail("write to the input %s", place(*region, address).c_str());
  return *region;
}

void check_cells(Region& region, const void* address, unsigned bytes, bool write, bool lands = false) {
  if (!region.writable) return;
  const size_t offset = static_cast<const unsigned char*>(address) - region.begin;
  for (unsigned i = 0; i < bytes; i += 2) {
    check_cell(region, region.cells[(offset + i) / 2], region.begin + offset + i, write, lands);
  }
}

void land(const Copy& copy) {
  Region& region = *region_of(copy.to, copy.bytes);
  const size_t offset = copy.to - region.begin;
  check_cells(region, copy.to, copy.bytes, true, true);
  for (unsigned i = 0; i < copy.bytes; i += 2) region.cells[(offset + i) / 2].pending = false;
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// ---- counts of what a memory request costs ----

struct Request {
  const void* pc;
  bool shared, write;
  unsigned bytes;
  auto key() const { return std::tuple(pc, shared, write, bytes); }
  bool operator<(const Request& other) const { return key() < other.key(); }
};
struct Cost {
  std::string kernel;
  uint64_t requests = 0, actual = 0, ideal = 0;  // wavefronts of shared memory, sectors of global memory
};
bool counting = false;
std::map<Request, Cost> costs;
constexpr uintptr_t kNowhere = 0;  // a lane that takes part in a request without reading anything
std::map<std::pair<unsigned, Request>, std::vector<uintptr_t>[32]> traces;  // of the running block's warps

size_t last_shared_bytes = 0;  // of the last launch

uint64_t distinct(std::vector<uintptr_t> values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

// Shared memory serves 128 bytes in 32 banks at once: a request of 16 bytes a lane is served 8 lanes at a time. Lanes
// that want the same word share it.
uint64_t wavefronts(const std::vector<uintptr_t>& addresses, unsigned bytes) {
  const size_t lanes_at_once = 32 / std::max(1u, bytes / 4);
  std::vector<std::vector<uintptr_t>> phases;
  for (size_t begin = 0; begin < addresses.size(); begin += lanes_at_once) {
    std::vector<uintptr_t> words;
    for (size_t i = begin; i < std::min(begin + lanes_at_once, addresses.size()); ++i) {
      for (unsigned b = 0; b < std::max(4u, bytes); b += 4) words.push_back(addresses[i] / 4 + b / 4);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    if (std::find(phases.begin(), phases.end(), words) == phases.end()) phases.push_back(words);
  }
  uint64_t total = 0;
  for (const auto& words : phases) {
    unsigned banks[32] = {}, most = 0;
    for (uintptr_t word : words) most = std::max(most, ++banks[word % 32]);
    total += most;
  }
  return total;
}

void count_block() {
  for (auto& [key, lanes] : traces) {
    const Request& request = key.second;
    size_t most = 0;
    for (const auto& trace : lanes) most = std::max(most, trace.size());
    Cost& cost = costs[request];
    cost.kernel = kernel_name;
    for (size_t k = 0; k < most; ++k) {
      std::vector<uintptr_t> addresses, units;
      const unsigned unit = request.shared ? 4 : 32;
      for (const auto& trace : lanes) {
        if (k >= trace.size() || trace[k] == kNowhere) continue;
        addresses.push_back(trace[k]);
        for (unsigned b = 0; b < request.bytes; b += std::min(request.bytes, unit)) units.push_back((trace[k] + b) / unit);
      }
      const uint64_t bytes = distinct(addresses) * request.bytes;
      ++cost.requests;
      cost.actual += request.shared ? wavefronts(addresses, request.bytes) : distinct(units);
      cost.ideal += (bytes + (request.shared ? 127 : 31)) / (request.shared ? 128 : 32);
    }
  }
  traces.clear();
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
  check_cells(region, address, bytes, write);
  if (counting) {
    const Request request{pc, &region == regions.back().get(), write, bytes};
    traces[{fiber->warp, request}][fiber->lane].push_back(reinterpret_cast<uintptr_t>(address));
  }
}

void copy_async(void* to, const void* from, unsigned bytes, bool valid, const void* pc) {
  auto trace = [&](bool shared, uintptr_t address) {
    if (counting) traces[{self()->warp, Request{pc, shared, shared, 16}}][self()->lane].push_back(address);
  };
  if (bytes == 0) {
    trace(false, kNowhere);
    trace(true, kNowhere);
    return;
  }
  Region& region = checked_region(to, bytes, true);
  check_cells(region, to, bytes, true);  // those who read and wrote before must be done by now
  if (valid) access(from, bytes, false, pc);
  if (!valid) trace(false, kNowhere);
  const size_t offset = static_cast<unsigned char*>(to) - region.begin;
  for (unsigned i = 0; i < bytes; i += 2) region.cells[(offset + i) / 2].pending = true;
  self()->open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid});
  trace(true, reinterpret_cast<uintptr_t>(to));
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
  if (block.arrived && block.line != line) fail("__syncthreads at line %d while others wait at line %d", line, block.line);
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
    if (counting) count_block();
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
void emulator_count(int on) {
  emulator::counting = on;
  if (on) emulator::costs.clear();
}
// One line each: address in the library, shared or global, read or write, bytes a lane, requests, actual, ideal, kernel.
const char* emulator_costs() {
  static std::string text;
  text.clear();
  for (const auto& [request, cost] : emulator::costs) {
    char line[300];
    std::snprintf(line, sizeof(line), "%p %s %s %u %zu %zu %zu %s\n", request.pc, request.shared ? "shared" : "global",
                  request.write ? "write" : "read", request.bytes, size_t(cost.requests), size_t(cost.actual),
                  size_t(cost.ideal), cost.kernel.c_str());
    text += line;
  }
  return text.c_str();
}

// ---- what gcc calls under -fsanitize=thread ----

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
