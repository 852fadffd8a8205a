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

namespace sparsekd::cpu {

using Pair = std::array<int64_t, 2>;  // height, width

struct Conv2dShape {
  int64_t batch, in_channels, out_channels, groups;
  Pair input, output, kernel, stride, padding, dilation;
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// One plane: plane[y][x] = source[y * step + origin] where that is inside the source, else 0.
struct Plane {
  Pair size, step, origin;
  int64_t elements() const { return size[0] * size[1]; }
  int64_t pitch() const { return size[1]; }
};

// The planes of one channel, and where each tap of the kernel starts in them.
struct Planes {
  std::vector<Plane> phases;             // all of the same size
  std::vector<int64_t> tap_offsets;      // [taps]; -1 where the tap takes no part
  Pair halo{0, 0};                       // how much larger a plane is than the positions it serves
  int64_t pitch() const { return phases[0].pitch(); }
  int64_t plane() const { return phases[0].elements(); }
  int64_t channel() const { return plane() * static_cast<int64_t>(phases.size()); }  // elements per channel
};

// A rectangle of results: flat position p = y * pitch + x is element (origin + y * step, origin + x * step).
struct Target {
  Pair size, step, origin;
};

struct InputGradPhase {
  Target target;
  std::vector<int64_t> tap_offsets;  // [taps], -1 where the tap does not reach these pixels
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

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
      planes.tap_offsets.push_back(phase * size[0] * size[1] + y / shape.stride[0] * size[1] + x / shape.stride[1]);
    }
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
          int64_t offset = -1;
          if (h.reached[r] && w.reached[s]) {
            offset = (h.shifts[r] - plane.origin[0]) * plane.pitch() + w.shifts[s] - plane.origin[1];
          }
          phase.tap_offsets.push_back(offset);
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  return planes;
}

// Copies one channel [H, W] of an image into its planes.
template <class T>
void fill_planes(const T* image, const Pair& size, const Planes& planes, T* out) {
  for (const Plane& plane : planes.phases) {
    const int64_t pitch = plane.pitch();
    const int64_t step = plane.step[1], origin = plane.origin[1];
    const int64_t left = std::clamp<int64_t>(ceil_div(-origin, step), 0, pitch);
    const int64_t right = std::clamp<int64_t>(ceil_div(size[1] - origin, step), left, pitch);
    for (int64_t y = 0; y < plane.size[0]; ++y, out += pitch) {
      const int64_t row = y * plane.step[0] + plane.origin[0];
      if (row < 0 || row >= size[0]) {
        std::fill(out, out + pitch, T(0));
        continue;
      }
      const T* line = image + row * size[1] + origin;
      std::fill(out, out + left, T(0));
      std::fill(out + right, out + pitch, T(0));
      if (step == 1) {
        std::copy(line + left, line + right, out + left);
      } else {
        for (int64_t x = left; x < right; ++x) out[x] = line[x * step];
      }
    }
  }
}

}  // namespace sparsekd::cpu
