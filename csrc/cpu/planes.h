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
          phase.taps.push_back(reached ? Tap{0, h.shifts[r] - plane.origin[0], w.shifts[s] - plane.origin[1]} : Tap{-1, 0, 0});
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  return planes;
}

// Calls step(x) for x = 0, kStep, 2 * kStep ... of `count`, the last time where it ends with them; or single(x) for each
// where there are fewer. For lines so short that a call would cost more.
template <int64_t kStep, class Step, class Single>
inline void in_steps(int64_t count, Step step, Single single) {
  if (count < kStep) {
    for (int64_t x = 0; x < count; ++x) single(x);
    return;
  }
  int64_t x = 0;
  for (; x + kStep <= count; x += kStep) step(x);
  if (x < count) step(count - kStep);
}

// Lines are short and channels far apart, so that nothing foresees where the next channel's are.
template <class T>
inline void fetch_line(const T* from, int64_t count) {
  for (int64_t x = 0; x < count; x += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + x);
}

// Copies `count` elements.
template <class T>
inline void copy_line(const T* from, int64_t count, T* to) {
  typedef T Vec __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
  in_steps<16 / sizeof(T)>(
      count, [&](int64_t x) { *reinterpret_cast<Vec*>(to + x) = *reinterpret_cast<const Vec*>(from + x); },
      [&](int64_t x) { to[x] = from[x]; });
}

// Copies every second of 2 * count - 1 elements.
template <class T>
inline void copy_every_second(const T* from, int64_t count, T* to) {
  constexpr int64_t kStep = 16 / sizeof(T);
  typedef T Vec __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
  in_steps<kStep>(
      count,
      [&](int64_t x) {
        // The second half begins with the last element of the first, so that nothing is read past the end.
        const Vec low = *reinterpret_cast<const Vec*>(from + 2 * x);
        const Vec high = *reinterpret_cast<const Vec*>(from + 2 * x + kStep - 1);
        if constexpr (kStep == 4) {
          *reinterpret_cast<Vec*>(to + x) = __builtin_shufflevector(low, high, 0, 2, 5, 7);
        } else {
          *reinterpret_cast<Vec*>(to + x) = __builtin_shufflevector(low, high, 0, 3);
        }
      },
      [&](int64_t x) { to[x] = from[2 * x]; });
}

// Copies one channel [H, W] of an image into its planes, for positions from line `first` on. If `more` follow, the next is
// fetched meanwhile.
template <class T>
void fill_planes(const T* image, const Pair& size, const Planes& planes, const Layout& layout, int64_t first, bool more,
                 T* out) {
  for (size_t p = 0; p < planes.phases.size(); ++p, out += layout.plane) {
    const Plane& plane = planes.phases[p];
    const int64_t step = plane.step[1], left = plane.left(), right = plane.right(size[1]);
    const int64_t zeros = left - layout.left[p], count = right - left;
    std::fill(out, out + layout.margin, T(0));
    T* to = out + layout.margin;
    for (int64_t y = 0; y < plane.size[0]; ++y, to += layout.pitch) {
      const int64_t row = (first + y) * plane.step[0] + plane.origin[0];
      if (row < 0 || row >= size[0]) {
        std::fill(to, to + layout.pitch, T(0));
        continue;
      }
      const T* line = image + row * size[1] + plane.origin[1] + left * step;
      if (more && step > 1 && left == 0) fetch_line(line + size[0] * size[1], count * step);
      for (int64_t x = 0; x < zeros; ++x) to[x] = T(0);
      if (step == 1) {
        copy_line(line, count, to + zeros);
      } else if (step == 2) {
        copy_every_second(line, count, to + zeros);
      } else {
        for (int64_t x = 0; x < count; ++x) to[zeros + x] = line[x * step];
      }
      for (int64_t x = zeros + count; x < layout.pitch; ++x) to[x] = T(0);
    }
    std::fill(to, out + layout.plane, T(0));
  }
}

}  // namespace sparsekd::cpu
