// Turns activations from channels-last to planar order or back, tile by tile through shared memory, both by whole
// sectors.
//
// The convolutions' kernels take and give planes: a lane owns positions, so that what it reads or writes of
// channels-last activations would be one element of a sector of 32 bytes.
#pragma once
#include "device.cuh"
#include "planar.h"

namespace sparsekd::cuda {

// T has the size of an element.
template <class T>
__global__ void planar_kernel(const PlanarParams p) {
  constexpr int kSector = 32 / sizeof(T);
  uint32_t* tile = shared_memory<uint32_t>();  // [kPlanarChannels][pitch]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int pixel0 = static_cast<int>(blockIdx.x % p.pixel_tiles) * p.tile_pixels;
  const int channel0 = static_cast<int>(blockIdx.x / p.pixel_tiles % p.channel_tiles) * kPlanarChannels;
  const int64_t image = blockIdx.x / p.pixel_tiles / p.channel_tiles;
  const int pixels = min(p.pixels - pixel0, p.tile_pixels), channels = min(p.channels - channel0, kPlanarChannels);
  const int64_t first = (image * p.channels + channel0) * p.pixels + pixel0;
  T* planar = static_cast<T*>(p.planar) + first;
  T* last = static_cast<T*>(p.last) + (image * p.pixels + pixel0) * p.channels + channel0;

  // Planes that a tile has whole are one run. What a warp takes at once begins where a sector does.
  const bool whole = p.pixel_tiles == 1;
  // Odd, so that what a warp takes of a column lies in different banks; of a run it does where planes have no gap
  // between.
  const int pitch = whole && pixels % 2 == 1 ? pixels : kPlanarPixels + 1;
  const int rows = whole ? 1 : channels, row_size = whole ? channels * pixels : pixels;
  auto each_of_planar = [&](auto take) {
    for (int row = whole ? 0 : warp; row < rows; row += warps) {
      const int64_t begin_at = int64_t(row) * p.pixels;
      const int begin = (whole ? warp * 32 : 0) - static_cast<int>((first + begin_at) % kSector);
      for (int base = begin; base < row_size; base += whole ? warps * 32 : 32) {
        const int i = base + lane, near = min(max(i, 0), row_size - 1);
        const int channel = whole ? near / pixels : row, pixel = whole ? near % pixels : near;
        take(planar + begin_at + near, tile + channel * pitch + pixel, i == near);
      }
    }
  };
  auto each_of_last = [&](auto take) {
    const int channel = min(lane, channels - 1);
    for (int q = warp; q < pixels; q += warps) {
      take(last + int64_t(q) * p.channels + channel, tile + channel * pitch + q, channel == lane);
    }
  };
  auto load = [](const T* element, uint32_t* word, bool there) { store_vector(word, uint32_t{*element}, there); };
  auto store = [](T* element, const uint32_t* word, bool there) {
    store_vector(element, static_cast<T>(*word), there);
  };
  if (p.to_last) {
    each_of_planar(load);
    __syncthreads();  // the tile
    each_of_last(store);
  } else {
    each_of_last(load);
    __syncthreads();  // the tile
    each_of_planar(store);
  }
}

}  // namespace sparsekd::cuda
