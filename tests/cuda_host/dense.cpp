// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch_cuda_host.dense_*: the main loops by themselves, for tests/cuda/test_matmul.py.
#include "dense.h"

#include "bindings/cuda_common.h"

namespace slim::cuda {

namespace {

Tensor run(Call& call, const Tensor& x, Tensor& y, Activations a, const Tensor& weight, int64_t tile, int64_t kind,
           int64_t splits) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == a.n && weight.size(1) % 16 == 0 && weight.size(1) >= a.k &&
                      weight.scalar_type() == x.scalar_type(),
                  "weight: expected [n, k rounded up to 16]");
  STD_TORCH_CHECK(splits >= 1, "splits: expected at least 1");
  Tensor partial = workspace(x, splits == 1 ? 0 : splits * y.numel() * 4);
  dense::Params p{};
  p.a = a;
  p.weight = call.in(weight, "weight");
  p.stride = weight.size(1);
  p.tile = int(tile);
  p.kind = int(kind);
  p.splits = int(splits);
  p.partial = static_cast<float*>(call.out(partial));
  call.check(dense::matmul(p, call.stream()));
  return y;
}

Tensor dense_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu, int64_t tile, int64_t kind,
                    int64_t splits) {
  Call call(x);
  const int64_t n = weight.size(0);
  bias = checked_cuda_bias(bias, x, n);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = n;
  Tensor y = like(x, sizes);
  return run(call, x, y, linear(call, x, y, n, bias, relu), as_aligned(weight), tile, kind, splits);
}

Tensor dense_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> kernel,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    int64_t groups, bool relu, int64_t tile, int64_t kind, int64_t splits) {
  Call call(x);
  const int64_t n = weight.size(0);
  bias = checked_cuda_bias(bias, x, n);
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  Tensor y = like(x, {g.batch, n, g.out_h, g.out_w});
  return run(call, x, y, conv2d(call, x, y, g, n, groups, bias, relu), as_aligned(weight), tile, kind, splits);
}

Tensor run_outer(Call& call, const Tensor& x, const Tensor& grad, Activations a, int64_t tile, int64_t kind,
                 int64_t splits) {
  STD_TORCH_CHECK(splits >= 1 && grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
  Tensor values = like(x, {a.n, a.k});
  Tensor partial = workspace(x, splits == 1 ? 0 : splits * values.numel() * 4);
  a.y = const_cast<void*>(call.in(grad, "grad"));
  dense::OuterParams p{a, call.out(values), int(tile), int(kind), int(splits), static_cast<float*>(call.out(partial))};
  call.check(dense::outer(p, call.stream()));
  return values;
}

Tensor dense_linear_grad(Tensor grad, Tensor x, int64_t tile, int64_t kind, int64_t splits) {
  Call call(x);
  Activations a{};
  a.type = cuda_dtype(x, "x");
  a.x = call.in(x, "x");
  a.m = x.size(0);
  a.k = x.size(1);
  a.n = grad.size(1);
  a.groups = 1;
  return run_outer(call, x, grad, a, tile, kind, splits);
}

Tensor dense_conv2d_grad(Tensor grad, Tensor x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, int64_t tile,
                         int64_t kind, int64_t splits) {
  Call call(x);
  Activations a{};
  a.type = cuda_dtype(x, "x");
  a.conv = true;
  a.x = call.in(x, "x");
  a.geometry = conv_geometry(x, kernel, stride, padding, dilation);
  a.k = x.size(1) / groups * kernel[0] * kernel[1];
  a.n = grad.size(1);
  a.groups = groups;
  return run_outer(call, x, grad, a, tile, kind, splits);
}

}  // namespace

}  // namespace slim::cuda

#define GEOMETRY "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"

STABLE_TORCH_LIBRARY_FRAGMENT(slimtorch_cuda_host, m) {
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias, bool relu, int tile, int kind, int splits) -> Tensor");
  m.def("dense_conv2d(Tensor x, Tensor weight, Tensor? bias, " GEOMETRY
        ", bool relu, int tile, int kind, int splits) -> Tensor");
  m.def("dense_linear_grad(Tensor grad, Tensor x, int tile, int kind, int splits) -> Tensor");
  m.def("dense_conv2d_grad(Tensor grad, Tensor x, " GEOMETRY ", int tile, int kind, int splits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slimtorch_cuda_host, CPU, m) {
  m.impl("dense_linear", TORCH_BOX(&slim::cuda::dense_linear));
  m.impl("dense_conv2d", TORCH_BOX(&slim::cuda::dense_conv2d));
  m.impl("dense_linear_grad", TORCH_BOX(&slim::cuda::dense_linear_grad));
  m.impl("dense_conv2d_grad", TORCH_BOX(&slim::cuda::dense_conv2d_grad));
}
