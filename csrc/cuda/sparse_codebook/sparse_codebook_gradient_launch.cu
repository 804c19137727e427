// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/launch.cuh"
#include "cuda/sparse_codebook/sparse_codebook_gradient.cuh"

namespace slim::cuda::sparse_codebook {

namespace {

constexpr int64_t kMostBlocks = 1 << 20;  // kernels stride over what is left
constexpr int64_t kMostPartial = int64_t(16)
                                 << 20;  // bytes of scratch for the sums of warps, if more than one table set

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 blocks_of(int64_t items) {
  const int64_t blocks = divide_up(items, kCsrWarps);
  return dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks));
}

int64_t entries_of(const Weight& w) { return w.tables << w.bits; }

// Bins of a warp: all of them, in powers of two of whole tables, or 256. Up to 64 four warps share a block (32 KiB).
int bins_of(const Weight& w) {
  int bins = 1 << w.bits;
  if (w.group_size >= 0)
    while (bins < kMostBins && bins < entries_of(w)) bins *= 2;
  return bins;
}
int warps_of(const Weight& w) { return bins_of(w) <= 64 ? kSumWarps : 1; }

// Sets of sums: a warp for each, eight to a multiprocessor, but at most one for each row and no more than the scratch
// holds.
int64_t sets_of(const Sums& p) {
  int64_t sets = int64_t(p.multiprocessors) * 8;
  const int64_t most = kMostPartial / (entries_of(p.w) * 4);
  if (sets > p.w.rows) sets = p.w.rows;
  if (sets > most) sets = most;
  return divide_up(sets > 1 ? sets : 1, warps_of(p.w)) * warps_of(p.w);
}

template <class T>
const char* sum_as(const Sums& s, void* stream) {
  SumsParams p{s, bins_of(s.w), warps_of(s.w), 0};
  const int shared = p.warps * p.bins * kWarp * 4;
  const dim3 threads(unsigned(p.warps * kWarp));
  if (s.w.group_size < 0) {
    const int64_t blocks = divide_up(s.w.rows, p.warps);
    const dim3 grid(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks));
    return launch(sum_rows_kernel<T>, {"sparse_codebook::sum_rows", grid, threads, shared, stream}, p);
  }
  p.table_sets = sets_of(s);
  const int64_t turns = divide_up(entries_of(s.w), p.bins);
  const dim3 grid(unsigned(p.table_sets / p.warps), unsigned(turns < 65535 ? turns : 65535));
  if (const char* error = launch(sum_rows_kernel<T>, {"sparse_codebook::sum_rows", grid, threads, shared, stream}, p))
    return error;
  return launch(sum_sets_kernel<T>,
                {"sparse_codebook::sum_sets", blocks_of(entries_of(s.w)), dim3(kCsrWarps * kWarp), 0, stream}, p);
}

}  // namespace

const char* offsets(const Csr& p, void* stream) {
  const dim3 threads(kCsrWarps * kWarp);
  if (const char* error = launch(count_kernel, {"sparse_codebook::count", blocks_of(p.w.rows), threads, 0, stream}, p))
    return error;
  return launch(scan_kernel, {"sparse_codebook::scan", dim3(1), dim3(kScanThreads), kScanThreads / kWarp * 4, stream},
                p);
}

const char* positions(const Csr& p, void* stream) {
  const Launch l{"sparse_codebook::positions", blocks_of(p.w.rows), dim3(kCsrWarps * kWarp), 0, stream};
  return p.type == DType::f32 ? launch(positions_kernel<float>, l, p) : launch(positions_kernel<Half>, l, p);
}

int64_t partial_bytes(const Sums& p) {
  return p.w.group_size < 0 || entries_of(p.w) == 0 ? 0 : sets_of(p) * entries_of(p.w) * 4;
}

const char* sum_members(const Sums& p, void* stream) {
  if (entries_of(p.w) == 0) return nullptr;
  switch (p.type) {
    case DType::f32:
      return sum_as<float>(p, stream);
    case DType::f16:
      return sum_as<Half>(p, stream);
    default:
      return sum_as<BFloat16>(p, stream);
  }
}

}  // namespace slim::cuda::sparse_codebook
