// What the kernels of kd_loss.cuh share: reductions, and the terms of one row once its sums are known.
#pragma once
#include "element.cuh"
#include "kd_loss.h"

namespace sparsekd::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kKDLossWarps = kKDLossThreads / 32;

struct Sum {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Over groups of kLanes neighbours; the same, to the last bit, in all of them.
template <int kLanes, class Op, class T>
__device__ __forceinline__ T over_lanes(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = Op::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Over all threads of a block. `scratch` holds kKDLossWarps values.
template <class Op, class T>
__device__ __forceinline__ T over_block(T value, T* scratch) {
  value = over_lanes<32, Op>(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();  // all warps have written
  T result = scratch[0];
  for (int i = 1; i < kKDLossWarps; ++i) result = Op::of(result, scratch[i]);
  __syncthreads();  // all have read before the scratch is used again
  return result;
}

// ---- what all rows share ----

struct Common {
  float inverse_t, log2_t;  // 1 / T, and log2(e) / T: exp(x / T) = 2^(x * log2_t)
  float ce_scale, kl_scale; // of one row
  bool hard, soft;          // whether there are such terms at all
};

// Every warp adds up the counts of labelled rows by itself.
__device__ __forceinline__ Common common_of(const KDLossParams& p, int& labelled) {
  labelled = 0;
  for (int i = threadIdx.x % 32; i < p.parts; i += 32) labelled += p.counts[i];
  labelled = over_lanes<32, Sum>(labelled);
  const double distilled = p.target == nullptr || p.distill_ignored ? double(p.rows) : double(labelled);
  Common c;
  c.inverse_t = static_cast<float>(1 / p.temperature);
  c.log2_t = static_cast<float>(1.4426950408889634 / p.temperature);
  c.ce_scale = labelled > 0 ? static_cast<float>(p.ce_weight / labelled) : 0.0f;
  c.kl_scale = distilled > 0 ? static_cast<float>(p.kl_weight / distilled) : 0.0f;
  c.hard = p.target != nullptr && p.ce_weight > 0;
  c.soft = p.kl_weight > 0;
  return c;
}

struct Labels {
  bool hard, soft;  // the terms that take this row
  int64_t target;
};

__device__ __forceinline__ Labels labels_of(const KDLossParams& p, const Common& c, int64_t row) {
  Labels labels{false, false, -1};
  if (row >= p.rows) return labels;
  const int64_t target = p.target ? p.target[row] : -1;
  const bool known = p.target == nullptr || target != p.ignore_index;
  labels.soft = c.soft && (known || p.distill_ignored);
  labels.hard = c.hard && known && target >= 0 && target < p.classes;
  if (labels.hard) labels.target = target;
  return labels;
}

// ---- one row, once its sums are known ----

struct Hard {
  float loss, scale, smooth, at_target;  // gradient: (exp(a) - smooth) * scale, at_target at the target
};

// others: sum of exp(a) over all classes but the target, of which a student who is sure of it leaves little: it would
// drown in the target's 1.
__device__ __forceinline__ Hard hard_terms(const KDLossParams& p, const Common& c, float a_target, float others,
                                           float sum_a) {
  const float at_target = fast_exp2(a_target * kLog2e), z = others + at_target;
  const float eps = static_cast<float>(p.label_smoothing), count = static_cast<float>(p.classes);
  Hard hard;
  float ce = a_target == 0.0f ? log1pf(others) : logf(z);
  if (eps < 1.0f) ce -= (1.0f - eps) * a_target;
  if (eps > 0.0f) ce -= eps * (sum_a / count);
  hard.loss = c.ce_scale * ce;
  // Exactly 0 where it is 0: one class, or labels and student that know nothing (eps = 1, z = classes).
  hard.scale = c.ce_scale / z;
  hard.smooth = eps * z / count;
  hard.at_target = at_target < others ? (at_target - hard.smooth) * hard.scale - (1.0f - eps) * c.ce_scale
                                      : c.ce_scale * (eps * (count - 1.0f) - others * count / z) / count;
  return hard;
}

struct Soft {
  float gradient, divergence;  // p * (exp(v) - 1) and p * (exp(v) - 1 - v)
};

__device__ __forceinline__ Soft soft_terms(const Common& c, float a, float b, float inverse_s, float inverse_z,
                                           float log_ratio) {
  const float q = fast_exp2(a * c.log2_t) * inverse_s, p = fast_exp2(b * c.log2_t) * inverse_z;
  const float v = (a - b) * c.inverse_t - log_ratio;
  const float square = v * v;
  const bool small = square < 0.12f;  // false for NaN, which is -inf against -inf
  // (exp(v) - 1 - v) / v^2 by Taylor, to the last place for |v| < 0.35
  float tail = 1.0f / 40320;
  tail = tail * v + 1.0f / 5040;
  tail = tail * v + 1.0f / 720;
  tail = tail * v + 1.0f / 120;
  tail = tail * v + 1.0f / 24;
  tail = tail * v + 1.0f / 6;
  tail = tail * v + 1.0f / 2;
  const float phi = square * tail;
  Soft soft;
  soft.gradient = small ? p * (phi + v) : q - p;
  soft.divergence = small ? p * phi : soft.gradient - (p == 0.0f ? 0.0f : p * v);
  return soft;
}

}  // namespace sparsekd::cuda
