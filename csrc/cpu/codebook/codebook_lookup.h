// SPDX-License-Identifier: Apache-2.0
// From a bit stream of indices to table entries in registers, 32 at a time.
//
// A look-up holds one table, arranged by `prepare`, and turns the next 32 indices, 4 * bits bytes of the stream, into
// 32 / kLanes vectors. Which instructions are best depends on bits and instruction set:
//
//   AVX2     1, 2 bits  vpermilps: 4 entries in each half of the register
//            3 bits     vpermps: 8 entries
//            4 bits     vpshufb: 16 entries, one byte of each at a time; the bytes are unpacked to floats
//            5, 6 bits  the same in two or four tables
//   AVX-512  1 … 4 bits vpermps: 16 entries; 5 bits vpermi2ps: 32 entries
//   others              loads from the table, which lies in the first-level cache
//
// Entries may come out in an order of their own: kOrder says in which (see order_of), and the activations are brought
// into that order once per call instead of the entries each time.
#pragma once

#include "cpu/common/columns.h"

namespace slim::cpu::SLIM_ISA {
namespace {
namespace cb {

constexpr int kStep = 32;   // indices of one look-up
constexpr int kSlack = 16;  // bytes after a stream that look-ups may read (and ignore)

SLIM_INLINE uint64_t load64(const uint8_t* p) {
  uint64_t word;
  __builtin_memcpy(&word, p, 8);
  return word;
}
SLIM_INLINE uint32_t load32(const uint8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
SLIM_INLINE uint32_t code_at(const uint8_t* stream, int64_t i, int bits) {
  const int64_t bit = i * bits;
  uint16_t word;
  __builtin_memcpy(&word, stream + (bit >> 3), 2);
  return (uint32_t(word) >> (bit & 7)) & ((1u << bits) - 1);
}

// Position in x of entry i of a look-up's 32.
enum class Order { natural, eights, sixteens };
constexpr int order_of(Order order, int i) {
  // eights: 0 2 4 6 1 3 5 7; sixteens: 0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15, as vpshufb's bytes are unpacked.
  if (order == Order::eights) return (i & ~7) + (i & 3) * 2 + (i >> 2 & 1);
  if (order == Order::sixteens) return (i & ~15) + (i & 3) * 4 + (i >> 2 & 1) + (i >> 3 & 1) * 2;
  return i;
}

// Any type and number of bits (kBits, or any if that is 0): a load per entry.
template <class T, int kBits = 0>
struct LookupLoads {
  using V = typename Simd<T>::V;
  static constexpr int L = Simd<T>::kLanes;
  static constexpr Order kOrder = Order::natural;
  const T* table;
  int given;

  LookupLoads(const T* prepared, int bits) : table(prepared), given(bits) {}
  static constexpr bool kPrepares = false;
  static void prepare(const T*, T*) {}

  SLIM_INLINE T entry(uint64_t& word) const {
    const int bits = kBits ? kBits : given;
    const T value = table[word & ((1u << bits) - 1)];
    word >>= bits;
    return value;
  }
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    const int bits = kBits ? kBits : given;
    if constexpr (L == 16) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        uint64_t w = load64(stream + 2 * i * bits), v = load64(stream + (2 * i + 1) * bits);
        out[i] = V{entry(w), entry(w), entry(w), entry(w), entry(w), entry(w), entry(w), entry(w),
                   entry(v), entry(v), entry(v), entry(v), entry(v), entry(v), entry(v), entry(v)};
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        uint64_t w = load64(stream + i * bits);
#pragma GCC unroll 4
        for (int j = 0; j < 8 / L; ++j) {
          V& to = out[i * (8 / L) + j];
          if constexpr (L == 8) to = V{entry(w), entry(w), entry(w), entry(w), entry(w), entry(w), entry(w), entry(w)};
          if constexpr (L == 4) to = V{entry(w), entry(w), entry(w), entry(w)};
          if constexpr (L == 2) to = V{entry(w), entry(w)};
        }
      }
    }
  }
};

#if SLIM_VECTOR_BYTES == 32 && defined(__AVX2__)
// 1 … 3 bits: eight indices are in one 32-bit word, which every lane shifts by its own amount.
template <int kBits>
struct LookupSmall {
  using V = Vec<float, 8>;
  using U = Vec<uint32_t, 8>;
  static constexpr Order kOrder = Order::natural;
  V table;

  // Tables repeat: with 1 or 2 bits, both halves hold all entries.
  LookupSmall(const float* prepared, int) : table(load<V>(prepared)) {}
  static constexpr bool kPrepares = false;
  static void prepare(const float*, float*) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    constexpr uint32_t b = kBits;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const U index = broadcast<U>(load32(stream + i * kBits)) >> U{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b};
      // Bits above an index are the next ones: tables repeat, so that those do not matter.
      if constexpr (kBits <= 2)
        out[i] = __builtin_ia32_vpermilvarps256(table, Vec<int32_t, 8>(index));
      else
        out[i] = __builtin_shuffle(table, Vec<int32_t, 8>(index));
    }
  }
};

using Bytes = Vec<uint8_t, 32>;
typedef char CharVector __attribute__((vector_size(32)));
typedef long long LongPair __attribute__((vector_size(16)));

SLIM_INLINE Bytes both_halves(Vec<uint8_t, 16> v) { return Bytes(__builtin_ia32_vbroadcastsi256(LongPair(v))); }
SLIM_INLINE Bytes shuffle_bytes(Bytes v, Bytes index) {
  return Bytes(__builtin_ia32_pshufb256(CharVector(v), CharVector(index)));
}
SLIM_INLINE Bytes unpack_low(Bytes a, Bytes b) {
  return Bytes(__builtin_ia32_punpcklbw256(CharVector(a), CharVector(b)));
}
SLIM_INLINE Bytes unpack_high(Bytes a, Bytes b) {
  return Bytes(__builtin_ia32_punpckhbw256(CharVector(a), CharVector(b)));
}
typedef short ShortVector __attribute__((vector_size(32)));
SLIM_INLINE Vec<float, 8> unpack_low_words(Bytes a, Bytes b) {
  return Vec<float, 8>(__builtin_ia32_punpcklwd256(ShortVector(a), ShortVector(b)));
}
SLIM_INLINE Vec<float, 8> unpack_high_words(Bytes a, Bytes b) {
  return Vec<float, 8>(__builtin_ia32_punpckhwd256(ShortVector(a), ShortVector(b)));
}

// Of 16 entries, plane p holds byte p of each: prepared [plane][entry]. A vpshufb per plane serves 32 indices.
SLIM_INLINE void prepare_planes(const float* values, float* out) {
  using B = Vec<uint8_t, 16>;
  Vec<uint32_t, 4> part[4];
  for (int i = 0; i < 4; ++i) {
    const B v = load<B>(reinterpret_cast<const uint8_t*>(values + 4 * i));
    part[i] = Vec<uint32_t, 4>(__builtin_shuffle(v, B{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}));
  }
  transpose4<uint32_t>(part);
  for (int i = 0; i < 4; ++i) store(out + 4 * i, part[i]);
}
SLIM_INLINE Bytes plane_of(const float* prepared, int plane) {
  return both_halves(load<Vec<uint8_t, 16>>(reinterpret_cast<const uint8_t*>(prepared + 4 * plane)));
}

// Four bytes of each of 32 entries, as floats.
SLIM_INLINE void unpack_floats(Bytes a, Bytes b, Bytes c, Bytes d, Vec<float, 8>* out) {
  const Bytes low = unpack_low(a, b), high = unpack_low(c, d);
  const Bytes low2 = unpack_high(a, b), high2 = unpack_high(c, d);
  out[0] = unpack_low_words(low, high);
  out[1] = unpack_high_words(low, high);
  out[2] = unpack_low_words(low2, high2);
  out[3] = unpack_high_words(low2, high2);
}
// The same where the two lower bytes are 0; another order.
SLIM_INLINE void unpack_short(Bytes c, Bytes d, Vec<float, 8>* out) {
  using U = Vec<uint32_t, 8>;
  using V = Vec<float, 8>;
  const U first = U(unpack_low(c, d)), second = U(unpack_high(c, d));
  out[0] = V(first << 16);
  out[1] = V(first & 0xffff0000u);
  out[2] = V(second << 16);
  out[3] = V(second & 0xffff0000u);
}

// 4 bits. In order takes two instructions more; `kShort` two shuffles fewer of every six.
template <bool kOwnOrder, bool kShort>
struct LookupFour {
  using V = Vec<float, 8>;
  static constexpr Order kOrder = !kOwnOrder ? Order::natural : kShort ? Order::sixteens : Order::eights;
  Bytes plane[4];

  LookupFour(const float* prepared, int) {
    for (int i = 0; i < 4; ++i) plane[i] = plane_of(prepared, i);
  }
  static constexpr bool kPrepares = true;
  static void prepare(const float* values, float* out) { prepare_planes(values, out); }

  static SLIM_INLINE Bytes indices(const uint8_t* stream) {
    const Bytes twice = both_halves(load<Vec<uint8_t, 16>>(stream));
    if constexpr (kOwnOrder) {
      // Even ones in the lower half, odd ones in the upper.
      using U = Vec<uint32_t, 8>;
      return Bytes((U(twice) >> U{0, 0, 0, 0, 4, 4, 4, 4}) & 0x0f0f0f0fu);
    } else {
      // Each byte twice, then one of its halves; fours alternate between the halves of the register.
      using U = Vec<uint16_t, 16>;
      const U four = U(shuffle_bytes(twice, Bytes{0, 0, 1, 1, 4, 4, 5, 5, 8,  8,  9,  9,  12, 12, 13, 13,  //
                                                  2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15}));
      return Bytes((four & 0x000f) | (four >> 4 & 0x0f00));
    }
  }
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    const Bytes index = indices(stream);
    const Bytes c = shuffle_bytes(plane[2], index), d = shuffle_bytes(plane[3], index);
    if constexpr (kOwnOrder && kShort)
      unpack_short(c, d, out);
    else
      unpack_floats(shuffle_bytes(plane[0], index), shuffle_bytes(plane[1], index), c, d, out);
  }
};

// 5 and 6 bits: two or four tables of 16. An index of another table gets its top bit set, for which vpshufb gives 0.
template <int kBits>
struct LookupWide {
  using V = Vec<float, 8>;
  static constexpr Order kOrder = Order::natural;
  static constexpr int kTables = 1 << (kBits - 4);
  const float* tables;

  LookupWide(const float* prepared, int) : tables(prepared) {}
  static constexpr bool kPrepares = true;
  static void prepare(const float* values, float* out) {
    for (int t = 0; t < kTables; ++t) prepare_planes(values + 16 * t, out + 16 * t);
  }
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    constexpr uint64_t kMask = 0x0101010101010101u * ((1u << kBits) - 1);
    Vec<uint64_t, 4> bytes;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bytes[i] = __builtin_ia32_pdep_di(load64(stream + i * kBits), kMask);
    typedef int32_t Ints __attribute__((vector_size(32)));
    const Bytes index = Bytes(__builtin_shuffle(Ints(bytes), Ints{0, 2, 4, 6, 1, 3, 5, 7}));
    Bytes byte[4];
#pragma GCC unroll 4
    for (int t = 0; t < kTables; ++t) {
      const Bytes own = Bytes(
          __builtin_ia32_paddusb256(CharVector(index - uint8_t(16 * t)), CharVector(broadcast<Bytes>(uint8_t(0x70)))));
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const Bytes found = shuffle_bytes(plane_of(tables + 16 * t, p), own);
        byte[p] = t ? byte[p] | found : found;
      }
    }
    unpack_floats(byte[0], byte[1], byte[2], byte[3], out);
  }
};
#endif

#if SLIM_VECTOR_BYTES == 64
// 1 … 4 bits: eight indices in a 32-bit word, two words for 16 lanes.
template <int kBits>
struct LookupSmall {
  using V = Vec<float, 16>;
  using U = Vec<uint32_t, 16>;
  static constexpr Order kOrder = Order::natural;
  V table;

  LookupSmall(const float* prepared, int) : table(load<V>(prepared)) {}
  static constexpr bool kPrepares = false;
  static void prepare(const float*, float*) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    constexpr uint32_t b = kBits;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint8_t* p = stream + 2 * i * kBits;
      const U first = broadcast<U>(load32(p)), second = broadcast<U>(load32(p + kBits));
      const U word = Vec<int32_t, 16>{0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1} ? second : first;
      const U index =
          word >> U{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b, 0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b};
      out[i] = __builtin_shuffle(table, Vec<int32_t, 16>(index));
    }
  }
};

// 5 bits: 32 entries in two registers; eight indices are 40 bits.
struct LookupFive {
  using V = Vec<float, 16>;
  static constexpr Order kOrder = Order::natural;
  V low, high;

  LookupFive(const float* prepared, int) : low(load<V>(prepared)), high(load<V>(prepared + 16)) {}
  static constexpr bool kPrepares = false;
  static void prepare(const float*, float*) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    using W = Vec<uint64_t, 8>;
    using I = Vec<int32_t, 8>;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const W shifts = {0, 5, 10, 15, 20, 25, 30, 35};
      const W first = broadcast<W>(load64(stream + 10 * i)) >> shifts;
      const W second = broadcast<W>(load64(stream + 10 * i + 5)) >> shifts;
      const I a = __builtin_convertvector(first, I), b = __builtin_convertvector(second, I);
      Vec<int32_t, 16> index;
      __builtin_memcpy(&index, &a, sizeof(a));
      __builtin_memcpy(reinterpret_cast<char*>(&index) + sizeof(a), &b, sizeof(b));
      out[i] = __builtin_shuffle(low, high, index);
    }
  }
};
#endif

// Calls f with a null pointer of the type of look-up for this many bits. `kOwnOrder`: entries may come in an order of
// their own; `kShort`: entries are exact in bfloat16. Tables have at least 16 entries, repeated where there are fewer.
template <class T, bool kOwnOrder, bool kShort, class F>
SLIM_INLINE void with_lookup(int bits, F f) {
  if constexpr (sizeof(T) == 4) {
#if SLIM_VECTOR_BYTES == 32 && defined(__AVX2__)
    switch (bits) {
      case 1:
        return f((LookupSmall<1>*)0);
      case 2:
        return f((LookupSmall<2>*)0);
      case 3:
        return f((LookupSmall<3>*)0);
      case 4:
        return f((LookupFour<kOwnOrder, kShort>*)0);
      case 5:
        return f((LookupWide<5>*)0);
      case 6:
        return f((LookupWide<6>*)0);
      case 7:
        return f((LookupLoads<float, 7>*)0);
      case 8:
        return f((LookupLoads<float, 8>*)0);
    }
#elif SLIM_VECTOR_BYTES == 64
    switch (bits) {
      case 1:
        return f((LookupSmall<1>*)0);
      case 2:
        return f((LookupSmall<2>*)0);
      case 3:
        return f((LookupSmall<3>*)0);
      case 4:
        return f((LookupSmall<4>*)0);
      case 5:
        return f((LookupFive*)0);
    }
#endif
  }
  (void)bits;
  f((LookupLoads<T>*)0);
}

}  // namespace cb
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
