// SPDX-License-Identifier: Apache-2.0
// From a bit stream of indices to table entries in registers, 32 at a time.
//
// A look-up holds one table and turns the next 32 indices (4 * bits bytes of the stream) into 32 / kLanes vectors. Which
// instructions are best depends on bits and instruction set:
//
//   AVX2     1, 2 bits  vpermilps: 4 entries in each half of the register
//            3 bits     vpermps: 8 entries
//            4 bits     vpshufb: 16 entries, one byte of each at a time; the bytes are unpacked to floats
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

// Any number of bits, any type: a load per entry.
template <class T>
struct LookupAny {
  using V = typename Simd<T>::V;
  static constexpr int L = Simd<T>::kLanes;
  static constexpr Order kOrder = Order::natural;
  const T* table;
  int bits;
  uint32_t mask;

  LookupAny(const T* values, int b) : table(values), bits(b), mask((1u << b) - 1) {}

  SLIM_INLINE T entry(uint64_t& word) const {
    const T value = table[word & mask];
    word >>= bits;
    return value;
  }
  SLIM_INLINE Vec<T, 4> entries4(uint64_t& word) const {
    const T a = entry(word), b = entry(word), c = entry(word), d = entry(word);
    return Vec<T, 4>{a, b, c, d};
  }
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    Vec<T, 4> part[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint64_t word = load64(stream + i * bits);
      part[2 * i] = entries4(word);
      part[2 * i + 1] = entries4(word);
    }
    __builtin_memcpy(out, part, sizeof(part));
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

  LookupSmall(const float* values, int) {
    table = load<V>(values);
    if constexpr (kBits <= 2)
      for (int i = 0; i < 8; ++i) table[i] = values[i & 3];
  }
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

// 4 bits. Of the 16 entries, plane p holds byte p of each; a vpshufb per plane serves 32 indices.
struct Planes {
  Bytes plane[4];

  explicit Planes(const float* values) {
    using B = Vec<uint8_t, 16>;
    Vec<uint32_t, 4> part[4];
    for (int i = 0; i < 4; ++i) {
      const B v = load<B>(reinterpret_cast<const uint8_t*>(values + 4 * i));
      part[i] = Vec<uint32_t, 4>(
          __builtin_shuffle(v, B{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}));
    }
    transpose4<uint32_t>(part);
    for (int i = 0; i < 4; ++i) plane[i] = both_halves(B(part[i]));
  }
  SLIM_INLINE void floats(Bytes index, Vec<float, 8>* out) const {
    const Bytes a = shuffle_bytes(plane[0], index), b = shuffle_bytes(plane[1], index);
    const Bytes c = shuffle_bytes(plane[2], index), d = shuffle_bytes(plane[3], index);
    const Bytes low = unpack_low(a, b), high = unpack_low(c, d);
    const Bytes low2 = unpack_high(a, b), high2 = unpack_high(c, d);
    out[0] = unpack_low_words(low, high);
    out[1] = unpack_high_words(low, high);
    out[2] = unpack_low_words(low2, high2);
    out[3] = unpack_high_words(low2, high2);
  }
};

// 32 indices as bytes, even ones in the lower half, odd ones in the upper.
SLIM_INLINE Bytes even_odd(const uint8_t* stream) {
  using U = Vec<uint32_t, 8>;
  const U word = U(both_halves(load<Vec<uint8_t, 16>>(stream))) >> U{0, 0, 0, 0, 4, 4, 4, 4};
  return Bytes(word & 0x0f0f0f0fu);
}

struct LookupFour : Planes {
  using V = Vec<float, 8>;
  static constexpr Order kOrder = Order::eights;
  LookupFour(const float* values, int) : Planes(values) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const { floats(even_odd(stream), out); }
};

// Two instructions more, to have them in order.
struct LookupFourInOrder : Planes {
  using V = Vec<float, 8>;
  static constexpr Order kOrder = Order::natural;
  LookupFourInOrder(const float* values, int) : Planes(values) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    using U = Vec<uint16_t, 16>;
    const U twice = U(shuffle_bytes(both_halves(load<Vec<uint8_t, 16>>(stream)),
                                    Bytes{0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                          2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15}));
    floats(Bytes((twice & 0x000f) | (twice >> 4 & 0x0f00)), out);
  }
};

// Entries that are bfloat16: two planes, and a float is one of them shifted up.
struct LookupFourShort {
  using V = Vec<float, 8>;
  static constexpr Order kOrder = Order::sixteens;
  Bytes low, high;
  LookupFourShort(const float* values, int) {
    const Planes planes(values);
    low = planes.plane[2];
    high = planes.plane[3];
  }
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    using U = Vec<uint32_t, 8>;
    const Bytes index = even_odd(stream);
    const Bytes a = shuffle_bytes(low, index), b = shuffle_bytes(high, index);
    const U first = U(unpack_low(a, b)), second = U(unpack_high(a, b));
    out[0] = V(first << 16);
    out[1] = V(first & 0xffff0000u);
    out[2] = V(second << 16);
    out[3] = V(second & 0xffff0000u);
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

  LookupSmall(const float* values, int) : table(load<V>(values)) {}
  SLIM_INLINE void step(const uint8_t* stream, V* out) const {
    constexpr uint32_t b = kBits;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint8_t* p = stream + 2 * i * kBits;
      const U first = broadcast<U>(load32(p)), second = broadcast<U>(load32(p + kBits));
      const U word = Vec<int32_t, 16>{0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1} ? second : first;
      const U index = word >> U{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b,
                                0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b};
      out[i] = __builtin_shuffle(table, Vec<int32_t, 16>(index));
    }
  }
};

// 5 bits: 32 entries in two registers; eight indices are 40 bits.
struct LookupFive {
  using V = Vec<float, 16>;
  static constexpr Order kOrder = Order::natural;
  V low, high;

  LookupFive(const float* values, int) : low(load<V>(values)), high(load<V>(values + 16)) {}
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
        if constexpr (!kOwnOrder)
          return f((LookupFourInOrder*)0);
        else if constexpr (kShort)
          return f((LookupFourShort*)0);
        else
          return f((LookupFour*)0);
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
  f((LookupAny<T>*)0);
}

}  // namespace cb
}  // namespace
}  // namespace slim::cpu::SLIM_ISA
