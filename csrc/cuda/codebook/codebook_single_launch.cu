// SPDX-License-Identifier: Apache-2.0
// Linear layers whose codes are looked up one by one: float32, more than 4 bits, tables per group or row.
#include "cuda/codebook/codebook_products.h"
#include "cuda/codebook/codebook_weights.cuh"
#include "cuda/common/matmul_launch.cuh"

namespace slim::cuda::codebook {

namespace {

template <class T, class Tile>
const char* run(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  using W = SingleWeights<T, Tile>;
  return matmul<W, false, Tile>("codebook::linear", a, {w, group_magic(w, W::kK)}, c.splits, partial, stream);
}

template <class T>
const char* half(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  if (c.columns == 16) return run<T, Tile<128, 16, 64, 8, 1, 4, 2>>(a, w, c, partial, stream);
  return run<T, Tile<128, 64, 64, 4, 1, 3, 2>>(a, w, c, partial, stream);
}

}  // namespace

const char* linear_single(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  if (a.type == DType::f16) return half<Half>(a, w, c, partial, stream);
  if (a.type == DType::bf16) return half<BFloat16>(a, w, c, partial, stream);
  if (c.columns == 16) return run<float, Tile<64, 16, 64, 4, 1, 4>>(a, w, c, partial, stream);
  return run<float, Tile<64, 64, 64, 4, 2, 3>>(a, w, c, partial, stream);
}

}  // namespace slim::cuda::codebook
