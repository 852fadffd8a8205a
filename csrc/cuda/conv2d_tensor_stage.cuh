// How activations come to the convolution on tensor cores (conv2d_tensor.cuh): images are turned to lanes of 16 bits,
// and a block of threads copies planes of its tiles to shared memory.
#pragma once
#include "conv2d.cuh"
#include "conv2d_tensor.h"

namespace sparsekd::cuda {

struct Divided {
  int quotient, rest;
};
__device__ __forceinline__ Divided divided(int number, const Divisor& d) {  // not below 0
  const int quotient = static_cast<int>(d.quotient(static_cast<uint32_t>(number)));
  return {quotient, number - quotient * d.by};
}

__global__ void to_lanes16_kernel(const ToLanes16Params p) {
  const Lanes& lanes = p.lanes;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.threads) return;
  int place, channel;
  if (p.channels_last) {  // of 16 channels each, which are a sector to read, two places, which are one to write
    const Divided pair = divided(index / 32, p.channel_blocks);
    channel = pair.rest * 16 + index / 2 % 16;
    if (channel >= lanes.channels) return;
    place = pair.quotient * 2 + index % 2;
  } else {
    const Divided plane = divided(index, p.plane);
    channel = plane.quotient;
    place = plane.rest;
  }
  const Divided column = divided(place, p.columns), phase_x = divided(column.quotient, p.phases_x);
  const Divided row = divided(phase_x.quotient, p.rows);
  const int x = column.rest * p.axes[1].stride + phase_x.rest + p.axes[1].origin;
  const int y = row.rest * p.axes[0].stride + row.quotient + p.axes[0].origin;  // of the first strip
  const bool in_row = x >= 0 && x < p.axes[1].size;
  const auto* source = static_cast<const uint16_t*>(p.source) + channel * p.stride_c + x * p.stride_w;
  for (int unit = blockIdx.y; unit < lanes.units; unit += gridDim.y) {
    uint32_t words[kLanes / 2];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t slot = int64_t(unit) * kLanes + lane;
      const int64_t image = lanes.strips == 1 ? slot : static_cast<int>(slot) / lanes.strips;  // strips: few images
      const int own_y = y + static_cast<int>(slot - image * lanes.strips) * lanes.strip_rows * p.axes[0].stride;
      const bool inside = in_row && image < lanes.batch && own_y >= 0 && own_y < p.axes[0].size;
      const uint32_t bits = inside ? source[image * p.stride_n + own_y * p.stride_h] : 0;
      words[lane / 2] = lane % 2 ? words[lane / 2] | bits << 16 : bits;
    }
    const int64_t to = (int64_t(unit) * lanes.channels + channel) * lanes.plane + place;
    store_vector(static_cast<uint4*>(p.to) + to, uint4{words[0], words[1], words[2], words[3]});
  }
}

// A thread takes a vector of each unit in turn, whose values are neighbours' neighbours in eight images.
__global__ void from_lanes16_kernel(const FromLanes16Params p) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.channels * p.of_plane.by) return;
  const Divided plane = divided(index, p.of_plane), row = divided(plane.rest, p.of_row);
  const int channel = plane.quotient, y = row.quotient, x = row.rest;
  const auto* from = static_cast<const uint4*>(p.lanes) + int64_t(channel) * p.plane + y * p.row_pitch + x;
  auto* to = static_cast<uint16_t*>(p.to) + channel * p.out_c + y * p.out_h + x * p.out_w;
  for (int unit = blockIdx.y; unit < p.units; unit += gridDim.y) {
    const uint4 four = load_vector(from + int64_t(unit) * p.channels * p.plane);
    const uint32_t words[] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t slot = int64_t(unit) * kLanes + lane;
      const int64_t image = p.strips == 1 ? slot : static_cast<int>(slot) / p.strips;
      const int first_row = static_cast<int>(slot - image * p.strips) * p.strip_rows;
      store_vector(to + image * p.out_n + first_row * p.out_h,
                   static_cast<uint16_t>(words[lane / 2] >> 16 * (lane % 2)),
                   image < p.batch && first_row + y < p.rows);
    }
  }
}

// Where a tile begins: row y, and in it `shift` places behind column x, where a stretch does.
struct TilePlace {
  int64_t unit;
  int y, x, shift;
};
__device__ __forceinline__ TilePlace place_of(const TensorConv2dParams& p, int tile) {
  const Divided unit = divided(tile, p.tiles_of_unit), stretch = divided(unit.rest, p.stretches);
  const Divided row = divided(stretch.quotient * p.places, p.row_places);
  return {unit.quotient, row.quotient, stretch.rest * p.tile_w, row.rest};
}

// Where a lane copies vectors of a plane from, for a tile.
struct PlacesOfTile {
  static constexpr int kCopies = 4;  // whose places are found once
  const TensorConv2dParams& p;
  const uint4* source;  // of the unit and group
  int y, x, shift;      // where the tile begins in a channel, and in its row
  // Of every 32nd vector, row and column; or, of planes that are all alike, where it lies in the source, or -1.
  int places[kCopies];

  __device__ __forceinline__ PlacesOfTile(const TensorConv2dParams& p, int tile) : p(p) {
    const TilePlace place = place_of(p, tile);
    const int64_t first_channel = place.unit * p.source_channels + blockIdx.y / p.row_blocks * p.channels_per_group;
    source = static_cast<const uint4*>(p.input) + first_channel * p.source_plane;
    y = place.y * p.source[0].step + p.source[0].origin;
    x = place.x * p.source[1].step + p.source[1].origin;
    shift = place.shift;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      places[j] = place_in_plane(threadIdx.x % 32 + j * 32 + shift);
      if (p.phases[0] * p.phases[1] == 1) places[j] = in_source(places[j], y, x);
    }
  }

  // Of a vector of a plane: its row in the upper half, its column in the lower. In tiles that begin in a row, planes do
  // so, too.
  __device__ __forceinline__ int place_in_plane(int i) const {
    const Divided row = divided(i, p.tile_columns);
    return row.quotient << 16 | row.rest;
  }

  // Of a row and column of a plane that begins there, the vector of the source, or -1: outside, where zeros are.
  __device__ __forceinline__ int in_source(int in_plane, int first_y, int first_x) const {
    const int row = first_y + (in_plane >> 16) * p.source[0].step;
    const int column = first_x + (in_plane & 0xffff) * p.source[1].step;
    const bool inside = row >= 0 && row < p.source[0].limit && column >= 0 && column < p.source[1].limit;
    return inside ? row * p.source_pitch + column : -1;
  }

  __device__ __forceinline__ void copy(int plane, uint4* to) const {
    const int lane = threadIdx.x % 32, phases = p.phases[0] * p.phases[1];
    int channel = min(plane, p.planes_per_group - 1), size = p.plane, first_y = y, first_x = x;
    if (phases > 1) {
      const int phase = channel % phases, phase_y = phase / p.phases[1];
      channel /= phases;
      first_y += phase_y * p.source[0].phase_step;
      first_x += phase % p.phases[1] * p.source[1].phase_step;
      if (phase_y > p.last_whole_phase) size -= p.tile_columns.by;
    }
    const uint4* from = source + int64_t(channel) * p.source_plane;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      if (j * 32 >= size) break;
      const int at = phases > 1 ? in_source(places[j], first_y, first_x) : places[j];
      copy_async16(to + lane + j * 32, from + max(at, 0), at >= 0, lane + j * 32 < size);
    }
    for (int i = kCopies * 32 + lane; i - lane < size; i += 32) {
      const int at = in_source(place_in_plane(i + shift), first_y, first_x);
      copy_async16(to + i, from + max(at, 0), at >= 0, i < size);
    }
  }
};

// Copies one block of planes after the other, of one tile after the other that a block of threads computes, each to the
// buffer that was read last: there are two, or one where it takes all planes. It remembers little, as all registers are
// wanted meanwhile.
struct Stager {
  const TensorConv2dParams& p;
  uint4* buffers;
  int tile, block = 0, buffer = 0;

  __device__ __forceinline__ Stager(const TensorConv2dParams& p, uint4* buffers)
      : p(p), buffers(buffers + p.zeros), tile(blockIdx.x) {}

  // A warp copies every so many fours of planes.
  __device__ __forceinline__ void next() {
    if (tile < p.tiles) {
      const PlacesOfTile places(p, tile);
      const auto* plane_at = reinterpret_cast<const uint4*>(p.plan.plane_at) +
                             (int64_t(blockIdx.y) * p.blocks + block) * p.block_fours;
      for (int i = threadIdx.x / 32; i < p.block_fours; i += blockDim.x / 32) {
        const uint4 four = load_vector(plane_at + i);
        uint4* to = buffers + buffer * p.buffer + i * 4 * p.pitch;
#pragma unroll 1
        for (int q = 0; q < 4; ++q) {
          const int plane = static_cast<int>(q == 0 ? four.x : q == 1 ? four.y : q == 2 ? four.z : four.w);
          if (plane >= 0 && i * 4 + q < p.block_planes) places.copy(plane, to + q * p.pitch);
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
};

}  // namespace sparsekd::cuda
