// SPDX-License-Identifier: Apache-2.0
// Canonical Huffman codes of at most 12 bits over bytes, in one bit stream that is entered at up to four points.
//
//   blob:  0  u8   version, 1
//          1  u8   kind: 0 constant (no symbol, or one symbol n times; the blob ends after n), 1 coded
//          2  u8   constant: the symbol (0 if n = 0); coded: the largest symbol that occurs
//          3  u8   streams: constant 0; coded 1 or 4
//          4  u64  n, the number of symbols
//         12       code lengths of the symbols 0 ... largest, in nibbles, low nibble first, the last byte filled with 0:
//                    0 the symbol does not occur, 1 ... 12 its length,
//                    13 a b: a + 16 * b + 3 symbols that do not occur, 14 a: the length before, a + 3 times more
//          +  u64  for each stream, the bit at which it ends
//          +       bits. Bit b is bit (b & 7) of byte (b >> 3); those of the last byte that are left over are 0.
//
// Integers are little-endian. Stream s of S holds the symbols s * c ... (s + 1) * c - 1 with c = ceil(n / S), and begins
// where stream s - 1 ends, without alignment, so that the size follows from the histogram alone. Codes are canonical:
// numbered upwards by length, then by symbol; a code's most significant bit comes first in the stream.
#pragma once

#include <cstdint>

namespace slim::huffman {

constexpr int kSymbols = 256;
constexpr int kMaxLength = 12;
constexpr int kStreams = 4;
constexpr int64_t kManyStreams = 1 << 14;  // fewer symbols than this are one stream: less to store
constexpr int64_t kHeaderBytes = 12;

// counts [kSymbols] of symbols [n].
void count(const uint8_t* symbols, int64_t n, int64_t* counts);

// Code lengths [kSymbols] of least total size among those of at most kMaxLength bits, by package-merge (Larmore and
// Hirschberg, 1990). Absent symbols get 0; so does a symbol that is the only one.
void code_lengths(const int64_t* counts, uint8_t* lengths);

// Bytes of the blob for symbols of these counts.
int64_t encoded_size(const int64_t* counts, const uint8_t* lengths);

// Writes the blob of symbols [n]; `bytes` must be what encoded_size says.
void encode(const uint8_t* symbols, int64_t n, const uint8_t* lengths, int64_t bytes, uint8_t* blob);

// What a checked blob says.
struct Header {
  bool constant;
  uint8_t symbol;  // if constant
  int streams;
  int64_t n;
  uint8_t lengths[kSymbols];
  int longest;
  uint64_t ends[kStreams];  // bits
  const uint8_t* payload;   // [payload_bytes]
  int64_t payload_bytes;
};

// Checks everything but the bits themselves. Null, or what is wrong. Reads nothing beyond the blob; allocates nothing.
const char* read_header(const uint8_t* blob, int64_t bytes, int64_t n, Header* header);

// symbols [n] from a header that read_header accepted. Null, or what is wrong; then some of `symbols` are arbitrary.
const char* decode(const Header& header, uint8_t* symbols);

}  // namespace slim::huffman
