// Zero-padded planes, in which every column of a packed weight is a fixed distance from its output pixel (lanes.h).
//
// With stride the plane is split into its phases first (every stride-th row and column), so that neighbours lie side by
// side again. For the input gradient the roles turn around: the gradient of the output is the plane, and the phases are
// those of the result.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "../geometry.h"

namespace sparsekd::cpu {

// One plane: plane[y][x] = source[y * step + origin] where that is inside the source, else 0.
struct Plane {
  Pair size, step, origin;
  // First column that has a source, and the first after those, for a source this wide.
  int64_t left() const { return std::clamp<int64_t>(ceil_div(-origin[1], step[1]), 0, size[1]); }
  int64_t right(int64_t width) const {
    return std::clamp<int64_t>(ceil_div(width - origin[1], step[1]), left(), size[1]);
  }
};

// Where the pixel of a tap lies: in which plane, and how far from the result's pixel. A phase of -1 takes no part.
struct Tap {
  int64_t phase, y, x;
};

// The planes of one channel, all of the same size.
struct Planes {
  std::vector<Plane> phases;
  std::vector<Tap> taps;
  Pair halo{0, 0};  // how much larger a plane is than the positions it serves
  std::vector<Pair> reach;  // per phase, if it is known: how much of that its taps read
};

// How the planes of one channel lie in memory.
struct Layout {
  int64_t pitch;              // from one line to the next
  int64_t margin;             // zeros before a plane
  int64_t plane;              // from one plane to the next
  std::vector<int64_t> left;  // per phase: columns that are left out
  int64_t channel() const { return plane * static_cast<int64_t>(left.size()); }
  int64_t at(const Tap& tap) const { return tap.phase * plane + margin + tap.y * pitch + tap.x - left[tap.phase]; }
};

// Line by line, as the planes are.
inline Layout plain_layout(const Planes& planes) {
  const Pair& size = planes.phases[0].size;
  return {size[1], 0, size[0] * size[1], std::vector<int64_t>(planes.phases.size(), 0)};
}

// Lines share their padding: the zeros right of one are left of the next. Planes and, if `aligned`, lines begin at a
// multiple of `lanes`. `positions` results in a line need as many columns.
//
//   a b c 0     out of   0 a b c 0
//   d e f 0              0 d e f 0
//   g h i 0              0 g h i 0
inline Layout shared_layout(const Planes& planes, int64_t width, int64_t positions, int64_t lanes, bool aligned) {
  Layout layout{positions, 0, 0, {}};
  int64_t most = 0;
  for (const Plane& plane : planes.phases) {
    const int64_t left = plane.left(), right = plane.right(width);
    layout.left.push_back(left);
    layout.pitch = std::max(layout.pitch, right - left + std::max(left, plane.size[1] - right));
    most = std::max(most, left);
  }
  if (aligned) layout.pitch = ceil_div(layout.pitch, lanes) * lanes;
  layout.margin = ceil_div(most, lanes) * lanes;
  layout.plane = ceil_div(layout.margin + planes.phases[0].size[0] * layout.pitch, lanes) * lanes;
  return layout;
}

// A rectangle of results: position (y, x) is element (origin + y * step, origin + x * step).
struct Target {
  Pair size, step, origin;
};

struct InputGradPhase {
  Target target;
  std::vector<Tap> taps;  // those that do not reach these pixels take no part
};

// The input's planes for a rectangle of output pixels, for the forward and the weight gradient.
inline Planes input_planes(const Conv2dShape& shape, const Pair& positions) {
  Planes planes;
  Pair size;
  for (int d = 0; d < 2; ++d) {
    planes.halo[d] = (shape.kernel[d] - 1) * shape.dilation[d] / shape.stride[d];
    size[d] = positions[d] + planes.halo[d];
  }
  std::map<Pair, int64_t> phase_of;
  for (int64_t r = 0; r < shape.kernel[0]; ++r) {
    for (int64_t s = 0; s < shape.kernel[1]; ++s) {
      const int64_t y = r * shape.dilation[0], x = s * shape.dilation[1];
      const int64_t phase_h = y % shape.stride[0], phase_w = x % shape.stride[1];
      const auto [entry, made] = phase_of.try_emplace({phase_h, phase_w}, static_cast<int64_t>(planes.phases.size()));
      const int64_t phase = entry->second;
      if (made) {  // phases that no tap reads are never made
        planes.phases.push_back({size, shape.stride, {phase_h - shape.padding[0], phase_w - shape.padding[1]}});
      }
      planes.taps.push_back({phase, y / shape.stride[0], x / shape.stride[1]});
    }
  }
  for (int64_t phase = 0; phase < static_cast<int64_t>(planes.phases.size()); ++phase) {
    Pair low{INT64_MAX, INT64_MAX}, high{0, 0};
    for (const Tap& tap : planes.taps) {
      if (tap.phase != phase) continue;
      low = {std::min(low[0], tap.y), std::min(low[1], tap.x)};
      high = {std::max(high[0], tap.y), std::max(high[1], tap.x)};
    }
    planes.reach.push_back({high[0] - low[0], high[1] - low[1]});
  }
  return planes;
}

// The output gradient's plane and, for each phase of the input's pixels, the taps that reach them.
//
// Input row h and output row oh meet at tap r when h + padding = oh * stride + r * dilation. With
// h + padding = a * stride + phase and r * dilation = b * stride + rest this needs rest = phase, and then oh = a - b.
//
// Every phase has a rectangle of `positions`, though some have fewer pixels.
inline Planes input_grad_planes(const Conv2dShape& shape, const Pair& positions, std::vector<InputGradPhase>& phases) {
  struct Axis {  // one phase of one dimension
    int64_t origin, count;
    std::vector<int64_t> shifts;  // per tap: oh = position + shift
    std::vector<bool> reached;
  };
  std::array<std::vector<Axis>, 2> axes;
  Plane plane{positions, {1, 1}, {0, 0}};
  for (int d = 0; d < 2; ++d) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    // A stride beyond the input has phases without pixels, which are left out.
    for (int64_t begin = 0; begin < std::min(shape.stride[d], shape.input[d]); ++begin) {
      const int64_t phase = (begin + shape.padding[d]) % shape.stride[d];
      const int64_t first = (begin + shape.padding[d]) / shape.stride[d];
      Axis axis{begin, (shape.input[d] - 1 - begin) / shape.stride[d] + 1, {}, {}};
      for (int64_t tap = 0; tap < shape.kernel[d]; ++tap) {
        const int64_t distance = tap * shape.dilation[d];
        const bool reached = distance % shape.stride[d] == phase;
        axis.shifts.push_back(first - distance / shape.stride[d]);
        axis.reached.push_back(reached);
        if (reached) {
          low = std::min(low, axis.shifts.back());
          high = std::max(high, axis.shifts.back());
        }
      }
      axes[d].push_back(std::move(axis));
    }
    if (low > high) low = high = 0;  // no tap reaches any pixel
    plane.size[d] += high - low;
    plane.origin[d] = low;
  }
  Planes planes;
  planes.halo = {plane.size[0] - positions[0], plane.size[1] - positions[1]};
  planes.phases.push_back(plane);
  for (const Axis& h : axes[0]) {
    for (const Axis& w : axes[1]) {
      InputGradPhase phase{{{h.count, w.count}, shape.stride, {h.origin, w.origin}}, {}};
      for (int64_t r = 0; r < shape.kernel[0]; ++r) {
        for (int64_t s = 0; s < shape.kernel[1]; ++s) {
          const bool reached = h.reached[r] && w.reached[s];
          phase.taps.push_back(reached ? Tap{0, h.shifts[r] - plane.origin[0], w.shifts[s] - plane.origin[1]}
                                       : Tap{-1, 0, 0});
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  return planes;
}

// Lines are short and channels far apart, so that nothing foresees where the next channel's are.
template <class T>
inline void fetch_line(const T* from, int64_t count) {
  for (int64_t x = 0; x < count; x += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + x);
}

}  // namespace sparsekd::cpu
