// SPDX-License-Identifier: Apache-2.0
// The plan that the CUDA kernels of sparse_codebook want, made on the CPU: plain C++, in every build.
#include "bindings/common.h"
#include "bindings/families.h"
#include "cuda/sparse_codebook/sparse_codebook_plan.h"

namespace slim::cuda {

namespace {

template <class T>
const T* host_data(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.is_contiguous(), name,
                  ": expected a contiguous 1-D CPU tensor of ", type == ScalarType::Int ? "int32" : "uint8");
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace

Tensor sparse_codebook_plan(Tensor codes, Tensor gaps, Tensor row_offsets, int64_t width, int64_t groups,
                            int64_t bits) {
  sparse_codebook::Stream s{};
  s.gaps = host_data<uint8_t>(gaps, "gaps", ScalarType::Byte);
  s.codes = host_data<uint8_t>(codes, "codes", ScalarType::Byte);
  s.row_offsets = host_data<int32_t>(row_offsets, "row_offsets", ScalarType::Int);
  s.entries = gaps.numel();
  s.code_bytes = codes.numel();
  s.rows = row_offsets.numel() - 1;
  s.width = width;
  s.groups = groups;
  s.bits = bits;
  STD_TORCH_CHECK(s.rows >= 0, "row_offsets: expected at least one entry");
  STD_TORCH_CHECK(s.entries <= INT32_MAX, "gaps: expected fewer than 2**31 entries");
  STD_TORCH_CHECK(width >= 0 && groups > 0 && s.rows % groups == 0 && width <= INT32_MAX / groups,
                  "groups: expected a divisor of the rows");
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits: expected 1 to 8");
  STD_TORCH_CHECK(s.code_bytes == (s.entries * bits + 7) / 8, "codes: expected a stream of one index per entry");
  std::vector<unsigned char> blob;
  const char* wrong = sparse_codebook::build_codes_plan(s, &blob);
  STD_TORCH_CHECK(!wrong, wrong);
  Tensor out = torch::stable::new_empty(gaps, {int64_t(blob.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), blob.data(), blob.size());
  return out;
}

}  // namespace slim::cuda
