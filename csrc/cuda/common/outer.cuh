// SPDX-License-Identifier: Apache-2.0
// Gradients of weights: G [n, columns] X^T [columns, k], summed over all columns, of which a family keeps the entries
// that it stores. A block computes a tile of Rows x Cols of them, Cols counting k, Depth columns in a step:
//
//   linear       G [columns, n], X [columns, k]: stages are [column][row] and [column][k], fragments by ldmatrix.trans
//                (float32 by plain loads)
//   convolution  G [batch, n, pixels], X the lowered input: stages are [row][pixel] and [k][pixel], fragments by
//                ldmatrix
//
// A family tells by a policy where tiles lie and what is kept of them:
//
//   template <class T, class Tile> struct Kept {
//     using Value = T;
//     struct Params { … };
//     static constexpr int kSlab;        // divides Tile::kCols, a multiple of 8: so many k of a tile lie together
//     static constexpr int kBlockBytes;  // shared memory for the whole block (a multiple of 16; may be 0)
//     __device__ Kept(const Params&, unsigned char* block_shared, int64_t tile);  // all threads; a barrier follows
//     __device__ int group() const;         // of a convolution
//     __device__ int64_t row() const;       // first row of the tile, within its group
//     __device__ int64_t k(int slab) const; // first k of a slab; at or beyond the depth of x: the slab is empty
//     // All threads: sums[row * kOuterLine<Tile> + i] is the sum for a row and the i-th k of the tile.
//     __device__ void keep(const float* sums, int split);
//   };
//
// So a block row of 16 x 16 blocks is a tile of 16 rows and as many slabs of 16 as Cols holds, wherever they lie, and
// nothing that is not stored is computed; unstructured weights compute whole tiles and keep what they store. Where
// columns are many and tiles few, columns are split: keep() then writes floats, and add_kernel adds them up in order.
//
// Predicted, not timed: bound by the tensor cores once Rows and Cols are 128 (32 products for each byte loaded in 16
// bit), by the second-level cache for a tile of 16 rows (7 a byte).
#pragma once

#include "cuda/common/activations.cuh"
#include "cuda/common/matmul.cuh"

namespace slim::cuda {

template <class K>
struct OuterParams {
  Activations a;  // y: the gradient of the output
  typename K::Params kept;
  int splits;
};

template <class Tile>
constexpr int kOuterLine = Tile::kCols + 4;  // floats of a row of sums

// Both operands, from global to shared memory: see activations.cuh for the ways of loading.
template <class K, bool kConv, class Tile>
class OuterLoads {
 public:
  using T = typename K::Value;
  static constexpr int kSize = int(sizeof(T)), kSlabs = Tile::kCols / K::kSlab;
  static constexpr int kGradRowBytes = (kConv ? Tile::kDepth : Tile::kRows) * kSize;
  static constexpr int kInputRowBytes = (kConv ? Tile::kDepth : Tile::kCols) * kSize;
  static constexpr int kGradBytes = Tile::kRows * Tile::kDepth * kSize;
  static constexpr int kStageBytes = (Tile::kRows + Tile::kCols) * Tile::kDepth * kSize;
  static constexpr bool kWords = !kConv && kSize == 4;  // fragments are read word by word
  // Convolutions: of each k of the tile (offset in an image, y, x, unused); of each pixel of a step (y, x, image,
  // index).
  static constexpr int kTableBytes = kConv ? (Tile::kCols + Tile::kStages * Tile::kDepth) * 16 : 0;
  static_assert(Tile::kCols % K::kSlab == 0 && K::kSlab % 8 == 0, "slabs of whole fragments");

  // A barrier must stand between this, or prepare(), and load().
  __device__ __forceinline__ OuterLoads(const Activations& a, const K& kept, unsigned char* table)
      : kept_(kept), taps_(reinterpret_cast<uint4*>(table)), pixels_(taps_ + Tile::kCols) {
    const int64_t of_group = a.n / a.groups, left = of_group - kept.row();
    const T* grad = static_cast<const T*>(a.y);
    rows_ = int(left < Tile::kRows ? left : Tile::kRows);
    columns_ = count_columns(a);
    k_ = a.k;
    x_ = static_cast<const T*>(a.x);
    const auto address = [](const void* p) { return uint64_t(reinterpret_cast<uintptr_t>(p)); };
    if constexpr (!kConv) {
      n_ = a.n;
      grad_ = grad + kept.row();
      grad_vector_ = low_bit(address(grad_) | uint64_t(n_ * kSize));
      uint64_t at = address(x_) | uint64_t(k_ * kSize);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
        if (kept.k(s) < k_) at |= uint64_t(kept.k(s) * kSize);
      input_vector_ = low_bit(at);
    } else {
      const ConvGeometry& g = a.geometry;
      g_ = &a.geometry;
      const int64_t inside = g.height * g.width;
      of_image_ = g.channels * inside;
      n_ = a.n;
      out_ = g.out_h * g.out_w;
      grad_ = grad + (kept.group() * of_group + kept.row()) * out_;
      x_ += g.channels / a.groups * kept.group() * inside;
      const bool direct =
          g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
      grad_vector_ = low_bit(address(grad) | uint64_t(out_ * kSize));
      input_vector_ = direct ? low_bit(address(a.x) | uint64_t(out_ * kSize)) : 0;
      const unsigned taps = unsigned(g.kernel_h * g.kernel_w), kernel_w = unsigned(g.kernel_w);
#pragma unroll 1
      for (int i = int(threadIdx.x); i < Tile::kCols; i += Tile::kThreads) {
        const int64_t k = kept.k(i / K::kSlab) + i % K::kSlab;
        uint4 tap{0, uint32_t(-kFar), 0, 0};
        if (k < k_) {
          const unsigned channel = unsigned(k) / taps, rest = unsigned(k) - channel * taps, r = rest / kernel_w;
          tap.y = r * unsigned(g.dilation_h);
          tap.z = (rest - r * kernel_w) * unsigned(g.dilation_w);
          tap.x = (channel * unsigned(g.height) + tap.y) * unsigned(g.width) + tap.z;
        }
        taps_[i] = tap;
      }
    }
  }

  // Convolutions: the pixels of a step.
  __device__ __forceinline__ void prepare(int64_t column0, int slot) {
    if constexpr (kConv) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < Tile::kDepth; i += Tile::kThreads) {
        const int64_t column = column0 + i;
        uint4 pixel{uint32_t(-kFar), 0, 0, uint32_t(-kFar)};  // addresses stay aligned
        if (column < columns_) {
          const int64_t image = column / out_;
          const unsigned at = unsigned(column - image * out_), y = at / unsigned(g_->out_w);
          pixel.x = y * unsigned(g_->stride_h) - unsigned(g_->pad_h);
          pixel.y = (at - y * unsigned(g_->out_w)) * unsigned(g_->stride_w) - unsigned(g_->pad_w);
          pixel.z = unsigned(image);
          pixel.w = at;
        }
        pixels_[slot * Tile::kDepth + i] = pixel;
      }
    }
  }

  // Starts to load columns column0 … of both; the caller commits.
  __device__ __forceinline__ void load(unsigned char* stage, int64_t column0, int slot) {
    if constexpr (kConv) {
      load_images<Tile::kRows, true>(stage, fetched_grad_, grad_vector_, slot);
      load_images<Tile::kCols, false>(stage + kGradBytes, fetched_input_, input_vector_, slot);
    } else {
      load_lines<Tile::kRows, true>(stage, grad_vector_, column0);
      load_lines<Tile::kCols, false>(stage + kGradBytes, input_vector_, column0);
    }
  }

  // Ends what load() began and cp.async cannot do.
  __device__ __forceinline__ void store(unsigned char* stage) {
    if constexpr (kConv && kSize == 2) {
      if (grad_vector_ < 4) put<Tile::kRows>(stage, fetched_grad_);
      if (input_vector_ < 4) put<Tile::kCols>(stage + kGradBytes, fetched_input_);
    }
  }

 private:
  static constexpr int kFar = 1 << 30;  // beyond every image
  static constexpr int kPairs = Tile::kDepth / 2, kRowsAtOnce = Tile::kThreads / kPairs;
  template <int kLines>
  static constexpr int kFetches = kConv && kSize == 2 ? (kLines + kRowsAtOnce - 1) / kRowsAtOnce : 1;
  static_assert(Tile::kThreads % Tile::kDepth == 0 && Tile::kThreads % 32 == 0, "each thread has a place in all rows");

  // A linear layer: lines of the operand are columns of the product, along them lie rows of G or k of X. Each thread
  // has one chunk of some lines.
  template <int kLines, bool kGrad>
  __device__ __forceinline__ void load_lines(unsigned char* stage, int vector, int64_t column0) {
    if (vector == 16)
      copy_lines<16, kLines, kGrad>(stage, column0);
    else if (vector == 8)
      copy_lines<8, kLines, kGrad>(stage, column0);
    else if (kSize == 4 || vector == 4)
      copy_lines<4, kLines, kGrad>(stage, column0);
    else
      copy_lines<2, kLines, kGrad>(stage, column0);
  }

  template <int kBytes, int kLines, bool kGrad>
  __device__ __forceinline__ void copy_lines(unsigned char* stage, int64_t column0) {
    constexpr int kPer = kBytes >= kSize ? kBytes / kSize : 1, kChunks = kLines / kPer;
    constexpr int kThreads = Tile::kThreads < kChunks ? Tile::kThreads : kChunks;  // side by side
    static_assert(kChunks % kThreads == 0 && Tile::kThreads % kThreads == 0, "whole lines");
    const T* const base = kGrad ? grad_ : x_;
    const int64_t stride = kGrad ? n_ : k_;
    const int first = int(threadIdx.x) / kThreads;
#pragma unroll
    for (int part = 0; part < kChunks / kThreads; ++part) {
      const int at = (int(threadIdx.x) % kThreads + part * kThreads) * kPer;
      const int64_t along = kGrad ? at : kept_.k(at / K::kSlab) + at % K::kSlab;
      const int64_t left = (kGrad ? int64_t(rows_) : k_) - along;
      const int64_t columns =
          left > 0 ? columns_ - column0 : 0;  // chunks lie before the edge or beyond it, never across
      const T* from = base + (column0 + first) * stride + along;
#pragma unroll(kBytes == 16 ? 8 : 1)
      for (int c = first; c < Tile::kDepth; c += Tile::kThreads / kThreads) {
        unsigned char* const to = stage + place<kLines * kSize, kWords>(c, at * kSize);
        if constexpr (kBytes == 2)
          *reinterpret_cast<T*>(to) = c < columns ? load_constant(from) : T{};
        else
          copy_async<kBytes>(to, from, c < columns ? kBytes : 0);
        from += Tile::kThreads / kThreads * stride;
      }
    }
  }

  // A convolution: rows are rows of G, or k of X; along them lie pixels, the same ones of a thread in each of its rows.
  template <int kLines, bool kGrad, int kCount>
  __device__ __forceinline__ void load_images(unsigned char* stage, uint16_t (&fetched)[kCount][2], int vector,
                                              int slot) {
    if (vector == 16)
      copy_images<16, kLines, kGrad>(stage, slot);
    else if (vector == 8)
      copy_images<8, kLines, kGrad>(stage, slot);
    else if (kSize == 4 || vector == 4)
      copy_images<4, kLines, kGrad>(stage, slot);
    else
      fetch_images<kLines, kGrad>(fetched, slot);
  }

  // A pixel of G or X, and how to go from it to a row.
  template <bool kGrad>
  struct Pixel {
    const T* image;
    int y, x;
    uint32_t offset;
    __device__ __forceinline__ Pixel(const OuterLoads& l, const uint4& pixel) : y(int(pixel.x)), x(int(pixel.y)) {
      image = kGrad ? l.grad_ + int64_t(pixel.z) * l.n_ * l.out_ + int(pixel.w) : l.x_ + int64_t(pixel.z) * l.of_image_;
      offset = pixel.x * unsigned(l.g_->width) + pixel.y;
      if (kGrad) y = int(pixel.w);
    }
    // Where it lies in a row, if it does.
    __device__ __forceinline__ const T* at(const OuterLoads& l, int row, bool& in) const {
      if constexpr (kGrad) {
        in = row < l.rows_ && y >= 0;
        return image + row * l.out_;
      } else {
        const uint4 tap = l.taps_[row];
        in = unsigned(y + int(tap.y)) < unsigned(l.g_->height) && unsigned(x + int(tap.z)) < unsigned(l.g_->width);
        return image + (tap.x + offset);
      }
    }
  };

  template <int kBytes, int kLines, bool kGrad>
  __device__ __forceinline__ void copy_images(unsigned char* stage, int slot) {
    constexpr int kPer = kBytes / kSize, kChunks = Tile::kDepth / kPer;
    const int at = int(threadIdx.x) % kChunks * kPer;
    const Pixel<kGrad> pixel(*this, pixels_[slot * Tile::kDepth + at]);
#pragma unroll(kBytes == 16 ? 8 : 1)
    for (int row = int(threadIdx.x) / kChunks; row < kLines; row += Tile::kThreads / kChunks) {
      bool in;
      const T* const from = pixel.at(*this, row, in);
      copy_async<kBytes>(stage + place<kGradRowBytes, false>(row, at * kSize), from, in ? kBytes : 0);
    }
  }

  template <int kLines, bool kGrad, int kCount>
  __device__ __forceinline__ void fetch_images(uint16_t (&into)[kCount][2], int slot) {
    if constexpr (kSize == 2) {
      const int at = int(threadIdx.x) % kPairs * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Pixel<kGrad> pixel(*this, pixels_[slot * Tile::kDepth + at + h]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int row = int(threadIdx.x) / kPairs + i * kRowsAtOnce;
          if (kLines % kRowsAtOnce != 0 && row >= kLines) break;
          bool in;
          const T* const from = pixel.at(*this, row, in);
          into[i][h] = in ? load_constant(from).bits : uint16_t(0);
        }
      }
    }
  }

  template <int kLines, int kCount>
  __device__ __forceinline__ void put(unsigned char* stage, const uint16_t (&from)[kCount][2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = int(threadIdx.x) / kPairs + i * kRowsAtOnce;
      if (kLines % kRowsAtOnce == 0 || row < kLines)
        *reinterpret_cast<uint32_t*>(stage + place<kGradRowBytes, false>(row, int(threadIdx.x) % kPairs * 4)) =
            uint32_t(from[i][0]) | uint32_t(from[i][1]) << 16;
    }
  }

  const K& kept_;
  uint4* taps_;
  uint4* pixels_;
  const T* grad_;
  const T* x_;
  const ConvGeometry* g_ = nullptr;
  int64_t n_, k_, columns_, out_ = 0, of_image_ = 0;
  int rows_, grad_vector_, input_vector_;
  uint16_t fetched_grad_[kFetches<Tile::kRows>][2] = {};
  uint16_t fetched_input_[kFetches<Tile::kCols>][2] = {};
};

template <class K, bool kConv, class Tile>
struct OuterShape {
  using Loads = OuterLoads<K, kConv, Tile>;
  static constexpr int kSumBytes = Tile::kRows * kOuterLine<Tile> * 4;
  static constexpr int kStagesBytes =
      Tile::kStages * Loads::kStageBytes > kSumBytes ? Tile::kStages * Loads::kStageBytes : kSumBytes;
  static constexpr int kSharedBytes = kStagesBytes + Loads::kTableBytes + K::kBlockBytes;
};

// Grid: x over the policy's tiles, y over splits.
template <class K, bool kConv, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) outer_kernel(const OuterParams<K> p) {
  using Shape = OuterShape<K, kConv, Tile>;
  using Loads = typename Shape::Loads;
  using T = typename K::Value;
  constexpr int kSize = int(sizeof(T)), kK = 32 / kSize, kSteps = Tile::kDepth / kK;
  constexpr int kI = Tile::kRows / Tile::kWarpsR / 16, kJ = Tile::kCols / Tile::kWarpsC / 8;
  static_assert(Tile::kDepth % kK == 0, "a step is made of whole products");

  unsigned char* const stages = dynamic_shared();
  const int split = int(blockIdx.y);
  K kept(p.kept, stages + Shape::kStagesBytes + Loads::kTableBytes, int64_t(blockIdx.x));
  if constexpr (K::kBlockBytes > 0) sync_threads();
  Loads loads(p.a, kept, stages + Shape::kStagesBytes);
  const int64_t all = (count_columns(p.a) + Tile::kDepth - 1) / Tile::kDepth;
  const int64_t begin = all * split / p.splits;
  const int steps = int(all * (split + 1) / p.splits - begin);
  const auto column_of = [begin](int step) { return (begin + step) * Tile::kDepth; };

  if constexpr (kConv) {
#pragma unroll 1
    for (int s = 0; s < Tile::kStages && s < steps; ++s) loads.prepare(column_of(s), s);
    sync_threads();
  }
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) {
      loads.load(stages + s * Loads::kStageBytes, column_of(s), s);
      loads.store(stages + s * Loads::kStageBytes);
    }
    copy_commit();
  }
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int warp_row = warp % Tile::kWarpsR * (Tile::kRows / Tile::kWarpsR);
  const int warp_column = warp / Tile::kWarpsR * (Tile::kCols / Tile::kWarpsC);
  float d[kI][kJ][4] = {};
  int slot = 0, free = Tile::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    copy_wait<Tile::kStages - 2>();
    sync_threads();
    const int next = step + Tile::kStages - 1;
    unsigned char* const into = stages + free * Loads::kStageBytes;
    if (next < steps) {
      loads.load(into, column_of(next), free);
      if (kConv && next + 1 < steps) loads.prepare(column_of(next + 1), slot);
    }
    copy_commit();
    const unsigned char* const grad = stages + slot * Loads::kStageBytes;
    const unsigned char* const input = grad + Loads::kGradBytes;
    constexpr int kBuffers = kSize == 2 ? 2 : 1;
    uint32_t a[kBuffers][kI][4], b[kBuffers][kJ][2];
    const auto fragments = [&](int s) {
      load_b<kSize, !kConv, Loads::kInputRowBytes>(b[s % kBuffers], input, warp_column, s * kK);
#pragma unroll
      for (int i = 0; i < kI; ++i)
        load_a<kSize, !kConv, Loads::kGradRowBytes>(a[s % kBuffers][i], grad, warp_row + 16 * i, s * kK);
    };
    fragments(0);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (kBuffers == 2 && s + 1 < kSteps) fragments(s + 1);
      multiply<T, false>(d, a[s % kBuffers], b[s % kBuffers]);
      if (kBuffers == 1 && s + 1 < kSteps) fragments(s + 1);
    }
    if (next < steps) loads.store(into);
    free = slot;
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }

  sync_threads();
  float* const sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int i = 0; i < kI; ++i)
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int j = 0; j < kJ; ++j)
        *reinterpret_cast<float2*>(sums + (warp_row + 16 * i + 8 * v + lane / 4) * kOuterLine<Tile> + warp_column +
                                   8 * j + lane % 4 * 2) = make_float2(d[i][j][2 * v], d[i][j][2 * v + 1]);
  sync_threads();
  kept.keep(sums, split);
}

// values[i] = sum over s of partial[s][i], always in the same order.
struct AddParams {
  const float* partial;  // [splits][total]
  void* values;
  int splits;
  int64_t total;
};

constexpr int kAddThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAddThreads) add_kernel(const AddParams p) {
  for (int64_t i = int64_t(blockIdx.x) * kAddThreads + threadIdx.x; i < p.total;
       i += int64_t(gridDim.x) * kAddThreads) {
    float sum = 0.0f;
    for (int s = 0; s < p.splits; ++s) sum += p.partial[s * p.total + i];
    static_cast<T*>(p.values)[i] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda
