// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/block_sparse/block_sparse_launch.cuh"

namespace slim::cuda::block_sparse {

// Which tile, and how many shares. To be fed by measurements; until then by counting:
// - few columns of a linear layer: their bytes are small beside the weights', so small tiles, many of them;
// - a plan of tiles of 256 rows is followed by Wide, if its blocks fill half of the GPU or more;
// - else by Tall, which on such a plan loads slices for the rows of three other tiles, but has four times the blocks;
// - where even those leave multiprocessors idle, sums are split until each has a block, but no share below four steps.
Tiling choose_tiling(const Activations& a, const Shape& s, int64_t plan_words, const DeviceInfo& device) {
  const int64_t columns = columns_of(a), processors = std::max(1, device.multiprocessors);
  const int64_t wide = s.tiles() * ((columns + kWideColumns - 1) / kWideColumns);
  const int64_t tall = s.tiles() * ((columns + 127) / 128) * (s.tile_rows() / 64);
  Tiling t{kTall, 1};
  int64_t blocks = tall, wanted = 2 * processors;
  if (!a.conv && columns <= 32) {
    t.tile = kFew;
    blocks = s.tiles() * (s.tile_rows() / 64) * ((columns + 15) / 16);
    wanted = 4 * processors;
  } else if (s.tile_rows() == 256 && s.slice() == 16 && 2 * wide >= processors) {
    t.tile = kWide;
    blocks = wide;
    wanted = processors;
  }
  const int64_t steps = s.slices(plan_words) * s.slice() / kStep / std::max<int64_t>(1, s.tiles());
  if (2 * blocks <= wanted)
    t.splits = int(std::max<int64_t>(1, std::min<int64_t>({wanted / std::max<int64_t>(1, blocks), steps / 4, 16})));
  return t;
}

const char* product_tiled(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return product_f32(p, s, tiling, partial, stream);
    case DType::f16:
      return product_f16(p, s, tiling, partial, stream);
    default:
      return product_bf16(p, s, tiling, partial, stream);
  }
}

}  // namespace slim::cuda::block_sparse
