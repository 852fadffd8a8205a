// The memory that kernels may touch, and who touched it last.
//
// Every two bytes have a cell that says who wrote and read them last and when. Two accesses of a block are in order
// when a __syncthreads lies between them (`epoch`), or, in one warp, a __syncwarp (`warp_epoch`); a shuffle orders
// nothing. Otherwise, if one of them writes, it is a race. Found are also: accesses out of bounds or not aligned,
// writes to inputs, reads of bytes that nobody wrote or that an asynchronous copy is still to write, blocks that write
// what other blocks touch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

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

// Who accesses something, and when.
struct Access {
  unsigned thread, warp;
  uint32_t block, epoch, warp_epoch, launch_epoch;  // the first of the running launch
};

extern std::vector<std::unique_ptr<Region>> regions;  // the last is the running block's shared memory

// As an error says it: name[byte i of n].
std::string place(const Region& region, const void* address);
Region* region_of(const void* address, size_t bytes);
Region& checked_region(const void* address, unsigned bytes, bool write);
// `lands`: it is the asynchronous copy on its way itself.
void check_cells(Region& region, const void* address, unsigned bytes, bool write, const Access& access,
                 bool lands = false);

}  // namespace emulator
