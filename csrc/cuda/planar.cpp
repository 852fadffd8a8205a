// See planar_host.h.
#include "planar_host.h"

#include <limits>

#include "../geometry.h"
#include "planar.h"

namespace sparsekd::cuda {
namespace {

constexpr int64_t kLeast = 8;  // channels and pixels: of fewer a sector holds elements enough that are needed

void turn(Call& call, const at::Tensor& planar, const at::Tensor& last, bool to_last) {
  const int64_t limit = std::numeric_limits<int32_t>::max(), pixels = planar.size(2) * planar.size(3);
  PlanarParams p{};
  p.planar = const_cast<void*>(planar.const_data_ptr());
  p.last = const_cast<void*>(last.const_data_ptr());
  p.to_last = to_last;
  p.images = planar.size(0);
  p.channel_tiles = int(ceil_div(planar.size(1), int64_t(kPlanarChannels)));
  // Nearly even parts.
  const int64_t tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, int64_t(kPlanarPixels))), int64_t(16)) * 16;
  p.tile_pixels = int(tile_pixels);
  p.pixel_tiles = int(ceil_div(pixels, tile_pixels));
  TORCH_CHECK_VALUE(pixels <= limit && planar.size(1) <= limit && p.images * p.channel_tiles * p.pixel_tiles <= limit,
                    "Expected fewer than 2^31 channels, pixels and tiles of 32 channels and 224 pixels, got shape ",
                    planar.sizes());
  p.channels = int(planar.size(1));
  p.pixels = int(pixels);
  call.launched(sparsekd_planar(&p, int(planar.element_size()), call.stream()));
}

}  // namespace

bool is_channels_last(const at::Tensor& t) {
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  return channels >= kLeast && height * width >= kLeast && t.stride(1) == 1 &&
         (width == 1 || t.stride(3) == channels) && (height == 1 || t.stride(2) == width * channels) &&
         (t.size(0) == 1 || t.stride(0) == height * width * channels);
}

at::Tensor planar(Call& call, const at::Tensor& t) {
  if (!is_channels_last(t)) return t;
  const at::Tensor made = at::empty(t.sizes(), t.options().memory_format(at::MemoryFormat::Contiguous));
  call.writes(made, "planar activations");
  turn(call, made, t, false);
  return made;
}

void to_channels_last(Call& call, const at::Tensor& planar, const at::Tensor& to) { turn(call, planar, to, true); }

}  // namespace sparsekd::cuda
