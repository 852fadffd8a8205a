// See costs.h.
#include "costs.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace emulator {
namespace {

struct Cost {
  std::string kernel;
  uint64_t requests = 0, actual = 0, ideal = 0;  // wavefronts of shared memory, sectors of global memory
};
bool counting = false;
std::map<Request, Cost> costs;
constexpr uintptr_t kNowhere = 0;
std::map<std::pair<unsigned, Request>, std::vector<uintptr_t>[32]> traces;  // of the running block's warps

// A lane of a warp and where it reads or writes.
struct Place {
  unsigned lane;
  uintptr_t address;
};

// Whether lanes that differ in `bit` want the same, all of them.
bool paired(const std::vector<Place>& places, unsigned bit) {
  std::map<unsigned, uintptr_t> wanted;
  for (const Place& p : places) {
    const auto [known, fresh] = wanted.try_emplace(p.lane & ~bit, p.address);
    if (!fresh && known->second != p.address) return false;
  }
  return true;
}

// Shared memory serves 128 bytes in 32 banks at once, and gives a warp one register, 128 bytes, in a cycle: a request of
// 16 bytes a lane is served 8 lanes at a time. Lanes that want the same word share it. Of a read, twice as many lanes are
// served at a time where neighbours, or lanes two apart, want the same, each such pair of the warp: two registers of it
// come in a cycle. So 16 bytes that all lanes want are two wavefronts, not one and not four. Known of this:
//
//   7.5        16 bytes at lane % 4: four. NVIDIA gives the rule, and two for 16 bytes where it is met
//              (forums.developer.nvidia.com/t/77228)
//   8.6, 9.0   16 bytes at two places, one of each half of the warp: two; at 16 places, which the halves share, two of
//              each bank at lanes that are not such pairs: eight (forums.developer.nvidia.com/t/373160)
//   9.0        our convolution with and without reads of a weight vector by all lanes, all wavefronts of four launches
//              counted: 1.1 to 1.5 for each such read of 16 bytes, 1.1 of 8. Four are excluded, one is not
uint64_t wavefronts(const std::vector<Place>& places, unsigned bytes, bool write) {
  const bool pairs = !write && (paired(places, 1) || paired(places, 2));
  const unsigned lanes_at_once = std::min(32u, 32 / std::max(1u, bytes / 4) * (pairs ? 2 : 1));
  uint64_t total = 0;
  for (unsigned first = 0; first < 32; first += lanes_at_once) {
    std::set<uintptr_t> words;
    for (const auto& [lane, address] : places) {
      if (lane < first || lane >= first + lanes_at_once) continue;
      for (unsigned b = 0; b < std::max(4u, bytes); b += 4) words.insert(address / 4 + b / 4);
    }
    unsigned banks[32] = {}, most = 0;
    for (uintptr_t word : words) most = std::max(most, ++banks[word % 32]);
    total += most;
  }
  return total;
}

// The least for as many different bytes, wherever they lie, and as many that lanes get.
uint64_t least_wavefronts(uint64_t different, uint64_t got, bool write) {
  return std::max((different + 127) / 128, write ? 0 : (got + 255) / 256);
}

}  // namespace

void count(const Request& request, unsigned warp, unsigned lane, const void* address) {
  if (counting) traces[{warp, request}][lane].push_back(reinterpret_cast<uintptr_t>(address));
}

void count_block(const char* kernel) {
  for (auto& [key, lanes] : traces) {
    const Request& request = key.second;
    size_t most = 0;
    for (const auto& trace : lanes) most = std::max(most, trace.size());
    Cost& cost = costs[request];
    cost.kernel = kernel;
    for (size_t k = 0; k < most; ++k) {
      std::vector<Place> places;
      std::set<uintptr_t> addresses, sectors;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (k >= lanes[lane].size() || lanes[lane][k] == kNowhere) continue;
        const uintptr_t address = lanes[lane][k];
        places.push_back({lane, address});
        addresses.insert(address);
        for (unsigned b = 0; b < request.bytes; b += std::min(request.bytes, 32u)) sectors.insert((address + b) / 32);
      }
      const uint64_t bytes = addresses.size() * request.bytes;
      ++cost.requests;
      if (request.shared) {
        cost.actual += wavefronts(places, request.bytes, request.write);
        cost.ideal += least_wavefronts(bytes, places.size() * request.bytes, request.write);
      } else {
        cost.actual += sectors.size();
        cost.ideal += (bytes + 31) / 32;
      }
    }
  }
  traces.clear();
}

}  // namespace emulator

// ---- for the tests, through ctypes ----

extern "C" {

void emulator_count(int on) {
  emulator::counting = on;
  if (on) emulator::costs.clear();
}
// One line each: address in the library, shared or global, read or write, bytes a lane, requests, actual, ideal,
// kernel.
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
}
