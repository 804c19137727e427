// SPDX-License-Identifier: Apache-2.0
// The idea: entries are decoded eight at a time into arrays small enough for the first-level cache, and from there the
// loops of the unstructured kernel take them. In vectors of eight
//
//     gaps     g0 … g7   bytes          widen, add 1, sum up in three shifted additions   ->  columns  [8] uint16
//     codes    c0 … c7   `bits` each    spread over lanes by eight shifts, permute table  ->  values   [8] float32
//
// which takes about 20 instructions, less than the multiplications of eight entries with 16 columns. A cell of the plan
// (256 rows, one k block) is decoded at once and serves all tiles of a group of columns: what is multiplied comes from a
// near cache instead of six bytes a weight from a far one. Each row has a cursor (entry, column) that moves on with the k
// blocks. A skip is an entry without a weight: groups of eight that hold one are decoded one by one.
#pragma once

#include "cpu/common/segments.h"
#include "cpu/sparse_codebook/sparse_codebook.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace sc {

using sparse_codebook::kRowBlock;
using sparse_codebook::kSkip;
using sparse_codebook::Params;

// Eight gaps at once: not 0 if one of them is a skip.
SLIM_INLINE uint64_t skips_in(const uint8_t* gaps) {
  uint64_t g;
  __builtin_memcpy(&g, gaps, 8);
  return (~g - 0x0101010101010101u) & g & 0x8080808080808080u;
}
SLIM_INLINE bool any_skip(const uint8_t* gaps) { return skips_in(gaps) != 0; }

// How a weight finds its table.
enum class Tables { permuted, shared, grouped };  // in two registers; in memory, of the row; in memory, of the column

// The stored streams, and how eight entries at a time come out of them.
template <class C, Tables kTables>
struct Decoder {
  using Words = Vec<uint32_t, 8>;
  using Columns = Vec<uint16_t, 8>;

  const uint8_t* gaps;
  const uint8_t* codes;
  int64_t code_bytes;
  int64_t safe;  // eight gaps, and eight bytes of codes, may be read at entries below
  int bits;
  uint64_t mask;
  const C* tables;
  int64_t row_tables;  // elements from a row's table to the next row's; 0 if they share
  uint64_t group;      // ceil(2**63 / group size), if tables belong to groups of columns
  Words shifts;
  const C* table;       // of the row
  Vec<C, 8> low, high;  // of the row, if permuted

  explicit Decoder(const Params& p) {
    const auto& w = p.w;
    gaps = w.gaps;
    codes = w.codes;
    code_bytes = w.code_bytes;
    safe = max_of<int64_t>(0, min_of(w.entries - 7, (code_bytes - 8) * 8 / w.bits));
    bits = int(w.bits);
    mask = (uint64_t(1) << bits) - 1;
    tables = static_cast<const C*>(p.codebook);
    row_tables = w.group_size < 0 ? int64_t(1) << bits : 0;
    group = w.group_size > 0 ? ((uint64_t(1) << 63) - 1) / uint64_t(w.group_size) + 1 : 0;
    for (int i = 0; i < 8; ++i) shifts[i] = uint32_t(i * bits);
    if (w.rows) begin(0);  // of no rows there may be no table
  }

  SLIM_INLINE void begin(int64_t row) {
    table = tables + row * row_tables;
    if constexpr (kTables == Tables::permuted) {
      C all[16];
      for (int i = 0; i < 16; ++i) all[i] = table[i & mask];  // so that a permutation may look at any four bits
      low = load<Vec<C, 8>>(all);
      high = load<Vec<C, 8>>(all + 8);
    }
  }
  SLIM_INLINE void begin_another(int64_t row) {
    if (row_tables) begin(row);
  }

  // Codes of eight entries, or as many as there are, the first one lowest. Never reads past the stream.
  SLIM_INLINE uint64_t word_at(int64_t entry) const {
    const int64_t bit = entry * bits, at = bit >> 3;
    uint64_t word = 0;
    if (__builtin_expect(at + 8 <= code_bytes, 1))
      __builtin_memcpy(&word, codes + at, 8);
    else
      for (int64_t i = at; i < code_bytes; ++i) word |= uint64_t(codes[i]) << (8 * (i - at));
    return word >> (bit & 7);
  }

  // First element of the table of a column. (column + 1/2) / g has no whole number near it, so that the product with
  // the rounded reciprocal cannot end up on the wrong side of one; g = 1 fits too.
  SLIM_INLINE const C* group_table(int64_t column) const {
    const uint64_t which = uint64_t((unsigned __int128)(uint64_t(2 * column + 1)) * group >> 64);
    return tables + (which << bits);
  }

  // Codes of eight entries below `safe`.
  SLIM_INLINE uint64_t codes_at(int64_t entry) const {
    const int64_t bit = entry * bits;
    uint64_t word;
    __builtin_memcpy(&word, codes + (bit >> 3), 8);
    return word >> (bit & 7);
  }

  // Their values, if permuted.
  SLIM_INLINE Vec<C, 8> permuted_at(int64_t entry) const {
    typedef Vec<int32_t, 8> Mask;
    const Words all = (uint32_t(codes_at(entry)) - Words{}) >> shifts;
    const Vec<C, 8> a = __builtin_shuffle(low, Mask(all)), b = __builtin_shuffle(high, Mask(all));
    return Mask(all << 28) < 0 ? b : a;
  }

  // Their values, however they are found. `origin` as in `run`; only grouped tables need it and the columns.
  SLIM_INLINE void values_at(int64_t entry, const uint16_t* columns, int64_t origin, C* out) const {
    if constexpr (kTables == Tables::permuted) {
      store(out, permuted_at(entry));
    } else {
      uint64_t word = codes_at(entry);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, word >>= bits) {
        const C* from = table;
        if constexpr (kTables == Tables::grouped) from = group_table(columns[i] + origin);
        out[i] = from[word & mask];
      }
    }
    (void)columns;
    (void)origin;
  }

  // Columns of eight entries below `safe` without a skip; last: that of the entry before, in all lanes, and then that of
  // the eighth.
  SLIM_INLINE void columns_at(int64_t entry, Columns& last, uint16_t* out) const {
    typedef Vec<uint16_t, 8> W;
    const W zero{};
    W sum = __builtin_convertvector(load<Vec<uint8_t, 8>>(gaps + entry), W) + 1;
    sum += __builtin_shuffle(zero, sum, W{0, 8, 9, 10, 11, 12, 13, 14});
    sum += __builtin_shuffle(zero, sum, W{0, 0, 8, 9, 10, 11, 12, 13});
    sum += __builtin_shuffle(zero, sum, W{0, 0, 0, 0, 8, 9, 10, 11});
    sum += last;
    store(out, sum);
    last = __builtin_shuffle(sum, W{7, 7, 7, 7, 7, 7, 7, 7});
  }

  // One entry that may be a skip: moves the column on, which only has to be right modulo 2**16; returns how many weights
  // there were, 0 or 1.
  SLIM_INLINE int one(uint64_t word, int64_t entry, int64_t& column, C* value, int64_t origin = 0) const {
    const int gap = gaps[entry];
    column += gap;
    if (gap == kSkip) return 0;
    ++column;
    const C* from = kTables == Tables::grouped ? group_table(uint16_t(column) + origin) : table;
    *value = from[word & mask];
    return 1;
  }

  // As `run`, for entries without a skip: without a look at what comes. False if there was one, or the end of the
  // streams is near, or nearby columns might have no table: then nothing counts of what was written.
  SLIM_INLINE bool run_weights(int64_t entry, int64_t count, uint16_t last, C* values, uint16_t* columns) const {
    if (kTables == Tables::grouped || entry + count > safe) return false;
    Columns all = last - Columns{};
    uint64_t skips = 0;
    for (int64_t i = 0; i < count; i += 8) {
      skips |= skips_in(gaps + entry + i);
      columns_at(entry + i, all, columns + i);
      values_at(entry + i, columns + i, 0, values + i);
    }
    return skips == 0;
  }

  // Decodes `count` entries from `entry` on; returns how many weights they hold. Columns count from the start of the k
  // block, modulo 2**16: `last` is that of the weight before. With `origin` added they count from the start of the row's
  // group of the convolution. Up to seven values and columns more than that may be written over.
  SLIM_INLINE int64_t run(int64_t entry, int64_t count, uint16_t last, int64_t origin, C* values,
                          uint16_t* columns) const {
    int64_t written = 0;
    const int64_t end = entry + count;
    Columns all = last - Columns{};
    while (entry < end) {
      const int64_t left = min_of<int64_t>(8, end - entry);
      // What follows the last entry is decoded and dropped, but its columns could lead past the last table.
      const bool whole = kTables != Tables::grouped || left == 8;
      if (__builtin_expect(whole && entry < safe && !any_skip(gaps + entry), 1)) {
        columns_at(entry, all, columns + written);
        values_at(entry, columns + written, origin, values + written);
        written += left;
      } else {
        uint64_t word = word_at(entry);
        int64_t column = int16_t(all[0]);
        for (int64_t i = 0; i < left; ++i, word >>= bits) {
          const int weights = one(word, entry + i, column, values + written, origin);
          columns[written] = uint16_t(column);
          written += weights;
        }
        all = uint16_t(column) - Columns{};
      }
      entry += left;
    }
    return written;
  }
};

struct Cursor {
  uint32_t entry;  // the next one
  int32_t column;  // of the last weight, over all groups
};

// Skips at the end of what was decoded belong to the next weight, so a cursor's column follows from the entries alone.
SLIM_INLINE int64_t distance(const uint8_t* gaps, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += gaps[i] + (gaps[i] != kSkip);
  return sum;
}

// Decodes one cell of the plan. row0 is the first row of its block, k0 the first column of its k block.
template <class T, Tables kTables>
SLIM_INLINE Segment* decode_cell(const Decoder<T, kTables>& decoder, const Params& p, const uint8_t* run,
                                 const uint8_t* end, Cursor* cursors, int64_t row0, int64_t k0, T* values,
                                 uint16_t* columns, Segment* segments) {
  Decoder<T, kTables> d = decoder;  // in registers: what is written might alias the other
  const int64_t per_group = p.w.rows / p.w.groups;
  Segment* to = segments;
  int64_t written = 0;
  while (run < end) {
    const int64_t count = run[0], number = run[1] + 1;
    run += 2;
    for (int64_t n = 0; n < number; ++n) {
      const int64_t row = run[n];
      Cursor& c = cursors[row];
      d.begin_another(row0 + row);
      int64_t origin = 0;
      if constexpr (kTables == Tables::grouped) origin = k0 - (row0 + row) / per_group * p.w.width;
      const uint16_t last = uint16_t(c.column - k0);
      int64_t weights = count;
      if (__builtin_expect(!d.run_weights(c.entry, count, last, values + written, columns + written), 0))
        weights = d.run(c.entry, count, last, origin, values + written, columns + written);
      if (__builtin_expect(weights == count, 1))
        c.column = int32_t(k0 + columns[written + weights - 1]);
      else
        c.column += int32_t(distance(d.gaps + c.entry, count));
      c.entry += uint32_t(count);
      __builtin_prefetch(d.gaps + c.entry + 64);
      __builtin_prefetch(d.codes + (c.entry * int64_t(d.bits) >> 3) + 64);
      if (to > segments && to[-1].row == row)  // several turns of a row are one segment
        to[-1].count = uint16_t(to[-1].count + weights);
      else if (weights)
        *to++ = {uint32_t(written), uint16_t(row), uint16_t(weights)};
      written += weights;
    }
    run += number;
  }
  return to;
}

SLIM_INLINE int64_t range_start(const Params& p, int64_t i) {
  return cpu::SLIM_ISA::range_start(p.w.row_offsets, p.w.rows, kRowBlock, i, p.ranges);
}

// Row blocks that are worked on at once, while the k blocks go by: their accumulators stay in the second level. Lowering
// is repeated for each step.
template <class T>
SLIM_INLINE int64_t blocks_at_once(int64_t tiles) {
  return max_of<int64_t>(1, 262144 / (Simd<T>::kPanel * int64_t(sizeof(T)) * tiles) / kRowBlock);
}

// Workspace: table [k_block] int32 | lowered | accumulators [tiles, rows, kPanel] | cursors [rows] | of one cell: values,
// columns, segments
template <class Source>
struct Workspace {
  using T = typename Source::T;
  static constexpr int64_t kOver = 8;  // what decoding may write beyond the weights
  static int64_t table_bytes(const Params& p) { return Source::kTable ? align64(p.plan.header->k_block * 4) : 0; }
  static int64_t lowered_bytes(const Params& p) {
    return align64(Source::lowered_bytes(p.a, p.plan.header->k_block) + 64);
  }
  static int64_t rows() { return 262144 / (Simd<T>::kPanel * int64_t(sizeof(T))) + kMaxTiles * kRowBlock; }
  static int64_t acc_bytes(const Params& p) {
    return min_of((p.w.rows + kRowBlock) * int64_t(kMaxTiles), rows()) * Simd<T>::kPanel * int64_t(sizeof(T));
  }
  static int64_t cursor_bytes(const Params& p) {
    return align64(min_of(p.w.rows + kRowBlock, rows()) * int64_t(sizeof(Cursor)));
  }
  static int64_t value_bytes(const Params& p) {
    return align64((p.plan.header->most_entries + kOver) * int64_t(sizeof(T)));
  }
  static int64_t column_bytes(const Params& p) { return align64((p.plan.header->most_entries + kOver) * 2); }
  static int64_t bytes(const Params& p) {
    return table_bytes(p) + lowered_bytes(p) + acc_bytes(p) + cursor_bytes(p) + value_bytes(p) + column_bytes(p) +
           p.plan.header->most_turns * int64_t(sizeof(Segment));
  }
};

template <class Source, Tables kTables>
void forward_columns(const Params& p, int64_t task, void* workspace) {
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  using W = Workspace<Source>;
  constexpr int P = Simd<T>::kPanel, L = Simd<T>::kLanes;
  const auto& h = *p.plan.header;
  Decoder<T, kTables> decoder(p);
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges;
  const int64_t first = range_start(p, range), last = range_start(p, range + 1);

  char* ws = static_cast<char*>(workspace);
  int32_t* table = reinterpret_cast<int32_t*>(ws);
  void* lowered = ws += W::table_bytes(p);
  T* acc = reinterpret_cast<T*>(ws += W::lowered_bytes(p));
  Cursor* cursors = reinterpret_cast<Cursor*>(ws += W::acc_bytes(p));
  T* values = reinterpret_cast<T*>(ws += W::cursor_bytes(p));
  uint16_t* columns = reinterpret_cast<uint16_t*>(ws += W::value_bytes(p));
  Segment* segments = reinterpret_cast<Segment*>(ws += W::column_bytes(p));
  const int64_t step = blocks_at_once<T>(source.tile_count), per_group = p.w.rows / p.w.groups;

  for (int64_t block0 = first; block0 < last; block0 += step) {
    const int64_t block1 = min_of(last, block0 + step);
    const int64_t row0 = block0 * kRowBlock, rows = min_of(h.rows, block1 * kRowBlock) - row0;
    for (int64_t n = 0; n < rows; ++n)
      cursors[n] = {uint32_t(p.w.row_offsets[row0 + n]), int32_t((row0 + n) / per_group * p.w.width - 1)};
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
      for (int64_t b = block0; b < block1; ++b) {
        const uint32_t* cell = p.plan.cells + b * h.k_blocks + kb;
        const int64_t at = (b - block0) * kRowBlock;
        const Segment* end = decode_cell(decoder, p, p.plan.runs + cell[0], p.plan.runs + cell[1], cursors + at,
                                         b * kRowBlock, k0, values, columns, segments);
        for (int tile = 0; tile < source.tile_count; ++tile) {
          const char* base = x.base + source.tiles[tile].column * int64_t(sizeof(T));
          run_tile<T, Source::kTable>(source.tiles[tile].vectors, values, columns, segments, end, x, base,
                                      acc + (tile * rows + at) * P);
        }
      }
    }
    for (int tile = 0; tile < source.tile_count; ++tile) source.write(tile, acc + tile * rows * P, row0, rows);
  }
}

// One row against few columns. Decoding is interleaved with multiplying: the one is bound by instructions, the other
// waits for the second-level cache.
template <class T, Tables kTables, int kVectors>
SLIM_INLINE void whole_row(const Decoder<T, kTables>& d, int64_t entry, int64_t end, const Lowered<T>& x, T* out) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes, kSets = sets_for(kVectors);
  V sum[kSets][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    sum[0][v] = load<V>(out + v * L);
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[set][v] = V{};
  }
  alignas(32) T values[8];
  const auto multiply = [&](T value, int64_t column, V* to) __attribute__((always_inline)) {
    const V w = broadcast<V>(value);
    const T* p = reinterpret_cast<const T*>(x.base + column * x.pitch);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) to[v] += w * load<V>(p + v * L);
  };
  int64_t column = -1;
  for (; entry < end; entry += 8) {
    const uint8_t* gap = d.gaps + entry;
    if (__builtin_expect(entry < d.safe && entry + 8 <= end && !any_skip(gap), 1)) {
      uint64_t word = 0;
      if constexpr (kTables == Tables::permuted)
        store(values, d.permuted_at(entry));
      else
        word = d.codes_at(entry);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        column += gap[i] + 1;
        T value;
        if constexpr (kTables == Tables::permuted) {
          value = values[i];
        } else {
          value = (kTables == Tables::grouped ? d.group_table(column) : d.table)[word & d.mask];
          word >>= d.bits;
        }
        multiply(value, column, sum[i % kSets]);
      }
      continue;
    }
    uint64_t word = d.word_at(entry);
    for (int64_t i = entry; i < min_of(end, entry + 8); ++i, word >>= d.bits) {
      T value;
      if (d.one(word, i, column, &value)) multiply(value, column, sum[0]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int set = 1; set < kSets; ++set) sum[0][v] += sum[set][v];
    store(out + v * L, sum[0][v]);
  }
}

template <class T, Tables kTables, int kVectors>
void whole_rows(Decoder<T, kTables>& d, const int32_t* row_offsets, int64_t row0, int64_t rows, const Lowered<T>& x,
                T* acc) {
  for (int64_t n = 0; n < rows; ++n) {
    d.begin_another(row0 + n);
    whole_row<T, kTables, kVectors>(d, row_offsets[row0 + n], row_offsets[row0 + n + 1], x, acc + n * Simd<T>::kPanel);
  }
}

// Few columns: the panel of all k is small, so each row is one long run, without k blocks.
template <class IO, Tables kTables>
void forward_rows(const Params& p, int64_t task, void* workspace) {
  using Source = LinearColumns<IO>;
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  Decoder<T, kTables> decoder(p);
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
      for (int v = 0; v < vectors; ++v) store(acc + n * Simd<T>::kPanel + v * Simd<T>::kLanes, broadcast<V>(bias));
    }
    if (vectors == 1)
      whole_rows<T, kTables, 1>(decoder, p.w.row_offsets, row0, rows, x, acc);
    else
      whole_rows<T, kTables, 2>(decoder, p.w.row_offsets, row0, rows, x, acc);
    source.write(0, acc, row0, rows);
  }
}

// One column: a dot product of each row with the activations where they are; several chains hide the FMA's latency.
template <class IO, Tables kTables>
void forward_dot(const Params& p, int64_t range) {
  using T = typename ComputeOf<IO>::type;
  Decoder<T, kTables> d(p);
  const IO* x = static_cast<const IO*>(p.a.x);
  const int64_t row0 = range_start(p, range) * kRowBlock;
  const int64_t row1 = min_of(p.w.rows, range_start(p, range + 1) * kRowBlock);
  for (int64_t n = row0; n < row1; ++n) {
    d.begin_another(n);
    T sum[4] = {p.a.bias ? bias_at<LinearColumns<IO>>(p.a.bias, n) : T(0), 0, 0, 0};
    Vec<T, 8> lanes{};
    int64_t column = -1;
    const int64_t end = p.w.row_offsets[n + 1];
    for (int64_t entry = p.w.row_offsets[n]; entry < end; entry += 8) {
      const uint8_t* gap = d.gaps + entry;
      if (__builtin_expect(entry < d.safe && entry + 8 <= end && !any_skip(gap), 1)) {
        // Scalar additions: a vector of columns would have to go through memory to become addresses.
        int64_t ahead[8];
        int64_t sum_of_gaps = 0;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) ahead[i] = (sum_of_gaps += gap[i]) + i + 1;
        const IO* from = x + column;
        if constexpr (kTables == Tables::permuted) {
          lanes += d.permuted_at(entry) * Vec<T, 8>{to_compute(from[ahead[0]]), to_compute(from[ahead[1]]),
                                                    to_compute(from[ahead[2]]), to_compute(from[ahead[3]]),
                                                    to_compute(from[ahead[4]]), to_compute(from[ahead[5]]),
                                                    to_compute(from[ahead[6]]), to_compute(from[ahead[7]])};
        } else {
          uint64_t word = d.codes_at(entry);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i, word >>= d.bits) {
            const T* table = kTables == Tables::grouped ? d.group_table(column + ahead[i]) : d.table;
            sum[i & 3] += table[word & d.mask] * to_compute(from[ahead[i]]);
          }
        }
        column += ahead[7];
        continue;
      }
      uint64_t word = d.word_at(entry);
      for (int64_t i = entry; i < min_of(end, entry + 8); ++i, word >>= d.bits) {
        T value;
        if (d.one(word, i, column, &value)) sum[0] += value * to_compute(x[column]);
      }
    }
    sum[0] += sum_lanes<T, 8>(lanes);
    const T y = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    from_compute(p.a.relu && y < 0 ? T(0) : y, static_cast<IO*>(p.a.y) + n);
  }
}

// Columns in 16 bits, over the whole width: what the kernels of few columns ask for.
SLIM_INLINE bool narrow(const Params& p) { return !p.a.conv && p.w.width <= 65536; }

template <class T>
SLIM_INLINE bool few_columns(const Params& p) {
  return narrow(p) && p.a.m <= 2 * Simd<T>::kLanes && Simd<T>::kVectors > 2;
}

SLIM_INLINE bool dot(const Params& p) { return narrow(p) && p.a.m == 1; }

int64_t group_count(const Params& p) {
  if (dot(p)) return 1;
  return with_dtype(p.a.dtype, [&](auto io) {
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Pointee<decltype(source)>::group_count(p.a); });
  });
}

int64_t workspace_bytes(const Params& p) {
  if (dot(p)) return 0;
  return with_dtype(p.a.dtype, [&](auto io) {
    using T = typename ComputeOf<decltype(io)>::type;
    if (few_columns<T>(p)) return (kRowBlock + p.w.width) * Simd<T>::kPanel * int64_t(sizeof(T));
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Workspace<Pointee<decltype(source)>>::bytes(p); });
  });
}

template <class IO, Tables kTables>
void forward_as(const Params& p, int64_t task, void* workspace) {
  if (dot(p)) return forward_dot<IO, kTables>(p, task);
  if (few_columns<typename ComputeOf<IO>::type>(p)) return forward_rows<IO, kTables>(p, task, workspace);
  with_source<IO>(p.a, [&](auto* source) { forward_columns<Pointee<decltype(source)>, kTables>(p, task, workspace); });
}

void forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    using IO = decltype(io);
    if (p.w.group_size > 0) return forward_as<IO, Tables::grouped>(p, task, workspace);
    if constexpr (sizeof(typename ComputeOf<IO>::type) == 4 && SLIM_VECTOR_BYTES >= 32)
      if (p.w.bits <= 4) return forward_as<IO, Tables::permuted>(p, task, workspace);
    forward_as<IO, Tables::shared>(p, task, workspace);
  });
}

const sparse_codebook::Kernels kernels = {group_count, workspace_bytes, forward};

}  // namespace sc
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
