// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/launch.cuh"
#include "cuda/sparse/sparse_heuristics.h"
#include "cuda/sparse/sparse_rows.cuh"

namespace slim::cuda::sparse {

namespace {

template <class T, int kM>
const char* dot(const RowParams& p, const DeviceInfo& device, void* stream) {
  const int64_t blocks = (p.a.n + kDotThreads / kWarp - 1) / (kDotThreads / kWarp);
  const dim3 grid(unsigned(std::min<int64_t>(blocks, 2 * device.multiprocessors)), unsigned((p.a.m + kM - 1) / kM));
  return launch(dot_kernel<T, kM>, {"sparse::dot", grid, dim3(kDotThreads), int(p.a.k * kM * 4), stream}, p);
}

template <class T, bool kConv, int kRows>
const char* panel(RowParams p, void* stream) {
  const int64_t row_tiles = (p.a.n / p.a.groups + kRows * kPanelWarps - 1) / (kRows * kPanelWarps);
  const int64_t blocks = row_tiles * p.a.groups * ((columns_of(p.a) + kPanelColumns - 1) / kPanelColumns);
  if (blocks > INT32_MAX) return "too many tiles for one grid";
  p.row_tiles = int32_t(row_tiles);
  return launch(panel_kernel<T, kConv, kRows>,
                {"sparse::panel", dim3(unsigned(blocks)), dim3(kPanelThreads), kPanelShared, stream}, p);
}

template <class T>
const char* rows_of(const RowParams& p, const DeviceInfo& device, void* stream) {
  switch (dot_columns(p.a)) {
    case 1:
      return dot<T, 1>(p, device, stream);
    case 2:
      return dot<T, 2>(p, device, stream);
    case 4:
      return dot<T, 4>(p, device, stream);
    default:
      break;
  }
  if constexpr (sizeof(T) == 4) {  // 16-bit values come this way only where nobody made a plan
    if (panels_fill(p.a, kPanelRows * kPanelWarps, device))
      return p.a.conv ? panel<T, true, kPanelRows>(p, stream) : panel<T, false, kPanelRows>(p, stream);
  }
  return p.a.conv ? panel<T, true, 2>(p, stream) : panel<T, false, 2>(p, stream);
}

template <class T>
const char* scatter_of(const RowParams& p, void* stream) {
  const int64_t ranges = (p.a.n / p.a.groups + kScatterRange - 1) / kScatterRange;
  const int64_t tiles = ranges * p.a.groups * columns_of(p.a);
  return launch(
      scatter_kernel<T>,
      {"sparse::scatter", dim3(unsigned(std::min<int64_t>(tiles, 1 << 20))), dim3(kWarp), kScatterRange * 4, stream},
      p);
}

}  // namespace

const char* rows(const RowParams& p, const DeviceInfo& device, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return rows_of<float>(p, device, stream);
    case DType::f16:
      return rows_of<Half>(p, device, stream);
    default:
      return rows_of<BFloat16>(p, device, stream);
  }
}

const char* scatter(const RowParams& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return scatter_of<float>(p, stream);
    case DType::f16:
      return scatter_of<Half>(p, stream);
    default:
      return scatter_of<BFloat16>(p, stream);
  }
}

}  // namespace slim::cuda::sparse
