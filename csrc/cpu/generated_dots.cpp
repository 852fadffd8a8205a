#include "generated_dots.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "assembler.h"

namespace sparsekd::cpu {
namespace {

using Run = void (*)(const float* input, const float* grad, const int32_t* places, const int32_t* end, float* sums,
                     const void* chunk, int64_t chunks);

// The arguments' registers by the System V ABI; that of `chunks`, the seventh, is loaded from the stack.
constexpr Register kInput = Register::rdi, kGrad = Register::rsi, kPlace = Register::rdx, kEnd = Register::rcx;
constexpr Register kSums = Register::r8, kPixels = Register::rax, kRow = Register::r9, kFirst = Register::r10;
constexpr Register kLeft = Register::r11;
constexpr int kRowVector = 31, kAside = 30;  // vectors
constexpr int32_t kVector = 64;              // bytes

// register[first] = the sums of the lanes of `count` registers from there on, 16 or 12, by steps of two halves.
void add_lanes(Assembler& assembler, int first, int count) {
  const auto halve = [&](int a, int b, auto low, auto high) {
    low(kAside, a, b);
    high(a, a, b);
    assembler.add(a, kAside, a);
  };
  for (int i = 0; i < count; i += 2) {  // a0 + a2, b0 + b2, a1 + a3, b1 + b3 of each quarter
    halve(first + i, first + i + 1, [&](int to, int a, int b) { assembler.interleave(to, a, b, false); },
          [&](int to, int a, int b) { assembler.interleave(to, a, b, true); });
  }
  for (int i = 0; i < count; i += 4) {  // a, b, c, d of each quarter
    halve(first + i, first + i + 2, [&](int to, int a, int b) { assembler.choose_numbers(to, a, b, 0x44); },
          [&](int to, int a, int b) { assembler.choose_numbers(to, a, b, 0xee); });
  }
  const auto quarters = [&](int a, int b) {
    halve(a, b, [&](int to, int x, int y) { assembler.choose_quarters(to, x, y, 0x88); },
          [&](int to, int x, int y) { assembler.choose_quarters(to, x, y, 0xdd); });
  };
  quarters(first, first + 4);
  quarters(first + 8, first + (count == 16 ? 12 : 8));
  quarters(first, first + 8);
}

}  // namespace

GeneratedDots::GeneratedDots(const Rows<float>& rows, Tiling tiling, int64_t grad_pitch)
    : tiling_(std::move(tiling)), grad_pitch_(grad_pitch), blocks_(tiling_[1]), first_{0} {
  constexpr int32_t kNumber = sizeof(float);
  const std::vector<int32_t> table = column_table(rows, tiling_);
  const auto columns = static_cast<uint32_t>(table.size());
  const int64_t vector = rows.vector, last_row = *std::max_element(rows.row_of, rows.row_of + rows.packed() * vector);
  if (table.empty() || *std::max_element(table.begin(), table.end()) > GeneratedRows::kFarthest ||
      last_row * grad_pitch > GeneratedRows::kFarthest) {
    return;
  }

  Assembler assembler;
  // How a run begins, at 0: jmp r9, with the rest of the arguments where they are wanted.
  assembler.load_argument(kLeft);
  assembler.copy(kFirst, kPlace);
  for (int i = 0; i < kDots; ++i) assembler.clear(i);
  assembler.jump(Register::r9);
  // What follows each chunk.
  assembler.align(64);
  const size_t finish = assembler.size();
  add_lanes(assembler, 0, 16);
  add_lanes(assembler, 16, 12);
  assembler.add(0, kSums, 0);
  assembler.store(0, kSums, 0);
  assembler.add(16, kSums, kVector);
  assembler.store(16, kSums, kVector);
  assembler.add(kSums, static_cast<int32_t>(kPlaces * kNumber));
  for (int i = 0; i < kDots; ++i) assembler.clear(i);
  assembler.copy(kPlace, kFirst);
  assembler.count_down(kLeft);
  assembler.give_back();
  assembler.align(64);
  const size_t leave = assembler.size();
  assembler.leave();
  assembler.align(64);

  struct Dot {
    int32_t value, column;
    int64_t row;
  };
  std::vector<Dot> dots;
  std::vector<int32_t> at(rows.packed());
  for (int64_t group = 0; group < rows.groups; ++group) {
    const int64_t from = group * rows.packed_per_group, to = from + rows.packed_per_group;
    std::copy_n(rows.crow + from, to - from, at.begin() + from);
    for (int64_t block = 0; block < blocks_; ++block) {
      const uint32_t limit = block_limit(rows, block, blocks_);
      dots.clear();
      for (int64_t packed = from; packed < to; ++packed) {
        const int32_t start = at[packed];
        int32_t& entry = at[packed];
        while (entry < rows.crow[packed + 1] && static_cast<uint32_t>(rows.col[entry]) < limit) ++entry;
        for (int64_t v = 0; v < vector; ++v) {
          const int64_t row = rows.row_of[packed * vector + v];
          for (int32_t i = start; row >= 0 && i < entry; ++i) {
            dots.push_back({static_cast<int32_t>(i * vector + v), rows.col[i], row});
          }
        }
      }
      for (size_t chunk = 0; chunk < dots.size(); chunk += kDots) {
        const size_t end = std::min(dots.size(), chunk + kDots);
        code_.push_back(assembler.size());
        for (int32_t line = 0; line < 7; ++line) assembler.prefetch_code(1024 + line * kVector);
        const size_t loop = assembler.size();
        assembler.load_number(kPixels, kPlace, 0);
        assembler.load_number(kRow, kPlace, kNumber);
        assembler.add(kPixels, kInput);
        assembler.add(kRow, kGrad);
        assembler.add(kPlace, 2 * kNumber);
        for (size_t i = chunk; i < end; ++i) {
          if (i == chunk || dots[i].row != dots[i - 1].row) {
            assembler.load(kRowVector, kRow, static_cast<int32_t>(dots[i].row * grad_pitch * kNumber));
          }
          assembler.multiply_add_vector(static_cast<int>(i - chunk), kRowVector, kPixels,
                                        table[dots[i].column] * kNumber);
          value_of_.push_back(dots[i].value);
        }
        value_of_.resize(code_.size() * kPlaces, -1);
        assembler.compare(kPlace, kEnd);
        assembler.jump_if_below(loop);
        assembler.call(finish);
        assembler.jump_if_zero(leave);
      }
      first_.push_back(static_cast<int64_t>(code_.size()));
    }
    for (int64_t packed = from; packed < to; ++packed) {
      if (at[packed] != rows.crow[packed + 1]) {
        outside_error(rows.col, rows.crow[rows.packed()], columns, rows.name);
      }
    }
  }
  pages_ = ExecutablePages::of(assembler.code());
}

void GeneratedDots::add(int64_t group, int64_t part, int64_t parts, const float* input, const float* grad,
                        const std::vector<int32_t>& places, float* sums) const {
  if (places.empty()) return;
  const auto run = reinterpret_cast<Run>(reinterpret_cast<uintptr_t>(pages_->at(0)));
  for (int64_t block = group * blocks_; block < (group + 1) * blocks_; ++block) {
    const int64_t count = first_[block + 1] - first_[block];
    const int64_t from = first_[block] + count * part / parts, to = first_[block] + count * (part + 1) / parts;
    if (from == to) continue;
    run(input, grad, places.data(), places.data() + places.size(), sums + from * kPlaces, pages_->at(code_[from]),
        to - from);
  }
}

}  // namespace sparsekd::cpu
