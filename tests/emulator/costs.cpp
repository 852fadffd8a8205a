// See costs.h.
#include "costs.h"

#include <algorithm>
#include <cstdio>
#include <map>
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
      std::vector<uintptr_t> addresses, units;
      const unsigned unit = request.shared ? 4 : 32;
      for (const auto& trace : lanes) {
        if (k >= trace.size() || trace[k] == kNowhere) continue;
        addresses.push_back(trace[k]);
        for (unsigned b = 0; b < request.bytes; b += std::min(request.bytes, unit))
          units.push_back((trace[k] + b) / unit);
      }
      const uint64_t bytes = distinct(addresses) * request.bytes;
      ++cost.requests;
      cost.actual += request.shared ? wavefronts(addresses, request.bytes) : distinct(units);
      cost.ideal += (bytes + (request.shared ? 127 : 31)) / (request.shared ? 128 : 32);
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
