// SPDX-License-Identifier: Apache-2.0
// Decoding is a chain: bits -> look-up -> shift -> bits, some seven cycles a turn whatever the symbols. It is made fast by
// taking up to three symbols in each look-up and by walking four independent chains at once.
//
//   table[next kTableBits bits] = { symbols (3 bytes) | count (2 bits) | bits used (6 bits) }
//
// Every stream position is one number, its bit; eight bytes are loaded there for four look-ups. Bounds are kept by
// counting, before a run of turns, how many are safe for the stream that is nearest to an end; the last few symbols of
// each stream go one by one with every check.
#include "cpu/huffman/huffman.h"

#include <algorithm>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blobs are read as little-endian words");

namespace slim::huffman {

namespace {

constexpr int kTableBits = kMaxLength;
constexpr int kLookups = 4;  // for one load: 4 * 12 + 7 bits of shift fit 64
constexpr int kPerLookup = 3;

template <class T>
T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

int streams_of(int64_t n) { return n < kManyStreams ? 1 : kStreams; }

// ---- code lengths -----------------------------------------------------------------------------------------------------

struct Nibbles {
  uint8_t* bytes;  // or null: only count
  int64_t count = 0;
  void put(int value) {
    if (bytes) bytes[count / 2] = uint8_t(count % 2 ? bytes[count / 2] | value << 4 : value);
    ++count;
  }
};

int largest_symbol(const uint8_t* lengths) {
  int last = kSymbols - 1;
  while (last > 0 && !lengths[last]) --last;
  return last;
}

// Returns the bytes that the lengths take.
int64_t write_lengths(const uint8_t* lengths, uint8_t* bytes) {
  Nibbles out{bytes};
  const int end = largest_symbol(lengths) + 1;
  for (int s = 0; s < end;) {
    int run = 1;
    while (s + run < end && lengths[s + run] == lengths[s]) ++run;
    if (lengths[s] == 0 && run >= 3) {
      out.put(13);
      out.put((run - 3) & 15);
      out.put((run - 3) >> 4);
      s += run;
      continue;
    }
    out.put(lengths[s++]);
    for (--run; lengths[s - 1] && run >= 3;) {
      const int times = std::min(run, 18);
      out.put(14);
      out.put(times - 3);
      s += times;
      run -= times;
    }
  }
  return (out.count + 1) / 2;
}

// Null, or what is wrong; `used` bytes were read.
const char* read_lengths(const uint8_t* bytes, int64_t available, int last, uint8_t* lengths, int64_t* used) {
  int64_t at = 0;
  bool ended = false;
  const auto next = [&]() -> int {
    if (at / 2 >= available) {
      ended = true;
      return 0;
    }
    const int value = bytes[at / 2] >> (at % 2 * 4) & 15;
    ++at;
    return value;
  };
  std::memset(lengths, 0, kSymbols);
  for (int s = 0; s <= last;) {
    const int value = next();
    int run = 1, length = value;
    if (value == 13) {
      run = next();
      run += next() * 16 + 3;
      length = 0;
    } else if (value == 14) {
      if (s == 0) return "code lengths: a repetition of nothing";
      run = next() + 3;
      length = lengths[s - 1];
    } else if (value > kMaxLength) {
      return "code lengths: a code longer than 12 bits";
    }
    if (ended) return "code lengths: the blob ends within them";
    if (run > last + 1 - s) return "code lengths: more of them than symbols";
    while (run--) lengths[s++] = uint8_t(length);
  }
  if (at % 2 && next() != 0) return "code lengths: bits after them that are not 0";
  *used = at / 2;
  if (!lengths[last]) return "code lengths: the largest symbol has none";
  int64_t kraft = 0;
  for (int s = 0; s <= last; ++s)
    if (lengths[s]) kraft += int64_t(1) << (kMaxLength - lengths[s]);
  if (kraft != int64_t(1) << kMaxLength) return "code lengths: not those of a complete prefix code";
  return nullptr;
}

// codes [kSymbols], first bit lowest.
void canonical_codes(const uint8_t* lengths, uint16_t* codes) {
  int next[kMaxLength + 2] = {};
  for (int s = 0; s < kSymbols; ++s)
    if (lengths[s]) ++next[lengths[s] + 1];
  for (int length = 2; length <= kMaxLength + 1; ++length) next[length] = (next[length] + next[length - 1]) * 2;
  // next[l] is now the first code of length l: (first code of l - 1 + codes of l - 1) * 2.
  for (int s = 0; s < kSymbols; ++s) {
    int code = lengths[s] ? next[lengths[s]]++ : 0, reversed = 0;
    for (int b = 0; b < lengths[s]; ++b, code >>= 1) reversed = reversed << 1 | (code & 1);
    codes[s] = uint16_t(reversed);
  }
}

// ---- decoding ---------------------------------------------------------------------------------------------------------

struct Tables {
  uint32_t many[1 << kTableBits];  // bits used | count << 6 | symbols << 8
  uint16_t one[1 << kTableBits];   // length | symbol << 8
};

void fill_tables(const uint8_t* lengths, Tables* tables) {
  uint16_t codes[kSymbols];
  canonical_codes(lengths, codes);
  for (int s = 0; s < kSymbols; ++s)
    if (lengths[s])
      for (int i = codes[s]; i < 1 << kTableBits; i += 1 << lengths[s]) tables->one[i] = uint16_t(lengths[s] | s << 8);
  for (int i = 0; i < 1 << kTableBits; ++i) {
    uint32_t symbols = 0;
    int used = 0, count = 0;
    for (; count < kPerLookup; ++count) {
      const int entry = tables->one[i >> used], length = entry & 15;
      if (used + length > kTableBits) break;
      symbols |= uint32_t(entry >> 8) << (8 * count);
      used += length;
    }
    tables->many[i] = uint32_t(used) | uint32_t(count) << 6 | symbols << 8;
  }
}

struct Cursor {
  uint64_t bit;  // of the payload
  uint8_t* out;
  uint8_t* out_end;
};

// Advances the S cursors together for as long as the nearest end allows.
template <int S>
void run(const Header& h, const uint32_t* table, Cursor* cursors) {
  uint64_t bit[S];
  uint8_t* out[S];
  for (int s = 0; s < S; ++s) bit[s] = cursors[s].bit, out[s] = cursors[s].out;
  for (;;) {
    // A turn loads 8 bytes and moves on by 7 at most; it writes 12 bytes at most and, with the last word, one more.
    int64_t turns = INT64_MAX;
    for (int s = 0; s < S; ++s) {
      const int64_t in = h.payload_bytes - int64_t(bit[s] >> 3) - 8, room = cursors[s].out_end - out[s] - 1;
      turns = std::min({turns, in < 0 ? 0 : in / 7 + 1, room / (kLookups * kPerLookup)});
    }
    if (turns <= 0) break;
    for (; turns; --turns) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        uint64_t bits = load<uint64_t>(h.payload + (bit[s] >> 3)) >> (bit[s] & 7);
        uint64_t used = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kLookups; ++i) {
          const uint32_t entry = table[bits & ((1 << kTableBits) - 1)];
          const uint32_t symbols = entry >> 8;
          std::memcpy(out[s], &symbols, 4);
          out[s] += entry >> 6 & 3;
          bits >>= entry & 63;
          used += entry & 63;
        }
        bit[s] += used;
      }
    }
  }
  for (int s = 0; s < S; ++s) cursors[s].bit = bit[s], cursors[s].out = out[s];
}

// The rest of one stream, symbol by symbol.
const char* finish(const Header& h, const uint16_t* table, Cursor c, uint64_t end) {
  while (c.out < c.out_end) {
    uint64_t bits = 0;
    const int64_t byte = int64_t(c.bit >> 3);
    if (byte < h.payload_bytes)
      std::memcpy(&bits, h.payload + byte, size_t(std::min<int64_t>(8, h.payload_bytes - byte)));
    const int entry = table[bits >> (c.bit & 7) & ((1 << kTableBits) - 1)];
    c.bit += uint64_t(entry & 15);
    if (c.bit > end) break;
    *c.out++ = uint8_t(entry >> 8);
  }
  return c.out == c.out_end && c.bit == end ? nullptr : "streams: one does not end where the header says";
}

}  // namespace

void count(const uint8_t* symbols, int64_t n, int64_t* counts) {
  // Four histograms, because a run of one symbol would else wait for its own counter.
  int64_t part[4][kSymbols] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) ++part[j][symbols[i + j]];
  for (; i < n; ++i) ++part[0][symbols[i]];
  for (int s = 0; s < kSymbols; ++s) counts[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
}

// A package is two neighbours of the level below. Of the top level's 2 m - 2 cheapest, those that are leaves get one bit;
// those that are packages stand for twice as many of the level below, and so on.
void code_lengths(const int64_t* counts, uint8_t* lengths) {
  std::memset(lengths, 0, kSymbols);
  int leaves[kSymbols], m = 0;
  for (int s = 0; s < kSymbols; ++s)
    if (counts[s]) leaves[m++] = s;
  if (m < 2) return;
  std::stable_sort(leaves, leaves + m, [&](int a, int b) { return counts[a] < counts[b]; });
  bool is_leaf[kMaxLength][2 * kSymbols];
  double cost[2 * kSymbols], below[2 * kSymbols];
  int size = 0;
  for (int level = 0; level < kMaxLength; ++level) {
    const int packages = size / 2;
    std::copy(cost, cost + size, below);
    size = 0;
    for (int leaf = 0, package = 0; leaf < m || package < packages;) {
      const double two = package < packages ? below[2 * package] + below[2 * package + 1] : 0;
      const bool take_leaf = package == packages || (leaf < m && double(counts[leaves[leaf]]) <= two);
      is_leaf[level][size] = take_leaf;
      cost[size++] = take_leaf ? double(counts[leaves[leaf++]]) : two;
      package += !take_leaf;
    }
  }
  int chosen = 2 * m - 2;
  for (int level = kMaxLength - 1; level >= 0; --level) {
    int taken = 0;
    for (int i = 0; i < chosen; ++i) taken += is_leaf[level][i];
    for (int i = 0; i < taken; ++i) ++lengths[leaves[i]];
    chosen = 2 * (chosen - taken);
  }
}

int64_t encoded_size(const int64_t* counts, const uint8_t* lengths) {
  int64_t n = 0, bits = 0;
  for (int s = 0; s < kSymbols; ++s) n += counts[s], bits += counts[s] * lengths[s];
  if (bits == 0) return kHeaderBytes;
  return kHeaderBytes + write_lengths(lengths, nullptr) + 8 * streams_of(n) + (bits + 7) / 8;
}

void encode(const uint8_t* symbols, int64_t n, const uint8_t* lengths, int64_t bytes, uint8_t* blob) {
  const int last = largest_symbol(lengths);
  const bool constant = lengths[last] == 0;
  const int streams = constant ? 0 : streams_of(n);
  blob[0] = 1;
  blob[1] = !constant;
  blob[2] = uint8_t(constant ? (n ? symbols[0] : 0) : last);
  blob[3] = uint8_t(streams);
  std::memcpy(blob + 4, &n, 8);
  if (constant) return;
  uint8_t* ends = blob + kHeaderBytes + write_lengths(lengths, blob + kHeaderBytes);
  uint8_t* payload = ends + 8 * streams;

  uint16_t codes[kSymbols];
  canonical_codes(lengths, codes);
  uint32_t table[kSymbols];
  for (int s = 0; s < kSymbols; ++s) table[s] = uint32_t(codes[s]) << 8 | lengths[s];
  uint8_t *p = payload, *const end = blob + bytes;
  uint64_t held = 0;
  int bits = 0;  // in `held`, below 8 before each step
  const int64_t chunk = (n + streams - 1) / streams;
  for (int s = 0; s < streams; ++s) {
    int64_t i = std::min(n, s * chunk);
    const int64_t to = std::min(n, i + chunk);
    for (; i + 4 <= to && p + 8 <= end; i += 4) {
      for (int j = 0; j < 4; ++j) {
        const uint32_t entry = table[symbols[i + j]];
        held |= uint64_t(entry >> 8) << bits;
        bits += entry & 255;
      }
      std::memcpy(p, &held, 8);
      p += bits >> 3;
      held >>= bits & ~7;
      bits &= 7;
    }
    for (; i < to; ++i) {
      const uint32_t entry = table[symbols[i]];
      held |= uint64_t(entry >> 8) << bits;
      for (bits += entry & 255; bits >= 8; bits -= 8, held >>= 8) *p++ = uint8_t(held);
    }
    const uint64_t at = uint64_t(p - payload) * 8 + uint64_t(bits);
    std::memcpy(ends + 8 * s, &at, 8);
  }
  if (bits) *p = uint8_t(held);
}

const char* read_header(const uint8_t* blob, int64_t bytes, int64_t n, Header* h) {
  if (bytes < kHeaderBytes) return "it is shorter than its header";
  if (blob[0] != 1) return "version: expected 1";
  if (blob[1] > 1) return "kind: expected 0 or 1";
  if (n < 0 || load<uint64_t>(blob + 4) != uint64_t(n)) return "n: not the number of symbols that was expected";
  h->n = n;
  h->constant = blob[1] == 0;
  h->symbol = blob[2];
  h->streams = blob[3];
  if (h->constant) {
    if (h->streams != 0) return "streams: expected 0 for a constant";
    if (n == 0 && h->symbol != 0) return "symbol: expected 0 where there is none";
    return bytes == kHeaderBytes ? nullptr : "bytes after its end";
  }
  if (n < 2) return "n: expected at least 2 coded symbols";
  if (h->streams != streams_of(n)) return "streams: expected 4, or 1 for fewer than 2**14 symbols";
  int64_t used = 0;
  if (const char* wrong = read_lengths(blob + kHeaderBytes, bytes - kHeaderBytes, blob[2], h->lengths, &used))
    return wrong;
  const int64_t payload_at = kHeaderBytes + used + 8 * h->streams;
  if (bytes < payload_at) return "streams: the blob ends before them";
  h->payload = blob + payload_at;
  h->payload_bytes = bytes - payload_at;
  h->longest = *std::max_element(h->lengths, h->lengths + kSymbols);
  uint64_t start = 0;
  const int64_t chunk = (n - 1) / h->streams + 1;
  for (int s = 0; s < h->streams; ++s) {
    const uint64_t end = load<uint64_t>(blob + payload_at - 8 * (h->streams - s));
    const uint64_t symbols = uint64_t(std::max<int64_t>(0, std::min(n - s * chunk, chunk)));
    // Each symbol takes a bit at least: what follows is bounded by the size of the blob.
    if (end > uint64_t(h->payload_bytes) * 8 || end < start || end - start < symbols ||
        (end - start) / uint64_t(h->longest) > symbols)
      return "streams: ends that no such symbols have";
    h->ends[s] = start = end;
  }
  if (int64_t((start + 7) / 8) != h->payload_bytes) return "streams: the last does not end with the blob";
  if (start & 7 && h->payload[h->payload_bytes - 1] >> (start & 7))
    return "streams: bits after the last that are not 0";
  return nullptr;
}

const char* decode(const Header& h, uint8_t* symbols) {
  if (h.constant) {
    if (h.n) std::memset(symbols, h.symbol, size_t(h.n));
    return nullptr;
  }
  Tables tables;
  fill_tables(h.lengths, &tables);
  Cursor cursors[kStreams];
  const int64_t chunk = (h.n - 1) / h.streams + 1;
  for (int s = 0; s < h.streams; ++s)
    cursors[s] = {s ? h.ends[s - 1] : 0, symbols + std::min(h.n, s * chunk), symbols + std::min(h.n, (s + 1) * chunk)};
  if (h.streams == kStreams) run<kStreams>(h, tables.many, cursors);
  for (int s = 0; s < h.streams; ++s) {
    run<1>(h, tables.many, cursors + s);
    if (const char* wrong = finish(h, tables.one, cursors[s], h.ends[s])) return wrong;
  }
  return nullptr;
}

}  // namespace slim::huffman
