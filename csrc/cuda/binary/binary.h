// SPDX-License-Identifier: Apache-2.0
// Binary weights on a GPU: y = scale * (sign(W) x) + bias, with x as it is or as signs, in floats or in bits. Raw pointers
// and a stream: nothing of torch, nothing allocated.
//
// Packed, everything is a sequence of 64-bit words, 1 for +1, and bits that no weight or activation fills are 0:
//
//   activations   linear  [rows of x][words]             column_bytes from row to row
//                 conv    [batch, H, W][groups][words]   a group of a pixel begins at a word
//   weights       [rows][taps][words]                    row_bytes, a multiple of 16, from row to row
//
// where `words` hold the channels of one group: ceil(channels / 64).
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::binary {

// Of a weight; channels: of one group. A linear layer has in_features of them, one tap and one group.
struct Shape {
  int64_t rows, channels, kernel_h, kernel_w, groups;
};

// Where things lie in a plan for sign x sign: the weights as above, then
//   border  [kernel_h + 1, kernel_w + 1, rows] int32: sum over the taps above and left of (i, j) of (channels - 2 * number
//           of +1): what those taps say of a dot product whatever the activations are.
struct Layout {
  int64_t words, row_bytes, border, bytes;
};
inline Layout layout_of(const Shape& s) {
  Layout l;
  l.words = (s.channels + 63) / 64;
  l.row_bytes = (s.kernel_h * s.kernel_w * l.words * 8 + 15) / 16 * 16;
  l.border = (s.rows * l.row_bytes + 127) / 128 * 128;
  l.bytes = l.border + (s.kernel_h + 1) * (s.kernel_w + 1) * s.rows * 4;
  return l;
}

// ---- from floats and streams to words --------------------------------------------------------------------------------

struct PlanParams {
  Shape shape;
  Layout layout;
  const uint8_t* signs;  // canonical: bit r * channels * taps + c * taps + t
  uint8_t* plan;
};

// x [m, k] -> bits [m][column_bytes] and sums [m], the number of ones in a row.
struct PackRowsParams {
  DType type;
  const void* x;
  uint8_t* bits;
  int32_t* sums;
  int64_t m, k, column_bytes;
  bool vectors;  // rows begin at multiples of 16 bytes
  int warps;     // per row: 1, or all of a block
};

// x [images, groups * channels, plane] -> bits [images, plane][groups][words] and, for one group, sums [images, plane].
struct PackPixelsParams {
  DType type;
  const void* x;
  uint8_t* bits;
  int32_t* sums;
  int64_t images, plane, groups, channels, words;
};

// bits [pixels][source_bytes] of groups * channels -> [pixels][groups][words].
struct RegroupParams {
  const uint8_t* source;
  uint8_t* bits;
  int64_t pixels, source_bytes, groups, channels, words;
};

// bits [items][words] -> sums [items].
struct CountParams {
  const uint8_t* bits;
  int32_t* sums;
  int64_t items, words;
};

// dots [m, n] -> y [m, n]: what the product does to a dot product.
struct ScaleParams {
  DType type;
  const int32_t* dots;
  const void *scale, *bias;  // [n]; bias may be null
  void* y;
  int64_t m, n;
  bool relu;
};

const char* make_plan(const PlanParams& p, void* stream);
const char* pack_rows(const PackRowsParams& p, const DeviceInfo& device, void* stream);
const char* pack_pixels(const PackPixelsParams& p, void* stream);
const char* regroup(const RegroupParams& p, void* stream);
const char* count(const CountParams& p, void* stream);
const char* scale_dots(const ScaleParams& p, void* stream);

// ---- sign x sign -----------------------------------------------------------------------------------------------------

struct ProductParams {
  DType type;                // of y, scale and bias
  const uint8_t* weights;    // [rows][row_bytes]
  const int32_t* border;     // see Layout
  const uint8_t* bits;       // see above
  const int32_t* sums;       // ones in each column of a linear layer, in each group of each pixel of a convolution
  const void *scale, *bias;  // [rows]; bias may be null
  void* y;                   // linear [columns, rows], conv [batch, rows, out_h, out_w]; or null for bits:
  bool relu;
  // Row n of a column is 1 where rising[n] ? dot >= thresholds[n] : dot <= thresholds[n].
  const int32_t* thresholds;
  const uint8_t* rising;
  uint32_t* out_bits;  // [columns][out_words] 32-bit words
  int64_t out_words;
  bool shared_words;                 // rows of two groups meet in a word: see shares_words
  unsigned row_tiles, column_tiles;  // of a group; the launcher's affair
  bool conv;
  int64_t rows, groups, columns;  // rows of all groups
  int64_t words, row_bytes, column_bytes;
  ConvGeometry geometry;
};

// Whether rows of two groups meet in a 32-bit word of output bits: they are added to it then, and it must be zero before.
inline bool shares_words(int64_t rows, int64_t groups) { return groups > 1 && rows / groups % 32 != 0; }

const char* product(const ProductParams& p, const DeviceInfo& device, void* stream);

// ---- signs x floats --------------------------------------------------------------------------------------------------

// The plan: [group][64 of k][rows of the group, padded][2] 32-bit words, k in the canonical order. Bit (k >> 1) + 16 * (k & 1)
// of a word belongs to the k-th of its 32 weights: a pair of neighbours is 16 bits apart, as the two halves of a register.
struct FloatLayout {
  int64_t rows, blocks, bytes;  // rows of a group, padded; blocks of 64 of k
};
inline FloatLayout float_layout_of(const Shape& s) {
  FloatLayout l;
  l.rows = (s.rows / s.groups + 15) / 16 * 16;
  l.blocks = (s.channels * s.kernel_h * s.kernel_w + 63) / 64;
  l.bytes = s.groups * l.blocks * l.rows * 8;
  return l;
}

struct FloatPlanParams {
  Shape shape;
  FloatLayout layout;
  const uint8_t* signs;  // canonical
  uint8_t* plan;
};

struct FloatParams {
  Activations a;
  const uint8_t* words;  // a plan
  const void* scale;     // [n] of a.type
};

const char* make_float_plan(const FloatPlanParams& p, void* stream);
// Into how many parts k should be cut; above 1, floats() needs a workspace of that many floats for each entry of y.
int float_splits(const Activations& a, const DeviceInfo& device);
const char* floats(const FloatParams& p, int splits, float* partial, void* stream);

}  // namespace slim::cuda::binary
