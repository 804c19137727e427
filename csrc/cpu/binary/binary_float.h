// SPDX-License-Identifier: Apache-2.0
// Signs x float: y = scale * (sign(W) x), without a multiplication.
//
// B neighbouring inputs of a column have only 2^B sums under all signs. With 2^B = L, the lanes of a register, such a
// table is one register, and a permutation by B bits of L rows looks all of them up at once:
//
//     t    = ±x[k] ±x[k + 1] ±x[k + 2]     (8 entries; 16 of four inputs with AVX-512)
//     acc += permute(t, w);  w >>= 3       (L rows of a column)
//
// That is L * B products in two instructions, against L in one FMA: it beats the dense product at any number of columns.
// A word of the plan holds a whole number of look-ups. Tables of four columns and some hundred k stay in the first-level
// cache while all rows of the task pass by. Sums lie in memory as [column, row], and meet scale and bias at the end.
#pragma once

#include "cpu/binary/binary_kernel.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace bin {

template <class T>
struct LookUp {
  static constexpr int L = Simd<T>::kLanes;
  static constexpr int B = L == 16 ? 4 : L == 8 ? 3 : L == 4 ? 2 : 1;
  static constexpr int kWordBits = int(sizeof(T)) * 8;
  static constexpr int G = kWordBits / B;  // look-ups in a word
  static constexpr int kUsed = G * B;      // inputs in a word
  static constexpr int kColumns = 4;       // columns whose tables are made together
  static constexpr int64_t kWords = 16384 / (G * L * int(sizeof(T)) * kColumns) > 0
                                        ? 16384 / (G * L * int(sizeof(T)) * kColumns)
                                        : 1;  // of a block of k: 16 KiB of tables
  static constexpr int64_t kDepth = kWords * kUsed;
  static constexpr int64_t kTableBytes = kWords * G * L * int64_t(sizeof(T)) * kColumns;
  using V = typename Simd<T>::V;
  typedef decltype(V{} < V{}) I;

  static constexpr Layout layout() { return {Order::lanes, L, kWordBits, kUsed}; }
};

// [words, G, M, L] from x(k, m), k < depth; zero beyond.
template <class T, int M, class X>
SLIM_INLINE void make_tables(int64_t depth, T* out, X x) {
  using U = LookUp<T>;
  using V = typename U::V;
  V sign[U::B];
  for (int b = 0; b < U::B; ++b)
    for (int e = 0; e < U::L; ++e) sign[b][e] = T((e >> b & 1) ? 1 : -1);
  const int64_t words = ceil_div(depth, U::kUsed), groups = words * U::G;
  int64_t g = 0;
  for (; (g + 1) * U::B <= depth; ++g)
    for (int m = 0; m < M; ++m, out += U::L) {
      V t = x(g * U::B, m) * sign[0];
#pragma GCC unroll 4
      for (int b = 1; b < U::B; ++b) t += x(g * U::B + b, m) * sign[b];
      store(out, t);
    }
  for (; g < groups; ++g)
    for (int m = 0; m < M; ++m, out += U::L) {
      V t{};
      for (int b = 0; b < U::B; ++b)
        if (g * U::B + b < depth) t += x(g * U::B + b, m) * sign[b];
      store(out, t);
    }
}

// P panels x M columns: acc [M, pitch] += look-ups of `words` words; panels are `panel` words apart.
template <class T, int P, int M>
void look_up(const uint8_t* w, int64_t panel, const T* tables, int64_t words, T* acc, int64_t pitch) {
  using U = LookUp<T>;
  using V = typename U::V;
  using I = typename U::I;
  constexpr int64_t kBytes = sizeof(V);
  V sum[M][P];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < P; ++q) sum[m][q] = load<V>(acc + m * pitch + q * U::L);
  for (int64_t i = 0; i < words; ++i, w += kBytes) {
    I index[P];
#pragma GCC unroll 4
    for (int q = 0; q < P; ++q) __builtin_memcpy(&index[q], w + q * panel * kBytes, kBytes);
#pragma GCC unroll 2
    for (int g = 0; g < U::G; ++g, tables += M * U::L) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const V t = *reinterpret_cast<const V*>(tables + m * U::L);
#pragma GCC unroll 4
        for (int q = 0; q < P; ++q) sum[m][q] += __builtin_shuffle(t, index[q]);
      }
#pragma GCC unroll 4
      for (int q = 0; q < P; ++q) index[q] >>= U::B;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < P; ++q) store(acc + m * pitch + q * U::L, sum[m][q]);
}

// All panels of a range over M columns.
template <class T, int M>
void look_up_rows(const uint8_t* w, int64_t panel, int64_t panels, const T* tables, int64_t words, T* acc,
                  int64_t pitch) {
  constexpr int64_t kBytes = sizeof(typename LookUp<T>::V);
  constexpr int P = M == 1 || SLIM_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t i = 0;
  for (; i + P <= panels; i += P)
    look_up<T, P, M>(w + i * panel * kBytes, panel, tables, words, acc + i * LookUp<T>::L, pitch);
  for (; i < panels; ++i) look_up<T, 1, M>(w + i * panel * kBytes, panel, tables, words, acc + i * LookUp<T>::L, pitch);
}

constexpr int64_t kFloatBlock = 32;    // columns of a linear task
constexpr int64_t kLinearRows = 1024;  // rows whose sums are kept at once
constexpr int64_t kConvRows = 256;

// Columns first … first + count of x(k, column), k0 … k1 of the plan's k, into acc [count, pitch].
template <class T, class X>
SLIM_INLINE void accumulate(const uint8_t* w, int64_t panel, int64_t panels, int64_t depth, int64_t count, T* tables,
                            T* acc, int64_t pitch, X x) {
  const int64_t words = ceil_div(depth, LookUp<T>::kUsed);
  int64_t j = 0;
#define SLIM_COLUMNS(M) \
  make_tables<T, M>(depth, tables, [&](int64_t k, int m) { return x(k, j + m); }); \
  look_up_rows<T, M>(w, panel, panels, tables, words, acc + j * pitch, pitch);
  for (; j + 4 <= count; j += 4) {
    SLIM_COLUMNS(4)
  }
  if (j + 2 <= count) {
    SLIM_COLUMNS(2)
    j += 2;
  }
  if (j < count) {
    SLIM_COLUMNS(1)
  }
#undef SLIM_COLUMNS
}

template <class IO>
void float_linear(const Params& p, int64_t task, void* workspace) {
  using T = typename ComputeOf<IO>::type;
  using U = LookUp<T>;
  T* tables = static_cast<T*>(workspace);
  T* acc = tables + U::kTableBytes / int64_t(sizeof(T));
  const int64_t first = task / p.ranges * kFloatBlock, count = min_of(kFloatBlock, p.a.m - first);
  const int64_t range = task % p.ranges, all = p.plan.header->panels, depth = p.plan.header->depth;
  const int64_t panel0 = all * range / p.ranges, panel1 = all * (range + 1) / p.ranges;
  constexpr int64_t kPanels = kLinearRows / U::L, kBytes = U::L * int64_t(sizeof(T));
  const IO* x = static_cast<const IO*>(p.a.x) + first * p.a.k;
  for (int64_t i = panel0; i < panel1; i += kPanels) {
    const int64_t panels = min_of(kPanels, panel1 - i), pitch = panels * U::L;
    for (int64_t q = 0; q < count * pitch; ++q) acc[q] = 0;
    for (int64_t k0 = 0, word = 0; k0 < p.a.k; k0 += U::kDepth, word += U::kWords)
      accumulate<T>(p.plan.weights + (i * depth + word) * kBytes, depth, panels, min_of(U::kDepth, p.a.k - k0), count,
                    tables, acc, pitch, [&](int64_t k, int64_t j) { return to_compute(x[j * p.a.k + k0 + k]); });
    const int64_t row = i * U::L, rows = min_of(pitch, p.a.n - row);
    for (int64_t j = 0; j < count; ++j) {
      IO* y = static_cast<IO*>(p.a.y) + (first + j) * p.a.n + row;
      const IO* scale = static_cast<const IO*>(p.scale) + row;
      const IO* bias = p.a.bias ? static_cast<const IO*>(p.a.bias) + row : nullptr;
      for (int64_t n = 0; n < rows; ++n) {
        const T v = acc[j * pitch + n] * to_compute(scale[n]) + (bias ? to_compute(bias[n]) : T(0));
        from_compute(p.a.relu && v < 0 ? T(0) : v, y + n);
      }
    }
  }
}

// Workspace: tables | k table [kDepth] int32 | lowered | out [kConvRows, kPanel] | acc [tiles, kPanel, kConvRows]
template <class Source>
struct FloatWorkspace {
  using T = typename Source::T;
  using U = LookUp<T>;
  static int64_t lowered_bytes(const Params& p) { return align64(Source::lowered_bytes(p.a, U::kDepth) + 64); }
  static int64_t bytes(const Params& p) {
    return U::kTableBytes + align64(U::kDepth * 4) + lowered_bytes(p) +
           (1 + kMaxTiles) * kConvRows * Simd<T>::kPanel * int64_t(sizeof(T));
  }
};

template <class Source>
void float_conv(const Params& p, int64_t task, void* workspace) {
  using T = typename Source::T;
  using U = LookUp<T>;
  constexpr int64_t kPanel = Simd<T>::kPanel, kBytes = U::L * int64_t(sizeof(T));
  char* ws = static_cast<char*>(workspace);
  T* tables = reinterpret_cast<T*>(ws);
  int32_t* offsets = reinterpret_cast<int32_t*>(ws + U::kTableBytes);
  char* lowered = reinterpret_cast<char*>(offsets) + align64(U::kDepth * 4);
  T* out = reinterpret_cast<T*>(lowered + FloatWorkspace<Source>::lowered_bytes(p));
  T* acc = out + kConvRows * kPanel;

  const auto& h = *p.plan.header;
  Source source(p.a);
  source.begin(task / p.ranges);
  const int64_t range = task % p.ranges, all = h.groups * h.panels, k = length(p);
  const int64_t panel0 = all * range / p.ranges, panel1 = all * (range + 1) / p.ranges;
  for (int64_t i = panel0; i < panel1;) {
    const int64_t group = i / h.panels;
    const int64_t panels = min_of(min_of(kConvRows / U::L, panel1 - i), (group + 1) * h.panels - i);
    const int64_t inner = i % h.panels * U::L, rows = min_of(panels * U::L, rows_per_group(p) - inner);
    const int64_t row = group * rows_per_group(p) + inner, pitch = panels * U::L;
    for (int64_t q = 0; q < source.tile_count * kPanel * pitch; ++q) acc[q] = 0;
    for (int64_t k0 = 0, word = 0; k0 < k; k0 += U::kDepth, word += U::kWords) {
      const int64_t depth = min_of(U::kDepth, k - k0);
      const Lowered<T> low = source.lower(group * k + k0, group * k + k0 + depth, lowered, offsets);
      for (int tile = 0; tile < source.tile_count; ++tile) {
        const char* base = low.base + source.tiles[tile].column * int64_t(sizeof(T));
        accumulate<T>(p.plan.weights + (i * h.depth + word) * kBytes, h.depth, panels, depth,
                      source.tiles[tile].vectors * Source::kLanes, tables, acc + tile * kPanel * pitch, pitch,
                      [&](int64_t q, int64_t j) {
          const char* at = base + (Source::kTable ? int64_t(low.table[q]) : q * low.pitch);
          return reinterpret_cast<const T*>(at)[j];
        });
      }
    }
    for (int tile = 0; tile < source.tile_count; ++tile) {
      const T* from = acc + tile * kPanel * pitch;
      const int64_t columns = source.tiles[tile].vectors * Source::kLanes;
      for (int64_t n = 0; n < rows; ++n) {
        const T scale = bias_at<Source>(p.scale, row + n), bias = p.a.bias ? bias_at<Source>(p.a.bias, row + n) : T(0);
        for (int64_t j = 0; j < columns; ++j) out[n * kPanel + j] = from[j * pitch + n] * scale + bias;
      }
      source.write(tile, out, row, rows);
    }
    i += panels;
  }
}

int64_t float_group_count(const Params& p) {
  if (!p.a.conv) return ceil_div(p.a.m, kFloatBlock);
  return with_dtype(p.a.dtype, [&](auto io) {
    return with_source<decltype(io)>(p.a, [&](auto* source) { return Pointee<decltype(source)>::group_count(p.a); });
  });
}

int64_t float_row_units(const Params& p) { return p.plan.header->groups * p.plan.header->panels; }

int64_t float_workspace_bytes(const Params& p) {
  return with_dtype(p.a.dtype, [&](auto io) {
    using IO = decltype(io);
    using T = typename ComputeOf<IO>::type;
    if (!p.a.conv) return LookUp<T>::kTableBytes + kFloatBlock * kLinearRows * int64_t(sizeof(T));
    return with_source<IO>(p.a, [&](auto* source) { return FloatWorkspace<Pointee<decltype(source)>>::bytes(p); });
  });
}

void float_forward(const Params& p, int64_t task, void* workspace) {
  with_dtype(p.a.dtype, [&](auto io) {
    using IO = decltype(io);
    if (!p.a.conv) return float_linear<IO>(p, task, workspace);
    with_source<IO>(p.a, [&](auto* source) { float_conv<Pointee<decltype(source)>>(p, task, workspace); });
  });
}

const binary::Kernels kernels = {kSigns,
                                 LookUp<float>::layout(),
                                 LookUp<double>::layout(),
                                 pack_tasks,
                                 pack,
                                 group_count,
                                 row_units,
                                 workspace_bytes,
                                 forward,
                                 float_group_count,
                                 float_row_units,
                                 float_workspace_bytes,
                                 float_forward,
                                 scale};

}  // namespace bin
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
