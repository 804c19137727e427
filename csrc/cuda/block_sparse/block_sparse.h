// SPDX-License-Identifier: Apache-2.0
// Block-sparse weight times activations on a GPU. Raw pointers and a stream: nothing of torch, nothing allocated.
#pragma once

#include <numeric>

#include "cuda/common/params.h"

namespace slim::cuda::block_sparse {

constexpr int kCell = 16;   // rows that tensor cores multiply at once
constexpr int kStep = 64;   // k that plans group, so that any step of the main loop is whole
constexpr int kUnit = 8;    // values that offsets in plans count

// The sizes that decide how a weight is multiplied; host only.
struct Shape {
  int64_t rows, width;  // all groups' rows, the width of one group
  int64_t r, c, groups, blocks;
  bool transposed;

  // Of the matrix that is walked, W or W^T, per group.
  int64_t group_rows() const { return transposed ? width : rows / groups; }
  int64_t group_depth() const { return transposed ? rows / groups : width; }
  int64_t row_extent() const { return transposed ? c : r; }
  int64_t depth_extent() const { return transposed ? r : c; }

  // Tensor cores take blocks whose depth is made of slices, with rows of values aligned to 16 bytes. Groups must not
  // share block rows: a tile belongs to one group.
  bool tiled() const {
    if (rows == 0 || width == 0 || c % kUnit || depth_extent() % kUnit) return false;
    return (groups == 1 || rows / groups % r == 0) && blocks * r * c / kUnit <= INT32_MAX;
  }
  // k of a slice.
  int64_t slice() const { return depth_extent() % 16 ? 8 : 16; }
  // How many offsets a cell needs: rows of one block that follow each other share one.
  int64_t parts() const { return kCell / std::gcd(row_extent(), int64_t(kCell)); }
  // Tall blocks fill a tile of 64 rows; lower ones share activations with more rows (their slices' union is loaded).
  int64_t tile_rows() const { return row_extent() % 64 == 0 || group_rows() <= 128 ? 64 : 256; }
  int64_t tiles_per_group() const { return (group_rows() + tile_rows() - 1) / tile_rows(); }
  int64_t tiles() const { return groups * tiles_per_group(); }
  int64_t slice_words() const { return 1 + tile_rows() / kCell * parts(); }
  // Words before the depths, and slices in a tiled plan of this many words; -1 if it cannot be one.
  int64_t head_words() const { return (2 * tiles() + 1 + 3) / 4 * 4; }
  int64_t slices(int64_t words) const {
    const int64_t rest = words - head_words();
    return rest >= 0 && rest % (slice_words() * (kStep / slice())) == 0 ? rest / slice_words() : -1;
  }
  int64_t block_columns() const { return (width + c - 1) / c; }
};

// A weight [rows, width] in blocks, as the format stores it: block row after block row, block columns ascending.
struct Blocks {
  const void* values;          // [blocks, r, c] of the activations' type
  const int32_t* columns;      // [blocks]
  const int32_t* row_offsets;  // [ceil(rows / r) + 1]
  int64_t blocks, rows, width;  // rows of all groups together; width: the depth of one group's sum
  int32_t r, c, groups;
};

// y = W x, or y = W^T x where `transposed`: then a.k is rows / groups and a.n width * groups.
struct Product {
  Activations a;
  Blocks w;
  bool transposed;
  const int32_t* plan;  // of block_sparse_plan.h on the device, or null
  int64_t plan_words;
};

// Gradient of the stored values: values[b, i, j] = sum over columns of y[row of i, column] * x[depth of j, column].
struct Gradient {
  Activations a;
  Blocks w;  // w.values is not read
  void* grad_values;  // [blocks, r, c] of a.type
};

// How the tensor-core kernel is run: in which of its tiles (block_sparse_launch.cuh), and into how many shares its sums
// are split, each of which needs a.n * columns floats of workspace if there are several.
enum TileKind : int { kWide, kTall, kFew };
struct Tiling {
  TileKind tile;
  int splits;
};
Tiling choose_tiling(const Activations& a, const Shape& s, int64_t plan_words, const DeviceInfo& device);

// Launch on `stream` (a cudaStream_t); null, or what is wrong with the launch. product_tiled needs s.tiled() and a plan;
// product_general takes a plan of the form that is for it, or none.
const char* product_tiled(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream);
const char* product_general(const Product& p, void* stream);
const char* grad_values_general(const Gradient& p, void* stream);

}  // namespace slim::cuda::block_sparse
