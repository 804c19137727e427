// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/launch.cuh"
#include "cuda/sparse_codebook/sparse_codebook_kernel.cuh"

namespace slim::cuda::sparse_codebook {

namespace {

constexpr int64_t kFew = 8;             // columns of few_columns_kernel
constexpr int64_t kStaged = 32 * 1024;  // bytes of x that it copies to shared memory, at most

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned grid_y(int64_t n) { return unsigned(n < 65535 ? n : 65535); }

// Elements from one k to the next where columns of a linear layer lie side by side. A multiple of 32, so that a warp's
// loads meet as few lines as they can.
int64_t transposed_width(const Activations& a) { return a.m <= kFew ? kFew : divide_up(a.m, kWarp) * kWarp; }

// Columns of a lane in many_columns_kernel: four, which decode an entry once for 128 columns, if there are as many, and
// if blocks are left for all multiprocessors.
bool wide(const Params& p) {
  const int64_t columns = columns_of(p.a);
  return columns > 64 && divide_up(columns, 128) * divide_up(p.w.rows, kManyWarps) >= p.device.multiprocessors;
}

// A 1x1 convolution whose output pixels are the input's.
bool direct(const ConvGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

bool nothing(const Params& p) { return columns_of(p.a) == 0 || p.w.rows == 0; }

// Tensor cores, if there is a plan, take a time that hardly depends on the columns, up to 32: that of decoding the cells
// once. Up to eight columns the stored stream is shorter and as quickly decoded, unless it has many entries: a chunk of
// 128 of them takes about as long as half a cell of 1024 weights. Groups of a convolution with few rows would leave most
// of a tile empty, and tables are found by a shift.
bool on_tensor_cores(const Params& p) {
  const int64_t columns = columns_of(p.a), size = p.w.group_size;
  if (!p.codes.cells || p.a.type == DType::f32 || (size > 0 && (size & (size - 1)) != 0)) return false;
  if (p.a.conv && p.w.rows / p.a.groups < 16) return false;
  return columns > kFew || (columns > 1 && p.w.entries * 4 > p.w.rows * p.w.width);
}

template <class T>
const char* transpose(const Params& p, void* stream) {
  const TransposeParams t{p.a.x, p.scratch, p.a.m, p.a.k, transposed_width(p.a)};
  const dim3 grid(unsigned(divide_up(t.k, 32)), grid_y(divide_up(t.width, 32)));
  return launch(transpose_kernel<T>,
                {"sparse_codebook::transpose", grid, dim3(32, 8), 32 * 33 * int(sizeof(T)), stream}, t);
}

template <class T, int kM>
const char* few_columns(const Params& p, ForwardParams f, void* stream) {
  const int64_t bytes = p.a.k * int64_t(sizeof(T));
  f.staged = kM == 1 && bytes <= kStaged ? int32_t(bytes) : 0;
  // As many blocks as stay resident at once (2048 threads to a multiprocessor), which go on with further rows.
  const int64_t resident = int64_t(p.device.multiprocessors) * (2048 / (kRowWarps * kWarp));
  const int64_t blocks = divide_up(p.w.rows, kRowWarps);
  const dim3 grid(unsigned(blocks < resident ? blocks : resident));
  return launch(few_columns_kernel<T, kM>,
                {"sparse_codebook::few_columns", grid, dim3(kRowWarps * kWarp), f.table_bytes + f.staged, stream}, f);
}

template <class T, bool kTaps, int kV>
const char* many_columns(const Params& p, const ForwardParams& f, void* stream) {
  const dim3 grid(unsigned(divide_up(p.w.rows, kManyWarps)), grid_y(divide_up(columns_of(p.a), kV * kWarp)));
  return launch(many_columns_kernel<T, kTaps, kV>,
                {"sparse_codebook::many_columns", grid, dim3(kManyWarps * kWarp),
                 f.table_bytes + many_shared_bytes<kTaps, kV>(), stream},
                f);
}

template <class T>
const char* forward_as(const Params& p, void* stream) {
  ForwardParams f{};
  f.a = p.a;
  f.w = p.w;
  f.x = p.a.x;
  f.table_bytes = Tables<T>::shared_bytes(p.w);
  if (p.a.conv) {
    const ConvGeometry& g = p.a.geometry;
    f.step = g.height * g.width;
    if (direct(g)) return wide(p) ? many_columns<T, false, 4>(p, f, stream) : many_columns<T, false, 1>(p, f, stream);
    return wide(p) ? many_columns<T, true, 4>(p, f, stream) : many_columns<T, true, 1>(p, f, stream);
  }
  if (p.a.m == 1) return few_columns<T, 1>(p, f, stream);
  if (const char* error = transpose<T>(p, stream)) return error;
  f.x = p.scratch;
  f.step = transposed_width(p.a);
  if (p.a.m <= kFew) return few_columns<T, kFew>(p, f, stream);
  return wide(p) ? many_columns<T, false, 4>(p, f, stream) : many_columns<T, false, 1>(p, f, stream);
}

}  // namespace

int64_t stream_scratch_bytes(const Activations& a) {
  return a.conv || a.m <= 1 ? 0 : transposed_width(a) * a.k * size_of(a.type);
}

const char* forward_stream(const Params& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return forward_as<float>(p, stream);
    case DType::f16:
      return forward_as<Half>(p, stream);
    default:
      return forward_as<BFloat16>(p, stream);
  }
}

int64_t scratch_bytes(const Params& p) {
  if (nothing(p)) return 0;
  return on_tensor_cores(p) ? tiles_scratch_bytes(p) : stream_scratch_bytes(p.a);
}

const char* forward(const Params& p, void* stream) {
  if (nothing(p)) return nullptr;
  return on_tensor_cores(p) ? forward_tiles(p, stream) : forward_stream(p, stream);
}

}  // namespace slim::cuda::sparse_codebook
