// SPDX-License-Identifier: Apache-2.0
// A small matmul kernel with mistakes to choose from: what the emulator must find.
#pragma once

#include <cstdint>

namespace slim::cuda::planted {

enum class Bug : int32_t {
  none,
  missing_wait,              // fragments are loaded before the copies have landed
  missing_barrier,           // … before those of other warps have
  missing_trailing_barrier,  // the next copies start while other warps still read
  swapped_fragment,          // two registers of A exchanged
  out_of_bounds_tail,        // the last rows are read as if there were a multiple of a tile
  misaligned,                // a vector load at an odd row
  divergent_barrier,         // half of the warps take another barrier
  deadlock,                  // one warp leaves before the barrier
  divergent_warp,            // lanes of a warp at different instructions
  shared_overrun,            // one row of the tile too many
};

struct Params {
  const uint16_t* w;             // [rows, depth] bfloat16
  const uint16_t* x;             // [columns, depth] bfloat16
  float* y;                      // [columns, rows]
  int32_t rows, columns, depth;  // depth: a multiple of 32
  Bug bug;
};

const char* matmul(const Params& p);

}  // namespace slim::cuda::planted
