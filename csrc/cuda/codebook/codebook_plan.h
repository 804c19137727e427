// SPDX-License-Identifier: Apache-2.0
// Makes the plan (codebook.h), on the host.
#pragma once

#include "cuda/codebook/codebook.h"

namespace slim::cuda::codebook {

// `plan` is plan_bytes long.
inline void build_plan(const uint8_t* codes, int64_t bytes, int64_t rows, int64_t width, int bits, int64_t groups,
                       unsigned char* plan) {
  const int64_t of_group = rows / groups, tiles = row_tiles_of(of_group), slabs = slabs_of(width);
  const unsigned mask = (1u << bits) - 1;
  const auto code_at = [&](int64_t entry) {
    const int64_t bit = entry * bits, byte = bit >> 3;
    const unsigned low = codes[byte], high = byte + 1 < bytes ? codes[byte + 1] : 0u;
    return ((low | high << 8) >> (bit & 7)) & mask;
  };
  for (int64_t i = 0; i < groups * tiles * slabs; ++i) {
    const int64_t group = i / (tiles * slabs), row0 = i / slabs % tiles * 16, column0 = i % slabs * kSlab;
    unsigned char* const slab = plan + i * bits * 128;
    for (int lane = 0; lane < 32; ++lane) {
      uint64_t held = 0;
      int count = 0, word = 0;
      for (int q = 0; q < 32; ++q) {
        const int64_t row = row0 + lane / 4 + (q >> 1 & 1) * 8;
        const int64_t column = column0 + q / 8 * 16 + (q >> 2 & 1) * 8 + lane % 4 * 2 + (q & 1);
        if (row < of_group && column < width)
          held |= uint64_t(code_at((group * of_group + row) * width + column)) << count;
        count += bits;
        if (count < 32) continue;
        for (int b = 0; b < 4; ++b) slab[(word * 32 + lane) * 4 + b] = static_cast<unsigned char>(held >> 8 * b);
        ++word;
        held >>= 32;
        count -= 32;
      }
    }
  }
}

}  // namespace slim::cuda::codebook
