// SPDX-License-Identifier: Apache-2.0
// Convolutions, and the choice between all products.
#include "cuda/codebook/codebook_kernel.cuh"
#include "cuda/codebook/codebook_products.h"
#include "cuda/common/matmul_launch.cuh"

namespace slim::cuda::codebook {

namespace {

template <class W, class Tile>
const char* run(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  return matmul<W, true, Tile>("codebook::conv2d", a, {w, group_magic(w, 32 / int(sizeof(typename W::Value)))},
                               c.splits, partial, stream);
}

template <class T>
const char* half(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  using Tile = slim::cuda::Tile<64, 64, 64, 2, 2, 3>;
  return c.kernel == Kernel::pair ? run<PairWeights<T, Tile, 0>, Tile>(a, w, c, partial, stream)
                                  : run<SingleWeights<T, Tile>, Tile>(a, w, c, partial, stream);
}

template <class T>
const char* few_rows(const Activations& a, const Weight& w, void* stream) {
  const int64_t blocks = (columns_of(a) + kPixels - 1) / kPixels;
  if (blocks > INT32_MAX) return "too many output pixels for one grid";
  return launch(few_rows_kernel<T>,
                {"codebook::conv2d, few rows", dim3(unsigned(blocks), unsigned(a.n < 65535 ? a.n : 65535)),
                 dim3(kPixels), kTaps * int(sizeof(Tap)), stream},
                FewRowsParams{a, w});
}

// No sum at all: what is left is the bias.
bool nothing(const Activations& a) { return a.n == 0 || columns_of(a) == 0; }

}  // namespace

const char* conv(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  if (c.kernel == Kernel::few_rows_of_group) {
    if (const char* error = check_geometry(a)) return error;
    return a.type == DType::f32   ? few_rows<float>(a, w, stream)
           : a.type == DType::f16 ? few_rows<Half>(a, w, stream)
                                  : few_rows<BFloat16>(a, w, stream);
  }
  if (a.type == DType::f16) return half<Half>(a, w, c, partial, stream);
  if (a.type == DType::bf16) return half<BFloat16>(a, w, c, partial, stream);
  using Tile = slim::cuda::Tile<64, 64, 64, 4, 2, 3>;
  return run<SingleWeights<float, Tile>, Tile>(a, w, c, partial, stream);
}

const char* forward(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  if (nothing(a)) return nullptr;
  if (a.conv) return conv(a, w, c, partial, stream);
  if (c.kernel == Kernel::few_columns) return linear_few(a, w, stream);
  return c.kernel == Kernel::pair ? linear_pair(a, w, c, partial, stream) : linear_single(a, w, c, partial, stream);
}

}  // namespace slim::cuda::codebook
