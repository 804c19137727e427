// SPDX-License-Identifier: Apache-2.0
// Decoding and sums of members.
#include "cuda/codebook/codebook_kernel.cuh"
#include "cuda/common/launch.cuh"

namespace slim::cuda::codebook {

namespace {

template <class T>
struct Type {
  using type = T;
};

template <class F>
const char* with_type(DType type, const F& f) {
  switch (type) {
    case DType::f32:
      return f(Type<float>());
    case DType::f16:
      return f(Type<Half>());
    default:
      return f(Type<BFloat16>());
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned at_most(int64_t v, int64_t limit) { return unsigned(v < limit ? v : limit); }

}  // namespace

const char* decode(const Weight& w, DType type, void* out, void* stream) {
  const int64_t blocks = ceil_div(w.rows * w.width, 8 * kDecodeThreads);
  return with_type(type, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch(decode_kernel<T>,
                  {"codebook::decode", dim3(at_most(blocks, 1 << 20)), dim3(kDecodeThreads), 0, stream},
                  DecodeParams{w, out});
  });
}

// Blocks of at least 16384 members, some hundreds of them over all tables. It must not depend on the device: the sums
// of the chunks are added up.
int64_t sum_chunks(const Weight& w) {
  if (w.table_count == 0) return 1;
  const int64_t members = ceil_div(w.rows * w.width, w.table_count), wanted = ceil_div(512, w.table_count);
  const int64_t most = ceil_div(members, 16384);
  return most < 1 ? 1 : most < wanted ? most : wanted;
}

const char* sum_members(const Weight& w, DType type, const void* grad, bool zero, float* partial, void* sums,
                        void* stream) {
  const int64_t chunks = sum_chunks(w), total = w.table_count << w.bits;
  const int warps = sum_warps(w.bits), shared = (warps * kWarp * 4) << w.bits;
  return with_type(type, [&](auto t) {
    using T = typename decltype(t)::type;
    const char* const error = launch(sum_kernel<T>,
                                     {"codebook::sum_members", dim3(unsigned(chunks), at_most(w.table_count, 65535)),
                                      dim3(unsigned(warps * kWarp)), shared, stream},
                                     SumParams{w, grad, partial, chunks});
    if (error) return error;
    return launch(
        sum_reduce_kernel<T>,
        {"codebook::sum_members, second stage", dim3(at_most(ceil_div(total, 256), 65535)), dim3(256), 0, stream},
        SumReduceParams{partial, sums, chunks, total, 1 << w.bits, zero});
  });
}

}  // namespace slim::cuda::codebook
