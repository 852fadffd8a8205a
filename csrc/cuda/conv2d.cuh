// Sparse convolution on CUDA cores: direct, without im2col.
//
//   output[n, k, y, x] = sum over the non-zeros (c, r, s) of row k:  value * input[n, c, y * stride + r * dilation, ..]
//
// A block stages all channels of a tile of positions, block of channels by block of channels (cp.async, two buffers),
// in the layout of conv2d.h, and serves many output rows with it. A lane of a warp owns kRun positions of the tile and
// the 4 * kG lanes there; a non-zero is one distance within the staged tile, added to the lane's own place. So
//
//   per non-zero vector of a warp: kG * kRun 16-byte reads of shared memory feed as many times kV * 4 multiply-adds
//
// and neither borders nor strides nor dilation are seen in the loop. Of few positions that would be few multiply-adds
// for each non-zero vector that is loaded. There a warp has kParts, each with lanes for all of its positions: a part
// takes every kParts-th of the non-zeros, and at the end a lane adds what others have at its own positions.
//
// A tile is a rectangle of 32 positions (kRun = 1), or a run of 32 * kRun positions of the plane as it lies in memory,
// row after row in a pitch in which the zeros to the right of a row are those to the left of the next. A run has less
// of a halo, fewer images in its lanes, and results that lie side by side; what it computes between rows is lost.
//
// The gradient of stride 2 has four results at each position, of as many phases, each of which sees taps of its own:
// they are the four slices of a warp, and go to images interleaved.
//
// Method: Park et al., "Faster CNNs with direct sparse convolutions and guided pruning", ICLR 2017; Chen, "Escoin",
// 2018; rows sorted by length: Gale et al., "Sparse GPU kernels for deep learning", SC 2020.
#pragma once
#include "conv2d_finish.cuh"
#include "conv2d_records.cuh"

#include <type_traits>

namespace sparsekd::cuda {

// Where a vector of the staged plane of a rectangle lies in the plane in global memory. -1: outside, a zero.
__device__ __forceinline__ int source_in_rectangle(const Conv2dParams& p, int position, int y0, int x0) {
  const int column = x0 + position % p.tile_columns;
  int rest = position / p.tile_columns;
  const int phase_x = rest % p.lanes.phases[1];
  rest /= p.lanes.phases[1];
  const int row = y0 + rest % p.tile_rows, phase_y = rest / p.tile_rows;
  if (column >= p.lanes.columns || row >= p.lanes.rows) return -1;
  return ((phase_y * p.lanes.rows + row) * p.lanes.phases[1] + phase_x) * p.lanes.columns + column;
}

// The same of a run from position `first` of the plane on.
__device__ __forceinline__ int source_in_run(const Conv2dParams& p, int position, int first) {
  const int phase = position / p.run_length, place = first + position % p.run_length;
  const int row = place / p.tile_columns, column = place % p.tile_columns;
  const int phase_y = phase / p.lanes.phases[1], phase_x = phase % p.lanes.phases[1];
  if (row >= p.lanes.rows) return -1;
  return ((phase_y * p.lanes.rows + row) * p.lanes.phases[1] + phase_x) * p.lanes.columns + column;
}

// The unit of a block of threads, and where its tile begins: a rectangle, or a run.
struct TileOrigin {
  int64_t unit;
  int y0, x0, first;

  __device__ __forceinline__ TileOrigin(const Conv2dParams& p, unsigned block) {
    const int tiles = p.tiles_h * p.tiles_w, tile = block % tiles;
    unit = block / tiles;
    y0 = tile / p.tiles_w * p.tile_h;
    x0 = tile % p.tiles_w * p.tile_w;
    first = tile * p.step;
  }
};

// The rows of a block of threads: a group of the convolution, and which of its blocks of rows.
struct RowBlock {
  int group, index;

  __device__ __forceinline__ RowBlock(const Conv2dParams& p, int block)
      : group(block / p.row_blocks), index(block % p.row_blocks) {}
};

// Places come in pairs, with four sums each: those of the second go to the lane kDistance apart, whose first it is. The
// firsts move up.
template <int kDistance, int kPairs>
__device__ __forceinline__ void add_sums_of_other(float* sums) {
#pragma unroll
  for (int i = 0; i < kPairs * 4; ++i) {
    sums[i] = sums[i / 4 * 8 + i % 4] + __shfl_xor_sync(0xffffffffu, sums[i / 4 * 8 + 4 + i % 4], kDistance);
  }
}

// For these nvcc 13 keeps registers in memory where a third of them, or half with results stored from them, is to do.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

template <int kV, int kG, int kGroups, int kPlane, int kRun, int kParts>
__global__ __launch_bounds__(32 * kConv2dWarps,
                             kFewRegisters ? 2 : conv2d_resident(kV * kG * kGroups * kRun * kParts, kV, kParts)) void
conv2d_kernel(const Conv2dParams p) {
  constexpr int kOwn = kRun * kParts, kApart = 32 / kParts;  // places of a lane in the loop
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int plane = kPlane ? kPlane : p.plane;  // in shared memory
  // What is wanted again at the end is worked out again there, and not kept in registers meanwhile.
  const TileOrigin staged_from(p, blockIdx.x);
  const RowBlock rows(p, blockIdx.y);

  float sums[kGroups][kV][kG * kOwn * 4];
  auto slice_of = [&](const RowBlock& rows, int k) {
    const int rank = (rows.index * warps + warp) * kGroups + k;
    return rank < p.slices_per_group ? p.order[rows.group * p.slices_per_group + rank] : -1;
  };
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int v = 0; v < kV; ++v) {
#pragma unroll
      for (int i = 0; i < kG * kOwn * 4; ++i) sums[k][v][i] = 0.0f;
    }
  }

  auto* memory = shared_memory<unsigned char>();
  auto* buffers = reinterpret_cast<float4*>(memory);  // [2][block_channels][kG][plane]
  const int buffer_size = p.block_channels * kG * plane;
  const int64_t planes = int64_t(p.lanes.channels) * kG;
  const float4* source = reinterpret_cast<const float4*>(p.input) +
                         (staged_from.unit * planes + int64_t(rows.group) * p.channels_per_group * kG) * p.lanes.plane;
  // Where each vector of a staged plane comes from. In registers it would leave too few for the loop.
  int* places = reinterpret_cast<int*>(memory + p.shared.places);  // [plane]
  for (int i = threadIdx.x; i < p.plane; i += blockDim.x) {
    places[i] = kRun > 1 ? source_in_run(p, i, staged_from.first)
                         : source_in_rectangle(p, i, staged_from.y0, staged_from.x0);
  }
  // Where each block's entries of the warp's slices begin.
  int* starts = reinterpret_cast<int*>(memory + p.shared.starts) + warp * kGroups * (p.blocks + 1);
  auto start_at = [&](int slice, int block) {
    return slice < 0 ? 0 : min(p.starts[int64_t(slice) * (p.blocks + 1) + block], p.n_records);
  };
  if (p.shared.has_starts) {
#pragma unroll 1
    for (int k = 0; k < kGroups; ++k) {
      const int slice = slice_of(rows, k);
      for (int i = lane; i <= p.blocks; i += 32) starts[k * (p.blocks + 1) + i] = start_at(slice, i);
    }
  }
  auto start_of = [&](int k, int block) {
    if (p.shared.has_starts) return starts[k * (p.blocks + 1) + block];
    return start_at(slice_of(RowBlock(p, anew(blockIdx.y)), k), block);
  };
  __syncthreads();  // places and starts
  // Of each slice the first entries of a block.
  auto staged_records = [&](int k, int block) {
    constexpr int kBytes = kStagedRecords<kV> / 2 * kPairBytes<kV>;
    return reinterpret_cast<float*>(memory + p.shared.records + ((block % 2 * warps + warp) * kGroups + k) * kBytes);
  };
  constexpr int kPair = kPairBytes<kV> / 4;  // in floats
  auto stage = [&](int block) {
    const int first_plane = block * p.block_channels * kG;
    const int count = min(p.block_channels * kG, p.channels_per_group * kG - first_plane);
    for (int position = lane; position < p.plane; position += 32) {
      const int at = places[position];
      const float4* from = source + int64_t(first_plane + warp) * p.lanes.plane + max(at, 0);
      float4* to = buffers + (block % 2) * buffer_size + warp * plane + position;
      for (int i = warp; i < count; i += warps, from += int64_t(warps) * p.lanes.plane, to += warps * plane) {
        copy_async16(to, from, at >= 0);
      }
    }
#pragma unroll 1
    for (int k = 0; k < kGroups; ++k) {
      const int begin = start_of(k, block), count = min(start_of(k, block + 1) - begin, kStagedRecords<kV>);
      const int mine = copied_record<kV>(anew(lane));
      if (mine >= count) continue;
      const auto record = record_at<kV>(p.records, begin + mine, p.n_records);
      float* chunk = staged_records(k, block);
      float* to = chunk + staged_values<kV>(mine);
      if constexpr (kV == 1) {
        copy_async8(to, record.values);
      } else if constexpr (kV == 2) {
        copy_async16(to, record.values, true);
      } else {
#pragma unroll
        for (int v = 0; v < kV; v += 4) copy_async16(to + v, record.values + v, true);
        copy_async4(chunk + staged_distance<kV>(mine), record.distance);
      }
    }
  };
  stage(0);
  copy_async_commit();
  if (p.blocks > 1) stage(1);
  copy_async_commit();

  // A lane's own place comes first, then that of the same lane of each other part of the warp.
  const int part = lane / kApart, row_pitch = p.lanes.phases[1] * p.tile_columns;
  auto in_plane = [&](int place) { return kRun > 1 ? place : place / p.tile_w * row_pitch + place % p.tile_w; };
  const int own = in_plane(lane);
  int others[kParts];
#pragma unroll
  for (int q = 0; q < kParts; ++q) others[q] = q ? in_plane(lane ^ q * kApart) - own : 0;
  for (int block = 0; block < p.blocks; ++block) {
    copy_async_wait<1>();
    __syncthreads();  // what other threads copied
    const auto* tile_data = reinterpret_cast<const unsigned char*>(buffers + (block % 2) * buffer_size + own);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int begin = start_of(k, block), end = start_of(k, block + 1);
      if (begin >= end) continue;
      auto multiply = [&](int distance, const Values<kV>& values, auto places) {
        const auto* at = reinterpret_cast<const float4*>(tile_data + distance);
#pragma unroll
        for (int g = 0; g < kG * kRun; ++g) {
#pragma unroll
          for (int q = 0; q < decltype(places)::value; ++q) {
            const float4 in = load_vector(at + g / kRun * plane + g % kRun * 32 + others[q]);
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              float* sum = &sums[k][v][(g * kParts + q) * 4];
              sum[0] += values.of[v] * in.x;
              sum[1] += values.of[v] * in.y;
              sum[2] += values.of[v] * in.z;
              sum[3] += values.of[v] * in.w;
            }
          }
        }
      };
      constexpr std::integral_constant<int, kParts> all;
      constexpr std::integral_constant<int, 1> one;
      const int staged = min(end - begin, kStagedRecords<kV>);
      const float* const pairs = staged_records(k, block);
      auto distance_of = [&](int index) { return *reinterpret_cast<const int*>(pairs + staged_distance<kV>(index)); };
      auto values_of = [&](int index) { return load_values<kV>(pairs + staged_values<kV>(index)); };
      // Where few products or many parts leave the loop's own instructions more than a twentieth of all.
      constexpr int kUnrolled = kV == 8 && kG * kOwn == 1 ? 4 : kV == 4 && kParts == 4 ? 2 : 1;
      // Each part of the warp takes pairs of its own. The last one apart: a load under a condition would cost moves of
      // what it might leave as it is.
      int done = staged / (2 * kParts) * 2 * kParts;
      // What comes after the pairs is loaded before the last entry of them is multiplied, whether it is one to take or
      // not.
      const int next = min(done + part, staged - 1);
      int distance_after;
      Values<kV> values_after;
      if (done > 0) {
        const float* from = pairs + part * kPair;
        Pair<kV> pair;
        pair.load_first(from);
#pragma unroll kUnrolled
        for (int left = staged / (2 * kParts) - 1; left > 0; --left, from += kParts * kPair) {
          pair.load_second(from);
          multiply(pair.distances[0], pair.values[0], all);
          const int distance = pair.distances[1];
          const Values<kV> values = pair.values[1];
          pair.load_first(from + kParts * kPair);
          multiply(distance, values, all);
        }
        pair.load_second(from);
        multiply(pair.distances[0], pair.values[0], all);
        distance_after = distance_of(next);
        values_after = values_of(next);
        multiply(pair.distances[1], pair.values[1], all);
      } else {
        distance_after = distance_of(next);
        values_after = values_of(next);
      }
      if (staged - done >= kParts) {
        multiply(distance_after, values_after, all);
        done += kParts;
      }
      // Of what is left, all parts take the same at their own places.
      if constexpr (kParts > 1) {
#pragma unroll 1
        for (; done < staged; ++done) multiply(distance_of(done), values_of(done), one);
      }
#pragma unroll 1
      for (int rest = begin + staged; rest < end; ++rest) {  // than are staged
        const auto record = record_at<kV>(p.records, rest, p.n_records);
        multiply(*record.distance, load_values<kV>(record.values), one);
      }
    }
    __syncthreads();  // before the buffer is filled again
    if (block + 2 < p.blocks) stage(block + 2);
    copy_async_commit();
  }
  copy_async_wait<0>();
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      if constexpr (kParts == 4) add_sums_of_other<8, kG * kRun * 2>(sums[k][v]);
      if constexpr (kParts > 1) add_sums_of_other<16, kG * kRun>(sums[k][v]);
    }
  }

  // Sums go through shared memory, so that one rolled loop can finish them: the buffers are free.
  constexpr int kRows = kGroups * kV, kLanes = kG * 4, kPositions = 32 * kRun;
  float* results = shared_memory<float>() + warp * kRows * kLanes * kPositions;  // [kRows][kLanes][kPositions]
  const int strip = strip_results(p);
  const TileOrigin origin(p, anew(blockIdx.x));
  const int64_t unit = origin.unit;
  const RowBlock last_rows(p, anew(blockIdx.y));
  const int group = last_rows.group;
  const int y0 = origin.y0, x0 = origin.x0, first = origin.first;
  const int y = anew(lane) / p.tile_w, x = anew(lane) % p.tile_w;  // of the lane's position within the tile
  // A position of the lane, in its strip; past its end where a result is none.
  auto row_of = [&](int j) { return kRun > 1 ? (first + j * 32 + lane) / p.tile_columns : y0 + y; };
  auto column_of = [&](int j) { return kRun > 1 ? (first + j * 32 + lane) % p.tile_columns : x0 + x; };
  auto inside = [&](int j) { return row_of(j) < p.lanes.strip_rows && column_of(j) < p.axes[1].positions; };
  const int first_row = kRun > 1 ? first / p.tile_columns : y0;
  const int tile_rows = kRun > 1 ? p.step / p.tile_columns : p.tile_h;

  if constexpr (kV == 1 && kGroups == 4) {
    if (p.interleaved) {  // [kLanes][4 * kPositions]
      const int lane_pitch = strip ? strip : 4 * kPositions, pitch = p.joined ? p.out_size[1] : 2 * p.tile_w;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const bool there = inside(j) && row_of(j) < first_row + tile_rows;
        const int column = 2 * (column_of(j) - (p.joined ? 0 : x0));
        const bool even = pitch % 2 == 0, second = there && column + 1 < pitch;
        const int row = there ? row_of(j) - first_row : 0, swapped = p.joined ? 0 : interleaved_row(2 * row, pitch) & 1;
        float* to = results + (there ? 2 * row * pitch + column : 0);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const int at = (i / 4 * kRun + j) * 4 + i % 4;
            float* two = to + i * lane_pitch + (k / 2 ^ swapped) * pitch;
            if (even) {
              store_vector(reinterpret_cast<float2*>(two), float2{sums[k][0][at], sums[k + 1][0][at]}, there);
            } else {
              store_vector(two, sums[k][0][at], there);
              store_vector(second ? two + 1 : two, sums[k + 1][0][at], second);
            }
          }
        }
      }
      const RowEnd row_end(p, slice_of(last_rows, 0), group, 0, 1);
      __syncwarp();  // interleaved results
      if (p.joined) {
        const Span span = span_of_rows(p, first_row, tile_rows);
        store_span<kLanes>(p, results, 1, 0, lane_pitch, row_end, unit, span);
      } else if constexpr (kRun == 1) {
        store_interleaved<kLanes>(p, results, lane_pitch, row_end, unit, y0, x0);
      }
      return;
    }
  }
  const ResultStore store(p);
  constexpr bool kFromRegisters = !kFewRegisters || kV * kG * kGroups * kRun <= 8;
  if (store.plain && (kFromRegisters || (kG == 1 && p.flat))) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const RowEnd row_end(p, slice_of(last_rows, k), group, lane % kV, kV);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const int channel = __shfl_sync(0xffffffffu, row_end.channel, v);
        const float scale = __shfl_sync(0xffffffffu, row_end.scale, v);
        const float shift = __shfl_sync(0xffffffffu, row_end.shift, v);
        if (channel < 0) continue;
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float* sum = &sums[k][v][j * 4];
          const bool there = inside(j) && (kRun == 1 || j * 32 + lane < p.step);
          if (kG > 1 || !p.flat) {
            if constexpr (kFromRegisters) {
              store_position<kLanes, kRun>(store, p, sum, channel, scale, shift, unit, row_of(j), column_of(j), there);
            }
            continue;
          }
          if (there) {
            store_flat(store, p, unit * p.out_n + channel * p.out_c + int64_t(column_of(j)) * 4,
                       float4{sum[0] * scale + shift, sum[1] * scale + shift, sum[2] * scale + shift,
                              sum[3] * scale + shift});
          }
        }
      }
    }
    return;
  }
  const Span span = kRun > 1 ? span_of_run(p, first) : span_of_rows(p, first_row, tile_rows);
  const int lane_pitch = strip ? strip : kPositions;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int place = p.joined ? row_of(j) * p.out_size[1] + column_of(j) - span.begin : lane;
      const bool there = !p.joined || (inside(j) && place < span.count);
      float* to = results + (there ? place : 0);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          const float sum = sums[k][v][(i / 4 * kRun + j) * 4 + i % 4];
          store_vector(to + (k * kV + v) * kLanes * kPositions + i * lane_pitch, sum, there);
        }
      }
    }
  }
  const RowEnd row_end(p, lane < kRows ? slice_of(last_rows, lane / kV) : -1, group, lane % kV, kV);
  if (kRun > 1 || p.joined) {
    __syncwarp();  // results
    store_span<kLanes>(p, results, kRows, kLanes * kPositions, lane_pitch, row_end, unit, span);
  } else if constexpr (kRun == 1) {
    store_rectangle<kRows, kLanes>(p, results, row_end, unit, y0 + y, x0 + x);
  }
}

}  // namespace sparsekd::cuda
