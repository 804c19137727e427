// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.codebook_cuda_plan: made on the CPU, by every build, for the CUDA kernels and for those in the
// emulator.
#pragma once

#include "bindings/common.h"
#include "cuda/codebook/codebook_plan.h"

namespace slim::cuda::codebook {

// Every index of `bits` bits is one that a table has, so sizes are all there is to check.
inline Weight checked_sizes(int64_t codes, int64_t rows, int64_t width, int64_t bits, int64_t group_size,
                            int64_t groups) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits: expected 1 to 8");
  STD_TORCH_CHECK(group_size >= kTablePerRow, "group_size: expected 0 (one table), -1 (a table per row) or a size");
  STD_TORCH_CHECK(rows >= 0 && width >= 0 && rows <= INT32_MAX && width <= INT32_MAX / std::max<int64_t>(1, rows),
                  "rows: expected fewer than 2**31 weights");
  STD_TORCH_CHECK(groups > 0 && groups <= INT32_MAX && rows % groups == 0, "groups: expected a divisor of the rows");
  STD_TORCH_CHECK(codes == (rows * width * bits + 7) / 8, "codes: expected ceil(rows * width * bits / 8) bytes");
  Weight w{};
  w.bytes = codes;
  w.rows = rows;
  w.width = width;
  w.group_size = group_size;
  w.table_count = group_size == kOneTable      ? 1
                  : group_size == kTablePerRow ? rows
                                               : (width + group_size - 1) / group_size;
  w.bits = int32_t(bits);
  w.groups = int32_t(groups);
  return w;
}

inline Tensor plan(Tensor codes, int64_t rows, int64_t width, int64_t bits, int64_t groups) {
  STD_TORCH_CHECK(
      codes.is_cpu() && codes.scalar_type() == ScalarType::Byte && codes.dim() == 1 && codes.is_contiguous(),
      "codes: expected contiguous bytes on the CPU");
  checked_sizes(codes.numel(), rows, width, bits, kOneTable, groups);
  Tensor plan = like(codes, {plan_bytes(rows, width, bits, groups)});
  build_plan(static_cast<const uint8_t*>(codes.const_data_ptr()), codes.numel(), rows, width, int(bits), groups,
             static_cast<unsigned char*>(plan.mutable_data_ptr()));
  return plan;
}

}  // namespace slim::cuda::codebook
