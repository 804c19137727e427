// SPDX-License-Identifier: Apache-2.0
// Vectors for kernels that are compiled once per instruction set.
//
// Included only by kernel files, after they define SLIM_ISA (a namespace) and SLIM_VECTOR_BYTES (16, 32 or 64).
// Everything lives in SLIM_ISA's anonymous namespace and nothing of the standard library's templates is used: an inline
// function shared with a file of other flags could otherwise be resolved, by the linker, to code the CPU cannot run.
// GCC's vector types give plain AVX code under the flags of the file, and correct (slower) code under any others, which
// is how the AVX-512 kernels run in tests on machines without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(SLIM_ISA) || !defined(SLIM_VECTOR_BYTES)
#error "define SLIM_ISA and SLIM_VECTOR_BYTES before including kernels"
#endif

namespace slim::cpu::SLIM_ISA {
namespace {

#define SLIM_INLINE inline __attribute__((always_inline))

template <class T, int N>
struct VecType {
  // Aligned as its element: loads and stores may be anywhere.
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Vec = typename VecType<T, N>::type;

// Shape of the register tile for an element type: kLanes per vector, kVectors vectors make a panel of kPanel columns.
// 16 registers: one row of 8 vectors uses 8 accumulators, just enough to hide 4 cycles at 2 FMA a cycle.
// 32 registers of 64 bytes: 4 vectors make the same 64 columns, and two rows are in flight.
// float64 is there to check gradients with: small panels, which compile fast, are enough.
template <class T>
struct Simd {
  static constexpr int kLanes = SLIM_VECTOR_BYTES / int(sizeof(T));
  static constexpr int kVectors = sizeof(T) == 8 ? 2 : SLIM_VECTOR_BYTES == 64 ? 4 : 8;
  static constexpr int kPanel = kLanes * kVectors;
  static constexpr bool kPairRows = SLIM_VECTOR_BYTES == 64;
  using V = Vec<T, kLanes>;
};

template <class V, class T>
SLIM_INLINE V load(const T* p) {
  return *reinterpret_cast<const V*>(p);
}

template <class V, class T>
SLIM_INLINE void store(T* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}

template <class V, class T>
SLIM_INLINE V broadcast(T x) {
  return x - V{};  // x - 0 keeps -0, NaN and Inf; compiles to a broadcast
}

// bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

SLIM_INLINE float to_compute(float x) { return x; }
SLIM_INLINE double to_compute(double x) { return x; }
SLIM_INLINE float to_compute(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &wide, 4);
  return out;
}

SLIM_INLINE void from_compute(float x, float* out) { *out = x; }
SLIM_INLINE void from_compute(double x, double* out) { *out = x; }
SLIM_INLINE void from_compute(float x, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;                      // nearest, ties to even
  out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded);  // NaN stays NaN
}

// The type that sums are kept in, for a type in memory.
template <class IO>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class T>
SLIM_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
SLIM_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
SLIM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class P>
struct RemovePointer;
template <class T>
struct RemovePointer<T*> {
  using type = T;
};
template <class P>
using Pointee = typename RemovePointer<P>::type;

// Sum of all lanes, in a fixed order.
template <class T, int N>
SLIM_INLINE T sum_lanes(Vec<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<T, N / 2>(low + high);
  }
}

}  // namespace
}  // namespace slim::cpu::SLIM_ISA
