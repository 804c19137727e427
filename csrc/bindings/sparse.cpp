// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.sparse_*: tensors in, raw pointers out.
#include "cpu/sparse/sparse.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::sparse {

namespace {

#include "bindings/kernels_in_use.inc"

Csr csr_of(const Tensor& columns, const Tensor& row_offsets, int64_t width, int64_t groups) {
  Csr csr{int32_data(columns, "columns"),
          int32_data(row_offsets, "row_offsets"),
          row_offsets.numel() - 1,
          width,
          columns.numel(),
          groups};
  STD_TORCH_CHECK(csr.rows >= 0, "row_offsets: expected at least one entry");
  STD_TORCH_CHECK(width >= 0 && groups > 0 && csr.rows % groups == 0 && width <= INT32_MAX / groups,
                  "groups: expected a divisor of the rows");
  return csr;
}

// A plan that was handed in, checked against the sizes it must have, or one made for this call.
class PlanHolder {
 public:
  PlanHolder(const std::optional<Tensor>& given, const Csr& csr, int64_t taps, bool transposed) {
    const int64_t rows = transposed ? csr.width * csr.groups : csr.rows;
    const int64_t width = transposed ? csr.rows : csr.width * csr.groups;
    if (given) {
      check_plan(*given, "sparse_plan");
      STD_TORCH_CHECK(view_plan(given->const_data_ptr(), given->numel(), rows, width, csr.nnz, transposed, &plan_),
                      "plan: made for a matrix of other sizes");
      return;
    }
    made_ = make(csr, taps, transposed);
    view_plan(made_.data(), int64_t(made_.size()), rows, width, csr.nnz, transposed, &plan_);
  }
  const Plan& operator*() const { return plan_; }

  static std::vector<char> make(const Csr& csr, int64_t taps, bool transposed) {
    const int64_t k_block = choose_k_block(csr, taps, transposed);
    std::vector<char> blob(size_t(plan_capacity(csr, k_block, transposed)));
    int64_t bytes = 0;
    const char* wrong = build_plan(csr, k_block, transposed, blob.data(), &bytes);
    STD_TORCH_CHECK(!wrong, wrong);
    blob.resize(size_t(bytes));
    return blob;
  }

 private:
  std::vector<char> made_;
  Plan plan_{};
};

void check_values(const Tensor& values, const Tensor& x, int64_t nnz) {
  check_same(values, x, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == nnz, "values: expected one entry per column index");
}

// Whether `packed` still agrees with `values`, at a few dozen places spread over the weight. Python makes the copy anew
// after every change that torch tracks; this finds those behind its back (param.data), which touch whole weights.
template <class Packed, class Value, class Convert>
bool probe_as(const Plan& plan, const void* values, const void* packed, Convert convert) {
  constexpr int64_t kProbes = 32;
  const int64_t count = plan.cells[plan.header->row_blocks * plan.header->k_blocks], probes = std::min(count, kProbes);
  for (int64_t p = 0; p < probes; ++p) {
    const int64_t i = count * p / probes;
    const Packed expected = convert(static_cast<const Value*>(values)[plan.sources[i]]);
    if (std::memcmp(static_cast<const Packed*>(packed) + plan.segments[i].start, &expected, sizeof(Packed)))
      return false;
  }
  return true;
}
bool agrees(const Params& p, const Tensor& values, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.numel() == p.plan.header->nnz &&
                      int64_t(packed.element_size()) == compute_size(p.a.dtype),
                  "packed_values: expected the result of sparse_pack_values");
  const void *v = values.const_data_ptr(), *q = packed.const_data_ptr();
  if (p.a.dtype == DType::bf16) return probe_as<float, uint16_t>(p.plan, v, q, bf16_to_float);
  if (p.a.dtype == DType::f64) return probe_as<double, double>(p.plan, v, q, [](double x) { return x; });
  return probe_as<float, float>(p.plan, v, q, [](float x) { return x; });
}

// Values as the kernel wants them: in row order, or in packed order, from `packed` if that is given and not stale.
const void* kernel_values(const Params& p, const Tensor& values, const std::optional<Tensor>& packed) {
  if (p.dot) return values.const_data_ptr();
  if (kernels().by_row(p)) return compute_values(values, p.a.dtype, p.plan.order);
  if (packed && agrees(p, values, *packed)) return packed->const_data_ptr();
  const int64_t element = compute_size(p.a.dtype);
  void* out = packed_scratch().get(std::max<int64_t>(1, p.plan.header->nnz * element));
  pack_values(p.plan, compute_values(values, p.a.dtype, p.plan.order), element, out);
  return out;
}

void run_forward(Params& p, const Tensor& values, const std::optional<Tensor>& packed) {
  const Kernels& k = kernels();
  const double flops = 2.0 * double(p.plan.header->nnz) * double(columns_of(p.a));
  p.values = kernel_values(p, values, packed);
  const int64_t groups = k.group_count(p);
  p.ranges = row_ranges(groups, p.plan.header->row_blocks, flops);
  run_tasks(groups * p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), flops,
            [&](int64_t task, void* workspace) { k.forward(p, task, workspace); });
  value_scratch().trim();
  packed_scratch().trim();
}

Tensor run_grad_values(Params& p, const Tensor& x, int64_t nnz) {
  const Kernels& k = kernels();
  Tensor out = like(x, {nnz});
  p.grad_values = gradient_sums(out, p.a.dtype);
  const double flops = 2.0 * double(nnz) * double(columns_of(p.a));
  p.ranges = row_ranges(1, p.plan.header->row_blocks, flops);
  if (columns_of(p.a) > 0)
    run_tasks(p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), flops,
              [&](int64_t range, void* workspace) { k.grad_values(p, range, workspace); });
  finish_gradient(p.grad_values, out, p.a.dtype);
  value_scratch().trim();
  return out;
}

}  // namespace

Tensor plan(Tensor columns, Tensor row_offsets, int64_t width, int64_t groups, int64_t taps, bool transposed) {
  const Csr csr = csr_of(columns, row_offsets, width, groups);
  STD_TORCH_CHECK(taps > 0, "taps: expected a positive int");
  const std::vector<char> blob = PlanHolder::make(csr, taps, transposed);
  Tensor out = torch::stable::new_empty(columns, {int64_t(blob.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), blob.data(), blob.size());
  return out;
}

Tensor pack_values(Tensor values, Tensor plan) {
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 1, "values: expected a 1-D CPU tensor");
  STD_TORCH_CHECK(plan.is_cpu() && plan.is_contiguous() && plan.scalar_type() == ScalarType::Byte &&
                      plan.numel() >= int64_t(sizeof(PlanHeader)),
                  "plan: expected contiguous bytes made by sparse_plan");
  const auto* h = static_cast<const PlanHeader*>(plan.const_data_ptr());
  Plan view;
  STD_TORCH_CHECK(view_plan(plan.const_data_ptr(), plan.numel(), h->rows, h->width, values.numel(), false, &view),
                  "plan: made for a matrix of other sizes");
  const DType dtype = dtype_of(values, "values");
  values = as_contiguous(values);
  Tensor out =
      torch::stable::new_empty(values, {values.numel()}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  pack_values(view, compute_values(values, dtype, nullptr), compute_size(dtype), out.mutable_data_ptr());
  value_scratch().trim();
  return out;
}

Tensor linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor> packed_values, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  const Csr csr = csr_of(columns, row_offsets, x.size(-1), 1);
  check_values(values, x, csr.nnz);
  const PlanHolder holder(plan, csr, 1, false);
  x = as_contiguous(x);
  values = as_contiguous(values);
  bias = checked_bias(bias, x, csr.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = csr.rows;
  Tensor y = like(x, sizes);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(x, x.const_data_ptr(), y.mutable_data_ptr(), csr.width, csr.rows, bias, relu);
  p.dot = p.a.m == 1 && p.plan.header->by_row;
  run_forward(p, values, packed_values);
  return y;
}

Tensor linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                         std::optional<Tensor> backward_plan, int64_t width) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() >= 1, "grad: expected a CPU tensor [..., out_features]");
  const Csr csr = csr_of(columns, row_offsets, width, 1);
  STD_TORCH_CHECK(grad.size(-1) == csr.rows, "grad: expected shape [..., out_features]");
  check_values(values, grad, csr.nnz);
  const PlanHolder holder(backward_plan, csr, 1, true);
  grad = as_contiguous(grad);
  values = as_contiguous(values);
  std::vector<int64_t> sizes = sizes_of(grad);
  sizes.back() = width;
  Tensor out = like(grad, sizes);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(grad, grad.const_data_ptr(), out.mutable_data_ptr(), csr.rows, width, std::nullopt, false);
  run_forward(p, values, std::nullopt);
  return out;
}

Tensor linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  const Csr csr = csr_of(columns, row_offsets, x.size(-1), 1);
  check_same(grad, x, "grad");
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(-1) == csr.rows, "grad: expected shape [..., out_features]");
  const PlanHolder holder(plan, csr, 1, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  Params p{};
  p.plan = *holder;
  p.a = linear_activations(x, x.const_data_ptr(), const_cast<void*>(grad.const_data_ptr()), csr.width, csr.rows,
                           std::nullopt, false);
  STD_TORCH_CHECK(grad.numel() == p.a.m * csr.rows, "grad: expected as many rows as x");
  return run_grad_values(p, x, csr.nnz);
}

Tensor conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor> packed_values, std::optional<Tensor> bias,
              std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
              std::vector<int64_t> dilation, int64_t groups, bool relu) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), row_offsets.numel() - 1);
  const ConvGeometry& g = p.a.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  const Csr csr = csr_of(columns, row_offsets, g.channels / groups * taps, groups);
  check_values(values, x, csr.nnz);
  const PlanHolder holder(plan, csr, taps, false);
  x = as_contiguous(x);
  values = as_contiguous(values);
  bias = checked_bias(bias, x, csr.rows);
  Tensor y = like(x, {g.batch, csr.rows, g.out_h, g.out_w});
  p.plan = *holder;
  p.a.x = x.const_data_ptr();
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  run_forward(p, values, packed_values);
  return y;
}

Tensor conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                           std::optional<Tensor> backward_plan, int64_t width, int64_t groups) {
  STD_TORCH_CHECK(grad.is_cpu(), "grad: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(grad, pointwise_geometry(grad), 0);
  const ConvGeometry& g = p.a.geometry;
  const Csr csr = csr_of(columns, row_offsets, width, groups);
  p.a.n = width * groups;  // only now known not to overflow
  STD_TORCH_CHECK(g.channels == csr.rows, "grad: expected shape [N, out_channels, H, W]");
  check_values(values, grad, csr.nnz);
  const PlanHolder holder(backward_plan, csr, 1, true);
  grad = as_contiguous(grad);
  values = as_contiguous(values);
  Tensor out = like(grad, {g.batch, width * groups, g.height, g.width});
  p.plan = *holder;
  p.a.x = grad.const_data_ptr();
  p.a.y = out.mutable_data_ptr();
  run_forward(p, values, std::nullopt);
  return out;
}

Tensor conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, std::optional<Tensor> plan,
                          std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), row_offsets.numel() - 1);
  const ConvGeometry& g = p.a.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  const Csr csr = csr_of(columns, row_offsets, g.channels / groups * taps, groups);
  check_same(grad, x, "grad");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == g.batch && grad.size(1) == csr.rows && grad.size(2) == g.out_h &&
                      grad.size(3) == g.out_w,
                  "grad: expected the shape of the convolution's output");
  const PlanHolder holder(plan, csr, taps, false);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  p.plan = *holder;
  p.a.x = x.const_data_ptr();
  p.a.y = const_cast<void*>(grad.const_data_ptr());
  return run_grad_values(p, x, csr.nnz);
}

}  // namespace slim::sparse
