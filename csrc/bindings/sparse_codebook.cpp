// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.sparse_codebook_*: tensors in, raw pointers out.
#include "cpu/sparse_codebook/sparse_codebook.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::sparse_codebook {

namespace {

#include "bindings/kernels_in_use.inc"

const uint8_t* bytes_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.is_contiguous(), name,
                  ": expected a contiguous 1-D uint8 CPU tensor");
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// Positions alone; where they lead is checked when a plan is built.
Weight positions_of(const Tensor& gaps, const Tensor& row_offsets, int64_t width, int64_t groups) {
  Weight w{};
  w.gaps = bytes_of(gaps, "gaps");
  w.row_offsets = int32_data(row_offsets, "row_offsets");
  w.rows = row_offsets.numel() - 1;
  w.width = width;
  w.entries = gaps.numel();
  w.groups = groups;
  STD_TORCH_CHECK(w.rows >= 0, "row_offsets: expected at least one entry");
  STD_TORCH_CHECK(w.entries <= INT32_MAX, "gaps: expected fewer than 2**31 entries");
  STD_TORCH_CHECK(width >= 0 && groups > 0 && w.rows % groups == 0 && width <= INT32_MAX / groups,
                  "groups: expected a divisor of the rows");
  return w;
}

void check_tables(const Tensor& tables, const Weight& w, const char* name) {
  const int64_t count = w.group_size == 0 ? 1 : w.group_size < 0 ? w.rows : (w.width + w.group_size - 1) / w.group_size;
  STD_TORCH_CHECK(tables.dim() == 2 && tables.size(0) == count && tables.size(1) == int64_t(1) << w.bits, name,
                  ": expected shape [tables, 2**bits]");
}

Weight weight_of(const Tensor& codebook, const Tensor& codes, const Tensor& gaps, const Tensor& row_offsets,
                 int64_t width, int64_t groups, int64_t bits, int64_t group_size) {
  Weight w = positions_of(gaps, row_offsets, width, groups);
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits: expected 1 to 8");
  STD_TORCH_CHECK(group_size >= -1 && group_size <= INT32_MAX, "group_size: expected a size, 0 for None, -1 for a row");
  w.bits = bits;
  w.group_size = group_size;
  w.codes = bytes_of(codes, "codes");
  w.code_bytes = codes.numel();
  STD_TORCH_CHECK(w.code_bytes == (w.entries * bits + 7) / 8, "codes: expected a stream of one index per entry");
  STD_TORCH_CHECK(codebook.is_cpu(), "codebook: expected a CPU tensor");
  check_tables(codebook, w, "codebook");
  return w;
}

// A plan that was handed in, checked against the sizes it must have, or one made for this call.
class PlanHolder {
 public:
  PlanHolder(const std::optional<Tensor>& given, const Weight& w, int64_t taps) {
    if (given) {
      check_plan(*given, "sparse_codebook_plan");
      STD_TORCH_CHECK(view_plan(given->const_data_ptr(), given->numel(), w, &plan_),
                      "plan: made for a matrix of other sizes");
      return;
    }
    made_ = make(w, taps);
    view_plan(made_.data(), int64_t(made_.size()), w, &plan_);
  }
  const Plan& operator*() const { return plan_; }

  static std::vector<char> make(const Weight& w, int64_t taps) {
    const int64_t k_block = choose_k_block(w, taps);
    std::vector<char> blob(size_t(plan_capacity(w, k_block)));
    int64_t bytes = 0;
    const char* wrong = build_plan(w, k_block, blob.data(), &bytes);
    STD_TORCH_CHECK(!wrong, wrong);
    blob.resize(size_t(bytes));
    return blob;
  }

 private:
  std::vector<char> made_;
  Plan plan_{};
};

void run_forward(Params& p, const Tensor& codebook) {
  const Kernels& k = kernels();
  const double flops = 2.0 * double(p.w.entries) * double(columns_of(p.a));
  p.codebook = compute_values(codebook, p.a.dtype, nullptr);
  const int64_t groups = k.group_count(p);
  p.ranges = row_ranges(groups, (p.w.rows + kRowBlock - 1) / kRowBlock, flops);
  run_tasks(groups * p.ranges, checked_workspace(p.a, k.workspace_bytes(p)), flops,
            [&](int64_t task, void* workspace) { k.forward(p, task, workspace); });
  value_scratch().trim();
}

}  // namespace

Tensor plan(Tensor gaps, Tensor row_offsets, int64_t width, int64_t groups, int64_t taps) {
  const Weight w = positions_of(gaps, row_offsets, width, groups);
  STD_TORCH_CHECK(taps > 0, "taps: expected a positive int");
  const std::vector<char> blob = PlanHolder::make(w, taps);
  Tensor out = torch::stable::new_empty(gaps, {int64_t(blob.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), blob.data(), blob.size());
  return out;
}

std::tuple<Tensor, Tensor> positions(Tensor gaps, Tensor row_offsets, int64_t width) {
  const Weight w = positions_of(gaps, row_offsets, width, 1);
  const char* wrong = check(w);
  STD_TORCH_CHECK(!wrong, wrong);
  Tensor columns = torch::stable::new_empty(gaps, {count_weights(w)}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(gaps, {w.rows + 1}, ScalarType::Int);
  positions(w, static_cast<int32_t*>(columns.mutable_data_ptr()), static_cast<int32_t*>(offsets.mutable_data_ptr()));
  return {columns, offsets};
}

Tensor decode(Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, Tensor columns, int64_t width,
              int64_t bits, int64_t group_size) {
  const Weight w = weight_of(codebook, codes, gaps, row_offsets, width, 1, bits, group_size);
  const char* wrong = check(w);
  STD_TORCH_CHECK(!wrong, wrong);
  STD_TORCH_CHECK(columns.numel() == count_weights(w), "columns: expected one for each weight");
  codebook = as_contiguous(codebook);
  Tensor values = like(codebook, {columns.numel()});
  decode(w, codebook.const_data_ptr(), int64_t(codebook.element_size()), values.mutable_data_ptr());
  return values;
}

Tensor sum_members(Tensor values, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, int64_t width,
                   int64_t bits, int64_t group_size) {
  const Weight w = weight_of(codebook, codes, gaps, row_offsets, width, 1, bits, group_size);
  const char* wrong = check(w);
  STD_TORCH_CHECK(!wrong, wrong);
  const DType dtype = dtype_of(values, "values");
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 1 && values.numel() == count_weights(w) && dtype != DType::bf16,
                  "values: expected one float32 or float64 for each weight");
  values = as_contiguous(values);
  std::vector<double> sums(size_t(codebook.numel()), 0.0);
  Tensor out = like(codebook, sizes_of(codebook));
  if (dtype == DType::f64)
    sum_members(w, static_cast<const double*>(values.const_data_ptr()), sums.data());
  else
    sum_members(w, static_cast<const float*>(values.const_data_ptr()), sums.data());
  void* to = out.mutable_data_ptr();
  const DType result = dtype_of(out, "codebook");
  for (size_t i = 0; i < sums.size(); ++i) {
    if (result == DType::f64)
      static_cast<double*>(to)[i] = sums[i];
    else if (result == DType::f32)
      static_cast<float*>(to)[i] = float(sums[i]);
    else
      static_cast<uint16_t*>(to)[i] = float_to_bf16(float(sums[i]));
  }
  return out;
}

Tensor linear(Tensor x, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, int64_t bits,
              int64_t group_size, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  Params p{};
  p.w = weight_of(codebook, codes, gaps, row_offsets, x.size(-1), 1, bits, group_size);
  check_same(codebook, x, "codebook");
  const PlanHolder holder(plan, p.w, 1);
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  bias = checked_bias(bias, x, p.w.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = p.w.rows;
  Tensor y = like(x, sizes);
  p.plan = *holder;
  p.a = linear_activations(x, x.const_data_ptr(), y.mutable_data_ptr(), p.w.width, p.w.rows, bias, relu);
  run_forward(p, codebook);
  return y;
}

Tensor conv2d(Tensor x, Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets, std::optional<Tensor> plan,
              std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, int64_t bits,
              int64_t group_size, std::optional<Tensor> bias, std::vector<int64_t> kernel, std::vector<int64_t> stride,
              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), row_offsets.numel() - 1);
  const ConvGeometry& g = p.a.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  p.w = weight_of(codebook, codes, gaps, row_offsets, g.channels / groups * taps, groups, bits, group_size);
  check_same(codebook, x, "codebook");
  const PlanHolder holder(plan, p.w, taps);
  x = as_contiguous(x);
  codebook = as_contiguous(codebook);
  bias = checked_bias(bias, x, p.w.rows);
  Tensor y = like(x, {g.batch, p.w.rows, g.out_h, g.out_w});
  p.plan = *holder;
  p.a.x = x.const_data_ptr();
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  run_forward(p, codebook);
  return y;
}

}  // namespace slim::sparse_codebook
