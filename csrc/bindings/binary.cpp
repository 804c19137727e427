// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.binary_*: tensors in, raw pointers out.
#include "cpu/binary/binary.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::binary {

namespace {

#include "bindings/kernels_in_use.inc"

constexpr int64_t kSignKind = 0, kFloatKind = 1, kDoubleKind = 2;

Layout layout_of(int64_t kind) {
  return kind == kSignKind ? kernels().signs : kind == kFloatKind ? kernels().floats : kernels().doubles;
}
int64_t float_kind(DType dtype) { return dtype == DType::f64 ? kDoubleKind : kFloatKind; }

Signs signs_of(const Tensor& signs, int64_t rows, int64_t channels, int64_t kernel_h, int64_t kernel_w,
               int64_t groups) {
  STD_TORCH_CHECK(
      signs.is_cpu() && signs.scalar_type() == ScalarType::Byte && signs.dim() == 1 && signs.is_contiguous(),
      "signs: expected a contiguous 1-D uint8 CPU tensor");
  STD_TORCH_CHECK(rows >= 0 && channels >= 0 && kernel_h > 0 && kernel_w > 0 && kernel_h <= INT32_MAX / kernel_w &&
                      channels <= INT32_MAX / (kernel_h * kernel_w),
                  "kernel: expected fewer than 2**31 taps over all channels");
  STD_TORCH_CHECK(groups > 0 && rows % groups == 0, "groups: expected a divisor of the rows");
  const int64_t width = channels * kernel_h * kernel_w, bits = signs.numel() * 8;
  const bool fits = rows == 0 || width <= bits / rows;
  STD_TORCH_CHECK(fits && (rows * width + 7) / 8 == signs.numel(), "signs: expected a bit for each weight");
  return {static_cast<const uint8_t*>(signs.const_data_ptr()), rows, channels, kernel_h, kernel_w, groups};
}

// A plan that was handed in, checked against the sizes it must have, or one made for this call.
class PlanHolder {
 public:
  PlanHolder(const std::optional<Tensor>& given, const Signs& signs, int64_t kind) {
    const Layout layout = layout_of(kind);
    if (given) {
      check_plan(*given, "binary_plan");
      STD_TORCH_CHECK(view_plan(given->const_data_ptr(), given->numel(), signs, layout, &plan_),
                      "plan: made for a matrix of other sizes, or for another kernel");
      return;
    }
    made_ = build_plan(signs, layout);
    view_plan(made_.data(), int64_t(made_.size()), signs, layout, &plan_);
  }
  const Plan& operator*() const { return plan_; }

 private:
  std::vector<char> made_;
  Plan plan_{};
};

Tensor checked_scale(const Tensor& scale, const Tensor& x) {
  check_same(scale, x, "scale");
  STD_TORCH_CHECK(scale.dim() == 1, "scale: expected one entry per output");
  return as_contiguous(scale);
}

// Popcounts are so much faster than products that threads pay off later.
double work_of(const Params& p, double per_product) {
  const auto& h = *p.plan.header;
  return per_product * double(p.a.n) * double(h.channels * h.kernel_h * h.kernel_w) * double(columns_of(p.a));
}

void run_signs(Params& p) {
  const Kernels& k = kernels();
  const double work = work_of(p, 0.1);
  const int64_t groups = k.group_count(p);
  p.ranges = row_ranges(groups, k.row_units(p), work);
  run_tasks(groups * p.ranges, k.workspace_bytes(p), work,
            [&](int64_t task, void* workspace) { k.forward(p, task, workspace); });
}

// Packs the activations, then runs; p.bits is this thread's scratch memory meanwhile.
void pack_and_run_signs(Params& p) {
  const auto& h = *p.plan.header;
  int64_t bytes;
  if (p.a.conv) {
    p.pixel_stride = tap_bytes(h.channels);
    p.group_stride = p.pixel_stride * p.a.geometry.height * p.a.geometry.width;
    p.image_stride = p.group_stride * h.groups;
    bytes = p.image_stride * p.a.geometry.batch;
  } else {
    p.pixel_stride = (p.a.k + 63) / 64 * 8;
    bytes = p.pixel_stride * p.a.m;
  }
  p.bits = static_cast<uint8_t*>(packed_scratch().get(std::max<int64_t>(1, bytes)));
  const Kernels& k = kernels();
  run_tasks(k.pack_tasks(p), 64, double(bytes) * 8, [&](int64_t task, void*) { k.pack(p, task); });
  run_signs(p);
  packed_scratch().trim();
}

void run_floats(Params& p) {
  const Kernels& k = kernels();
  const double work = work_of(p, 1);
  const int64_t groups = k.float_group_count(p);
  p.ranges = row_ranges(groups, k.float_row_units(p), work);
  run_tasks(groups * p.ranges, checked_workspace(p.a, k.float_workspace_bytes(p)), work,
            [&](int64_t task, void* workspace) { k.float_forward(p, task, workspace); });
}

int64_t bit_bytes(int64_t count) { return (count + 63) / 64 * 8; }

// Packed activations as they are handed from layer to layer: whole 64-bit words, the rest of the last one 0.
Tensor checked_bits(const Tensor& bits, int64_t dims, int64_t count) {
  STD_TORCH_CHECK(bits.is_cpu() && bits.scalar_type() == ScalarType::Byte && bits.dim() >= 1 &&
                      (dims == 0 || bits.dim() == dims) && count >= 0 && bits.size(-1) == bit_bytes(count),
                  "x: expected uint8 bits in whole words of 64, as the operators ending in _to_bits make them");
  return as_contiguous(bits);
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

void set_linear_bits(Params& p, const Tensor& bits) {
  p.bits = static_cast<uint8_t*>(const_cast<void*>(bits.const_data_ptr()));  // only read
  p.pixel_stride = bits.size(-1);
}

// Bits of a convolution's input, split by groups where those do not begin at bytes.
void run_conv_bits(Params& p, const Tensor& bits) {
  const ConvGeometry& g = p.a.geometry;
  const auto& h = *p.plan.header;
  const int64_t plane = g.height * g.width, stride = bits.size(3);
  const auto* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  if (h.groups == 1 || h.channels % 8 == 0) {
    p.bits = const_cast<uint8_t*>(data);  // only read
    p.pixel_stride = stride;
    p.group_stride = h.channels / 8;
    p.image_stride = plane * stride;
    run_signs(p);
    return;
  }
  p.pixel_stride = tap_bytes(h.channels);
  p.group_stride = p.pixel_stride * plane;
  p.image_stride = p.group_stride * h.groups;
  const int64_t bytes = p.image_stride * g.batch;
  p.bits = static_cast<uint8_t*>(packed_scratch().get(std::max<int64_t>(1, bytes)));
  std::memset(p.bits, 0, size_t(bytes));
  for (int64_t image = 0; image < g.batch; ++image)
    for (int64_t pixel = 0; pixel < plane; ++pixel, data += stride)
      for (int64_t c = 0; c < g.channels; ++c) {
        const int64_t inner = c % h.channels;
        p.bits[image * p.image_stride + c / h.channels * p.group_stride + pixel * p.pixel_stride + inner / 8] |=
            uint8_t(((data[c >> 3] >> (c & 7)) & 1) << (inner & 7));
      }
  run_signs(p);
  packed_scratch().trim();
}

Tensor bytes_like(const Tensor& t, const std::vector<int64_t>& sizes) {
  Tensor out = torch::stable::new_empty(t, sizes, ScalarType::Byte);
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0, size_t(out.numel()));
  return out;
}

// Thresholds into p; the tensors must outlive the call.
void set_thresholds(Params& p, const Tensor& thresholds, const Tensor& rising) {
  p.thresholds = int32_data(thresholds, "thresholds");
  STD_TORCH_CHECK(rising.is_cpu() && rising.is_contiguous() && rising.dim() == 1 &&
                      rising.scalar_type() == ScalarType::Bool && rising.numel() == thresholds.numel(),
                  "rising: expected a contiguous bool tensor like thresholds");
  p.rising = static_cast<const uint8_t*>(rising.const_data_ptr());
  for (int64_t i = 0, n = thresholds.numel(); i < n; ++i)
    STD_TORCH_CHECK(p.thresholds[i] != INT32_MIN, "thresholds: expected numbers above -2**31");
}

bool is_bits(const Tensor& x) { return x.scalar_type() == ScalarType::Byte; }

// Geometry of a convolution over bits [N, H, W, bytes] of `channels` channels.
ConvGeometry bits_geometry(const Tensor& bits, int64_t channels, const std::vector<int64_t>& kernel,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation) {
  return conv_geometry(bits.size(0), channels, bits.size(1), bits.size(2), kernel, stride, padding, dilation);
}

void set_conv(Params& p, const ConvGeometry& g, int64_t rows) {
  p.a.conv = true;
  p.a.geometry = g;
  p.a.k = g.channels * g.kernel_h * g.kernel_w;
  p.a.n = rows;
}

Signs conv_signs(const Tensor& signs, const ConvGeometry& g, int64_t rows, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  return signs_of(signs, rows, g.channels / groups, g.kernel_h, g.kernel_w, groups);
}

}  // namespace

Tensor plan(Tensor signs, int64_t rows, int64_t channels, std::vector<int64_t> kernel, int64_t groups, int64_t kind) {
  STD_TORCH_CHECK(kernel.size() == 2, "kernel: expected two ints");
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "kind: expected 0 (signs), 1 (float32, bfloat16) or 2 (float64)");
  const Signs s = signs_of(signs, rows, channels, kernel[0], kernel[1], groups);
  const std::vector<char> blob = build_plan(s, layout_of(kind));
  Tensor out = torch::stable::new_empty(signs, {int64_t(blob.size())});
  std::memcpy(out.mutable_data_ptr(), blob.data(), blob.size());
  return out;
}

Tensor linear(Tensor x, Tensor signs, Tensor scale, std::optional<Tensor> plan, std::optional<Tensor> bias,
              bool binarize_input, bool relu) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor [..., in_features]");
  const DType dtype = dtype_of(x, "x");
  scale = checked_scale(scale, x);
  const int64_t rows = scale.numel();
  const PlanHolder holder(plan, signs_of(signs, rows, x.size(-1), 1, 1, 1),
                          binarize_input ? kSignKind : float_kind(dtype));
  x = as_contiguous(x);
  bias = checked_bias(bias, x, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(x, sizes);
  Params p{};
  p.plan = *holder;
  p.scale = scale.const_data_ptr();
  p.a = linear_activations(x, x.const_data_ptr(), y.mutable_data_ptr(), x.size(-1), rows, bias, relu);
  binarize_input ? pack_and_run_signs(p) : run_floats(p);
  return y;
}

Tensor conv2d(Tensor x, Tensor signs, Tensor scale, std::optional<Tensor> plan, std::optional<Tensor> bias,
              std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
              std::vector<int64_t> dilation, int64_t groups, bool binarize_input, bool relu) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  scale = checked_scale(scale, x);
  const int64_t rows = scale.numel();
  Params p{};
  p.a = conv_activations(x, conv_geometry(x, kernel, stride, padding, dilation), rows);
  const ConvGeometry& g = p.a.geometry;
  const PlanHolder holder(plan, conv_signs(signs, g, rows, groups), binarize_input ? kSignKind : float_kind(p.a.dtype));
  x = as_contiguous(x);
  bias = checked_bias(bias, x, rows);
  Tensor y = like(x, {g.batch, rows, g.out_h, g.out_w});
  p.plan = *holder;
  p.scale = scale.const_data_ptr();
  p.a.x = x.const_data_ptr();
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  binarize_input ? pack_and_run_signs(p) : run_floats(p);
  return y;
}

Tensor linear_from_bits(Tensor x, int64_t width, Tensor signs, Tensor scale, std::optional<Tensor> plan,
                        std::optional<Tensor> bias, bool relu) {
  x = checked_bits(x, 0, width);
  scale = checked_scale(scale, scale);
  const int64_t rows = scale.numel();
  const PlanHolder holder(plan, signs_of(signs, rows, width, 1, 1, 1), kSignKind);
  bias = checked_bias(bias, scale, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = like(scale, sizes);
  Params p{};
  p.plan = *holder;
  p.scale = scale.const_data_ptr();
  p.a = linear_activations(scale, nullptr, y.mutable_data_ptr(), width, rows, bias, relu);
  p.a.m = rows_of(x);
  set_linear_bits(p, x);
  run_signs(p);
  return y;
}

Tensor conv2d_from_bits(Tensor x, int64_t channels, Tensor signs, Tensor scale, std::optional<Tensor> plan,
                        std::optional<Tensor> bias, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu) {
  x = checked_bits(x, 4, channels);
  scale = checked_scale(scale, scale);
  const int64_t rows = scale.numel();
  Params p{};
  set_conv(p, bits_geometry(x, channels, kernel, stride, padding, dilation), rows);
  const ConvGeometry& g = p.a.geometry;
  const PlanHolder holder(plan, conv_signs(signs, g, rows, groups), kSignKind);
  bias = checked_bias(bias, scale, rows);
  Tensor y = like(scale, {g.batch, rows, g.out_h, g.out_w});
  p.plan = *holder;
  p.scale = scale.const_data_ptr();
  p.a.dtype = dtype_of(scale, "scale");
  p.a.y = y.mutable_data_ptr();
  p.a.bias = bias ? bias->const_data_ptr() : nullptr;
  p.a.relu = relu;
  run_conv_bits(p, x);
  return y;
}

Tensor linear_to_bits(Tensor x, int64_t width, Tensor signs, std::optional<Tensor> plan, Tensor thresholds,
                      Tensor rising) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x: expected a CPU tensor");
  const bool bits = is_bits(x);
  if (bits)
    x = checked_bits(x, 0, width);
  else
    STD_TORCH_CHECK(x.size(-1) == width, "x: expected shape [..., in_features]");
  Params p{};
  set_thresholds(p, thresholds, rising);
  const int64_t rows = thresholds.numel();
  const PlanHolder holder(plan, signs_of(signs, rows, width, 1, 1, 1), kSignKind);
  x = as_contiguous(x);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = bit_bytes(rows);
  Tensor y = bytes_like(x, sizes);
  p.plan = *holder;
  p.a.dtype = bits ? DType::f32 : dtype_of(x, "x");
  p.a.x = x.const_data_ptr();
  p.a.m = rows_of(x);
  p.a.k = width;
  p.a.n = rows;
  p.out_bits = static_cast<uint8_t*>(y.mutable_data_ptr());
  p.out_stride = sizes.back();
  if (bits) {
    set_linear_bits(p, x);
    run_signs(p);
  } else {
    pack_and_run_signs(p);
  }
  return y;
}

Tensor conv2d_to_bits(Tensor x, int64_t channels, Tensor signs, std::optional<Tensor> plan, Tensor thresholds,
                      Tensor rising, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "x: expected a CPU tensor of 4 dimensions");
  const bool bits = is_bits(x);
  if (bits)
    x = checked_bits(x, 4, channels);
  else
    STD_TORCH_CHECK(x.size(1) == channels, "x: expected shape [N, channels, H, W]");
  Params p{};
  set_thresholds(p, thresholds, rising);
  const int64_t rows = thresholds.numel();
  set_conv(p,
           bits ? bits_geometry(x, channels, kernel, stride, padding, dilation)
                : conv_geometry(x, kernel, stride, padding, dilation),
           rows);
  const ConvGeometry& g = p.a.geometry;
  const PlanHolder holder(plan, conv_signs(signs, g, rows, groups), kSignKind);
  x = as_contiguous(x);
  Tensor y = bytes_like(x, {g.batch, g.out_h, g.out_w, bit_bytes(rows)});
  p.plan = *holder;
  p.a.dtype = bits ? DType::f32 : dtype_of(x, "x");
  p.a.x = x.const_data_ptr();
  p.out_bits = static_cast<uint8_t*>(y.mutable_data_ptr());
  p.out_stride = bit_bytes(rows);
  if (bits)
    run_conv_bits(p, x);
  else
    pack_and_run_signs(p);
  return y;
}

Tensor scale_dots(Tensor dots, Tensor scale, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(dots.is_cpu() && dots.scalar_type() == ScalarType::Int && dots.dim() == 2,
                  "dots: expected an int32 CPU tensor [m, n]");
  scale = checked_scale(scale, scale);
  STD_TORCH_CHECK(scale.numel() == dots.size(1), "scale: expected one entry per output");
  bias = checked_bias(bias, scale, scale.numel());
  dots = as_contiguous(dots);
  Tensor y = like(scale, {dots.size(0), dots.size(1)});
  Params p{};
  p.scale = scale.const_data_ptr();
  p.a = linear_activations(scale, nullptr, y.mutable_data_ptr(), 0, scale.numel(), bias, relu);
  p.a.m = dots.size(0);
  kernels().scale(p, static_cast<const int32_t*>(dots.const_data_ptr()));
  return y;
}

}  // namespace slim::binary
