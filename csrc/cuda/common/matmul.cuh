// SPDX-License-Identifier: Apache-2.0
// The main loop of all families: Y^T [n, columns] = W [n, k] X^T [k, columns].
//
// Weights are the A operand of the tensor cores (16 rows at a time), activations the B operand (8 columns: rows of x,
// or output pixels), so that a single row of x costs one tile of eight columns. How weights are stored is the family's
// affair, told by a policy:
//
//   template <class T /* Half, BFloat16 or float */, class Tile> struct Weights {
//     using Value = T;
//     struct Params { … };              // plain pointers and sizes
//     static constexpr int kStageBytes; // shared memory for the raw bytes of a step (a multiple of 16; may be 0)
//     static constexpr int kBlockBytes; // shared memory for the whole block, as tables (a multiple of 16; may be 0)
//     static constexpr bool kExpands;   // whether expand() turns what has landed into what fragment() reads
//     // All threads. row0: the first row of the tile within its group of a convolution. A barrier follows.
//     __device__ Weights(const Params&, unsigned char* block_shared, int64_t row0, int group, int split, int splits);
//     __device__ int steps() const;               // of this block: its share of `splits`; the same in all threads
//     __device__ int64_t depth(int step) const;   // the first k of a step, which covers Tile::kDepth of them
//     __device__ void load(unsigned char* stage, int step);    // all threads; copy_async or plain stores
//     __device__ void expand(unsigned char* stage, int step);  // all threads, between barriers; only if kExpands
//     // Warp-wide: the A operand of rows row … row + 15 of the tile (row % 16 == 0) and k … of the step. Half and
//     // BFloat16: m16n8k16, k % 16 == 0; float: m16n8k8, the bits of four floats, k % 8 == 0.
//     __device__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int step, int row, int k);
//   };
//
// * Weights beyond the last row may be anything: those sums are dropped. Beyond the last k activations are zero, and
//   weights must be finite.
// * Optional: `static constexpr int kSlab` (a divisor of Tile::kDepth, a multiple of 8) and `depth(int step, int slab)`
//   instead of depth(step): a step is then put together of slabs that lie anywhere in k, as blocks do, but begin at
//   multiples of 8 (float: 4); one at or beyond the last k is empty.
// * Optional, where zeros that are not stored are multiplied too, which would turn a NaN or Inf among the activations
//   into NaN in all rows: `using Exact = …`, a struct (of no tile, so that tiles share a kernel) with the same Params
//   and `static __device__ float exact(const Params&, const Activations&, int group, int64_t row, int64_t column)`, the
//   sum of one output (row within the group) over stored weights alone. Every sum that is NaN is asked for anew. (One
//   that is Inf is right: a zero times Inf would have made it NaN.)
// * Optional: `static __device__ float scale(const Params&, int64_t row)`, a factor of each row (over all groups) of
//   the sums; the bias is added after it. Not together with Exact.
// * Optional: `static constexpr bool kTf32 = true` where weights of float32 are exact in tf32: two products then, not
//   three.
// * Optional, where much of a tile is empty: `static constexpr bool kSkips = true` and `bool stored(const unsigned char*
//   stage, int step, int row, int k)`, the same in all lanes: fragment() is asked for, and multiplied, only where it says
//   so, and activations are read only for them.
// * Optional, where tiles differ in work: `static int64_t tiles(const Params&)` and `static __device__ void tile(const
//   Params&, unsigned index, int64_t& row0, int& group)`, the order in which row tiles of all groups start.
// * depth() is asked in every step before its loads: keep what it needs in registers or the block's shared memory.
// * expand() may write to the block's shared memory: a barrier stands between it and the products of the step before.
// * load(stage, step) may run while other threads still do the products of step - kStages + 1 and later ones.
//
// A step in flight takes a stage of shared memory: activations, then the policy's bytes. While one step is multiplied,
// kStages - 1 others are on their way. Within a step fragments of 16-bit numbers are loaded one k ahead of their
// products.
//
// What bounds it, predicted from instruction counts; none of it has been timed on a GPU. A step of a 128 x 128 x 32
// tile in 16 bit, 2 x 4 warps, is 256 mma of 2048 products: 512 cycles of an SM's tensor cores on A100, about 410 on
// H100 (where mma.sync reaches some 62 % of the peak). Beside them shared memory is busy 384 cycles with 96 ldmatrix x4
// and up to 128 with what lands: as long as the tensor cores on A100, longer on H100, where warps of 64 x 64 (256 +
// 128) fit better. With 8 columns each weight meets 8 products: device memory bounds it, by the bytes of weights as
// stored. float32 takes six times the tensor time of 16 bit.
//
// float32 runs as three products of tf32: each factor is split into hi + lo, 11 bits each, and hi hi + hi lo + lo hi is
// summed; what is left out is below 2^-22 of a product.
#pragma once

#include <type_traits>

#include "cuda/common/activations.cuh"
#include "cuda/common/device.cuh"
#include "cuda/common/params.h"

namespace slim::cuda {

// A block computes Rows x Cols outputs with WarpsR x WarpsC warps, Depth of k in a step. Blocks: how many should fit a
// multiprocessor (bounds the registers).
template <int Rows, int Cols, int Depth, int WarpsR, int WarpsC, int Stages, int Blocks = 1>
struct Tile {
  static constexpr int kRows = Rows, kCols = Cols, kDepth = Depth, kWarpsR = WarpsR, kWarpsC = WarpsC, kStages = Stages;
  static constexpr int kThreads = WarpsR * WarpsC * kWarp, kBlocks = Blocks;
  static_assert(Rows % (16 * WarpsR) == 0 && Cols % (8 * WarpsC) == 0 && Stages >= 2, "what warps multiply");
};

template <class W>
struct MatmulParams {
  Activations a;
  typename W::Params w;
  float* partial;  // [splits][as y], or null
  int splits;
  unsigned row_tiles, column_tiles;
};

template <class W, class = void>
struct SlabOf {
  static constexpr int value = 0;
};
template <class W>
struct SlabOf<W, std::void_t<decltype(W::kSlab)>> {
  static constexpr int value = W::kSlab;
};

struct NoExact {
  struct Params {};
};
template <class W, class = void>
struct ExactOf {
  using type = NoExact;
  static type::Params params(const typename W::Params&) { return {}; }
};
template <class W>
struct ExactOf<W, std::void_t<typename W::Exact>> {
  using type = typename W::Exact;
  static const typename type::Params& params(const typename W::Params& p) { return p; }
};

template <class W, class = void>
struct HasScale : std::false_type {};
template <class W>
struct HasScale<W, std::void_t<decltype(&W::scale)>> : std::true_type {};

template <class W, class = void>
struct IsTf32 : std::false_type {};
template <class W>
struct IsTf32<W, std::void_t<decltype(W::kTf32)>> : std::bool_constant<W::kTf32> {};

template <class W, class = void>
struct Skips : std::false_type {};
template <class W>
struct Skips<W, std::void_t<decltype(W::kSkips)>> : std::bool_constant<W::kSkips> {};

template <class W, class = void>
struct HasOrder : std::false_type {};
template <class W>
struct HasOrder<W, std::void_t<decltype(&W::tiles)>> : std::true_type {};

template <class W, bool kConv, class Tile>
struct MatmulShape {
  using T = typename W::Value;
  using X = Columns<T, kConv, Tile>;
  static constexpr int kStageBytes = X::kStageBytes + W::kStageBytes;
  // The tile of results, [column][row] or, for a convolution, [row][column]; 16 bytes more a line against conflicts.
  static constexpr int kLine = (kConv ? Tile::kCols : Tile::kRows) + 16 / int(sizeof(T));
  static constexpr int kResultBytes = kLine * (kConv ? Tile::kRows : Tile::kCols) * int(sizeof(T));
  static constexpr int kStagesBytes =
      Tile::kStages * kStageBytes > kResultBytes ? Tile::kStages * kStageBytes : kResultBytes;
  static constexpr int kSharedBytes = kStagesBytes + X::kTableBytes + W::kBlockBytes;
  static_assert(W::kStageBytes % 16 == 0 && W::kBlockBytes % 16 == 0, "memory in chunks of 16 bytes");
};

// v = hi + lo but for its last bit or two, both in tf32 (the tensor cores drop the lower 13 bits). Inf and NaN go to
// lo, with 1 for hi: each lo meets the hi of the other factor alone, so that Inf does not become NaN by a lo of 0.
// Finite numbers that would round to Inf are cut off. Rounding is done on integers: cvt.rna would be ten instructions.
template <int kCount>
__device__ __forceinline__ void split_tf32(const uint32_t (&v)[kCount], uint32_t (&hi)[kCount],
                                           uint32_t (&lo)[kCount]) {
  constexpr uint32_t kTop = 0x7f7ff000u;  // from here on numbers round to Inf
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    hi[i] = (v[i] + 0x1000u) & 0xffffe000u;
    lo[i] = as_bits(as_float(v[i]) - as_float(hi[i])) + 0x1000u;
    const uint32_t magnitude = v[i] & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest < kTop) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t magnitude = v[i] & 0x7fffffffu;
    if (magnitude < kTop) continue;
    const bool finite = magnitude < 0x7f800000u;
    hi[i] = finite ? v[i] & 0xffffe000u : (v[i] & 0x80000000u) | 0x3f800000u;
    lo[i] = finite ? as_bits(as_float(v[i]) - as_float(hi[i])) : magnitude == 0x7f800000u ? v[i] : 0x7fffffffu;
  }
}

// B operands, split in two where that is how their type is multiplied.
template <class T, int kJ>
struct Factors {
  const uint32_t (&b)[kJ][2];
  __device__ __forceinline__ explicit Factors(const uint32_t (&from)[kJ][2]) : b(from) {}
};
template <int kJ>
struct Factors<float, kJ> {
  uint32_t hi[kJ][2], lo[kJ][2];
  __device__ __forceinline__ explicit Factors(const uint32_t (&from)[kJ][2]) {
#pragma unroll
    for (int j = 0; j < kJ; ++j) split_tf32(from[j], hi[j], lo[j]);
  }
};

// d[j] += a b[j]. kTf32: a is exact in tf32.
template <class T, bool kTf32, int kJ>
__device__ __forceinline__ void multiply_row(float (&d)[kJ][4], const uint32_t (&a)[4], const Factors<T, kJ>& b) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kJ; ++j) mma_m16n8k16<T>(d[j], a, b.b[j]);
  } else {
    if constexpr (kTf32) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) mma_m16n8k8_tf32(d[j], a, b.lo[j]);
#pragma unroll
      for (int j = 0; j < kJ; ++j) mma_m16n8k8_tf32(d[j], a, b.hi[j]);
      return;
    }
    uint32_t hi[4], lo[4];
    split_tf32(a, hi, lo);
#pragma unroll
    for (int j = 0; j < kJ; ++j) mma_m16n8k8_tf32(d[j], lo, b.hi[j]);
#pragma unroll
    for (int j = 0; j < kJ; ++j) mma_m16n8k8_tf32(d[j], hi, b.lo[j]);
#pragma unroll
    for (int j = 0; j < kJ; ++j) mma_m16n8k8_tf32(d[j], hi, b.hi[j]);
  }
}

// d[i][j] += a[i] b[j].
template <class T, bool kTf32, int kI, int kJ>
__device__ __forceinline__ void multiply(float (&d)[kI][kJ][4], const uint32_t (&a)[kI][4],
                                         const uint32_t (&b)[kJ][2]) {
  const Factors<T, kJ> factors(b);
#pragma unroll
  for (int i = 0; i < kI; ++i) multiply_row<T, kTf32>(d[i], a[i], factors);
}

// Of the sums of a tile: where they go in y, or in one split's share of the workspace, which is laid out alike.
template <class T, bool kConv, class Tile>
struct Output {
  int64_t n, pixels;      // all rows of y; pixels of an image
  int64_t row0, column0;  // row0 over all groups
  int rows, columns;      // of the tile that exist

  __device__ __forceinline__ Output(const Activations& a, int64_t row_in_group, int64_t column, int group) {
    const int64_t of_group = a.n / a.groups;
    n = a.n;
    pixels = kConv ? a.geometry.out_h * a.geometry.out_w : 1;
    row0 = group * of_group + row_in_group;
    column0 = column;
    rows = int(of_group - row_in_group < Tile::kRows ? of_group - row_in_group : Tile::kRows);
    const int64_t left = count_columns(a) - column;
    columns = int(left < Tile::kCols ? left : Tile::kCols);
  }
  // Of a column of the tile, at the tile's first row.
  __device__ __forceinline__ int64_t at(int column) const {
    const int64_t c = column0 + column;
    if constexpr (!kConv) return c * n + row0;
    const int64_t b = c / pixels;
    return (b * n + row0) * pixels + (c - b * pixels);
  }
  __device__ __forceinline__ int64_t row_stride() const { return kConv ? pixels : 1; }
};

template <class W, bool kConv, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) matmul_kernel(const MatmulParams<W> p) {
  using Shape = MatmulShape<W, kConv, Tile>;
  using T = typename W::Value;
  using X = typename Shape::X;
  constexpr int kK = 32 / int(sizeof(T));  // k of one product
  constexpr int kSteps = Tile::kDepth / kK;
  constexpr int kI = Tile::kRows / Tile::kWarpsR / 16, kJ = X::kTiles;
  constexpr int kSlab = SlabOf<W>::value;
  using Exact = typename ExactOf<W>::type;
  constexpr bool kExact = !std::is_same_v<Exact, NoExact>;
  static_assert(!(HasScale<W>::value && kExact), "sums that are asked for anew have no scale");
  static_assert(Tile::kDepth % kK == 0, "a step is made of whole products");

  unsigned char* const stages = dynamic_shared();
  unsigned rest = blockIdx.x;
  int64_t row0, column0;
  int group, split;
  if constexpr (HasOrder<W>::value) {
    column0 = int64_t(rest % p.column_tiles) * Tile::kCols;
    rest /= p.column_tiles;
    split = int(rest % unsigned(p.splits));
    W::tile(p.w, rest / unsigned(p.splits), row0, group);
  } else {
    // Row tiles run fastest: blocks at work together share activations, and read all of the weights, which are small.
    row0 = int64_t(rest % p.row_tiles) * Tile::kRows;
    rest /= p.row_tiles;
    column0 = int64_t(rest % p.column_tiles) * Tile::kCols;
    rest /= p.column_tiles;
    group = int(rest % unsigned(p.a.groups));
    split = int(rest / unsigned(p.a.groups));
  }

  W w(p.w, stages + Shape::kStagesBytes + X::kTableBytes, row0, group, split, p.splits);
  X x(p.a, stages + Shape::kStagesBytes, column0, group);
  const int warp = int(threadIdx.x) / kWarp;
  const int warp_row = warp % Tile::kWarpsR * (Tile::kRows / Tile::kWarpsR);
  const int warp_column = warp / Tile::kWarpsR * X::kWidth;
  const auto depth_of = [&w](int step) {
    if constexpr (kSlab > 0) {
      return [&w, step](int i) { return int64_t(w.depth(step, i / kSlab)) + i % kSlab; };
    } else {
      const int64_t first = w.depth(step);
      return [first](int i) { return first + i; };
    }
  };

  const int steps = w.steps();
  if constexpr (kConv) {
    if constexpr (W::kBlockBytes > 0) sync_threads();  // depth() may read it
#pragma unroll 1
    for (int s = 0; s < Tile::kStages && s < steps; ++s) x.prepare(depth_of(s), s);
  }
  if constexpr (kConv || W::kBlockBytes > 0) sync_threads();
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) {
      unsigned char* const stage = stages + s * Shape::kStageBytes;
      x.load(stage, s, depth_of(s));
      w.load(stage + X::kStageBytes, s);
      x.store(stage);
    }
    copy_commit();
  }

  float d[kI][kJ][4] = {};
  int slot = 0, free = Tile::kStages - 1;  // the stage of this step, and the one that the step before has left
  for (int step = 0; step < steps; ++step) {
    copy_wait<Tile::kStages - 2>();
    sync_threads();
    const int next = step + Tile::kStages - 1;
    unsigned char* const into = stages + free * Shape::kStageBytes;
    if (next < steps) {
      x.load(into, free, depth_of(next));
      w.load(into + X::kStageBytes, next);
      if (kConv && next + 1 < steps) x.prepare(depth_of(next + 1), slot);
    }
    copy_commit();
    unsigned char* const stage = stages + slot * Shape::kStageBytes;
    unsigned char* const raw = stage + X::kStageBytes;
    if constexpr (W::kExpands) {
      w.expand(raw, step);
      sync_threads();
    }
    if constexpr (Skips<W>::value) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        bool here[kI], any = false;
#pragma unroll
        for (int i = 0; i < kI; ++i) any |= here[i] = w.stored(raw, step, warp_row + 16 * i, s * kK);
        if (!any) continue;
        uint32_t b[kJ][2];
        X::fragment(b, stage, warp_column, s * kK);
        const Factors<T, kJ> factors(b);
#pragma unroll
        for (int i = 0; i < kI; ++i) {
          if (!here[i]) continue;
          uint32_t a[4];
          w.fragment(a, raw, step, warp_row + 16 * i, s * kK);
          multiply_row<T, IsTf32<W>::value>(d[i], a, factors);
        }
      }
    } else {
      constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;
      uint32_t a[kBuffers][kI][4], b[kBuffers][kJ][2];
      const auto fragments = [&](int s) {
        X::fragment(b[s % kBuffers], stage, warp_column, s * kK);
#pragma unroll
        for (int i = 0; i < kI; ++i) w.fragment(a[s % kBuffers][i], raw, step, warp_row + 16 * i, s * kK);
      };
      fragments(0);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (kBuffers == 2 && s + 1 < kSteps) fragments(s + 1);
        multiply<T, IsTf32<W>::value>(d, a[s % kBuffers], b[s % kBuffers]);
        if (kBuffers == 1 && s + 1 < kSteps) fragments(s + 1);
      }
    }
    if (next < steps) x.store(into);
    free = slot;
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }

  // Lane 4 g + t has rows g and g + 8, columns 2 t and 2 t + 1 of each tile of 16 x 8.
  const int lane = int(threadIdx.x) % kWarp, lane_row = warp_row + lane / 4, lane_column = warp_column + lane % 4 * 2;
  const Output<T, kConv, Tile> out(p.a, row0, column0, group);
  if (p.partial) {
    // Eight lanes (linear) or four (a convolution) fill a sector of 32 bytes.
    float* const to = p.partial + int64_t(split) * p.a.n * count_columns(p.a);
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = lane_column + 8 * j + h;
        if (column >= out.columns) continue;
        float* const at = to + out.at(column);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int row = lane_row + 16 * i + 8 * v;
            if (row >= out.rows) continue;
            float sum = d[i][j][2 * v + h];
            if constexpr (HasScale<W>::value) sum *= W::scale(p.w, out.row0 + row);
            at[row * out.row_stride()] = sum;
          }
      }
    return;
  }

  sync_threads();
  T* const result = reinterpret_cast<T*>(stages);
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kI; ++i)
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int row = lane_row + 16 * i + 8 * v;
      const float bias =
          p.a.bias && row < out.rows ? to_float(load_constant(static_cast<const T*>(p.a.bias) + out.row0 + row)) : 0.0f;
      float scale = 1.0f;
      if constexpr (HasScale<W>::value) scale = row < out.rows ? W::scale(p.w, out.row0 + row) : 0.0f;
#pragma unroll
      for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = lane_column + 8 * j + h;
          float sum = (HasScale<W>::value ? d[i][j][2 * v + h] * scale : d[i][j][2 * v + h]) + bias;
          if constexpr (kExact) nan |= sum != sum;
          if (p.a.relu && sum < 0.0f) sum = 0.0f;
          result[kConv ? row * Shape::kLine + column : column * Shape::kLine + row] = from_float<T>(sum);
        }
    }
  if constexpr (kExact) {
    // Rare, so small code: each thread looks through what it has just written.
    if (nan) {
#pragma unroll 1
      for (int e = 0; e < kI * kJ * 4; ++e) {
        const int row = lane_row + e / (4 * kJ) * 16 + (e & 2) * 4, column = lane_column + e / 4 % kJ * 8 + (e & 1);
        T& at = result[kConv ? row * Shape::kLine + column : column * Shape::kLine + row];
        const float old = to_float(at);
        if (row >= out.rows || column >= out.columns || old == old) continue;
        float sum = Exact::exact(p.w, p.a, group, row0 + row, column0 + column);
        if (p.a.bias) sum += to_float(load_constant(static_cast<const T*>(p.a.bias) + out.row0 + row));
        if (p.a.relu && sum < 0.0f) sum = 0.0f;
        at = from_float<T>(sum);
      }
    }
  }
  sync_threads();
  constexpr int kPer = 16 / int(sizeof(T));
  T* const y = static_cast<T*>(p.a.y);
  // Whole chunks of 16 bytes, where those of the tile are chunks of y too; else one by one.
  const bool wide = reinterpret_cast<uintptr_t>(y) % 16 == 0 && (kConv ? out.pixels : out.n) % kPer == 0;
  if constexpr (kConv) {
    const int per = wide ? kPer : 1, column = int(threadIdx.x) % (Tile::kCols / per) * per;
    if (column >= out.columns) return;
    T* const at = y + out.at(column);
    for (int row = int(threadIdx.x) / (Tile::kCols / per); row < out.rows;
         row += Tile::kThreads / (Tile::kCols / per)) {
      T* const to = at + row * out.pixels;
      const T* const from = result + row * Shape::kLine + column;
      if (wide)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        *to = *from;
    }
  } else {
    const int per = wide ? kPer : 1, chunks = Tile::kRows / per;
    for (int i = int(threadIdx.x); i < out.columns * chunks; i += Tile::kThreads) {
      const int column = i / chunks, row = i % chunks * per;
      if (row >= out.rows) continue;
      T* const to = y + out.at(column) + row;
      const T* const from = result + column * Shape::kLine + row;
      if (wide)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        *to = *from;
    }
  }
}

// Adds up the shares of a split sum, always in the same order.
template <class Exact>
struct ReduceParams {
  const float* partial;  // [splits][as y]
  void* y;
  const void* bias;
  int splits;
  bool relu;
  int64_t total, n, inner;  // entries of y; rows; entries from one row of y to the next
  Activations a;            // for exact()
  typename Exact::Params exact;
};

constexpr int kReduceThreads = 256;

template <class T, class Exact>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const ReduceParams<Exact> p) {
  constexpr bool kExact = !std::is_same_v<Exact, NoExact>;
  T* const y = static_cast<T*>(p.y);
  bool nan = false;
  for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; i < p.total;
       i += int64_t(gridDim.x) * kReduceThreads) {
    float sum = 0.0f;
    for (int s = 0; s < p.splits; ++s) sum += p.partial[s * p.total + i];
    if constexpr (kExact) nan |= sum != sum;
    if (p.bias) sum += to_float(load_constant(static_cast<const T*>(p.bias) + i / p.inner % p.n));
    if (p.relu && sum < 0.0f) sum = 0.0f;
    y[i] = from_float<T>(sum);
  }
  if constexpr (kExact) {
    if (!nan) return;
    // Rare: each thread looks through what it has just written.
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; i < p.total;
         i += int64_t(gridDim.x) * kReduceThreads) {
      const float old = to_float(y[i]);
      if (old == old) continue;
      const int64_t line = i / p.inner, column = line / p.n;  // of y [columns / inner][n][inner]
      const uint32_t row = uint32_t(line - column * p.n), of_group = uint32_t(p.n) / uint32_t(p.a.groups);
      float sum =
          Exact::exact(p.exact, p.a, int(row / of_group), row % of_group, column * p.inner + (i - line * p.inner));
      if (p.bias) sum += to_float(load_constant(static_cast<const T*>(p.bias) + row));
      if (p.relu && sum < 0.0f) sum = 0.0f;
      y[i] = from_float<T>(sum);
    }
  }
}

}  // namespace slim::cuda
