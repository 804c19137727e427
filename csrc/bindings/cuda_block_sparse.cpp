// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.block_sparse_* on CUDA tensors. Compiled by the host compiler; kernels are behind a header of plain
// structs.
#include "bindings/cuda_common.h"
#include "cuda/block_sparse/block_sparse.h"

namespace slim::cuda {

Tensor block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor>,
                           std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, bool relu) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  Call call(x);
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type() && values.dim() == 3,
                  "values: expected [blocks, r, c] of x's dtype");
  const int64_t r = values.size(1), c = values.size(2);
  STD_TORCH_CHECK(
      r > 0 && c > 0 && rows >= 0 && row_offsets.numel() == (rows + r - 1) / r + 1 && values.size(0) == columns.numel(),
      "block_row_offsets, block_columns: sizes do not fit the blocks");
  x = as_contiguous(x);
  values = as_aligned(values);
  bias = checked_cuda_bias(bias, x, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  block_sparse::Params p{};
  p.a = linear(call, x, y, rows, bias, relu);
  p.values = call.in(values, "values");
  p.block_columns = call.in_int32(columns, "block_columns");
  p.row_offsets = call.in_int32(row_offsets, "block_row_offsets");
  p.r = int32_t(r);
  p.c = int32_t(c);
  call.check(block_sparse::linear(p, call.stream()));
  return y;
}

}  // namespace slim::cuda
