// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.sparse_* on CUDA tensors. Compiled by the host compiler; kernels are behind a header of plain
// structs.
#include "bindings/cuda_common.h"
#include "bindings/cuda_sparse_plan.h"
#include "cuda/sparse/sparse.h"
#include "cuda/sparse/sparse_heuristics.h"

namespace slim::cuda {

namespace {

using sparse::Layout;
using sparse::Shape;

// A weight as an operator gets it: positions and values, and a plan if somebody made one.
struct Weight {
  Tensor values, columns, row_offsets;
  Shape shape;  // of the matrix that is walked
  bool transposed;
  std::optional<Tensor> plan;
  Layout layout;

  Weight(Tensor values_, Tensor columns_, Tensor row_offsets_, std::optional<Tensor> plan_, int64_t width,
         int64_t groups, bool transposed_)
      : values(as_contiguous(values_)),
        columns(as_contiguous(columns_)),
        row_offsets(as_contiguous(row_offsets_)),
        shape(sparse_shape(row_offsets, columns.numel(), width, groups, transposed_)),
        transposed(transposed_),
        layout(layout_of(shape, transposed_)) {
    STD_TORCH_CHECK(
        columns.dim() == 1 && row_offsets.dim() == 1 && values.dim() == 1 && values.numel() == columns.numel(),
        "values: expected one entry per column index");
    if (plan_) {
      STD_TORCH_CHECK(plan_->numel() == layout.bytes, "plan: made for a matrix of other sizes");
      plan = as_aligned(*plan_);
    }
  }
};

const uint8_t* plan_bytes(Call& call, const Weight& w) { return call.in_bytes(*w.plan, "plan"); }

// The walked matrix in rows: the canonical one, or the transposed one of a plan.
sparse::RowParams row_params(Call& call, const Weight& w, const Activations& a) {
  sparse::RowParams p{};
  p.a = a;
  p.values = call.in(w.values, "values");
  if (w.transposed && w.plan) {
    const uint8_t* blob = plan_bytes(call, w);
    p.csr.columns = reinterpret_cast<const int32_t*>(blob + w.layout.columns);
    p.csr.row_offsets = reinterpret_cast<const int32_t*>(blob + w.layout.row_offsets);
    p.sources = reinterpret_cast<const int32_t*>(blob + w.layout.sources);
  } else {
    p.csr.columns = call.in_int32(w.columns, "columns");
    p.csr.row_offsets = call.in_int32(w.row_offsets, "row_offsets");
  }
  return p;
}

Tensor packed_of(Call& call, const Tensor& values, const Tensor& plan) {
  Tensor out = like(values, {values.numel()});
  call.check(sparse::pack(call.in(values, "values"), reinterpret_cast<const uint32_t*>(call.in_bytes(plan, "plan")),
                          values.numel(), int(values.element_size()), call.out(out), call.stream()));
  return out;
}

void run(Call& call, const Tensor& x, const Weight& w, const Activations& a, const std::optional<Tensor>& packed) {
  STD_TORCH_CHECK(w.values.scalar_type() == x.scalar_type(), "values: expected the dtype of x");
  if (a.n == 0 || columns_of(a) == 0) return;
  if (w.transposed && !w.plan) return call.check(sparse::scatter(row_params(call, w, a), call.stream()));
  // Values that change in every step are only brought into packed order where many columns repay it.
  if (a.type == DType::f32 || !w.plan || !sparse::tiles_pay(a, w.shape.nnz, packed.has_value()))
    return call.check(sparse::rows(row_params(call, w, a), call.info(), call.stream()));
  STD_TORCH_CHECK(!packed || (packed->scalar_type() == x.scalar_type() && packed->numel() == w.values.numel()),
                  "packed_values: expected the result of sparse_pack_values");
  const uint8_t* blob = plan_bytes(call, w);
  const Tensor ordered = packed ? as_aligned(*packed) : packed_of(call, w.values, *w.plan);
  const sparse::Tiles tiles{blob + w.layout.cells, reinterpret_cast<const uint32_t*>(blob + w.layout.starts),
                            int32_t(w.shape.strips()), int32_t(w.shape.strip_cells())};
  const int splits = sparse::splits_for(a, call.info());
  Tensor sums = workspace(x, splits == 1 ? 0 : 4 * splits * a.n * columns_of(a));
  call.check(sparse::tiles(a, tiles, call.in(ordered, "packed_values"), splits,
                           splits == 1 ? nullptr : static_cast<float*>(call.out(sums)), call.stream()));
}

}  // namespace

Tensor sparse_pack_values(Tensor values, Tensor plan) {
  STD_TORCH_CHECK(values.dim() == 1 && plan.dim() == 1 && plan.numel() >= 4 * values.numel(),
                  "plan: made for a matrix of other sizes");
  Call call(values);
  cuda_dtype(values, "values");
  return packed_of(call, as_contiguous(values), as_contiguous(plan));
}

Tensor sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                     std::optional<Tensor>, std::optional<Tensor> packed_values, std::optional<Tensor> bias,
                     bool relu) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  Call call(x);
  const Weight w(values, columns, row_offsets, plan, x.size(-1), 1, false);
  x = as_contiguous(x);
  bias = checked_cuda_bias(bias, x, w.shape.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = w.shape.rows;
  Tensor y = like(x, sizes);
  run(call, x, w, linear(call, x, y, w.shape.rows, bias, relu), packed_values);
  return y;
}

Tensor sparse_linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                std::optional<Tensor> backward_plan, int64_t width) {
  Call call(grad);
  const Weight w(values, columns, row_offsets, backward_plan, width, 1, true);
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(-1) == w.shape.depth, "grad: expected shape [..., out_features]");
  grad = as_contiguous(grad);
  std::vector<int64_t> sizes = sizes_of(grad);
  sizes.back() = width;
  Tensor out = like(grad, sizes);
  run(call, grad, w, linear(call, grad, out, width, std::nullopt, false), std::nullopt);
  return out;
}

Tensor sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor>) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  Call call(x);
  const int64_t rows = row_offsets.numel() - 1;
  STD_TORCH_CHECK(rows >= 0 && grad.dim() >= 1 && grad.size(-1) == rows && grad.scalar_type() == x.scalar_type(),
                  "grad: expected shape [..., out_features], of x's dtype");
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  columns = as_contiguous(columns);
  row_offsets = as_contiguous(row_offsets);
  Tensor out = like(x, {columns.numel()});
  sparse::GradParams p{};
  p.a.type = cuda_dtype(x, "x");
  p.a.x = call.in(x, "x");
  p.a.y = const_cast<void*>(call.in(grad, "grad"));
  p.a.k = x.size(-1);
  p.a.n = rows;
  p.a.m = 1;
  p.a.groups = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.a.m *= x.size(i);
  STD_TORCH_CHECK(grad.numel() == p.a.m * rows, "grad: expected as many rows as x");
  p.csr = {call.in_int32(columns, "columns"), call.in_int32(row_offsets, "row_offsets")};
  p.nnz = columns.numel();
  p.out = call.out(out);
  call.check(sparse::grad_values(p, call.stream()));
  return out;
}

Tensor sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                     std::optional<Tensor>, std::optional<Tensor> packed_values, std::optional<Tensor> bias,
                     std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, bool relu) {
  Call call(x);
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  const Weight w(values, columns, row_offsets, plan, g.channels / groups * g.kernel_h * g.kernel_w, groups, false);
  x = as_contiguous(x);
  const int64_t n = w.shape.rows * groups;
  bias = checked_cuda_bias(bias, x, n);
  Tensor y = like(x, {g.batch, n, g.out_h, g.out_w});
  run(call, x, w, conv2d(call, x, y, g, n, groups, bias, relu), packed_values);
  return y;
}

Tensor sparse_conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                  std::optional<Tensor> backward_plan, int64_t width, int64_t groups) {
  Call call(grad);
  const ConvGeometry g = conv_geometry(grad, {1, 1}, {1, 1}, {0, 0}, {1, 1});
  const Weight w(values, columns, row_offsets, backward_plan, width, groups, true);
  STD_TORCH_CHECK(g.channels == w.shape.depth * groups, "grad: expected shape [N, out_channels, H, W]");
  grad = as_contiguous(grad);
  Tensor out = like(grad, {g.batch, width * groups, g.height, g.width});
  run(call, grad, w, conv2d(call, grad, out, g, width * groups, groups, std::nullopt, false), std::nullopt);
  return out;
}

Tensor sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor>,
                                 std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups) {
  Call call(x);
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  const int64_t rows = row_offsets.numel() - 1;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0 && rows >= 0 && rows % groups == 0,
                  "groups: expected a divisor of the channels");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == g.batch && grad.size(1) == rows && grad.size(2) == g.out_h &&
                      grad.size(3) == g.out_w && grad.scalar_type() == x.scalar_type(),
                  "grad: expected the shape of the convolution's output, of x's dtype");
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  columns = as_contiguous(columns);
  row_offsets = as_contiguous(row_offsets);
  Tensor out = like(x, {columns.numel()});
  sparse::GradParams p{};
  p.a.type = cuda_dtype(x, "x");
  p.a.conv = true;
  p.a.geometry = g;
  p.a.x = call.in(x, "x");
  p.a.y = const_cast<void*>(call.in(grad, "grad"));
  p.a.k = g.channels / groups * g.kernel_h * g.kernel_w;
  p.a.n = rows;
  p.a.groups = groups;
  p.csr = {call.in_int32(columns, "columns"), call.in_int32(row_offsets, "row_offsets")};
  p.nnz = columns.numel();
  p.out = call.out(out);
  call.check(sparse::grad_values(p, call.stream()));
  return out;
}

}  // namespace slim::cuda
