// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.sparse_codebook_* on CUDA tensors.
#include "bindings/cuda_common.h"
#include "cuda/sparse_codebook/sparse_codebook.h"
#include "cuda/sparse_codebook/sparse_codebook_plan.h"

namespace slim::cuda {

namespace {

// The stored tensors, kept alive and aligned for a launch. That a stream is sound cannot be asked without waiting for the
// device; kernels touch nothing else if it is not.
struct Stored {
  Tensor codebook, codes, gaps, row_offsets;
  sparse_codebook::Weight w{};

  // Positions alone.
  Stored(Call& call, const Tensor& given_gaps, const Tensor& given_offsets, int64_t width)
      : codebook(given_gaps),
        codes(given_gaps),
        gaps(as_aligned(given_gaps)),
        row_offsets(as_contiguous(given_offsets)) {
    STD_TORCH_CHECK(gaps.dim() == 1 && row_offsets.dim() == 1 && row_offsets.numel() > 0,
                    "gaps, row_offsets: expected 1-D tensors, an offset at least");
    w.gaps = call.in_bytes(gaps, "gaps");
    w.row_offsets = call.in_int32(row_offsets, "row_offsets");
    w.rows = row_offsets.numel() - 1;
    w.width = width;
    w.entries = gaps.numel();
    STD_TORCH_CHECK(w.entries <= INT32_MAX, "gaps: expected fewer than 2**31 entries");
    STD_TORCH_CHECK(width >= 0 && width <= INT32_MAX && (width > 0 || w.entries == 0),
                    "gaps: expected no entries where there are no columns");
  }

  Stored(Call& call, const Tensor& given_codebook, const Tensor& given_codes, const Tensor& given_gaps,
         const Tensor& given_offsets, int64_t width, int64_t bits, int64_t group_size)
      : Stored(call, given_gaps, given_offsets, width) {
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits: expected 1 to 8");
    STD_TORCH_CHECK(group_size >= -1 && group_size <= INT32_MAX,
                    "group_size: expected a size, 0 for None, -1 for a row");
    codebook = as_aligned(given_codebook);
    codes = as_aligned(given_codes);
    w.bits = int32_t(bits);
    w.group_size = int32_t(group_size);
    w.tables = group_size == 0 ? 1 : group_size < 0 ? w.rows : (width + group_size - 1) / group_size;
    STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) == w.tables && codebook.size(1) == int64_t(1) << bits,
                    "codebook: expected shape [tables, 2**bits]");
    STD_TORCH_CHECK(w.tables <= INT32_MAX >> bits, "codebook: expected fewer than 2**31 entries");
    w.codebook = call.in(codebook, "codebook");
    w.codes = call.in_bytes(codes, "codes");
    w.code_bytes = codes.numel();
    STD_TORCH_CHECK(codes.dim() == 1 && w.code_bytes == (w.entries * bits + 7) / 8,
                    "codes: expected a stream of one index per entry");
  }
};

// The parts of a plan. Of what is in it only the sizes can be checked here.
sparse_codebook::Codes codes_of(Call& call, const Tensor& plan, const sparse_codebook::Weight& w, int64_t groups) {
  const sparse_codebook::CodesLayout layout(w.rows, w.width, groups, w.bits);
  STD_TORCH_CHECK(plan.numel() >= layout.bytes(0) && plan.numel() <= layout.bytes(w.entries) &&
                      reinterpret_cast<uintptr_t>(plan.const_data_ptr()) % 16 == 0,
                  "plan: expected one of sparse_codebook_cuda_plan for a matrix of these sizes");
  const uint8_t* blob = call.in_bytes(plan, "plan");
  return {blob, reinterpret_cast<const uint32_t*>(blob + layout.starts), blob + layout.codes, layout.bits};
}

// `p.a` and `p.w` are set.
void run_forward(Call& call, const Tensor& x, const SLIM_OPT& given_plan, sparse_codebook::Params& p) {
  SLIM_OPT plan;
  if (given_plan) {
    plan = as_aligned(*given_plan);
    p.codes = codes_of(call, *plan, p.w, p.a.groups);
  }
  p.device = call.info();
  const int64_t bytes = sparse_codebook::scratch_bytes(p);
  SLIM_OPT scratch;
  if (bytes > 0) {
    scratch = workspace(x, bytes);
    p.scratch = call.out(*scratch);
  }
  call.check(sparse_codebook::forward(p, call.stream()));
}

sparse_codebook::Csr csr_of(const Stored& stored, DType type, int32_t* offsets) {
  return {stored.w, type, offsets, nullptr, nullptr, 0};
}

// Offsets of the compressed sparse rows.
Tensor csr_offsets(Call& call, const Stored& stored) {
  Tensor offsets = torch::stable::new_empty(stored.gaps, {stored.w.rows + 1}, ScalarType::Int);
  call.check(
      sparse_codebook::offsets(csr_of(stored, DType::f32, static_cast<int32_t*>(call.out(offsets))), call.stream()));
  return offsets;
}

}  // namespace

Tensor sparse_codebook_linear(Tensor x, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, SLIM_OPT plan,
                              SLIM_OPT, SLIM_OPT, SLIM_OPT, SLIM_OPT, int64_t bits, int64_t group_size, SLIM_OPT bias,
                              bool relu) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  Call call(x);
  STD_TORCH_CHECK(codebook.scalar_type() == x.scalar_type(), "codebook: expected a tensor of x's dtype");
  const Stored stored(call, codebook, codes, gaps, row_offsets, x.size(-1), bits, group_size);
  x = as_contiguous(x);
  bias = checked_cuda_bias(bias, x, stored.w.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = stored.w.rows;
  Tensor y = like(x, sizes);
  sparse_codebook::Params p{};
  p.a = linear(call, x, y, stored.w.rows, bias, relu);
  p.w = stored.w;
  run_forward(call, x, plan, p);
  return y;
}

Tensor sparse_codebook_conv2d(Tensor x, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, SLIM_OPT plan,
                              SLIM_OPT, SLIM_OPT, SLIM_OPT, SLIM_OPT, int64_t bits, int64_t group_size, SLIM_OPT bias,
                              SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups,
                              bool relu) {
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  Call call(x);
  STD_TORCH_CHECK(codebook.scalar_type() == x.scalar_type(), "codebook: expected a tensor of x's dtype");
  const int64_t rows = row_offsets.numel() - 1;
  STD_TORCH_CHECK(rows >= 0 && groups > 0 && g.channels % groups == 0 && rows % groups == 0,
                  "groups: expected a divisor of the channels");
  const Stored stored(call, codebook, codes, gaps, row_offsets, g.channels / groups * g.kernel_h * g.kernel_w, bits,
                      group_size);
  x = as_contiguous(x);
  bias = checked_cuda_bias(bias, x, rows);
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  sparse_codebook::Params p{};
  p.a = conv2d(call, x, y, g, rows, groups, bias, relu);
  p.w = stored.w;
  run_forward(call, x, plan, p);
  return y;
}

// Waits for the device: how many columns there are is known only there.
std::tuple<Tensor, Tensor> sparse_codebook_positions(Tensor gaps, Tensor row_offsets, int64_t width) {
  Call call(gaps);
  const Stored stored(call, gaps, row_offsets, width);
  Tensor offsets = csr_offsets(call, stored);
  const Tensor last = torch::stable::to(torch::stable::narrow(offsets, 0, stored.w.rows, 1),
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int64_t weights = *static_cast<const int32_t*>(last.const_data_ptr());
  Tensor columns = torch::stable::new_empty(gaps, {weights}, ScalarType::Int);
  sparse_codebook::Csr p = csr_of(stored, DType::f32, static_cast<int32_t*>(offsets.mutable_data_ptr()));
  p.weights = weights;
  p.columns = static_cast<int32_t*>(call.out(columns));
  call.check(sparse_codebook::positions(p, call.stream()));
  return {columns, offsets};
}

Tensor sparse_codebook_decode(Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, Tensor columns,
                              int64_t width, int64_t bits, int64_t group_size) {
  Call call(codebook);
  const Stored stored(call, codebook, codes, gaps, row_offsets, width, bits, group_size);
  Tensor values = like(codebook, {columns.numel()});
  Tensor offsets = csr_offsets(call, stored);
  sparse_codebook::Csr p =
      csr_of(stored, cuda_dtype(codebook, "codebook"), static_cast<int32_t*>(offsets.mutable_data_ptr()));
  p.weights = columns.numel();
  p.values = call.out(values);
  call.check(sparse_codebook::positions(p, call.stream()));
  return values;
}

Tensor sparse_codebook_sum_members(Tensor values, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets,
                                   int64_t width, int64_t bits, int64_t group_size) {
  Call call(codebook);
  const Stored stored(call, codebook, codes, gaps, row_offsets, width, bits, group_size);
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Float,
                  "values: expected one float32 for each weight");
  values = as_contiguous(values);
  Tensor out = like(codebook, sizes_of(codebook)), offsets = csr_offsets(call, stored);
  sparse_codebook::Sums p{};
  p.w = stored.w;
  p.type = cuda_dtype(codebook, "codebook");
  p.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
  p.values = call.in<float>(values, "values", ScalarType::Float);
  p.weights = values.numel();
  p.multiprocessors = call.info().multiprocessors;
  Tensor scratch = workspace(codebook, sparse_codebook::partial_bytes(p));
  p.partial = static_cast<float*>(call.out(scratch));
  p.sums = call.out(out);
  call.check(sparse_codebook::sum_members(p, call.stream()));
  return out;
}

}  // namespace slim::cuda
