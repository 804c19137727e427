// SPDX-License-Identifier: Apache-2.0
// The plan that the CUDA kernels of block_sparse want, made on the CPU: plain C++, in every build.
#include "bindings/cuda_block_sparse.h"
#include "bindings/families.h"
#include "cuda/block_sparse/block_sparse_plan.h"

namespace slim::cuda {

Tensor block_sparse_plan(Tensor columns, Tensor row_offsets, std::vector<int64_t> block_size, int64_t rows,
                         int64_t width, int64_t groups, bool transposed) {
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  const block_sparse::Shape s =
      block_sparse::checked_shape(columns, row_offsets, rows, width, block_size[0], block_size[1], groups, transposed);
  std::vector<int32_t> words;
  const char* wrong = block_sparse::build_plan(s, int32_data(columns, "block_columns"),
                                               int32_data(row_offsets, "block_row_offsets"), &words);
  STD_TORCH_CHECK(!wrong, wrong);
  Tensor out = like(columns, {int64_t(words.size())});
  if (!words.empty()) std::memcpy(out.mutable_data_ptr(), words.data(), words.size() * sizeof(int32_t));
  return out;
}

}  // namespace slim::cuda
