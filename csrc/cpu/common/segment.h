// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace slim {

// Consecutive weights of one row: where they start in their arrays, the row in its block, and how many they are.
struct Segment {
  uint32_t start;
  uint16_t row;
  uint16_t count;
};

}  // namespace slim
