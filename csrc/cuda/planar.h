// Between channels-last and planar order: what the host side hands to the kernel of planar.cuh.
#pragma once
#include <cstdint>

namespace sparsekd::cuda {

constexpr int kPlanarChannels = 32, kPlanarPixels = 224;  // of a tile, at most

struct PlanarParams {
  void* planar;  // [images][channels][pixels]
  void* last;    // [images][pixels][channels]
  bool to_last;
  int64_t images;
  int channels, pixels;
  int channel_tiles, pixel_tiles, tile_pixels;
};

}  // namespace sparsekd::cuda

extern "C" {
int sparsekd_planar(const sparsekd::cuda::PlanarParams* params, int element_size, void* stream);
}
