// SPDX-License-Identifier: Apache-2.0
// What gradients need: the stream as compressed sparse rows, and sums over the weights that share a table entry.
//
// Compressed sparse rows: a warp counts the weights of a row, one block makes running sums of the counts, a warp writes
// the columns (and values) of a row. Bound by what is written, 4 to 8 bytes a weight.
//
// Sums without atomics, so that the order is always the same: each lane of a warp has sums of its own for every entry,
//
//     bins [entry][lane]   in shared memory, no two lanes in one bank
//
// adds the values of its weights there, and at the end bins are added up over the lanes. With a table for each row that is
// all. Else a warp takes every so-manieth row, its sums go to scratch, and a second kernel adds up those of all warps. What
// does not fit into shared memory (more than 256 entries) is done in several turns, blockIdx.y, each walking the stream.
#pragma once

#include "cuda/sparse_codebook/sparse_codebook_walk.cuh"

namespace slim::cuda::sparse_codebook {

constexpr int kCsrWarps = 8;

// Grid: x over rows (striding). Writes counts[row + 1].
__global__ void __launch_bounds__(kCsrWarps* kWarp) count_kernel(const Csr p) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  for (int64_t row = int64_t(blockIdx.x) * kCsrWarps + warp; row < p.w.rows; row += int64_t(gridDim.x) * kCsrWarps) {
    int count = 0;
    Walk walk(p.w, row);
    while (walk.more()) count += walk.step().weights;
    if (lane == 0) p.offsets[row + 1] = count;
  }
}

constexpr int kScanThreads = 1024;

// One block. Counts become running sums, in place.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const Csr p) {
  int* totals = reinterpret_cast<int*>(dynamic_shared());  // [warps], then of the block
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int before = 0;
  if (thread == 0) p.offsets[0] = 0;
  for (int64_t first = 0; first < p.w.rows; first += kScanThreads) {
    const int64_t row = first + thread;
    int sum = row < p.w.rows ? p.offsets[row + 1] : 0;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = shuffle_up(sum, by);
      sum += lane >= by ? other : 0;
    }
    if (lane == kWarp - 1) totals[warp] = sum;
    sync_threads();
    int ahead = before;
    for (int i = 0; i < warp; ++i) ahead += totals[i];
    for (int i = 0; i < kScanThreads / kWarp; ++i) before += totals[i];
    if (row < p.w.rows) p.offsets[row + 1] = sum + ahead;
    sync_threads();
  }
}

// Grid: x over rows (striding). T: what a value is copied as.
template <class T>
__global__ void __launch_bounds__(kCsrWarps* kWarp) positions_kernel(const Csr p) {
  const int warp = int(threadIdx.x) / kWarp;
  const Tables<T> tables(p.w, nullptr, 0, 0, 0);
  for (int64_t row = int64_t(blockIdx.x) * kCsrWarps + warp; row < p.w.rows; row += int64_t(gridDim.x) * kCsrWarps) {
    const T* table = tables.of_row(row);
    int64_t at = p.offsets[row];
    Walk walk(p.w, row);
    while (walk.more()) {
      const Step s = walk.step();
      int64_t to = at + s.rank;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s.column[j] == kNone || to >= p.weights) continue;
        if (p.columns) p.columns[to] = int32_t(s.column[j]);
        if (p.values) static_cast<T*>(p.values)[to] = table[tables.index(s.column[j], s.codes, j)];
        ++to;
      }
      at += s.weights;
    }
  }
}

constexpr int kMostBins = 256;
constexpr int kSumWarps = 4;  // of a block of sum_rows_kernel, at most

struct SumsParams {
  Sums s;
  int32_t bins;        // of a warp: whole tables
  int32_t warps;       // of a block
  int64_t table_sets;  // warps in all; with a table for each row unused
};

// With a table for each row: grid x over rows (striding), results as T. Else: grid x times warps is table_sets, y over
// turns (striding), results to partial [table_sets][tables << bits]. Shared: bins of each warp, 128 bytes each.
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) sum_rows_kernel(const SumsParams p) {
  const Weight& w = p.s.w;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  float* bins = reinterpret_cast<float*>(dynamic_shared()) + int64_t(warp) * p.bins * kWarp;
  const int64_t set = int64_t(blockIdx.x) * p.warps + warp, stride = int64_t(gridDim.x) * p.warps;
  const bool by_row = w.group_size < 0;
  const int64_t all = by_row ? p.bins : w.tables << w.bits;
  const Tables<T> tables(w, nullptr, 0, 0, 0);
  for (int64_t first = int64_t(blockIdx.y) * p.bins; first < all; first += int64_t(gridDim.y) * p.bins) {
    const int count = int(all - first < p.bins ? all - first : p.bins);
    bool fresh = true;
    for (int64_t row = set; row < w.rows || fresh; row += stride) {
      if (fresh || by_row)
        for (int i = 0; i < count; ++i) bins[i * kWarp + lane] = 0;
      fresh = false;
      if (row < w.rows) {
        int64_t at = p.s.offsets[row];
        Walk walk(w, row);
        while (walk.more()) {
          const Step s = walk.step();
          int64_t from = at + s.rank;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (s.column[j] == kNone) continue;
            const int64_t bin = int64_t(tables.index(s.column[j], s.codes, j)) - first;
            if (bin >= 0 && bin < count && from < p.s.weights) bins[bin * kWarp + lane] += p.s.values[from];
            ++from;
          }
          at += s.weights;
        }
      }
      if (!by_row && row + stride < w.rows) continue;
      sync_warp();
      for (int i = lane; i < count; i += kWarp) {
        float sum = 0;
        for (int l = 0; l < kWarp; ++l) sum += bins[i * kWarp + (l + lane) % kWarp];  // every lane in a bank of its own
        if (!by_row)
          p.s.partial[set * all + first + i] = sum;
        else if (row < w.rows)
          static_cast<T*>(p.s.sums)[(row << w.bits) + i] = from_float<T>(sum);
      }
      sync_warp();
    }
  }
}

// A warp adds up the sums of an entry. Grid: x over entries (striding).
template <class T>
__global__ void __launch_bounds__(kCsrWarps* kWarp) sum_sets_kernel(const SumsParams p) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t all = p.s.w.tables << p.s.w.bits;
  for (int64_t i = int64_t(blockIdx.x) * kCsrWarps + warp; i < all; i += int64_t(gridDim.x) * kCsrWarps) {
    float sum = 0;
    for (int64_t set = lane; set < p.table_sets; set += kWarp) sum += p.s.partial[set * all + i];
#pragma unroll
    for (int by = kWarp / 2; by >= 1; by /= 2) sum += shuffle_xor(sum, by);
    if (lane == 0) static_cast<T*>(p.s.sums)[i] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::sparse_codebook
