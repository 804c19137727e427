// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.binary_* on CUDA tensors: tensors in, raw pointers out.
#include "bindings/cuda_common.h"
#include "cuda/binary/binary.h"

namespace slim::cuda {

namespace {

using binary::Layout;
using binary::ProductParams;
using binary::Shape;

constexpr int64_t kSignKind = 0, kFloatKind = 1;

using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

void check_signs(const Tensor& signs, const Shape& s) {
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Byte && signs.dim() == 1, "signs: expected a 1-D uint8 tensor");
  STD_TORCH_CHECK(s.rows >= 0 && s.channels >= 0 && s.kernel_h > 0 && s.kernel_w > 0 &&
                      s.kernel_h <= INT32_MAX / s.kernel_w && s.channels <= INT32_MAX / (s.kernel_h * s.kernel_w),
                  "kernel: expected fewer than 2**31 taps over all channels");
  STD_TORCH_CHECK(s.groups > 0 && s.rows % s.groups == 0, "groups: expected a divisor of the rows");
  const int64_t width = s.channels * s.kernel_h * s.kernel_w;
  STD_TORCH_CHECK((s.rows == 0 || width <= signs.numel() * 8 / s.rows) && (s.rows * width + 7) / 8 == signs.numel(),
                  "signs: expected a bit for each weight");
}

int64_t plan_bytes(const Shape& s, int64_t kind) {
  return kind == kSignKind ? binary::layout_of(s).bytes : binary::float_layout_of(s).bytes;
}

Tensor make_plan(Call& call, const Tensor& signs, const Shape& s, int64_t kind) {
  Tensor plan = workspace(signs, plan_bytes(s, kind));
  const uint8_t* stream = call.in_bytes(signs, "signs");
  uint8_t* to = static_cast<uint8_t*>(call.out(plan));
  if (kind == kSignKind)
    call.check(binary::make_plan({s, binary::layout_of(s), stream, to}, call.stream()));
  else
    call.check(binary::make_float_plan({s, binary::float_layout_of(s), stream, to}, call.stream()));
  return plan;
}

// The signs in the order of the kernels: from the plan that was handed in, or made for this call.
class Weights {
 public:
  Weights(Call& call, const Tensor& signs, const Shape& s, int64_t kind, const Maybe& given) {
    check_signs(signs, s);
    if (given) {
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Byte && given->dim() == 1 && given->is_contiguous(),
                      "plan: expected contiguous bytes made by binary_plan");
      STD_TORCH_CHECK(given->numel() == plan_bytes(s, kind),
                      "plan: made for a matrix of other sizes, or another kernel");
      plan_ = as_aligned(*given);
      data_ = call.in_bytes(*plan_, "plan");
    } else {
      signs_ = as_contiguous(signs);
      plan_ = make_plan(call, *signs_, s, kind);
      data_ = static_cast<const uint8_t*>(plan_->const_data_ptr());
    }
  }
  const uint8_t* data() const { return data_; }

 private:
  Maybe plan_, signs_;
  const uint8_t* data_;
};

int64_t bit_bytes(int64_t count) { return (count + 63) / 64 * 8; }
bool is_bits(const Tensor& x) { return x.scalar_type() == ScalarType::Byte; }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Packed activations as they are handed from layer to layer: whole 64-bit words, the rest of the last one 0.
void check_bits(const Tensor& bits, int64_t dims, int64_t count) {
  STD_TORCH_CHECK(is_bits(bits) && bits.dim() >= 1 && (dims == 0 || bits.dim() == dims) && count >= 0 &&
                      bits.size(-1) == bit_bytes(count),
                  "x: expected uint8 bits in whole words of 64, as the operators ending in _to_bits make them");
}

Tensor checked_scale(const Tensor& scale, const Tensor& x) {
  STD_TORCH_CHECK(scale.scalar_type() == x.scalar_type() && scale.dim() == 1,
                  "scale: expected one entry per output, of x's dtype");
  return as_contiguous(scale);
}

// A product of signs in the making: owns what the kernels read.
struct Product {
  explicit Product(Call& call) : call(call) {}

  Call& call;
  ProductParams p{};
  std::vector<Tensor> keep;

  uint8_t* scratch(const Tensor& like, int64_t bytes) {
    keep.push_back(workspace(like, std::max<int64_t>(16, bytes)));
    return static_cast<uint8_t*>(call.out(keep.back()));
  }
  int32_t* scratch_sums(const Tensor& like, int64_t n) { return reinterpret_cast<int32_t*>(scratch(like, n * 4)); }

  // x [..., width] floats, or bits.
  void set_linear(Tensor x, int64_t width) {
    p.conv = false;
    p.groups = 1;
    p.geometry.kernel_h = p.geometry.kernel_w = 1;
    p.words = (width + 63) / 64;
    p.columns = rows_of(x);
    int32_t* sums = scratch_sums(x, p.columns);
    p.sums = sums;
    if (is_bits(x)) {
      keep.push_back(as_aligned(x));
      p.bits = call.in_bytes(keep.back(), "x");
      p.column_bytes = p.words * 8;
      call.check(binary::count({p.bits, sums, p.columns, p.words}, call.stream()));
      return;
    }
    keep.push_back(as_contiguous(x));
    const void* from = call.in(keep.back(), "x");
    p.column_bytes = (p.words * 8 + 15) / 16 * 16;
    uint8_t* bits = scratch(x, p.columns * p.column_bytes);
    p.bits = bits;
    call.check(binary::pack_rows({cuda_dtype(x, "x"), from, bits, sums, p.columns, width, p.column_bytes, false, 1},
                                 call.info(), call.stream()));
  }

  // x [N, C, H, W] floats, or [N, H, W, bytes] bits.
  void set_conv(Tensor x, const ConvGeometry& g, int64_t groups) {
    constexpr int64_t kLimit = int64_t(1) << 29;
    STD_TORCH_CHECK(g.height <= kLimit && g.width <= kLimit && (g.kernel_h + 1) * (g.kernel_w + 1) <= INT32_MAX,
                    "x: expected images of at most 2**29 rows and columns");
    p.conv = true;
    p.groups = groups;
    p.geometry = g;
    const int64_t channels = g.channels / groups, plane = g.height * g.width, pixels = g.batch * plane;
    p.words = (channels + 63) / 64;
    p.column_bytes = groups * p.words * 8;
    p.columns = g.batch * g.out_h * g.out_w;
    int32_t* sums = scratch_sums(x, pixels * groups);
    p.sums = sums;
    if (is_bits(x)) {
      keep.push_back(as_aligned(x));
      p.bits = call.in_bytes(keep.back(), "x");
      if (groups > 1 && channels % 64 != 0) {
        uint8_t* bits = scratch(x, pixels * p.column_bytes);
        call.check(binary::regroup({p.bits, bits, pixels, x.size(3), groups, channels, p.words}, call.stream()));
        p.bits = bits;
      }
    } else {
      keep.push_back(as_contiguous(x));
      const void* from = call.in(keep.back(), "x");
      uint8_t* bits = scratch(x, pixels * p.column_bytes);
      p.bits = bits;
      call.check(binary::pack_pixels({cuda_dtype(x, "x"), from, bits, sums, g.batch, plane, groups, channels, p.words},
                                     call.stream()));
      if (groups == 1) return;
    }
    call.check(binary::count({p.bits, sums, pixels * groups, p.words}, call.stream()));
  }

  void set_weights(const Weights& weights, const Shape& s) {
    const Layout layout = binary::layout_of(s);
    p.rows = s.rows;
    p.row_bytes = layout.row_bytes;
    p.weights = weights.data();
    p.border = reinterpret_cast<const int32_t*>(weights.data() + layout.border);
  }

  void set_output(Tensor& y, const Tensor& scale, const Maybe& bias, bool relu) {
    p.type = cuda_dtype(y, "scale");
    p.y = call.out(y);
    p.scale = call.in(scale, "scale");
    p.bias = bias ? call.in(*bias, "bias") : nullptr;
    p.relu = relu;
  }

  void set_output_bits(Tensor& y, const Tensor& thresholds, const Tensor& rising) {
    p.out_bits = static_cast<uint32_t*>(call.out(y));
    p.out_words = y.size(-1) / 4;
    p.thresholds = call.in_int32(thresholds, "thresholds");
    p.rising = call.in<uint8_t>(rising, "rising", ScalarType::Bool);
    p.shared_words = binary::shares_words(p.rows, p.groups);
    if (p.shared_words) torch::stable::zero_(y);
  }

  void run() {
    if (p.columns > 0) call.check(binary::product(p, call.info(), call.stream()));
  }
};

void run_floats(Call& call, const Activations& a, const Weights& weights, const Tensor& scale) {
  if (a.n == 0 || columns_of(a) == 0) return;
  const int splits = binary::float_splits(a, call.info());
  Maybe partial;
  if (splits > 1) partial = workspace(scale, splits * a.n * columns_of(a) * 4);
  float* to = partial ? static_cast<float*>(call.out(*partial)) : nullptr;
  call.check(binary::floats({a, weights.data(), call.in(scale, "scale")}, splits, to, call.stream()));
}

void check_thresholds(const Tensor& thresholds, const Tensor& rising) {
  STD_TORCH_CHECK(thresholds.scalar_type() == ScalarType::Int && thresholds.dim() == 1,
                  "thresholds: expected a 1-D int32 tensor");
  STD_TORCH_CHECK(rising.scalar_type() == ScalarType::Bool && rising.dim() == 1 && rising.numel() == thresholds.numel(),
                  "rising: expected a bool tensor like thresholds");
}

Shape conv_shape(const ConvGeometry& g, int64_t rows, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0, "groups: expected a divisor of the channels");
  return {rows, g.channels / groups, g.kernel_h, g.kernel_w, groups};
}

// Of floats [N, channels, H, W], or of bits [N, H, W, bytes].
ConvGeometry geometry_of(const Tensor& x, int64_t channels, const Ints& kernel, const Ints& stride, const Ints& padding,
                         const Ints& dilation) {
  if (!is_bits(x)) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == channels, "x: expected shape [N, channels, H, W]");
    return conv_geometry(x, kernel, stride, padding, dilation);
  }
  check_bits(x, 4, channels);
  return conv_geometry(x.size(0), channels, x.size(1), x.size(2), kernel, stride, padding, dilation);
}

Tensor bytes_like(const Tensor& t, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(t, sizes, ScalarType::Byte);
}

}  // namespace

Tensor binary_plan(Tensor signs, int64_t rows, int64_t channels, Ints kernel, int64_t groups, int64_t kind) {
  STD_TORCH_CHECK(kernel.size() == 2, "kernel: expected two ints");
  STD_TORCH_CHECK(kind == kSignKind || kind == kFloatKind, "kind: expected 0 (signs) or 1 (floats) on CUDA");
  const Shape s{rows, channels, kernel[0], kernel[1], groups};
  check_signs(signs, s);
  Call call(signs);
  signs = as_contiguous(signs);
  return make_plan(call, signs, s, kind);
}

Tensor binary_linear(Tensor x, Tensor signs, Tensor scale, Maybe plan, Maybe bias, bool binarize_input, bool relu) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  cuda_dtype(x, "x");
  Call call(x);
  scale = checked_scale(scale, x);
  const Shape s{scale.numel(), x.size(-1), 1, 1, 1};
  const Weights weights(call, signs, s, binarize_input ? kSignKind : kFloatKind, plan);
  bias = checked_cuda_bias(bias, x, s.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = s.rows;
  Tensor y = like(x, sizes);
  if (!binarize_input) {
    x = as_contiguous(x);
    run_floats(call, linear(call, x, y, s.rows, bias, relu), weights, scale);
    return y;
  }
  Product product(call);
  product.set_linear(x, s.channels);
  product.set_weights(weights, s);
  product.set_output(y, scale, bias, relu);
  product.run();
  return y;
}

Tensor binary_conv2d(Tensor x, Tensor signs, Tensor scale, Maybe plan, Maybe bias, Ints kernel, Ints stride,
                     Ints padding, Ints dilation, int64_t groups, bool binarize_input, bool relu) {
  cuda_dtype(x, "x");
  const ConvGeometry g = conv_geometry(x, kernel, stride, padding, dilation);
  Call call(x);
  scale = checked_scale(scale, x);
  const Shape s = conv_shape(g, scale.numel(), groups);
  const Weights weights(call, signs, s, binarize_input ? kSignKind : kFloatKind, plan);
  bias = checked_cuda_bias(bias, x, s.rows);
  Tensor y = like(x, {g.batch, s.rows, g.out_h, g.out_w});
  if (!binarize_input) {
    x = as_contiguous(x);
    run_floats(call, conv2d(call, x, y, g, s.rows, groups, bias, relu), weights, scale);
    return y;
  }
  Product product(call);
  product.set_conv(x, g, groups);
  product.set_weights(weights, s);
  product.set_output(y, scale, bias, relu);
  product.run();
  return y;
}

Tensor binary_linear_from_bits(Tensor x, int64_t width, Tensor signs, Tensor scale, Maybe plan, Maybe bias, bool relu) {
  check_bits(x, 0, width);
  Call call(x);
  scale = checked_scale(scale, scale);
  const Shape s{scale.numel(), width, 1, 1, 1};
  const Weights weights(call, signs, s, kSignKind, plan);
  bias = checked_cuda_bias(bias, scale, s.rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = s.rows;
  Tensor y = like(scale, sizes);
  Product product(call);
  product.set_linear(x, width);
  product.set_weights(weights, s);
  product.set_output(y, scale, bias, relu);
  product.run();
  return y;
}

Tensor binary_conv2d_from_bits(Tensor x, int64_t channels, Tensor signs, Tensor scale, Maybe plan, Maybe bias,
                               Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups, bool relu) {
  check_bits(x, 4, channels);
  const ConvGeometry g = geometry_of(x, channels, kernel, stride, padding, dilation);
  Call call(x);
  scale = checked_scale(scale, scale);
  const Shape s = conv_shape(g, scale.numel(), groups);
  const Weights weights(call, signs, s, kSignKind, plan);
  bias = checked_cuda_bias(bias, scale, s.rows);
  Tensor y = like(scale, {g.batch, s.rows, g.out_h, g.out_w});
  Product product(call);
  product.set_conv(x, g, groups);
  product.set_weights(weights, s);
  product.set_output(y, scale, bias, relu);
  product.run();
  return y;
}

Tensor binary_linear_to_bits(Tensor x, int64_t width, Tensor signs, Maybe plan, Tensor thresholds, Tensor rising) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in_features]");
  if (is_bits(x))
    check_bits(x, 0, width);
  else
    STD_TORCH_CHECK(x.size(-1) == width, "x: expected shape [..., in_features]");
  check_thresholds(thresholds, rising);
  Call call(x);
  const Shape s{thresholds.numel(), width, 1, 1, 1};
  const Weights weights(call, signs, s, kSignKind, plan);
  thresholds = as_contiguous(thresholds);
  rising = as_contiguous(rising);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = bit_bytes(s.rows);
  Tensor y = bytes_like(x, sizes);
  Product product(call);
  product.set_linear(x, width);
  product.set_weights(weights, s);
  product.set_output_bits(y, thresholds, rising);
  product.run();
  return y;
}

Tensor binary_conv2d_to_bits(Tensor x, int64_t channels, Tensor signs, Maybe plan, Tensor thresholds, Tensor rising,
                             Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const ConvGeometry g = geometry_of(x, channels, kernel, stride, padding, dilation);
  check_thresholds(thresholds, rising);
  Call call(x);
  const Shape s = conv_shape(g, thresholds.numel(), groups);
  const Weights weights(call, signs, s, kSignKind, plan);
  thresholds = as_contiguous(thresholds);
  rising = as_contiguous(rising);
  Tensor y = bytes_like(x, {g.batch, g.out_h, g.out_w, bit_bytes(s.rows)});
  Product product(call);
  product.set_conv(x, g, groups);
  product.set_weights(weights, s);
  product.set_output_bits(y, thresholds, rising);
  product.run();
  return y;
}

Tensor binary_scale_dots(Tensor dots, Tensor scale, Maybe bias, bool relu) {
  STD_TORCH_CHECK(dots.scalar_type() == ScalarType::Int && dots.dim() == 2, "dots: expected an int32 tensor [m, n]");
  Call call(dots);
  scale = checked_scale(scale, scale);
  STD_TORCH_CHECK(scale.numel() == dots.size(1), "scale: expected one entry per output");
  bias = checked_cuda_bias(bias, scale, scale.numel());
  dots = as_contiguous(dots);
  Tensor y = like(scale, {dots.size(0), dots.size(1)});
  binary::ScaleParams p{};
  p.type = cuda_dtype(scale, "scale");
  p.dots = call.in_int32(dots, "dots");
  p.scale = call.in(scale, "scale");
  p.bias = bias ? call.in(*bias, "bias") : nullptr;
  p.y = call.out(y);
  p.m = dots.size(0);
  p.n = dots.size(1);
  p.relu = relu;
  call.check(binary::scale_dots(p, call.stream()));
  return y;
}

}  // namespace slim::cuda
