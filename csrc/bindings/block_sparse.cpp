// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.block_sparse_*: tensors in, raw pointers out.
#include "cpu/block_sparse/block_sparse.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::block_sparse {

namespace {

#include "bindings/kernels_in_use.inc"

Bsr bsr_of(const Tensor& columns, const Tensor& row_offsets, int64_t rows, int64_t width, int64_t r, int64_t c,
           int64_t groups) {
  STD_TORCH_CHECK(r > 0 && c > 0 && r <= 65535 && c <= 65535, "block_size: expected extents from 1 to 65535");
  STD_TORCH_CHECK(
      rows >= 0 && rows <= INT32_MAX && width >= 0 && groups > 0 && rows % groups == 0 && width <= INT32_MAX / groups,
      "groups: expected a divisor of the rows");
  Bsr bsr{int32_data(columns, "block_columns"),
          int32_data(row_offsets, "block_row_offsets"),
          rows,
          width,
          r,
          c,
          columns.numel(),
          groups};
  STD_TORCH_CHECK(row_offsets.numel() == bsr.block_row_count() + 1, "block_row_offsets: expected ceil(rows / r) + 1");
  return bsr;
}

std::vector<char> make_plan(const Bsr& bsr, int64_t taps, bool transposed) {
  std::vector<char> blob;
  const char* wrong = build_plan(bsr, taps, transposed, &blob);
  STD_TORCH_CHECK(!wrong, wrong);
  return blob;
}

// A plan that was handed in, checked against the sizes it must have, or one made for this call.
class PlanHolder {
 public:
  PlanHolder(const std::optional<Tensor>& given, const Bsr& bsr, int64_t taps, bool transposed) {
    if (given) {
      check_plan(*given, "block_sparse_plan");
      STD_TORCH_CHECK(view_plan(given->const_data_ptr(), given->numel(), bsr, transposed, &plan_),
                      "plan: made for a matrix of other sizes");
      return;
    }
    made_ = make_plan(bsr, taps, transposed);
    view_plan(made_.data(), int64_t(made_.size()), bsr, transposed, &plan_);
  }
  const Plan& operator*() const { return plan_; }

 private:
  std::vector<char> made_;
  Plan plan_{};
};

void check_values(const Tensor& values, const Tensor& x, const Tensor& columns) {
  check_same(values, x, "values");
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == columns.numel(), "values: expected shape [blocks, r, c]");
}

double work(const Params& p) {
  const PlanHeader& h = *p.plan.header;
  return 2.0 * double(h.blocks * h.block_rows * h.block_cols) * double(columns_of(p.a));
}

void run_forward(Params& p, const Tensor& values) {
  const Kernels& k = kernels();
  p.values = compute_values(values, p.a.dtype, nullptr);
  const int64_t groups = k.group_count(p);
  p.ranges = row_ranges(groups, std::max<int64_t>(1, p.plan.header->strips), work(p));
  run_tasks(groups * p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), work(p),
            [&](int64_t task, void* workspace) { k.forward(p, task, workspace); });
  value_scratch().trim();
}

Tensor run_grad_values(Params& p, const Tensor& x, const Bsr& bsr) {
  const Kernels& k = kernels();
  Tensor out = like(x, {bsr.blocks, bsr.r, bsr.c});
  p.grad_values = gradient_sums(out, p.a.dtype);
  p.ranges = row_ranges(1, std::max<int64_t>(1, p.plan.header->strips), work(p));
  if (columns_of(p.a) > 0)
    run_tasks(p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), work(p),
              [&](int64_t range, void* workspace) { k.grad_values(p, range, workspace); });
  finish_gradient(p.grad_values, out, p.a.dtype);
  value_scratch().trim();
  return out;
}

}  // namespace

Tensor plan(Tensor columns, Tensor row_offsets, std::vector<int64_t> block_size, int64_t rows, int64_t width,
            int64_t groups, int64_t taps, bool transposed) {
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  STD_TORCH_CHECK(taps > 0, "taps: expected a positive int");
  const Bsr bsr = bsr_of(columns, row_offsets, rows, width, block_size[0], block_size[1], groups);
  const std::vector<char> blob = make_plan(bsr, taps, transposed);
  Tensor out = torch::stable::new_empty(columns, {int64_t(blob.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), blob.data(), blob.size());
  return out;
}

Tensor linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, bool relu) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  check_values(values, x, columns);
  const Bsr bsr = bsr_of(columns, row_offsets, rows, x.size(-1), values.size(1), values.size(2), 1);
  const PlanHolder holder(plan, bsr, 1, false);
  x = as_contiguous(x);
  values = as_contiguous(values);
  bias = checked_bias(bias, x, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(x, x.const_data_ptr(), y.mutable_data_ptr(), bsr.width, rows, bias, relu);
  run_forward(p, values);
  return y;
}

Tensor linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                         std::optional<Tensor> backward_plan, int64_t width) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() >= 1, "grad: expected a CPU tensor [..., out_features]");
  check_values(values, grad, columns);
  const int64_t rows = grad.size(-1);
  const Bsr bsr = bsr_of(columns, row_offsets, rows, width, values.size(1), values.size(2), 1);
  const PlanHolder holder(backward_plan, bsr, 1, true);
  grad = as_contiguous(grad);
  values = as_contiguous(values);
  std::vector<int64_t> sizes = sizes_of(grad);
  sizes.back() = width;
  Tensor out = like(grad, sizes);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(grad, grad.const_data_ptr(), out.mutable_data_ptr(), rows, width, std::nullopt, false);
  run_forward(p, values);
  return out;
}

Tensor linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                          std::vector<int64_t> block_size) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  check_same(grad, x, "grad");
  STD_TORCH_CHECK(grad.dim() >= 1, "grad: expected shape [..., out_features]");
  const Bsr bsr = bsr_of(columns, row_offsets, grad.size(-1), x.size(-1), block_size[0], block_size[1], 1);
  const PlanHolder holder(plan, bsr, 1, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(x, x.const_data_ptr(), const_cast<void*>(grad.const_data_ptr()), bsr.width, bsr.rows,
                           std::nullopt, false);
  STD_TORCH_CHECK(grad.numel() == p.a.m * bsr.rows, "grad: expected as many rows as x");
  return run_grad_values(p, x, bsr);
}

Tensor conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, std::vector<int64_t> kernel,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
              bool relu) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), rows);
  const ConvGeometry& g = p.a.geometry;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  check_values(values, x, columns);
  const int64_t taps = g.kernel_h * g.kernel_w;
  const Bsr bsr =
      bsr_of(columns, row_offsets, rows, g.channels / groups * taps, values.size(1), values.size(2), groups);
  const PlanHolder holder(plan, bsr, taps, false);
  x = as_contiguous(x);
  values = as_contiguous(values);
  bias = checked_bias(bias, x, rows);
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  p.plan = *holder;
  p.a.x = x.const_data_ptr();
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  run_forward(p, values);
  return y;
}

Tensor conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                           std::optional<Tensor> backward_plan, int64_t width, int64_t groups) {
  STD_TORCH_CHECK(grad.is_cpu(), "grad: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(grad, pointwise_geometry(grad), 0);
  const ConvGeometry& g = p.a.geometry;
  check_values(values, grad, columns);
  const Bsr bsr = bsr_of(columns, row_offsets, g.channels, width, values.size(1), values.size(2), groups);
  p.a.n = width * groups;  // only now known not to overflow
  const PlanHolder holder(backward_plan, bsr, 1, true);
  grad = as_contiguous(grad);
  values = as_contiguous(values);
  Tensor out = like(grad, {g.batch, width * groups, g.height, g.width});
  p.plan = *holder;
  p.a.x = grad.const_data_ptr();
  p.a.y = out.mutable_data_ptr();
  run_forward(p, values);
  return out;
}

Tensor conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                          std::vector<int64_t> block_size, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  check_same(grad, x, "grad");
  STD_TORCH_CHECK(grad.dim() == 4, "grad: expected 4 dimensions");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), grad.size(1));
  const ConvGeometry& g = p.a.geometry;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  const int64_t taps = g.kernel_h * g.kernel_w;
  const Bsr bsr =
      bsr_of(columns, row_offsets, grad.size(1), g.channels / groups * taps, block_size[0], block_size[1], groups);
  STD_TORCH_CHECK(grad.size(0) == g.batch && grad.size(2) == g.out_h && grad.size(3) == g.out_w,
                  "grad: expected the shape of the convolution's output");
  const PlanHolder holder(plan, bsr, taps, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  p.plan = *holder;
  p.a.x = x.const_data_ptr();
  p.a.y = const_cast<void*>(grad.const_data_ptr());
  return run_grad_values(p, x, bsr);
}

}  // namespace slim::block_sparse
