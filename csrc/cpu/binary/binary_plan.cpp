// SPDX-License-Identifier: Apache-2.0
#include "cpu/binary/binary_plan.h"

#include <algorithm>
#include <cstring>

namespace slim::binary {

namespace {

constexpr uint64_t kMagic = 0x736c696d62696e31;  // "slimbin1"

int64_t align64(int64_t n) { return (n + 63) & ~int64_t(63); }

// `count` <= 64 bits of the stream from bit `position` on; reads no byte that holds none of them.
uint64_t bits_at(const uint8_t* stream, int64_t position, int64_t count) {
  const int64_t first = position >> 3, shift = position & 7, bytes = (shift + count + 7) >> 3;
  uint64_t low = 0;
  std::memcpy(&low, stream + first, size_t(std::min<int64_t>(bytes, 8)));
  low >>= shift;
  if (bytes > 8) low |= uint64_t(stream[first + 8]) << (64 - shift);
  return count < 64 ? low & ((uint64_t(1) << count) - 1) : low;
}

PlanHeader make_header(const Signs& s, const Layout& layout) {
  PlanHeader h{};
  h.magic = kMagic;
  h.layout = layout;
  h.rows = s.rows, h.channels = s.channels, h.kernel_h = s.kernel_h, h.kernel_w = s.kernel_w, h.groups = s.groups;
  const int64_t bytes = s.taps() * tap_bytes(s.channels);
  h.depth = layout.order == Order::bytes   ? bytes
            : layout.order == Order::words ? (bytes + 7) / 8
                                           : (s.width() + layout.used_bits - 1) / layout.used_bits;
  h.panels = (s.rows_per_group() + layout.lanes - 1) / layout.lanes;
  h.weights = align64(int64_t(sizeof(PlanHeader)));
  h.border = align64(h.weights + h.groups * h.panels * h.depth * layout.lanes * (layout.word_bits / 8));
  h.bytes = h.border;
  if (layout.order != Order::lanes) h.bytes += (s.kernel_h + 1) * (s.kernel_w + 1) * s.rows * 4;
  return h;
}

// Row r with k in the order of a packed image; [bytes] zeroed.
void image_order(const Signs& s, int64_t r, uint8_t* out) {
  const int64_t taps = s.taps(), per_tap = tap_bytes(s.channels), first = r * s.width();
  if (taps == 1) {
    for (int64_t c = 0; c < s.channels; c += 64) {
      const int64_t count = std::min<int64_t>(64, s.channels - c);
      const uint64_t word = bits_at(s.stream, first + c, count);
      std::memcpy(out + c / 8, &word, size_t((count + 7) / 8));
    }
    return;
  }
  for (int64_t c = 0, at = first; c < s.channels; ++c)
    for (int64_t t = 0; t < taps; ++t, ++at)
      out[t * per_tap + (c >> 3)] |= uint8_t(((s.stream[at >> 3] >> (at & 7)) & 1) << (c & 7));
}

void write_border(const Signs& s, const uint8_t* row, int64_t r, int32_t* border) {
  const int64_t per_tap = tap_bytes(s.channels);
  const auto at = [&](int64_t i, int64_t j) -> int32_t& { return border[(i * (s.kernel_w + 1) + j) * s.rows + r]; };
  for (int64_t j = 0; j <= s.kernel_w; ++j) at(0, j) = 0;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    int32_t line = 0;
    at(i + 1, 0) = 0;
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      int32_t ones = 0;
      for (int64_t b = 0; b < per_tap; ++b) ones += __builtin_popcount(row[(i * s.kernel_w + j) * per_tap + b]);
      line += int32_t(s.channels) - 2 * ones;
      at(i + 1, j + 1) = at(i, j + 1) + line;
    }
  }
}

}  // namespace

std::vector<char> build_plan(const Signs& s, const Layout& layout) {
  const PlanHeader h = make_header(s, layout);
  std::vector<char> blob(static_cast<size_t>(h.bytes), 0);
  std::memcpy(blob.data(), &h, sizeof(h));
  auto* weights = reinterpret_cast<uint8_t*>(blob.data() + h.weights);
  auto* border = reinterpret_cast<int32_t*>(blob.data() + h.border);
  const int64_t lanes = layout.lanes, word = layout.word_bits / 8, per_group = s.rows_per_group();
  std::vector<uint8_t> row(size_t(s.taps() * tap_bytes(s.channels) + 8));
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t inner = r % per_group, lane = inner % lanes;
    uint8_t* panel = weights + (r / per_group * h.panels + inner / lanes) * h.depth * lanes * word;
    if (layout.order == Order::lanes) {
      for (int64_t i = 0; i < h.depth; ++i) {
        const int64_t k = i * layout.used_bits;
        const uint64_t bits = bits_at(s.stream, r * s.width() + k, std::min<int64_t>(layout.used_bits, s.width() - k));
        std::memcpy(panel + (i * lanes + lane) * word, &bits, size_t(word));  // little-endian
      }
      continue;
    }
    std::fill(row.begin(), row.end(), uint8_t(0));
    image_order(s, r, row.data());
    write_border(s, row.data(), r, border);
    if (layout.order == Order::words)
      for (int64_t i = 0; i < h.depth; ++i) std::memcpy(panel + (i * lanes + lane) * 8, row.data() + i * 8, 8);
    else
      for (int64_t i = 0; i < h.depth; ++i) panel[i * lanes + lane % 8 * 4 + lane / 8] = row[size_t(i)];
  }
  return blob;
}

bool view_plan(const void* data, int64_t bytes, const Signs& signs, const Layout& layout, Plan* plan) {
  if (bytes < int64_t(sizeof(PlanHeader))) return false;
  PlanHeader h;
  std::memcpy(&h, data, sizeof(h));
  const PlanHeader expected = make_header(signs, layout);
  const bool same = h.magic == kMagic && h.layout == layout && h.rows == signs.rows && h.channels == signs.channels &&
                    h.kernel_h == signs.kernel_h && h.kernel_w == signs.kernel_w && h.groups == signs.groups;
  if (!same || h.depth != expected.depth || h.panels != expected.panels || h.weights != expected.weights ||
      h.border != expected.border || h.bytes != expected.bytes || bytes != h.bytes)
    return false;
  plan->header = static_cast<const PlanHeader*>(data);
  plan->weights = static_cast<const uint8_t*>(data) + h.weights;
  plan->border = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(data) + h.border);
  return true;
}

}  // namespace slim::binary
