// Images on their way into strips (lanes.h).
#pragma once
#include <vector>

#include "borders.h"
#include "packing.h"

namespace sparsekd::cpu {

// Packs channels: out[c][phase][y][x][lane]. Those of an image in [C, H, W] go one of three ways:
//  - where the image is small, it is taken apart by permutations of the few vectors that it is (select);
//  - lines are transposed, where they lie, into the middle of the planes, which then lend each other their borders: a
//    halo is a strip's neighbour, one lane further (move_lanes);
//  - else, where pixels beyond the strips are read, it is padded first.
// With stride 2, the phases' pixels are first drawn apart.
template <class T>
class StripPacker {
 public:
  // `planes` are those of a strip, `whole` those of all of an image's strips together.
  StripPacker(const Batch<const T>& batch, const Planes& planes, const Planes& whole, const Grid& grid)
      : batch(batch), planes(planes), whole(whole), grid(grid), kernels(type_kernels<T>().lanes[grid.width]),
        pixels(batch.size[0] * batch.size[1]), borders(grid) {
    if (batch.last || !lends_borders()) return;
    small = kernels.select && grid.images == 1;
    for (const Part& part : parts) small &= part.size[0] * part.size[1] <= kSmallMap;
    for (size_t p = 0; p < parts.size(); ++p) small ? index_pixels(parts[p]) : place_middle(parts[p]);
  }

  // Channels begin .. end - 1 of the images from `first` on, `pitch` elements between channels.
  void pack(int64_t first, int64_t begin, int64_t end, int64_t pitch, T* out) const {
    if (batch.last) {
      pack_last(first, begin, end, pitch, out);
    } else if (parts.empty()) {
      pack_padded(first, begin, end, pitch, out);
    } else {
      pack_parts(first, begin, end, pitch, out);
    }
  }

 private:
  // The pixels of one phase: all of them, or those of every second line and column.
  struct Part {
    Pair size, first;  // how many there are; the source's pixel that is the first
    Pair shift;        // position (y, x) of the plane is pixel (y + shift, x + shift)
    int64_t place;     // where it is among what was drawn apart
    int64_t middle = 0;            // where the strip begins in its plane
    std::vector<LaneMove> moves;
    std::vector<int32_t> index;    // if the map is small: the pixel of each of the plane's elements
  };
  static constexpr int64_t kLargeMap = 4096;  // pixels
  static constexpr int64_t kLinesAhead = 2;
  static constexpr int64_t kSlack = 16 / sizeof(T);  // elements that a gather reads past a run's end

  const Pair& size() const { return planes.phases[0].size; }
  int64_t plane() const { return size()[0] * size()[1] * grid.lanes; }
  int64_t image_of(int64_t lane) const { return lane / (grid.down * grid.across); }
  int64_t down_of(int64_t lane) const { return lane / grid.across % grid.down; }
  int64_t across_of(int64_t lane) const { return lane % grid.across; }

  // Whether every pixel lies in a strip, and a plane holds all of its strip's. Then makes the parts.
  bool lends_borders() {
    step = planes.phases[0].step[0];
    if (step > 2 || plane() > std::numeric_limits<int32_t>::max()) return false;
    const Pair covered = grid.covered();
    int64_t place = 0;
    for (const Plane& plane : planes.phases) {
      Part part;
      if (plane.step != Pair{step, step}) return parts.clear(), false;
      for (int d = 0; d < 2; ++d) {
        part.shift[d] = floor_div(plane.origin[d], step);
        part.first[d] = plane.origin[d] - part.shift[d] * step;
        part.size[d] = ceil_div(batch.size[d] - part.first[d], step);
        const bool inside =
            part.size[d] <= covered[d] && part.shift[d] <= 0 && part.shift[d] + plane.size[d] >= grid.strip[d];
        if (!inside || part.size[d] < 1) return parts.clear(), false;
      }
      part.place = place;
      place += part.size[0] * part.size[1];
      parts.push_back(std::move(part));
    }
    drawn = place + 2 * grid.strip[1] + kSlack;
    return true;
  }

  void index_pixels(Part& part) {
    for (int64_t y = 0; y < size()[0]; ++y) {
      for (int64_t x = 0; x < size()[1]; ++x) {
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          const int64_t row = down_of(lane) * grid.strip[0] + y + part.shift[0];
          const int64_t column = across_of(lane) * grid.strip[1] + x + part.shift[1];
          const bool inside = row >= 0 && row < part.size[0] && column >= 0 && column < part.size[1];
          part.index.push_back(inside ? static_cast<int32_t>(row * part.size[1] + column) : -1);
        }
      }
    }
  }

  void place_middle(Part& part) {
    part.middle = (-part.shift[0] * size()[1] - part.shift[1]) * grid.lanes;
    part.moves = borders.moves(part.size, size(), part.shift, true);
  }

  // The end of a tensor, of which runs of `size` elements are read up to `need` elements past their ends.
  struct Tail {
    Tail(const Batch<const T>& batch, int64_t size, int64_t need)
        : need(need), past(batch.image(batch.count)), all(past - batch.data), length(std::min(size + need, all)) {}
    bool holds(const T* run) const { return past - run < length || length == all; }
    // The run, or its copy.
    const T* readable(const T* run) {
      if (!holds(run)) return run;
      if (copy.empty()) {
        copy.assign(past - length, past);
        copy.resize(length + need);
      }
      return copy.data() + length - (past - run);
    }

    int64_t need;
    const T* past;
    int64_t all, length;
    std::vector<T> copy;
  };

  // Where the runs of a part's lanes begin in channel c. `lower` are those of lines that the lowest strip doesn't have.
  struct Runs {
    std::vector<const T*> upper, lower;
    int64_t whole_lines;
  };

  void pack_parts(int64_t first, int64_t begin, int64_t end, int64_t pitch, T* out) const {
    const int64_t images = std::min(grid.images, batch.count - first);
    const Buffer<T> apart(step > 1 ? images * drawn : 0);
    const std::vector<T> zeros(small ? 0 : grid.strip[0] * batch.size[1] + grid.strip[1] + kSlack, T(0));
    // Where a gather would read past the tensor's end it reads a copy of that.
    const int64_t need = grid.strip[1] + kSlack;
    Tail tail(batch, pixels, need);
    auto image_at = [&](int64_t i, int64_t c, const Part& part) -> const T* {
      if (step > 1) return apart.get() + i * drawn + part.place;
      const T* const image = batch.image(first + i) + c * pixels;
      return small ? image : tail.readable(image);
    };
    const bool large = step == 1 && pixels > kLargeMap;
    std::vector<Runs> runs(small ? 0 : parts.size());
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0; step > 1 && i < images; ++i)
        draw_apart(batch.image(first + i) + c * pixels, apart.get() + i * drawn);
      // Channels lie far apart from each other's lines, so that nothing foresees where the next one's are; in large
      // ones neither where a strip's next line is.
      for (int64_t i = 0; !large && c + 1 < end && i < images; ++i) {
        fetch_line(batch.image(first + i) + (c + 1) * pixels, pixels);
      }
      T* to = out + c * pitch;
      for (size_t p = 0; p < parts.size(); ++p, to += plane()) {
        const Part& part = parts[p];
        if (small) {
          kernels.select(image_at(0, c, part), part.size[0] * part.size[1], part.index.data(), plane(), to);
          continue;
        }
        if (c == begin || (step == 1 && tail.holds(batch.image(first + images - 1) + c * pixels))) {
          runs[p] = runs_of(part, images, [&](int64_t i) { return image_at(i, c, part); }, zeros.data());
        } else if (step == 1) {
          for (auto* lanes : {&runs[p].upper, &runs[p].lower}) {
            for (const T*& at : *lanes) at += at == zeros.data() ? 0 : pixels;
          }
        }
        for (int64_t y = 0; y < grid.strip[0]; ++y) {
          for (int64_t lane = 0; large && y + kLinesAhead < runs[p].whole_lines && lane < grid.lanes; ++lane) {
            fetch_line(runs[p].upper[lane] + (y + kLinesAhead) * part.size[1], grid.strip[1]);
          }
          kernels.gather_lanes((y < runs[p].whole_lines ? runs[p].upper : runs[p].lower).data(), y * part.size[1],
                               grid.strip[1], to + part.middle + y * size()[1] * grid.lanes, grid.lanes);
        }
        kernels.move_lanes(to, part.moves.data(), static_cast<int64_t>(part.moves.size()), borders.sources().data());
      }
    }
  }

  template <class ImageAt>
  Runs runs_of(const Part& part, int64_t images, ImageAt image_at, const T* zeros) const {
    Runs runs{std::vector<const T*>(grid.lanes, zeros), std::vector<const T*>(grid.lanes, zeros), grid.strip[0]};
    const int64_t lowest = part.size[0] / grid.strip[0], own = part.size[0] % grid.strip[0];
    if (own > 0) runs.whole_lines = own;
    for (int64_t i = 0; i < images; ++i) {
      const T* const image = image_at(i);
      for (int64_t lane = i * grid.down * grid.across; lane < (i + 1) * grid.down * grid.across; ++lane) {
        const int64_t y = down_of(lane) * grid.strip[0], x = across_of(lane) * grid.strip[1];
        if (y >= part.size[0] || x >= part.size[1]) continue;
        runs.upper[lane] = image + y * part.size[1] + x;
        if (down_of(lane) != lowest) runs.lower[lane] = runs.upper[lane];
      }
    }
    return runs;
  }

  // Sorts an image's pixels by the evenness of their lines and columns.
  void draw_apart(const T* image, T* out) const {
    T* to[2][2] = {{nullptr, nullptr}, {nullptr, nullptr}};
    for (const Part& part : parts) to[part.first[0]][part.first[1]] = out + part.place;
    const int64_t width = batch.size[1], counts[2] = {ceil_div(width, 2), width / 2};
    for (int64_t y = 0; y < batch.size[0]; ++y) {
      T*(&line)[2] = to[y % 2];
      type_kernels<T>().split(image + y * width, width, line[0], line[1]);
      for (int x = 0; x < 2; ++x) {
        if (line[x]) line[x] += counts[x];
      }
    }
  }

  void pack_padded(int64_t first, int64_t begin, int64_t end, int64_t pitch, T* out) const {
    const Layout layout = plain_layout(whole);
    const PlaneCopy<T> copy(batch.size, whole, layout, 0);
    const int64_t image = layout.channel(), line = layout.pitch;
    Buffer<T> padded(grid.images * image + 16 / sizeof(T));
    std::vector<const T*> from(grid.lanes);
    for (int64_t i = std::max<int64_t>(batch.count - first, 0); i < grid.images; ++i) {
      std::fill(padded.get() + i * image, padded.get() + (i + 1) * image, T(0));
    }
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0; i < std::min(grid.images, batch.count - first); ++i) {
        copy(batch.image(first + i) + c * pixels, c + 1 < end, padded.get() + i * image);
      }
      T* to = out + c * pitch;
      for (size_t p = 0; p < planes.phases.size(); ++p) {
        for (int64_t lane = 0; lane < grid.lanes; ++lane) {
          from[lane] = padded.get() + image_of(lane) * image + p * layout.plane + down_of(lane) * grid.strip[0] * line +
                       across_of(lane) * grid.strip[1];
        }
        for (int64_t y = 0; y < size()[0]; ++y, to += size()[1] * grid.lanes) {
          kernels.gather_lanes(from.data(), y * line, size()[1], to, grid.lanes);
        }
      }
    }
  }

  void pack_last(int64_t first, int64_t begin, int64_t end, int64_t pitch, T* out) const {
    const std::vector<T> zeros(batch.channels + kSlack, T(0));
    std::vector<const T*> from(grid.lanes);
    Tail tail(batch, batch.channels, kSlack);  // a pixel's channels are a run
    for (size_t p = 0; p < planes.phases.size(); ++p) {
      const Plane& plane = planes.phases[p];
      for (int64_t y = 0; y < size()[0]; ++y) {
        for (int64_t x = 0; x < size()[1]; ++x) {
          for (int64_t lane = 0; lane < grid.lanes; ++lane) {
            const int64_t n = first + image_of(lane);
            const int64_t row = (down_of(lane) * grid.strip[0] + y) * plane.step[0] + plane.origin[0];
            const int64_t column = (across_of(lane) * grid.strip[1] + x) * plane.step[1] + plane.origin[1];
            const bool inside =
                n < batch.count && row >= 0 && row < batch.size[0] && column >= 0 && column < batch.size[1];
            from[lane] = zeros.data();
            if (inside) from[lane] = tail.readable(batch.image(n) + (row * batch.size[1] + column) * batch.channels);
          }
          kernels.gather_lanes(from.data(), begin, end - begin,
                               out + begin * pitch + ((p * size()[0] + y) * size()[1] + x) * grid.lanes, pitch);
        }
      }
    }
  }

  const Batch<const T>& batch;
  const Planes &planes, &whole;
  const Grid& grid;
  const LaneKernels<T>& kernels;
  int64_t pixels;
  bool small = false;
  int64_t step = 1, drawn = 0;        // of an image that was drawn apart: its elements
  std::vector<Part> parts;            // by phase; none if it is to be padded
  Borders<T> borders;
};

}  // namespace sparsekd::cpu
