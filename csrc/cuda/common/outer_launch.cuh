// SPDX-License-Identifier: Apache-2.0
// Starting the gradients of weights. Only *_launch.cu files include this.
#pragma once

#include "cuda/common/matmul_launch.cuh"
#include "cuda/common/outer.cuh"

namespace slim::cuda {

template <class K, bool kConv, class Tile>
constexpr int outer_shared() {
  return OuterShape<K, kConv, Tile>::kSharedBytes;
}

// Runs the policy's tiles 0 … tiles - 1 in `splits` shares of the columns each (at most 65535). a.y is the gradient of
// the output. Returns null, or what is wrong.
template <class K, bool kConv, class Tile>
const char* outer(const char* name, const Activations& a, const typename K::Params& kept, int64_t tiles, int splits,
                  void* stream) {
  if (const char* error = check_geometry(a)) return error;
  if (tiles > INT32_MAX || splits > 65535) return "too many tiles for one grid";
  const OuterParams<K> p{a, kept, splits};
  return launch(
      outer_kernel<K, kConv, Tile>,
      {name, dim3(unsigned(tiles), unsigned(splits)), dim3(Tile::kThreads), outer_shared<K, kConv, Tile>(), stream}, p);
}

// values[i] = sum over s of partial[s][i], i < count: what keep() has written in shares, in a fixed order.
template <class T>
const char* add_splits(const float* partial, int splits, int64_t count, void* values, void* stream) {
  const int64_t blocks = (count + kAddThreads - 1) / kAddThreads;
  const dim3 grid(unsigned(blocks < 65535 ? blocks : 65535));
  return launch(add_kernel<T>, {"add", grid, dim3(kAddThreads), 0, stream}, AddParams{partial, values, splits, count});
}

}  // namespace slim::cuda
