// Images on their way into the lanes of vectors (lanes.h) and back.
#pragma once
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

// Pixels first .. first + count - 1 of all images one after the other, for a 1 x 1 kernel, which sees every stride-th pixel
// of each line and column: out[c][pixel], zeros from `count` on to `pitch`.
template <class T>
void pack_flat(const Batch<const T>& batch, const Pair& stride, const Pair& pixels, int64_t first, int64_t count,
               int64_t begin, int64_t end, int64_t pitch, T* out) {
  const bool every = stride[0] == 1 && stride[1] == 1;  // then the lines are one
  const int64_t width = every ? pixels[0] * pixels[1] : pixels[1];
  const int64_t lines = every ? 1 : pixels[0];
  // A channel at a time: its lines follow each other in memory.
  for (int64_t c = begin; c < end; c += batch.last ? end - begin : 1) {
    for (int64_t done = 0; done < count;) {
      const int64_t line = (first + done) / width, x = (first + done) % width;
      const int64_t run = std::min(count - done, width - x);
      const T* image = batch.image(line / lines);
      const int64_t at = every ? x : line % lines * stride[0] * batch.size[1] + x * stride[1];
      T* to = out + c * pitch + done;
      if (batch.last) {
        type_kernels<T>().transpose(image + at * batch.channels + begin, run, end - begin, stride[1] * batch.channels, to,
                                    pitch);
      } else {
        const T* from = image + c * batch.size[0] * batch.size[1] + at;
        if (c + 1 < end) fetch_line(from + batch.size[0] * batch.size[1], (run - 1) * stride[1] + 1);
        if (stride[1] == 1) {
          copy_line(from, run, to);
        } else if (stride[1] == 2) {
          copy_every_second(from, run, to);
        } else {
          for (int64_t i = 0; i < run; ++i) to[i] = from[i * stride[1]];
        }
      }
      done += run;
    }
  }
  for (int64_t c = begin; count < pitch && c < end; ++c) std::fill(out + c * pitch + count, out + (c + 1) * pitch, T(0));
}

// Channels begin .. end - 1 of one image in planes, for positions from line `first` on, zeros from there to `pitch`.
template <class T>
void pack_planes(const Batch<const T>& batch, const Planes& planes, const Layout& layout, int64_t n, int64_t first,
                 int64_t begin, int64_t end, int64_t pitch, T* out) {
  for (int64_t c = begin; c < end; ++c) {
    fill_planes<T>(batch.image(n) + c * batch.size[0] * batch.size[1], batch.size, planes, layout, first,
                   c + 1 < end, out + c * pitch);
    std::fill(out + c * pitch + layout.channel(), out + (c + 1) * pitch, T(0));
  }
}

}  // namespace sparsekd::cpu
