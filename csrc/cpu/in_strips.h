// Layers one after the other whose activations stay in strips (lanes.h) between them: results go from the registers to
// where the next layer reads them, and only what lies beside the strips is moved.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../geometry.h"
#include "../ordered_values.h"
#include "lanes.h"
#include "pattern.h"
#include "spmm.h"
#include "squeeze_excite.h"
#include "strips.h"

namespace sparsekd::cpu {

// How activations [N, C, H, W] lie: [unit of grid.images images][channel][position of a plane][lane], floats. A plane
// is a strip with so many positions more on each of its sides.
struct StripLayout {
  Grid grid;
  int64_t batch = 0;
  Pair image{0, 0}, halo{0, 0};

  int64_t units() const { return ceil_div(batch, grid.images); }
  Pair plane() const { return {grid.strip[0] + 2 * halo[0], grid.strip[1] + 2 * halo[1]}; }
  int64_t pitch() const;  // elements from one channel to the next
  int64_t middle() const { return at(0, 0); }
  // Elements before a position of the strip, or of what lies around it.
  int64_t at(int64_t y, int64_t x) const { return ((y + halo[0]) * plane()[1] + x + halo[1]) * grid.lanes; }
  bool flat() const { return halo == Pair{0, 0}; }
};

// A layer as far as it matters where its activations lie; those have places 0, 1, ... Without indices it is a squeeze-
// and-excitation, a max-pool, or with a kernel of one pixel a shortcut: every stride-th pixel of its input's channels,
// with others of zeros before and after them.
struct StripLayer {
  Conv2dShape shape;
  Activation activation = Activation::none;
  at::Tensor crow_indices, col_indices;
  int64_t vector = 1;
  int64_t zeros_before = 0;  // channels
  std::shared_ptr<const Excitation> excitation;
  int64_t input = -1, residual = -1, output = -1;  // places; a residual of -1 is none
  bool convolves() const { return crow_indices.defined(); }
  // The same layer without convolution groups: row k has columns of its own group's channels.
  StripLayer without_groups() const;
  // Channels of its results, with those that pad rows.
  int64_t made_channels() const { return ceil_div(shape.out_channels / shape.groups, vector) * vector * shape.groups; }
};

// How a layer gets its input: where strips lie (stride 1), from strips that are drawn apart, from those of another
// grid, or from images.
enum class StripSource { strips, apart, regrouped, images };

// What one step of a chain does for one unit of its images.
struct UnitCall {
  int64_t unit;
  const float* input;     // the unit's strips, or all strips of another grid, or all images
  int64_t input_unit;     // of strips: elements from one unit to the next
  const float* residual;  // null, or the unit's strips as those of the output
  float* output;          // as the input
  const float* values;    // a convolution's, in its order
  const float* init;      // null, or its shift by packed row
};

// Calls body(from, to) for channels of so many elements each, on as many threads as they pay for.
template <class Body>
void over_channels(int64_t channels, int64_t elements, Body body) {
  constexpr int64_t kGrain = 32768;  // elements that pay for another thread
  at::parallel_for(0, channels, std::max<int64_t>(kGrain / std::max<int64_t>(elements, 1), 1), body);
}

class UnitStep {
 public:
  virtual ~UnitStep() = default;
  virtual void run(const UnitCall& call) const = 0;
  // Whether the weights that it has itself are as they were.
  virtual bool fits() const { return true; }
};

std::unique_ptr<UnitStep> to_strips(const StripLayout& output, int64_t channels);
std::unique_ptr<UnitStep> from_strips(const StripLayout& input, int64_t channels);
// What is no convolution. The padding of the input is zero.
std::unique_ptr<UnitStep> other_strips(const StripLayer& layer, const StripLayout& input, const StripLayout& output);

// How the planes of a channel are made of strips of another grid.
class Regrouped {
 public:
  // `channels` are those of the input's units with what pads them.
  Regrouped(const Planes& planes, const Grid& grid, const StripLayout& input, int64_t channels);
  // Of a channel at `in`, where the output's first image lies, after so many lanes of a vector.
  void operator()(const float* in, int64_t lanes_before, float* out) const;

 private:
  const Grid grid_;
  // See MergedLanes.
  std::vector<int32_t> to_, ends_, lanes_, from_;
  std::vector<uint16_t> masks_;
};

// act(conv2d + shift + residual). `input` is not looked at if that comes from images; `input_channels` are those of its
// units with what pads them.
class ConvStrips : public UnitStep {
 public:
  ConvStrips(const StripLayer& layer, StripSource source, const Grid& grid, const StripLayout& input,
             int64_t input_channels, const StripLayout& output);

  // The entry of the pattern whose values are wanted at each place, [n_vectors].
  const at::Tensor& order() const { return order_; }
  bool generated() const { return code_ != nullptr; }
  // Whether these are this layer's.
  using UnitStep::fits;
  bool fits(const at::Tensor& values, const std::optional<at::Tensor>& shift) const;
  void run(const UnitCall& call) const override;

 private:
  ConvStrips(const StripLayer& layer, int64_t groups, StripSource source, const Grid& grid, const StripLayout& input,
             int64_t input_channels, const StripLayout& output);
  void pack(const UnitCall& call, const StripPacker<float>* packer, int64_t from, int64_t to, float* packed) const;
  void activate(float* plane) const;
  bool packs() const { return source_ != StripSource::strips && starts_apart_.empty(); }

  const Conv2dShape shape_;
  const at::Tensor crow_, col_;
  const Pattern pattern_;
  const int64_t merged_groups_;  // that are one here, whose rows read channels of their own each
  const Activation activation_;
  const StripSource source_;
  const Grid grid_;
  const StripLayout input_, output_;
  const Planes planes_;         // of what is packed
  int64_t pitch_, line_;        // of what is read: elements from one channel and one line to the next
  std::vector<int32_t> apart_;  // where the vectors of a packed channel lie in the input
  std::unique_ptr<const Regrouped> regrouped_;
  std::vector<std::vector<int32_t>> starts_apart_;  // by tile: where code reads them without
  std::unique_ptr<const GeneratedRows> code_;  // or, without it,
  at::Tensor starts_, offsets_;
  at::Tensor order_;
  std::vector<std::vector<int32_t>> places_;  // by tile: where its vectors go in a plane of the output
  std::vector<LaneMove> moves_;               // that give a plane its borders
  std::vector<int32_t> sources_;
};

}  // namespace sparsekd::cpu
