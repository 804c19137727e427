// SPDX-License-Identifier: Apache-2.0
#include "cpu/sparse_codebook/sparse_codebook_plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace slim::sparse_codebook {

namespace {

constexpr int64_t kMostInRun = 255;  // entries of a row, in one turn

int64_t align64(int64_t n) { return (n + 63) & ~int64_t(63); }

int64_t row_blocks(const Weight& w) { return (w.rows + kRowBlock - 1) / kRowBlock; }

// Calls f(index in the codebook, number) for each weight, skips left out.
template <class F>
void for_each_weight(const Weight& w, F f) {
  const int64_t mask = (int64_t(1) << w.bits) - 1;
  int64_t number = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    int64_t column = -1;
    for (int64_t i = w.row_offsets[r]; i < w.row_offsets[r + 1]; ++i) {
      if (w.gaps[i] == kSkip) {
        column += kSkip;
        continue;
      }
      column += w.gaps[i] + 1;
      const int64_t bit = i * w.bits, at = bit >> 3;
      int64_t word = w.codes[at];
      if (at + 1 < w.code_bytes) word |= int64_t(w.codes[at + 1]) << 8;
      const int64_t table = w.group_size == 0 ? 0 : w.group_size < 0 ? r : column / w.group_size;
      f((table << w.bits) + ((word >> (bit & 7)) & mask), number++);
    }
  }
}

template <class T>
void sum_as(const Weight& w, const T* values, double* sums) {
  for_each_weight(w, [&](int64_t index, int64_t i) { sums[index] += double(values[i]); });
}

template <class T>
void decode_as(const Weight& w, const void* codebook, void* values) {
  for_each_weight(
      w, [&](int64_t index, int64_t i) { static_cast<T*>(values)[i] = static_cast<const T*>(codebook)[index]; });
}

// A turn of a row in a cell: `count` of its entries, those at which its cursor stands.
struct Turn {
  uint8_t row, count;
};

// Writes the turns of one cell as runs, most entries first; returns the bytes written.
int64_t write_runs(const std::vector<Turn>& turns, std::vector<uint8_t>* sorted, uint8_t* out) {
  uint32_t place[kMostInRun + 2] = {};
  for (const Turn& t : turns) ++place[kMostInRun - t.count + 1];
  for (int64_t i = 0; i <= kMostInRun; ++i) place[i + 1] += place[i];
  sorted->resize(turns.size());
  uint32_t start[kMostInRun + 1];
  std::copy(place, place + kMostInRun + 1, start);
  for (const Turn& t : turns) (*sorted)[start[kMostInRun - t.count]++] = t.row;
  uint8_t* to = out;
  for (int64_t i = 0; i <= kMostInRun; ++i)
    for (uint32_t from = place[i]; from < place[i + 1];) {
      const uint32_t number = std::min<uint32_t>(256, place[i + 1] - from);
      *to++ = uint8_t(kMostInRun - i);
      *to++ = uint8_t(number - 1);
      to = std::copy(sorted->begin() + from, sorted->begin() + from + number, to);
      from += number;
    }
  return to - out;
}

}  // namespace

const char* check(const Weight& w) {
  if (w.row_offsets[0] != 0 || w.row_offsets[w.rows] != w.entries) return "row_offsets must run from 0 to the entries";
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t start = w.row_offsets[r], end = w.row_offsets[r + 1];
    if (start > end) return "row_offsets must not fall";
    if (end > w.entries) return "row_offsets must run from 0 to the entries";
    int64_t column = -1;
    for (int64_t i = start; i < end; ++i) column += w.gaps[i] + (w.gaps[i] != kSkip);
    if (column >= w.width) return "gaps must not lead out of the weight";
    if (end > start && w.gaps[end - 1] == kSkip) return "no row may end with a skip";
  }
  return nullptr;
}

int64_t choose_k_block(const Weight& w, int64_t taps) {
  // As for the unstructured kernels, but with every k block a row costs a byte, so these are a little longer.
  const int64_t width = w.width * w.groups, target = taps > 1 ? 224 : 160;
  const int64_t units = std::max<int64_t>(1, (width + taps - 1) / taps);
  const int64_t per_block = std::max<int64_t>(1, target / taps);
  const int64_t blocks = (units + per_block - 1) / per_block;
  return std::min<int64_t>((units + blocks - 1) / blocks * taps, 65535);
}

int64_t plan_capacity(const Weight& w, int64_t k_block) {
  const int64_t k_blocks = (w.width * w.groups + k_block - 1) / k_block;
  // At worst every row of a cell has a count of its own. A turn holds at least one entry.
  const int64_t turns = std::min(w.entries, w.rows * k_blocks + w.entries / kMostInRun);
  return align64(sizeof(PlanHeader)) + align64((row_blocks(w) * k_blocks + 1) * 4) + 3 * turns;
}

const char* build_plan(const Weight& w, int64_t k_block, void* blob, int64_t* bytes) {
  if (const char* wrong = check(w)) return wrong;
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.rows = w.rows;
  h.width = w.width * w.groups;
  h.entries = w.entries;
  h.k_block = k_block;
  h.k_blocks = (h.width + k_block - 1) / k_block;
  h.row_blocks = row_blocks(w);
  h.cells_at = align64(sizeof(PlanHeader));
  h.runs_at = h.cells_at + align64((h.row_blocks * h.k_blocks + 1) * 4);

  char* base = static_cast<char*>(blob);
  auto* cells = reinterpret_cast<uint32_t*>(base + h.cells_at);
  auto* runs = reinterpret_cast<uint8_t*>(base + h.runs_at);
  const int64_t per_group = std::max<int64_t>(1, w.rows / w.groups);
  struct Cursor {
    int64_t entry, weight, column;  // first entry not yet in a cell; the weight it leads to, and that weight's column
  };
  std::vector<Cursor> cursors(kRowBlock);
  const auto next_weight = [&](Cursor& c, int64_t end) {
    for (c.weight = c.entry; c.weight < end && w.gaps[c.weight] == kSkip; ++c.weight) c.column += kSkip;
    c.column = c.weight < end ? c.column + w.gaps[c.weight] + 1 : INT64_MAX;
  };
  std::vector<Turn> turns;
  std::vector<uint8_t> sorted;
  int64_t written = 0;
  for (int64_t block = 0; block < h.row_blocks; ++block) {
    const int64_t row0 = block * kRowBlock, row1 = std::min(w.rows, row0 + kRowBlock);
    for (int64_t r = row0; r < row1; ++r) {
      cursors[r - row0] = {w.row_offsets[r], 0, r / per_group * w.width - 1};
      next_weight(cursors[r - row0], w.row_offsets[r + 1]);
    }
    for (int64_t kb = 0; kb < h.k_blocks; ++kb) {
      const int64_t limit = (kb + 1) * k_block;
      cells[block * h.k_blocks + kb] = uint32_t(written);
      turns.clear();
      int64_t entries = 0;
      for (int64_t r = row0; r < row1; ++r) {
        Cursor& c = cursors[r - row0];
        const int64_t first = c.entry;
        while (c.column < limit) {
          c.entry = c.weight + 1;
          next_weight(c, w.row_offsets[r + 1]);
        }
        entries += c.entry - first;
        for (int64_t left = c.entry - first; left > 0; left -= kMostInRun)
          turns.push_back({uint8_t(r - row0), uint8_t(std::min(left, kMostInRun))});
      }
      h.most_entries = std::max(h.most_entries, entries);
      h.most_turns = std::max(h.most_turns, int64_t(turns.size()));
      written += write_runs(turns, &sorted, runs + written);
      if (written > UINT32_MAX - 4 * kRowBlock * kMostInRun) return "row_offsets: a plan takes less than 4 GiB";
    }
  }
  cells[h.row_blocks * h.k_blocks] = uint32_t(written);
  h.bytes = h.runs_at + written;
  std::memcpy(blob, &h, sizeof(h));
  *bytes = h.bytes;
  return nullptr;
}

bool view_plan(const void* blob, int64_t bytes, const Weight& w, Plan* plan) {
  const char* base = static_cast<const char*>(blob);
  const auto* h = reinterpret_cast<const PlanHeader*>(base);
  if (bytes < int64_t(sizeof(PlanHeader)) || h->magic != kPlanMagic || h->bytes != bytes || h->rows != w.rows ||
      h->width != w.width * w.groups || h->entries != w.entries)
    return false;
  plan->header = h;
  plan->cells = reinterpret_cast<const uint32_t*>(base + h->cells_at);
  plan->runs = reinterpret_cast<const uint8_t*>(base + h->runs_at);
  return true;
}

int64_t count_weights(const Weight& w) { return w.entries - std::count(w.gaps, w.gaps + w.entries, uint8_t(kSkip)); }

void positions(const Weight& w, int32_t* columns, int32_t* offsets) {
  int64_t number = 0;
  offsets[0] = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    int64_t column = -1;
    for (int64_t i = w.row_offsets[r]; i < w.row_offsets[r + 1]; ++i) {
      column += w.gaps[i] + (w.gaps[i] != kSkip);
      if (w.gaps[i] != kSkip) columns[number++] = int32_t(column);
    }
    offsets[r + 1] = int32_t(number);
  }
}

void decode(const Weight& w, const void* codebook, int64_t element, void* values) {
  if (element == 2) return decode_as<uint16_t>(w, codebook, values);
  if (element == 4) return decode_as<uint32_t>(w, codebook, values);
  decode_as<uint64_t>(w, codebook, values);
}

void sum_members(const Weight& w, const float* values, double* sums) { sum_as(w, values, sums); }
void sum_members(const Weight& w, const double* values, double* sums) { sum_as(w, values, sums); }

}  // namespace slim::sparse_codebook
