// What the host side of the distillation loss hands to its kernels. Plain numbers and pointers; no torch, no CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace sparsekd::cuda {

struct KDLossParams {
  const void *student, *teacher;  // [rows, classes]
  DType student_dtype, teacher_dtype;
  const int64_t* target;          // [rows] or null
  int64_t ignore_index;
  bool distill_ignored;
  int64_t rows, classes;
  double temperature, label_smoothing;
  double ce_weight, kl_weight;    // 1 - alpha and alpha * T^2, or 0 for a term that is not wanted
  int32_t* counts;                // [parts] labelled rows in each part of the target
  int parts;
  float* grad;                    // [rows, classes] or null
  double* partial;                // [blocks] the loss of the rows that a block took
  int blocks;
  float* loss;                    // one number
};

// Rows of few classes lie in the registers of `row_lanes` lanes, `items` in each, read `wide` at a time.
struct KDLossVariant {
  int row_lanes, items, wide;
  constexpr int most() const { return row_lanes * items; }
};
constexpr KDLossVariant kKDLossVariants[] = {
    {8, 4, 4}, {32, 4, 4}, {32, 8, 4}, {32, 16, 4}, {32, 32, 4},
    {8, 4, 1}, {32, 4, 1}, {32, 8, 1}, {32, 16, 1}, {32, 32, 1},
};
constexpr int kKDLossThreads = 256;

}  // namespace sparsekd::cuda

// Launchers: return a cudaError_t, 0 for success. `stream` is a cudaStream_t.
extern "C" {
int sparsekd_kd_loss_count(const sparsekd::cuda::KDLossParams* params, void* stream);
// `variant` is null for rows too long for registers; those are read `wide` classes at a time.
int sparsekd_kd_loss_rows(const sparsekd::cuda::KDLossParams* params, const sparsekd::cuda::KDLossVariant* variant,
                          int wide, void* stream);
int sparsekd_kd_loss_sum(const sparsekd::cuda::KDLossParams* params, void* stream);
}
