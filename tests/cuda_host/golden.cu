// SPDX-License-Identifier: Apache-2.0
// One kernel for each intrinsic of cuda/common/device.cuh, for the golden tests (tests/cuda/test_intrinsics.py): what comes
// out is compared with what PTX defines, computed there with numpy. The emulator runs this file as part of
// slimtorch._cuda_host; on a machine with a GPU the test has nvcc build a library of it alone.
//
//   in -> kernel -> out: words of 32 bits. A test reads its input where its operands lie one after the other: operand j
//   of element (or lane) i at in[j * n + i], with n elements, unless it says otherwise.
#include <cstring>
#include <type_traits>

#include "cuda/common/launch.cuh"

namespace slim::cuda::golden {

namespace {

struct Params {
  const uint32_t* in;
  uint32_t* out;
  int n;  // elements
};

template <class Test>
__global__ void __launch_bounds__(96) golden_kernel(const Params p) {
  Test::run(p);
}

// ---- numbers, one element a thread and turn --------------------------------------------------------------------------

template <class F>
__device__ void each(const Params& p, const F& f) {
  for (int i = int(threadIdx.x); i < p.n; i += int(blockDim.x)) f(i);
}

template <class T>
struct ToFloat {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = as_bits(to_float(T{uint16_t(p.in[i])})); });
  }
};
template <>
struct ToFloat<float> {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = as_bits(to_float(as_float(p.in[i]))); });
  }
};
template <class T>
struct FromFloat {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = from_float<T>(as_float(p.in[i])).bits; });
  }
};
template <>
struct FromFloat<float> {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = as_bits(from_float<float>(as_float(p.in[i]))); });
  }
};
template <class T>
struct Pack2 {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = pack2<T>(as_float(p.in[i]), as_float(p.in[p.n + i])); });
  }
};
struct ToTf32 {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = to_tf32(as_float(p.in[i])); });
  }
};
struct AsFloat {  // doubled: exact, and no move of bits could do it
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = as_bits(as_float(p.in[i]) + as_float(p.in[i])); });
  }
};
struct AsBits {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = as_bits(float(int(p.in[i]))); });
  }
};
struct Popcount32 {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = uint32_t(popcount(p.in[i])); });
  }
};
struct Popcount64 {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = uint32_t(popcount(uint64_t(p.in[p.n + i]) << 32 | p.in[i])); });
  }
};
struct LeadingZeros {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = uint32_t(leading_zeros(p.in[i])); });
  }
};
struct FirstBit {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = uint32_t(first_bit(p.in[i])); });
  }
};
struct BytePermute {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = byte_permute(p.in[i], p.in[p.n + i], p.in[2 * p.n + i]); });
  }
};
struct FunnelRight {
  static __device__ void run(const Params& p) {
    each(p, [&](int i) { p.out[i] = funnel_right(p.in[i], p.in[p.n + i], p.in[2 * p.n + i]); });
  }
};

// ---- memory ----------------------------------------------------------------------------------------------------------

// The alignment of shared memory, and what a thread left there for another.
struct DynamicShared {
  static __device__ void run(const Params& p) {
    unsigned char* shared = dynamic_shared();
    auto* words = reinterpret_cast<uint32_t*>(shared);
    const int i = int(threadIdx.x);
    words[i] = p.in[i];
    sync_threads();
    p.out[i] = words[p.n - 1 - i] + uint32_t(reinterpret_cast<uintptr_t>(shared) % 128);
  }
};

template <class T>
struct LoadConstant {  // n: elements of T
  static __device__ void run(const Params& p) {
    each(p, [&](int i) {
      const T value = load_constant(reinterpret_cast<const T*>(p.in) + i);
      if constexpr (sizeof(T) < 4)
        p.out[i] = uint32_t(value);
      else
        reinterpret_cast<T*>(p.out)[i] = value;
    });
  }
};

// Lane i copies element i, of which in[words of all elements + i] bytes are valid, over memory full of ones.
template <int kBytes>
struct CopyAsync {
  static __device__ void run(const Params& p) {
    constexpr int kWords = kBytes / 4;
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int i = int(threadIdx.x);
    for (int w = 0; w < kWords; ++w) words[i * kWords + w] = ~0u;
    sync_threads();
    copy_async<kBytes>(words + i * kWords, p.in + i * kWords, int(p.in[p.n * kWords + i]));
    copy_commit();
    copy_wait<0>();
    sync_threads();
    const int from = p.n - 1 - i;
    for (int w = 0; w < kWords; ++w) p.out[from * kWords + w] = words[from * kWords + w];
  }
};

// Three groups of one copy: after waiting until two may be pending, the first has landed, and so on.
struct CopyGroups {
  static __device__ void run(const Params& p) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int i = int(threadIdx.x);
    for (int group = 0; group < 3; ++group) {
      copy_async<4>(words + group * p.n + i, p.in + group * p.n + i);
      copy_commit();
    }
    copy_wait<2>();
    p.out[i] = words[i];
    copy_wait<1>();
    p.out[p.n + i] = words[p.n + i];
    copy_wait<0>();
    p.out[2 * p.n + i] = words[2 * p.n + i];
  }
};

// All threads add to one word; out[1 …]: what each found there.
template <class T>
struct AtomicAdd {
  static __device__ void run(const Params& p) {
    const int i = int(threadIdx.x);
    if (i == 0) p.out[0] = 0;
    sync_threads();
    p.out[1 + i] = uint32_t(atomic_add(reinterpret_cast<T*>(p.out), T(p.in[i])));
  }
};

// Thread 0 writes, says so after a fence, and the last thread to add to the counter reads: as split sums are put together.
struct ThreadFence {
  static __device__ void run(const Params& p) {
    const int i = int(threadIdx.x);
    if (i == 0) p.out[2 * p.n] = 0;
    sync_threads();
    p.out[p.n + i] = p.in[i];
    thread_fence();
    const unsigned before = atomic_add(p.out + 2 * p.n, 1u);
    if (before + 1 == unsigned(p.n)) {
      thread_fence();
      for (int j = 0; j < p.n; ++j) p.out[j] = p.out[p.n + j];
    }
  }
};

// ---- threads ---------------------------------------------------------------------------------------------------------

struct SyncThreads {  // across warps
  static __device__ void run(const Params& p) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int i = int(threadIdx.x);
    words[i] = p.in[i];
    sync_threads();
    p.out[i] = words[(i + 37) % p.n];
  }
};
struct SyncWarp {
  static __device__ void run(const Params& p) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int i = int(threadIdx.x);
    words[i] = p.in[i];
    sync_warp();
    p.out[i] = words[i ^ 31];
  }
};
struct SyncSome {  // two warps of three at one barrier, the third alone at another
  static __device__ void run(const Params& p) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int i = int(threadIdx.x);
    words[i] = p.in[i];
    if (i < 64)
      sync_some(3, 64);
    else
      sync_some(15, 32);
    p.out[i] = i < 64 ? words[63 - i] : words[159 - i];
  }
};

struct Shuffle {  // from the lane in the second operand
  static __device__ void run(const Params& p) {
    const int lane = int(threadIdx.x);
    p.out[lane] = shuffle(p.in[lane], int(p.in[p.n + lane]));
  }
};
struct ShuffleFloat {  // other four bytes than uint32_t
  static __device__ void run(const Params& p) {
    const int lane = int(threadIdx.x);
    p.out[lane] = as_bits(shuffle_xor(as_float(p.in[lane]), 16));
  }
};
template <int kWhich>
struct ShuffleBy {  // by the number in in[32]: xor, up or down
  static __device__ void run(const Params& p) {
    const int lane = int(threadIdx.x), by = int(p.in[p.n]);
    const uint32_t v = p.in[lane];
    p.out[lane] = kWhich == 0 ? shuffle_xor(v, by) : kWhich == 1 ? shuffle_up(v, by) : shuffle_down(v, by);
  }
};
struct WarpBallot {
  static __device__ void run(const Params& p) {
    const int lane = int(threadIdx.x);
    p.out[lane] = warp_ballot(p.in[lane] != 0);
  }
};

// ---- matrices --------------------------------------------------------------------------------------------------------

// In: 32 rows of 16 bytes. They lie in shared memory in another order, so that addresses count and not their order.
template <int kCount, bool kTrans>
struct LoadMatrix {
  static __device__ void run(const Params& p) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int lane = int(threadIdx.x), place = (lane * 5 + 3) % kWarp;
    for (int w = 0; w < 4; ++w) words[place * 4 + w] = p.in[lane * 4 + w];
    sync_warp();
    uint32_t r[kCount];
    if constexpr (kTrans)
      load_matrix_trans(r, words + place * 4);
    else
      load_matrix(r, words + place * 4);
    for (int j = 0; j < kCount; ++j) p.out[lane * kCount + j] = r[j];
  }
};

// In: the registers of A (4 a lane), of B (2 a lane), of D (4 a lane). Out: those of D.
template <class D, class Multiply>
struct Mma {
  static __device__ void run(const Params& p) {
    const int lane = int(threadIdx.x);
    const uint32_t* at = p.in + lane * 4;
    const uint32_t a[4] = {at[0], at[1], at[2], at[3]};
    at = p.in + 4 * kWarp + lane * 2;
    const uint32_t b[2] = {at[0], at[1]};
    at = p.in + 6 * kWarp + lane * 4;
    D d[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<D, float>)
        d[i] = as_float(at[i]);
      else
        d[i] = D(at[i]);
    }
    Multiply::run(d, a, b);
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<D, float>)
        p.out[lane * 4 + i] = as_bits(d[i]);
      else
        p.out[lane * 4 + i] = uint32_t(d[i]);
    }
  }
};
template <class T>
struct M16n8k16 {
  static __device__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
};
struct M16n8k8Tf32 {
  static __device__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};
struct M16n8k256And {
  static __device__ void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k256_and(d, a, b);
  }
};

// ---- by name ---------------------------------------------------------------------------------------------------------

template <class Test>
const char* start(const Params& p, int threads, void* stream) {
  return launch(golden_kernel<Test>, Launch{"golden", dim3(1), dim3(unsigned(threads)), 2048, stream}, p);
}

struct Entry {
  const char* name;  // the intrinsic's, then what tells its tests apart
  const char* (*start)(const Params&, int threads, void* stream);
};
const Entry kEntries[] = {
    {"to_float:float32", start<ToFloat<float>>},
    {"to_float:float16", start<ToFloat<Half>>},
    {"to_float:bfloat16", start<ToFloat<BFloat16>>},
    {"from_float:float32", start<FromFloat<float>>},
    {"from_float:float16", start<FromFloat<Half>>},
    {"from_float:bfloat16", start<FromFloat<BFloat16>>},
    {"pack2:float16", start<Pack2<Half>>},
    {"pack2:bfloat16", start<Pack2<BFloat16>>},
    {"to_tf32:", start<ToTf32>},
    {"as_float:", start<AsFloat>},
    {"as_bits:", start<AsBits>},
    {"popcount:32", start<Popcount32>},
    {"popcount:64", start<Popcount64>},
    {"leading_zeros:", start<LeadingZeros>},
    {"first_bit:", start<FirstBit>},
    {"byte_permute:", start<BytePermute>},
    {"funnel_right:", start<FunnelRight>},
    {"dynamic_shared:", start<DynamicShared>},
    {"load_constant:1", start<LoadConstant<uint8_t>>},
    {"load_constant:2", start<LoadConstant<uint16_t>>},
    {"load_constant:4", start<LoadConstant<uint32_t>>},
    {"load_constant:8", start<LoadConstant<uint2>>},
    {"load_constant:16", start<LoadConstant<uint4>>},
    {"copy_async:4", start<CopyAsync<4>>},
    {"copy_async:8", start<CopyAsync<8>>},
    {"copy_async:16", start<CopyAsync<16>>},
    {"copy_wait:", start<CopyGroups>},
    {"copy_commit:", start<CopyGroups>},
    {"atomic_add:unsigned", start<AtomicAdd<unsigned>>},
    {"atomic_add:int", start<AtomicAdd<int>>},
    {"thread_fence:", start<ThreadFence>},
    {"sync_threads:", start<SyncThreads>},
    {"sync_warp:", start<SyncWarp>},
    {"sync_some:", start<SyncSome>},
    {"shuffle:", start<Shuffle>},
    {"shuffle_xor:", start<ShuffleBy<0>>},
    {"shuffle_xor:float", start<ShuffleFloat>},
    {"shuffle_up:", start<ShuffleBy<1>>},
    {"shuffle_down:", start<ShuffleBy<2>>},
    {"warp_ballot:", start<WarpBallot>},
    {"load_matrix:1", start<LoadMatrix<1, false>>},
    {"load_matrix:2", start<LoadMatrix<2, false>>},
    {"load_matrix:4", start<LoadMatrix<4, false>>},
    {"load_matrix_trans:2", start<LoadMatrix<2, true>>},
    {"load_matrix_trans:4", start<LoadMatrix<4, true>>},
    {"mma_m16n8k16:float16", start<Mma<float, M16n8k16<Half>>>},
    {"mma_m16n8k16:bfloat16", start<Mma<float, M16n8k16<BFloat16>>>},
    {"mma_m16n8k8_tf32:", start<Mma<float, M16n8k8Tf32>>},
    {"mma_m16n8k256_and:", start<Mma<int32_t, M16n8k256And>>},
};

}  // namespace

}  // namespace slim::cuda::golden

// Null, or what is wrong. `in` and `out` lie on the GPU, or anywhere for the emulator; the call does not wait for the
// kernel on a GPU.
extern "C" __attribute__((visibility("default"))) const char* slim_golden(const char* name, const uint32_t* in,
                                                                          int in_words, uint32_t* out, int out_words,
                                                                          int n, int threads, void* stream) {
  using namespace slim::cuda;
  for (const golden::Entry& entry : golden::kEntries) {
    if (std::strcmp(entry.name, name) != 0) continue;
#ifdef SLIM_CUDA_HOST
    host::clear_memory();
    host::add_memory(in, int64_t(in_words) * 4, false);
    host::add_memory(out, int64_t(out_words) * 4, true);
#else
    (void)in_words, (void)out_words;
#endif
    const char* error = entry.start({in, out, n}, threads, stream);
#ifdef SLIM_CUDA_HOST
    host::clear_memory();
#endif
    return error;
  }
  return "no such test";
}

// The name of test `i`, or null.
extern "C" __attribute__((visibility("default"))) const char* slim_golden_name(int i) {
  using namespace slim::cuda::golden;
  return i >= 0 && i < int(sizeof kEntries / sizeof kEntries[0]) ? kEntries[i].name : nullptr;
}
