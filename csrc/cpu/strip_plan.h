// Which layers of a sequence keep their activations in strips.
#pragma once
#include <optional>
#include <vector>

#include "in_strips.h"

namespace sparsekd::cpu {

// Layers in the strips of one grid.
struct StripRegion {
  struct Member {
    size_t layer;  // of those that were planned for
    StripSource source;
    Grid grid;  // of a convolution
    // Another way to the same results, to the last bit: by rows' code or without it, as it is not in `grid`. Which one
    // is faster is for a measurement to say.
    std::optional<Grid> other = std::nullopt;
    // Where a regrouped input lies in another region, and the channels of its units.
    std::optional<StripLayout> from = std::nullopt;
    int64_t from_channels = 0;
  };
  std::vector<Member> members;                      // in the order of the layers
  std::vector<std::optional<StripLayout>> layouts;  // by place: of all that lies in strips
  std::vector<int64_t> channels;                    // by place: of these, with what pads rows
};

// What is faster in strips by the costs of lanes.h. `elsewhere`: by place, whether it is read by others than these
// layers. Sums are made in the order in which a layer by itself makes them, so that results are the same to the last
// bit. `always`: also where it is slower.
std::vector<StripRegion> plan_strips(const std::vector<StripLayer>& layers, const std::vector<bool>& elsewhere,
                                     bool always);

}  // namespace sparsekd::cpu
