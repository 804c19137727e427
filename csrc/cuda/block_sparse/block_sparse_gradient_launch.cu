// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/block_sparse/block_sparse_gradient.cuh"

namespace slim::cuda::block_sparse {

namespace {

bool large(int64_t r, int64_t c) { return r % 64 == 0 && c % 64 == 0; }

template <class T, class Tile>
const char* start(const Gradient& p, int splits, void* stream) {
  const int64_t tiles = p.w.blocks * (p.w.r / Tile::kRows) * (p.w.c / Tile::kCols);
  using K = KeptBlock<T, Tile>;
  const char* error = p.a.conv ? outer<K, true, Tile>("block_sparse::gradient", p.a, p, tiles, splits, stream)
                               : outer<K, false, Tile>("block_sparse::gradient", p.a, p, tiles, splits, stream);
  if (error || splits == 1) return error;
  return add_splits<T>(p.partial, splits, p.w.blocks * p.w.r * p.w.c, p.grad_values, stream);
}

template <class T>
const char* with_type(const Gradient& p, int splits, void* stream) {
  return large(p.w.r, p.w.c) ? start<T, Tile<64, 64, 32, 2, 2, 4>>(p, splits, stream)
                             : start<T, Tile<16, 16, 32, 1, 1, 4>>(p, splits, stream);
}

}  // namespace

bool gradient_tiled(const Shape& s) {
  return s.r % 16 == 0 && s.c % 16 == 0 && s.rows > 0 && s.width > 0 &&
         (s.groups == 1 || s.rows / s.groups % s.r == 0) && s.blocks * (s.r / 16) * (s.c / 16) <= INT32_MAX;
}

// Until two blocks of four warps, or eight of one, fill each multiprocessor; no share below 512 columns.
int gradient_splits(const Activations& a, const Shape& s, const DeviceInfo& device) {
  const int64_t size = large(s.r, s.c) ? 64 : 16, tiles = s.blocks * (s.r / size) * (s.c / size);
  const int64_t wanted = device.multiprocessors * int64_t(size == 64 ? 2 : 8);
  return int(std::max<int64_t>(1, std::min<int64_t>({wanted / std::max<int64_t>(1, tiles), columns_of(a) / 512, 32})));
}

const char* grad_values_tiled(const Gradient& p, int splits, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return with_type<float>(p, splits, stream);
    case DType::f16:
      return with_type<Half>(p, splits, stream);
    default:
      return with_type<BFloat16>(p, splits, stream);
  }
}

}  // namespace slim::cuda::block_sparse
