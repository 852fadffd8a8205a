// (1 - alpha) * CE + alpha * T^2 * KL(teacher || student) from raw logits, with its gradient in the same pass.
//
// Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015. With a = s - max s, b = t - max t,
// p = softmax(b / T), q = softmax(a / T), v = log q - log p:
//
//   CE = log sum exp a - (1 - eps) a_y - eps * mean a              (label smoothing eps, as torch.nn.functional)
//   KL = sum p log(p / q) = sum p * (exp(v) - 1 - v)               (equal, as p and q both sum to 1)
//   dKL / da = (q - p) / T = p * (exp(v) - 1) / T
//
// The second form keeps its digits where the student agrees with the teacher, which q - p in fp32 does not. The error
// of the two normalisations is one number d in every v. It shows in r = sum p * (exp(v) - 1), which should be 0 and is
// exp(d) - 1, and is taken out: r^2 / 2 from KL, and q * r from the gradient of rows that lie in registers.
//
// Three launches: labelled rows are counted (each CE term is divided by their number), rows computed, their losses
// summed, all in a fixed order.
//
//   up to 1024 classes   a warp per row (or 8 lanes, up to 32 classes): both logits are read once, into registers
//   more                 a block per row: maxima and sums in one online pass (Milakov, Gimelshein, "Online normalizer
//                        calculation for softmax", 2018), gradient and divergence in a second
#pragma once
#include "kd_loss_terms.cuh"

namespace sparsekd::cuda {

// ---- rows in registers ----

// Item i of a lane is class ((i / kWide) * kRowLanes + in_row) * kWide + i % kWide; what is none is -inf.
template <int kRowLanes, int kItems, int kWide>
__device__ __forceinline__ void load_row(const void* from, DType dtype, int64_t begin, int classes, int in_row,
                                         float (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i += kWide) {
    const int k = (i / kWide * kRowLanes + in_row) * kWide;
    if constexpr (kWide == 4) {
      float4 four{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (k < classes) four = load_four(from, dtype, begin + k);
      items[i] = four.x;
      items[i + 1] = four.y;
      items[i + 2] = four.z;
      items[i + 3] = four.w;
    } else {
      items[i] = k < classes ? load_value(from, dtype, begin + k) : -INFINITY;
    }
  }
}

template <int kRowLanes, int kItems>
__device__ __forceinline__ float subtract_max(float (&items)[kItems]) {
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kItems; ++i) most = fmaxf(most, items[i]);
  most = over_lanes<kRowLanes, Max>(most);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] -= most;
  return most;
}

// The exponentials of 32 items stay in registers, too: then one block fills an SM, with 64 KB of loads under way.
template <int kRowLanes, int kItems, int kWide>
__global__ __launch_bounds__(kKDLossThreads, kItems > 16 ? 1 : 2) void kd_loss_rows_kernel(const KDLossParams p) {
  constexpr int kRows = 32 / kRowLanes;  // that a warp takes at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, in_row = lane % kRowLanes;
  int labelled;
  const Common c = common_of(p, labelled);
  const int all_classes = static_cast<int>(p.classes);
  const auto class_of = [&](int i) { return (i / kWide * kRowLanes + in_row) * kWide + i % kWide; };
  double loss = 0;
  const int64_t step = int64_t(gridDim.x) * kKDLossWarps * kRows;
  for (int64_t first = (int64_t(blockIdx.x) * kKDLossWarps + warp) * kRows; first < p.rows; first += step) {
    const int64_t row = first + lane / kRowLanes, begin = row * p.classes;
    const Labels labels = labels_of(p, c, row);
    const int target = static_cast<int>(labels.target);
    const int classes = labels.hard || labels.soft ? all_classes : 0;  // 0: nothing is read, the gradient is zero
    float a[kItems], b[kItems];
    load_row<kRowLanes, kItems, kWide>(p.student, p.student_dtype, begin, classes, in_row, a);
    if (c.soft) load_row<kRowLanes, kItems, kWide>(p.teacher, p.teacher_dtype, begin, classes, in_row, b);
    const float max_s = subtract_max<kRowLanes>(a);

    Hard hard{};
    float row_loss = 0.0f;
    if (c.hard) {  // the same for all rows, so that shuffles meet
      float others = 0.0f, sum_a = 0.0f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int k = class_of(i);
        if (k != target) others += fast_exp2(a[i] * kLog2e);
        if (k < classes) sum_a += a[i];
      }
      others = over_lanes<kRowLanes, Sum>(others);
      sum_a = over_lanes<kRowLanes, Sum>(sum_a);
      if (labels.hard) {
        hard = hard_terms(p, c, load_value(p.student, p.student_dtype, begin + target) - max_s, others, sum_a);
        row_loss = hard.loss;
      }
    }

    float soft_scale = 0.0f, correction = 0.0f;
    if (c.soft) {
      subtract_max<kRowLanes>(b);
      float z_s = 0.0f, z_t = 0.0f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        z_s += fast_exp2(a[i] * c.log2_t);
        z_t += fast_exp2(b[i] * c.log2_t);
      }
      z_s = over_lanes<kRowLanes, Sum>(z_s);
      z_t = over_lanes<kRowLanes, Sum>(z_t);
      const float inverse_s = 1.0f / z_s, inverse_z = 1.0f / z_t, log_ratio = logf(z_s / z_t);
      float divergence = 0.0f, excess = 0.0f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const Soft soft = soft_terms(c, a[i], b[i], inverse_s, inverse_z, log_ratio);
        divergence += soft.divergence;
        excess += soft.gradient;
        b[i] = soft.gradient;
      }
      divergence = over_lanes<kRowLanes, Sum>(divergence);
      excess = over_lanes<kRowLanes, Sum>(excess);
      if (labels.soft) {
        const float kl = divergence - 0.5f * excess * excess;
        row_loss += c.kl_scale * (kl < 0.0f ? 0.0f : kl);
        soft_scale = c.kl_scale * c.inverse_t;
        correction = excess * inverse_s;
      }
    }
    if (in_row == 0) loss += row_loss;

    if (p.grad == nullptr || row >= p.rows) continue;  // no lane meets others from here on
    float* const grad = p.grad + begin;
#pragma unroll
    for (int i = 0; i < kItems; i += kWide) {
      if (class_of(i) >= all_classes) continue;
      float g[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        g[j] = 0.0f;
        if (labels.hard) {
          g[j] = class_of(i + j) == target ? hard.at_target
                                                  : (fast_exp2(a[i + j] * kLog2e) - hard.smooth) * hard.scale;
        }
        if (labels.soft) g[j] += (b[i + j] - fast_exp2(a[i + j] * c.log2_t) * correction) * soft_scale;
      }
      if constexpr (kWide == 4) {
        store_vector(reinterpret_cast<float4*>(grad + class_of(i)), float4{g[0], g[1], g[2], g[3]});
      } else {
        grad[class_of(i)] = g[0];
      }
    }
  }
  loss = over_block<Sum>(loss, shared_memory<double>());
  if (threadIdx.x == 0) p.partial[blockIdx.x] = loss;
}

// ---- rows too long for registers ----

template <int kWide>
__device__ __forceinline__ void load_classes(const void* from, DType dtype, int64_t index, float (&items)[kWide]) {
  if constexpr (kWide == 4) {
    const float4 four = load_four(from, dtype, index);
    items[0] = four.x;
    items[1] = four.y;
    items[2] = four.z;
    items[3] = four.w;
  } else {
    items[0] = load_value(from, dtype, index);
  }
}

// x - max, where the first -inf of a row counts as its maximum until a finite one comes.
__device__ __forceinline__ float below(float x, float max) { return x == max ? 0.0f : x - max; }

template <int kWide>
__global__ __launch_bounds__(kKDLossThreads, 4) void kd_loss_long_rows_kernel(const KDLossParams p) {
  double* const scratch = shared_memory<double>();
  float* const sums = reinterpret_cast<float*>(scratch);
  int labelled;
  const Common c = common_of(p, labelled);
  double loss = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t begin = row * p.classes;
    const Labels labels = labels_of(p, c, row);  // the same in all threads
    float* const grad = p.grad ? p.grad + begin : nullptr;
    if (!labels.hard && !labels.soft) {
      for (int64_t k = threadIdx.x; grad && k < p.classes; k += kKDLossThreads) grad[k] = 0.0f;
      continue;
    }

    float max_s = -INFINITY, others = 0.0f, z_s = 0.0f, sum_a = 0.0f, seen = 0.0f;
    float max_t = -INFINITY, z_t = 0.0f;
    const auto move_student = [&](float max) {
      others *= fast_exp2(below(max_s, max) * kLog2e);
      z_s *= fast_exp2(below(max_s, max) * c.log2_t);
      if (seen > 0.0f) sum_a += seen * below(max_s, max);
      max_s = max;
    };
    const auto move_teacher = [&](float max) {
      z_t *= fast_exp2(below(max_t, max) * c.log2_t);
      max_t = max;
    };
    for (int64_t k = threadIdx.x * kWide; k < p.classes; k += kKDLossThreads * kWide) {
      float s[kWide], most = -INFINITY;
      load_classes<kWide>(p.student, p.student_dtype, begin + k, s);
#pragma unroll
      for (int j = 0; j < kWide; ++j) most = fmaxf(most, s[j]);
      if (most > max_s) move_student(most);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float a = below(s[j], max_s);
        if (labels.hard && k + j != labels.target) others += fast_exp2(a * kLog2e);
        z_s += fast_exp2(a * c.log2_t);
        sum_a += a;
      }
      seen += kWide;
      if (!labels.soft) continue;
      float t[kWide];
      most = -INFINITY;
      load_classes<kWide>(p.teacher, p.teacher_dtype, begin + k, t);
#pragma unroll
      for (int j = 0; j < kWide; ++j) most = fmaxf(most, t[j]);
      if (most > max_t) move_teacher(most);
#pragma unroll
      for (int j = 0; j < kWide; ++j) z_t += fast_exp2(below(t[j], max_t) * c.log2_t);
    }
    move_student(over_block<Max>(max_s, sums));
    Hard hard{};
    if (labels.hard) {
      others = over_block<Sum>(others, sums);
      sum_a = over_block<Sum>(sum_a, sums);
      hard = hard_terms(p, c, load_value(p.student, p.student_dtype, begin + labels.target) - max_s, others, sum_a);
      if (threadIdx.x == 0) loss += hard.loss;
    }
    float inverse_s = 0.0f, inverse_z = 0.0f, log_ratio = 0.0f;
    if (labels.soft) {
      move_teacher(over_block<Max>(max_t, sums));
      z_s = over_block<Sum>(z_s, sums);
      z_t = over_block<Sum>(z_t, sums);
      inverse_s = 1.0f / z_s;
      inverse_z = 1.0f / z_t;
      log_ratio = logf(z_s / z_t);
    }

    const float soft_scale = c.kl_scale * c.inverse_t;
    float divergence = 0.0f, excess = 0.0f;
    if (grad == nullptr && !labels.soft) continue;
    for (int64_t k = threadIdx.x * kWide; k < p.classes; k += kKDLossThreads * kWide) {
      float s[kWide], t[kWide], g[kWide];
      load_classes<kWide>(p.student, p.student_dtype, begin + k, s);
      if (labels.soft) load_classes<kWide>(p.teacher, p.teacher_dtype, begin + k, t);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float a = s[j] - max_s;
        g[j] = 0.0f;
        if (labels.hard) {
          g[j] = k + j == labels.target ? hard.at_target : (fast_exp2(a * kLog2e) - hard.smooth) * hard.scale;
        }
        if (labels.soft) {
          const Soft soft = soft_terms(c, a, t[j] - max_t, inverse_s, inverse_z, log_ratio);
          divergence += soft.divergence;
          excess += soft.gradient;
          g[j] += soft.gradient * soft_scale;
        }
      }
      if (grad == nullptr) continue;
      if constexpr (kWide == 4) {
        store_vector(reinterpret_cast<float4*>(grad + k), float4{g[0], g[1], g[2], g[3]});
      } else {
        grad[k] = g[0];
      }
    }
    if (labels.soft) {
      divergence = over_block<Sum>(divergence, sums);
      excess = over_block<Sum>(excess, sums);
      const float kl = divergence - 0.5f * excess * excess;
      if (threadIdx.x == 0) loss += c.kl_scale * (kl < 0.0f ? 0.0f : kl);
    }
  }
  if (threadIdx.x == 0) p.partial[blockIdx.x] = loss;
}

// ---- before and after ----

__global__ __launch_bounds__(kKDLossThreads) void kd_loss_count_kernel(const KDLossParams p) {
  int labelled = 0;
  for (int64_t row = int64_t(blockIdx.x) * kKDLossThreads + threadIdx.x; row < p.rows;
       row += int64_t(gridDim.x) * kKDLossThreads) {
    const int64_t target = p.target[row];
    if (target == p.ignore_index) continue;
    SPARSEKD_ASSERT(target >= 0 && target < p.classes, "Expected targets to be classes or ignore_index");
    ++labelled;
  }
  labelled = over_block<Sum>(labelled, shared_memory<int>());
  if (threadIdx.x == 0) p.counts[blockIdx.x] = labelled;
}

__global__ __launch_bounds__(kKDLossThreads) void kd_loss_sum_kernel(const KDLossParams p) {
  int labelled;
  common_of(p, labelled);
  double loss = 0;
  for (int i = threadIdx.x; i < p.blocks; i += kKDLossThreads) loss += p.partial[i];
  loss = over_block<Sum>(loss, shared_memory<double>());
  // As torch: the mean over no rows is NaN. Unlabelled rows that are distilled make the loss well defined.
  const bool no_labels = p.target != nullptr && labelled == 0;
  if (p.rows == 0 || (no_labels && !p.distill_ignored)) loss = NAN;
  if (threadIdx.x == 0) *p.loss = static_cast<float>(loss);
}

}  // namespace sparsekd::cuda
