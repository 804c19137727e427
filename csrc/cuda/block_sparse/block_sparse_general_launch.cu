// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_sparse/block_sparse_general.cuh"
#include "cuda/common/launch.cuh"

namespace slim::cuda::block_sparse {

namespace {

constexpr int64_t kGridY = 65535;

template <class T, bool kConv>
const char* start(const Product& p, void* stream) {
  const int64_t columns = columns_of(p.a), lanes = kConv ? columns : p.a.n, rest = kConv ? p.a.n : columns;
  const dim3 grid(unsigned((lanes + kGeneralThreads - 1) / kGeneralThreads), unsigned(rest < kGridY ? rest : kGridY));
  return launch(product_kernel<T, kConv>, {"block_sparse::product_general", grid, dim3(kGeneralThreads), 0, stream}, p);
}

template <class T, bool kConv>
const char* start(const Gradient& p, void* stream) {
  const int64_t per_block = kConv ? kGeneralThreads / kWarp : kGeneralThreads;
  const int64_t blocks = (p.w.blocks * p.w.r * p.w.c + per_block - 1) / per_block;
  const dim3 grid(unsigned(blocks < (1 << 30) ? blocks : 1 << 30));
  return launch(grad_values_kernel<T, kConv>, {"block_sparse::grad_values_general", grid, dim3(kGeneralThreads), 0, stream},
                p);
}

template <class Params>
const char* dispatch(const Params& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return p.a.conv ? start<float, true>(p, stream) : start<float, false>(p, stream);
    case DType::f16:
      return p.a.conv ? start<Half, true>(p, stream) : start<Half, false>(p, stream);
    default:
      return p.a.conv ? start<BFloat16, true>(p, stream) : start<BFloat16, false>(p, stream);
  }
}

}  // namespace

const char* product_general(const Product& p, void* stream) { return dispatch(p, stream); }
const char* grad_values_general(const Gradient& p, void* stream) { return dispatch(p, stream); }

}  // namespace slim::cuda::block_sparse
