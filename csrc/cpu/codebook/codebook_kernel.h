// SPDX-License-Identifier: Apache-2.0
// The idea: the weight stays a stream of indices until it is needed, and how often a decoded entry is used decides how.
//
//   few rows of x     a row of W is a dot product along k: 32 indices become table entries in registers and meet up to
//                     four rows of x there. Bound by the shuffles of the look-up (codebook_lookup.h): for 4 bits on
//                     AVX2, 13 for 32 weights at two a cycle.
//   more, and images  a few rows of a k block are decoded to a scratch of 12 KB in the first-level cache, and a dense
//                     register tile runs over all columns of the group:
//
//                       acc[i][0 … ]  +=  broadcast(scratch[i][k])  *  panel[k][0 … ]       i < R
//
//                     with R * vectors = 12 sums in 16 registers. Bound by the FMAs; decoding a weight costs about as
//                     much as five columns.
//
// Streams are used where they are if a row starts on a whole byte; otherwise it is shifted into a scratch first.
#pragma once

#include "cpu/codebook/codebook.h"
#include "cpu/codebook/codebook_lookup.h"
#include "cpu/common/columns.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace cb {

using codebook::kOneTable;
using codebook::kTablePerRow;
using codebook::Params;
using codebook::Weight;

constexpr int64_t kDotColumns = 8;       // rows of x that are dot products …
constexpr int64_t kDotAtOnce = 4;        // … so many at once, of …
constexpr int64_t kDotBytes = 16384;     // … as much of x
constexpr int64_t kBlock = 128;          // of k, for columns
constexpr int64_t kPitch = kBlock + 16;  // of decoded rows, so that they do not all start in the same cache set
constexpr int64_t kRows = 24;            // decoded at once
constexpr int64_t kAccumulatorBytes = 1 << 18;

// Not inlined, as other functions below that are called once for each row or run: every look-up has its own copy of the
// callers, and compiling those took minutes.
#define SLIM_NOINLINE __attribute__((noinline))

SLIM_INLINE int64_t table_entries(const Weight& w) { return max_of<int64_t>(16, int64_t(1) << w.bits); }
SLIM_INLINE int64_t stream_scratch_bytes(const Weight& w) { return align64((w.width * w.bits >> 3) + 64); }

// All tables that rows share, or that of one row: values in the type of sums, and as a look-up wants them.
template <class T>
struct Tables {
  T *values, *prepared;
};
template <class T>
SLIM_INLINE int64_t half_table_bytes(const Weight& w) {
  const int64_t tables = w.group_size == kTablePerRow ? 1 : w.tables;
  return align64(max_of<int64_t>(1, tables) * table_entries(w) * int64_t(sizeof(T)));
}
template <class T>
SLIM_INLINE int64_t table_bytes(const Weight& w) {
  return 2 * half_table_bytes<T>(w);
}

template <class IO, class T>
SLIM_NOINLINE void load_table(const Weight& w, int64_t table, T* values, T* prepared) {
  const int64_t entries = int64_t(1) << w.bits;
  const IO* from = static_cast<const IO*>(w.codebook) + table * entries;
  for (int64_t i = 0; i < entries; ++i) values[i] = to_compute(from[i]);
  for (int64_t i = entries; i < 16; ++i) values[i] = values[i - entries];
  with_lookup<T, false, false>(w.bits, [&](auto* type) { Pointee<decltype(type)>::prepare(values, prepared); });
}

template <class IO, class T>
SLIM_NOINLINE Tables<T> load_tables(const Weight& w, void* workspace) {
  T* values = static_cast<T*>(workspace);
  bool own = false;
  with_lookup<T, false, false>(w.bits, [&](auto* type) { own = Pointee<decltype(type)>::kPrepares; });
  T* prepared = own ? values + half_table_bytes<T>(w) / int64_t(sizeof(T)) : values;
  if (w.group_size != kTablePerRow)
    for (int64_t t = 0; t < w.tables; ++t)
      load_table<IO>(w, t, values + t * table_entries(w), prepared + t * table_entries(w));
  return {values, prepared};
}

SLIM_NOINLINE const uint8_t* shifted_stream(const Weight& w, int64_t bit, int64_t count, uint8_t* scratch) {
  const int64_t first = bit >> 3, last = (bit + count + 7) >> 3;
  const int shift = int(bit & 7);
  const uint8_t* from = w.codes + first;
  const int64_t bytes = (count + 7) >> 3, safe = min_of(bytes, w.bytes - first - 8);
  int64_t i = 0;
  for (; i < safe; i += 8) {
    const uint64_t word = load64(from + i) >> shift | (uint64_t(from[i + 8]) << 1) << (63 - shift);
    __builtin_memcpy(scratch + i, &word, 8);
  }
  for (; i < bytes; ++i) {
    const uint32_t next = first + i + 1 < last ? from[i + 1] : 0;
    scratch[i] = uint8_t((from[i] | next << 8) >> shift);
  }
  __builtin_memset(scratch + bytes, 0, kSlack);
  return scratch;
}

// Indices c0 … c1 of a row as a stream that begins with a whole byte and may be read kSlack bytes beyond its end.
SLIM_INLINE const uint8_t* row_stream(const Weight& w, int64_t row, int64_t c0, int64_t c1, uint8_t* scratch) {
  const int64_t bit = (row * w.width + c0) * w.bits, count = (c1 - c0) * w.bits;
  if ((bit & 7) == 0 && ((bit + count + 7) >> 3) + kSlack <= w.bytes) return w.codes + (bit >> 3);
  return shifted_stream(w, bit, count, scratch);
}

// Calls f(c0, c1, stream, values, prepared) for the runs of columns k0 … k1 of a row that share a table.
template <class IO, class T, class F>
SLIM_INLINE void for_tables(const Weight& w, int64_t row, int64_t k0, int64_t k1, const Tables<T>& tables,
                            uint8_t* scratch, F f) {
  if (w.group_size > 0) {
    int64_t group = k0 / w.group_size;
    // Where every run begins with a whole byte if the first does, one stream serves them all.
    const bool whole = (w.group_size * w.bits & 7) == 0 && (k0 - group * w.group_size) * w.bits % 8 == 0;
    const uint8_t* stream = whole ? row_stream(w, row, k0, k1, scratch) : nullptr;
    for (int64_t c = k0; c < k1; ++group) {
      const int64_t end = min_of(k1, (group + 1) * w.group_size), offset = group * table_entries(w);
      f(c, end, whole ? stream + ((c - k0) * w.bits >> 3) : row_stream(w, row, c, end, scratch), tables.values + offset,
        tables.prepared + offset);
      c = end;
    }
    return;
  }
  if (w.group_size == kTablePerRow) load_table<IO>(w, row, tables.values, tables.prepared);
  f(k0, k1, row_stream(w, row, k0, k1, scratch), tables.values, tables.prepared);
}

// ---- decoding --------------------------------------------------------------------------------------------------------

template <class T>
SLIM_INLINE void put(T value, T* out) {
  *out = value;
}
SLIM_INLINE void put(float value, bf16* out) { from_compute(value, out); }

template <class T, class Lookup, class OUT>
SLIM_NOINLINE void decode_run(const Lookup& given, const uint8_t* stream, int64_t n, int bits, const T* values,
                              OUT* out) {
  using V = typename Simd<T>::V;
  const Lookup lookup = given;  // kept in registers: for all that is known, `out` might point to what is given
  constexpr int L = Simd<T>::kLanes, N = kStep / L;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, stream += 4 * bits) {
    V v[N];
    lookup.step(stream, v);
    if constexpr (sizeof(OUT) == sizeof(T)) {
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) store(out + i + j * L, v[j]);
    } else {
      T wide[kStep];
      for (int j = 0; j < N; ++j) store(wide + j * L, v[j]);
      for (int j = 0; j < kStep; ++j) put(wide[j], out + i + j);
    }
  }
  for (int64_t j = 0; i < n; ++i, ++j) put(values[code_at(stream, j, bits)], out + i);
}

// Columns k0 … k1 of rows row0 … row0 + count, to out [count, pitch].
template <class IO, class T, class OUT>
void decode_rows(const Weight& w, int64_t row0, int64_t count, int64_t k0, int64_t k1, const Tables<T>& tables,
                 uint8_t* scratch, OUT* out, int64_t pitch) {
  with_lookup<T, false, false>(w.bits, [&](auto* type) {
    using Lookup = Pointee<decltype(type)>;
    if (w.group_size == kOneTable) {
      const Lookup lookup(tables.prepared, w.bits);
      for (int64_t i = 0; i < count; ++i, out += pitch)
        decode_run<T>(lookup, row_stream(w, row0 + i, k0, k1, scratch), k1 - k0, w.bits, tables.values, out);
      return;
    }
    for (int64_t i = 0; i < count; ++i, out += pitch)
      for_tables<IO>(w, row0 + i, k0, k1, tables, scratch,
                     [&](int64_t c0, int64_t c1, const uint8_t* stream, const T* values, const T* prepared) {
        decode_run<T>(Lookup(prepared, w.bits), stream, c1 - c0, w.bits, values, out + (c0 - k0));
      });
  });
}

// ---- few rows of x ---------------------------------------------------------------------------------------------------

// Sums of a run of n columns that share a table. x [M, pitch]: whole steps in the look-up's order, the rest as it is.
template <class T, class Lookup, int M, int N>
SLIM_NOINLINE void dot_run(const Lookup& given, const uint8_t* stream, int64_t n, int bits, const T* values, const T* x,
                           int64_t pitch, Vec<T, N> (*sums)[4], T* rest) {
  using V = Vec<T, N>;
  constexpr int kSets = M == 1 ? 4 : 2;
  // Of this function's own, or every sum would go to memory and back: what it points to might be x.
  const Lookup lookup = given;
  V sum[M][kSets];
  for (int m = 0; m < M; ++m)
    for (int s = 0; s < kSets; ++s) sum[m][s] = sums[m][s];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, stream += 4 * bits) {
    V w[kStep / N];
    lookup.step(stream, w);
#pragma GCC unroll 16
    for (int j = 0; j < kStep / N; ++j)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][j % kSets] += w[j] * load<V>(x + m * pitch + i + j * N);
  }
  for (int m = 0; m < M; ++m)
    for (int s = 0; s < kSets; ++s) sums[m][s] = sum[m][s];
  for (int64_t j = 0; i < n; ++i, ++j) {
    const T w = values[code_at(stream, j, bits)];
    for (int m = 0; m < M; ++m) rest[m] += w * x[m * pitch + i];
  }
}

SLIM_INLINE int64_t dot_pitch(const Weight& w) { return (w.width + 15) / 16 * 16 + 16; }

// Rows of x, each in runs of columns that begin a new step, in the order in which a look-up gives its entries.
template <class IO, class T>
SLIM_NOINLINE void order_rows(const IO* from, int64_t rows, int64_t width, int64_t run, Order order, T* to,
                              int64_t pitch) {
  uint8_t position[kStep];
  for (int j = 0; j < kStep; ++j) position[j] = uint8_t(order_of(order, j));
  for (int64_t m = 0; m < rows; ++m, from += width, to += pitch)
    for (int64_t c0 = 0; c0 < width; c0 += run) {
      const int64_t c1 = min_of(width, c0 + run);
      int64_t i = c0;
      for (; i + kStep <= c1; i += kStep)
        for (int j = 0; j < kStep; ++j) to[i + j] = to_compute(from[i + position[j]]);
      for (; i < c1; ++i) to[i] = to_compute(from[i]);
    }
}

// Workspace: tables | stream | x [kDotAtOnce, pitch] | sums [rows, kDotAtOnce]
template <class IO, class Lookup, int M>
void dot_rows(const Params& p, int64_t first, int64_t row0, int64_t row1, void* workspace) {
  using T = typename ComputeOf<IO>::type;
  constexpr int N = Simd<T>::kLanes;
  using V = Vec<T, N>;
  const Weight& w = p.w;
  const int64_t pitch = dot_pitch(w);
  const Tables<T> tables = load_tables<IO, T>(w, workspace);
  uint8_t* scratch = static_cast<uint8_t*>(workspace) + table_bytes<T>(w);
  T* x = reinterpret_cast<T*>(scratch + stream_scratch_bytes(w));
  T* sums = x + kDotAtOnce * pitch;
  // A part of k is gone through at a time, so that its x stays in the first-level cache.
  const int64_t limit = kDotBytes / int64_t(sizeof(T)) / M, parts = max_of<int64_t>(1, ceil_div(w.width, limit));
  const int64_t part = ceil_div(ceil_div(w.width, parts), kStep) * kStep;
  // Steps are counted from the start of a run of columns that share a table, or of the part.
  const int64_t run = max_of<int64_t>(1, w.group_size > 0 ? w.group_size : part);
  order_rows(static_cast<const IO*>(p.a.x) + first * w.width, M, w.width, run, Lookup::kOrder, x, pitch);
  if (w.group_size == kTablePerRow) load_table<IO>(w, row0, tables.values, tables.prepared);
  const Lookup lookup(tables.prepared, w.bits);
  for (int64_t k0 = 0, left = parts; left > 0; --left, k0 += part) {
    const int64_t k1 = min_of(w.width, k0 + part);
    for (int64_t row = row0; row < row1; ++row) {
      V sum[M][4] = {};
      T rest[M] = {};
      if (w.group_size == kOneTable)
        dot_run<T, Lookup, M, N>(lookup, row_stream(w, row, k0, k1, scratch), k1 - k0, w.bits, tables.values, x + k0,
                                 pitch, sum, rest);
      else
        for_tables<IO>(w, row, k0, k1, tables, scratch,
                       [&](int64_t c0, int64_t c1, const uint8_t* stream, const T* values, const T* prepared) {
          dot_run<T, Lookup, M, N>(Lookup(prepared, w.bits), stream, c1 - c0, w.bits, values, x + c0, pitch, sum, rest);
        });
      const T bias = k0 == 0 && p.a.bias ? bias_at<LinearColumns<IO>>(p.a.bias, row) : T(0);
      T* kept = sums + (row - row0) * M;
      for (int m = 0; m < M; ++m) {
        T y = sum_lanes<T, N>((sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3])) + rest[m];
        y += k0 == 0 ? bias : kept[m];
        if (left > 1)
          kept[m] = y;
        else
          from_compute(p.a.relu && y < 0 ? T(0) : y, static_cast<IO*>(p.a.y) + (first + m) * p.a.n + row);
      }
    }
  }
}

// Range `i` of `ranges` of the rows, in whole steps of `step` rows.
SLIM_INLINE int64_t range_start(int64_t rows, int64_t step, int64_t i, int64_t ranges) {
  return min_of(rows, ceil_div(rows, step) * i / ranges * step);
}

template <class IO>
void forward_dot(const Params& p, int64_t task, void* workspace) {
  using T = typename ComputeOf<IO>::type;
  const int64_t first = task / p.ranges * kDotAtOnce, range = task % p.ranges;
  const int64_t row0 = range_start(p.w.rows, 1, range, p.ranges), row1 = range_start(p.w.rows, 1, range + 1, p.ranges);
  if (row0 == row1) return;
  const auto run = [&](auto* type) {
    using Lookup = Pointee<decltype(type)>;
    switch (min_of(kDotAtOnce, p.a.m - first)) {
      case 1:
        return dot_rows<IO, Lookup, 1>(p, first, row0, row1, workspace);
      case 2:
        return dot_rows<IO, Lookup, 2>(p, first, row0, row1, workspace);
      case 3:
        return dot_rows<IO, Lookup, 3>(p, first, row0, row1, workspace);
      case 4:
        return dot_rows<IO, Lookup, 4>(p, first, row0, row1, workspace);
    }
  };
  // Where runs are whole steps, x can be brought into any order.
  if (p.w.group_size <= 0 || p.w.group_size % kStep == 0)
    with_lookup<T, true, sizeof(IO) == 2>(p.w.bits, run);
  else
    with_lookup<T, false, false>(p.w.bits, run);
}

template <class IO>
int64_t dot_bytes(const Params& p) {
  using T = typename ComputeOf<IO>::type;
  return table_bytes<T>(p.w) + stream_scratch_bytes(p.w) +
         kDotAtOnce * (dot_pitch(p.w) + p.w.rows) * int64_t(sizeof(T));
}

SLIM_INLINE bool uses_dot(const Params& p) { return !p.a.conv && p.a.m <= (p.w.bits <= 4 ? kDotColumns : 8); }

// ---- columns ---------------------------------------------------------------------------------------------------------

// R decoded rows [R, kPitch] times the first NV vectors of the panel, k0 … k1.
template <class T, bool kTable, int R, int NV>
SLIM_INLINE void multiply(const T* w, int64_t depth, const Lowered<T>& x, const char* base, T* acc) {
  using V = typename Simd<T>::V;
  constexpr int L = Simd<T>::kLanes, P = Simd<T>::kPanel;
  V sum[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = load<V>(acc + i * P + v * L);
  for (int64_t k = 0; k < depth; ++k) {
    const T* panel = reinterpret_cast<const T*>(kTable ? base + x.table[k] : base);
    if constexpr (!kTable) base += x.pitch;
    V a[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) a[v] = load<V>(panel + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const V b = broadcast<V>(w[i * kPitch + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] += b * a[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(acc + i * P + v * L, sum[i][v]);
}

// Rows of a register tile that is NV vectors wide: twelve sums of 16 registers, twenty-four of 32.
constexpr int tile_rows(int vectors) { return (SLIM_VECTOR_BYTES == 64 ? vectors > 1 ? 24 : 12 : 12) / vectors; }

template <class T, bool kTable, int NV>
SLIM_NOINLINE void run_rows(const T* w, int64_t rows, int64_t depth, const Lowered<T>& x, const char* base, T* acc) {
  constexpr int R = tile_rows(NV), P = Simd<T>::kPanel;
  int64_t i = 0;
  for (; i + R <= rows; i += R) multiply<T, kTable, R, NV>(w + i * kPitch, depth, x, base, acc + i * P);
  if constexpr (R > 4)
    for (; i + 4 <= rows; i += 4) multiply<T, kTable, 4, NV>(w + i * kPitch, depth, x, base, acc + i * P);
  for (; i + 2 <= rows; i += 2) multiply<T, kTable, 2, NV>(w + i * kPitch, depth, x, base, acc + i * P);
  if (i < rows) multiply<T, kTable, 1, NV>(w + i * kPitch, depth, x, base, acc + i * P);
}

// All vectors of a tile, in parts of two and three (32 registers: up to four).
template <class T, bool kTable>
SLIM_INLINE void run_tile(int vectors, const T* w, int64_t rows, int64_t depth, const Lowered<T>& x, const char* base,
                          T* acc) {
  constexpr int L = Simd<T>::kLanes, kMost = SLIM_VECTOR_BYTES == 64 ? 4 : 3;
  const int parts = (vectors + kMost - 1) / kMost;
  for (int part = 0, v = 0; part < parts; ++part) {
    const int nv = vectors * (part + 1) / parts - v;
    const char* from = base + v * L * int64_t(sizeof(T));
    switch (nv) {
      case 1:
        run_rows<T, kTable, 1>(w, rows, depth, x, from, acc + v * L);
        break;
      case 2:
        run_rows<T, kTable, 2>(w, rows, depth, x, from, acc + v * L);
        break;
      case 3:
        if constexpr (Simd<T>::kVectors >= 3) run_rows<T, kTable, 3>(w, rows, depth, x, from, acc + v * L);
        break;
      case 4:
        if constexpr (Simd<T>::kVectors >= 4) run_rows<T, kTable, 4>(w, rows, depth, x, from, acc + v * L);
        break;
    }
    v += nv;
  }
}

template <class T>
SLIM_INLINE int64_t rows_at_once(int64_t tiles) {
  return max_of<int64_t>(kRows, kAccumulatorBytes / (Simd<T>::kPanel * int64_t(sizeof(T)) * tiles) / kRows * kRows);
}

// Groups that a decoded piece of the weight serves. Images make large ones themselves.
template <class Source>
struct Together {
  static constexpr int kGroups = 1;
  Source source[1];
  explicit Together(const Activations& a) : source{Source(a)} {}
};
template <class IO>
struct Together<LinearColumns<IO>> {
  using Source = LinearColumns<IO>;
  static constexpr int kGroups = 4;
  Source source[4];
  explicit Together(const Activations& a) : source{Source(a), Source(a), Source(a), Source(a)} {}
};

// Workspace: tables | stream | decoded [kRows, kPitch] | offsets [kBlock] int32 | lowered, per group | accumulators
template <class Source>
struct Workspace {
  using T = typename Source::T;
  static int64_t decoded_bytes() { return kRows * kPitch * int64_t(sizeof(T)); }
  static int64_t offset_bytes() { return Source::kTable ? kBlock * 4 : 0; }
  static int64_t lowered_bytes(const Params& p) { return align64(Source::lowered_bytes(p.a, kBlock) + 64); }
  static int64_t bytes(const Params& p) {
    const int64_t rows = min_of(p.w.rows * int64_t(kMaxTiles), rows_at_once<T>(1) + kMaxTiles * kRows);
    return table_bytes<T>(p.w) + stream_scratch_bytes(p.w) + decoded_bytes() + offset_bytes() +
           Together<Source>::kGroups * lowered_bytes(p) + rows * Simd<T>::kPanel * int64_t(sizeof(T));
  }
};

template <class Source>
void forward_columns(const Params& p, int64_t task, void* workspace) {
  using IO = typename Source::Io;
  using T = typename Source::T;
  using V = typename Simd<T>::V;
  constexpr int P = Simd<T>::kPanel, L = Simd<T>::kLanes, G = Together<Source>::kGroups;
  const Weight& w = p.w;
  Together<Source> together(p.a);
  const int64_t group0 = task / p.ranges * G;
  const int sources = int(min_of<int64_t>(G, Source::group_count(p.a) - group0));
  int tiles = 0;
  for (int s = 0; s < sources; ++s) {
    together.source[s].begin(group0 + s);
    tiles += together.source[s].tile_count;
  }
  // Calls f(source, its tile, how many tiles come before) for all tiles.
  const auto for_tiles = [&](auto f) {
    for (int s = 0, before = 0; s < sources; ++s)
      for (int tile = 0; tile < together.source[s].tile_count; ++tile, ++before) f(s, tile, before);
  };
  const int64_t range = task % p.ranges, rows_of_group = w.rows / p.groups;
  const int64_t first = range_start(w.rows, kRows, range, p.ranges);
  const int64_t last = range_start(w.rows, kRows, range + 1, p.ranges);

  char* ws = static_cast<char*>(workspace);
  const Tables<T> tables = load_tables<IO, T>(w, ws);
  uint8_t* stream = reinterpret_cast<uint8_t*>(ws += table_bytes<T>(w));
  T* decoded = reinterpret_cast<T*>(ws += stream_scratch_bytes(w));
  int32_t* offsets = reinterpret_cast<int32_t*>(ws += Workspace<Source>::decoded_bytes());
  ws += Workspace<Source>::offset_bytes();
  const int64_t lowered_bytes = Workspace<Source>::lowered_bytes(p);
  char* lowered = ws;
  T* acc = reinterpret_cast<T*>(ws + G * lowered_bytes);

  // Rows row0 … row1 are in one group of the convolution, and their accumulators stay in the second level.
  const int64_t step = rows_at_once<T>(tiles);
  for (int64_t row0 = first, row1; row0 < last; row0 = row1) {
    const int64_t group = row0 / rows_of_group;
    row1 = min_of(min_of(last, row0 + step), (group + 1) * rows_of_group);
    const int64_t rows = row1 - row0;
    for_tiles([&](int s, int tile, int before) {
      T* out = acc + before * rows * P;
      for (int64_t n = 0; n < rows; ++n) {
        const V b = broadcast<V>(p.a.bias ? bias_at<Source>(p.a.bias, row0 + n) : T(0));
        for (int v = 0; v < together.source[s].tiles[tile].vectors; ++v) store(out + n * P + v * L, b);
      }
    });
    for (int64_t k0 = 0; k0 < w.width; k0 += kBlock) {
      const int64_t k1 = min_of(w.width, k0 + kBlock);
      Lowered<T> x[G] = {};
      for (int s = 0; s < sources; ++s)
        x[s] =
            together.source[s].lower(group * w.width + k0, group * w.width + k1, lowered + s * lowered_bytes, offsets);
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = min_of(kRows, rows - r);
        decode_rows<IO>(w, row0 + r, count, k0, k1, tables, stream, decoded, kPitch);
        for_tiles([&](int s, int tile, int before) {
          const Tile& t = together.source[s].tiles[tile];
          run_tile<T, Source::kTable>(t.vectors, decoded, count, k1 - k0, x[s],
                                      x[s].base + t.column * int64_t(sizeof(T)), acc + (before * rows + r) * P);
        });
      }
    }
    for_tiles(
        [&](int s, int tile, int before) { together.source[s].write(tile, acc + before * rows * P, row0, rows); });
  }
}

// ---- what the bindings call ------------------------------------------------------------------------------------------

int64_t group_count(const Params& p) {
  if (uses_dot(p)) return ceil_div(p.a.m, kDotAtOnce);
  return with_dtype(p.a.dtype, [&](auto io) {
    return with_source<decltype(io)>(p.a, [&](auto* source) {
      using Source = Pointee<decltype(source)>;
      return ceil_div(Source::group_count(p.a), Together<Source>::kGroups);
    });
  });
}

int64_t workspace_bytes(const Params& p) {
  return with_dtype(p.a.dtype, [&](auto io) {
    if (uses_dot(p)) return dot_bytes<decltype(io)>(p);
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Workspace<Pointee<decltype(source)>>::bytes(p); });
  });
}

void forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    using IO = decltype(io);
    if (uses_dot(p)) return forward_dot<IO>(p, task, workspace);
    with_source<IO>(p.a, [&](auto* source) { forward_columns<Pointee<decltype(source)>>(p, task, workspace); });
  });
}

int64_t decode_bytes(const Weight& w) { return table_bytes<double>(w) + stream_scratch_bytes(w); }

void decode(const Weight& w, int64_t row0, int64_t row1, void* out, void* workspace) {
  with_dtype(w.dtype, [&](auto io) {
    using IO = decltype(io);
    using T = typename ComputeOf<IO>::type;
    uint8_t* scratch = static_cast<uint8_t*>(workspace) + table_bytes<T>(w);
    decode_rows<IO>(w, row0, row1 - row0, 0, w.width, load_tables<IO, T>(w, workspace), scratch,
                    static_cast<IO*>(out) + row0 * w.width, w.width);
  });
}

// Members of a run that share a table. Neighbours often have the same index, and each sum would wait for the one before
// it: four sets take turns.
template <class IO>
void sum_run(const uint8_t* stream, int64_t n, int bits, const IO* grad, double* sums) {
  const int entries = 1 << bits;
  double set[4][256];
  for (int s = 0; s < 4; ++s)
    for (int e = 0; e < entries; ++e) set[s][e] = 0;
  const uint32_t mask = uint32_t(entries - 1);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, stream += bits) {
    uint64_t word = load64(stream);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j, word >>= bits) set[j & 3][word & mask] += double(to_compute(grad[i + j]));
  }
  for (int64_t j = 0; i < n; ++i, ++j) set[0][code_at(stream, j, bits)] += double(to_compute(grad[i]));
  for (int e = 0; e < entries; ++e) sums[e] += (set[0][e] + set[1][e]) + (set[2][e] + set[3][e]);
}

void sum_members(const Weight& w, const void* grad, int64_t row0, int64_t row1, double* sums, void* workspace) {
  with_dtype(w.dtype, [&](auto io) {
    const auto* g = static_cast<const decltype(io)*>(grad);
    const int64_t entries = int64_t(1) << w.bits, run = w.group_size > 0 ? w.group_size : w.width;
    for (int64_t row = row0; row < row1; ++row)
      for (int64_t c0 = 0; c0 < w.width; c0 += run) {
        const int64_t c1 = min_of(w.width, c0 + run);
        const int64_t table = w.group_size > 0 ? c0 / run : w.group_size == kTablePerRow ? row : 0;
        sum_run(row_stream(w, row, c0, c1, static_cast<uint8_t*>(workspace)), c1 - c0, w.bits, g + row * w.width + c0,
                sums + table * entries);
      }
  });
}

const codebook::Kernels kernels = {group_count, workspace_bytes, forward, decode_bytes, decode, sum_members};

}  // namespace cb
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
