// SPDX-License-Identifier: Apache-2.0
// Which tiles signs x floats are multiplied in.
#pragma once

#include "cuda/binary/binary_float_kernel.cuh"
#include "cuda/common/matmul_launch.cuh"

namespace slim::cuda::binary {

// Many columns: as dense layers are multiplied, 64 x 32 sums to a warp (float32, which splits its fragments: 32 x 32). Few:
// small tiles, whose stages are mostly activations.
template <class T>
using ManyColumns = std::conditional_t<sizeof(T) == 2, Tile<128, 128, 64, 2, 4, 4>, Tile<128, 64, 64, 4, 2, 3>>;
template <class T>
using FewColumns = Tile<64, 16, 128, 4, 1, 4>;

constexpr int64_t kFewColumns = 48;  // up to which weights are read (and decoded) again by each 16 columns

template <class T, bool kConv, class Tile>
const char* start_floats(const FloatParams& p, int splits, float* partial, void* stream) {
  using W = SignWeights<T, Tile>;
  const FloatLayout l = float_layout_of({p.a.n, p.a.k, 1, 1, p.a.groups});  // k: channels and taps
  const char* name = kConv ? "binary::conv2d_floats" : "binary::linear_floats";
  return matmul<W, kConv, Tile>(name, p.a, {p.words, l.rows, l.blocks, p.scale}, splits, partial, stream);
}

template <class T>
const char* start_floats(const FloatParams& p, int splits, float* partial, void* stream) {
  const bool few = columns_of(p.a) <= kFewColumns;
  if (p.a.conv)
    return few ? start_floats<T, true, FewColumns<T>>(p, splits, partial, stream)
               : start_floats<T, true, ManyColumns<T>>(p, splits, partial, stream);
  return few ? start_floats<T, false, FewColumns<T>>(p, splits, partial, stream)
             : start_floats<T, false, ManyColumns<T>>(p, splits, partial, stream);
}

// One file each, to be compiled side by side.
const char* floats_f32(const FloatParams& p, int splits, float* partial, void* stream);
const char* floats_f16(const FloatParams& p, int splits, float* partial, void* stream);
const char* floats_bf16(const FloatParams& p, int splits, float* partial, void* stream);

}  // namespace slim::cuda::binary
