// Space to lanes: copies activations into the layout that conv2d.h draws. One thread writes one vector of 4 lanes.
#pragma once
#include "conv2d.h"
#include "device.cuh"

namespace sparsekd::cuda {

// ToLanesParams::dtype as a type, so that each source type has its own loop.
template <class T>
__global__ void to_lanes_kernel(const ToLanesParams p) {
  const Lanes& lanes = p.lanes;
  const int64_t vectors = int64_t(lanes.units) * lanes.channels * lanes.lane_groups * lanes.plane;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= vectors) return;
  const int64_t plane_index = index / lanes.plane;
  int rest = static_cast<int>(index - plane_index * lanes.plane);
  const int column = rest % lanes.columns;
  rest /= lanes.columns;
  const int x = column * p.axes[1].stride + rest % lanes.phases[1] + p.axes[1].origin;
  rest /= lanes.phases[1];
  const int row = rest % lanes.rows, phase_y = rest / lanes.rows;
  const int lane_group = static_cast<int>(plane_index % lanes.lane_groups);
  const int64_t unit_channel = plane_index / lanes.lane_groups;
  const int channel = static_cast<int>(unit_channel % lanes.channels);
  const int64_t unit = unit_channel / lanes.channels;

  const T* source = static_cast<const T*>(p.source) + channel * p.stride_c + x * p.stride_w;
  float values[4];
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t slot = (unit * lanes.lane_groups + lane_group) * 4 + lane;
    const int64_t image = slot / lanes.strips;
    const int64_t strip = slot - image * lanes.strips;
    const int64_t y = (strip * lanes.strip_rows + row) * p.axes[0].stride + phase_y + p.axes[0].origin;
    const bool inside = image < lanes.batch && y >= 0 && y < p.axes[0].size && x >= 0 && x < p.axes[1].size;
    values[lane] = inside ? to_float(source[image * p.stride_n + y * p.stride_h]) : 0.0f;
  }
  store_vector(reinterpret_cast<float4*>(p.to) + index, float4{values[0], values[1], values[2], values[3]});
}

}  // namespace sparsekd::cuda
