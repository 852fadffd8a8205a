#include "generated.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <utility>

#include "assembler.h"
#include "fetched.h"
#include "scratch.h"

namespace sparsekd::cpu {
namespace {

constexpr int64_t kVector = kGeneratedLanes * sizeof(float);  // bytes

// What code is called with, besides its input and the values.
struct Call {
  const void* body;  // where the beginning goes on,
  const void* end;   // and the body
  const float* from;
  float* to;
  const float* residual;
  int64_t from_pitch, to_pitch;  // bytes from one row to the next; of the residual as of what is stored
  const uint16_t* masks;
  float low, high;
};
using Begin = void (*)(const float* input, const float* values, const Call* call);

// The arguments' registers by the System V ABI, and others that are the caller's to save.
constexpr Register kInput = Register::rdi, kValues = Register::rsi, kCall = Register::rdx, kMasks = Register::rcx;
constexpr Register kRow = Register::r8, kPitch = Register::r9, kResidual = Register::r10;
constexpr int kPixels = 31;  // vectors
constexpr int kLowest = 31, kHighest = 30;

// Bytes before their register that values are reached at with a displacement of one byte, and one more than after it.
constexpr int32_t kReach = 128 * sizeof(float);

// Bytes from what is stored to what will be soon: rows are too many for the processor to see where each goes on.
constexpr int8_t kNextLine = 64;

// The pixels of columns, read from a base that moves on where that pays.
class Pixels {
 public:
  Pixels(Assembler& assembler, int64_t pitch) : assembler_(assembler), moves_(pitch <= 64 * kVector) {}
  void load(int32_t at, int mask) {
    constexpr int32_t kStep = kVector;
    const int32_t distance = at - base_;
    const bool near = distance % kStep == 0 && distance / kStep >= -128 && distance / kStep <= 127;
    if (!near && moves_ && distance % kStep == 0) {
      const int32_t on = distance + 127 * kStep;
      assembler_.add(kInput, on);
      base_ += on;
    }
    if (mask > 0) {
      assembler_.load(kPixels, kInput, at - base_, mask);
    } else {
      assembler_.load(kPixels, kInput, at - base_);
    }
  }

 private:
  Assembler& assembler_;
  const bool moves_;  // whether several channels are within reach of a base
  int32_t base_ = 0;
};

constexpr int64_t kBodiesAhead = 2;

// The registers of masks: where they are more than registers, the last one has now this, now that.
class Masks {
 public:
  Masks(Assembler& assembler, int in_registers) : assembler_(assembler), kept_(in_registers) {}
  // The register of a mask; 0 for none.
  int in_register(int mask) {
    if (mask < kept_) return mask + 1;
    if (mask != there_) assembler_.load_mask(kMaskRegisters, kMasks, static_cast<int8_t>(mask * sizeof(uint16_t)));
    there_ = mask;
    return kMaskRegisters;
  }

 private:
  Assembler& assembler_;
  const int kept_;
  int there_ = -1;
};

const std::string& wish() {
  static const std::string said = [] {
    const char* const value = std::getenv("SPARSEKD_GENERATE");
    std::string wished = value == nullptr || *value == '\0' ? "auto" : value;
    TORCH_CHECK_VALUE(wished == "auto" || wished == "always" || wished == "never",
                      "Expected SPARSEKD_GENERATE to be auto, always or never, got ", wished);
    return wished;
  }();
  return said;
}

}  // namespace

bool generates_code() {
  static const bool can =
      wish() != "never" && type_kernels<float>().generated >= 0 && ExecutablePages::of({0xc3}) != nullptr;
  return can;
}

bool generates_always() { return wish() == "always"; }

// The entries of some row groups by column, those of a column by row.
class GroupEntries {
 public:
  struct Entry {
    int32_t index, row;
  };

  GroupEntries(const Rows<float>& rows, uint32_t columns) : rows_(rows), columns_(columns), last_(columns + 1) {}

  void take(int64_t begin, int64_t end) {
    const int32_t *const crow = rows_.crow, *const col = rows_.col;
    std::fill(last_.begin(), last_.end(), 0);
    for (int64_t i = crow[begin]; i < crow[end]; ++i) {
      const auto column = static_cast<uint32_t>(col[i]);
      if (column >= columns_) outside_error(col, crow[rows_.packed()], columns_, rows_.name);
      ++last_[column + 1];
    }
    for (uint32_t column = 0; column < columns_; ++column) last_[column + 1] += last_[column];
    entries_.resize(crow[end] - crow[begin]);
    for (int64_t row = begin; row < end; ++row) {
      for (int32_t i = crow[row]; i < crow[row + 1]; ++i) {
        entries_[last_[col[i]]++] = {i, static_cast<int32_t>(row - begin)};
      }
    }
    column_ = 0;
    at_ = 0;
  }

  // Calls body(column, first entry, one after its last) for the columns that follow, below a limit.
  template <class Body>
  void until(uint32_t limit, Body body) {
    for (; column_ < limit; ++column_) {
      const auto end = static_cast<size_t>(last_[column_]);
      if (at_ < end) body(column_, entries_.data() + at_, entries_.data() + end);
      at_ = end;
    }
  }

 private:
  const Rows<float>& rows_;
  const uint32_t columns_;
  std::vector<int32_t> last_;  // by column: where its entries end
  std::vector<Entry> entries_;
  uint32_t column_ = 0;
  size_t at_ = 0;
};

namespace {

// Where groups of code end in a convolution group. Each has as many rows as registers allow, so that a load of pixels
// serves many, but for the last; of the threads that there are when code is made, each has about as many rows.
std::vector<int64_t> cuts_of(const Rows<float>& rows) {
  const int64_t all = rows.packed_per_group, most = kGeneratedRows / rows.vector, threads = at::get_num_threads();
  const int64_t fewest = ceil_div(all, most);
  const bool shared = threads > 1 && rows.groups == 1 && fewest < 4 * threads && all >= 8 * threads;
  const int64_t count = shared ? ceil_div(fewest, threads) * threads : fewest;
  std::vector<int64_t> ends;
  for (int64_t i = 1; i <= count; ++i) ends.push_back(shared ? all * i / count : std::min(i * most, all));
  return ends;
}

}  // namespace

GeneratedRows::GeneratedRows(const Rows<float>& rows, const std::vector<int32_t>& table, int64_t blocks,
                             const std::vector<int>& masks)
    : vector_(rows.vector), blocks_(blocks), masks_(masks), cuts_{0}, ends_(kGeneratedRows + 1) {
  const int all = masks.empty() ? 0 : *std::max_element(masks.begin(), masks.end()) + 1;
  in_registers_ = all > kMaskRegisters ? kMaskRegisters - 1 : all;
  const std::vector<int64_t> ends = cuts_of(rows);
  const auto cuts = static_cast<int64_t>(ends.size());
  Assembler assembler;
  GroupEntries entries(rows, static_cast<uint32_t>(table.size()));
  order_.reserve(rows.crow[rows.packed()]);
  for (int64_t cut = 0; cut < rows.groups * cuts; ++cut) {
    const int64_t begin = cuts_.back(), end = cut / cuts * rows.packed_per_group + ends[cut % cuts];
    cuts_.push_back(end);
    const int made = static_cast<int>((end - begin) * vector_);
    if (ends_[made].partial == 0) ends_[made] = ends_of(assembler, made);
    entries.take(begin, end);
    for (int64_t block = 0; block < blocks; ++block) {
      make_body(assembler, rows, table, entries, block_limit(rows, block, blocks));
    }
  }
  bodies_.push_back({assembler.size(), static_cast<int64_t>(order_.size()) * vector_});
  pages_ = ExecutablePages::of(assembler.code());
  TORCH_CHECK(pages_, "Expected memory for ", assembler.size(), " bytes of generated code, got none");
}

void GeneratedRows::make_body(Assembler& assembler, const Rows<float>& rows, const std::vector<int32_t>& table,
                              GroupEntries& entries, uint32_t limit) {
  constexpr int32_t kNumber = sizeof(float);
  assembler.align(64);
  bodies_.push_back({assembler.size(), static_cast<int64_t>(order_.size()) * vector_});
  Masks masks(assembler, in_registers_);
  Pixels pixels(assembler, rows.channels_per_group > 1 ? kNumber * (table[rows.taps] - table[0]) : 0);
  int32_t value = -kReach;
  entries.until(limit, [&](uint32_t column, const GroupEntries::Entry* entry, const GroupEntries::Entry* end) {
    const int mask = masks_.empty() ? -1 : masks_[column % static_cast<uint32_t>(rows.taps)];
    pixels.load(kNumber * table[column], mask < 0 ? 0 : masks.in_register(mask));
    for (; entry < end; ++entry) {
      order_.push_back(entry->index);
      for (int v = 0; v < vector_; ++v, value += kNumber) {
        if (value == kReach) {
          assembler.add(kValues, 2 * kReach);
          value = -kReach;
        }
        assembler.multiply_add(entry->row * vector_ + v, kPixels, kValues, value);
      }
    }
  });
  assembler.jump(kCall, offsetof(Call, end));
}

GeneratedRows::Ends GeneratedRows::ends_of(Assembler& assembler, int rows) const {
  const auto begin = [&](bool strided, auto body) {
    assembler.align(64);
    const size_t at = assembler.size();
    assembler.load(kRow, kCall, offsetof(Call, from));
    if (in_registers_ > 0) assembler.load(kMasks, kCall, offsetof(Call, masks));
    for (int mask = 0; mask < in_registers_; ++mask) {
      assembler.load_mask(mask + 1, kMasks, static_cast<int8_t>(mask * sizeof(uint16_t)));
    }
    if (strided) assembler.load(kPitch, kCall, offsetof(Call, from_pitch));
    for (int row = 0; row < rows; ++row) {
      body(row);
      if (strided) assembler.add(kRow, kPitch);
    }
    assembler.jump(kCall, offsetof(Call, body));
    return at;
  };
  const auto end = [&](bool raised, bool lowered, bool residual) {
    assembler.align(64);
    const size_t at = assembler.size();
    assembler.load(kRow, kCall, offsetof(Call, to));
    assembler.load(kPitch, kCall, offsetof(Call, to_pitch));
    if (residual) assembler.load(kResidual, kCall, offsetof(Call, residual));
    if (raised) assembler.broadcast(kLowest, kCall, offsetof(Call, low));
    if (lowered) assembler.broadcast(kHighest, kCall, offsetof(Call, high));
    for (int row = 0; row < rows; ++row) {
      if (residual) {
        assembler.add(row, kResidual, 0);
        assembler.add(kResidual, kPitch);
      }
      if (raised) assembler.raise(row, kLowest);
      if (lowered) assembler.lower(row, kHighest);
      assembler.store(row, kRow, 0);
      assembler.prefetch_to_write(kRow, kNextLine);
      assembler.add(kRow, kPitch);
    }
    assembler.leave();
    return at;
  };
  Ends ends{};
  ends.zeros = begin(false, [&](int row) { assembler.clear(row); });
  ends.init = begin(false, [&](int row) { assembler.broadcast(row, kRow, 4 * row); });
  ends.partial = begin(true, [&](int row) { assembler.load(row, kRow, 0); });
  for (const bool residual : {false, true}) {
    ends.stored[residual] = end(false, false, residual);
    ends.raised[residual] = end(true, false, residual);
    ends.clamped[residual] = end(true, true, residual);
  }
  return ends;
}

void GeneratedRows::multiply(const SpmmTile<float>& tile, const float* values, int64_t begin, int64_t end,
                             float* scratch) const {
  const auto code_at = [&](int64_t row_group) {
    return std::lower_bound(cuts_.begin(), cuts_.end(), row_group) - cuts_.begin();
  };
  const int64_t first = code_at(begin), after = code_at(end);
  const int64_t pitch = int64_t{tile.lines} * tile.width * kGeneratedLanes;
  for (int64_t body = first * blocks_; body < std::min(first * blocks_ + kBodiesAhead, after * blocks_); ++body) {
    Fetched(pages_->at(bodies_[body].code), pages_->at(bodies_[body + 1].code), 1).next();
    Fetched(values + bodies_[body].value, values + bodies_[body + 1].value, 1).next();
  }
  FetchedPixels ahead(tile, (after - first) * blocks_ * tile.lines * tile.width);
  for (int64_t code = first; code < after; ++code) {
    const int64_t row = (cuts_[code] - begin) * vector_;
    float* const partial = tile.places ? scratch : scratch + row * pitch;
    for (int64_t block = 0; block < blocks_; ++block) {
      multiply_body(tile, values, code, block, row, after * blocks_, ahead, partial);
    }
  }
}

// All positions of one body of code, whose first row is `row` of the tile; the last body of the call is before `after`.
void GeneratedRows::multiply_body(const SpmmTile<float>& tile, const float* values, int64_t code, int64_t block,
                                  int64_t row, int64_t after, FetchedPixels& ahead, float* partial) const {
  const int64_t positions = int64_t{tile.lines} * tile.width, at = code * blocks_ + block;
  const int64_t made = (cuts_[code + 1] - cuts_[code]) * vector_;
  const bool last = block + 1 == blocks_, placed = last && tile.places;
  const float* const residual = placed && tile.residual ? tile.residual + row * tile.output_pitch : nullptr;
  const float* const init = tile.init ? tile.init + row : nullptr;
  float* const output = last ? tile.output + row * tile.output_pitch : partial;
  const int64_t partial_pitch = positions * kVector;
  const int64_t output_pitch = last ? tile.output_pitch * static_cast<int64_t>(sizeof(float)) : partial_pitch;
  // The position of which not all sums may be stored; they lie aside first.
  const int64_t cut = placed && tile.tail > 0 ? positions - 1 : -1;
  const Buffer<float> aside(cut >= 0 ? made * kGeneratedLanes : 0);

  const Ends& ends = ends_[made];
  const bool lowered = tile.high < std::numeric_limits<float>::infinity();
  const void* const stored = pages_->at(ends.stored[0]);
  const void* const finished =
      pages_->at((!placed || !tile.clamped ? ends.stored : lowered ? ends.clamped : ends.raised)[residual ? 1 : 0]);
  const auto run = reinterpret_cast<Begin>(
      reinterpret_cast<uintptr_t>(pages_->at(block > 0 ? ends.partial : init ? ends.init : ends.zeros)));
  const float* const first_value = values + bodies_[at].value + kReach / sizeof(float);
  Call call{};
  call.body = pages_->at(bodies_[at].code);
  call.from_pitch = partial_pitch;
  call.low = tile.low;
  call.high = tile.high;

  const int64_t next = std::min(at + kBodiesAhead, after), past = std::min(next + 1, after);
  Fetched next_code(pages_->at(bodies_[next].code), pages_->at(bodies_[past].code), positions);
  Fetched next_values(values + bodies_[next].value, values + bodies_[past].value, positions);
  const float* line = tile.input;
  for (int64_t position = 0, x = 0; position < positions; ++position) {
    next_code.next();
    next_values.next();
    ahead.next();
    const int64_t place = placed ? tile.places[position] : position * kGeneratedLanes;
    const bool whole = position != cut;
    call.end = whole ? finished : stored;
    call.from = block > 0 ? partial + position * kGeneratedLanes : init;
    call.to = whole ? output + place : aside.get();
    call.to_pitch = whole ? output_pitch : kVector;
    call.residual = residual ? residual + place : nullptr;
    const float* input = line + x * kGeneratedLanes;
    if (tile.reads) {
      input = tile.input + tile.reads->starts[position];
      call.masks = tile.reads->masks + position * tile.reads->of_each;
    }
    run(input, first_value, &call);
    if (++x < tile.width) continue;
    x = 0;
    line += tile.line;
  }
  const int skipped = tile.reads ? tile.reads->skipped : 0;
  for (int64_t r = 0; cut >= 0 && r < made; ++r) {
    for (int lane = skipped; lane < skipped + tile.tail; ++lane) {
      const int64_t to = r * tile.output_pitch + tile.places[cut] + lane;
      float sum = aside.get()[r * kGeneratedLanes + lane];
      if (residual) sum += residual[to];
      if (tile.clamped) {
        sum = sum < tile.low ? tile.low : sum;
        sum = sum > tile.high ? tile.high : sum;
      }
      output[to] = sum;
    }
  }
}

}  // namespace sparsekd::cpu
