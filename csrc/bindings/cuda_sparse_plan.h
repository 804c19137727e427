// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.sparse_cuda_plan: made on the CPU, by every build, for the CUDA kernels and for those in the
// emulator.
#pragma once

#include "bindings/common.h"
#include "cuda/sparse/sparse_plan.h"

namespace slim::cuda {

// Of the matrix that a plan walks; `width` columns in each of `groups`.
inline sparse::Shape sparse_shape(const Tensor& row_offsets, int64_t nnz, int64_t width, int64_t groups,
                                  bool transposed) {
  const int64_t rows = row_offsets.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, "row_offsets: expected at least one entry");
  STD_TORCH_CHECK(width >= 0 && groups > 0 && rows % groups == 0 && width <= INT32_MAX / groups && rows <= INT32_MAX,
                  "groups: expected a divisor of the rows");
  const sparse::Shape s{rows / groups, width, groups, nnz};
  STD_TORCH_CHECK(s.strips() <= INT32_MAX && nnz <= INT32_MAX, "columns: expected fewer than 2**31");
  return transposed ? sparse::Shape{width, rows / groups, groups, nnz} : s;
}

inline Tensor sparse_plan(Tensor columns, Tensor row_offsets, int64_t width, int64_t groups, bool transposed) {
  using namespace sparse;
  const Shape given = sparse_shape(row_offsets, columns.numel(), width, groups, false);
  const Shape shape = sparse_shape(row_offsets, columns.numel(), width, groups, transposed);
  Csr csr{int32_data(columns, "columns"), int32_data(row_offsets, "row_offsets")};
  const char* wrong = check_csr(csr, given);
  STD_TORCH_CHECK(!wrong, wrong);
  const Layout layout = layout_of(shape, transposed);
  Tensor out = torch::stable::new_empty(columns, {layout.bytes}, ScalarType::Byte);
  auto* const blob = static_cast<unsigned char*>(out.mutable_data_ptr());
  std::memset(blob, 0, size_t(layout.bytes));
  const int32_t* sources = nullptr;
  if (transposed) {
    auto* const offsets = reinterpret_cast<int32_t*>(blob + layout.row_offsets);
    auto* const rows = reinterpret_cast<int32_t*>(blob + layout.columns);
    auto* const from = reinterpret_cast<int32_t*>(blob + layout.sources);
    transpose(csr, given, offsets, rows, from);
    csr = {rows, offsets};
    sources = from;
  }
  build_tiles(csr, shape, sources, reinterpret_cast<uint32_t*>(blob + layout.order), blob + layout.cells,
              reinterpret_cast<uint32_t*>(blob + layout.starts));
  return out;
}

}  // namespace slim::cuda
