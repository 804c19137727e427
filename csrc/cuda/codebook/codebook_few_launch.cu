// SPDX-License-Identifier: Apache-2.0
// Linear layers with few rows of x, codes in pairs.
#include "cuda/codebook/codebook_few.cuh"
#include "cuda/codebook/codebook_products.h"
#include "cuda/common/launch.cuh"

namespace slim::cuda::codebook {

namespace {

template <class T, int kBits, int kCols>
const char* run(const FewParams& p, void* stream) {
  const unsigned blocks = unsigned((p.a.n + kFewRows - 1) / kFewRows);
  return launch(few_kernel<T, kBits, kCols>,
                {"codebook::linear, few rows", dim3(blocks), dim3(kFewWarps * kWarp),
                 FewShape<kBits, kCols>::kSharedBytes, stream},
                p);
}

template <class T, int kBits>
const char* sized(const FewParams& p, void* stream) {
  return p.a.m <= 8 ? run<T, kBits, 8>(p, stream) : run<T, kBits, 16>(p, stream);
}

template <class T>
const char* typed(const FewParams& p, void* stream) {
  return p.w.bits == 4 ? sized<T, 4>(p, stream) : p.w.bits == 3 ? sized<T, 3>(p, stream) : sized<T, 2>(p, stream);
}

}  // namespace

const char* linear_few(const Activations& a, const Weight& w, void* stream) {
  return a.type == DType::f16 ? typed<Half>({a, w}, stream) : typed<BFloat16>({a, w}, stream);
}

}  // namespace slim::cuda::codebook
