// SPDX-License-Identifier: Apache-2.0
// The plan of a sparse codebook matrix for tensor cores: positions as bits, and codes in the order in which fragments want
// them. Cells, starts and that order are those of an unstructured matrix (cuda/sparse/sparse_plan.h); in place of values
//
//     codes     a bit stream of one code for each weight, cell after cell, lane after lane
//
// with 1, 2, 4 or 8 bits for a code, so that none lies across two words. 4 bits, 90 % zeros: 1.125 bits of position for
// every entry of the dense weight and 4 for each weight stored, 16 bits for a weight where gaps and codes take 12: what
// is paid for finding a lane's weights without walking to them.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/sparse/sparse_plan.h"

namespace slim::cuda::sparse_codebook {

// Byte offsets in the blob, which follow from the sizes of the matrix: nobody has to read it back.
struct CodesLayout {
  sparse::Shape shape;  // nnz is not known, and not used
  int bits;             // of a code in the plan
  int64_t starts, codes;

  CodesLayout(int64_t rows, int64_t width, int64_t groups, int64_t code_bits)
      : shape{rows / groups, width, groups, 0},
        bits(code_bits <= 2   ? int(code_bits)
             : code_bits <= 4 ? 4
                              : 8) {
    starts = sparse::kCellBytes * shape.cells();  // a multiple of 16
    codes = starts + (4 * (shape.cells() + 1) + 15) / 16 * 16;
  }
  int64_t bytes(int64_t weights) const { return codes + ((weights * bits + 7) / 8 + 15) / 16 * 16; }
};

// What is walked: as sparse_codebook.h has it, on the host.
struct Stream {
  const uint8_t* gaps;
  const uint8_t* codes;
  const int32_t* row_offsets;
  int64_t entries, code_bytes, rows, width, groups, bits;
};

// Returns null, or what is wrong with the stream. Kernels trust the plan.
inline const char* build_codes_plan(const Stream& s, std::vector<unsigned char>* blob) {
  constexpr int kSkip = 255;
  std::vector<int32_t> columns, offsets(size_t(s.rows + 1), 0);
  std::vector<uint8_t> codes;
  if (s.row_offsets[0] != 0 || s.row_offsets[s.rows] != s.entries) return "row_offsets must run from 0 to the entries";
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t begin = s.row_offsets[r], end = s.row_offsets[r + 1];
    if (begin > end || end > s.entries) return "row_offsets may not fall";
    if (begin < end && s.gaps[end - 1] == kSkip) return "gaps: no row may end with a skip";
    int64_t column = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int gap = s.gaps[i];
      column += gap == kSkip ? gap : gap + 1;
      if (gap == kSkip) continue;
      if (column >= s.width) return "gaps: a row must end before the width";
      const int64_t bit = i * s.bits, at = bit >> 3;
      const unsigned word = s.codes[at] | (at + 1 < s.code_bytes ? unsigned(s.codes[at + 1]) << 8 : 0u);
      columns.push_back(int32_t(column));
      codes.push_back(uint8_t(word >> (bit & 7) & ((1u << s.bits) - 1)));
    }
    offsets[size_t(r + 1)] = int32_t(columns.size());
  }
  const int64_t weights = int64_t(columns.size());
  CodesLayout l(s.rows, s.width, s.groups, s.bits);
  l.shape.nnz = weights;
  blob->assign(size_t(l.bytes(weights)), 0);
  std::vector<uint32_t> order(columns.size()), starts(static_cast<size_t>(l.shape.cells() + 1));
  sparse::build_tiles({columns.data(), offsets.data()}, l.shape, nullptr, order.data(), blob->data(), starts.data());
  std::memcpy(blob->data() + l.starts, starts.data(), starts.size() * 4);
  const int per = 8 / l.bits;
  for (int64_t i = 0; i < weights; ++i)
    (*blob)[size_t(l.codes + i / per)] |= uint8_t(codes[order[size_t(i)]] << (i % per * l.bits));
  return nullptr;
}

}  // namespace slim::cuda::sparse_codebook
