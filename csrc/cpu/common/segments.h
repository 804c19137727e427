// SPDX-License-Identifier: Apache-2.0
// The inner loops of kernels that multiply single weights with rows of lowered activations: for each weight of a segment,
//
//     acc[row][0 … 63]  +=  broadcast(value)  *  panel[column][0 … 63]
//
#pragma once

#include "cpu/common/columns.h"
#include "cpu/common/segment.h"

namespace slim::cpu::SLIM_ISA {
namespace {

template <bool kTable, class T>
SLIM_INLINE const T* row_of(const Lowered<T>& x, const char* base, uint16_t column) {
  if constexpr (kTable)
    return reinterpret_cast<const T*>(base + x.table[column]);
  else
    return reinterpret_cast<const T*>(base + int64_t(column) * x.pitch);
}

constexpr int sets_for(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 4 : vectors <= 5 ? 2 : 1; }

// kSets sets of accumulators take turns where one row has too few vectors to hide the latency of an FMA.
template <class T, bool kTable, int kVectors, int kSets>
SLIM_INLINE void one_segment(const T* values, const uint16_t* columns, const Segment& s, const Lowered<T>& x,
                             const char* base, T* acc) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  const T* value = values + s.start;
  const uint16_t* column = columns + s.start;
  T* out = acc + int64_t(s.row) * Simd<T>::kPanel;
  V sum[kSets][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    sum[0][v] = load<V>(out + v * L);
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[set][v] = V{};
  }
  int i = 0;
  const int n = s.count;
  for (; i + kSets <= n; i += kSets) {
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) {
      const V w = broadcast<V>(value[i + set]);
      const T* p = row_of<kTable>(x, base, column[i + set]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[set][v] += w * load<V>(p + v * L);
    }
  }
  if constexpr (kSets > 1)
    for (; i < n; ++i) {
      const V w = broadcast<V>(value[i]);
      const T* p = row_of<kTable>(x, base, column[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[0][v] += w * load<V>(p + v * L);
    }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[0][v] += sum[set][v];
    store(out + v * L, sum[0][v]);
  }
}

// Two segments of equal count at once: the same purpose as sets, without their final sums.
template <class T, bool kTable, int kVectors>
SLIM_INLINE void two_segments(const T* values, const uint16_t* columns, const Segment& s, const Segment& t,
                              const Lowered<T>& x, const char* base, T* acc) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  T* out = acc + int64_t(s.row) * Simd<T>::kPanel;
  T* out2 = acc + int64_t(t.row) * Simd<T>::kPanel;
  V a[kVectors], b[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    a[v] = load<V>(out + v * L);
    b[v] = load<V>(out2 + v * L);
  }
  for (int i = 0; i < s.count; ++i) {
    const V w = broadcast<V>(values[s.start + i]), u = broadcast<V>(values[t.start + i]);
    const T* p = row_of<kTable>(x, base, columns[s.start + i]);
    const T* q = row_of<kTable>(x, base, columns[t.start + i]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      a[v] += w * load<V>(p + v * L);
      b[v] += u * load<V>(q + v * L);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store(out + v * L, a[v]);
    store(out2 + v * L, b[v]);
  }
}

template <class T, bool kTable, int kVectors>
void run_segments(const T* values, const uint16_t* columns, const Segment* s, const Segment* end, const Lowered<T>& x,
                  const char* base, T* acc) {
  if constexpr (Simd<T>::kPairRows && kVectors >= 3)
    for (; s + 1 < end && s[0].count == s[1].count; s += 2)
      two_segments<T, kTable, kVectors>(values, columns, s[0], s[1], x, base, acc);
  for (; s < end; ++s) {
    if constexpr (Simd<T>::kPairRows && kVectors >= 3)
      if (s + 1 < end && s[0].count == s[1].count) {
        two_segments<T, kTable, kVectors>(values, columns, s[0], s[1], x, base, acc);
        ++s;
        continue;
      }
    one_segment<T, kTable, kVectors, sets_for(kVectors)>(values, columns, *s, x, base, acc);
  }
}

template <class T, bool kTable>
void run_tile(int vectors, const T* values, const uint16_t* columns, const Segment* s, const Segment* end,
              const Lowered<T>& x, const char* base, T* acc) {
  switch (vectors) {
#define SLIM_CASE(n) \
  case n: \
    if constexpr (n <= Simd<T>::kVectors) run_segments<T, kTable, n>(values, columns, s, end, x, base, acc); \
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

// First row block of range `i` of `ranges`: equal shares of the entries, and of the rows, whose outputs cost too.
SLIM_INLINE int64_t range_start(const int32_t* row_offsets, int64_t rows, int64_t row_block, int64_t i,
                                int64_t ranges) {
  const int64_t blocks = ceil_div(rows, row_block);
  if (i <= 0) return 0;
  if (i >= ranges) return blocks;
  const double target = double(row_offsets[rows] + 2 * rows) * double(i) / double(ranges);
  int64_t low = 0, high = blocks;
  while (low < high) {
    const int64_t middle = (low + high) / 2, row = middle * row_block;
    if (double(row_offsets[row]) + 2 * double(row) < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace
}  // namespace slim::cpu::SLIM_ISA
