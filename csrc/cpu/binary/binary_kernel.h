// SPDX-License-Identifier: Apache-2.0
// Sign x sign: dot = K - 2 * popcount(x xor w), over bits that are 1 for +1.
//
// Columns (rows of x, or output pixels) are packed to bits first: of a linear layer along k, of a convolution pixel by
// pixel, so that a column of a convolution is a copy of a few whole pixels (im2row, of bits: 1/32 of the floats'). Taps
// outside the image become zero bits and are taken out again with the plan's `border` sums.
//
// A task is 64 columns times a range of rows, in units of 64 rows. The signs of a unit stay in the first- or
// second-level cache while the columns pass; the tile of 64 x 64 dot products that comes out is scaled and written, or
// compared with thresholds, while it is in the first-level cache.
//
// With a vector popcount (or none at all) the tile is the one of the targets: rows in 64-bit lanes, a column's word
// broadcast, xor, popcount, add. Six columns x 4 vectors are 24 accumulators.
//
// AVX2 has no vector popcount, but four bits of a column have only 16 values: for each there is a table of popcount(x xor
// w) over all w, so that one vpshufb by the weights replaces xor, and, shift and look-up. A count takes half a byte, so a
// table serves two columns at once, and three look-ups fit before the halves must be parted:
//
//     w    = 32 rows x 4 bits of k             (a byte a row, split into halves once per column tile)
//     t    = table of 4 bits of columns a, b   (16 bytes in both lanes of a register; 256 tables are 4 KiB)
//     sum  = vpshufb(t, w) three times         (a in the lower halves of bytes, b in the upper)
//     acc_a += sum & 15;  acc_b += sum >> 4    (bytes; 30 bytes of k fit before they are widened)
//
// Ten instructions for 768 bit pairs; counting bits takes eight for 256, popcnt three for 64.
#pragma once

#include "cpu/binary/binary.h"
#include "cpu/common/columns.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace bin {

using binary::Layout;
using binary::Order;
using binary::Params;
using binary::Plan;

constexpr int64_t kBlock = 64;  // columns of a task
constexpr int64_t kUnit = 64;   // rows of a unit: a word of output bits

#if defined(__AVX2__) && SLIM_VECTOR_BYTES == 32
#define SLIM_LOOK_UP 1
constexpr Layout kSigns = {Order::bytes, 32, 8, 8};
#else
#define SLIM_LOOK_UP 0
constexpr Layout kSigns = {Order::words, 8, 64, 64};
#endif

SLIM_INLINE int64_t columns_of(const Activations& a) {
  return a.conv ? a.geometry.batch * a.geometry.out_h * a.geometry.out_w : a.m;
}
// Bytes of k in a column, as in the plan.
SLIM_INLINE int64_t column_bytes(const Params& p) {
  return p.plan.header->kernel_h * p.plan.header->kernel_w * binary::tap_bytes(p.plan.header->channels);
}
// Length of a dot product.
SLIM_INLINE int32_t length(const Params& p) {
  return int32_t(p.plan.header->channels * p.plan.header->kernel_h * p.plan.header->kernel_w);
}
SLIM_INLINE int64_t rows_per_group(const Params& p) { return p.a.n / p.plan.header->groups; }
SLIM_INLINE int64_t units_per_group(const Params& p) { return ceil_div(rows_per_group(p), kUnit); }
int64_t row_units(const Params& p) {
  const int64_t groups = p.plan.header->groups;
  // Ranges may not share a byte of output bits.
  if (p.thresholds && groups > 1 && rows_per_group(p) % kUnit) return 1;
  return groups * units_per_group(p);
}

// ---- packing: x >= 0 to bits -----------------------------------------------------------------------------------------

// Bits of 8 values, the first in bit 0. NaN gives 0, as in torch.where(x >= 0, 1, -1).
template <class IO>
SLIM_INLINE uint32_t sign_byte(const IO* x) {
#ifdef __AVX2__
  if constexpr (sizeof(IO) <= 4) {
    Vec<float, 8> v;
    if constexpr (sizeof(IO) == 4) {
      v = load<Vec<float, 8>>(x);
    } else {
      const Vec<uint32_t, 8> wide =
          __builtin_convertvector(*reinterpret_cast<const Vec<uint16_t, 8>*>(x), Vec<uint32_t, 8>) << 16;
      __builtin_memcpy(&v, &wide, 32);
    }
    const auto mask = v >= 0.0f;
    typedef float F8 __attribute__((vector_size(32)));
    F8 bits;
    __builtin_memcpy(&bits, &mask, 32);
    return uint32_t(__builtin_ia32_movmskps256(bits));
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= uint32_t(to_compute(x[i]) >= 0) << i;
  return bits;
}

template <class IO>
SLIM_INLINE void pack_row(const IO* x, int64_t k, uint8_t* out, int64_t bytes) {
  int64_t i = 0, b = 0;
  for (; i + 64 <= k; i += 64, b += 8) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint64_t(sign_byte(x + i + 8 * j)) << (8 * j);
    __builtin_memcpy(out + b, &word, 8);
  }
  for (; i + 8 <= k; i += 8) out[b++] = uint8_t(sign_byte(x + i));
  if (i < k) {
    uint32_t last = 0;
    for (int j = 0; i + j < k; ++j) last |= uint32_t(to_compute(x[i + j]) >= 0) << j;
    out[b++] = uint8_t(last);
  }
  for (; b < bytes; ++b) out[b] = 0;
}

SLIM_INLINE uint32_t* unsigned_of(float) { return nullptr; }
SLIM_INLINE uint64_t* unsigned_of(double) { return nullptr; }

// Up to 32 channels of L neighbouring pixels, a word per pixel: the mask of a comparison is -1, so 2 * word - mask
// appends its bit.
template <class IO, int L>
SLIM_INLINE void pack_pixels(const IO* x, int64_t plane, int64_t channels, uint8_t* out, int64_t pixel_stride) {
  using T = typename ComputeOf<IO>::type;
  using V = Vec<T, L>;
  // As wide as the mask, and unsigned: 32 bits fill it to the top.
  using W = Vec<Pointee<decltype(unsigned_of(T{}))>, L>;
  W word{};
  for (int64_t c = channels; c-- > 0;) {
    V v{};
    if constexpr (sizeof(IO) == sizeof(T))
      v = load<V>(x + c * plane);
    else
      for (int i = 0; i < L; ++i) v[i] = to_compute(x[c * plane + i]);
    word = word + word - W(v >= T(0));
  }
  const int64_t bytes = ceil_div(channels, 8);
  for (int i = 0; i < L; ++i) {
    const uint32_t w = uint32_t(word[i]);
    uint8_t* to = out + i * pixel_stride;
    if (bytes == 4)
      __builtin_memcpy(to, &w, 4);
    else
      for (int64_t b = 0; b < bytes; ++b) to[b] = uint8_t(w >> (8 * b));
  }
}

constexpr int64_t kPackRows = 16;

int64_t pack_tasks(const Params& p) {
  return p.a.conv ? p.a.geometry.batch * p.plan.header->groups : ceil_div(p.a.m, kPackRows);
}

template <class IO>
void pack_as(const Params& p, int64_t task) {
  const IO* x = static_cast<const IO*>(p.a.x);
  if (!p.a.conv) {
    for (int64_t m = task * kPackRows; m < min_of(p.a.m, (task + 1) * kPackRows); ++m)
      pack_row(x + m * p.a.k, p.a.k, p.bits + m * p.pixel_stride, p.pixel_stride);
    return;
  }
  const int64_t groups = p.plan.header->groups, channels = p.plan.header->channels;
  const int64_t plane = p.a.geometry.height * p.a.geometry.width;
  x += task * channels * plane;  // [batch, groups, channels, plane]
  uint8_t* out = p.bits + task / groups * p.image_stride + task % groups * p.group_stride;
  constexpr int L = sizeof(typename ComputeOf<IO>::type) == 8 ? 4 : 8;
  for (int64_t c = 0; c < channels; c += 32, x += 32 * plane, out += 4) {
    const int64_t count = min_of<int64_t>(32, channels - c);
    int64_t i = 0;
    for (; i + L <= plane; i += L) pack_pixels<IO, L>(x + i, plane, count, out + i * p.pixel_stride, p.pixel_stride);
    for (; i < plane; ++i) pack_pixels<IO, 1>(x + i, plane, count, out + i * p.pixel_stride, p.pixel_stride);
  }
}

void pack(const Params& p, int64_t task) {
  with_dtype(p.a.dtype, [&](auto io) { pack_as<decltype(io)>(p, task); });
}

// ---- columns ---------------------------------------------------------------------------------------------------------

// The part of the kernel that lies inside the image at one output pixel.
struct Inside {
  int64_t r0, r1, s0, s1;
};

// First and last + 1 of the taps t with 0 <= at + t * dilation < size.
SLIM_INLINE void inside(int64_t at, int64_t size, int64_t dilation, int64_t taps, int64_t* first, int64_t* last) {
  *first = at >= 0 ? 0 : min_of(taps, ceil_div(-at, dilation));
  *last = at >= size ? 0 : min_of(taps, (size - at + dilation - 1) / dilation);
  if (*last < *first) *last = *first;
}

// Columns first … first + count of group `group` as bits [count, stride], or where they lie already.
struct Columns {
  const uint8_t* bits;
  int64_t stride;
};

Columns lower(const Params& p, int64_t group, int64_t first, int64_t count, uint8_t* buffer, Inside* which) {
  if (!p.a.conv) return {p.bits + first * p.pixel_stride, p.pixel_stride};
  const ConvGeometry& g = p.a.geometry;
  const int64_t plane = g.out_h * g.out_w, per_tap = binary::tap_bytes(p.plan.header->channels);
  const int64_t bytes = column_bytes(p), stride = (bytes + 7) & ~int64_t(7);
  const bool together = g.dilation_w == 1 && p.pixel_stride == per_tap;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t column = first + j, image = column / plane, pixel = column % plane;
    const int64_t h = pixel / g.out_w * g.stride_h - g.pad_h, w = pixel % g.out_w * g.stride_w - g.pad_w;
    Inside in;
    inside(h, g.height, g.dilation_h, g.kernel_h, &in.r0, &in.r1);
    inside(w, g.width, g.dilation_w, g.kernel_w, &in.s0, &in.s1);
    if (in.r0 >= in.r1 || in.s0 >= in.s1) in = {0, 0, 0, 0};
    which[j] = in;
    uint8_t* out = buffer + j * stride;
    const uint8_t* from = p.bits + image * p.image_stride + group * p.group_stride;
    if (in.r0 > 0 || in.r1 < g.kernel_h || in.s0 > 0 || in.s1 < g.kernel_w || stride > bytes)
      __builtin_memset(out, 0, size_t(stride));
    for (int64_t r = in.r0; r < in.r1; ++r) {
      const uint8_t* line = from + ((h + r * g.dilation_h) * g.width + w) * p.pixel_stride;
      uint8_t* to = out + r * g.kernel_w * per_tap;
      if (together) {
        __builtin_memcpy(to + in.s0 * per_tap, line + in.s0 * per_tap, size_t((in.s1 - in.s0) * per_tap));
        continue;
      }
      for (int64_t s = in.s0; s < in.s1; ++s)
        __builtin_memcpy(to + s * per_tap, line + s * g.dilation_w * p.pixel_stride, size_t(per_tap));
    }
  }
  return {buffer, stride};
}

// ---- the product: dots [columns, kUnit] = k - 2 * popcount -----------------------------------------------------------

#if SLIM_LOOK_UP

typedef uint8_t B16 __attribute__((vector_size(16), may_alias, aligned(1)));
typedef uint8_t V32 __attribute__((vector_size(32), may_alias));
typedef uint8_t B32 __attribute__((vector_size(32), may_alias, aligned(1)));  // anywhere in memory
typedef uint16_t U16 __attribute__((vector_size(32), may_alias));
typedef uint32_t U32 __attribute__((vector_size(32), may_alias, aligned(1)));

// byte[b << 4 | a][w] = popcount(a ^ w) + 16 * popcount(b ^ w), and without b: byte[a][w] = popcount(a ^ w).
template <int N>
struct Tables {
  alignas(64) char byte[N][16];
  constexpr Tables() : byte() {
    for (int x = 0; x < N; ++x)
      for (int w = 0; w < 16; ++w) {
        int a = 0, b = 0;
        for (int i = 0; i < 4; ++i) a += ((x ^ w) >> i) & 1, b += (((x >> 4) ^ w) >> i) & 1;
        byte[x][w] = char(a + (N > 16 ? 16 * b : 0));
      }
  }
};
constexpr Tables<256> kPairs;
constexpr Tables<16> kSingles;

constexpr int64_t kChunk = 30;           // bytes of k: 60 look-ups of at most 4 stay below 256
constexpr int64_t kLong = 270 * kChunk;  // and these below 65536

SLIM_INLINE V32 load32(const uint8_t* p) { return *reinterpret_cast<const B32*>(p); }
SLIM_INLINE V32 low_half(V32 v) { return v & (V32{} + 15); }
SLIM_INLINE V32 high_half(V32 v) { return V32(U16(v) >> 4) & (V32{} + 15); }
// Sixteen bytes in both lanes.
SLIM_INLINE V32 table_at(const char* p) {
  const B16 t = *reinterpret_cast<const B16*>(p);
#ifdef __clang__
  return __builtin_shufflevector(t, t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8,
                                 9, 10, 11, 12, 13, 14, 15);
#else
  typedef long long Q2 __attribute__((vector_size(16)));  // a shuffle becomes a load and a permutation here
  return V32(__builtin_ia32_vbroadcastsi256(Q2(t)));
#endif
}
SLIM_INLINE V32 look_up(V32 table, V32 index) {
  typedef char Q32 __attribute__((vector_size(32)));
  return V32(__builtin_ia32_pshufb256(Q32(table), Q32(index)));
}
// Keeps the compiler from moving additions together: it would run out of registers.
SLIM_INLINE void pin(V32& v) { asm("" : "+x"(v)); }

// Where the tables of a pair of columns lie, in bytes, for each half byte of k, padded with zeros to three bytes of k.
SLIM_INLINE int64_t padded(int64_t bytes) { return (bytes + 2) / 3 * 3; }
void places(const uint8_t* a, const uint8_t* b, int64_t bytes, uint16_t* __restrict out) {
  for (int64_t i = 0; i < bytes; ++i) {
    const uint32_t x = a[i], y = b[i];
    out[2 * i] = uint16_t((x & 15) << 4 | (y & 15) << 8);
    out[2 * i + 1] = uint16_t((x & 240) | (y & 240) << 4);
  }
  for (int64_t i = 2 * bytes; i < 2 * padded(bytes); ++i) out[i] = 0;
}

// Sums of bytes, widened as often as they must be, to 32-bit sums in the order of the rows: byte 4 i + q of a panel is row
// 8 q + i. S sums of P panels; step(first, last, sums) adds the bytes of k first … last.
template <int S, int P, class Step>
SLIM_INLINE void sum_chunks(int64_t bytes, U32 (&total)[S][P][4], Step step) {
  for (int64_t long0 = 0; long0 < bytes; long0 += kLong) {
    U16 even[S][P] = {}, odd[S][P] = {};
    const int64_t long1 = min_of(bytes, long0 + kLong);
    for (int64_t c0 = long0; c0 < long1; c0 += kChunk) {
      V32 acc[S][P];
#pragma GCC unroll 8
      for (int m = 0; m < S; ++m)
#pragma GCC unroll 8
        for (int q = 0; q < P; ++q) acc[m][q] = V32{};
      step(c0, min_of(long1, c0 + kChunk), acc);
#pragma GCC unroll 8
      for (int m = 0; m < S; ++m)
#pragma GCC unroll 8
        for (int q = 0; q < P; ++q) {
          const U16 sum = U16(acc[m][q]);
          even[m][q] += sum & 0xff;
          odd[m][q] += sum >> 8;
        }
    }
    for (int m = 0; m < S; ++m)
      for (int q = 0; q < P; ++q) {
        const U32 e = U32(even[m][q]), o = U32(odd[m][q]), parts[4] = {e & 0xffff, o & 0xffff, e >> 16, o >> 16};
        for (int i = 0; i < 4; ++i) total[m][q][i] += parts[i];
      }
  }
}

template <int P>
SLIM_INLINE void store_dots(const U32 (&total)[P][4], int32_t k, int32_t* dots) {
  for (int q = 0; q < P; ++q)
    for (int i = 0; i < 4; ++i) *reinterpret_cast<U32*>(dots + q * 32 + i * 8) = uint32_t(k) - 2 * total[q][i];
}

// P panels of 32 rows x M pairs of columns, of which `columns` are stored.
template <int P, int M>
void multiply(const uint8_t* w, int64_t panel, const uint16_t* x, int64_t bytes, int32_t k, int columns,
              int32_t* dots) {
  U32 total[2 * M][P][4] = {};
  const int64_t pitch = 2 * padded(bytes);
  const char* tables = kPairs.byte[0];
  sum_chunks<2 * M, P>(bytes, total, [&](int64_t c0, int64_t c1, V32(&acc)[2 * M][P]) __attribute__((always_inline)) {
    const uint8_t* at = w + c0 * 32;
    const uint16_t* place = x + c0 * 2;
    const auto add = [&](const V32(&index)[3][P], int64_t offset) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const uint16_t* p = place + m * pitch + offset;
        const V32 t0 = table_at(tables + p[0]), t1 = table_at(tables + p[1]), t2 = table_at(tables + p[2]);
#pragma GCC unroll 8
        for (int q = 0; q < P; ++q) {
          const V32 sum = look_up(t0, index[0][q]) + look_up(t1, index[1][q]) + look_up(t2, index[2][q]);
          acc[2 * m][q] += low_half(sum);
          acc[2 * m + 1][q] += high_half(sum);
          pin(acc[2 * m][q]);
          pin(acc[2 * m + 1][q]);
        }
      }
    };
    int64_t i = c0;
    for (; i + 3 <= c1; i += 3, at += 96, place += 6) {
      V32 index[3][P];
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) {
        const V32 v0 = load32(at + q * panel), v1 = load32(at + q * panel + 32);
        index[0][q] = low_half(v0), index[1][q] = high_half(v0), index[2][q] = low_half(v1);
      }
      add(index, 0);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) {
        const V32 v1 = load32(at + q * panel + 32), v2 = load32(at + q * panel + 64);
        index[0][q] = high_half(v1), index[1][q] = low_half(v2), index[2][q] = high_half(v2);
      }
      add(index, 3);
    }
    if (i < c1) {  // one or two bytes more; what is missing looks up entry 0 of table 0, which is 0
      V32 index[3][P];
      const bool two = i + 2 == c1;
      for (int q = 0; q < P; ++q) {
        const V32 v0 = load32(at + q * panel), v1 = two ? load32(at + q * panel + 32) : V32{};
        index[0][q] = low_half(v0), index[1][q] = high_half(v0), index[2][q] = low_half(v1);
      }
      add(index, 0);
      for (int q = 0; q < P; ++q) {
        index[0][q] = two ? high_half(load32(at + q * panel + 32)) : V32{};
        index[1][q] = index[2][q] = V32{};
      }
      add(index, 3);
    }
  });
  for (int m = 0; m < columns; ++m) store_dots<P>(total[m], k, dots + m * kUnit);
}

// P panels of 32 rows x one column, whose partner would be work for nothing.
template <int P>
void multiply_one(const uint8_t* w, int64_t panel, const uint8_t* x, int64_t bytes, int32_t k, int32_t* dots) {
  U32 total[2][P][4] = {};  // of even and of odd bytes, to shorten the chains of additions
  sum_chunks<2, P>(bytes, total, [&](int64_t c0, int64_t c1, V32(&acc)[2][P]) __attribute__((always_inline)) {
    const uint8_t* at = w + c0 * 32;
    for (int64_t i = c0; i < c1; ++i, at += 32) {
      const V32 low = table_at(kSingles.byte[x[i] & 15]), high = table_at(kSingles.byte[x[i] >> 4]);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) {
        const V32 v = load32(at + q * panel);
        acc[0][q] += look_up(low, low_half(v));
        acc[1][q] += look_up(high, high_half(v));
      }
    }
  });
  for (int q = 0; q < P; ++q)
    for (int i = 0; i < 4; ++i) total[0][q][i] += total[1][q][i];
  store_dots<P>(total[0], k, dots);
}

template <int M>
SLIM_INLINE void multiply_unit(const Params& p, const uint8_t* w, int panels, const uint16_t* x, int columns,
                               int32_t* dots) {
  const int64_t bytes = p.plan.header->depth, panel = bytes * 32;
  if (panels == 2) return multiply<2, M>(w, panel, x, bytes, length(p), columns, dots);
  multiply<1, M>(w, panel, x, bytes, length(p), columns, dots);
}

// What a task keeps of its columns: where their tables lie, by pairs.
int64_t prepared_bytes(const Params& p) { return kBlock / 2 * padded(column_bytes(p)) * 4; }
void prepare(const Params& p, const Columns& c, int64_t count, uint8_t* out) {
  if (count == 1) return;
  const int64_t bytes = p.plan.header->depth;
  for (int64_t j = 0; j < count; j += 2) {
    const uint8_t* a = c.bits + j * c.stride;
    places(a, j + 1 < count ? a + c.stride : a, bytes, reinterpret_cast<uint16_t*>(out) + j * padded(bytes));
  }
}
void multiply_block(const Params& p, const uint8_t* w, int64_t rows, const Columns& c, const uint8_t* prepared,
                    int64_t count, int32_t* dots) {
  const int64_t bytes = p.plan.header->depth, pitch = padded(bytes);
  const int panels = int(ceil_div(rows, 32));
  const uint16_t* x = reinterpret_cast<const uint16_t*>(prepared);
  if (count == 1) {
    if (panels == 2) return multiply_one<2>(w, bytes * 32, c.bits, bytes, length(p), dots);
    return multiply_one<1>(w, bytes * 32, c.bits, bytes, length(p), dots);
  }
  int64_t j = 0;
  for (; j + 6 <= count; j += 6) multiply_unit<3>(p, w, panels, x + j * pitch, 6, dots + j * kUnit);
  const int left = int(count - j);
  if (left > 4)
    multiply_unit<3>(p, w, panels, x + j * pitch, left, dots + j * kUnit);
  else if (left > 2)
    multiply_unit<2>(p, w, panels, x + j * pitch, left, dots + j * kUnit);
  else if (left > 0)
    multiply_unit<1>(p, w, panels, x + j * pitch, left, dots + j * kUnit);
}

#else  // words

constexpr int W = SLIM_VECTOR_BYTES / 8;  // 64-bit lanes
using Word = Vec<uint64_t, W>;

SLIM_INLINE Word popcount(Word v) {
#if defined(__AVX512VPOPCNTDQ__) && SLIM_VECTOR_BYTES == 64
  typedef long long V8 __attribute__((vector_size(64)));
#if defined(__clang__)
  return Word(__builtin_elementwise_popcount(V8(v)));
#else
  return Word(__builtin_ia32_vpopcountq_v8di(V8(v)));
#endif
#else
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  v += v >> 8;
  v += v >> 16;
  return (v + (v >> 32)) & 0x7f;
#endif
}

// P panels of 8 rows x M columns.
template <int P, int M>
void multiply(const uint8_t* w, int64_t panel, const uint8_t* x, int64_t stride, int64_t words, int32_t k,
              int32_t* dots) {
  constexpr int N = P * 8 / W;  // vectors
  Word acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) acc[m][v] = Word{};
  for (int64_t i = 0; i < words; ++i, w += 64, x += 8) {
    Word a[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) a[v] = load<Word>(w + v * W / 8 * panel + v * W % 8 * 8);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      uint64_t word;
      __builtin_memcpy(&word, x + m * stride, 8);
      const Word b = word - Word{};
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) acc[m][v] += popcount(a[v] ^ b);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v)
      for (int i = 0; i < W; ++i) dots[m * kUnit + v * W + i] = k - 2 * int32_t(acc[m][v][i]);
}

template <int M>
SLIM_INLINE void multiply_unit(const Params& p, const uint8_t* w, int panels, const Columns& c, int64_t j,
                               int32_t* dots) {
  const int64_t words = p.plan.header->depth, panel = words * 64;
  const uint8_t* x = c.bits + j * c.stride;
  const int32_t k = length(p);
  dots += j * kUnit;
  for (; panels >= 4; panels -= 4, w += 4 * panel, dots += 32) multiply<4, M>(w, panel, x, c.stride, words, k, dots);
  for (; panels > 0; --panels, w += panel, dots += 8) multiply<1, M>(w, panel, x, c.stride, words, k, dots);
}

int64_t prepared_bytes(const Params&) { return 0; }
void prepare(const Params&, const Columns&, int64_t, uint8_t*) {}
void multiply_block(const Params& p, const uint8_t* w, int64_t rows, const Columns& c, const uint8_t*, int64_t count,
                    int32_t* dots) {
  constexpr int M = SLIM_VECTOR_BYTES == 64 ? 6 : 1;
  const int panels = int(ceil_div(rows, 8));
  int64_t j = 0;
  for (; j + M <= count; j += M) multiply_unit<M>(p, w, panels, c, j, dots);
  if constexpr (M == 6) {
    if (j + 3 <= count) multiply_unit<3>(p, w, panels, c, j, dots), j += 3;
    if (j + 2 <= count) multiply_unit<2>(p, w, panels, c, j, dots), j += 2;
  }
  for (; j < count; ++j) multiply_unit<1>(p, w, panels, c, j, dots);
}

#endif

// Columns that miss taps at the image's edge: what their zero bits added is taken out.
void correct(const Params& p, int64_t row, int64_t rows, int64_t count, const Inside* which, int32_t* dots) {
  const int64_t kh = p.plan.header->kernel_h, kw = p.plan.header->kernel_w;
  const auto sums = [&](int64_t r, int64_t s) { return p.plan.border + (r * (kw + 1) + s) * p.a.n + row; };
  const int32_t* all = sums(kh, kw);
  for (int64_t j = 0; j < count; ++j) {
    const Inside& in = which[j];
    if (in.r0 == 0 && in.s0 == 0 && in.r1 == kh && in.s1 == kw) continue;
    const int32_t *a = sums(in.r0, in.s0), *b = sums(in.r0, in.s1), *c = sums(in.r1, in.s0), *d = sums(in.r1, in.s1);
    int32_t* dot = dots + j * kUnit;
    for (int64_t i = 0; i < rows; ++i) dot[i] += d[i] - c[i] - b[i] + a[i] - all[i];
  }
}

// ---- from dot products to the output ---------------------------------------------------------------------------------

template <class T>
SLIM_INLINE T scaled(int32_t dot, T scale, T bias) {
  return T(dot) * scale + bias;
}

// Scales and biases of a unit, zero beyond its rows.
template <class T>
struct Affine {
  T scale[kUnit], bias[kUnit];
};
template <class IO, class T>
SLIM_INLINE void load_affine(const Params& p, int64_t row, int64_t rows, Affine<T>* out) {
  for (int64_t i = 0; i < kUnit; ++i) {
    out->scale[i] = i < rows ? to_compute(static_cast<const IO*>(p.scale)[row + i]) : T(0);
    out->bias[i] = i < rows && p.a.bias ? to_compute(static_cast<const IO*>(p.a.bias)[row + i]) : T(0);
  }
}

template <class IO>
void write_rows(const Params& p, int64_t row, int64_t rows, int64_t first, int64_t count, const int32_t* dots,
                int64_t pitch) {
  using T = typename ComputeOf<IO>::type;
  Affine<T> f;
  load_affine<IO>(p, row, rows, &f);
  IO* y = static_cast<IO*>(p.a.y) + first * p.a.n + row;
  const bool relu = p.a.relu;
  for (int64_t j = 0; j < count; ++j, y += p.a.n, dots += pitch)
    for (int64_t i = 0; i < rows; ++i) {
      const T v = scaled(dots[i], f.scale[i], f.bias[i]);
      from_compute(relu && v < 0 ? T(0) : v, y + i);
    }
}

template <class IO>
void write_pixels(const Params& p, int64_t row, int64_t rows, int64_t first, int64_t count, const int32_t* dots) {
  using T = typename ComputeOf<IO>::type;
  using V = Vec<T, 4>;
  Affine<T> f;
  load_affine<IO>(p, row, rows, &f);
  const int64_t plane = p.a.geometry.out_h * p.a.geometry.out_w;
  for (int64_t j = 0; j < count;) {
    const int64_t image = (first + j) / plane, pixel = (first + j) % plane;
    const int64_t end = min_of(count, j + plane - pixel);
    IO* y = static_cast<IO*>(p.a.y) + (image * p.a.n + row) * plane + pixel - j;
    for (int64_t i = 0; i < rows; i += 4) {
      const V scale = load<V>(f.scale + i), bias = load<V>(f.bias + i), zero{};
      const int64_t in = min_of<int64_t>(4, rows - i);
      for (int64_t q = j; q < end; q += 4) {
        V r[4];
        const int64_t columns = min_of<int64_t>(4, end - q);
        for (int64_t c = 0; c < 4; ++c) {
          const int32_t* dot = dots + (q + min_of(c, columns - 1)) * kUnit + i;
          r[c] = __builtin_convertvector(*reinterpret_cast<const Vec<int32_t, 4>*>(dot), V) * scale + bias;
          if (p.a.relu) r[c] = r[c] < zero ? zero : r[c];  // NaN stays
        }
        transpose4<T>(r);
        if (columns == 4)
          for (int64_t n = 0; n < in; ++n) store4<T>(y + (i + n) * plane + q, r[n]);
        else
          for (int64_t n = 0; n < in; ++n)
            for (int64_t c = 0; c < columns; ++c) from_compute(r[n][c], y + (i + n) * plane + q + c);
      }
    }
    j = end;
  }
}

void write_bits(const Params& p, int64_t row, int64_t rows, int64_t first, int64_t count, const int32_t* dots) {
  int32_t sign[kUnit], least[kUnit];  // dot <= t is -dot >= -t; a threshold is never INT32_MIN where it is negated
  for (int64_t i = 0; i < rows; ++i) {
    sign[i] = p.rising[row + i] ? 1 : -1;
    least[i] = p.rising[row + i] ? p.thresholds[row + i] : -p.thresholds[row + i];
  }
  const int64_t shift = row & 7;
  for (int64_t j = 0; j < count; ++j, dots += kUnit) {
    uint64_t word = 0;
    for (int64_t i = 0; i < rows; ++i) word |= uint64_t(dots[i] * sign[i] >= least[i]) << i;
    uint8_t* out = p.out_bits + (first + j) * p.out_stride + (row >> 3);
    for (int64_t b = 0; b * 8 < rows + shift; ++b) out[b] |= uint8_t(b == 0 ? word << shift : word >> (8 * b - shift));
  }
}

// ---- tasks -----------------------------------------------------------------------------------------------------------

int64_t group_count(const Params& p) { return ceil_div(columns_of(p.a), kBlock); }

// Workspace: dots [kBlock, kUnit] | inside [kBlock] | columns [kBlock, stride] (convolutions) | prepared
SLIM_INLINE int64_t lowered_bytes(const Params& p) { return p.a.conv ? align64(kBlock * (column_bytes(p) + 8)) : 0; }
constexpr int64_t kDotBytes = kBlock * kUnit * 4, kInsideBytes = kBlock * int64_t(sizeof(Inside));
int64_t workspace_bytes(const Params& p) {
  return kDotBytes + kInsideBytes + lowered_bytes(p) + align64(prepared_bytes(p)) + 64;
}

void forward(const Params& p, int64_t task, void* workspace) {
  int32_t* dots = static_cast<int32_t*>(workspace);
  uint8_t* ws = static_cast<uint8_t*>(workspace) + kDotBytes;
  Inside* which = reinterpret_cast<Inside*>(ws);
  uint8_t* buffer = ws + kInsideBytes;
  uint8_t* prepared = buffer + lowered_bytes(p);

  const int64_t first = task / p.ranges * kBlock, count = min_of(kBlock, columns_of(p.a) - first);
  const int64_t range = task % p.ranges, per_group = units_per_group(p), group_rows = rows_per_group(p);
  const int64_t units = p.plan.header->groups * per_group;
  const int64_t unit0 = units * range / p.ranges, unit1 = units * (range + 1) / p.ranges;
  const int64_t panel = p.plan.header->depth * kSigns.lanes * (kSigns.word_bits / 8);
  Columns columns{};
  for (int64_t unit = unit0; unit < unit1; ++unit) {
    const int64_t group = unit / per_group, inner = unit % per_group * kUnit;
    if (unit == unit0 || inner == 0) {
      columns = lower(p, group, first, count, buffer, which);
      prepare(p, columns, count, prepared);
    }
    const int64_t row = group * group_rows + inner, rows = min_of(kUnit, group_rows - inner);
    const uint8_t* w = p.plan.weights + (group * p.plan.header->panels + inner / kSigns.lanes) * panel;
    if (p.plan.header->depth > 0)
      multiply_block(p, w, rows, columns, prepared, count, dots);
    else
      __builtin_memset(dots, 0, size_t(kDotBytes));
    if (p.a.conv) correct(p, row, rows, count, which, dots);
    if (p.thresholds)
      write_bits(p, row, rows, first, count, dots);
    else
      with_dtype(p.a.dtype, [&](auto io) {
        if (p.a.conv)
          write_pixels<decltype(io)>(p, row, rows, first, count, dots);
        else
          write_rows<decltype(io)>(p, row, rows, first, count, dots, kUnit);
      });
  }
}

void scale(const Params& p, const int32_t* dots) {
  with_dtype(p.a.dtype, [&](auto io) {
    for (int64_t row = 0; row < p.a.n; row += kUnit)
      write_rows<decltype(io)>(p, row, min_of(kUnit, p.a.n - row), 0, p.a.m, dots + row, p.a.n);
  });
}

}  // namespace bin
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
