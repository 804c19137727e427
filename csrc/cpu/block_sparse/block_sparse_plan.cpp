// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_sparse/block_sparse_plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace slim::block_sparse {

namespace {

int64_t align64(int64_t n) { return (n + 63) & ~int64_t(63); }

const char* check(const Bsr& b) {
  const int64_t block_rows = b.block_row_count(), block_cols = (b.width + b.c - 1) / b.c;
  if (b.row_offsets[0] != 0 || b.row_offsets[block_rows] != b.blocks)
    return "block_row_offsets must run from 0 to the number of blocks";
  for (int64_t r = 0; r < block_rows; ++r) {
    if (b.row_offsets[r] > b.row_offsets[r + 1] || b.row_offsets[r + 1] > b.blocks)
      return "block_row_offsets must not fall";
    int64_t previous = -1;
    for (int64_t i = b.row_offsets[r]; i < b.row_offsets[r + 1]; ++i) {
      if (b.columns[i] <= previous || b.columns[i] >= block_cols)
        return "block_columns must ascend within each block row and lie inside the weight";
      previous = b.columns[i];
    }
  }
  return nullptr;
}

// One rectangle of a block: output rows [row, row + rows) times k [k, k + length).
struct Part {
  int64_t row, k;
  int32_t rows, inner;
  uint32_t block;
  uint16_t first, length;
};

}  // namespace

const char* build_plan(const Bsr& b, int64_t taps, bool transposed, void* blob_vector) {
  if (const char* wrong = check(b)) return wrong;
  const int64_t per_group = std::max<int64_t>(1, b.rows / b.groups);
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.transposed = transposed;
  h.rows = transposed ? b.width * b.groups : b.rows;
  h.width = transposed ? b.rows : b.width * b.groups;
  h.blocks = b.blocks;
  h.block_rows = b.r;
  h.block_cols = b.c;
  h.row_step = transposed ? 1 : b.c;
  h.k_step = transposed ? b.c : 1;

  // Strips of four rows and more read each activation once per four rows, so a k block may be as large as the second
  // level allows. Thinner strips depend on faster levels, but read a block's activations in order: 256 was 5 to 23 %
  // faster than 128 with blocks of 1 x 16.
  const int64_t strip_rows = transposed ? b.c : b.r, depth = transposed ? b.r : b.c;
  // A lowered tap of a convolution brings its whole group of tiles along, so there the blocks stay smaller.
  const bool lowered = taps > 1 && !transposed;
  const int64_t target = lowered ? 288 : strip_rows >= 8 ? 768 : strip_rows >= 4 ? 512 : 256;
  const int64_t k_blocks = std::max<int64_t>(1, (h.width + target - 1) / target);
  h.k_block = std::max<int64_t>(1, ((h.width + k_blocks - 1) / k_blocks + depth - 1) / depth * depth);
  h.k_blocks = (h.width + h.k_block - 1) / h.k_block;

  std::vector<Part> parts;
  parts.reserve(size_t(b.blocks));
  for (int64_t br = 0; br < b.block_row_count(); ++br)
    for (int64_t i = b.row_offsets[br]; i < b.row_offsets[br + 1]; ++i) {
      const int64_t c0 = b.columns[i] * b.c, c1 = std::min(b.width, c0 + b.c);
      const int64_t end = std::min(b.rows, (br + 1) * b.r);
      for (int64_t r0 = br * b.r; r0 < end;) {  // one part per group that the block row meets
        const int64_t group = r0 / per_group, r1 = std::min(end, (group + 1) * per_group);
        const int64_t column = group * b.width + c0;
        if (transposed)
          parts.push_back({column, r0, int32_t(c1 - c0), 0, uint32_t(i), uint16_t(r0 - br * b.r), uint16_t(r1 - r0)});
        else
          parts.push_back({r0, column, int32_t(r1 - r0), int32_t(r0 - br * b.r), uint32_t(i), 0, uint16_t(c1 - c0)});
        r0 = r1;
      }
    }
  // Into strips: the transposed walk goes down block columns, and a block row that straddles groups has several strips.
  std::stable_sort(parts.begin(), parts.end(), [](const Part& x, const Part& y) { return x.row < y.row; });

  std::vector<Strip> strips;
  std::vector<uint32_t> cells;
  std::vector<Entry> entries;
  for (size_t i = 0; i < parts.size();) {
    const Part& first = parts[i];
    strips.push_back({int32_t(first.row), first.rows, first.inner, 0});
    size_t end = i;
    while (end < parts.size() && parts[end].row == first.row) ++end;
    size_t at = i;
    int64_t used = 0;  // of parts[at], by earlier k blocks
    for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
      cells.push_back(uint32_t(entries.size()));
      const int64_t limit = (kb + 1) * h.k_block;
      while (at < end && parts[at].k + used < limit) {
        const Part& p = parts[at];
        const int64_t stop = std::min<int64_t>(p.length, limit - p.k);
        entries.push_back({p.block, uint32_t(p.k + used), uint16_t(p.first + used), uint16_t(stop - used)});
        used = stop;
        if (used < p.length) break;
        ++at;
        used = 0;
      }
    }
    i = end;
  }
  cells.push_back(uint32_t(entries.size()));
  h.strips = int64_t(strips.size());
  h.strips_at = align64(sizeof(PlanHeader));
  h.cells_at = h.strips_at + align64(int64_t(strips.size() * sizeof(Strip)));
  h.entries_at = h.cells_at + align64(int64_t(cells.size() * 4));
  h.bytes = h.entries_at + int64_t(entries.size() * sizeof(Entry));
  auto& blob = *static_cast<std::vector<char>*>(blob_vector);
  blob.assign(size_t(h.bytes), 0);
  std::memcpy(blob.data(), &h, sizeof(h));
  if (!strips.empty()) std::memcpy(blob.data() + h.strips_at, strips.data(), strips.size() * sizeof(Strip));
  std::memcpy(blob.data() + h.cells_at, cells.data(), cells.size() * 4);
  if (!entries.empty()) std::memcpy(blob.data() + h.entries_at, entries.data(), entries.size() * sizeof(Entry));
  return nullptr;
}

bool view_plan(const void* blob, int64_t bytes, const Bsr& b, bool transposed, Plan* plan) {
  const char* base = static_cast<const char*>(blob);
  const auto* h = reinterpret_cast<const PlanHeader*>(base);
  if (bytes < int64_t(sizeof(PlanHeader)) || h->magic != kPlanMagic || h->bytes != bytes ||
      bool(h->transposed) != transposed || h->rows != (transposed ? b.width * b.groups : b.rows) ||
      h->width != (transposed ? b.rows : b.width * b.groups) || h->blocks != b.blocks || h->block_rows != b.r ||
      h->block_cols != b.c)
    return false;
  plan->header = h;
  plan->strips = reinterpret_cast<const Strip*>(base + h->strips_at);
  plan->cells = reinterpret_cast<const uint32_t*>(base + h->cells_at);
  plan->entries = reinterpret_cast<const Entry*>(base + h->entries_at);
  return true;
}

}  // namespace slim::block_sparse
