// The borders of strips (lanes.h), which are their neighbours' pixels.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "lanes.h"

namespace sparsekd::cpu {

// Fills planes of strips beside the pixels in their middle: with a neighbour's, one lane further, or with zeros.
template <class T>
class Borders {
 public:
  explicit Borders(const Grid& grid) : grid(grid) {}

  // What has to move in a plane of `size` positions whose position (y, x) is position (y + shift, x + shift) of the
  // strip, in an image of so many pixels. What lies beyond the image is anything, or if `packed` zero but for what a
  // strip has beyond the end of a line, which is the next line's.
  std::vector<LaneMove> moves(const Pair& image, const Pair& size, const Pair& shift, bool packed) {
    std::vector<LaneMove> list;
    auto place = [&](int64_t y, int64_t x) {
      return static_cast<int32_t>(((y - shift[0]) * size[1] + x - shift[1]) * grid.lanes);
    };
    const bool whole = packed ? image[1] % grid.strip[1] == 0 : image == grid.covered();
    for (int64_t y = 0; !whole && y < grid.strip[0]; ++y) {
      for (int64_t x = 0; x < grid.strip[1]; ++x) {
        if (const int32_t cut = inside(image, y, x, packed); cut >= 0) list.push_back({place(y, x), place(y, x), cut});
      }
    }
    for (int64_t y = shift[0]; y < shift[0] + size[0]; ++y) {
      for (int64_t x = shift[1]; x < shift[1] + size[1]; ++x) {
        const int64_t down = floor_div(y, grid.strip[0]), across = floor_div(x, grid.strip[1]);
        if (down == 0 && across == 0) continue;
        const int32_t from = place(y - down * grid.strip[0], x - across * grid.strip[1]);
        list.push_back({from, place(y, x), neighbours(down, across)});
      }
    }
    return list;
  }

  // Patterns of lanes that the moves name.
  const std::vector<LaneIndex<T>>& sources() const { return lanes; }

 private:
  int64_t down_of(int64_t lane) const { return lane / grid.across % grid.down; }
  int64_t across_of(int64_t lane) const { return lane % grid.across; }

  // The lanes that are kept at a position; -1 for all.
  int32_t inside(const Pair& image, int64_t y, int64_t x, bool packed) {
    std::vector<LaneIndex<T>> kept;
    for (int64_t lane = 0; lane < grid.lanes; ++lane) {
      const int64_t row = down_of(lane) * grid.strip[0], column = across_of(lane) * grid.strip[1];
      const bool in_line = column + x < image[1];
      const bool stays = packed ? in_line || column >= image[1] : in_line && row + y < image[0];
      kept.push_back(stays ? static_cast<LaneIndex<T>>(lane) : -1);
    }
    return std::find(kept.begin(), kept.end(), -1) == kept.end() ? -1 : pattern(kept);
  }

  // Lane (image, d, a) of a border is lane (image, d + down, a + across) of the pixels in the middle.
  int32_t neighbours(int64_t down, int64_t across) {
    for (const auto& [key, known] : found) {
      if (key == Pair{down, across}) return known;
    }
    std::vector<LaneIndex<T>> from;
    for (int64_t lane = 0; lane < grid.lanes; ++lane) {
      const int64_t d = down_of(lane) + down, a = across_of(lane) + across;
      const bool exists = d >= 0 && d < grid.down && a >= 0 && a < grid.across;
      from.push_back(exists ? static_cast<LaneIndex<T>>(lane + down * grid.across + across) : -1);
    }
    found.push_back({{down, across}, pattern(from)});
    return found.back().second;
  }

  int32_t pattern(const std::vector<LaneIndex<T>>& wanted) {
    for (size_t at = 0; at < lanes.size(); at += grid.lanes) {
      if (std::equal(wanted.begin(), wanted.end(), lanes.begin() + at)) return static_cast<int32_t>(at / grid.lanes);
    }
    lanes.insert(lanes.end(), wanted.begin(), wanted.end());
    return static_cast<int32_t>(lanes.size() / grid.lanes) - 1;
  }

  Grid grid;
  std::vector<LaneIndex<T>> lanes;              // [pattern, lane]
  std::vector<std::pair<Pair, int32_t>> found;  // neighbours that have a pattern
};

}  // namespace sparsekd::cpu
