// SPDX-License-Identifier: Apache-2.0
// The intrinsics: all that a kernel may use of CUDA beyond plain C++, threadIdx, blockIdx, blockDim and gridDim. nvcc
// maps each to one instruction; a host compiler takes tests/cuda_host/cuda_host.h instead, which runs every thread as a
// fiber and checks what hardware leaves to luck (bounds, alignment, races, divergence). A kernel that needs another
// instruction adds it in both places, and to the golden tests (tests/cuda/test_intrinsics.py).
//
// Fragments of a warp, as PTX defines them (lane = 4 * g + t, g = 0 … 7, t = 0 … 3; two 16-bit values to a register,
// the lower index in the lower half):
//
//   m16n8k16, 16 bit   A [16, 16] row-major   a0: (g, 2t) a1: (g + 8, 2t) a2: (g, 2t + 8) a3: (g + 8, 2t + 8), and k + 1
//                      B [16, 8]              b0: (k = 2t, n = g) b1: (k = 2t + 8, n = g), and k + 1
//   m16n8k8, tf32      A [16, 8]              a0: (g, t) a1: (g + 8, t) a2: (g, t + 4) a3: (g + 8, t + 4)
//                      B [8, 8]               b0: (k = t, n = g) b1: (k = t + 4, n = g)
//   m16n8k256, 1 bit   A [16, 256]            a0: (g, bits 32t …) a1: (g + 8, 32t …) a2: (g, 32t + 128 …) a3: (g + 8, …)
//                      B [256, 8]             b0: (bits 32t …, n = g) b1: (bits 32t + 128 …, n = g)
//   all                D [16, 8]              d0: (g, 2t) d1: (g, 2t + 1) d2: (g + 8, 2t) d3: (g + 8, 2t + 1)
//
//   ldmatrix           lane i gives the address of row i & 7 of matrix i >> 3 (8 rows of 16 bytes, 16-byte aligned);
//                      register j of lane 4g + t gets elements 2t, 2t + 1 of row g of matrix j; with trans, elements
//                      (2t, g) and (2t + 1, g).
//
// All warp-wide calls need the 32 lanes of the warp, at one place. Shared memory is written in units of two bytes or more.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace slim::cuda {

constexpr int kWarp = 32;

// 16-bit numbers as they lie in memory.
struct alignas(2) Half {
  uint16_t bits;
};
struct alignas(2) BFloat16 {
  uint16_t bits;
};

#ifdef __CUDACC__

// ---- numbers ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float to_float(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}

// Two numbers rounded into one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Rounded to the 10 stored bits of tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
}

__device__ __forceinline__ float as_float(uint32_t v) { return __uint_as_float(v); }
__device__ __forceinline__ uint32_t as_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ int popcount(uint32_t v) { return __popc(v); }
__device__ __forceinline__ int popcount(uint64_t v) { return __popcll(v); }
__device__ __forceinline__ int leading_zeros(uint32_t v) { return __clz(v); }
__device__ __forceinline__ int first_bit(uint32_t v) { return __ffs(v) - 1; }  // -1 for 0
// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes high:low.
__device__ __forceinline__ uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
// The upper or lower word of (high:low) shifted by `shift` & 31.
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// ---- memory ----------------------------------------------------------------------------------------------------------

// The block's shared memory, as much as the launch asked for, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char slim_dynamic_shared[];
  return slim_dynamic_shared;
}

// From global memory that nothing writes while the kernel runs. T: 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <class T>
__device__ __forceinline__ T load_constant(const T* p) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "a register");
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<const T*>(&v);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    return *reinterpret_cast<const T*>(&v);
  } else if constexpr (sizeof(T) == 4) {
    const unsigned v = __ldg(reinterpret_cast<const unsigned*>(p));
    return *reinterpret_cast<const T*>(&v);
  } else if constexpr (sizeof(T) == 2) {
    const unsigned short v = __ldg(reinterpret_cast<const unsigned short*>(p));
    return *reinterpret_cast<const T*>(&v);
  } else {
    const unsigned char v = __ldg(reinterpret_cast<const unsigned char*>(p));
    return *reinterpret_cast<const T*>(&v);
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes (4, 8 or 16, both sides aligned to them) from global to shared memory in the background; of the source
// only `valid` bytes are read, the rest becomes 0. 16 bytes pass by the first-level cache.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
}
// This thread's copies since the last commit become a group; wait until at most kPending of its groups are unfinished.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ unsigned atomic_add(unsigned* p, unsigned v) { return atomicAdd(p, v); }
__device__ __forceinline__ int atomic_add(int* p, int v) { return atomicAdd(p, v); }
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// ---- threads ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Barrier `id` (1 … 15) of `threads` threads, whole warps.
__device__ __forceinline__ void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// T: 4 bytes.
template <class T>
__device__ __forceinline__ T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int by) {
  return __shfl_up_sync(0xffffffffu, v, by);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int by) {
  return __shfl_down_sync(0xffffffffu, v, by);
}
__device__ __forceinline__ uint32_t warp_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

// ---- matrices --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrix(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += A B; T: Half or BFloat16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += number of common ones. Hopper has the AND form alone; XOR is made up of two there.
__device__ __forceinline__ void mma_m16n8k256_and(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // __CUDACC__

}  // namespace slim::cuda

#ifndef __CUDACC__
#include "cuda_host_intrinsics.h"
#endif
