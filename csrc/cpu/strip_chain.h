// Layers that follow each other in strips, one unit of images after the other: what a unit's layer writes is still in
// the caches when the next one reads it.
#pragma once
#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "in_strips.h"
#include "strip_plan.h"

namespace sparsekd::cpu {

// An activation as it lies: one way, or both.
struct Lying {
  at::Tensor images, strips;
};

class StripChain {
 public:
  struct Weights {
    at::Tensor values;
    std::optional<at::Tensor> shift;
  };

  // The layers are those of the region's members `first` .. `last` - 1. By place: whether somebody reads its images, or
  // its strips after this chain. `measures`: where there are two ways to run a layer, the first runs tell which stays.
  StripChain(const std::vector<StripLayer>& layers, const std::vector<Weights>& weights, const StripRegion& region,
             size_t first, size_t last, const std::vector<bool>& images_wanted, const std::vector<bool>& strips_wanted,
             bool measures);

  // All layers on activations by place, to which their results are added. False, and nothing is done, if one is not
  // what the chain was made for.
  bool run(std::vector<Lying>& lying) const;

 private:
  struct Way {
    std::unique_ptr<UnitStep> step;
    const ConvStrips* conv = nullptr;  // `step`, if it is one
    std::unique_ptr<OrderedValues> ordered;
  };
  // Where a place's activations lie: in its images, in strips that outlive a unit, or in the unit's memory.
  struct Where {
    int64_t place = -1;  // -1: nowhere
    bool images = false, outlives = false;
    int64_t offset = 0, size = 0;  // elements in a unit's memory, and of a unit's strips
  };
  struct Op {
    std::shared_ptr<Way> way, other;  // the one that is taken, and one that it is still to be compared with
    int64_t least[2] = {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max()};  // ns, of both
    Weights weights;
    int64_t input = -1, residual = -1, output = -1;  // places
    bool from_images = false, regroups = false, to_images = false;
    int64_t made = 0;  // channels, with those that pad rows
    Where reads, adds, writes;
  };
  struct Strips {  // of a place
    StripLayout layout;
    int64_t channels;            // with those that pad rows
    bool outlives;               // the chain, or a unit of it
    size_t first = 0, last = 0;  // ops that touch it
    int64_t offset = 0;          // in a unit's memory, if it does not
    int64_t size() const { return channels * layout.pitch(); }
  };
  struct Built;  // what is known while a chain is made

  static std::shared_ptr<Way> way_of(std::unique_ptr<UnitStep> step);
  void want_strips(Built& built, int64_t place, int64_t channels);
  void add(Op op);
  void share_memory();
  Where where(int64_t place, bool images) const;

  // As long as ways are compared: those of a run, and whether they are the others; then what they took, in ns.
  std::pair<std::vector<std::shared_ptr<Way>>, bool> next_ways() const;
  void compare_ways(bool others, const std::vector<std::atomic<int64_t>>& took) const;

  int64_t units_ = 0, memory_ = 0;  // elements that a unit needs
  mutable std::atomic<bool> settled_{true};  // whether the ways in `ops_` change no more; until then they have a
  mutable std::mutex mutex_;                 // lock, and so have:
  mutable int64_t trials_ = 0;               // runs that are still to be timed, in turns
  mutable std::vector<Op> ops_;
  std::map<int64_t, Strips> strips_;                      // by place
  std::map<int64_t, std::array<int64_t, 4>> given_, made_;  // sizes of images, by place
};

}  // namespace sparsekd::cpu
