// Space to lanes: copies activations into the layout that conv2d.h draws. In the same launch, as it takes no longer so,
// values are put into the records of a plan.
#pragma once
#include "conv2d.h"
#include "conv2d_records.cuh"
#include "device.cuh"

namespace sparsekd::cuda {

// One thread writes the vector of 4 lanes of one position in kLanesChannels channels: what is read is asked for at
// once, so that memory is kept busy. The threads of a unit take as many blocks as blockIdx.x counts.
// ToLanesParams::dtype as a type, so that each source type has its own loop.
template <class T>
__global__ void to_lanes_kernel(const ToLanesParams p) {
  if (blockIdx.x >= p.blocks) {
    const int64_t index = int64_t(blockIdx.x - p.blocks) * blockDim.x + threadIdx.x;
    if (blockIdx.y == 0 && index < p.fill.n_records) fill_record(p.fill, index);
    return;
  }
  const Lanes& lanes = p.lanes;
  uint32_t rest = blockIdx.x * blockDim.x + threadIdx.x;
  if (rest >= p.threads) return;
  const int place = static_cast<int>(p.plane.take(rest));
  const int lane_group = static_cast<int>(p.lane_groups.take(rest));
  const int channel = static_cast<int>(rest) * kLanesChannels;
  const int channels = min(lanes.channels - channel, kLanesChannels);
  rest = place;
  int x = static_cast<int>(p.columns.take(rest)) * p.axes[1].stride + p.axes[1].origin;
  x += static_cast<int>(p.phases_w.take(rest));
  const int row = static_cast<int>(p.rows.take(rest)), phase_y = static_cast<int>(rest);
  const int y = row * p.axes[0].stride + phase_y + p.axes[0].origin;
  const bool in_width = x >= 0 && x < p.axes[1].size;
  const T* source = static_cast<const T*>(p.source) + channel * p.stride_c + x * p.stride_w;

  for (int unit = blockIdx.y; unit < lanes.units; unit += gridDim.y) {
    const uint32_t slot = (static_cast<uint32_t>(unit) * lanes.lane_groups + lane_group) * 4;
    int image = static_cast<int>(p.strips.quotient(slot)), strip = static_cast<int>(slot) - image * lanes.strips;
    float values[kLanesChannels][4] = {};
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t of_strip = y + int64_t(strip) * lanes.strip_rows * p.axes[0].stride;
      const bool inside = in_width && image < lanes.batch && of_strip >= 0 && of_strip < p.axes[0].size;
      const T* from = source + image * p.stride_n + of_strip * p.stride_h;
#pragma unroll
      for (int c = 0; c < kLanesChannels; ++c) {
        if (inside && c < channels) values[c][lane] = to_float(from[c * p.stride_c]);
      }
      if (++strip == lanes.strips) {
        strip = 0;
        ++image;
      }
    }
    const int64_t first = (int64_t(unit) * lanes.channels + channel) * lanes.lane_groups + lane_group;
    float4* to = reinterpret_cast<float4*>(p.to) + first * lanes.plane + place;
#pragma unroll
    for (int c = 0; c < kLanesChannels; ++c) {
      const float4 vector{values[c][0], values[c][1], values[c][2], values[c][3]};
      store_vector(to + int64_t(c) * lanes.lane_groups * lanes.plane, vector, c < channels);
    }
  }
}

}  // namespace sparsekd::cuda
