// See shadow.h.
#include "shadow.h"

#include <cstdio>

#include "emulator.h"

namespace emulator {

std::vector<std::unique_ptr<Region>> regions;

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

namespace {

bool unordered(const Access& own, int thread, int warp, uint32_t when, uint32_t warp_when) {
  if (thread == static_cast<int>(own.thread) || when != own.epoch) return false;
  return warp != static_cast<int>(own.warp) || warp_when == own.warp_epoch;
}

void check_cell(const Region& region, Cell& cell, const void* address, bool write, const Access& own, bool lands) {
  if (cell.pending && !lands)
    fail("%s is touched while an asynchronous copy is on its way", place(region, address).c_str());
  if (!write && !cell.written) fail("%s is read before it was written", place(region, address).c_str());
  if (cell.write_epoch >= own.launch_epoch) {
    if (cell.write_block != own.block) {
      fail("%s, written by another block, is %s", place(region, address).c_str(), write ? "written" : "read");
    }
    if (unordered(own, cell.writer, cell.writer / 32, cell.write_epoch, cell.write_warp_epoch)) {
      fail("race: %s, written by thread %d, is %s with no barrier between", place(region, address).c_str(), cell.writer,
           write ? "written" : "read");
    }
  }
  if (!write) {
    const bool same = cell.read_epoch == own.epoch && cell.reader != kNobody;
    if (!same) {
      cell.reader = static_cast<uint16_t>(own.thread);
      cell.reader_warp = static_cast<uint16_t>(own.warp);
    } else if (cell.reader_warp == own.warp && cell.read_warp_epoch != own.warp_epoch) {
      cell.reader = static_cast<uint16_t>(own.thread);  // a __syncwarp lies between: the earlier ones are done
    } else if (cell.reader != own.thread) {
      cell.reader = kSeveral;
      if (cell.reader_warp != own.warp) cell.reader_warp = kSeveral;
    }
    cell.read_epoch = own.epoch;
    cell.read_block = own.block;
    cell.read_warp_epoch = own.warp_epoch;
    return;
  }
  if (cell.read_epoch >= own.launch_epoch && cell.reader != kNobody) {
    if (cell.read_block != own.block) fail("%s, read by another block, is written", place(region, address).c_str());
    if (unordered(own, cell.reader, cell.reader_warp, cell.read_epoch, cell.read_warp_epoch)) {
      fail("race: %s, read by %s, is written with no barrier between", place(region, address).c_str(),
           cell.reader == kSeveral ? "several threads" : ("thread " + std::to_string(cell.reader)).c_str());
    }
  }
  cell.writer = static_cast<uint16_t>(own.thread);
  cell.write_epoch = own.epoch;
  cell.write_block = own.block;
  cell.write_warp_epoch = own.warp_epoch;
  cell.written = true;
}

}  // namespace

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

void check_cells(Region& region, const void* address, unsigned bytes, bool write, const Access& access, bool lands) {
  if (!region.writable) return;
  const size_t offset = static_cast<const unsigned char*>(address) - region.begin;
  for (unsigned i = 0; i < bytes; i += 2) {
    check_cell(region, region.cells[(offset + i) / 2], region.begin + offset + i, write, access, lands);
  }
}

}  // namespace emulator
