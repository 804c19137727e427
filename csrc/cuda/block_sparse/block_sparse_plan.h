// SPDX-License-Identifier: Apache-2.0
// What a GPU wants to know of the positions beforehand: int32 words that a host derives and the device reads. Their
// layout follows from sizes that the host knows at every call, so that no call waits for the device.
//
// On tensor cores the weight (or its transpose) is cut into tiles of R rows, cells of 16 rows and slices of 16 (or 8) k:
//
//              slice 0    slice 1    slice 2    slice 3
//   depth         0         32         48        160        where the slice begins; only slices with a stored cell
//   cell 0     [16 x 16]             [16 x 16]              a cell is found by the offset of its first value / 8,
//   cell 1                [16 x 16]  [16 x 16]              -1 where nothing is stored
//   …                                           [16 x 16]
//
// so activations of a slice are loaded once for all rows of a tile, and multiplied where a cell is stored. Block rows
// that are no multiple of 16 high share cells: each cell then has `parts` offsets, one for every 16 / parts rows.
//
//   words   order [tiles]                 tiles by falling number of slices: the longest start first
//           offsets [tiles + 1]           into the slices, in steps of 64 k (each tile is padded with empty slices)
//           depths [slices]
//           cells [slices][R / 16][parts]
//
// Elsewhere, of the transpose only, the general kernel is told which blocks each block column has:
//
//   words   offsets [block columns + 1]
//           blocks [blocks], block rows ascending
//           rows [blocks]                 the block row of each
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/block_sparse/block_sparse.h"

namespace slim::cuda::block_sparse {

// Null and the plan's words, or what is wrong with the positions.
inline const char* build_plan(const Shape& s, const int32_t* columns, const int32_t* row_offsets,
                              std::vector<int32_t>* words) {
  const int64_t block_rows = (s.rows + s.r - 1) / s.r, block_columns = s.block_columns();
  if (row_offsets[0] != 0 || row_offsets[block_rows] != s.blocks)
    return "block_row_offsets must run from 0 to the number of blocks";
  for (int64_t i = 0; i < block_rows; ++i) {
    if (row_offsets[i] > row_offsets[i + 1] || row_offsets[i + 1] > s.blocks) return "block_row_offsets must not fall";
    for (int64_t b = row_offsets[i], previous = -1; b < row_offsets[i + 1]; previous = columns[b++])
      if (columns[b] <= previous || columns[b] >= block_columns)
        return "block_columns must ascend within each block row and lie inside the weight";
  }
  words->clear();
  if (!s.tiled() && !s.transposed) return nullptr;  // the general kernel walks the format as it is

  // Blocks of each line: a block row, or a block column of the transpose; with where they lie along the depth.
  const int64_t lines = s.transposed ? block_columns : block_rows;
  std::vector<int32_t> offsets, ids, at;
  if (s.transposed) {
    offsets.assign(size_t(lines + 1), 0);
    ids.resize(size_t(s.blocks));
    at.resize(size_t(s.blocks));
    for (int64_t b = 0; b < s.blocks; ++b) ++offsets[size_t(columns[b] + 1)];
    for (int64_t i = 0; i < lines; ++i) offsets[size_t(i + 1)] += offsets[size_t(i)];
    std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < block_rows; ++i)
      for (int32_t b = row_offsets[i]; b < row_offsets[i + 1]; ++b) {
        const size_t to = size_t(next[size_t(columns[b])]++);
        ids[to] = b;
        at[to] = int32_t(i);
      }
  }
  if (!s.tiled()) {
    words->insert(words->end(), offsets.begin(), offsets.end());
    words->insert(words->end(), ids.begin(), ids.end());
    words->insert(words->end(), at.begin(), at.end());
    return nullptr;
  }
  const int32_t* line_offsets = s.transposed ? offsets.data() : row_offsets;
  const int32_t* line_at = s.transposed ? at.data() : columns;

  const int64_t tiles = s.tiles(), tile_rows = s.tile_rows(), parts = s.parts(), part_rows = kCell / parts;
  const int64_t per_tile = tile_rows / kCell * parts, depth = s.group_depth();
  const int64_t extent = s.row_extent(), depth_extent = s.depth_extent(), slice_depth = s.slice();
  const int64_t per_block = depth_extent / slice_depth, per_step = kStep / slice_depth;
  std::vector<int32_t> starts(size_t(tiles + 1), 0), depths, cells;
  std::vector<int32_t> place(size_t((depth + depth_extent - 1) / depth_extent));  // of a block's slices in the tile
  std::vector<int32_t> present;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t group = tile / s.tiles_per_group(), row0 = tile % s.tiles_per_group() * tile_rows;
    const int64_t end = std::min(row0 + tile_rows, s.group_rows());
    // Groups of W own block rows of their own; all groups of W^T share block columns, and differ in the block rows.
    const int64_t line_base = s.transposed ? 0 : group * s.group_rows() / extent;
    const int64_t at_base = s.transposed ? group * depth / depth_extent : 0;
    const int64_t at_count = int64_t(place.size());
    present.clear();
    for (int64_t line = row0 / extent; line * extent < end; ++line)
      for (int32_t i = line_offsets[line_base + line]; i < line_offsets[line_base + line + 1]; ++i) {
        const int64_t block_at = line_at[i] - at_base;
        if (block_at >= 0 && block_at < at_count) present.push_back(int32_t(block_at));
      }
    std::sort(present.begin(), present.end());
    present.erase(std::unique(present.begin(), present.end()), present.end());
    const int64_t first = int64_t(depths.size());
    for (const int32_t p : present) {
      place[size_t(p)] = int32_t(depths.size() - size_t(first));
      for (int64_t k = 0; k < per_block; ++k)
        if (p * depth_extent + k * slice_depth < depth) depths.push_back(int32_t(p * depth_extent + k * slice_depth));
    }
    while ((int64_t(depths.size()) - first) % per_step) depths.push_back(int32_t((depth + 15) / 16 * 16));  // beyond the edge: zeros
    if (int64_t(depths.size()) > INT32_MAX) return "too many blocks for a plan";
    starts[size_t(tile + 1)] = int32_t(depths.size() / per_step);
    cells.resize(depths.size() * size_t(per_tile), -1);
    for (int64_t row = row0; row < end; row += part_rows) {
      const int64_t line = row / extent, inner = row % extent;
      for (int32_t i = line_offsets[line_base + line]; i < line_offsets[line_base + line + 1]; ++i) {
        const int64_t block_at = line_at[i] - at_base;
        if (block_at < 0 || block_at >= at_count) continue;
        const int64_t block = s.transposed ? ids[size_t(i)] : i;
        for (int64_t k = 0; k < per_block && block_at * depth_extent + k * slice_depth < depth; ++k) {
          const int64_t slice = first + place[size_t(block_at)] + k;
          const int64_t value = s.transposed ? k * slice_depth * s.c + inner : inner * s.c + k * slice_depth;
          cells[size_t(slice * per_tile + (row - row0) / part_rows)] = int32_t((block * s.r * s.c + value) / kUnit);
        }
      }
    }
  }
  std::vector<int32_t> order(static_cast<size_t>(tiles));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    return starts[size_t(x + 1)] - starts[size_t(x)] > starts[size_t(y + 1)] - starts[size_t(y)];
  });
  words->reserve(size_t(s.head_words()) + depths.size() + cells.size());
  words->insert(words->end(), order.begin(), order.end());
  words->insert(words->end(), starts.begin(), starts.end());
  words->resize(size_t(s.head_words()), 0);
  words->insert(words->end(), depths.begin(), depths.end());
  words->insert(words->end(), cells.begin(), cells.end());
  return nullptr;
}

}  // namespace slim::cuda::block_sparse
