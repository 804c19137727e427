// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.block_sparse_linear on CUDA tensors. Compiled by the host compiler; the kernel is behind a header
// of plain structs.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/common.h"
#include "bindings/families.h"
#include "cuda/block_sparse/block_sparse.h"

// Stream::nativeHandle() needs torch 2.13; this symbol is there from 2.11 on, but only in CUDA builds of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace slim::block_sparse {

Tensor linear_cuda(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor>,
                   std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, bool relu) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 1, "x: expected a CUDA tensor [..., in_features]");
  for (const Tensor* t : {&values, &columns, &row_offsets})
    STD_TORCH_CHECK(t->is_cuda() && t->get_device() == x.get_device(), "weight: expected the device of x");
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type() && values.dim() == 3,
                  "values: expected [blocks, r, c] of x's dtype");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Int && row_offsets.scalar_type() == ScalarType::Int,
                  "block_columns, block_row_offsets: expected int32");
  cuda::block_sparse::Params p{};
  p.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.m *= x.size(i);
  p.n = rows;
  p.k = x.size(-1);
  p.r = int32_t(values.size(1));
  p.c = int32_t(values.size(2));
  p.relu = relu;
  STD_TORCH_CHECK(
      p.r > 0 && p.c > 0 && row_offsets.numel() == (rows + p.r - 1) / p.r + 1 && values.size(0) == columns.numel(),
      "block_row_offsets, block_columns: sizes do not fit the blocks");
  switch (x.scalar_type()) {
    case ScalarType::Float:
      p.type = cuda::block_sparse::Type::f32;
      break;
    case ScalarType::Half:
      p.type = cuda::block_sparse::Type::f16;
      break;
    case ScalarType::BFloat16:
      p.type = cuda::block_sparse::Type::bf16;
      break;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  columns = torch::stable::contiguous(columns);
  row_offsets = torch::stable::contiguous(row_offsets);
  if (bias) {
    STD_TORCH_CHECK(
        bias->is_cuda() && bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == rows,
        "bias: expected one entry per output, of x's dtype and device");
    bias = torch::stable::contiguous(*bias);
  }
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  p.x = x.const_data_ptr();
  p.values = values.const_data_ptr();
  p.block_columns = static_cast<const int32_t*>(columns.const_data_ptr());
  p.row_offsets = static_cast<const int32_t*>(row_offsets.const_data_ptr());
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream) == 0, "no current CUDA stream");
  const char* error = cuda::block_sparse::linear(p, stream);
  STD_TORCH_CHECK(!error, "CUDA: ", error ? error : "");
  return y;
}

}  // namespace slim::block_sparse
