// SPDX-License-Identifier: Apache-2.0
// Signs in the order in which the kernels walk them: derived from the canonical bit stream, never saved.
//
//   words   panel of 8 rows   [panel][64-bit word of k][8 rows]        sign x sign by xor and popcount
//   bytes   panel of 32 rows  [panel][byte of k][8][4]                 sign x sign by look-ups; row 8 q + i at [i][q]
//   lanes   panel of L rows   [panel][word of k][L rows]               signs x float by look-ups
//
// For sign x sign, k runs over the kernel's taps, and within a tap over the channels in whole bytes, as the pixels of a
// packed image lie in memory; the bits that fill up a byte are 0 on both sides and so never differ. For float
// activations, k is in the canonical order and a word holds `used_bits` of it, a whole number of look-ups.
#pragma once

#include <cstdint>
#include <vector>

namespace slim::binary {

enum class Order : int32_t { words, bytes, lanes };

// What a kernel wants. lanes: rows of a panel; word_bits: size of a word; used_bits: how many of its bits hold signs.
struct Layout {
  Order order;
  int32_t lanes, word_bits, used_bits;
  bool operator==(const Layout& o) const {
    return order == o.order && lanes == o.lanes && word_bits == o.word_bits && used_bits == o.used_bits;
  }
};

// The canonical weight: bit r * channels * taps + c * taps + t of the stream is 1 where the sign is +1.
struct Signs {
  const uint8_t* stream;
  int64_t rows, channels, kernel_h, kernel_w, groups;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t width() const { return channels * taps(); }
  int64_t rows_per_group() const { return rows / groups; }
};

struct PlanHeader {
  uint64_t magic;
  Layout layout;
  int64_t rows, channels, kernel_h, kernel_w, groups;
  int64_t depth;                   // words (or bytes) of k in a row
  int64_t panels;                  // of a group: no panel holds rows of two groups
  int64_t weights, border, bytes;  // offsets of the two arrays, and the size of all
};

struct Plan {
  const PlanHeader* header;
  const uint8_t* weights;
  // [kernel_h + 1, kernel_w + 1, rows]: sum over the taps above and left of (r, s) of (channels - 2 * number of +1), what
  // a tap would add to the dot product if its activations were all -1. Taps outside the image are packed as zero bits,
  // that is as -1, and this is how they are taken out again. Only for sign x sign.
  const int32_t* border;
};

// Bytes that the signs of a tap take for sign x sign.
inline int64_t tap_bytes(int64_t channels) { return (channels + 7) / 8; }

std::vector<char> build_plan(const Signs& signs, const Layout& layout);

// False if the bytes are no plan of this weight and layout.
bool view_plan(const void* data, int64_t bytes, const Signs& signs, const Layout& layout, Plan* plan);

}  // namespace slim::binary
