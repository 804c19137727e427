// SPDX-License-Identifier: Apache-2.0
// The idea: inside a block this is a dense product, so a register tile of R rows x several vectors of columns is kept
// over all blocks of a strip:
//
//     acc[i][0 … ]  +=  broadcast(block[i][j])  *  panel[k + j][0 … ]       i < R
//
// Each activation vector is loaded once per R rows. With R = 4 and 3 vectors (16 registers) or 4 vectors (32 registers)
// that is 7 loads for 12 FMAs, so the FMA units are the bound, as in a dense product. Rows beyond a multiple of R run
// with a smaller R and more vectors. For one to four columns of a linear layer lanes would stay empty: there rows are
// dot products along k instead, straight from the activations, bound by the bytes of the weight.
#pragma once

#include "cpu/block_sparse/block_sparse.h"
#include "cpu/common/columns.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace bs {

using block_sparse::Entry;
using block_sparse::Params;
using block_sparse::Plan;
using block_sparse::Strip;

constexpr int64_t kDotColumns = 4;

template <class T, bool kTable, int R, int NV>
SLIM_INLINE void multiply(const Params& p, const Strip& strip, int row, const Entry* e, const Entry* end,
                          const Lowered<T>& x, int64_t k0, const char* base, T* acc) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  const auto& h = *p.plan.header;
  const int64_t row_step = h.row_step, k_step = h.k_step;
  V sum[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[i][v] = load<V>(acc + i * Simd<T>::kPanel + v * L);
  for (; e < end; ++e) {
    const T* w = static_cast<const T*>(p.values) + int64_t(e->block) * h.block_rows * h.block_cols +
                 (strip.inner + row) * row_step + e->first * k_step;
    const int64_t k = int64_t(e->k) - k0;
    const char* at = base + (kTable ? 0 : k * x.pitch);
    for (int j = 0; j < e->length; ++j, w += k_step) {
      const T* panel = reinterpret_cast<const T*>(kTable ? base + x.table[k + j] : at);
      if constexpr (!kTable) at += x.pitch;
      V a[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) a[v] = load<V>(panel + v * L);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const V b = broadcast<V>(w[i * row_step]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[i][v] += b * a[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(acc + i * Simd<T>::kPanel + v * L, sum[i][v]);
}

// Vectors that R rows can hold: R * NV accumulators, NV activations and a weight in the register file.
constexpr int max_vectors(int rows) { return SLIM_VECTOR_BYTES == 64 ? 4 : rows == 1 ? 8 : rows == 2 ? 4 : 3; }

// R rows of a strip over all vectors of the tile, in nearly equal parts.
template <class T, bool kTable, int R>
void rows_of_strip(const Params& p, const Strip& strip, int row, int vectors, const Entry* e, const Entry* end,
                   const Lowered<T>& x, int64_t k0, const char* base, T* acc) {
  constexpr int L = Simd<T>::kLanes;
  constexpr int kMost = max_vectors(R) < Simd<T>::kVectors ? max_vectors(R) : Simd<T>::kVectors;
  const int parts = (vectors + kMost - 1) / kMost;
  for (int part = 0, v = 0; part < parts; ++part) {
    const int nv = vectors * (part + 1) / parts - v;
    const char* from = base + v * L * int64_t(sizeof(T));
    switch (nv) {
#define SLIM_CASE(n) \
  case n: \
    if constexpr (n <= kMost) multiply<T, kTable, R, n>(p, strip, row, e, end, x, k0, from, acc + v * L); \
    break;
      SLIM_CASE(1)
      SLIM_CASE(2)
      SLIM_CASE(3)
      SLIM_CASE(4)
      SLIM_CASE(5)
      SLIM_CASE(6)
      SLIM_CASE(7)
      SLIM_CASE(8)
#undef SLIM_CASE
    }
    v += nv;
  }
}

template <class T, bool kTable>
SLIM_INLINE void run_strip(const Params& p, const Strip& strip, int vectors, const Entry* e, const Entry* end,
                           const Lowered<T>& x, int64_t k0, const char* base, T* acc) {
  int row = 0;
  for (; row + 4 <= strip.rows; row += 4)
    rows_of_strip<T, kTable, 4>(p, strip, row, vectors, e, end, x, k0, base, acc + row * Simd<T>::kPanel);
  acc += row * Simd<T>::kPanel;
  if (strip.rows - row >= 2) {
    rows_of_strip<T, kTable, 2>(p, strip, row, vectors, e, end, x, k0, base, acc);
    row += 2;
    acc += 2 * Simd<T>::kPanel;
  }
  if (strip.rows > row) rows_of_strip<T, kTable, 1>(p, strip, row, vectors, e, end, x, k0, base, acc);
}

// First strip of range `i` of `ranges`: equal shares of entries times their rows, roughly.
SLIM_INLINE int64_t range_start(const Plan& plan, int64_t i, int64_t ranges) {
  const auto& h = *plan.header;
  if (i <= 0 || h.strips == 0) return 0;
  if (i >= ranges) return h.strips;
  const double target = double(plan.cells[h.strips * h.k_blocks] + h.strips) * double(i) / double(ranges);
  int64_t low = 0, high = h.strips;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (double(plan.cells[middle * h.k_blocks]) + double(middle) < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// First row of the range that starts at `strip`. Rows without a strip belong to the range before them, row 0 to the first.
SLIM_INLINE int64_t row_at(const Plan& plan, int64_t strip) {
  if (strip == 0) return 0;
  return strip < plan.header->strips ? plan.strips[strip].row : plan.header->rows;
}

template <class T>
SLIM_INLINE int64_t rows_at_once(int64_t tiles) {
  return max_of<int64_t>(1024, 262144 / (Simd<T>::kPanel * int64_t(sizeof(T)) * tiles));
}

// Workspace: table [k_block] int32 | lowered | accumulators [tiles, rows, kPanel]
template <class Source>
struct Workspace {
  using T = typename Source::T;
  static int64_t table_bytes(const Params& p) { return Source::kTable ? align64(p.plan.header->k_block * 4) : 0; }
  static int64_t lowered_bytes(const Params& p) {
    return align64(Source::lowered_bytes(p.a, p.plan.header->k_block) + 64);
  }
  static int64_t bytes(const Params& p) {
    // A step ends at the end of a strip, so it may be longer than rows_at_once by a strip.
    const int64_t strip = max_of(p.plan.header->block_rows, p.plan.header->block_cols);
    const int64_t rows = min_of(rows_at_once<T>(1) + strip, p.plan.header->rows + 1);
    return table_bytes(p) + lowered_bytes(p) + kMaxTiles * rows * Simd<T>::kPanel * int64_t(sizeof(T));
  }
};

// Calls step(first strip, last strip, first row, last row) for pieces of the range that fit the accumulators.
template <class F>
SLIM_INLINE void for_steps(const Plan& plan, int64_t first, int64_t last, int64_t row_begin, int64_t row_end,
                           int64_t limit, F step) {
  int64_t strip = first, row = row_begin;
  while (row < row_end) {
    int64_t next = strip, end = row_end;
    while (next < last && plan.strips[next].row + plan.strips[next].rows - row <= limit) ++next;
    if (next < last) {
      if (next == strip) {  // rows without strips before it fill the step
        end = min_of<int64_t>(plan.strips[next].row, row + limit);
        if (end == row) end = row + plan.strips[next].rows, ++next;
      } else {
        end = plan.strips[next - 1].row + plan.strips[next - 1].rows;
      }
    } else {
      end = min_of(row_end, row + limit);
      if (strip < last) end = max_of<int64_t>(end, plan.strips[last - 1].row + plan.strips[last - 1].rows);
      end = min_of(end, row_end);
    }
    step(strip, next, row, end);
    strip = next;
    row = end;
  }
}

template <class Source>
void forward_columns(const Params& p, int64_t task, void* workspace) {
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  constexpr int P = Simd<T>::kPanel, L = Simd<T>::kLanes;
  const auto& h = *p.plan.header;
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges;
  const int64_t first = range_start(p.plan, range, p.ranges), last = range_start(p.plan, range + 1, p.ranges);
  const int64_t row_begin = range == 0 ? 0 : row_at(p.plan, first);
  const int64_t row_end = range + 1 == p.ranges ? h.rows : row_at(p.plan, last);

  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws + Workspace<Source>::table_bytes(p);
  T* acc = reinterpret_cast<T*>(static_cast<char*>(lowered) + Workspace<Source>::lowered_bytes(p));

  for_steps(p.plan, first, last, row_begin, row_end, rows_at_once<T>(source.tile_count),
            [&](int64_t strip0, int64_t strip1, int64_t row0, int64_t row1) {
    const int64_t rows = row1 - row0;
    for (int tile = 0; tile < source.tile_count; ++tile) {
      T* out = acc + tile * rows * P;
      for (int64_t n = 0; n < rows; ++n) {
        const V b = broadcast<V>(p.a.bias ? bias_at<Source>(p.a.bias, row0 + n) : T(0));
        for (int v = 0; v < source.tiles[tile].vectors; ++v) store(out + n * P + v * L, b);
      }
    }
    for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
      bool any = false;
      for (int64_t s = strip0; s < strip1; ++s)
        any |= p.plan.cells[s * h.k_blocks + kb + 1] > p.plan.cells[s * h.k_blocks + kb];
      if (!any) continue;
      const int64_t k0 = kb * h.k_block;
      const Lowered<T> x = source.lower(k0, min_of(h.width, k0 + h.k_block), lowered, table);
      for (int tile = 0; tile < source.tile_count; ++tile) {
        const char* base = x.base + source.tiles[tile].column * int64_t(sizeof(T));
        for (int64_t s = strip0; s < strip1; ++s) {
          const uint32_t* cell = p.plan.cells + s * h.k_blocks + kb;
          if (cell[1] > cell[0])
            run_strip<T, Source::kTable>(p, p.plan.strips[s], source.tiles[tile].vectors, p.plan.entries + cell[0],
                                         p.plan.entries + cell[1], x, k0, base,
                                         acc + (tile * rows + p.plan.strips[s].row - row0) * P);
        }
      }
    }
    for (int tile = 0; tile < source.tile_count; ++tile) source.write(tile, acc + tile * rows * P, row0, rows);
  });
}

// R rows of a strip times M rows of x, along k: vectors of N elements, then what is left over.
template <class T, int N, int R, int M>
void dot_rows(const Params& p, const Strip& strip, int row, const Entry* e, const Entry* end, const T* x, T* y) {
  using V = Vec<T, N>;
  const auto& h = *p.plan.header;
  V sum[R][M];
  T rest[R][M];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[i][m] = V{}, rest[i][m] = 0;
  for (; e < end; ++e) {
    const T* w = static_cast<const T*>(p.values) + int64_t(e->block) * h.block_rows * h.block_cols +
                 (strip.inner + row) * h.block_cols + e->first;
    const T* from = x + e->k;
    int j = 0;
    for (; j + N <= e->length; j += N) {
      V a[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) a[m] = load<V>(from + m * p.a.k + j);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const V b = load<V>(w + i * h.block_cols + j);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[i][m] += b * a[m];
      }
    }
    for (; j < e->length; ++j)
      for (int i = 0; i < R; ++i)
        for (int m = 0; m < M; ++m) rest[i][m] += w[i * h.block_cols + j] * from[m * p.a.k + j];
  }
  for (int i = 0; i < R; ++i)
    for (int m = 0; m < M; ++m) y[m * 4 + i] = sum_lanes<T, N>(sum[i][m]) + rest[i][m];
}

template <class IO, int N, int M>
void dot_range(const Params& p, int64_t range, void* workspace) {
  using T = typename ComputeOf<IO>::type;
  const auto& h = *p.plan.header;
  const T* x;
  if constexpr (sizeof(IO) == sizeof(T)) {
    x = static_cast<const T*>(p.a.x);
  } else {
    T* wide = static_cast<T*>(workspace);
    for (int64_t i = 0; i < M * p.a.k; ++i) wide[i] = to_compute(static_cast<const IO*>(p.a.x)[i]);
    x = wide;
  }
  const auto put = [&](int64_t n, int m, T v) {
    v += p.a.bias ? bias_at<LinearColumns<IO>>(p.a.bias, n) : T(0);
    from_compute(p.a.relu && v < 0 ? T(0) : v, static_cast<IO*>(p.a.y) + m * p.a.n + n);
  };
  const int64_t first = range_start(p.plan, range, p.ranges), last = range_start(p.plan, range + 1, p.ranges);
  int64_t next = range == 0 ? 0 : row_at(p.plan, first);
  const int64_t row_end = range + 1 == p.ranges ? h.rows : row_at(p.plan, last);
  for (int64_t s = first; s < last; ++s) {
    const Strip& strip = p.plan.strips[s];
    for (; next < strip.row; ++next)
      for (int m = 0; m < M; ++m) put(next, m, 0);
    const Entry* e = p.plan.entries + p.plan.cells[s * h.k_blocks];
    const Entry* end = p.plan.entries + p.plan.cells[(s + 1) * h.k_blocks];
    T y[M * 4];
    int row = 0;
    for (; row + 4 <= strip.rows; row += 4) {
      dot_rows<T, N, 4, M>(p, strip, row, e, end, x, y);
      for (int i = 0; i < 4; ++i)
        for (int m = 0; m < M; ++m) put(strip.row + row + i, m, y[m * 4 + i]);
    }
    for (; row < strip.rows; ++row) {
      dot_rows<T, N, 1, M>(p, strip, row, e, end, x, y);
      for (int m = 0; m < M; ++m) put(strip.row + row, m, y[m * 4]);
    }
    next = strip.row + strip.rows;
  }
  for (; next < row_end; ++next)
    for (int m = 0; m < M; ++m) put(next, m, 0);
}

template <class IO, int N>
void dot_range_columns(const Params& p, int64_t range, void* workspace) {
  switch (p.a.m) {
    case 1:
      return dot_range<IO, N, 1>(p, range, workspace);
    case 2:
      return dot_range<IO, N, 2>(p, range, workspace);
    case 3:
      return dot_range<IO, N, 3>(p, range, workspace);
    case 4:
      return dot_range<IO, N, 4>(p, range, workspace);
  }
}

SLIM_INLINE bool uses_dot(const Params& p) {
  return !p.a.conv && !p.plan.header->transposed && p.a.m >= 1 && p.a.m <= kDotColumns &&
         p.plan.header->block_cols >= 4;
}

// grad_values(block)[i][j] = sum over columns of grad[row i] * x[k j], over all column groups in order.
template <class T, bool kTable, int NV>
void dot_entries(const Params& p, const Strip& strip, const Entry* e, const Entry* end, const Lowered<T>& x, int64_t k0,
                 const char* base, const T* grad, T* grad_values) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  const auto& h = *p.plan.header;
  for (; e < end; ++e) {
    T* out = grad_values + int64_t(e->block) * h.block_rows * h.block_cols + strip.inner * h.block_cols + e->first;
    for (int j = 0; j < e->length; ++j) {
      const int64_t k = int64_t(e->k) - k0 + j;
      const T* panel = reinterpret_cast<const T*>(base + (kTable ? int64_t(x.table[k]) : k * x.pitch));
      V a[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) a[v] = load<V>(panel + v * L);
      for (int i = 0; i < strip.rows; ++i) {
        const T* g = grad + i * Simd<T>::kPanel;
        V even = a[0] * load<V>(g), odd = V{};
#pragma GCC unroll 8
        for (int v = 1; v < NV; ++v) (v & 1 ? odd : even) += a[v] * load<V>(g + v * L);
        out[i * h.block_cols + j] += sum_lanes<T, L>(even + odd);
      }
    }
  }
}

template <class Source>
void grad_values_columns(const Params& p, int64_t range, void* workspace) {
  using T = typename Source::T;
  constexpr int P = Simd<T>::kPanel;
  const auto& h = *p.plan.header;
  const int64_t first = range_start(p.plan, range, p.ranges), last = range_start(p.plan, range + 1, p.ranges);
  if (first == last) return;
  const int64_t row_begin = p.plan.strips[first].row;
  const int64_t row_end = p.plan.strips[last - 1].row + p.plan.strips[last - 1].rows;
  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws + Workspace<Source>::table_bytes(p);
  T* grad = reinterpret_cast<T*>(static_cast<char*>(lowered) + Workspace<Source>::lowered_bytes(p));
  T* out = static_cast<T*>(p.grad_values);
  Source source(p.a);
  for (int64_t group = 0, groups = Source::group_count(p.a); group < groups; ++group) {
    source.begin(group);
    for_steps(p.plan, first, last, row_begin, row_end, rows_at_once<T>(source.tile_count),
              [&](int64_t strip0, int64_t strip1, int64_t row0, int64_t row1) {
      const int64_t rows = row1 - row0;
      for (int tile = 0; tile < source.tile_count; ++tile) source.read_output(tile, row0, rows, grad + tile * rows * P);
      for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
        const int64_t k0 = kb * h.k_block;
        const Lowered<T> x = source.lower(k0, min_of(h.width, k0 + h.k_block), lowered, table);
        for (int tile = 0; tile < source.tile_count; ++tile) {
          const char* base = x.base + source.tiles[tile].column * int64_t(sizeof(T));
          for (int64_t s = strip0; s < strip1; ++s) {
            const uint32_t* cell = p.plan.cells + s * h.k_blocks + kb;
            const Entry *e = p.plan.entries + cell[0], *end = p.plan.entries + cell[1];
            const T* g = grad + (tile * rows + p.plan.strips[s].row - row0) * P;
            switch (source.tiles[tile].vectors) {
#define SLIM_CASE(n) \
  case n: \
    if constexpr (n <= Simd<T>::kVectors) \
      dot_entries<T, Source::kTable, n>(p, p.plan.strips[s], e, end, x, k0, base, g, out); \
    break;
              SLIM_CASE(1)
              SLIM_CASE(2)
              SLIM_CASE(3)
              SLIM_CASE(4)
              SLIM_CASE(5)
              SLIM_CASE(6)
              SLIM_CASE(7)
              SLIM_CASE(8)
#undef SLIM_CASE
            }
          }
        }
      }
    });
  }
}

int64_t group_count(const Params& p) {
  if (uses_dot(p)) return 1;
  return with_dtype(p.a.dtype, [&](auto io) {
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Pointee<decltype(source)>::group_count(p.a); });
  });
}

int64_t workspace_bytes(const Params& p) {
  return with_dtype(p.a.dtype, [&](auto io) {
    const int64_t bytes =
        with_source<decltype(io)>(p.a, [&](auto* source) { return Workspace<Pointee<decltype(source)>>::bytes(p); });
    return max_of<int64_t>(bytes, p.a.conv ? 0 : kDotColumns * p.a.k * 8);
  });
}

void forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    using IO = decltype(io);
    constexpr int L = Simd<typename ComputeOf<IO>::type>::kLanes;
    if (uses_dot(p)) {
      if (p.plan.header->block_cols >= L) return dot_range_columns<IO, L>(p, task, workspace);
      return dot_range_columns<IO, 4>(p, task, workspace);
    }
    with_source<IO>(p.a, [&](auto* source) { forward_columns<Pointee<decltype(source)>>(p, task, workspace); });
  });
}

void grad_values(const Params& p, int64_t range, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    with_source<decltype(io)>(
        p.a, [&](auto* source) { grad_values_columns<Pointee<decltype(source)>>(p, range, workspace); });
  });
}

const block_sparse::Kernels kernels = {group_count, workspace_bytes, forward, grad_values};

}  // namespace bs
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
