// SPDX-License-Identifier: Apache-2.0
// Linear layers whose codes are looked up in pairs: 16-bit values, one table, up to 4 bits.
#include "cuda/codebook/codebook_products.h"
#include "cuda/codebook/codebook_weights.cuh"
#include "cuda/common/matmul_launch.cuh"

namespace slim::cuda::codebook {

namespace {

// kBits: 4, or 0 for whatever it is.
template <class T, int kBits, class Tile>
const char* run(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  return matmul<PairWeights<T, Tile, kBits>, false, Tile>("codebook::linear, pairs", a, {w, 0}, c.splits, partial,
                                                          stream);
}

template <class T>
const char* typed(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  if (c.columns == 16) return run<T, 0, Tile<128, 16, 128, 8, 1, 4, 2>>(a, w, c, partial, stream);
  if (c.columns == 128) return run<T, 4, Tile<128, 128, 64, 4, 2, 3>>(a, w, c, partial, stream);
  return w.bits == 4 ? run<T, 4, Tile<128, 64, 64, 4, 1, 3, 2>>(a, w, c, partial, stream)
                     : run<T, 0, Tile<128, 64, 64, 4, 1, 3, 2>>(a, w, c, partial, stream);
}

}  // namespace

const char* linear_pair(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream) {
  return a.type == DType::f16 ? typed<Half>(a, w, c, partial, stream) : typed<BFloat16>(a, w, c, partial, stream);
}

}  // namespace slim::cuda::codebook
