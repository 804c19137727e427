// SPDX-License-Identifier: Apache-2.0
// The idea: the unstructured kernel's loop, fed from the stored bytes. For each entry of a row
//
//     column            +=  gap + 1
//     acc[0 … 63]       +=  broadcast(table[code])  *  panel[column][0 … 63]
//
// Nothing is decoded in advance. The loop is bound by two vector loads a cycle; adding up a gap, shifting a code out of a
// 64-bit word and masking it are for the integer units, which have nothing else to do, and the table is in the
// first-level cache. So an entry costs what a float32 value with its column does, and comes at a quarter of the bytes.
// Each row has a cursor (entry, column) that moves on with the k blocks; the plan says how many entries to take.
#pragma once

#include "cpu/common/segments.h"
#include "cpu/sparse_codebook/sparse_codebook.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace sc {

using sparse_codebook::kRowBlock;
using sparse_codebook::kSkip;
using sparse_codebook::Params;

// The stored streams as the kernels read them.
template <class C>
struct Stream {
  const uint8_t* gaps;
  const uint8_t* codes;
  int64_t code_bytes;
  int bits;
  uint64_t mask;
  const C* tables;
  int64_t row_tables;  // elements from a row's table to the next row's; 0 if they share
  uint64_t group;      // ceil(2**63 / group size), if tables belong to groups of columns
};

template <class C>
SLIM_INLINE Stream<C> stream_of(const Params& p) {
  const auto& w = p.w;
  Stream<C> s;
  s.gaps = w.gaps;
  s.codes = w.codes;
  s.code_bytes = w.code_bytes;
  s.bits = int(w.bits);
  s.mask = (uint64_t(1) << w.bits) - 1;
  s.tables = static_cast<const C*>(p.codebook);
  s.row_tables = w.group_size < 0 ? int64_t(1) << w.bits : 0;
  s.group = w.group_size > 0 ? ((uint64_t(1) << 63) - 1) / uint64_t(w.group_size) + 1 : 0;
  return s;
}

// Codes of eight entries (or as many as there are), the first one lowest. Never reads past the stream.
template <class C>
SLIM_INLINE uint64_t codes_at(const Stream<C>& s, int64_t entry) {
  const int64_t bit = entry * s.bits, at = bit >> 3;
  uint64_t word = 0;
  if (__builtin_expect(at + 8 <= s.code_bytes, 1))
    __builtin_memcpy(&word, s.codes + at, 8);
  else
    for (int64_t i = at; i < s.code_bytes; ++i) word |= uint64_t(s.codes[i]) << (8 * (i - at));
  return word >> (bit & 7);
}

// First element of the table of a column. (column + 1/2) / g has no whole number near it, so that the product with the
// rounded reciprocal cannot end up on the wrong side of one; g = 1 fits too.
template <class C>
SLIM_INLINE const C* group_table(const Stream<C>& s, int64_t column) {
  const uint64_t group = uint64_t((unsigned __int128)(uint64_t(2 * column + 1)) * s.group >> 64);
  return s.tables + (group << s.bits);
}

struct Cursor {
  uint32_t entry;  // the next one
  int32_t column;  // of the last weight, over all groups
};

// `count` entries from `entry` on; `column` counts from the start of the k block, and from that of the row's group after
// `origin` is added.
template <class T, bool kTable, bool kGroups, int kVectors, int kSets>
SLIM_INLINE int64_t run_entries(const Stream<T>& s, int64_t entry, int64_t count, int64_t column, int64_t origin,
                                const T* table, const Lowered<T>& x, const char* base, T* out) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes;
  V sum[kSets][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    sum[0][v] = load<V>(out + v * L);
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[set][v] = V{};
  }
  const uint8_t* gap = s.gaps + entry;
  const auto step = [&](uint64_t& word, int64_t i, V* to) __attribute__((always_inline)) {
    const T* entry_of = table + (word & s.mask);
    word >>= s.bits;
    const int64_t g = gap[i];
    column += g;
    if (__builtin_expect(g == kSkip, 0)) return;
    ++column;
    if constexpr (kGroups) entry_of = group_table(s, column + origin) + (entry_of - table);
    const V w = broadcast<V>(*entry_of);
    const T* p = row_of<kTable>(x, base, column);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) to[v] += w * load<V>(p + v * L);
  };
  for (int64_t i = 0; i < count;) {
    uint64_t word = codes_at(s, entry + i);
    const int64_t stop = min_of(count, i + 8);
    for (; i + kSets <= stop; i += kSets)
#pragma GCC unroll 8
      for (int set = 0; set < kSets; ++set) step(word, i + set, sum[set]);
    if constexpr (kSets > 1)
      for (; i < stop; ++i) step(word, i, sum[0]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[0][v] += sum[set][v];
    store(out + v * L, sum[0][v]);
  }
  return column;
}

// One cell of the plan. row0 is the first row of its block; k0 the first column of its k block.
template <class T>
struct Cell {
  const uint8_t *run, *end;
  Cursor* cursors;  // [kRowBlock]
  int64_t row0, k0, per_group, width;
  T* acc;  // [kRowBlock, kPanel]
};

template <class T, bool kTable, bool kGroups, int kVectors>
void run_rows(const Stream<T>& s, const Cell<T>& cell, const Lowered<T>& x, const char* base) {
  for (const uint8_t* run = cell.run; run < cell.end;) {
    const int64_t count = run[0], number = run[1] + 1;
    run += 2;
    for (int64_t n = 0; n < number; ++n) {
      const int64_t row = run[n];
      Cursor& c = cell.cursors[row];
      int64_t origin = 0;
      if constexpr (kGroups) origin = cell.k0 - (cell.row0 + row) / cell.per_group * cell.width;
      const int64_t column = run_entries<T, kTable, kGroups, kVectors, sets_for(kVectors)>(
          s, c.entry, count, c.column - cell.k0, origin, s.tables + (cell.row0 + row) * s.row_tables, x, base,
          cell.acc + row * Simd<T>::kPanel);
      c = {uint32_t(c.entry + count), int32_t(column + cell.k0)};
    }
    run += number;
  }
}

template <class T, bool kTable>
void run_cell(int vectors, const Stream<T>& s, const Cell<T>& cell, const Lowered<T>& x, const char* base) {
  switch (vectors) {
#define SLIM_CASE(n) \
  case n: \
    if constexpr (n <= Simd<T>::kVectors) { \
      if (s.group) \
        run_rows<T, kTable, true, n>(s, cell, x, base); \
      else \
        run_rows<T, kTable, false, n>(s, cell, x, base); \
    } \
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

SLIM_INLINE int64_t range_start(const Params& p, int64_t i) {
  return cpu::SLIM_ISA::range_start(p.w.row_offsets, p.w.rows, kRowBlock, i, p.ranges);
}

// Row blocks that are worked on at once, while the k blocks go by: accumulators and the stored bytes that the rows'
// cursors stand at stay in the second level. Lowering is repeated for each step.
template <class T>
SLIM_INLINE int64_t blocks_at_once(const Params&, int64_t tiles) {
  const int64_t acc = 262144 / (Simd<T>::kPanel * int64_t(sizeof(T)) * tiles);
  return max_of<int64_t>(1, acc / kRowBlock);
}

// Workspace: table [k_block] int32 | lowered | accumulators [tiles, rows, kPanel] | cursors [tiles, rows]
template <class Source>
struct Workspace {
  using T = typename Source::T;
  static int64_t table_bytes(const Params& p) { return Source::kTable ? align64(p.plan.header->k_block * 4) : 0; }
  static int64_t lowered_bytes(const Params& p) {
    return align64(Source::lowered_bytes(p.a, p.plan.header->k_block) + 64);
  }
  static int64_t tile_rows(const Params& p) {
    return min_of((p.w.rows + kRowBlock) * int64_t(kMaxTiles),
                  262144 / (Simd<T>::kPanel * int64_t(sizeof(T))) + kMaxTiles * kRowBlock);
  }
  static int64_t acc_bytes(const Params& p) { return tile_rows(p) * Simd<T>::kPanel * int64_t(sizeof(T)); }
  static int64_t bytes(const Params& p) {
    return table_bytes(p) + lowered_bytes(p) + acc_bytes(p) + tile_rows(p) * int64_t(sizeof(Cursor));
  }
};

template <class Source>
void forward_columns(const Params& p, int64_t task, void* workspace) {
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  constexpr int P = Simd<T>::kPanel, L = Simd<T>::kLanes;
  const auto& h = *p.plan.header;
  const Stream<T> s = stream_of<T>(p);
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges;
  const int64_t first = range_start(p, range), last = range_start(p, range + 1);

  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws + Workspace<Source>::table_bytes(p);
  T* acc = reinterpret_cast<T*>(static_cast<char*>(lowered) + Workspace<Source>::lowered_bytes(p));
  Cursor* cursors = reinterpret_cast<Cursor*>(reinterpret_cast<char*>(acc) + Workspace<Source>::acc_bytes(p));
  const int64_t step = blocks_at_once<T>(p, source.tile_count), per_group = p.w.rows / p.w.groups;

  for (int64_t block0 = first; block0 < last; block0 += step) {
    const int64_t block1 = min_of(last, block0 + step);
    const int64_t row0 = block0 * kRowBlock, rows = min_of(h.rows, block1 * kRowBlock) - row0;
    for (int tile = 0; tile < source.tile_count; ++tile) {
      T* out = acc + tile * rows * P;
      for (int64_t n = 0; n < rows; ++n) {
        T bias = 0;
        if (p.a.bias) bias = bias_at<Source>(p.a.bias, row0 + n);
        const V b = broadcast<V>(bias);
        for (int v = 0; v < source.tiles[tile].vectors; ++v) store(out + n * P + v * L, b);
        cursors[tile * rows + n] = {uint32_t(p.w.row_offsets[row0 + n]),
                                    int32_t((row0 + n) / per_group * p.w.width - 1)};
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
          const int64_t at = tile * rows + (b - block0) * kRowBlock;
          run_cell<T, Source::kTable>(source.tiles[tile].vectors, s,
                                      {p.plan.runs + cell[0], p.plan.runs + cell[1], cursors + at, b * kRowBlock, k0,
                                       per_group, p.w.width, acc + at * P},
                                      x, base);
        }
      }
    }
    for (int tile = 0; tile < source.tile_count; ++tile) source.write(tile, acc + tile * rows * P, row0, rows);
  }
}

template <class T, bool kGroups, int kVectors>
void whole_rows(const Stream<T>& s, const int32_t* row_offsets, int64_t row0, int64_t rows, const Lowered<T>& x,
                T* acc) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t start = row_offsets[row0 + n];
    run_entries<T, false, kGroups, kVectors, sets_for(kVectors)>(
        s, start, row_offsets[row0 + n + 1] - start, -1, 0, s.tables + (row0 + n) * s.row_tables, x, x.base,
        acc + n * Simd<T>::kPanel);
  }
}

// Few columns: the panel of all k is small, so each row is one long run, without k blocks.
template <class IO>
void forward_rows(const Params& p, int64_t task, void* workspace) {
  using Source = LinearColumns<IO>;
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  const Stream<T> s = stream_of<T>(p);
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges;
  const int64_t first = range_start(p, range), last = range_start(p, range + 1);
  T* acc = static_cast<T*>(workspace);  // [kRowBlock, kPanel]
  const Lowered<T> x = source.lower(0, p.w.width, acc + kRowBlock * Simd<T>::kPanel, nullptr);
  const int vectors = source.tiles[0].vectors;
  for (int64_t b = first; b < last; ++b) {
    const int64_t row0 = b * kRowBlock, rows = min_of(p.w.rows - row0, kRowBlock);
    for (int64_t n = 0; n < rows; ++n) {
      const T bias = p.a.bias ? bias_at<Source>(p.a.bias, row0 + n) : T(0);
      for (int v = 0; v < vectors; ++v)
        store(acc + n * Simd<T>::kPanel + v * Simd<T>::kLanes, broadcast<V>(bias));
    }
    const int32_t* offsets = p.w.row_offsets;
    if (vectors == 1)
      s.group ? whole_rows<T, true, 1>(s, offsets, row0, rows, x, acc)
              : whole_rows<T, false, 1>(s, offsets, row0, rows, x, acc);
    else
      s.group ? whole_rows<T, true, 2>(s, offsets, row0, rows, x, acc)
              : whole_rows<T, false, 2>(s, offsets, row0, rows, x, acc);
    source.write(0, acc, row0, rows);
  }
}

// Eight gaps at once: whether one of them is a skip.
SLIM_INLINE bool any_skip(const uint8_t* gaps) {
  uint64_t g;
  __builtin_memcpy(&g, gaps, 8);
  return ((~g - 0x0101010101010101u) & g & 0x8080808080808080u) != 0;
}

// One column: a dot product of each row with the activations where they are; several chains hide the FMA's latency.
template <class IO, bool kGroups>
void dot_rows(const Params& p, int64_t range) {
  using T = typename ComputeOf<IO>::type;
  const Stream<IO> s = stream_of<IO>(p);
  const IO* x = static_cast<const IO*>(p.a.x);
  const int64_t row0 = range_start(p, range) * kRowBlock;
  const int64_t row1 = min_of(p.w.rows, range_start(p, range + 1) * kRowBlock);
  for (int64_t n = row0; n < row1; ++n) {
    int64_t i = p.w.row_offsets[n], column = -1;
    const int64_t end = p.w.row_offsets[n + 1];
    const IO* table = s.tables + n * s.row_tables;
    T sum[4] = {p.a.bias ? bias_at<LinearColumns<IO>>(p.a.bias, n) : T(0), 0, 0, 0};
    const auto step = [&](uint64_t& word, int64_t j, T& to) __attribute__((always_inline)) {
      const IO* from = kGroups ? group_table(s, column) : table;
      to += to_compute(from[word & s.mask]) * to_compute(x[column]);
      word >>= s.bits;
      (void)j;
    };
    while (i < end) {
      uint64_t word = codes_at(s, i);
      if (i + 8 <= end && !any_skip(s.gaps + i)) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          column += s.gaps[i + j] + 1;
          step(word, j, sum[j & 3]);
        }
        i += 8;
        continue;
      }
      for (const int64_t stop = min_of(end, i + 8); i < stop; ++i) {
        if (s.gaps[i] == kSkip) {
          column += kSkip;
          word >>= s.bits;
        } else {
          column += s.gaps[i] + 1;
          step(word, 0, sum[0]);
        }
      }
    }
    const T y = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    from_compute(p.a.relu && y < 0 ? T(0) : y, static_cast<IO*>(p.a.y) + n);
  }
}

// Rows long enough, and columns few enough, for the row kernel.
template <class T>
SLIM_INLINE bool few_columns(const Params& p) {
  return p.w.width <= 65536 && p.a.m <= 2 * Simd<T>::kLanes && Simd<T>::kVectors > 2;
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
    if (!p.a.conv && few_columns<T>(p)) return (kRowBlock + p.w.width) * Simd<T>::kPanel * int64_t(sizeof(T));
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Workspace<Pointee<decltype(source)>>::bytes(p); });
  });
}

template <class IO>
void forward_as(const Params& p, int64_t task, void* workspace) {
  if (p.dot) return p.w.group_size > 0 ? dot_rows<IO, true>(p, task) : dot_rows<IO, false>(p, task);
  if (!p.a.conv && few_columns<typename ComputeOf<IO>::type>(p)) return forward_rows<IO>(p, task, workspace);
  with_source<IO>(p.a, [&](auto* source) { forward_columns<Pointee<decltype(source)>>(p, task, workspace); });
}

void forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) { forward_as<decltype(io)>(p, task, workspace); });
}

const sparse_codebook::Kernels kernels = {group_count, workspace_bytes, forward};

}  // namespace sc
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
