// SPDX-License-Identifier: Apache-2.0
#include "cpu/sparse/sparse_plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace slim::sparse {

namespace {

int64_t align64(int64_t n) { return (n + 63) & ~int64_t(63); }

const char* check(const Csr& c) {
  if (c.row_offsets[0] != 0 || c.row_offsets[c.rows] != c.nnz) return "row_offsets must run from 0 to nnz";
  for (int64_t r = 0; r < c.rows; ++r) {
    if (c.row_offsets[r] > c.row_offsets[r + 1]) return "row_offsets must not fall";
    // The last offset is right and none fell so far, but a later fall could still follow a value past the end.
    if (c.row_offsets[r + 1] > c.nnz) return "row_offsets must run from 0 to nnz";
    int64_t previous = -1;
    for (int64_t i = c.row_offsets[r]; i < c.row_offsets[r + 1]; ++i) {
      if (c.columns[i] <= previous || c.columns[i] >= c.width)
        return "columns must ascend within each row and lie inside the weight";
      previous = c.columns[i];
    }
  }
  return nullptr;
}

void fill_cells(const uint32_t* columns, const PlanHeader& h, const int32_t* row_offsets, uint32_t* cells,
                Segment* segments, uint32_t* sources, uint16_t* packed) {
  uint32_t written = 0, position = 0;
  std::vector<int64_t> cursor(kRowBlock);
  std::vector<Segment> found;
  std::vector<uint32_t> place;
  for (int64_t block = 0; block < h.row_blocks; ++block) {
    const int64_t row0 = block * kRowBlock, row1 = std::min(h.rows, row0 + kRowBlock);
    for (int64_t r = row0; r < row1; ++r) cursor[r - row0] = row_offsets[r];
    for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
      const int64_t limit = (kb + 1) * h.k_block;
      cells[block * h.k_blocks + kb] = written;
      found.clear();
      int64_t longest = 0;
      for (int64_t r = row0; r < row1; ++r) {
        const int64_t start = cursor[r - row0], end = row_offsets[r + 1];
        int64_t i = start;
        while (i < end && int64_t(columns[i]) < limit) ++i;
        if (i == start) continue;
        cursor[r - row0] = i;
        found.push_back({uint32_t(start), uint16_t(r - row0), uint16_t(i - start)});
        longest = std::max(longest, i - start);
      }
      // Counting sort by length, longest first; rows stay in order among equals.
      place.assign(longest + 2, 0);
      for (const Segment& s : found) ++place[longest - s.count + 1];
      for (int64_t i = 0; i < longest; ++i) place[i + 1] += place[i];
      for (const Segment& s : found) segments[written + place[longest - s.count]++] = s;
      for (; written < cells[block * h.k_blocks + kb] + found.size(); ++written) {
        Segment& s = segments[written];
        sources[written] = s.start;
        for (int i = 0; i < s.count; ++i) packed[position + i] = uint16_t(columns[s.start + i] - kb * h.k_block);
        s.start = position;
        position += s.count;
      }
    }
  }
  cells[h.row_blocks * h.k_blocks] = written;
}

// The transposed matrix as CSR, with groups resolved: row group * width + column, column source row.
void transpose(const Csr& c, uint32_t* columns, int32_t* row_offsets, uint32_t* order) {
  const int64_t rows = c.width * c.groups, per_group = c.rows / c.groups;
  std::memset(row_offsets, 0, (rows + 1) * sizeof(int32_t));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = c.row_offsets[r], base = r / per_group * c.width; i < c.row_offsets[r + 1]; ++i)
      ++row_offsets[base + c.columns[i] + 1];
  for (int64_t r = 0; r < rows; ++r) row_offsets[r + 1] += row_offsets[r];
  std::vector<int32_t> next(row_offsets, row_offsets + rows);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = c.row_offsets[r], base = r / per_group * c.width; i < c.row_offsets[r + 1]; ++i) {
      const int32_t at = next[base + c.columns[i]]++;
      columns[at] = uint32_t(r);
      order[at] = uint32_t(i);
    }
}

}  // namespace

int64_t choose_k_block(const Csr& c, int64_t taps, bool transposed) {
  const int64_t width = transposed ? c.rows : c.width * c.groups;
  int64_t target;
  if (taps > 1 && !transposed) {
    // A lowered channel is about kw / taps of what its taps would take as single rows.
    target = 224;
  } else {
    // 64 columns of float32 take 256 bytes per k: 128 rows are as much as the first level holds. Measured flat from 96
    // to 192 at densities of 5 to 30 %, worse below (more segments) and above (activations from the second level).
    target = 128;
  }
  // Equal blocks, and whole channels.
  const int64_t unit = transposed ? 1 : taps;
  const int64_t units = std::max<int64_t>(1, (width + unit - 1) / unit);
  const int64_t per_block = std::max<int64_t>(1, target / unit);
  const int64_t blocks = (units + per_block - 1) / per_block;
  return std::min<int64_t>((units + blocks - 1) / blocks * unit, 65535);
}

int64_t plan_capacity(const Csr& c, int64_t k_block, bool transposed) {
  const int64_t rows = transposed ? c.width * c.groups : c.rows;
  const int64_t width = transposed ? c.rows : c.width * c.groups;
  const int64_t k_blocks = (width + k_block - 1) / k_block, row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t segments = std::min(c.nnz, rows * k_blocks);
  return align64(sizeof(PlanHeader)) + 2 * align64(c.nnz * 2) + align64((rows + 1) * 4) +
         align64((row_blocks * k_blocks + 1) * 4) + align64(segments * int64_t(sizeof(Segment))) +
         align64(segments * 4) + (transposed ? align64(c.nnz * 4) : 0);
}

const char* build_plan(const Csr& c, int64_t k_block, bool transposed, void* blob, int64_t* bytes) {
  if (const char* wrong = check(c)) return wrong;
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.rows = transposed ? c.width * c.groups : c.rows;
  h.width = transposed ? c.rows : c.width * c.groups;
  h.by_row = h.width <= 65536;
  h.nnz = c.nnz;
  h.source_rows = c.rows;
  h.transposed = transposed;
  h.k_block = k_block;
  h.k_blocks = (h.width + k_block - 1) / k_block;
  h.row_blocks = (h.rows + kRowBlock - 1) / kRowBlock;

  char* base = static_cast<char*>(blob);
  h.columns_at = align64(sizeof(PlanHeader));
  h.packed_columns_at = h.columns_at + (h.by_row ? align64(h.nnz * 2) : 0);
  h.row_offsets_at = h.packed_columns_at + align64(h.nnz * 2);
  h.order_at = h.row_offsets_at + align64((h.rows + 1) * 4);
  h.cells_at = h.order_at + (transposed ? align64(h.nnz * 4) : 0);
  h.segments_at = h.cells_at + align64((h.row_blocks * h.k_blocks + 1) * 4);

  auto* row_offsets = reinterpret_cast<int32_t*>(base + h.row_offsets_at);
  std::vector<uint32_t> absolute(h.nnz);
  if (transposed) {
    transpose(c, absolute.data(), row_offsets, reinterpret_cast<uint32_t*>(base + h.order_at));
  } else {
    std::memcpy(row_offsets, c.row_offsets, (c.rows + 1) * sizeof(int32_t));
    const int64_t per_group = std::max<int64_t>(1, c.rows / c.groups);
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t i = c.row_offsets[r], first = r / per_group * c.width; i < c.row_offsets[r + 1]; ++i)
        absolute[i] = uint32_t(first + c.columns[i]);
  }
  auto* cells = reinterpret_cast<uint32_t*>(base + h.cells_at);
  auto* segments = reinterpret_cast<Segment*>(base + h.segments_at);
  const int64_t most = std::min(h.nnz, h.rows * h.k_blocks);
  h.sources_at = h.segments_at + align64(most * int64_t(sizeof(Segment)));
  auto* sources = reinterpret_cast<uint32_t*>(base + h.sources_at);
  if (h.by_row) std::copy(absolute.begin(), absolute.end(), reinterpret_cast<uint16_t*>(base + h.columns_at));
  fill_cells(absolute.data(), h, row_offsets, cells, segments, sources,
             reinterpret_cast<uint16_t*>(base + h.packed_columns_at));
  // Close the gap that fewer segments than possible have left.
  const int64_t count = cells[h.row_blocks * h.k_blocks];
  const int64_t sources_at = h.segments_at + align64(count * int64_t(sizeof(Segment)));
  std::memmove(base + sources_at, sources, size_t(count) * 4);
  h.sources_at = sources_at;
  h.bytes = sources_at + count * 4;
  std::memcpy(blob, &h, sizeof(h));
  *bytes = h.bytes;
  return nullptr;
}

bool view_plan(const void* blob, int64_t bytes, int64_t rows, int64_t width, int64_t nnz, bool transposed, Plan* plan) {
  const char* base = static_cast<const char*>(blob);
  const auto* h = reinterpret_cast<const PlanHeader*>(base);
  if (bytes < int64_t(sizeof(PlanHeader)) || h->magic != kPlanMagic || h->bytes != bytes || h->rows != rows ||
      h->width != width || h->nnz != nnz || bool(h->transposed) != transposed)
    return false;
  plan->header = h;
  plan->columns = h->by_row ? reinterpret_cast<const uint16_t*>(base + h->columns_at) : nullptr;
  plan->packed_columns = reinterpret_cast<const uint16_t*>(base + h->packed_columns_at);
  plan->row_offsets = reinterpret_cast<const int32_t*>(base + h->row_offsets_at);
  plan->cells = reinterpret_cast<const uint32_t*>(base + h->cells_at);
  plan->segments = reinterpret_cast<const Segment*>(base + h->segments_at);
  plan->sources = reinterpret_cast<const uint32_t*>(base + h->sources_at);
  plan->order = transposed ? reinterpret_cast<const uint32_t*>(base + h->order_at) : nullptr;
  return true;
}

void pack_values(const Plan& plan, const void* values, int64_t element, void* packed) {
  const PlanHeader& h = *plan.header;
  const char* from = static_cast<const char*>(values);
  char* to = static_cast<char*>(packed);
  for (int64_t i = 0, count = plan.cells[h.row_blocks * h.k_blocks]; i < count; ++i)
    std::memcpy(to + int64_t(plan.segments[i].start) * element, from + int64_t(plan.sources[i]) * element,
                size_t(plan.segments[i].count * element));
}

}  // namespace slim::sparse
