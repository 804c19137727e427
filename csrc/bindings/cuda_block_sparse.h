// SPDX-License-Identifier: Apache-2.0
// What the operators of block_sparse for CUDA share with the one that makes their plans.
#pragma once

#include "bindings/common.h"
#include "cuda/block_sparse/block_sparse.h"

namespace slim::cuda::block_sparse {

// Sizes checked so that no index of a kernel can leave its tensor, provided that the positions themselves are valid.
inline Shape checked_shape(const Tensor& columns, const Tensor& row_offsets, int64_t rows, int64_t width, int64_t r, int64_t c,
                    int64_t groups, bool transposed) {
  STD_TORCH_CHECK(r > 0 && c > 0 && r <= 65535 && c <= 65535, "block_size: expected extents from 1 to 65535");
  STD_TORCH_CHECK(
      rows >= 0 && rows <= INT32_MAX && width >= 0 && groups > 0 && rows % groups == 0 && width <= INT32_MAX / groups,
      "groups: expected a divisor of the rows");
  STD_TORCH_CHECK(columns.dim() == 1 && row_offsets.dim() == 1 && columns.numel() <= INT32_MAX &&
                      row_offsets.numel() == (rows + r - 1) / r + 1,
                  "block_row_offsets: expected ceil(rows / r) + 1");
  return {rows, width, r, c, groups, columns.numel(), transposed};
}

}  // namespace slim::cuda::block_sparse
