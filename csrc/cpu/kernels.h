// The inner loops that are compiled once per instruction set, and the table through which the ops reach them.
//
// Every sparse operator on the CPU comes down to two loops. Pixels lie in the lanes of vectors (lanes.h), so that a
// column of the packed weight (channel c, tap r, s) is a whole vector at a fixed distance from that of the output
// pixel:
//
//   spmm    output[row][p]     = init[row] + sum_i values[i][row] * input[offset[i] + p],  offset[i] = table[col[i]]
//   sddmm   grad_values[i][row] +=           sum_p grad[row][p]   * input[table[col[i]] + p]
//
// spmm is the convolution's forward, its input gradient (transposed pattern), and both of nn.Linear's; sddmm is the
// weight gradient at the non-zeros. Constant distances are the idea of SkimCaffe (Park et al., "Faster CNNs with direct
// sparse convolutions and guided pruning", ICLR 2017) and Escoin (Chen, 2018).
//
// A tile is a rectangle of `lines` x `width` positions, each one vector. A block of input channels stays in L1 while
// all rows pass: both loops go through the columns (or offsets, which rise as they do) below a limit and leave the
// cursor of each row there, or through as many as a plan says. A column that is outside the table is below no limit, so
// that a row that stops short of its end tells of it; nothing outside is read.
//
// Under AVX-512 there are both loops for vectors of 64 bytes and, with twice the registers, of 32: on small maps more
// lanes may be idle than the wider vectors gain.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../activation.h"

namespace sparsekd::cpu {

// How large a tile may be for rows that share their columns.
struct TileShape {
  int lanes;      // elements in a vector
  int positions;  // most in a tile
  int lines;      // most in a tile
  int rows;       // that are taken together
  bool generated = false;
};

// Rows that one tile takes together: with several the loads no longer hold the FMAs up.
static inline constexpr int chunk_rows(int rows) { return rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

// Short tiles would wait for their own FMA's latency, so they run several independent sums side by side.
static inline constexpr int chains(int accumulators) { return accumulators >= 5 ? 1 : accumulators >= 4 ? 2 : 4; }

template <class T>
struct SpmmTile {
  const T* input;        // at the tile's first position
  int64_t line;          // elements from one line of positions to the next
  int lines, width;      // positions
  const int32_t* from;   // [groups] first vector of each row group in this block
  const int32_t* to;     // [groups] the one after its last
  int32_t* cursor;       // [groups] is moved to where a row group stopped, if not null
  const int32_t* offset; // [n_vectors] elements from a position to the column's vector
  const T* values;       // [n_vectors, vector]
  int vector;
  uint32_t limit;        // offsets below this are taken
  bool first;            // whether to start from init, else from the partial sums
  const T* init;         // [groups * vector], the bias by row, or null for zero
  const T* partial;      // of the first row of this call; lines * width vectors per row, side by side
  int64_t partial_pitch;
  T* output;             // as partial, and may be the same
  int64_t output_pitch;
  // Where the vectors of a row go if these are finished results: elements from the row's output on, rising. What a
  // vector reaches beyond its own pixels is overwritten by those that follow. Null: side by side.
  const int32_t* places;  // [lines * width]
  int tail;               // elements of the last one that may be stored, or 0 for all
  const T* residual;      // added to finished results; lies as the output does; or null
  // What the next tile reads, fetched while this one is computed: `ahead_lines` lines of a cache in each of so many
  // channels.
  const T* ahead;
  int64_t ahead_pitch, ahead_channels;
  int ahead_lines;
  int ahead_part, ahead_parts;  // of each block's channels, this part alone, if there are parts
  bool clamped;           // whether finished results are held between `low` and `high`
  T low, high;
  const struct ReadPlaces* reads;  // for code: in the place of lines; or null
};

template <class T>
struct SddmmTile {
  const T* input;
  int64_t line;
  int lines, width;
  const int32_t* table;  // [columns] elements from a position to the column's vector
  const int32_t* crow;
  const int32_t* col;    // [n_vectors]
  int vector;
  int32_t* cursor;
  uint32_t limit;        // columns below this are taken
  const T* grad;         // of result row 0, at the tile's first position; zero where there is no pixel
  int64_t grad_line;     // elements from one line of positions to the next
  int64_t grad_pitch;    // elements from one result row to the next
  const int64_t* row_of; // [groups * vector] result row, -1 for padding, whose gradient is `zeros`
  const T* zeros;
  T* grad_values;        // [n_vectors, vector], added to
};

// out = act(scale * from + shift + residual); see epilogue.inc.
template <class T>
struct EpilogueLine {
  const T* from;      // may be `out`
  T* out;
  const T* residual;  // as out, or null
  int64_t count;
  const T* scale;     // one number, or one per element; or null
  const T* shift;
  bool by_element;
  Activation activation;
};

// What is done to results on their way to `out`: clamp(x + residual).
template <class T>
struct LaneFinish {
  const T* residual;   // null, or as the result that begins at `result`
  const T* result;
  bool clamped;
  T low, high;
};

// Finished results of some rows: of each vector at from[position] the lanes that are kept, side by side at out[place].
template <class T>
struct SqueezedRows {
  const T* from;
  int64_t from_pitch;
  T* out;
  int64_t out_pitch;
  const T* residual;     // as out, or null
  int64_t rows;
  int positions;
  const int32_t* places;
  const uint32_t* kept;  // bits
  bool clamped;
  T low, high;
};

// to[line][left + i] = from[line][i * step] for i < count, zeros elsewhere up to `width`; see copy_lines.inc.
template <class T>
struct LineCopy {
  const T* from;
  int64_t from_pitch;
  T* to;
  int64_t to_pitch;
  int64_t lines, count, step, left, width;
  int64_t ahead;  // elements from here to what is fetched meanwhile, or 0
};

// Windows of a plane; see max_pool2d.inc.
struct MaxPool2d {
  int64_t input[2], output[2], kernel[2], stride[2], padding[2];
  int64_t pitch;  // elements of a padded line's columns of one phase, and what a vector may read past its last window
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

// KL(p || q), KL(q || p), or beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
enum class Divergence { kForwardKL, kReverseKL, kJSD };

// Of all rows of the distillation loss; see kd_loss.inc.
struct KDLossSettings {
  int64_t classes;
  Divergence divergence;
  double beta;           // of kJSD
  double temperature;
  double label_smoothing;
  double ce_scale;       // weight of a row's cross-entropy in the total: (1 - alpha) / rows
  double distill_scale;  // of its divergence: alpha * T^2 / rows
};

template <class T>
struct KDLossRow : KDLossSettings {
  const T* student;      // [classes]
  const T* teacher;      // [classes]
  T* grad;               // [classes], may be `student`; or null when no gradient is wanted
  double* scratch;       // [3, classes rounded up to 16]
  int64_t target;        // class index, or -1 for no cross-entropy term
  bool distill;          // whether the divergence takes this row
};

// One vector made of another by a pattern of lanes; elements from the plane's beginning.
struct LaneMove {
  int32_t from, to, pattern;
};
template <class T>
using LaneIndex = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Vectors that are made of lanes of several others. Of vector i, at out[to[i]], lane l is lane lanes[i][l] of a part's
// vector at in[from[part]] for which mask[part] has bit l, of parts ends[i - 1] .. ends[i] - 1; or zero if none has.
template <class T>
struct MergedLanes {
  int64_t count;
  const int32_t* to;
  const int32_t* ends;
  const LaneIndex<T>* lanes;
  const int32_t* from;
  const uint16_t* masks;
};

constexpr int kSmallMap = 64;  // pixels

// What depends on how many lanes a vector has.
template <class T>
struct LaneKernels {
  TileShape (*tile_shape)(int vector);
  bool (*spmm)(const SpmmTile<T>&, int64_t groups);  // whether all came to their ends
  TileShape (*grad_tile_shape)();
  void (*sddmm)(const SddmmTile<T>&, int64_t group_begin, int64_t group_end);
  // See transpose.inc.
  void (*gather_lanes)(const T* const* in, int64_t shift, int64_t count, T* out, int64_t pitch);
  void (*scatter_lanes)(const T* in, int64_t pitch, int64_t count, T* const* out, const int64_t* stride, int64_t times,
                        const LaneFinish<T>* finish);
  void (*move_lanes)(T* plane, const LaneMove* moves, int64_t count, const LaneIndex<T>* sources);
  void (*select)(const T* in, int64_t size, const int32_t* index, int64_t count, T* out);
  bool finishes;  // whether scatter_lanes takes a LaneFinish
  void (*squeeze)(const SqueezedRows<T>&);  // null where there is no fast way to leave lanes out
  // See collect.inc.
  void (*collect)(const T* in, const int32_t* from, int64_t count, T* out);
  void (*pool_line)(const T* in, int64_t pitch, int64_t lines, int64_t width, int64_t step, int64_t count, T* out);
  void (*merge_lanes)(const T* in, int present, const MergedLanes<T>& merged, T* out);
};

template <class T>
struct TypeKernels {
  int widths;                  // of vectors, out of which a call takes one
  const LaneKernels<T>* lanes;  // [widths], and what `generated` says
  int generated;               // whose lanes code is generated for (generated.h), or -1
  bool (*spmv)(const SpmvRows<T>&, int64_t group_begin, int64_t group_end);
  // out[c * out_pitch + r] = in[r * in_pitch + c]
  void (*transpose)(const T* in, int64_t rows, int64_t columns, int64_t in_pitch, T* out, int64_t out_pitch);
  // even[i] = in[2 * i], odd[i] = in[2 * i + 1], of `count` elements; either may be null.
  void (*split)(const T* in, int64_t count, T* even, T* odd);
  // out[2 * i] = in[i], of `count` elements; what is between stays.
  void (*spread)(const T* in, int64_t count, T* out);
  void (*copy_lines)(const LineCopy<T>&);
  void (*epilogue)(const EpilogueLine<T>&);
  void (*max_pool2d)(const MaxPool2d&, const T* in, T* out, T* scratch);  // scratch: [2, stride, pitch]
  double (*kd_loss_row)(const KDLossRow<T>&);  // the row's share of the loss
};

struct Kernels {
  const char* isa;
  TypeKernels<float> f32;
  TypeKernels<double> f64;
};

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels, narrow_kernels; }  // narrow: without vectors of 64 bytes in the lanes
#endif

// Bytes of this processor's L1 that a block of channels may take, and of its L2 that planes may.
int64_t l1_budget();
int64_t l2_budget();

// The best table that this processor runs, capped by SPARSEKD_CPU_ISA=baseline|avx2|avx512 (read once).
const Kernels& kernels();

template <class T>
const TypeKernels<T>& type_kernels();
template <>
inline const TypeKernels<float>& type_kernels<float>() { return kernels().f32; }
template <>
inline const TypeKernels<double>& type_kernels<double>() { return kernels().f64; }

}  // namespace sparsekd::cpu
