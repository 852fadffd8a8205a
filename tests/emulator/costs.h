// Counts what memory requests cost: 32-byte sectors of global memory, wavefronts of shared memory.
#pragma once
#include <cstdint>
#include <tuple>

namespace emulator {

// Of one place in the code; `bytes` a lane.
struct Request {
  const void* pc;
  bool shared, write;
  unsigned bytes;
  auto key() const { return std::tuple(pc, shared, write, bytes); }
  bool operator<(const Request& other) const { return key() < other.key(); }
};

// A lane's next request, if anything is counted. Null: it takes part in one of its warp without touching anything.
void count(const Request& request, unsigned warp, unsigned lane, const void* address);
// What the block that has run asked for: the k-th requests of a warp's lanes at a place are one.
void count_block(const char* kernel);

}  // namespace emulator
