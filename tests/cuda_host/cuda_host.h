// SPDX-License-Identifier: Apache-2.0
// CUDA kernels without a GPU. A kernel's source, compiled by g++, runs here thread by thread: every CUDA thread is a fiber,
// a warp-wide instruction waits until 32 have come, a barrier until all have. What hardware leaves to luck is an error
// with the kernel's name, block, warp, lane and line:
//
//   - an access outside the memory that the launch was given, or to an address that is not a multiple of its size;
//   - a race in shared memory: two threads, one of them writing, no barrier between (happens-before, by vector clocks of
//     warps), and any access to bytes that a copy_async is still on its way to;
//   - lanes of a warp, or threads at a barrier, that wait at different lines; a barrier that can never be complete.
//
// Accesses are seen because the kernels are compiled with -fsanitize=thread, whose calls emulator.cpp answers.
//
// There are two modes, so that a mistake which checks miss still shows in the result:
//   lazy    copies land at the latest moment (copy_wait), warps take turns
//   eager   copies land at once, a warp runs as far as it can, the last one first
// Shared memory, and outputs before a kernel has run, are full of NaN (all bits set).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace slim::cuda::host {

// Where in the source an instruction stands.
struct Place {
  const char* file;
  int line;
};
// As last parameters: the caller's line. (GCC 12 takes the header's own if these stand inside braces.)
#define SLIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Mode { lazy, eager };
void set_mode(Mode mode);
void set_checks(bool on);  // off: accesses are not looked at, to see what the modes alone bring to light

// ---- what bindings say of a call's memory ----------------------------------------------------------------------------

void clear_memory();
void add_memory(const void* data, int64_t bytes, bool writable);

// ---- what kernels ask for --------------------------------------------------------------------------------------------

unsigned char* shared();
void check_read(const void* p, size_t bytes, const Place& place);  // of global memory, aligned to `bytes`

unsigned atomic_add(unsigned* p, unsigned v);

// Waits until the 32 lanes of the warp are here, each with its `lane` arguments; then `all` runs once, with those of lane
// 0 … 31.
void warp_call(void (*all)(void* const* lanes), void* lane, const Place& place);
void warp_barrier(const Place& place);
void block_barrier(const Place& place);
void some_barrier(int id, int threads, const Place& place);

void copy_async(void* shared, const void* global, int bytes, int valid, const Place& place);
void copy_commit();
void copy_wait(int pending);

void all_load_matrix(void* const* lanes);
void all_mma_f16(void* const* lanes);
void all_mma_bf16(void* const* lanes);
void all_mma_tf32(void* const* lanes);
void all_mma_b1(void* const* lanes);
void all_shuffle(void* const* lanes);
void all_ballot(void* const* lanes);

struct LoadMatrix {
  const void* row;
  uint32_t* out;
  int count;
  bool trans;
};
struct Mma {
  void* d;
  const uint32_t* a;
  const uint32_t* b;
};
struct Shuffle {
  uint32_t value;
  int from;  // lane to take it from
  uint32_t out;
};
struct Ballot {
  bool value;
  uint32_t out;
};
int lane_id();

// ---- launching -------------------------------------------------------------------------------------------------------

const char* run(const char* name, const void* kernel, dim3 grid, dim3 block, int shared_bytes, const void* stack_top,
                void (*body)(const void*), const void* context);

template <class F>
const char* launch(const char* name, const void* kernel, dim3 grid, dim3 block, int shared_bytes, const F& f) {
  return run(name, kernel, grid, block, shared_bytes, &f, [](const void* c) { (*static_cast<const F*>(c))(); }, &f);
}

}  // namespace slim::cuda::host
