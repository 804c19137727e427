// SPDX-License-Identifier: Apache-2.0
// The host's side of csrc/cuda/common/device.cuh, which includes it and says what each of these means.
#pragma once

#include <cstring>

#include "cuda_host.h"

namespace slim::cuda {

// ---- numbers ---------------------------------------------------------------------------------------------------------

template <class To, class From>
inline To bit_cast_to(const From& v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

inline float as_float(uint32_t v) { return bit_cast_to<float>(v); }
inline uint32_t as_bits(float v) { return bit_cast_to<uint32_t>(v); }

inline float to_float(float v) { return v; }
inline float to_float(Half v) { return float(bit_cast_to<_Float16>(v.bits)); }
inline float to_float(BFloat16 v) { return as_float(uint32_t(v.bits) << 16); }

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline Half from_float<Half>(float v) {
  if (v != v) return {0x7fff};
  return {bit_cast_to<uint16_t>(_Float16(v))};
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  if (v != v) return {0x7fff};
  const uint32_t bits = as_bits(v);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
inline uint32_t pack2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

inline uint32_t to_tf32(float v) {
  if (v != v) return 0x7fffffff;
  const uint32_t bits = as_bits(v);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline int popcount(uint32_t v) { return __builtin_popcount(v); }
inline int popcount(uint64_t v) { return __builtin_popcountll(v); }
inline int leading_zeros(uint32_t v) { return v ? __builtin_clz(v) : 32; }
inline int first_bit(uint32_t v) { return __builtin_ffs(int(v)) - 1; }
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i);
    uint32_t byte = uint32_t(both >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicated sign
    out |= byte << (8 * i);
  }
  return out;
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}

// ---- memory ----------------------------------------------------------------------------------------------------------

inline unsigned char* dynamic_shared() { return host::shared(); }

template <class T>
inline T load_constant(const T* p, SLIM_PLACE) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "a register");
  host::check_read(p, sizeof(T), {file, line});
  T out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

template <int kBytes>
inline void copy_async(void* shared, const void* global, int valid = kBytes, SLIM_PLACE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
  host::copy_async(shared, global, kBytes, valid, {file, line});
}
inline void copy_commit() { host::copy_commit(); }
template <int kPending>
inline void copy_wait() {
  host::copy_wait(kPending);
}

inline unsigned atomic_add(unsigned* p, unsigned v) { return host::atomic_add(p, v); }
inline int atomic_add(int* p, int v) { return int(host::atomic_add(reinterpret_cast<unsigned*>(p), unsigned(v))); }
inline void thread_fence() {}

// ---- threads ---------------------------------------------------------------------------------------------------------

inline void sync_threads(SLIM_PLACE) { host::block_barrier({file, line}); }
inline void sync_warp(SLIM_PLACE) { host::warp_barrier({file, line}); }
inline void sync_some(int id, int threads, SLIM_PLACE) { host::some_barrier(id, threads, {file, line}); }

template <class T>
inline T shuffle_from(T v, int lane, const host::Place& place) {
  host::Shuffle s{bit_cast_to<uint32_t>(v), lane, 0};
  host::warp_call(host::all_shuffle, &s, place);
  return bit_cast_to<T>(s.out);
}
template <class T>
inline T shuffle(T v, int lane, SLIM_PLACE) {
  return shuffle_from(v, lane & 31, {file, line});
}
template <class T>
inline T shuffle_xor(T v, int mask, SLIM_PLACE) {
  return shuffle_from(v, (host::lane_id() ^ mask) & 31, {file, line});
}
template <class T>
inline T shuffle_up(T v, int by, SLIM_PLACE) {
  const int from = host::lane_id() - by;
  return shuffle_from(v, from < 0 ? host::lane_id() : from, {file, line});
}
template <class T>
inline T shuffle_down(T v, int by, SLIM_PLACE) {
  const int from = host::lane_id() + by;
  return shuffle_from(v, from > 31 ? host::lane_id() : from, {file, line});
}
inline uint32_t warp_ballot(bool v, SLIM_PLACE) {
  host::Ballot b{v, 0};
  host::warp_call(host::all_ballot, &b, {file, line});
  return b.out;
}

// ---- matrices --------------------------------------------------------------------------------------------------------

template <int N>
inline void load_matrix(uint32_t (&r)[N], const void* row, SLIM_PLACE) {
  static_assert(N == 1 || N == 2 || N == 4, "what ldmatrix loads");
  host::LoadMatrix l{row, r, N, false};
  host::warp_call(host::all_load_matrix, &l, {file, line});
}
template <int N>
inline void load_matrix_trans(uint32_t (&r)[N], const void* row, SLIM_PLACE) {
  static_assert(N == 2 || N == 4, "what ldmatrix loads");
  host::LoadMatrix l{row, r, N, true};
  host::warp_call(host::all_load_matrix, &l, {file, line});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SLIM_PLACE);
template <>
inline void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file,
                               int line) {
  host::Mma m{d, a, b};
  host::warp_call(host::all_mma_f16, &m, {file, line});
}
template <>
inline void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file,
                                   int line) {
  host::Mma m{d, a, b};
  host::warp_call(host::all_mma_bf16, &m, {file, line});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SLIM_PLACE) {
  host::Mma m{d, a, b};
  host::warp_call(host::all_mma_tf32, &m, {file, line});
}
inline void mma_m16n8k256_and(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SLIM_PLACE) {
  host::Mma m{d, a, b};
  host::warp_call(host::all_mma_b1, &m, {file, line});
}

}  // namespace slim::cuda
