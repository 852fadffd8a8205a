// How activations come to the convolution on tensor cores (conv2d_tensor.cuh): images are turned to lanes of 16 bits,
// and a block of threads copies planes of its tiles to shared memory.
#pragma once
#include "conv2d.cuh"
#include "conv2d_tensor.h"

namespace sparsekd::cuda {

__global__ void to_lanes16_kernel(const ToLanes16Params p) {
  const Lanes& lanes = p.lanes;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.threads) return;
  int64_t unit, place;
  int channel;
  if (p.channels_last) {  // of 16 channels each, which are a sector to read, two places, which are one to write
    const int of_channel = static_cast<int>(index / 2 % 16), blocks = p.channel_blocks, pairs = lanes.plane / 2;
    const int64_t rest = index / 32;
    channel = static_cast<int>(rest % blocks) * 16 + of_channel;
    if (channel >= lanes.channels) return;
    place = rest / blocks % pairs * 2 + index % 2;
    unit = rest / blocks / pairs;
  } else {
    place = index % lanes.plane;
    channel = static_cast<int>(index / lanes.plane % lanes.channels);
    unit = index / lanes.plane / lanes.channels;
  }
  int rest = static_cast<int>(place);
  const int column = rest % lanes.columns;
  rest /= lanes.columns;
  const int x = column * p.axes[1].stride + rest % lanes.phases[1] + p.axes[1].origin;
  rest /= lanes.phases[1];
  const int row = rest % lanes.rows, phase_y = rest / lanes.rows;

  const auto* source = static_cast<const uint16_t*>(p.source) + channel * p.stride_c + x * p.stride_w;
  uint32_t words[kLanes / 2];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t slot = unit * kLanes + lane;
    const int64_t image = slot / lanes.strips, strip = slot - image * lanes.strips;
    const int64_t y = (strip * lanes.strip_rows + row) * p.axes[0].stride + phase_y + p.axes[0].origin;
    const bool inside = image < lanes.batch && y >= 0 && y < p.axes[0].size && x >= 0 && x < p.axes[1].size;
    const uint32_t bits = inside ? source[image * p.stride_n + y * p.stride_h] : 0;
    words[lane / 2] = lane % 2 ? words[lane / 2] | bits << 16 : bits;
  }
  const int64_t to = (unit * lanes.channels + channel) * lanes.plane + place;
  store_vector(static_cast<uint4*>(p.to) + to, uint4{words[0], words[1], words[2], words[3]});
}

// Where a tile begins: row y, and in it `shift` places behind column x, where a stretch does.
struct TilePlace {
  int64_t unit;
  int y, x, shift;
};
__device__ __forceinline__ TilePlace place_of(const TensorConv2dParams& p, int tile) {
  const int of_unit = p.tiles_of_stretch * p.stretches, in_unit = tile % of_unit;
  const int first = in_unit / p.stretches * p.places;
  return {tile / of_unit, first / p.row_places, in_unit % p.stretches * p.tile_w, first % p.row_places};
}

// Copies one block of planes after the other, of one tile after the other that a block of threads computes, each to the
// buffer that was read last: there are two, or one where it takes all planes.
struct Stager {
  static constexpr int kCopies = 6;  // of a lane, of a plane, whose places it remembers
  const TensorConv2dParams& p;
  uint4* buffers;
  const uint4* input;
  const uint4* plane_at;
  int places[kCopies], tile, block, buffer;

  __device__ __forceinline__ Stager(const TensorConv2dParams& p, uint4* buffers, int group)
      : p(p),
        buffers(buffers + p.zeros),
        input(static_cast<const uint4*>(p.input) + int64_t(group) * p.channels_per_group * p.source_plane),
        plane_at(reinterpret_cast<const uint4*>(p.plan.plane_at) + int64_t(blockIdx.y) * p.blocks * p.block_fours),
        tile(blockIdx.x),
        block(0),
        buffer(0) {
    find_places(0);
  }

  // In tiles that begin in a row, planes do so, too.
  __device__ __forceinline__ void find_places(int shift) {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) places[j] = place_in_plane(threadIdx.x % 32 + j * 32 + shift);
  }

  // Of a vector of a plane: its row in the upper half, its column in the lower.
  __device__ __forceinline__ int place_in_plane(int i) const {
    return i / p.tile_columns << 16 | i % p.tile_columns;
  }

  // A warp copies every so many fours of planes.
  __device__ __forceinline__ void next() {
    if (tile < p.tiles) {
      const TilePlace place = place_of(p, tile);
      if (p.shifted && block == 0) find_places(place.shift);
      const uint4* source = input + place.unit * p.source_channels * p.source_plane;
      const int y = place.y * p.source[0].step + p.source[0].origin,
                x = place.x * p.source[1].step + p.source[1].origin;
      for (int i = threadIdx.x / 32; i < p.block_fours; i += blockDim.x / 32) {
        const uint4 four = load_vector(plane_at + block * p.block_fours + i);
        uint4* to = buffers + buffer * p.buffer + i * 4 * p.pitch;
#pragma unroll 1
        for (int q = 0; q < 4; ++q) {
          const int plane = static_cast<int>(q == 0 ? four.x : q == 1 ? four.y : q == 2 ? four.z : four.w);
          if (plane >= 0 && i * 4 + q < p.block_planes) copy(source, plane, y, x, place.shift, to + q * p.pitch);
        }
      }
      if (p.blocks > 1) buffer ^= 1;
      if (++block == p.blocks) {
        block = 0;
        tile += gridDim.x;
      }
    }
    copy_async_commit();
    if (p.blocks == 1) copy_async_commit();  // so that what is read next is never in the last group
  }

 private:
  __device__ __forceinline__ void copy(const uint4* source, int plane, int y, int x, int shift,
                                       uint4* to) const {
    const int lane = threadIdx.x % 32, phases = p.phases[0] * p.phases[1];
    int channel = min(plane, p.planes_per_group - 1), size = p.plane;
    if (phases > 1) {
      const int phase = channel % phases, phase_y = phase / p.phases[1];
      channel /= phases;
      y += phase_y * p.source[0].phase_step;
      x += phase % p.phases[1] * p.source[1].phase_step;
      if (phase_y > p.last_whole_phase) size -= p.tile_columns;
    }
    const uint4* from = source + int64_t(channel) * p.source_plane;
    auto copy_vector = [&](int i, int in_plane) {
      const int row = y + (in_plane >> 16) * p.source[0].step, column = x + (in_plane & 0xffff) * p.source[1].step;
      const bool inside = row >= 0 && row < p.source[0].limit && column >= 0 && column < p.source[1].limit;
      // Outside are zeros.
      copy_async16(to + i, from + (inside ? row * p.source_pitch + column : 0), inside, i < size);
    };
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      if (j * 32 < size) copy_vector(lane + j * 32, places[j]);
    }
    for (int first = kCopies * 32; first < size; first += 32) {
      copy_vector(lane + first, place_in_plane(lane + first + shift));
    }
  }
};

}  // namespace sparsekd::cuda
