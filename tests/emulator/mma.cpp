// Matrix instructions of a warp. Layouts after the PTX ISA, "Matrix fragments for mma.m16n8k8 / .m16n8k16", "Matrix
// fragments for sparse mma.m16n8k32 with .f16 and .bf16 types", "Sparse matrix storage" and "ldmatrix";
// tests/test_mma.py compares them with CUTLASS's own.
#include "mma.h"

#include <vector>

namespace emulator {

int device_major = 8, device_shared_bytes = 163 << 10, device_multiprocessors = 108;

namespace {

struct Matrices {
  const void* row;
  uint32_t* words;
};

struct Product {
  float* c;
  const uint32_t *a, *b;
  int depth;
  bool bfloat16;
  uint32_t metadata = 0;  // of a sparse product
  int selector = 0;
};

// gcc converts a half in software, slower than a look into a table.
const std::vector<float>& half_values() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) {
      const auto bits = static_cast<uint16_t>(i);
      _Float16 half;
      std::memcpy(&half, &bits, 2);
      values[i] = static_cast<float>(half);
    }
    return values;
  }();
  return table;
}

float value(uint32_t word, int i, bool bfloat16) {
  const uint32_t bits = i ? word >> 16 : word & 0xffff;
  if (!bfloat16) return half_values()[bits];
  const uint32_t wide = bits << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

// As meet() wants them: what each lane handed over.
void spread(void* const* slots, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto* row = static_cast<const Matrices*>(slots[8 * i + lane / 4])->row;
      std::memcpy(static_cast<Matrices*>(slots[lane])->words + i, static_cast<const uint32_t*>(row) + lane % 4, 4);
    }
  }
}

void transpose(void* const* slots, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      uint32_t word = 0;
      for (int e = 0; e < 2; ++e) {
        const auto* from = static_cast<const Matrices*>(slots[8 * i + 2 * (lane % 4) + e])->row;
        word |= uint32_t(static_cast<const uint16_t*>(from)[lane / 4]) << (16 * e);
      }
      static_cast<Matrices*>(slots[lane])->words[i] = word;
    }
  }
}

void multiply(void* const* slots, unsigned) {
  const auto& first = *static_cast<const Product*>(slots[0]);
  float a[16][16], b[16][8], c[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Product*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < first.depth / 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = value(own.a[i], e, first.bfloat16);
      }
    }
    for (int i = 0; i < first.depth / 8; ++i) {
      for (int e = 0; e < 2; ++e) b[2 * t + e + 8 * i][g] = value(own.b[i], e, first.bfloat16);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < first.depth; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Product*>(slots[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] += c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

// A is 16 x 16, two of each four columns of a matrix with 32. Two bits for each value, in ascending order, say which;
// what is not in ascending order is undefined in the PTX ISA, and no number here.
void multiply_sparse(void* const* slots, unsigned) {
  const auto& first = *static_cast<const Product*>(slots[0]);
  float a[16][16], b[32][8], c[16][8] = {};
  int column[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Product*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = value(own.a[i], e, first.bfloat16);
        b[2 * t + e + 8 * i][g] = value(own.b[i], e, first.bfloat16);
      }
    }
    if (t / 2 != first.selector) continue;
    for (int bit = 0; bit < 32; bit += 2) {
      column[g + bit / 16 * 8][t % 2 * 8 + bit % 16 / 2] = own.metadata >> bit & 3;
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      const bool ascending = column[m][k & ~1] < column[m][k | 1];
      for (int n = 0; n < 8; ++n) {
        c[m][n] += ascending ? a[m][k] * b[k / 2 * 4 + column[m][k]][n] : std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Product*>(slots[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] += c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

void load_matrices(uint32_t* words, const void* row, int line, const void* pc) {
  access(row, 16, false, pc);
  Matrices slot{row, words};
  meet(Meeting::matrix, ~0u, &slot, spread, line);
}

void mma_sparse(float* c, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, bool bfloat16,
                int line) {
  Product slot{c, a, b, 32, bfloat16, metadata, selector};
  meet(Meeting::matrix, ~0u, &slot, multiply_sparse, line);
}

void load_matrices_transposed(uint32_t* words, const void* row, int line, const void* pc) {
  access(row, 16, false, pc);
  Matrices slot{row, words};
  meet(Meeting::matrix, ~0u, &slot, transpose, line);
}

void mma(float* c, const uint32_t* a, const uint32_t* b, int depth, bool bfloat16, int line) {
  Product slot{c, a, b, depth, bfloat16};
  meet(Meeting::matrix, ~0u, &slot, multiply, line);
}

}  // namespace emulator

// ---- for the tests, through ctypes ----

extern "C" {
void emulator_set_device(int major, int shared_bytes, int multiprocessors) {
  emulator::device_major = major;
  emulator::device_shared_bytes = shared_bytes;
  emulator::device_multiprocessors = multiprocessors;
}

// One instruction of a warp, on the words of its lanes: a [32][depth / 4], b [32][depth / 8], c [32][4].
void emulator_mma(float* c, const uint32_t* a, const uint32_t* b, int depth, int bfloat16) {
  emulator::Product products[32];
  void* slots[32];
  for (int i = 0; i < 32; ++i) {
    products[i] = {c + 4 * i, a + depth / 4 * i, b + depth / 8 * i, depth, bfloat16 != 0};
    slots[i] = &products[i];
  }
  emulator::multiply(slots, ~0u);
}

// The sparse one: a, b and c [32][4], metadata [32].
void emulator_mma_sparse(float* c, const uint32_t* a, const uint32_t* b, const uint32_t* metadata, int selector,
                         int bfloat16) {
  emulator::Product products[32];
  void* slots[32];
  for (int i = 0; i < 32; ++i) {
    products[i] = {c + 4 * i, a + 4 * i, b + 4 * i, 32, bfloat16 != 0, metadata[i], selector};
    slots[i] = &products[i];
  }
  emulator::multiply_sparse(slots, ~0u);
}

// Rows [32][8] of 16 bits to words [32][4].
void emulator_load_matrices(uint32_t* words, const uint16_t* rows) {
  emulator::Matrices matrices[32];
  void* slots[32];
  for (int i = 0; i < 32; ++i) {
    matrices[i] = {rows + 8 * i, words + 4 * i};
    slots[i] = &matrices[i];
  }
  emulator::spread(slots, ~0u);
}
void emulator_load_matrices_transposed(uint32_t* words, const uint16_t* rows) {
  emulator::Matrices matrices[32];
  void* slots[32];
  for (int i = 0; i < 32; ++i) {
    matrices[i] = {rows + 8 * i, words + 4 * i};
    slots[i] = &matrices[i];
  }
  emulator::transpose(slots, ~0u);
}
}
