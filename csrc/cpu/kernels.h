// The inner loops that are compiled once per instruction set, and the table through which the ops reach them.
//
// Every sparse operator on the CPU comes down to two loops over *stretched* columns. A column of the packed weight
// (channel c, tap r, s) is a run of input pixels at a fixed distance from the output pixel, so its index becomes one
// element offset, and with `pixels` flat output positions p:
//
//   spmm    output[row][p]     = init[row] + sum_i values[i][row] * input[offsets[i] + p]
//   sddmm   grad_values[i][row] +=           sum_p grad[row][p]   * input[offsets[i] + p]
//
// spmm is the convolution's forward, its input gradient (transposed pattern), and both of nn.Linear's; sddmm is the
// weight gradient at the non-zeros. Idea of the stretched offsets: Escoin (Chen, 2018) and SkimCaffe (Park et al.,
// "Faster CNNs with direct sparse convolutions and guided pruning", ICLR 2017).
//
// A tile is `vectors` SIMD vectors of pixels wide; both loops may read up to one vector past `pixels`, so buffers end
// in kSlack initialised elements.
#pragma once
#include <cstdint>

namespace sparsekd::cpu {

constexpr int64_t kSlack = 64;  // elements after the last plane; the widest vector holds 16

// How wide a tile of pixels may be for a given number of rows that share their columns.
struct TileShape {
  int lanes;        // elements in a SIMD vector
  int max_vectors;  // most vectors in a tile
};

// Rows come in groups of `vector` that share columns. Group g's columns in block b are
// bounds[g * (blocks + 1) + b] .. bounds[g * (blocks + 1) + b + 1]; a block is a set of input channels that stays in L1.
template <class T>
struct SpmmTile {
  const T* input;          // already shifted to the tile's first pixel
  const int32_t* offsets;  // [n_vectors]
  const T* values;         // [n_vectors, vector]
  const int32_t* bounds;   // [groups, blocks + 1]
  int blocks;
  int vector;
  const T* init;    // [groups * vector], the bias by row, or null for zero
  T* output;        // [groups * vector, pitch], written whole
  int64_t pitch;    // elements
  int vectors;      // SIMD vectors in this tile
};

template <class T>
struct SddmmTile {
  const T* input;
  const int32_t* offsets;
  const int32_t* bounds;
  int blocks;
  int vector;
  const T* grad;     // [groups * vector, pitch], zero in pad columns and after the last pixel
  int64_t pitch;
  T* grad_values;    // [n_vectors, vector], added to
  int vectors;
};

// Packed rows on one row of activations; see spmv.inc.
template <class T>
struct SpmvRows {
  const T* input;       // [columns]
  const int32_t* crow;  // [groups + 1]
  const int32_t* col;   // [n_vectors], checked in the loop
  int32_t columns;
  const T* values;      // [n_vectors, vector]
  int vector;
  const T* init;        // [groups * vector] or null for zero
  T* output;            // [groups * vector]
};

// One row of the distillation loss; see kd_loss.inc.
template <class T>
struct KDLossRow {
  const T* student;   // [classes]
  const T* teacher;   // [classes]
  T* grad;            // [classes], or null when no gradient is wanted
  double* scratch;    // [3, classes rounded up to 16]
  int64_t classes;
  int64_t target;     // class index, or -1 for no cross-entropy term
  bool distill;       // whether the KL term takes this row
  double temperature;
  double label_smoothing;
  double ce_scale;    // weight of this row's cross-entropy in the total: (1 - alpha) / rows
  double kl_scale;    // alpha * T^2 / rows
};

template <class T>
struct TypeKernels {
  TileShape (*spmm_shape)(int vector);
  void (*spmm)(const SpmmTile<T>&, int64_t group_begin, int64_t group_end);
  TileShape (*sddmm_shape)(int vector);
  void (*sddmm)(const SddmmTile<T>&, int64_t group_begin, int64_t group_end);
  bool (*spmv)(const SpmvRows<T>&, int64_t group_begin, int64_t group_end);
  // out[c * out_pitch + r] = in[r * in_pitch + c]
  void (*transpose)(const T* in, int64_t rows, int64_t columns, int64_t in_pitch, T* out, int64_t out_pitch);
  double (*kd_loss_row)(const KDLossRow<T>&);  // the row's share of the loss
};

struct Kernels {
  const char* isa;
  TypeKernels<float> f32;
  TypeKernels<double> f64;
  // Both give false if any column is outside 0 .. columns - 1.
  // offsets[i] = table[col[i]]; nothing outside the table is read.
  bool (*stretch)(const int32_t* col, int64_t count, const int32_t* table, int32_t columns, int32_t* offsets);
  // offsets[i] = col[i] * pitch.
  bool (*scale)(const int32_t* col, int64_t count, int32_t pitch, int32_t columns, int32_t* offsets);
};

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

// The best table that this processor runs, capped by SPARSEKD_CPU_ISA=baseline|avx2|avx512 (read once).
const Kernels& kernels();

template <class T>
const TypeKernels<T>& type_kernels();
template <>
inline const TypeKernels<float>& type_kernels<float>() { return kernels().f32; }
template <>
inline const TypeKernels<double>& type_kernels<double>() { return kernels().f64; }

}  // namespace sparsekd::cpu
