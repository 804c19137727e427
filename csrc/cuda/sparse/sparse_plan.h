// SPDX-License-Identifier: Apache-2.0
// The plan of an unstructured sparse matrix for a GPU: its positions in the order in which tensor cores want them. Built
// by the host from the positions alone, once; the layout follows from the sizes, so nobody has to read the blob back.
//
//   A group's matrix [rows, depth] is cut into strips of 16 rows, a strip into cells of 64 k:
//
//           k 0        16        32        48      64
//     row 0  +---------+---------+---------+---------+      four A fragments of m16n8k16, side by side. Lane 4g + t
//            |    0    |    1    |    2    |    3    |      holds eight weights of each (device.cuh): so 32 of a cell,
//     row 15 +---------+---------+---------+---------+      a bit for each in a word of its own.
//
//     bit 8 f + 2 j + h of lane 4g + t: fragment f, register j, half h:
//         row = g + 8 (j & 1),   k = 16 f + 8 (j >> 1) + 2 t + h
//
//   Cell = 32 words of bits, lane by lane, then for each four lanes (16 bits) how many values lie before theirs: 144
//   bytes, 1.125 bits per weight. Packed order is cell after cell, in it lane after lane, in a lane by bit: a lane finds
//   its values with one population count and a sum over its neighbours, then reads on from there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace slim::cuda::sparse {

constexpr int kStripRows = 16;
constexpr int kCellDepth = 64;
constexpr int kCellMaskBytes = 128;
constexpr int kCellBytes = kCellMaskBytes + 16;
constexpr int kCellValues = kStripRows * kCellDepth;  // at most

// Sizes of the matrix that is walked: of the transposed one in a plan of that.
struct Shape {
  int64_t rows, depth;  // of one group
  int64_t groups, nnz;

  int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }        // of one group
  int64_t strip_cells() const { return (depth + kCellDepth - 1) / kCellDepth; }  // of one strip
  int64_t cells() const { return groups * strips() * strip_cells(); }
};

// Byte offsets in the blob. `order` comes first: it alone is needed where the sizes are not known.
struct Layout {
  int64_t order;   // uint32 [nnz]: which value of the canonical CSR stands at each place of the packed order
  int64_t cells;   // [cells][kCellBytes], aligned to 16 bytes
  int64_t starts;  // uint32 [cells + 1]: where the values of each cell start in packed order
  // Of a transposed matrix alone, whose rows the canonical CSR does not have:
  int64_t row_offsets;  // int32 [groups * rows + 1]
  int64_t columns;      // int32 [nnz], within the group
  int64_t sources;      // int32 [nnz]: place in the canonical CSR
  int64_t bytes;
};

inline Layout layout_of(const Shape& s, bool transposed) {
  Layout l{};
  const auto take = [&l](int64_t bytes) {
    const int64_t at = l.bytes;
    l.bytes += (bytes + 15) / 16 * 16;
    return at;
  };
  l.order = take(4 * s.nnz);
  l.cells = take(kCellBytes * s.cells());
  l.starts = take(4 * (s.cells() + 1));
  if (transposed) {
    l.row_offsets = take(4 * (s.groups * s.rows + 1));
    l.columns = take(4 * s.nnz);
    l.sources = take(4 * s.nnz);
  }
  return l;
}

// The parts that tensor cores read, on the device.
struct Tiles {
  const unsigned char* cells;  // aligned to 16 bytes
  const uint32_t* starts;
  int32_t strips, strip_cells;  // of one group
};

// Rows of all groups, columns within the group, ascending in a row.
struct Csr {
  const int32_t* columns;
  const int32_t* row_offsets;
};

// Null, or what is wrong with the positions: kernels trust them from here on.
inline const char* check_csr(const Csr& csr, const Shape& s) {
  const int64_t rows = s.rows * s.groups;
  if (csr.row_offsets[0] != 0 || csr.row_offsets[rows] != s.nnz) return "row_offsets: expected 0 … nnz";
  for (int64_t r = 0; r < rows; ++r) {
    if (csr.row_offsets[r + 1] < csr.row_offsets[r]) return "row_offsets: expected no fall";
    int64_t last = -1;
    if (csr.row_offsets[r + 1] > s.nnz) return "row_offsets: expected 0 … nnz";
    for (int64_t i = csr.row_offsets[r]; i < csr.row_offsets[r + 1]; ++i) {
      if (csr.columns[i] <= last || csr.columns[i] >= s.depth) return "columns: expected ascending indices in a row";
      last = csr.columns[i];
    }
  }
  return nullptr;
}

// Writes order, cells and starts. `sources`: where entry i of the CSR lies in the canonical one, or null if it is that.
inline void build_tiles(const Csr& csr, const Shape& s, const int32_t* sources, uint32_t* order, unsigned char* cells,
                        uint32_t* starts) {
  constexpr int kLanes = 32;
  struct Place {
    int64_t cell;
    int lane;
    uint32_t bit;
  };
  const auto place = [](int64_t row, int64_t k) {  // in a strip
    const int64_t t = k % 8 / 2, j = row / 8 + 2 * (k % 16 / 8);
    return Place{k / kCellDepth, int(row % 8 * 4 + t), uint32_t(k % kCellDepth / 16 * 8 + 2 * j + k % 2)};
  };
  const int64_t strips = s.strips(), width = s.strip_cells();
  std::vector<uint32_t> masks(size_t(width * kLanes)), before(size_t(width * kLanes));
  uint32_t total = 0;
  for (int64_t strip = 0; strip < s.groups * strips; ++strip) {
    const int64_t first = strip / strips * s.rows + strip % strips * kStripRows;
    const int64_t rest = s.rows - strip % strips * kStripRows, count = rest < kStripRows ? rest : int64_t(kStripRows);
    std::fill(masks.begin(), masks.end(), 0u);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = csr.row_offsets[first + r]; i < csr.row_offsets[first + r + 1]; ++i) {
        const Place p = place(r, csr.columns[i]);
        masks[size_t(p.cell * kLanes + p.lane)] |= 1u << p.bit;
      }
    for (int64_t c = 0; c < width; ++c) {
      unsigned char* cell = cells + (strip * width + c) * kCellBytes;
      const uint32_t start = total;
      starts[strip * width + c] = start;
      for (int lane = 0; lane < kLanes; ++lane) {
        before[size_t(c * kLanes + lane)] = total;
        if (lane % 4 == 0) {
          const uint16_t prefix = uint16_t(total - start);
          std::memcpy(cell + kCellMaskBytes + lane / 4 * 2, &prefix, 2);
        }
        total += uint32_t(__builtin_popcount(masks[size_t(c * kLanes + lane)]));
      }
      std::memcpy(cell, &masks[size_t(c * kLanes)], kCellMaskBytes);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = csr.row_offsets[first + r]; i < csr.row_offsets[first + r + 1]; ++i) {
        const Place p = place(r, csr.columns[i]);
        const size_t at = size_t(p.cell * kLanes + p.lane);
        order[before[at] + uint32_t(__builtin_popcount(masks[at] & ((1u << p.bit) - 1)))] =
            uint32_t(sources ? sources[i] : i);
      }
  }
  starts[s.cells()] = total;
}

// The CSR of the transposed matrix; `s` is the shape of the one that is given.
inline void transpose(const Csr& csr, const Shape& s, int32_t* row_offsets, int32_t* columns, int32_t* sources) {
  const int64_t rows = s.groups * s.depth;
  std::memset(row_offsets, 0, size_t(4 * (rows + 1)));
  const auto each = [&](auto&& f) {
    for (int64_t r = 0; r < s.groups * s.rows; ++r)
      for (int64_t i = csr.row_offsets[r]; i < csr.row_offsets[r + 1]; ++i)
        f(r / s.rows * s.depth + csr.columns[i], int32_t(r % s.rows), int32_t(i));
  };
  each([&](int64_t row, int32_t, int32_t) { ++row_offsets[row + 1]; });
  for (int64_t r = 0; r < rows; ++r) row_offsets[r + 1] += row_offsets[r];
  std::vector<int32_t> next(row_offsets, row_offsets + rows);
  each([&](int64_t row, int32_t column, int32_t i) {
    columns[next[size_t(row)]] = column;
    sources[next[size_t(row)]++] = i;
  });
}

}  // namespace slim::cuda::sparse
