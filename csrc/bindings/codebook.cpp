// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.codebook_*: tensors in, raw pointers out.
#include "cpu/codebook/codebook.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::codebook {

namespace {

#include "bindings/kernels_in_use.inc"

// Every index of `bits` bits is one that a table has, so sizes are all there is to check. `codebook` may be missing
// where only the positions are needed.
Weight weight_of(const Tensor* codebook, const Tensor& codes, DType dtype, int64_t rows, int64_t width, int64_t bits,
                 int64_t group_size) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits: expected 1 to 8");
  STD_TORCH_CHECK(group_size >= kTablePerRow, "group_size: expected 0 (one table), -1 (a table per row) or a size");
  STD_TORCH_CHECK(rows >= 0 && width >= 0 && rows <= INT32_MAX && width <= INT32_MAX / std::max<int64_t>(1, rows),
                  "rows: expected fewer than 2**31 weights");
  STD_TORCH_CHECK(codes.is_cpu() && codes.scalar_type() == ScalarType::Byte && codes.dim() == 1 &&
                      codes.is_contiguous() && codes.numel() == (rows * width * bits + 7) / 8,
                  "codes: expected contiguous bytes on the CPU, ceil(rows * width * bits / 8)");
  const int64_t tables = group_size == kOneTable      ? 1
                         : group_size == kTablePerRow ? rows
                                                      : (width + group_size - 1) / group_size;
  if (codebook)
    STD_TORCH_CHECK(codebook->dim() == 2 && codebook->size(0) == tables && codebook->size(1) == int64_t(1) << bits,
                    "codebook: expected shape [tables, 2**bits]");
  return {dtype,         static_cast<const uint8_t*>(codes.const_data_ptr()),
          codes.numel(), codebook ? codebook->const_data_ptr() : nullptr,
          rows,          width,
          int(bits),     group_size,
          tables};
}

void run_forward(Params& p) {
  const Kernels& k = kernels();
  const double flops = 2.0 * double(p.w.rows) * double(p.w.width) * double(columns_of(p.a));
  const int64_t groups = k.group_count(p);
  p.ranges = row_ranges(groups, std::max<int64_t>(1, (p.w.rows + 31) / 32), flops);
  run_tasks(groups * p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), flops,
            [&](int64_t task, void* workspace) { k.forward(p, task, workspace); });
}

// Into how many pieces of equal rows work over the whole weight is cut. It must not depend on the number of threads:
// the pieces' sums are added up.
int64_t piece_count(const Weight& w) {
  return std::max<int64_t>(1, std::min<int64_t>({16, w.rows, w.rows * w.width / 65536}));
}

}  // namespace

// Whether entry 0 is a constant matters to gradients alone: autograd finds it among the forward's arguments.
Tensor linear(Tensor x, Tensor codebook, Tensor codes, std::optional<Tensor> plan, int64_t rows, int64_t bits,
              int64_t group_size, bool, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(!plan, "plan: expected None on the CPU, where kernels read the codes as they are");
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  check_same(codebook, x, "codebook");
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  bias = checked_bias(bias, x, rows);
  Params p{};
  p.w = weight_of(&codebook, codes, dtype_of(x, "x"), rows, x.size(-1), bits, group_size);
  p.groups = 1;
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  p.a = linear_activations(x, x.const_data_ptr(), y.mutable_data_ptr(), p.w.width, rows, bias, relu);
  run_forward(p);
  return y;
}

Tensor conv2d(Tensor x, Tensor codebook, Tensor codes, std::optional<Tensor> plan, int64_t rows, int64_t bits,
              int64_t group_size, bool, std::optional<Tensor> bias, std::vector<int64_t> kernel,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
              bool relu) {
  STD_TORCH_CHECK(!plan, "plan: expected None on the CPU, where kernels read the codes as they are");
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  check_same(codebook, x, "codebook");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), rows);
  const ConvGeometry& g = p.a.geometry;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0 && rows % groups == 0,
                  "groups: expected a divisor of the channels and of the rows");
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  bias = checked_bias(bias, x, rows);
  p.w = weight_of(&codebook, codes, p.a.dtype, rows, g.channels / groups * g.kernel_h * g.kernel_w, bits, group_size);
  p.groups = groups;
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  p.a.x = x.const_data_ptr();
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  run_forward(p);
  return y;
}

Tensor decode(Tensor codebook, Tensor codes, int64_t rows, int64_t width, int64_t bits, int64_t group_size) {
  STD_TORCH_CHECK(codebook.is_cpu(), "codebook: expected a CPU tensor");
  codebook = as_contiguous(codebook);
  const Weight w = weight_of(&codebook, codes, dtype_of(codebook, "codebook"), rows, width, bits, group_size);
  Tensor out = like(codebook, {rows, width});
  void* to = out.mutable_data_ptr();
  const Kernels& k = kernels();
  const int64_t pieces = piece_count(w);
  run_tasks(pieces, k.decode_bytes(w), 4.0 * double(rows * width), [&](int64_t i, void* workspace) {
    k.decode(w, rows * i / pieces, rows * (i + 1) / pieces, to, workspace);
  });
  return out;
}

Tensor sum_members(Tensor grad_weight, Tensor codes, int64_t bits, int64_t group_size, bool zero) {
  STD_TORCH_CHECK(grad_weight.is_cpu() && grad_weight.dim() == 2, "grad_weight: expected a CPU tensor [rows, width]");
  const Weight w = weight_of(nullptr, codes, dtype_of(grad_weight, "grad_weight"), grad_weight.size(0),
                             grad_weight.size(1), bits, group_size);
  grad_weight = as_contiguous(grad_weight);
  const int64_t entries = int64_t(1) << bits, total = w.tables * entries;
  // Rows with tables of their own share no sum; otherwise each piece has sums of its own, added up in order.
  const bool shared = group_size != kTablePerRow;
  const int64_t pieces = piece_count(w);
  std::vector<double> sums(size_t(total * (shared ? pieces : 1)));
  const void* from = grad_weight.const_data_ptr();
  const Kernels& k = kernels();
  run_tasks(pieces, k.decode_bytes(w), 4.0 * double(w.rows * w.width), [&](int64_t i, void* workspace) {
    k.sum_members(w, from, w.rows * i / pieces, w.rows * (i + 1) / pieces, sums.data() + (shared ? i * total : 0),
                  workspace);
  });
  Tensor out = like(grad_weight, {w.tables, entries});
  void* to = out.mutable_data_ptr();
  for (int64_t e = 0; e < total; ++e) {
    double sum = sums[e];
    for (int64_t i = 1; shared && i < pieces; ++i) sum += sums[i * total + e];
    if (zero && e % entries == 0) sum = 0;
    if (w.dtype == DType::f64)
      static_cast<double*>(to)[e] = sum;
    else if (w.dtype == DType::f32)
      static_cast<float*>(to)[e] = float(sum);
    else
      static_cast<uint16_t*>(to)[e] = float_to_bf16(float(sum));
  }
  return out;
}

}  // namespace slim::codebook
