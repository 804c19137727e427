// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.block_sparse_* on CUDA tensors. Compiled by the host compiler; kernels are behind a header of plain
// structs.
#include "bindings/cuda_block_sparse.h"
#include "bindings/cuda_common.h"

namespace slim::cuda {

using block_sparse::checked_shape;
using block_sparse::Shape;

namespace {

void check_values(const Tensor& values, const Tensor& x, const Tensor& columns) {
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type() && values.dim() == 3 && values.size(0) == columns.numel(),
                  "values: expected [blocks, r, c] of x's dtype");
}

block_sparse::Blocks blocks_of(Call& call, const Shape& s, const Tensor& columns, const Tensor& row_offsets) {
  return {nullptr,
          call.in_int32(columns, "block_columns"),
          call.in_int32(row_offsets, "block_row_offsets"),
          s.blocks,
          s.rows,
          s.width,
          int32_t(s.r),
          int32_t(s.c),
          int32_t(s.groups)};
}

void check_x(const Tensor& x, const char* name, bool conv) {
  STD_TORCH_CHECK(conv ? x.dim() == 4 : x.dim() >= 1, name, ": expected shape ",
                  conv ? "[N, C, H, W]" : "[..., features]");
}

// y = W x or W^T x, of which `a` says all but where the weight is.
void multiply(Call& call, const Tensor& x, const Activations& a, const Shape& s, const Tensor& values,
              const Tensor& columns, const Tensor& row_offsets, const std::optional<Tensor>& plan) {
  block_sparse::Product p{};
  p.a = a;
  p.w = blocks_of(call, s, columns, row_offsets);
  p.w.values = call.in(values, "values");
  p.transposed = s.transposed;
  if (plan && plan->numel()) {
    p.plan = call.in_int32(*plan, "plan");
    p.plan_words = plan->numel();
    const int64_t general = s.transposed ? s.block_columns() + 1 + 2 * s.blocks : -1;
    STD_TORCH_CHECK(s.tiled() ? s.slices(p.plan_words) >= 0 : p.plan_words == general,
                    "plan: made for a matrix of other sizes");
  }
  if (s.tiled() && p.plan) {
    const block_sparse::Tiling tiling = block_sparse::choose_tiling(a, s, p.plan_words, call.info());
    std::optional<Tensor> partial;
    if (tiling.splits > 1) partial = workspace(x, tiling.splits * a.n * columns_of(a) * int64_t(sizeof(float)));
    float* const sums = partial ? static_cast<float*>(call.out(*partial)) : nullptr;
    call.check(block_sparse::product_tiled(p, s, tiling, sums, call.stream()));
    return;
  }
  call.check(block_sparse::product_general(p, call.stream()));
}

// Activations beside the gradient of the output, which stands in y's place and is only read.
Activations with_gradient(Call& call, const Tensor& x, const Tensor& grad, const Shape& s) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: expected x's dtype");
  Activations a{};
  a.type = cuda_dtype(x, "x");
  a.x = call.in(x, "x");
  a.y = const_cast<void*>(call.in(grad, "grad"));
  a.k = s.width;
  a.n = s.rows;
  a.groups = s.groups;
  return a;
}

Tensor gradient(Call& call, const Tensor& x, const Activations& a, const Shape& s, const Tensor& columns,
                const Tensor& row_offsets) {
  Tensor out = like(x, {s.blocks, s.r, s.c});
  block_sparse::Gradient p{};
  p.a = a;
  p.w = blocks_of(call, s, columns, row_offsets);
  p.grad_values = call.out(out);
  call.check(block_sparse::grad_values_general(p, call.stream()));
  return out;
}

}  // namespace

Tensor block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                           std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, bool relu) {
  check_x(x, "x", false);
  Call call(x);
  check_values(values, x, columns);
  const Shape s =
      checked_shape(columns, row_offsets, rows, x.size(-1), values.size(1), values.size(2), 1, false);
  x = as_contiguous(x);
  values = as_aligned(values);
  bias = checked_cuda_bias(bias, x, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  multiply(call, x, linear(call, x, y, rows, bias, relu), s, values, columns, row_offsets, plan);
  return y;
}

Tensor block_sparse_linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                      std::optional<Tensor> backward_plan, int64_t width) {
  check_x(grad, "grad", false);
  Call call(grad);
  check_values(values, grad, columns);
  const Shape s =
      checked_shape(columns, row_offsets, grad.size(-1), width, values.size(1), values.size(2), 1, true);
  grad = as_contiguous(grad);
  values = as_aligned(values);
  std::vector<int64_t> sizes = sizes_of(grad);
  sizes.back() = width;
  Tensor out = like(grad, sizes);
  multiply(call, grad, linear(call, grad, out, width, std::nullopt, false), s, values, columns, row_offsets,
           backward_plan);
  return out;
}

Tensor block_sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor>,
                                       std::vector<int64_t> block_size) {
  check_x(x, "x", false);
  check_x(grad, "grad", false);
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  Call call(x);
  const int64_t rows = grad.size(-1);
  const Shape s =
      checked_shape(columns, row_offsets, rows, x.size(-1), block_size[0], block_size[1], 1, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  Activations a = with_gradient(call, x, grad, s);
  a.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.m *= x.size(i);
  STD_TORCH_CHECK(grad.numel() == a.m * rows, "grad: expected as many rows as x");
  return gradient(call, x, a, s, columns, row_offsets);
}

Tensor block_sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                           std::optional<Tensor>, std::optional<Tensor> bias, int64_t rows, std::vector<int64_t> kernel,
                           std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                           int64_t groups, bool relu) {
  Call call(x);
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  check_values(values, x, columns);
  const Shape s = checked_shape(columns, row_offsets, rows, g.channels / groups * g.kernel_h * g.kernel_w,
                                values.size(1), values.size(2), groups, false);
  x = as_contiguous(x);
  values = as_aligned(values);
  bias = checked_cuda_bias(bias, x, rows);
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  multiply(call, x, conv2d(call, x, y, g, rows, groups, bias, relu), s, values, columns, row_offsets, plan);
  return y;
}

Tensor block_sparse_conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                        std::optional<Tensor> backward_plan, int64_t width, int64_t groups) {
  Call call(grad);
  const ConvGeometry g = conv_geometry(grad, {1, 1}, {1, 1}, {0, 0}, {1, 1});
  check_values(values, grad, columns);
  const Shape s =
      checked_shape(columns, row_offsets, g.channels, width, values.size(1), values.size(2), groups, true);
  grad = as_contiguous(grad);
  values = as_aligned(values);
  Tensor out = like(grad, {g.batch, width * groups, g.height, g.width});
  multiply(call, grad, conv2d(call, grad, out, g, width * groups, groups, std::nullopt, false), s, values, columns,
           row_offsets, backward_plan);
  return out;
}

Tensor block_sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor>,
                                       std::vector<int64_t> block_size, std::vector<int64_t> kernel,
                                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                                       std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(block_size.size() == 2, "block_size: expected two ints");
  Call call(x);
  check_x(grad, "grad", true);
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  const int64_t rows = grad.size(1);
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  STD_TORCH_CHECK(grad.size(0) == g.batch && grad.size(2) == g.out_h && grad.size(3) == g.out_w,
                  "grad: expected the shape of the convolution's output");
  const Shape s = checked_shape(columns, row_offsets, rows, g.channels / groups * g.kernel_h * g.kernel_w,
                                block_size[0], block_size[1], groups, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  Activations a = with_gradient(call, x, grad, s);
  a.conv = true;
  a.geometry = g;
  return gradient(call, x, a, s, columns, row_offsets);
}

}  // namespace slim::cuda
