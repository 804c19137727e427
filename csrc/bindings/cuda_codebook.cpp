// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.codebook_* on CUDA tensors.
#include "bindings/codebook_plan.h"
#include "bindings/cuda_common.h"
#include "cuda/codebook/codebook_heuristics.h"

namespace slim::cuda {

namespace {

// `tables` may be missing where only the positions are needed.
codebook::Weight weight_of(Call& call, const Tensor* tables, const Tensor& codes, int64_t rows, int64_t width,
                           int64_t bits, int64_t group_size, int64_t groups) {
  STD_TORCH_CHECK(codes.dim() == 1, "codes: expected 1 dimension");
  codebook::Weight w = codebook::checked_sizes(codes.numel(), rows, width, bits, group_size, groups);
  w.codes = call.in_bytes(codes, "codes");
  if (tables) {
    STD_TORCH_CHECK(tables->dim() == 2 && tables->size(0) == w.table_count && tables->size(1) == int64_t(1) << bits,
                    "codebook: expected shape [tables, 2**bits]");
    w.tables = call.in(*tables, "codebook");
  }
  return w;
}

void use_plan(Call& call, const std::optional<Tensor>& plan, codebook::Weight& w) {
  if (!plan) return;
  STD_TORCH_CHECK(plan->dim() == 1 && plan->numel() == codebook::plan_bytes(w.rows, w.width, w.bits, w.groups),
                  "plan: expected bytes made by codebook_cuda_plan, for a weight of these sizes");
  if (plan->numel() > 0) w.plan = call.in_bytes(*plan, "plan");
}

void run(Call& call, const Tensor& x, const Activations& a, const codebook::Weight& w) {
  const codebook::Choice choice = codebook::choose(a, w, call.info());
  if (choice.splits == 1) return call.check(codebook::forward(a, w, choice, nullptr, call.stream()));
  Tensor partial = workspace(x, choice.splits * a.n * columns_of(a) * 4);
  call.check(codebook::forward(a, w, choice, static_cast<float*>(call.out(partial)), call.stream()));
}

}  // namespace

// Whether entry 0 is a constant matters to gradients alone: autograd finds it among the forward's arguments.
Tensor codebook_linear(Tensor x, Tensor codebook, Tensor codes, std::optional<Tensor> plan, int64_t rows, int64_t bits,
                       int64_t group_size, bool, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  Call call(x);
  STD_TORCH_CHECK(codebook.scalar_type() == x.scalar_type(), "codebook: expected x's dtype");
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  if (plan) plan = as_aligned(*plan);
  bias = checked_cuda_bias(bias, x, rows);
  codebook::Weight w = weight_of(call, &codebook, codes, rows, x.size(-1), bits, group_size, 1);
  use_plan(call, plan, w);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  run(call, x, linear(call, x, y, rows, bias, relu), w);
  return y;
}

Tensor codebook_conv2d(Tensor x, Tensor codebook, Tensor codes, std::optional<Tensor> plan, int64_t rows, int64_t bits,
                       int64_t group_size, bool, std::optional<Tensor> bias, std::vector<int64_t> kernel,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       int64_t groups, bool relu) {
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  Call call(x);
  STD_TORCH_CHECK(codebook.scalar_type() == x.scalar_type(), "codebook: expected x's dtype");
  STD_TORCH_CHECK(rows >= 0 && groups > 0 && g.channels % groups == 0 && rows % groups == 0,
                  "groups: expected a divisor of the channels and of the rows");
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  if (plan) plan = as_aligned(*plan);
  bias = checked_cuda_bias(bias, x, rows);
  codebook::Weight w =
      weight_of(call, &codebook, codes, rows, g.channels / groups * g.kernel_h * g.kernel_w, bits, group_size, groups);
  use_plan(call, plan, w);
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  run(call, x, conv2d(call, x, y, g, rows, groups, bias, relu), w);
  return y;
}

Tensor codebook_decode(Tensor codebook, Tensor codes, int64_t rows, int64_t width, int64_t bits, int64_t group_size) {
  Call call(codebook);
  const DType type = cuda_dtype(codebook, "codebook");
  codebook = as_contiguous(codebook);
  const codebook::Weight w = weight_of(call, &codebook, codes, rows, width, bits, group_size, 1);
  Tensor out = like(codebook, {rows, width});
  call.check(codebook::decode(w, type, call.out(out), call.stream()));
  return out;
}

Tensor codebook_sum_members(Tensor grad_weight, Tensor codes, int64_t bits, int64_t group_size, bool zero) {
  STD_TORCH_CHECK(grad_weight.dim() == 2, "grad_weight: expected shape [rows, width]");
  Call call(grad_weight);
  const DType type = cuda_dtype(grad_weight, "grad_weight");
  grad_weight = as_contiguous(grad_weight);
  const codebook::Weight w =
      weight_of(call, nullptr, codes, grad_weight.size(0), grad_weight.size(1), bits, group_size, 1);
  const int64_t entries = int64_t(1) << bits;
  Tensor partial = workspace(grad_weight, codebook::sum_chunks(w) * w.table_count * entries * 4);
  Tensor sums = like(grad_weight, {w.table_count, entries});
  float* const workspace = static_cast<float*>(call.out(partial));
  call.check(codebook::sum_members(w, type, call.in(grad_weight, "grad_weight"), zero, workspace, call.out(sums),
                                   call.stream()));
  return sums;
}

}  // namespace slim::cuda
