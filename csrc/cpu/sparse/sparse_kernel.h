// SPDX-License-Identifier: Apache-2.0
// The idea: the dense dimension lies in the lanes. For each nonzero of a row,
//
//     acc[0 … 63]  +=  broadcast(value)  *  panel[column][0 … 63]
//
// with the accumulators of a row in registers and the panel of one k block in the first-level cache: one FMA per vector,
// its activation operand straight from memory, no gather. A row's segment of a k block starts from and returns to an
// accumulator tile in the second-level cache. Bound by the two vector loads a cycle: a nonzero costs
// (vectors + 2) / 2 cycles or vectors / 2 FMAs, whichever is more, plus two accesses per vector and segment.
#pragma once

#include "cpu/common/segments.h"
#include "cpu/sparse/sparse.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace sp {

using sparse::Params;
using sparse::Plan;

SLIM_INLINE int64_t range_start(const Plan& plan, int64_t i, int64_t ranges) {
  return cpu::SLIM_ISA::range_start(plan.row_offsets, plan.header->rows, sparse::kRowBlock, i, ranges);
}

// Row blocks that are worked on at once, while the k blocks go by: their accumulators stay in the second level, and their
// share of the weight, of which each k block reads a strip, within reach of the TLB. Lowering is repeated for each step.
template <class T>
SLIM_INLINE int64_t blocks_at_once(const Params& p, int64_t tiles) {
  const auto& h = *p.plan.header;
  const int64_t acc = 262144 / (Simd<T>::kPanel * int64_t(sizeof(T)) * tiles);
  const int64_t weight_per_row = h.nnz * int64_t(sizeof(T) + 2) / max_of<int64_t>(h.rows, 1);
  const int64_t weight = 1310720 / max_of<int64_t>(weight_per_row, 1);
  return max_of<int64_t>(1, min_of(acc, weight) / sparse::kRowBlock);
}

// Workspace: table [k_block] int32 | lowered | accumulators [tiles, rows, kPanel]
template <class Source>
struct Workspace {
  using T = typename Source::T;
  static int64_t table_bytes(const Params& p) { return Source::kTable ? align64(p.plan.header->k_block * 4) : 0; }
  static int64_t lowered_bytes(const Params& p) {
    return align64(Source::lowered_bytes(p.a, p.plan.header->k_block) + 64);
  }
  static int64_t acc_bytes(const Params& p) {
    const int64_t rows = min_of((p.plan.header->rows + sparse::kRowBlock) * int64_t(kMaxTiles),
                                262144 / (Simd<T>::kPanel * int64_t(sizeof(T))) + kMaxTiles * sparse::kRowBlock);
    return rows * Simd<T>::kPanel * int64_t(sizeof(T));
  }
  static int64_t bytes(const Params& p) { return table_bytes(p) + lowered_bytes(p) + acc_bytes(p); }
};

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

  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws + Workspace<Source>::table_bytes(p);
  T* acc = reinterpret_cast<T*>(static_cast<char*>(lowered) + Workspace<Source>::lowered_bytes(p));
  const T* values = static_cast<const T*>(p.values);
  const uint16_t* columns = p.plan.packed_columns;
  const int64_t step = blocks_at_once<T>(p, source.tile_count);

  for (int64_t block0 = first; block0 < last; block0 += step) {
    const int64_t block1 = min_of(last, block0 + step);
    const int64_t row0 = block0 * sparse::kRowBlock, rows = min_of(h.rows, block1 * sparse::kRowBlock) - row0;
    for (int tile = 0; tile < source.tile_count; ++tile) {
      T* out = acc + tile * rows * P;
      for (int64_t n = 0; n < rows; ++n) {
        T bias = 0;
        if (p.a.bias) bias = bias_at<Source>(p.a.bias, row0 + n);
        const V b = broadcast<V>(bias);
        for (int v = 0; v < source.tiles[tile].vectors; ++v) store(out + n * P + v * L, b);
      }
    }
    for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
      bool any = false;
      for (int64_t b = block0; b < block1; ++b) {
        const uint32_t* cell = p.plan.cells + b * h.k_blocks + kb;
        any |= cell[1] > cell[0];
      }
      if (!any) continue;  // as in grouped convolutions, where a row meets few of the channels
      const int64_t k0 = kb * h.k_block;
      const Lowered<T> x = source.lower(k0, min_of(h.width, k0 + h.k_block), lowered, table);
      for (int tile = 0; tile < source.tile_count; ++tile) {
        const char* base = x.base + source.tiles[tile].column * int64_t(sizeof(T));
        for (int64_t b = block0; b < block1; ++b) {
          const uint32_t* cell = p.plan.cells + b * h.k_blocks + kb;
          run_tile<T, Source::kTable>(source.tiles[tile].vectors, values, columns, p.plan.segments + cell[0],
                                      p.plan.segments + cell[1], x, base,
                                      acc + (tile * rows + (b - block0) * sparse::kRowBlock) * P);
        }
      }
    }
    for (int tile = 0; tile < source.tile_count; ++tile) source.write(tile, acc + tile * rows * P, row0, rows);
  }
}

// Few columns: the panel of all k is small, so each row is one long run in CSR order, without k blocks.
template <class IO>
void forward_rows(const Params& p, int64_t task, void* workspace) {
  using Source = LinearColumns<IO>;
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  const auto& h = *p.plan.header;
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges;
  const int64_t first = range_start(p.plan, range, p.ranges), last = range_start(p.plan, range + 1, p.ranges);
  T* acc = static_cast<T*>(workspace);  // [kRowBlock, kPanel]
  const Lowered<T> x = source.lower(0, h.width, acc + sparse::kRowBlock * Simd<T>::kPanel, nullptr);
  const T* values = static_cast<const T*>(p.values);
  const uint16_t* columns = p.plan.columns;
  for (int64_t b = first; b < last; ++b) {
    const int64_t row0 = b * sparse::kRowBlock, rows = min_of(h.rows - row0, sparse::kRowBlock);
    for (int64_t n = 0; n < rows; ++n) {
      T* out = acc + n * Simd<T>::kPanel;
      const T bias = p.a.bias ? bias_at<Source>(p.a.bias, row0 + n) : T(0);
      for (int v = 0; v < source.tiles[0].vectors; ++v) store(out + v * Simd<T>::kLanes, broadcast<V>(bias));
      // A segment counts to 65535; longer rows take several.
      for (int64_t i = p.plan.row_offsets[row0 + n], end = p.plan.row_offsets[row0 + n + 1]; i < end; i += 65535) {
        const Segment s{uint32_t(i), uint16_t(n), uint16_t(min_of<int64_t>(65535, end - i))};
        run_tile<T, false>(source.tiles[0].vectors, values, columns, &s, &s + 1, x, x.base, acc);
      }
    }
    source.write(0, acc, row0, rows);
  }
}

// One column: a dot product of each row with the activations where they are; several chains hide the FMA's latency.
template <class IO>
void forward_dot(const Params& p, int64_t range, void*) {
  using T = typename ComputeOf<IO>::type;
  const auto& h = *p.plan.header;
  const IO* values = static_cast<const IO*>(p.values);
  const uint16_t* columns = p.plan.columns;
  const IO* x = static_cast<const IO*>(p.a.x);
  const int64_t row0 = range_start(p.plan, range, p.ranges) * sparse::kRowBlock;
  const int64_t row1 = min_of(h.rows, range_start(p.plan, range + 1, p.ranges) * sparse::kRowBlock);
  for (int64_t n = row0; n < row1; ++n) {
    int64_t i = p.plan.row_offsets[n];
    const int64_t end = p.plan.row_offsets[n + 1];
    T sum[4] = {p.a.bias ? bias_at<LinearColumns<IO>>(p.a.bias, n) : T(0), 0, 0, 0};
    for (; i + 8 <= end; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j & 3] += to_compute(values[i + j]) * to_compute(x[columns[i + j]]);
    for (; i < end; ++i) sum[0] += to_compute(values[i]) * to_compute(x[columns[i]]);
    const T y = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    from_compute(p.a.relu && y < 0 ? T(0) : y, static_cast<IO*>(p.a.y) + n);
  }
}

// Sampled dense-dense: grad_values[i] = sum over columns of grad[row i] * x[column i], over all groups in order.
template <class T, bool kTable, int kVectors>
void dot_segments(const uint16_t* columns, const Segment* s, const Segment* end, const uint32_t* source,
                  const Lowered<T>& x, const char* base, const T* grad, T* grad_values) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  for (; s < end; ++s, ++source) {
    V g[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) g[v] = load<V>(grad + int64_t(s->row) * Simd<T>::kPanel + v * L);
    for (int i = 0; i < s->count; ++i) {
      const T* q = row_of<kTable>(x, base, columns[s->start + i]);
      V even = g[0] * load<V>(q), odd = V{};
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) (v & 1 ? odd : even) += g[v] * load<V>(q + v * L);
      grad_values[*source + i] += sum_lanes<T, L>(even + odd);
    }
  }
}

template <class Source>
void grad_values_columns(const Params& p, int64_t range, void* workspace) {
  using T = typename Source::T;
  constexpr int P = Simd<T>::kPanel;
  const auto& h = *p.plan.header;
  const int64_t first = range_start(p.plan, range, p.ranges), last = range_start(p.plan, range + 1, p.ranges);
  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws + Workspace<Source>::table_bytes(p);
  T* grad = reinterpret_cast<T*>(static_cast<char*>(lowered) + Workspace<Source>::lowered_bytes(p));
  const uint16_t* columns = p.plan.packed_columns;
  T* out = static_cast<T*>(p.grad_values);
  const int64_t groups = Source::group_count(p.a);
  Source source(p.a);
  for (int64_t group = 0; group < groups; ++group) {
    source.begin(group);
    const int64_t step = blocks_at_once<T>(p, source.tile_count);
    for (int64_t block0 = first; block0 < last; block0 += step) {
      const int64_t block1 = min_of(last, block0 + step);
      const int64_t row0 = block0 * sparse::kRowBlock, rows = min_of(h.rows, block1 * sparse::kRowBlock) - row0;
      for (int tile = 0; tile < source.tile_count; ++tile) source.read_output(tile, row0, rows, grad + tile * rows * P);
      for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
        const int64_t k0 = kb * h.k_block;
        const Lowered<T> x = source.lower(k0, min_of(h.width, k0 + h.k_block), lowered, table);
        for (int tile = 0; tile < source.tile_count; ++tile) {
          const char* base = x.base + source.tiles[tile].column * int64_t(sizeof(T));
          for (int64_t b = block0; b < block1; ++b) {
            const uint32_t* cell = p.plan.cells + b * h.k_blocks + kb;
            const Segment *s = p.plan.segments + cell[0], *end = p.plan.segments + cell[1];
            const T* g = grad + (tile * rows + (b - block0) * sparse::kRowBlock) * P;
            switch (source.tiles[tile].vectors) {
#define SLIM_CASE(n) \
  case n: \
    if constexpr (n <= Simd<T>::kVectors) \
      dot_segments<T, Source::kTable, n>(columns, s, end, p.plan.sources + cell[0], x, base, g, out); \
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
    }
  }
}

// Rows long enough, and columns few enough, for the row kernel.
template <class T>
SLIM_INLINE bool few_columns(const Params& p) {
  return p.plan.header->by_row && p.a.m <= 2 * Simd<T>::kLanes && Simd<T>::kVectors > 2;
}

bool by_row(const Params& p) {
  if (p.dot) return true;
  if (p.a.conv) return false;
  return with_dtype(p.a.dtype, [&](auto io) { return few_columns<typename ComputeOf<decltype(io)>::type>(p); });
}

int64_t group_count(const Params& p) {
  if (p.dot) return 1;
  return with_dtype(p.a.dtype, [&](auto io) {
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Pointee<decltype(source)>::group_count(p.a); });
  });
}

int64_t workspace_bytes(const Params& p) {
  if (p.dot) return 0;
  return with_dtype(p.a.dtype, [&](auto io) {
    using T = typename ComputeOf<decltype(io)>::type;
    const int64_t columns =
        with_source<decltype(io)>(p.a, [&](auto* source) { return Workspace<Pointee<decltype(source)>>::bytes(p); });
    if (p.a.conv || !few_columns<T>(p)) return columns;
    const int64_t rows = (sparse::kRowBlock + p.plan.header->width) * Simd<T>::kPanel * int64_t(sizeof(T));
    return max_of(columns, rows);
  });
}

template <class IO>
void forward_as(const Params& p, int64_t task, void* workspace) {
  if (p.dot) return forward_dot<IO>(p, task, workspace);
  if (!p.a.conv && few_columns<typename ComputeOf<IO>::type>(p)) return forward_rows<IO>(p, task, workspace);
  with_source<IO>(p.a, [&](auto* source) { forward_columns<Pointee<decltype(source)>>(p, task, workspace); });
}

void forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) { forward_as<decltype(io)>(p, task, workspace); });
}

void grad_values(const Params& p, int64_t range, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    with_source<decltype(io)>(
        p.a, [&](auto* source) { grad_values_columns<Pointee<decltype(source)>>(p, range, workspace); });
  });
}

const sparse::Kernels kernels = {by_row, group_count, workspace_bytes, forward, grad_values};

}  // namespace sp
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
