// SPDX-License-Identifier: Apache-2.0
// Signs x floats: weights of the main loop (cuda/common/matmul.cuh) that are a bit each until they are in registers.
//
//   stage      [Depth / 64][kRows] of 64 bits: what the plan holds, 1 / 16 of what dense weights would take
//   fragment   a shift and one three-input logic instruction for a register, that is for two weights of 16 bits:
//              the bits of k and k + 1 are 16 apart in their word, shifting moves both to where the signs of the two halves
//              are, and (word & 0x80008000) ^ 0xbc00bc00 is +1 or -1 in each half (bfloat16: ^ 0xbf80bf80)
//
// Lane 4 g + t needs k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each 16 (float32: t, t + 4 of each 8), at shifts that differ by
// a part of t alone and one of k alone, which the compiler knows. Four lanes read the same word, eight rows lie in eight
// pairs of banks. The scale of a row meets its sums at the end.
//
// Few columns are bound by latency: 4096 x 4096 weights are 2 MB. Many are bound by the tensor cores as dense ones.
#pragma once

#include "cuda/binary/binary.h"
#include "cuda/common/matmul.cuh"

namespace slim::cuda::binary {

template <class T, class Tile>
class SignWeights {
 public:
  using Value = T;
  struct Params {
    const uint8_t* words;  // [groups][blocks][rows] of 8 bytes
    int64_t rows, blocks;  // of a group, see FloatLayout
    const void* scale;     // [n] of T
  };
  static constexpr int kBlocks = Tile::kDepth / 64;
  static constexpr int kStageBytes = kBlocks * Tile::kRows * 8, kBlockBytes = 0;
  static constexpr bool kExpands = false, kTf32 = true;
  static_assert(Tile::kDepth % 64 == 0, "steps of whole words");

  __device__ __forceinline__ SignWeights(const Params& p, unsigned char*, int64_t row0, int group, int split,
                                         int splits)
      : rows_(p.rows), blocks_(p.blocks) {
    const int64_t all = (p.blocks + kBlocks - 1) / kBlocks;
    first_ = all * split / splits;
    steps_ = int(all * (split + 1) / splits - first_);
    left_ = int(p.rows - row0 < Tile::kRows ? p.rows - row0 : Tile::kRows);
    from_ = p.words + (group * p.blocks * p.rows + row0) * 8;
  }

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int64_t depth(int step) const { return (first_ + step) * Tile::kDepth; }

  __device__ __forceinline__ void load(unsigned char* stage, int step) {
    constexpr int kPairs = Tile::kRows / 2;  // of rows: 16 bytes
    for (int i = int(threadIdx.x); i < kBlocks * kPairs; i += Tile::kThreads) {
      const int row = i % kPairs * 2;
      const int64_t block = (first_ + step) * kBlocks + i / kPairs;
      const bool in = row < left_ && block < blocks_;
      copy_async<16>(stage + i * 16, in ? from_ + (block * rows_ + row) * 8 : from_, in ? 16 : 0);
    }
  }

  __device__ void expand(unsigned char*, int) {}

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int, int row, int k) {
    const int lane = int(threadIdx.x) % kWarp, t = lane % 4;
    const unsigned char* at = stage + (k / 64 * Tile::kRows + row + lane / 4) * 8 + k / 32 % 2 * 4;
    uint32_t w[2] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 64)};
    if constexpr (sizeof(T) == 2) {
      constexpr uint32_t kMinusOnes = std::is_same<T, Half>::value ? 0xbc00bc00u : 0xbf80bf80u;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = (((w[i % 2] << (3 - t)) << (12 - k % 32 / 2 - i / 2 * 4)) & 0x80008000u) ^ kMinusOnes;
    } else {
      const int shift = (t % 2 ? 0 : 16) + 1 - t / 2;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = (((w[i % 2] << shift) << (14 - k % 32 / 2 - i / 2 * 2)) & 0x80000000u) ^ 0xbf800000u;
    }
  }

  __device__ __forceinline__ static float scale(const Params& p, int64_t row) {
    return to_float(load_constant(static_cast<const T*>(p.scale) + row));
  }

 private:
  const uint8_t* from_;
  int64_t rows_, blocks_, first_;
  int steps_, left_;
};

}  // namespace slim::cuda::binary
