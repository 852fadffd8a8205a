// Images on their way into the lanes of vectors (lanes.h) and back.
#pragma once
#include <limits>
#include <vector>

#include "lanes.h"
#include "scratch.h"

namespace sparsekd::cpu {

// Elements between channels: whole cache lines, an odd number of them, or channels would fall on the same cache sets.
template <class T>
int64_t spread(int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(elements, kLine) | 1) * kLine;
}

// Images as the passes read or write them.
template <class T>
struct Batch {
  T* data;
  int64_t count, channels;
  Pair size;
  bool last;  // channels_last: [H, W, C], else [C, H, W]
  T* image(int64_t n) const { return data + n * channels * size[0] * size[1]; }
};

// out[i * step] = in[i] for i < count.
template <class T>
void store_apart(const T* in, int64_t count, int64_t step, T* out) {
  if (step == 2) return type_kernels<T>().spread(in, count, out);
  for (int64_t i = 0; i < count; ++i) out[i * step] = in[i];
}

// What is done to finished results: act(scale * x + shift + residual).
template <class T>
struct Epilogue {
  const T* scale = nullptr;     // [channels] or null
  const T* shift = nullptr;
  const T* residual = nullptr;  // where and as the result
  Activation activation = Activation::none;
  bool any() const { return scale || shift || residual || activation != Activation::none; }
  // Whether it is an addition and bounds at most, which the spmm kernel does where it stores.
  bool clamps() const {
    return !scale && !shift && activation != Activation::silu && activation != Activation::hardswish;
  }

  // Has that done to results from `base` on where they are stored.
  template <class To>
  void clamp(To& to, const T* result, const T* base) const {
    to.residual = residual ? residual + (base - result) : nullptr;
    to.clamped = activation != Activation::none;
    to.low = T(0);
    to.high = activation == Activation::relu6 ? T(6) : std::numeric_limits<T>::infinity();
  }

  // `count` pixels of one channel, side by side.
  void of_channel(const Batch<T>& result, const T* from, T* out, int64_t channel, int64_t count) const {
    run(result, from, out, channel, count, false);
  }
  // `count` channels of one pixel, side by side.
  void of_pixel(const Batch<T>& result, T* out, int64_t channel, int64_t count) const {
    run(result, out, out, channel, count, true);
  }

 private:
  void run(const Batch<T>& result, const T* from, T* out, int64_t channel, int64_t count, bool by_element) const {
    type_kernels<T>().epilogue({from, out, residual ? residual + (out - result.data) : nullptr, count,
                                scale ? scale + channel : nullptr, shift ? shift + channel : nullptr, by_element,
                                activation});
  }
};

// Pixels first .. first + count - 1 of all images one after the other, for a 1 x 1 kernel, which sees every stride-th
// pixel of each line and column: out[c][pixel], zeros from `count` on to `pitch`.
template <class T>
void pack_flat(const Batch<const T>& batch, const Pair& stride, const Pair& pixels, int64_t first, int64_t count,
               int64_t begin, int64_t end, int64_t pitch, T* out) {
  constexpr int64_t kAhead = 4;  // channels
  const bool every = stride[0] == 1 && stride[1] == 1;  // then the lines are one
  const int64_t width = every ? pixels[0] * pixels[1] : pixels[1];
  const int64_t lines = every ? 1 : pixels[0];
  const int64_t plane = batch.size[0] * batch.size[1];
  for (int64_t done = 0; done < count;) {
    const int64_t line = (first + done) / width, x = (first + done) % width;
    const int64_t run = std::min(count - done, width - x);
    // Whole lines of one image go together.
    const int64_t together = x == 0 && run == width ? std::min((count - done) / width, lines - line % lines) : 1;
    const T* const image = batch.image(line / lines);
    const int64_t at = every ? x : line % lines * stride[0] * batch.size[1] + x * stride[1];
    if (batch.last) {
      for (int64_t i = 0; i < together; ++i) {
        const T* const from = image + (at + i * stride[0] * batch.size[1]) * batch.channels + begin;
        type_kernels<T>().transpose(from, run, end - begin, stride[1] * batch.channels,
                                    out + begin * pitch + done + i * run, pitch);
      }
    } else if (every) {
      type_kernels<T>().copy_lines({image + begin * plane + at, plane, out + begin * pitch + done, pitch, end - begin,
                                    run, 1, 0, run, kAhead * plane});
    } else {
      for (int64_t c = begin; c < end; ++c) {
        type_kernels<T>().copy_lines({image + c * plane + at, stride[0] * batch.size[1], out + c * pitch + done, run,
                                      together, run, stride[1], 0, run, c + kAhead < end ? kAhead * plane : 0});
      }
    }
    done += run * together;
  }
  for (int64_t c = begin; count < pitch && c < end; ++c)
    std::fill(out + c * pitch + count, out + (c + 1) * pitch, T(0));
}

// Copies channels [H, W] of images of one size into their planes, for positions from line `first` on.
template <class T>
class PlaneCopy {
 public:
  PlaneCopy(const Pair& size, const Planes& planes, const Layout& layout, int64_t first)
      : ahead(size[0] * size[1]), plane(layout.plane) {
    for (size_t p = 0; p < planes.phases.size(); ++p) {
      const Plane& phase = planes.phases[p];
      const int64_t step = phase.step[1], left = phase.left(), right = phase.right(size[1]);
      // The first line that has a source, and the first after those.
      const int64_t above = first * phase.step[0] + phase.origin[0];
      const int64_t top = std::clamp<int64_t>(ceil_div(-above, phase.step[0]), 0, phase.size[0]);
      const int64_t below = std::clamp<int64_t>(ceil_div(size[0] - above, phase.step[0]), top, phase.size[0]);
      parts.push_back({(above + top * phase.step[0]) * size[1] + phase.origin[1] + left * step,
                       layout.margin + top * layout.pitch, layout.margin + below * layout.pitch,
                       {nullptr, phase.step[0] * size[1], nullptr, layout.pitch, below - top, right - left, step,
                        left - layout.left[p], layout.pitch, 0}});
    }
  }

  // If `more` channels follow, the next is fetched meanwhile.
  void operator()(const T* image, bool more, T* out) const {
    for (const Part& part : parts) {
      std::fill(out, out + part.first, T(0));
      LineCopy<T> copy = part.copy;
      copy.from = image + part.from;
      copy.to = out + part.first;
      copy.ahead = more ? ahead : 0;
      type_kernels<T>().copy_lines(copy);
      std::fill(out + part.past, out + plane, T(0));
      out += plane;
    }
  }

 private:
  struct Part {  // of one phase: where its lines lie in the source and the plane
    int64_t from, first, past;
    LineCopy<T> copy;
  };
  std::vector<Part> parts;
  int64_t ahead, plane;
};

// Channels begin .. end - 1 of one image in planes, for positions from line `first` on, zeros from there to `pitch`.
template <class T>
void pack_planes(const Batch<const T>& batch, const Planes& planes, const Layout& layout, int64_t n, int64_t first,
                 int64_t begin, int64_t end, int64_t pitch, T* out) {
  const PlaneCopy<T> copy(batch.size, planes, layout, first);
  for (int64_t c = begin; c < end; ++c) {
    copy(batch.image(n) + c * batch.size[0] * batch.size[1], c + 1 < end, out + c * pitch);
    std::fill(out + c * pitch + layout.channel(), out + (c + 1) * pitch, T(0));
  }
}

}  // namespace sparsekd::cpu
