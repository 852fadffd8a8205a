// Turns activations from channels-last to planar order or back, tile by tile through shared memory, both by whole sectors.
//
// The convolutions' kernels take and give planes: a lane owns positions, so that what it reads or writes of channels-last
// activations would be one element of a sector of 32 bytes.
#pragma once
#include "device.cuh"
#include "planar.h"

namespace sparsekd::cuda {

// T has the size of an element.
template <class T>
__global__ void planar_kernel(const PlanarParams p) {
  constexpr int kPitch = kPlanarPixels + 1;  // so that neither rows nor columns meet in a bank
  constexpr int kSector = 32 / sizeof(T);
  uint32_t* tile = shared_memory<uint32_t>();  // [kPlanarChannels][kPitch]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int pixel0 = static_cast<int>(blockIdx.x % p.pixel_tiles) * kPlanarPixels;
  const int channel0 = static_cast<int>(blockIdx.x / p.pixel_tiles % p.channel_tiles) * kPlanarChannels;
  const int64_t image = blockIdx.x / p.pixel_tiles / p.channel_tiles;
  const int pixels = min(p.pixels - pixel0, kPlanarPixels), channels = min(p.channels - channel0, kPlanarChannels);
  T* planar = static_cast<T*>(p.planar) + (image * p.channels + channel0) * p.pixels + pixel0;
  T* last = static_cast<T*>(p.last) + (image * p.pixels + pixel0) * p.channels + channel0;

  auto each_of_planar = [&](auto take) {
    for (int c = warp; c < channels; c += warps) {
      T* row = planar + int64_t(c) * p.pixels;
      // What the warp takes at once begins where a sector does.
      const int64_t at = row - static_cast<T*>(p.planar);
      for (int begin = -static_cast<int>(at % kSector); begin < pixels; begin += 32) {
        const int i = begin + lane;
        if (i >= 0 && i < pixels) take(row + i, tile + c * kPitch + i);
      }
    }
  };
  auto each_of_last = [&](auto take) {
    for (int q = warp; q < pixels; q += warps) {
      if (lane < channels) take(last + int64_t(q) * p.channels + lane, tile + lane * kPitch + q);
    }
  };
  auto load = [](T* element, uint32_t* word) { *word = *element; };
  auto store = [](T* element, uint32_t* word) { *element = static_cast<T>(*word); };
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
