// Results of a tile of runs (lanes.h) on their way to where they belong.
#pragma once
#include <vector>

#include "packing.h"
#include "spmm.h"

namespace sparsekd::cpu {

// Stores `count` pixels of some rows, from `pixel` on, in an image without gaps that is channels_last.
template <class T>
void store_pixels(const Rows<T>& rows, const T* from, int64_t pitch, const int64_t* row_of, int64_t made,
                  const Batch<T>& result, int64_t n, int64_t pixel, int64_t count) {
  T* image = result.image(n);
  if (rows.in_order) {
    while (made > 0 && row_of[made - 1] < 0) --made;  // padding ends a convolution group
    T* out = image + pixel * result.channels + row_of[0];
    return type_kernels<T>().transpose(from, made, count, pitch, out, result.channels);
  }
  for (int64_t r = 0; r < made; ++r, from += pitch) {
    if (row_of[r] < 0) continue;
    for (int64_t i = 0; i < count; ++i) image[(pixel + i) * result.channels + row_of[r]] = from[i];
  }
}

// The epilogue of pixels that are stored.
template <class T>
void finish_rows(const Rows<T>& rows, const int64_t* row_of, int64_t made, const Epilogue<T>& epilogue,
                 const Batch<T>& result, int64_t n, int64_t pixel, int64_t count) {
  if (result.last && rows.in_order) {
    while (made > 0 && row_of[made - 1] < 0) --made;
    if (made == 0) return;
    T* out = result.image(n) + pixel * result.channels + row_of[0];
    for (int64_t i = 0; i < count; ++i) epilogue.of_pixel(result, out + i * result.channels, row_of[0], made);
    return;
  }
  const int64_t plane = result.size[0] * result.size[1];
  for (int64_t r = 0; r < made; ++r) {
    const int64_t row = row_of[r];
    if (row < 0) continue;
    if (!result.last) {
      T* out = result.image(n) + row * plane + pixel;
      epilogue.of_channel(result, out, out, row, count);
    } else {
      T* out = result.image(n) + pixel * result.channels + row;
      for (int64_t i = 0; i < count; ++i) epilogue.of_pixel(result, out + i * result.channels, row, 1);
    }
  }
}

template <class T>
class RunStore {
 public:
  RunStore(const Rows<T>& rows, const Batch<T>& result, const Epilogue<T>& epilogue, int64_t step,
           const LaneKernels<T>& kernels)
      : rows(rows), result(result), epilogue(epilogue), step(step), kernels(kernels) {}

  // The pixels of the next tile, which replace those of the last: `count` elements from `source` in the tile on become
  // every `step`-th pixel of image n from `pixel` on.
  void clear() { runs.clear(); }
  void add(int64_t source, int64_t n, int64_t pixel, int64_t count) { runs.push_back({source, n, pixel, count}); }
  bool empty() const { return runs.empty(); }

  // Where row groups begin .. end - 1 of the tile go: straight to the result if each of its vectors lies in one run.
  // What one of them has beyond its run spills over the pixels that follow, if `spills`, for those are stored later;
  // but it stays before pixel `limit`, where another thread's may begin.
  void aim(SpmmTile<T>& tile, T* scratch, int64_t begin, int64_t end, int64_t lanes, int64_t limit, bool spills) {
    const int64_t* row_of = rows.row_of + begin * rows.vector;
    const int64_t vectors = int64_t{tile.lines} * tile.width;
    tile.output = scratch;
    tile.output_pitch = vectors * lanes;
    tile.places = nullptr;
    const bool plain = !result.last && step == 1 && rows.in_order;
    direct = plain && row_of[(end - begin) * rows.vector - 1] >= 0 && place(vectors, lanes, limit, spills);
    squeezed = !direct && plain && kernels.squeeze && place_kept(vectors, lanes);
    if (!direct) return;
    const T* base = result.image(runs[0].n) + row_of[0] * result.size[0] * result.size[1];
    tile.output = const_cast<T*>(base);
    tile.output_pitch = result.size[0] * result.size[1];
    tile.places = places.data();
    tile.tail = tail;
    if (epilogue.clamps()) epilogue.clamp(tile, result.data, base);
  }

  // After the tile: what is not where it belongs yet, and not finished.
  void store(const SpmmTile<T>& tile, int64_t begin, int64_t end) const {
    const int64_t* row_of = rows.row_of + begin * rows.vector;
    const int64_t made = (end - begin) * rows.vector, plane = result.size[0] * result.size[1];
    if (squeezed) squeeze(tile, row_of, made);
    if (direct || squeezed || result.last) {
      if (!result.last && (epilogue.clamps() || !epilogue.any())) return;
      for (const Run& run : runs) {
        if (result.last) {
          store_pixels(rows, tile.output + run.source, tile.output_pitch, row_of, made, result, run.n, run.pixel,
                       run.count);
        }
        if (epilogue.any()) finish_rows(rows, row_of, made, epilogue, result, run.n, run.pixel, run.count);
      }
      return;
    }
    const T* from = tile.output;
    for (int64_t r = 0; r < made; ++r, from += tile.output_pitch) {
      if (row_of[r] < 0) continue;
      for (const Run& run : runs) {
        T* out = result.image(run.n) + row_of[r] * plane + run.pixel;
        if (step != 1) {
          store_apart(from + run.source, run.count, step, out);
        } else if (epilogue.any()) {
          epilogue.of_channel(result, from + run.source, out, row_of[r], run.count);
        } else {
          type_kernels<T>().copy_lines({from + run.source, 0, out, 0, 1, run.count, 1, 0, run.count, 0});
        }
      }
    }
  }

 private:
  struct Run {
    int64_t source, n, pixel, count;
  };

  void squeeze(const SpmmTile<T>& tile, const int64_t* row_of, int64_t made) const {
    while (made > 0 && row_of[made - 1] < 0) --made;  // padding ends a convolution group
    if (made == 0) return;
    SqueezedRows<T> to{};
    to.from = tile.output;
    to.from_pitch = tile.output_pitch;
    to.out = result.image(runs[0].n) + row_of[0] * result.size[0] * result.size[1];
    to.out_pitch = result.size[0] * result.size[1];
    to.rows = made;
    to.positions = static_cast<int>(kept.size());
    to.places = places.data();
    to.kept = kept.data();
    if (epilogue.clamps()) epilogue.clamp(to, result.data, to.out);
    kernels.squeeze(to);
  }

  // Which lanes of each vector lie in runs, if what is kept of each follows on in the result.
  bool place_kept(int64_t vectors, int64_t lanes) {
    places.assign(vectors, 0);
    kept.assign(vectors, 0);
    for (size_t i = 0; i < runs.size(); ++i) {
      const Run& run = runs[i];
      if (run.n != runs[0].n) return false;
      for (int64_t at = run.source, end = run.source + run.count; at < end;) {
        const int64_t vector = at / lanes, lane = at % lanes, count = std::min(end - at, lanes - lane);
        const int64_t pixel = run.pixel + at - run.source, before = __builtin_popcount(kept[vector]);
        if (before == 0) places[vector] = static_cast<int32_t>(pixel);
        if (pixel != places[vector] + before) return false;
        kept[vector] |= ((1u << count) - 1) << lane;
        at += count;
      }
    }
    return true;
  }

  bool place(int64_t vectors, int64_t lanes, int64_t limit, bool spills) {
    places.clear();
    size_t at = 0;
    for (int64_t source = 0; source < vectors * lanes; source += lanes) {
      while (at < runs.size() && source >= runs[at].source + runs[at].count) ++at;
      if (at == runs.size() || source < runs[at].source || runs[at].n != runs[0].n) return false;
      const int64_t own = std::min(runs[at].source + runs[at].count - source, lanes);
      if (at + 1 < runs.size() && own < lanes && runs[at + 1].source < source + lanes) return false;
      const bool last = source + lanes == vectors * lanes;
      const int64_t pixel = runs[at].pixel + source - runs[at].source;
      const bool whole = own == lanes || (spills && pixel + lanes <= limit);
      if (!whole && !last) return false;
      tail = whole ? 0 : static_cast<int>(own);
      places.push_back(static_cast<int32_t>(pixel));
    }
    return true;
  }

  const Rows<T>& rows;
  const Batch<T>& result;
  const Epilogue<T>& epilogue;
  int64_t step;
  const LaneKernels<T>& kernels;
  std::vector<Run> runs;
  std::vector<int32_t> places;
  std::vector<uint32_t> kept;
  int tail = 0;
  bool direct = false, squeezed = false;
};

}  // namespace sparsekd::cpu
